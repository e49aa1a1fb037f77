"""The commands on a real pseudo-terminal: keys, Ctrl-C, streamed text, and control characters that are shown, not obeyed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cli.pseudo_terminal import Terminal
from nanoserve.cli.progress import PATIENCE, LoadingBars
from nanoserve.cli.terminal import visible, write

TINY_GPT = Path(__file__).resolve().parents[2] / "models" / "tiny-gpt"
ENDLESS = ["--ignore-eos", "--kv-cache", "64MiB", "--temperature", "1", "--seed", "3"]


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(random_chat: Path) -> None:
    """An answer of 60000 tokens would take most of a minute; the prompt is back at once."""
    with Terminal("chat", random_chat, *ENDLESS) as terminal:
        terminal.expect("Ctrl-D to leave.")
        terminal.expect("> ")
        terminal.press("Hello\r")
        terminal.expect("Hello\r\n")
        before = len(terminal.shown)  # a cold start has drawn progress bars by now
        while len(terminal.shown) < before + 400:
            assert terminal.read_some(), terminal.shown
        terminal.press("\x03")
        terminal.expect("[stopped: what came is part of the conversation, /undo takes it back]")
        terminal.expect("stopped after ")
        terminal.expect("> ")
        terminal.press("/undo\r")
        terminal.expect("Taken back: Hello")
        terminal.press("/stats\r")
        terminal.expect("turns             0")
        terminal.expect("> ")
        assert terminal.wait(press="\x04") == 0
        assert "Traceback" not in terminal.shown


def test_ctrl_c_at_the_prompt_leaves(byte_chat: Path) -> None:
    with Terminal("chat", byte_chat, "--temperature", "0", "--max-tokens", "8") as terminal:
        terminal.expect("> ")
        terminal.press("Hello\r")
        terminal.expect("from cache")
        terminal.expect("> ")
        terminal.press("half a mess")
        assert terminal.wait(press="\x03") == 0
        assert "Traceback" not in terminal.shown


def test_ctrl_c_ends_generate_with_130(random_chat: Path) -> None:
    words = ["-p", "x", "--max-tokens", "60000", *ENDLESS]
    with Terminal("generate", random_chat, *words) as terminal:
        while len(terminal.shown) < 600:
            assert terminal.read_some(), terminal.shown
        terminal.press("\x03")
        assert terminal.wait() == 130
        assert "interrupted" in terminal.shown
        assert "Traceback" not in terminal.shown


@pytest.mark.parametrize(
    ("token", "shown"), [(27, "\\x1b" * 3), (7, "\\x07" * 3), (10, "\r\n" * 3), (91, "[[[")]
)
def test_model_text_cannot_control_the_terminal(token: int, shown: str) -> None:
    words = ["-p", "def", "--temperature", "0", "--max-tokens", "3", "--logit-bias", f"{token}=100", "-q"]
    with Terminal("generate", TINY_GPT, *words) as terminal:
        assert terminal.wait() == 0
        assert terminal.shown == shown + "\r\n"


def test_the_models_brackets_are_text_not_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    write("[bold]a[/bold] \x1b[2J\x9b5m\x7f\r\b\t\nü€👋\u0301\x85", out)
    assert out.getvalue() == "[bold]a[/bold] \\x1b[2J\\x9b5m\\x7f\\x0d\\x08\t\nü€👋\u0301\\x85"


def test_every_control_character_but_two_is_shown() -> None:
    for code in (*range(0x20), *range(0x7F, 0xA0)):
        character = chr(code)
        assert visible(character) == (character if character in "\n\t" else f"\\x{code:02x}")
    assert visible(" ~\xa0") == " ~\xa0"


# ---- loading bars


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def bars(is_terminal: bool) -> tuple[LoadingBars, Clock, io.StringIO]:
    clock, out = Clock(), io.StringIO()
    console = Console(
        file=out, force_terminal=is_terminal, width=100, color_system=None, legacy_windows=False
    )
    return LoadingBars(console, clock), clock, out


def test_a_quick_start_shows_no_bars() -> None:
    loading, clock, out = bars(is_terminal=True)
    with loading:
        clock.now += PATIENCE - 0.01
        loading.on_load(10, 10, "embed")
        loading.on_progress(5, 5, "gemm")
        assert not loading.is_shown
    assert out.getvalue() == ""


def test_a_slow_start_shows_bytes_and_kernels() -> None:
    loading, clock, out = bars(is_terminal=True)
    with loading:
        clock.now += PATIENCE
        loading.on_load(512 * 2**20, 2**30, "embed")
        loading.on_progress(2, 11, "gemm_k64")
        assert loading.is_shown
    assert "weights" in out.getvalue()
    assert "512.0 MiB of 1.00 GiB" in out.getvalue()
    assert "2 of 11  gemm_k64" in out.getvalue()


def test_a_log_file_gets_no_bars() -> None:
    loading, clock, out = bars(is_terminal=False)
    with loading:
        clock.now += 60
        loading.on_load(1, 2, "embed")
    assert out.getvalue() == ""
