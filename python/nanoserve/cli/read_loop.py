"""The read-eval-print loop of `nanoserve chat`: lines to turns and commands. Bad input never ends it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from nanoserve.cli.answer import Answer, show_answer
from nanoserve.cli.byte_size import format_size
from nanoserve.cli.conversation import Conversation, Messages, PlainText
from nanoserve.cli.terminal import say
from nanoserve.errors import RequestRefused

if TYPE_CHECKING:
    from nanoserve.llm import LLM
    from nanoserve.sampling import SamplingParams

PROMPT, CONTINUED = "> ", ". "
WHAT_TO_DO = "/undo takes the last turn back, /reset starts over, and --max-model-len sets the limit if the model has more"


class ReadLoop:
    """Reads stdin until it ends, or the user does."""

    def __init__(
        self, llm: LLM, params: SamplingParams, system: str | None, plain: bool, quiet: bool = False
    ) -> None:
        self.llm = llm
        self.params = params
        self.quiet = quiet
        self.plain = plain
        self.conversation: Conversation = PlainText(llm, params) if plain else Messages(llm, params, system)
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/help": (self._help, "this list"),
            "/reset": (self._reset, "forget the conversation, keep the system message"),
            "/system": (self._system, "TEXT: set the system message; without TEXT, show it"),
            "/undo": (self._undo, "take the last turn back"),
            "/stats": (self._stats, "tokens, prefix cache and memory"),
            "/save": (self._save, "FILE: write the conversation to a new file"),
            "/exit": (self._exit, "leave; Ctrl-D does, too"),
        }
        self._is_over = False

    def run(self) -> None:
        if sys.stdin.isatty():
            import readline  # noqa: F401 - input() edits lines with it

            if isinstance(sys.stdin, TextIOWrapper):
                sys.stdin.reconfigure(errors="replace")  # a mistyped byte must not end the conversation
        try:
            while not self._is_over:
                line = _read()
                if line is None:
                    break
                self.take(line)
        except KeyboardInterrupt:
            say("")

    def take(self, line: str) -> None:
        """One line of input: a message or a command. "//" begins a message that begins with "/"."""
        if not line.strip():
            return
        if not line.startswith("/") or line.startswith("//"):
            self._turn(line[1:] if line.startswith("//") else line)
            return
        name, _, rest = line.strip().partition(" ")
        command = self._commands.get(name)
        if command is None:
            say(f"{name}: no such command; /help lists them, and // begins a message with a slash")
        else:
            command[0](rest.strip())

    def _turn(self, text: str) -> None:
        try:
            deltas = self.conversation.begin(text)
        except RequestRefused as error:
            say(f"refused: {error}. The conversation is as it was: {WHAT_TO_DO}.")
            return
        except ValueError as error:
            say(f"refused: {error}. The conversation is as it was.")
            return
        answer = show_answer(deltas)
        if self._keeps(text, answer) and not self.quiet:
            say(answer.summary(), dim=True)
            self._tell_the_end(answer)

    def _keeps(self, text: str, answer: Answer) -> bool:
        """Whether the turn became part of the conversation."""
        if answer.output is not None and answer.output.finish_reason == "error":
            say(f"error: {answer.output.error}. The conversation is as it was.")
            return False
        if answer.is_stopped and not answer.text:
            say("[stopped before anything came: your message is not part of the conversation]")
            return False
        if answer.is_stopped:
            say("[stopped: what came is part of the conversation, /undo takes it back]")
        self.conversation.turns.append((text, answer.text))
        return True

    def _tell_the_end(self, answer: Answer) -> None:
        if answer.output is None or answer.output.finish_reason != "length":
            return
        most = self.llm.engine.executor.max_model_len
        used = answer.output.usage.prompt_tokens + answer.output.usage.completion_tokens
        if used >= most:
            say(f"[the context is full, {used} of {most} tokens: {WHAT_TO_DO}]")
        else:
            say(f"[cut off at --max-tokens {self.params.max_tokens}]", dim=True)

    # ---- commands

    def _help(self, _: str) -> None:
        for name, (_method, purpose) in self._commands.items():
            say(f"  {name:8} {purpose}")
        say('A line that ends with "\\" goes on with the next one.')

    def _reset(self, _: str) -> None:
        self.conversation.turns.clear()
        say("The conversation is empty.")

    def _system(self, text: str) -> None:
        if self.plain:
            say("Plain text has no system message.")
        elif text:
            self.conversation.system = text
            say(
                "The system message is set. The next turn computes the conversation anew: its beginning changed."
            )
        else:
            say("No system message." if self.conversation.system is None else self.conversation.system)

    def _undo(self, _: str) -> None:
        if self.conversation.turns:
            text, _answer = self.conversation.turns.pop()
            say(f"Taken back: {text}")
        else:
            say("There is no turn to take back.")

    def _stats(self, _: str) -> None:
        engine = self.llm.engine
        engine.audit()
        stats = engine.get_stats()
        say(f"  turns             {len(self.conversation.turns)}")
        say(f"  tokens computed   {stats['prefill_tokens']} of prompts, {stats['decode_tokens']} of answers")
        say(f"  prefix cache      {100 * stats['cache_hit_rate']:.0f}% of prompt tokens found in it")
        used, pool = engine.kv_pool.num_used_pages, engine.kv_pool
        say(
            f"  KV cache          {used} of {pool.num_pages} pages, {format_size(used * pool.page_bytes)} of "
            f"{format_size(pool.num_pages * pool.page_bytes)}"
        )
        say(f"  context           at most {engine.executor.max_model_len} tokens")

    def _save(self, name: str) -> None:
        if not name:
            say("/save: name a file")
            return
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(self.conversation.saved())
        except FileExistsError:
            say(f"/save: {name} exists, and nothing is overwritten")
        except (OSError, RuntimeError) as error:  # RuntimeError: no such user in ~user
            say(f"/save: {error}")
        else:
            say(f"Saved to {name}.")

    def _exit(self, _: str) -> None:
        self._is_over = True


def _read() -> str | None:
    """The next message: a line, or several joined by backslashes at their ends. None at the end of stdin."""
    lines: list[str] = []
    while (line := _read_line(CONTINUED if lines else PROMPT)) is not None:
        lines.append(line)
        if not line.endswith("\\"):
            return "\n".join([part[:-1] for part in lines[:-1]] + lines[-1:])
    return "\n".join(part[:-1] for part in lines) if lines else None


def _read_line(prompt: str) -> str | None:
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.removesuffix("\n").removesuffix("\r") if line else None
    try:
        return input(prompt)
    except EOFError:
        say("")
        return None
