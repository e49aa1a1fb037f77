"""nanoserve generate on real models: text alone on stdout, numbers on stderr, bad input as one sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nanoserve
from nanoserve.llm import LLM
from nanoserve.sampling import SamplingParams

TINY_GPT = Path(__file__).resolve().parents[2] / "models" / "tiny-gpt"
Run = Callable[..., Any]
GREEDY = ["--temperature", "0", "--max-tokens", "24"]
PROMPT = "def main"


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """What LLM.generate gives for the prompts used here."""
    prompts = [PROMPT, "class A", "import "]
    llm = LLM(TINY_GPT)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24))
    return {prompt: str(output.text) for prompt, output in zip(prompts, outputs, strict=True)}


@pytest.mark.parametrize("how", [[], ["--stream"], ["--no-stream"]], ids=["default", "stream", "no-stream"])
def test_stdout_is_the_text_and_a_newline(run: Run, expected: dict[str, str], how: list[str]) -> None:
    result = run("generate", TINY_GPT, "-p", PROMPT, *GREEDY, *how)
    assert result.exit_code == 0
    assert result.stdout == expected[PROMPT] + "\n"


def test_the_summary_is_one_line_on_stderr(run: Run) -> None:
    result = run("generate", TINY_GPT, "-p", PROMPT, *GREEDY)
    pattern = r"8 prompt tokens \(0 from cache\), 24 tokens in \d+\.\d\d s \(\d+\.\d tok/s\), the first after \d+\.\d\d s\n"
    assert re.fullmatch(pattern, result.stderr)
    assert run("generate", TINY_GPT, "-p", PROMPT, *GREEDY, "--quiet").stderr == ""


def test_several_completions_are_told_apart(run: Run, expected: dict[str, str]) -> None:
    result = run("generate", TINY_GPT, "-p", PROMPT, "-p", "class A", *GREEDY)
    assert result.stdout == f"==> 1/2 <==\n{expected[PROMPT]}\n==> 2/2 <==\n{expected['class A']}\n"
    assert result.stderr.startswith("2 prompts, 15 prompt tokens")


def test_prompts_come_from_stdin_and_files(run: Run, expected: dict[str, str], tmp_path: Path) -> None:
    assert (
        run("generate", TINY_GPT, "-p", "-", *GREEDY, stdin=PROMPT + "\n").stdout == expected[PROMPT] + "\n"
    )
    lines = tmp_path / "prompts.txt"
    lines.write_text(f"{PROMPT}\n\n  \nclass A\n")
    both = f"==> 1/2 <==\n{expected[PROMPT]}\n==> 2/2 <==\n{expected['class A']}\n"
    assert run("generate", TINY_GPT, "--file", lines, *GREEDY).stdout == both
    assert run("generate", TINY_GPT, "--file", "-", *GREEDY, stdin=lines.read_text()).stdout == both
    raw = json.loads(run("generate", TINY_GPT, "--file", lines, "--raw", *GREEDY, "--json").stdout)
    assert raw["prompt"] == f"{PROMPT}\n\n  \nclass A"


def test_json_is_an_object_per_completion(run: Run, expected: dict[str, str]) -> None:
    words = ["--json", "--logprobs", "2", "--prompt-logprobs", "0", "-n", "2"]
    result = run("generate", TINY_GPT, "-p", PROMPT, "-p", "import ", *GREEDY, *words)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["prompt_index"], line["index"]) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [line["text"] for line in lines] == [expected[PROMPT]] * 2 + [expected["import "]] * 2
    first = lines[0]
    assert (first["prompt"], first["finish_reason"], first["stop_reason"]) == (PROMPT, "length", None)
    assert bytes(first["token_ids"]).decode() == expected[PROMPT]
    assert first["usage"] == {"prompt_tokens": 8, "completion_tokens": 48, "cached_tokens": 0}
    assert [entry["token"] for entry in first["logprobs"]] == first["token_ids"]
    assert all(entry["rank"] == 1 and len(entry["top"]) == 2 for entry in first["logprobs"])
    assert len(first["prompt_logprobs"]) == 8
    assert first["prompt_logprobs"][0] is None
    assert "\x1b" not in result.stdout


def test_sampling_options_do_what_they_say(run: Run, expected: dict[str, str]) -> None:
    text = expected[PROMPT]
    cut = run("generate", TINY_GPT, "-p", PROMPT, *GREEDY, "--stop", text[5:8], "--json").stdout
    assert (json.loads(cut)["text"], json.loads(cut)["stop_reason"]) == (
        text[: text.index(text[5:8])],
        text[5:8],
    )
    first = ord(text[0])
    banned = run("generate", TINY_GPT, "-p", PROMPT, *GREEDY, "--logit-bias", f"{first}=-100").stdout
    assert banned[0] != text[0]
    seeded = [
        run("generate", TINY_GPT, "-p", PROMPT, "--seed", seed, "--max-tokens", "24").stdout for seed in "112"
    ]
    assert seeded[0] == seeded[1] != seeded[2]


def test_chat_puts_the_prompt_through_the_template(run: Run, random_chat: Path) -> None:
    words = ["--chat", "--json", "--max-tokens", "4", "--kv-cache", "4MiB"]
    result = run("generate", random_chat, "-p", "Hello", "-p", "You", *words)
    prompts = [json.loads(line)["prompt"] for line in result.stdout.splitlines()]
    assert prompts == [
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in ("Hello", "You")
    ]
    (single,) = run("generate", random_chat, "-p", "Hello", *words).stdout.splitlines()
    assert json.loads(single)["token_ids"] == json.loads(result.stdout.splitlines()[0])["token_ids"]


def test_the_checkpoint_decides_what_is_not_given_and_says_what_it_cannot_have(
    run: Run, random_chat: Path
) -> None:
    words = ["generate", random_chat, "-p", "Hello", "--max-tokens", "8", "--kv-cache", "4MiB"]
    greedy = [run(*words, "--seed", seed) for seed in "12"]
    assert greedy[0].stdout == greedy[1].stdout, "temperature 0 comes from generation_config.json"
    assert greedy[0].stderr.startswith("note: generation_config.json asks for no_repeat_ngram_size=3, which")
    warm = [run(*words, "--temperature", "1", "--seed", seed, "--quiet") for seed in "12"]
    assert warm[0].stdout != warm[1].stdout
    assert warm[0].stderr == ""


def test_a_checkpoint_that_asks_for_many_tokens_gets_them(run: Run, tmp_path: Path) -> None:
    """min_new_tokens beyond our default of max_tokens: the command does what LLM does."""
    for file in TINY_GPT.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").write_text('{"min_new_tokens": 150, "do_sample": false}')
    told = run("generate", tmp_path, "-p", "Hello", "--json", "--kv-cache", "8MiB")
    assert told.exit_code == 0, told.stderr
    assert len(json.loads(told.stdout)["token_ids"]) == 150


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--prompt: nothing to complete; give -p TEXT"),
        (["-p", "x", "--raw"], "--raw: is about --file"),
        (["-p", "-", "--file", "-"], "--prompt: '-' (stdin) can be read only once"),
        (["--file", "/no/such/file"], "--file: /no/such/file: No such file or directory"),
        (["--file", "/dev/null"], "--file: /dev/null holds no prompt, only blank lines"),
        (["-p", "x", "-p", "y", "--stream"], "--stream: shows one completion as it comes, not 2"),
        (["-p", "x", "-n", "2", "--stream"], "--stream: shows one completion as it comes, not 2"),
        (["-p", "x", "--json", "--stream"], "--stream: text cannot be streamed into --json"),
        (["-p", ""], "prompt_tokens: empty"),
        (["-p", "x" * 600], "request 0: a prompt of 600 tokens leaves no room for output"),
        (["-p", "x", "-p", "y" * 600], "prompts[1]: request 1: a prompt of 600 tokens"),
        (["-p", "x", "--chat"], f"{TINY_GPT}: this checkpoint has no chat template"),
        (["-p", "x", "--stop-token-id", "256"], ""),
        (["-p", "x", "--max-model-len", "513"], "max_model_len: 513 must be in [1, the model's 512]"),
        (["-p", "x", "--kv-cache", "1kB"], "kv_cache_bytes: 1000 is less than one page"),
        (["-p", "x", "--dtype", "int4"], "dtype: 'int4' must be one of auto, float32, bfloat16"),
        (["-p", "x", "--threads", "0"], "num_threads: 0 must be in [1, 4096]"),
        (["-p", "x", "--revision", "main"], "revision: 'main' is for the hub"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_exit_code_2(run: Run, words: list[str], message: str) -> None:
    result = run("generate", TINY_GPT, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


def test_an_answer_obeys_the_schema_in_a_file(run: Run, tmp_path: Path) -> None:
    schema = Path(__file__).parent / "point.schema.json"
    words = ["--json-schema", schema, "--max-tokens", "200", "--seed", "3"]
    result = run("generate", TINY_GPT, "-p", "point = ", *words)
    assert result.exit_code == 0, result.stderr
    point = json.loads(result.stdout)
    assert set(point) == {"x", "kind"}
    assert 0 <= point["x"] <= 99
    bad = tmp_path / "bad.json"
    bad.write_text('{"type": "string", "not": {}}')
    for name, why in (
        (bad, "structured_outputs.json: keyword 'not' is not supported"),
        (tmp_path / "gone.json", "No such file or directory"),
    ):
        result = run("generate", TINY_GPT, "-p", "x", "--json-schema", name)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == f"error: --json-schema: {name}: {why}\n"


def test_a_directory_that_is_no_checkpoint(run: Run, tmp_path: Path) -> None:
    result = run("generate", tmp_path, "-p", "x")
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path}: holds no config.json; it is empty\n"


def test_stdin_that_is_not_utf8(run: Run) -> None:
    result = run("generate", TINY_GPT, "-p", "-", stdin=b"caf\xe9 au lait")
    assert result.exit_code == 2
    assert result.stderr == "error: the input is not UTF-8: invalid continuation byte at byte 3\n"


def nanoserve_process(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(nanoserve.__file__).parents[1]),
        **options.pop("env", {}),
    }
    command = [sys.executable, "-m", "nanoserve", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def test_a_pipe_gets_the_models_bytes_as_they_are(expected: dict[str, str]) -> None:
    """Newlines and control characters included: only a terminal is protected."""
    process = nanoserve_process(
        "generate",
        TINY_GPT,
        "-p",
        PROMPT,
        "--temperature",
        "0",
        "--max-tokens",
        "3",
        "--logit-bias",
        "27=100",
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "\x1b\x1b\x1b\n"), err


def test_a_reader_that_leaves_early_ends_it_quietly(random_chat: Path) -> None:
    words = ["--max-tokens", "60000", "--ignore-eos", "--stream", "--kv-cache", "16MiB"]
    process = nanoserve_process("generate", random_chat, "-p", "x", *words)
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait(timeout=60) == 1
    for noise in ("error", "Traceback", "Exception ignored", "Broken pipe"):
        assert noise not in said


def test_a_machine_that_cannot_serve_is_exit_code_1_with_the_remedy(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    process = nanoserve_process("generate", TINY_GPT, "-p", "x", env={"NANOSERVE_CACHE_DIR": str(cache)})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith(f"error: kernel cache {cache}: mode 0777 lets other users write code")
    assert "Traceback" not in err
    (tmp_path / "no.so").write_bytes(b"")
    process = nanoserve_process(
        "generate", TINY_GPT, "-p", "x", env={"NANOSERVE_NATIVE": str(tmp_path / "no.so")}
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith(f"error: {tmp_path / 'no.so'}: file too short")


def test_a_bug_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLM, "stream", lambda *_: 1 / 0)
    result = run("generate", TINY_GPT, "-p", "x")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_request_that_fails_inside_is_exit_code_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoserve.text.text_output import TextOutput

    def broken(self: TextOutput, token: int) -> None:
        raise RuntimeError("the detokenizer broke")

    monkeypatch.setattr(TextOutput, "push", broken)
    result = run("generate", TINY_GPT, "-p", "x", "--quiet")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: 1 completions failed, the first with: ")
    assert "the detokenizer broke" in result.stderr


def test_what_int8_cost_is_said_on_stderr(run: Run) -> None:
    words = ["generate", TINY_GPT, "-p", PROMPT, *GREEDY, "--quantization", "int8"]
    result = run(*words)
    report = LLM(TINY_GPT, quantization="int8").quantization_report
    assert report is not None
    assert result.stderr.startswith(f"{report}\n")
    assert re.match(
        r"int8: \d+ weights, relative RMS error \d\.\d\d%\nint8: the most \d\.\d\d% in \S+; of one",
        str(report),
    )
    assert run(*words, "--quiet").stderr == ""
    assert "int8" not in run("generate", TINY_GPT, "-p", PROMPT, *GREEDY).stderr
