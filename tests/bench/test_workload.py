"""Workload files: checked field by field, and the same token ids everywhere and always."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanoserve.workloads import Workload, workload_names
from nanoserve.workloads.workload import SplitMix64

FILE = {
    "description": "two sizes", "metric": "output_tokens_per_s", "seed": 5, "generator": "splitmix64", "requests": 10,
    "prompt_tokens": [3, 9], "output_tokens": [1, 4], "shared_prefix_tokens": 2, "concurrent": 4,
}  # fmt: skip


def written(folder: Path, **changes: Any) -> Path:
    held = {name: value for name, value in {**FILE, **changes}.items() if value is not ...}
    file = folder / "own.json"
    file.write_text(json.dumps(held))
    return file


def test_the_generator_is_splitmix64() -> None:
    """The published first numbers of seed 1234567."""
    draw = SplitMix64(0, 1234567)
    assert [draw.below(2**64) for _ in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize("name", workload_names())
def test_every_workload_is_valid_and_fits_the_peers(name: str) -> None:
    workload = Workload.load(name)
    assert workload.longest <= 4096 + 256
    requests = workload.draw(1000, 1)
    assert len(requests) == workload.num_requests
    assert all(0 <= token < 1000 for one in requests for token in one.prompt)


def test_the_workloads_are_the_ones_that_were_agreed_on() -> None:
    decode = {f"decode-{count}" for count in (1, 4, 16, 32)}
    assert set(workload_names()) == decode | set(
        "prefill-512 prefill-2048 mixed shared-prefix chatbot rag code summarisation".split()
    )
    mixed = Workload.load("mixed").lengths()
    assert len(mixed) == 64
    assert all(16 <= prompt <= 512 and 16 <= output <= 128 for prompt, output in mixed)
    assert len(set(mixed)) > 60
    for count in (1, 4, 16, 32):
        assert Workload.load(f"decode-{count}").lengths() == [(128, 64)] * count


def test_tokens_depend_on_file_and_round_alone() -> None:
    """Ids that are written down here: another machine, library or Python must draw them, too."""
    first = Workload.load("decode-1").draw(151936, 1)[0]
    assert (first.prompt[:4], first.output_tokens) == ([25442, 126576, 16284, 64133], 64)


def test_rounds_have_equal_lengths_and_other_tokens() -> None:
    workload = Workload.load("shared-prefix")
    one, two = workload.draw(8192, 1), workload.draw(8192, 2)
    assert [len(request.prompt) for request in one] == [len(request.prompt) for request in two]
    assert one == workload.draw(8192, 1)
    assert one[0].prompt[:8] != two[0].prompt[:8]


def test_prompts_share_the_prefix_and_nothing_else() -> None:
    requests = Workload.load("shared-prefix").draw(8192, 3)
    assert len({tuple(request.prompt[:384]) for request in requests}) == 1
    assert len({tuple(request.prompt[384:386]) for request in requests}) == 32


def test_scale_leaves_a_part_of_the_requests(tmp_path: Path) -> None:
    whole = Workload.load(written(tmp_path))
    half = Workload.load(written(tmp_path, scale=0.25))
    assert (half.num_requests, half.max_in_flight) == (3, 3)
    assert (whole.num_requests, whole.max_in_flight) == (10, 4)
    assert half.draw(100, 1) == whole.draw(100, 1)[:3]
    assert Workload.load(written(tmp_path, concurrent=...)).max_in_flight == 10


def test_warming_up_uses_no_measured_tokens() -> None:
    workload = Workload.load("decode-4")
    warm = workload.warm_up(8192)
    assert [one.output_tokens for one in warm] == [8, 8]
    assert all(one.prompt != measured.prompt for one in warm for measured in workload.draw(8192, 1))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("requests", 0, r"requests: 0 must be in \[1, 100000\]"),
        ("requests", 2.5, "requests: 2.5 must be a whole number"),
        ("requests", True, "requests: True must be a whole number"),
        ("requests", ..., "requests: is missing"),
        ("concurrent", 0, "concurrent: 0 must be in"),
        ("prompt_tokens", [9, 3], r"prompt_tokens: 3 must be in \[9, "),
        ("prompt_tokens", [1, 2, 3], "prompt_tokens: .* must be a number of tokens, or"),
        ("prompt_tokens", 0, "prompt_tokens: 0 must be in"),
        ("output_tokens", "many", "output_tokens: 'many' must be a whole number"),
        ("shared_prefix_tokens", -1, "shared_prefix_tokens: -1 must be in"),
        ("scale", 0, r"scale: 0 must be a number in \(0, 1\]"),
        ("scale", 1.5, "scale: 1.5 must be"),
        ("seed", -1, "seed: -1 must be in"),
        ("metric", "speed", "metric: 'speed' must be one of prefill_tokens_per_s, "),
        ("generator", "mersenne", "generator: 'mersenne' must be 'splitmix64'"),
        ("description", "", "description: '' must be a text"),
        ("name", "x", "name: no such field"),
    ],
)
def test_a_bad_field_is_named_with_its_file(tmp_path: Path, field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"own.json: {message}"):
        Workload.load(written(tmp_path, **{field: value}))


def test_what_is_no_workload_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'fast' is no workload: give a .json file, or one of chatbot, "):
        Workload.load("fast")
    with pytest.raises(ValueError, match=r"missing.json: cannot be read"):
        Workload.load(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold an object"):
        Workload.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="is no workload"):
        Workload.load("../checks")
