"""`nanoserve generate`: prompts in, text out; the text alone on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanoserve.cli.opening import open_model
from nanoserve.cli.options import sampling_params, with_engine, with_sampling
from nanoserve.cli.terminal import say, write

if TYPE_CHECKING:
    from nanoserve.llm import LLM
    from nanoserve.outputs import RequestOutput, TextDelta
    from nanoserve.sampling import SamplingParams


@with_engine
@with_sampling()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub name.", show_default=False)],
    prompt: Annotated[
        list[str] | None,
        typer.Option("-p", "--prompt", metavar="TEXT", help="A prompt; '-' reads it from stdin. May be given several "
                     "times: the prompts then share each step.", show_default=False),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", metavar="FILE", help="A prompt per line, blank lines aside; '-' is stdin.", show_default=False),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="All of --file is one prompt.", show_default=False)] = False,
    as_chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message: put it through the chat template.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object per completion and line: text, tokens, usage, log-probabilities.")
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Show text as it comes. [on a terminal, for a single completion]",
                     show_default=False),
    ] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No bars, no summary and no notes on stderr.")] = False,
    *,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:  # fmt: skip
    r"""Complete one or more prompts.

    Only the text goes to stdout, with a newline at its end; several completions are headed "==> 1/3 <==". What a run took
    goes to stderr. Sampling options that are not given are the checkpoint's own (generation_config.json), else the values
    in brackets below.

    Examples:
      nanoserve generate models/tiny-gpt -p "def main" --temperature 0
      echo "Why is the sky blue?" | nanoserve generate MODEL --chat -p -
      nanoserve generate MODEL --file prompts.txt --json > answers.jsonl
      nanoserve generate MODEL -p "Once" --stop $'\n' --seed 7 -n 3
    """
    prompts = _read_prompts(prompt or [], file, raw)
    if as_json and stream:
        raise ValueError("--stream: text cannot be streamed into --json, leave one of them out")
    num_completions = len(prompts) * sampling.get("n", 1)
    is_single = num_completions == 1
    if stream and not is_single:
        raise ValueError(f"--stream: shows one completion as it comes, not {num_completions}")
    sampling_params({}, sampling)  # refuse now what would be refused after a minute of loading
    for field in ("logprobs", "prompt_logprobs"):
        if field in sampling and not as_json:
            raise ValueError(f"--{field.replace('_', '-')}: only --json shows them")
    llm = open_model(model, engine, needs_template=as_chat, quiet=quiet)
    params = sampling_params(llm.sampling_defaults, sampling)
    if llm.tokenizer is None:
        raise ValueError(f"{model}: has no tokenizer, so it cannot read a text; LLM.generate takes token ids")
    began = time.perf_counter()
    first: float | None = None
    if is_single:
        shows = not as_json and (sys.stdout.isatty() if stream is None else stream)
        outputs, first = _run_single(llm, prompts[0], params, as_chat, shows)
        if shows:
            write("\n")
    else:
        shows = False
        outputs = (
            llm.chat([_message(text) for text in prompts], params)
            if as_chat
            else llm.generate(prompts, params)
        )
    took = time.perf_counter() - began
    if as_json:
        _write_json(outputs)
    elif not shows:
        _write_text(outputs)
    if not quiet:
        say(_summary(outputs, took, None if first is None else first - began), dim=True)
    _fail_if_any_did(outputs)


def _read_prompts(given: list[str], file: str | None, raw: bool) -> list[str]:
    if given.count("-") + (file == "-") > 1:
        raise ValueError("--prompt: '-' (stdin) can be read only once")
    if raw and file is None:
        raise ValueError("--raw: is about --file, which was not given")
    prompts = [sys.stdin.read().removesuffix("\n") if text == "-" else text for text in given]
    if file is not None:
        text = sys.stdin.read() if file == "-" else _read_file(file)
        lines = [text.removesuffix("\n")] if raw else [line for line in text.split("\n") if line.strip()]
        if not lines:
            raise ValueError(f"--file: {file} holds no prompt, only blank lines")
        prompts += lines
    if not prompts:
        raise ValueError("--prompt: nothing to complete; give -p TEXT, -p - for stdin, or --file FILE")
    return prompts


def _read_file(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--file: {name}: {error.strerror}") from error


def _message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _run_single(
    llm: LLM, prompt: str, params: SamplingParams, as_chat: bool, shows: bool
) -> tuple[list[RequestOutput], float | None]:
    """One prompt, piece by piece whether or not it is shown so: the moment of the first piece is part of the summary."""
    deltas: Generator[TextDelta] = (
        llm.stream_chat(_message(prompt), params) if as_chat else llm.stream(prompt, params)
    )
    first, output = None, None
    with closing(deltas):
        for delta in deltas:
            first = time.perf_counter() if first is None else first
            output = delta.output
            if shows:
                write(delta.text)
    assert output is not None, "the last delta has the output"
    return [output], first


def _write_text(outputs: list[RequestOutput]) -> None:
    completions = [completion for output in outputs for completion in output.outputs]
    for number, completion in enumerate(completions, start=1):
        if len(completions) > 1:
            write(f"==> {number}/{len(completions)} <==\n")
        write(f"{completion.text}\n")


def _write_json(outputs: list[RequestOutput]) -> None:
    """ASCII only: nothing in it can act on a terminal, and nothing is lost."""
    for number, output in enumerate(outputs):
        for completion in output.outputs:
            line: dict[str, Any] = {
                "prompt_index": number,
                "index": completion.index,
                "prompt": output.prompt,
                "text": completion.text,
                "token_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
                "usage": asdict(output.usage),
                "logprobs": None if completion.logprobs is None else list(map(asdict, completion.logprobs)),
            }
            if output.prompt_logprobs is not None:
                line["prompt_logprobs"] = [entry and asdict(entry) for entry in output.prompt_logprobs]
            if completion.error is not None:
                line["error"] = completion.error
            print(json.dumps(line, allow_nan=False))


def _summary(outputs: list[RequestOutput], took: float, first: float | None) -> str:
    prompt = sum(output.usage.prompt_tokens for output in outputs)
    cached = sum(output.usage.cached_tokens for output in outputs)
    made = sum(output.usage.completion_tokens for output in outputs)
    several = f"{len(outputs)} prompts, " if len(outputs) > 1 else ""
    waited = "" if first is None else f", the first after {first:.2f} s"
    return (
        f"{several}{prompt} prompt tokens ({cached} from cache), {made} tokens in {took:.2f} s "
        f"({made / max(took, 1e-9):.1f} tok/s){waited}"
    )


def _fail_if_any_did(outputs: list[RequestOutput]) -> None:
    failed = [completion.error for output in outputs for completion in output.outputs if completion.error]
    if failed:
        say(f"error: {len(failed)} completions failed, the first with: {failed[0]}")
        raise typer.Exit(1)
