"""A checkpoint opened for a command: progress on a terminal, what int8 weights cost, and what the checkpoint asks for in vain."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from nanoserve.cli.progress import LoadingBars
from nanoserve.cli.terminal import say

if TYPE_CHECKING:
    from nanoserve.llm import LLM


def open_model(
    model: str, engine: dict[str, Any], *, needs_template: bool = False, quiet: bool = False
) -> LLM:
    """The LLM of a directory or hub name, with LLM's keywords in `engine`.

    Args:
        needs_template: refuse a checkpoint without chat template, before its weights are read.
        quiet: nothing is shown but what went wrong.

    Raises:
        CheckpointError, ValueError: as LLM.
    """
    from nanoserve.llm import LLM  # the native module and all else, only now

    if needs_template:
        _require_template(model, engine.get("revision"))
    with LoadingBars() as bars, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said below, in the command's own way
        on_load, on_progress = (None, None) if quiet else (bars.on_load, bars.on_progress)
        llm = LLM(model, on_load=on_load, on_progress=on_progress, **engine)
    if llm.quantization_report is not None and not quiet:
        for line in llm.quantization_report.lines():
            say(line, dim=True)
    if llm.generation.not_applied and not quiet:
        listed = ", ".join(llm.generation.not_applied)
        say(f"note: generation_config.json asks for {listed}, which nanoserve does not do", dim=True)
    return llm


class _NoSpecialTokens:
    """Enough of a tokenizer to see whether there is a template."""

    special_tokens: dict[str, str] = {}  # noqa: RUF012 - never written


def _require_template(model: str, revision: str | None) -> None:
    from nanoserve.models.checkpoint import checkpoint_directory
    from nanoserve.text.chat_template import ChatTemplate

    directory = checkpoint_directory(model, revision=revision, weights=False)
    if ChatTemplate.load(directory, _NoSpecialTokens()) is None:
        raise ValueError(
            f"{model}: this checkpoint has no chat template, so nobody knows how it expects messages to be written. "
            "Continue plain text instead: nanoserve chat --plain, or nanoserve generate without --chat"
        )
