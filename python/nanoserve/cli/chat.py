"""`nanoserve chat`: a conversation in the terminal, or from a pipe."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nanoserve.cli.opening import open_model
from nanoserve.cli.options import sampling_params, with_engine, with_sampling
from nanoserve.cli.read_loop import ReadLoop
from nanoserve.cli.terminal import say

# One answer is shown, and its text only.
_OF_GENERATE = ("n", "logprobs", "prompt_logprobs")


@with_engine
@with_sampling(without=_OF_GENERATE, max_tokens="as many as the context has room for")
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub name.", show_default=False)],
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System message.", show_default=False)
    ] = None,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Continue plain text, for models without a chat template: each line is added to the "
                     "text so far, and the model goes on from there."),
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No greeting, no bars, no notes, no line of numbers.")] = False,
    *,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:  # fmt: skip
    r"""Talk with a model.

    Each turn sends the whole conversation; what was computed for the turns before comes from the prefix cache, and the line
    below an answer says how much. An answer ends when the model ends it, at --max-tokens, or when the context is full. Ctrl-C
    stops an answer and keeps what came; Ctrl-C or Ctrl-D at the prompt leaves. /help lists the commands. With a pipe for
    stdin, each line is a message.

    Examples:
      nanoserve chat Qwen/Qwen3-0.6B --system "Answer in one sentence."
      nanoserve chat models/tiny-gpt --plain --max-tokens 80
      printf 'Hello\nAnd now?\n' | nanoserve chat MODEL --temperature 0 --quiet
    """
    if plain and system is not None:
        raise ValueError("--system: plain text has no system message, leave out --plain or --system")
    sampling_params({}, sampling)  # refuse now what would be refused after a minute of loading
    llm = open_model(model, engine, needs_template=not plain, quiet=quiet)
    if llm.tokenizer is None:
        raise ValueError(f"{model}: has no tokenizer, so it cannot read a text")
    room = {"max_tokens": llm.engine.executor.max_model_len}  # an answer may fill the context
    loop = ReadLoop(llm, sampling_params({**llm.sampling_defaults, **room}, sampling), system, plain, quiet)
    if not quiet:
        say(
            f"{model}: {llm.engine.executor.max_model_len} tokens of context. /help for help, Ctrl-D to leave.",
            dim=True,
        )
    loop.run()
