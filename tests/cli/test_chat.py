"""nanoserve chat: turns, history, prefix cache, commands, interruptions, and a conversation that survives bad input."""

from __future__ import annotations

import inspect
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanoserve.cli import answer as answer_module
from nanoserve.cli.answer import show_answer
from nanoserve.cli.read_loop import ReadLoop
from nanoserve.llm import LLM
from nanoserve.outputs import TextDelta
from nanoserve.sampling import SamplingParams

TINY_GPT = Path(__file__).resolve().parents[2] / "models" / "tiny-gpt"
Run = Callable[..., Any]
GREEDY = ["--temperature", "0", "--max-tokens", "16"]
SUMMARY = re.compile(
    r"prompt (\d+) tokens, (\d+) from cache \((\d+)%\), (\d+) tokens in \d+\.\d s \(\d+\.\d tok/s\)"
)


@pytest.fixture
def loop(byte_chat: Path) -> ReadLoop:
    llm = LLM(byte_chat, kv_cache_bytes=8 * 2**20)
    return ReadLoop(llm, SamplingParams(temperature=0, max_tokens=16), system=None, plain=False)


def is_clean(llm: LLM) -> bool:
    llm.engine.audit()
    return not llm.engine.has_unfinished


# ---- turns


def test_a_turn_is_an_answer_on_stdout_and_numbers_on_stderr(run: Run, byte_chat: Path) -> None:
    result = run("chat", byte_chat, *GREEDY, stdin="Hello\n")
    llm = LLM(byte_chat)
    expected = llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(temperature=0, max_tokens=16))
    assert result.exit_code == 0
    assert result.stdout == f"{expected[0].text}\n"
    greeting, numbers, end = result.stderr.splitlines()
    assert greeting == f"{byte_chat}: 512 tokens of context. /help for help, Ctrl-D to leave."
    assert SUMMARY.fullmatch(numbers)
    assert end == "[cut off at --max-tokens 16]"
    assert run("chat", byte_chat, *GREEDY, "--quiet", stdin="Hello\n").stderr == ""


def test_the_next_turn_finds_the_whole_conversation_in_the_cache(loop: ReadLoop, capfd: Any) -> None:
    loop.take("Hello")
    loop.take("And now?")
    first, second = SUMMARY.findall(capfd.readouterr().err)
    history = int(first[0]) + int(first[3])
    assert int(first[1]) == 0
    assert int(second[0]) > history
    assert int(second[1]) >= history - 1 - 16, "all but the last token, in whole pages"
    assert int(second[2]) == round(100 * int(second[1]) / int(second[0]))
    assert is_clean(loop.llm)


def test_the_history_and_the_system_message_reach_the_model(
    loop: ReadLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[dict[str, str]]] = []
    stream_chat = loop.llm.stream_chat

    def record(messages: Any, params: Any) -> Iterator[TextDelta]:
        seen.append(list(messages))
        return stream_chat(messages, params)

    monkeypatch.setattr(loop.llm, "stream_chat", record)
    loop.take("/system Be brief.")
    loop.take("one")
    loop.take("//two")
    (_, answer), _ = loop.conversation.turns
    system = {"role": "system", "content": "Be brief."}
    one = {"role": "user", "content": "one"}
    assert seen[0] == [system, one]
    assert seen[1] == [
        system,
        one,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "/two"},
    ]


