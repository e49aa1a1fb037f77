"""Mutated checkpoints: a working load, or a ValueError that names the file. Never another exception, a crash, a hang or a grab
for memory; the corpora of support/loader_fuzz.py run in processes of their own, with a watchdog and a limit of memory.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoserve import CheckpointError, ModelConfig
from nanoserve.models.safetensors_file import read_safetensors
from support.loader_fuzz import HEADER, SIZES, read_all
from support.mutations import mutated_json
from support.safetensors_bytes import entry, write

ROOT = Path(__file__).resolve().parents[2]


def worker(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "python")])
    return subprocess.run(
        [sys.executable, *arguments, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures mapped memory the Linux way")
@pytest.mark.parametrize(
    ("corpus", "count"), [("safetensors", 2000), ("index", 1500), ("config", 2500), ("llm", 500)]
)
def test_mutated_checkpoints(tmp_path: Path, corpus: str, count: int) -> None:
    """Every case ends as it should, and the corpus is worth its name: some load, some are refused."""
    done = worker(tmp_path, "-m", "support.loader_fuzz", corpus, "20240607", str(count))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["complaints"] == []
    assert result["loaded"] + result["refused"] == count
    assert min(result["loaded"], result["refused"]) >= count // 100


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures mapped memory the Linux way")
@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("np.empty(1 << 30, np.uint8)", "MemoryError"),
        ("[].pop()", "IndexError: pop from empty list"),
        ("(_ for _ in ()).throw(ValueError('no file'))", "message 'no file'"),
        ("all(time.process_time() < start + 0.5 for _ in itertools.count())", " took 0."),
        ("time.sleep(60)", None),
        ("os.abort()", None),
    ],
)
def test_the_worker_notices(tmp_path: Path, broken: str, words: str | None) -> None:
    """Memory, other exceptions, messages without a file, slow cases, hangs and crashes all fail the worker's run."""
    program = (
        "import itertools, json, os, sys, time\nimport numpy as np\nimport support.loader_fuzz as fuzz\n"
        "start = time.process_time()\nfuzz.CASE_SECONDS, fuzz.WATCHDOG_SECONDS = 0.2, 4\n"
        f"case = lambda: ({broken}) and None\n"
        "fuzz.CORPORA['broken'] = (lambda rng, directory: itertools.repeat(case), 'json')\n"
        "print(json.dumps(fuzz.run('broken', 0, 1, fuzz.Path(sys.argv[1]))))\n"
    )
    done = worker(tmp_path, "-c", program)
    if words is None:
        assert done.returncode != 0
    else:
        assert words in json.loads(done.stdout)["complaints"][0], done.stderr


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["F32", "BF16", "F8_E4M3"]),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
tensors = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "BF16", "U8", "F4"]) | values,
     "shape": st.lists(st.integers(0, 4), max_size=4) | values,
     "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | values}
)  # fmt: skip
FUZZ = settings(max_examples=300, suppress_health_check=list(HealthCheck))


@FUZZ
@given(header=st.dictionaries(st.text(max_size=6), tensors | values, max_size=4), data=st.binary(max_size=64))
def test_headers_of_any_json(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    """Whatever the header says, what opens fits in the file and reads as its shape."""
    path = write(tmp_path / "m.safetensors", header, data)
    opened, refusal = {}, ""
    try:
        opened = read_safetensors(path)
    except CheckpointError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith("m.safetensors: ")
        return
    assert sum(tensor.nbytes for tensor in opened.values()) == len(data)
    read_all(path)


@FUZZ
@given(data=st.data())
def test_edited_files(tmp_path: Path, data: st.DataObject) -> None:
    """Byte edits, cuts and insertions anywhere, as hypothesis likes them."""
    good = write(tmp_path / "good.safetensors", HEADER, bytes(48)).read_bytes()
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        match data.draw(st.sampled_from(["edit", "cut", "insert"])):
            case "edit" if raw:
                raw[at] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[at : at + data.draw(st.integers(1, 20))]
            case _:
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    (tmp_path / "bad.safetensors").write_bytes(bytes(raw))
    refusal = "bad.safetensors"
    try:
        read_all(tmp_path / "bad.safetensors")
    except CheckpointError as error:
        refusal = str(error)
    assert "bad.safetensors" in refusal


LLAMA = {"model_type": "llama", "vocab_size": 23, **SIZES["llama"]}
ROPE_NAN = {"rope_type": "@nan@"}
THETA_NAN = {"rope_type": "default", "rope_theta": "@nan@"}


@pytest.mark.parametrize(
    "field",
    ["rope_parameters", "rope_scaling", "layer_types", "eos_token_id", "hidden_act", "hidden_size", "new"],
)
@pytest.mark.parametrize("value", ["@nan@", ROPE_NAN, THETA_NAN, "@huge@", "@half@", {"@half@": 1}])
def test_config_values_no_parser_expects(tmp_path: Path, field: str, value: Any) -> None:
    """NaN where a name belongs, numbers of 100,000 digits, half a surrogate pair."""
    (tmp_path / "config.json").write_bytes(mutated_json(random.Random(0), {**LLAMA, field: value}, edits=0))
    with pytest.raises(CheckpointError, match=r"^config\.json: "):
        ModelConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "@"}, {"layer_types": "@"}, {"eos_token_id": "@"}, {"hidden_act": "@"}, {"new": "@"}, {"rope_scaling": "@"},
     {"rope_scaling": {"rope_type": "@"}}, {"rope_scaling": {"rope_type": "linear", "factor": "@"}},
     {"rope_scaling": {"rope_type": "longrope", "long_factor": "@", "short_factor": [1] * 4}}],
    ids=str,
)  # fmt: skip
def test_config_values_nested_to_the_limit(tmp_path: Path, change: dict[str, Any]) -> None:
    """What the parser still takes at Python's recursion limit, the message must be able to show."""
    for depth in range(840, 1001):
        text = json.dumps({**LLAMA, **change}).replace('"@"', "[" * depth + "]" * depth)
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"^config\.json: "):
            ModelConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_header_values_nested_to_the_limit(tmp_path: Path, key: str) -> None:
    """What the parser still takes, the message must be able to show."""
    for depth in range(850, 1001):
        text = json.dumps({"a": {**entry(), key: "@"}}).replace('"@"', "[" * depth + "]" * depth)
        with pytest.raises(CheckpointError, match=r"^m\.safetensors: "):
            read_safetensors(write(tmp_path / "m.safetensors", text.encode(), bytes(8)))