def test_a_backslash_joins_lines_and_blank_lines_say_nothing(
    run: Run, byte_chat: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved.json"
    result = run("chat", byte_chat, *GREEDY, stdin=f"one\\\ntwo\\\nthree\n\n   \n/save {saved}\n")
    assert result.exit_code == 0
    messages = json.loads(saved.read_text())["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["one\ntwo\nthree"]


def test_plain_text_goes_on_where_it_was(run: Run, tmp_path: Path) -> None:
    saved = tmp_path / "saved.txt"
    result = run("chat", TINY_GPT, "--plain", *GREEDY, stdin=f"def main\nclass A\n/save {saved}\n")
    llm, params = LLM(TINY_GPT), SamplingParams(temperature=0, max_tokens=16)
    first = llm.generate("def main", params)[0].text
    second = llm.generate(f"def main{first}\nclass A", params)[0].text
    assert result.stdout == f"{first}\n{second}\n"
    assert saved.read_text() == f"def main{first}\nclass A{second}\n"


def test_without_a_template_it_says_so_and_offers_plain_text(run: Run) -> None:
    result = run("chat", TINY_GPT, stdin="Hello\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "has no chat template" in result.stderr
    assert "--plain" in result.stderr


def test_options_that_make_no_sense_are_refused(run: Run) -> None:
    result = run("chat", TINY_GPT, "--plain", "--system", "x")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --system: plain text has no system message")
    for words in (["-n", "2"], ["--logprobs", "1"], ["--prompt-logprobs", "1"]):
        result = run("chat", TINY_GPT, *words)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "No such option" in result.stderr


# ---- what does not fit or fails


def test_a_full_context_is_said_with_numbers_and_keeps_the_conversation(loop: ReadLoop, capfd: Any) -> None:
    loop.take("Hello")
    turns = list(loop.conversation.turns)
    loop.take("x" * 600)
    said = capfd.readouterr().err
    found = re.search(
        r"refused: request \d+: a prompt of (\d+) tokens leaves no room for output, .* at most 512 tokens",
        said,
    )
    assert found
    assert int(found[1]) > 600
    assert "The conversation is as it was: /undo takes the last turn back, /reset starts over" in said
    assert loop.conversation.turns == turns
    loop.take("And now?")
    assert len(loop.conversation.turns) == 2
    assert is_clean(loop.llm)


def test_an_answer_that_fills_the_context_says_so(run: Run, byte_chat: Path) -> None:
    result = run(
        "chat", byte_chat, "--temperature", "0", "--ignore-eos", "--max-model-len", "256", stdin="Hello\n"
    )
    assert "[the context is full, 256 of 256 tokens: /undo takes the last turn back" in result.stderr


def test_a_message_the_template_refuses_leaves_no_trace(
    loop: ReadLoop, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loop.llm.chat_template is not None
    monkeypatch.setattr(loop.llm.chat_template, "render", _refuse)
    loop.take("Hello")
    assert capfd.readouterr().err == "refused: chat template: not today. The conversation is as it was.\n"
    assert loop.conversation.turns == []


def _refuse(*_: Any, **__: Any) -> str:
    raise ValueError("chat template: not today")


def test_a_failed_answer_is_not_part_of_the_conversation(
    loop: ReadLoop, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanoserve.text.text_output import TextOutput

    def broken(self: TextOutput, token: int) -> None:
        raise RuntimeError("the detokenizer broke")

    with monkeypatch.context() as patched:
        patched.setattr(TextOutput, "push", broken)
        loop.take("Hello")
    assert "the detokenizer broke" in capfd.readouterr().err
    assert loop.conversation.turns == []
    loop.take("Hello")
    assert len(loop.conversation.turns) == 1
    assert is_clean(loop.llm)


# ---- commands


def test_undo_and_reset(loop: ReadLoop, capfd: Any) -> None:
    for line in ("/undo", "one", "two", "/undo"):
        loop.take(line)
    assert [text for text, _ in loop.conversation.turns] == ["one"]
    said = capfd.readouterr().err
    assert "There is no turn to take back." in said
    assert "Taken back: two" in said
    loop.take("/system Be brief.")
    loop.take("/reset")
    assert (loop.conversation.turns, loop.conversation.system) == ([], "Be brief.")
    loop.take("/system")
    assert capfd.readouterr().err.endswith("Be brief.\n")


def test_save_writes_a_new_file_and_never_over_one(loop: ReadLoop, capfd: Any, tmp_path: Path) -> None:
    loop.take("one")
    path = tmp_path / "a file.json"
    loop.take(f"/save {path}")
    content = path.read_text()
    assert json.loads(content)["messages"][0] == {"role": "user", "content": "one"}
    loop.take("two")
    loop.take(f"/save {path}")
    assert path.read_text() == content
    loop.take("/save")
    loop.take("/save /no/such/place")
    loop.take("/save ~no-such-user-here/x")
    said = capfd.readouterr().err
    assert f"/save: {path} exists, and nothing is overwritten" in said
    assert "/save: name a file" in said
    assert "No such file or directory" in said


def test_stats_help_unknown_and_exit(run: Run, byte_chat: Path) -> None:
    result = run("chat", byte_chat, *GREEDY, stdin="one\n/stats\n/help\n/nope x\n/exit\nnever read\n")
    assert result.exit_code == 0
    assert len(SUMMARY.findall(result.stderr)) == 1, "one answer, and nothing after /exit"
    assert re.search(r"turns +1\n", result.stderr)
    assert re.search(r"KV cache +\d+ of \d+ pages, .* of ", result.stderr)
    for command in ("/help", "/reset", "/system", "/undo", "/stats", "/save", "/exit"):
        assert re.search(rf"\n  {command} +\w", result.stderr), command
    assert "/nope: no such command; /help lists them" in result.stderr


# ---- interruptions


def test_ctrl_c_stops_the_answer_and_keeps_what_came(
    loop: ReadLoop, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    def write(text: str) -> None:
        shown.append(text)
        if len(shown) == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(answer_module, "write", write)
    loop.take("Hello")
    ((text, kept),) = loop.conversation.turns
    assert (text, kept) == ("Hello", "".join(shown[:5])), "all that came"
    said = capfd.readouterr().err
    assert "[stopped: what came is part of the conversation, /undo takes it back]" in said
    assert re.search(r"stopped after 5 tokens in \d+\.\d s", said)
    assert is_clean(loop.llm)
    loop.take("And now?")
    assert len(loop.conversation.turns) == 2


def test_ctrl_c_in_the_middle_of_a_step_leaves_the_engine_clean(
    loop: ReadLoop, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the prompt is computed, before anything came."""
    executor = loop.llm.engine.executor
    forward = executor.forward

    def interrupted(batch: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return forward(batch)

    with monkeypatch.context() as patched:
        patched.setattr(executor, "forward", interrupted)
        loop.take("Hello")
    assert "[stopped" in capfd.readouterr().err
    assert is_clean(loop.llm)
    loop.conversation.turns.clear()
    loop.take("Hello")
    assert len(loop.conversation.turns) == 1


def test_nothing_came_means_no_turn(loop: ReadLoop, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Iterator[TextDelta]:
        signal.raise_signal(signal.SIGINT)
        yield TextDelta(0, "never shown")

    monkeypatch.setattr(loop.llm, "stream_chat", interrupted)
    loop.take("Hello")
    assert loop.conversation.turns == []
    assert (
        "[stopped before anything came: your message is not part of the conversation]"
        in capfd.readouterr().err
    )


def test_an_impatient_second_ctrl_c_does_not_hit_the_cleaning_up() -> None:
    cleaned: list[str] = []

    def deltas() -> Iterator[TextDelta]:
        try:
            yield TextDelta(0, "a", [1])
            signal.raise_signal(signal.SIGINT)
            yield TextDelta(0, "never shown", [2])
        finally:
            signal.raise_signal(signal.SIGINT)
            cleaned.append("done")

    before = signal.getsignal(signal.SIGINT)
    answer = show_answer(deltas())
    assert (answer.text, answer.num_tokens, answer.is_stopped, cleaned) == ("a", 1, True, ["done"])
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stopped_answer_is_closed_before_the_next_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not whenever its generator happens to be collected: until then its request would hold pages."""

    def deltas() -> Iterator[TextDelta]:
        yield TextDelta(0, "ab", [1, 2])
        yield TextDelta(0, "c", [3])

    def write(text: str) -> None:
        if text == "c":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(answer_module, "write", write)
    generator = deltas()
    answer = show_answer(generator)
    assert (answer.text, answer.num_tokens, answer.is_stopped) == ("abc", 3, True)
    assert inspect.getgeneratorstate(generator) == inspect.GEN_CLOSED  # type: ignore[arg-type]


def test_ctrl_c_at_the_prompt_leaves_with_0(
    run: Run, byte_chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nanoserve.cli.read_loop._read", interrupted)
    assert run("chat", byte_chat).exit_code == 0
