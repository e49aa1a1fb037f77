"""Options that several commands share, each group from one table.

    @with_sampling()   one option per SamplingParams field; the command gets those that were given, as `sampling`
    @with_engine       memory and execution; the command gets keyword arguments of LLM, as `engine`

A sampling option's help is the field's sentence in SamplingParams' docstring, its limits are the ones SamplingParams checks,
and its type follows from the table: nothing is written down twice.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from nanoserve.checks import shown
from nanoserve.cli.byte_size import parse_size
from nanoserve.sampling import SamplingParams
from nanoserve.structured import StructuredOutputs

Command = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Option:
    """A row: keyword of SamplingParams or LLM, command-line names, type of a value, and how help shows it."""

    field: str
    names: tuple[str, ...]
    kind: Any
    panel: str
    metavar: str | None = None
    help: str = ""
    default: str = ""  # as help shows it

    def parameter(self) -> inspect.Parameter:
        """The option as a parameter of the command's function; None means that it was not given."""
        default = f" [{self.default}]" if self.default else ""
        info = typer.Option(
            *self.names,
            help=escape(self.help + default),
            metavar=self.metavar,
            rich_help_panel=self.panel,
            show_default=False,
        )
        optional: Any = self.kind | None
        annotation = Annotated[optional, info]
        return inspect.Parameter(
            self.field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
        )


def _documented(owner: type) -> dict[str, str]:
    """Field -> its sentence in the Args section of a dataclass's docstring."""
    doc = inspect.getdoc(owner) or ""
    args = doc.partition("Args:\n")[2].partition("\n\n")[0]
    sentences: dict[str, str] = {}
    name = ""
    for line in args.splitlines():
        if begins := re.match(r" {4}(\w+): (.*)", line):
            name = begins[1]
            sentences[name] = begins[2]
        elif name:
            sentences[name] += " " + line.strip()
    return sentences


def _sampling_table() -> tuple[Option, ...]:
    draw, stop, out = "Sampling", "Stopping", "Output"
    rows: list[tuple[str, str, Any, str, str | None]] = [
        ("temperature", "", float, draw, None),
        ("top_k", "", int, draw, None),
        ("top_p", "", float, draw, None),
        ("min_p", "", float, draw, None),
        ("seed", "", int, draw, None),
        ("repetition_penalty", "", float, draw, None),
        ("presence_penalty", "", float, draw, None),
        ("frequency_penalty", "", float, draw, None),
        ("logit_bias", "--logit-bias", list[str], draw, "ID=VALUE"),
        ("bad_words", "--bad-word", list[str], draw, "TEXT"),
        ("max_tokens", "", int, stop, None),
        ("min_tokens", "", int, stop, None),
        ("stop", "--stop", list[str], stop, "TEXT"),
        ("stop_token_ids", "--stop-token-id", list[int], stop, "ID"),
        ("ignore_eos", "--ignore-eos/--no-ignore-eos", bool, stop, None),
        ("include_stop_str_in_output", "--include-stop/--no-include-stop", bool, stop, None),
        ("n", "--n", int, out, None),
        ("logprobs", "", int, out, None),
        ("prompt_logprobs", "", int, out, None),
        ("skip_special_tokens", "--skip-special/--keep-special", bool, out, None),
        ("structured_outputs", "--json-schema", str, out, "FILE"),
    ]
    sentences = _documented(SamplingParams)
    sentences["structured_outputs"] = "a JSON schema; the text becomes a JSON value that it describes."
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    table = []
    for field, names, kind, panel, metavar in rows:
        sentence = sentences.get(field, "")
        sentence = sentence[:1].upper() + sentence[1:]
        if metavar and kind is not str:
            sentence = sentence.rstrip(".") + ". May be given several times."
        default = "" if metavar or kind is bool or defaults[field] is None else str(defaults[field])
        flag = names or f"--{field.replace('_', '-')}"
        spelled = (flag, "-n") if field == "n" else (flag,)
        table.append(Option(field, spelled, kind, panel, metavar, sentence, default))
    return tuple(table)


SAMPLING = _sampling_table()
_MEMORY = "Memory and execution"
ENGINE = (
    Option("device", ("--device",), str, _MEMORY, "NAME", "Where the model runs: cpu, or cuda (the first GPU) or cuda:N.", "cpu"),
    Option("gpu_memory_utilization", ("--gpu-memory-utilization",), float, _MEMORY, "FRACTION",
           "Of a GPU's memory, for weights, activations and KV cache together.", "0.9"),
    Option("gemm", ("--gemm",), list[str], _MEMORY, "[PRODUCT=]HOW",
           "On a GPU, what multiplies: mma, wgmma (bfloat16 on Hopper) or cublas, for all products or for one of qkv, out, gate_up "
           "(or up), down, head. May be given several times.", "mma"),
    Option("kv_cache_bytes", ("--kv-cache",), str, _MEMORY, "SIZE", "Memory of the KV cache, e.g. 512MiB or 2GB.",
           "what nanoserve plan shows"),
    Option("max_model_len", ("--max-model-len",), int, _MEMORY, "TOKENS", "Longest prompt + output.",
           "the model's, or what fits"),
    Option("max_num_seqs", ("--max-num-seqs",), int, _MEMORY, "COUNT", "Most sequences that run at once.", "32, on a GPU 256"),
    Option("num_threads", ("--threads",), int, _MEMORY, "COUNT", "Threads of a forward pass on the CPU.", "this process's cores"),
    Option("weight_cache", ("--weight-cache/--no-weight-cache",), bool, _MEMORY, None,
           "Keep weights packed for the CPU on disk, for a faster start the next time.", "yes"),
    Option("dtype", ("--dtype",), str, _MEMORY, "TYPE",
           "Arithmetic of the forward pass: auto, float32 or bfloat16. auto is bfloat16 for a checkpoint stored so on a CPU "
           "that multiplies it, or stored in 16 bits on a GPU, else float32.", "auto"),
    Option("quantization", ("--quantization",), str, _MEMORY, "TYPE",
           "int8, on the CPU: quantise weights per output channel when loading, activations per token."),
    Option("kv_cache_dtype", ("--kv-cache-dtype",), str, _MEMORY, "TYPE",
           "Of keys and values: auto, float32 or bfloat16. auto is float32 where the arithmetic is.", "auto"),
    Option("revision", ("--revision",), str, _MEMORY, "NAME", "Branch, tag or commit of a Hugging Face hub repository."),
)  # fmt: skip


def with_sampling(*, without: Collection[str] = (), **defaults: str) -> Callable[[Command], Command]:
    """Adds the sampling options; the command's `sampling` is a dict of what was given.

    Args:
        without: fields that make no sense for the command.
        defaults: what help shows where the command's default is its own.
    """
    table = [
        dataclasses.replace(option, default=defaults.get(option.field, option.default))
        for option in SAMPLING
        if option.field not in without
    ]
    return lambda command: with_group(command, "sampling", table, _sampling_values)


def with_engine(command: Command) -> Command:
    """Adds the engine options; the command's `engine` is a dict of LLM keywords."""
    return with_group(command, "engine", ENGINE, _engine_values)


def sampling_params(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> SamplingParams:
    """What was given on top of the checkpoint's defaults.

    Raises:
        ValueError: naming the option, the value and its limit.
    """
    try:
        return SamplingParams(**{**defaults, **given})
    except ValueError as error:
        field, _, reason = str(error).partition(":")
        row = next((row for row in SAMPLING if row.field == field), None)
        if row is None or field not in given:
            raise
        raise ValueError(f"{row.names[0].partition('/')[0]}:{reason}") from error


def with_group(
    command: Command, name: str, table: Sequence[Option], values: Callable[[dict[str, Any]], dict[str, Any]]
) -> Command:
    fields = [option.field for option in table]

    def wrapped(**arguments: Any) -> Any:
        given = {field: arguments.pop(field) for field in fields}
        # Depending on its version, typer gives an empty list for a repeatable option that was not given.
        arguments[name] = values(
            {field: value for field, value in given.items() if value not in (None, [], ())}
        )
        return command(**arguments)

    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [parameter for parameter in own if parameter.name != name]
    parameters += [option.parameter() for option in table]
    wrapped.__name__, wrapped.__doc__, wrapped.__module__ = (
        command.__name__,
        command.__doc__,
        command.__module__,
    )
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _sampling_values(given: dict[str, Any]) -> dict[str, Any]:
    if "logit_bias" in given:
        given["logit_bias"] = dict(_bias_entry(text) for text in given["logit_bias"])
    if "structured_outputs" in given:
        given["structured_outputs"] = _schema_of(given["structured_outputs"])
    return given


def _schema_of(name: str) -> StructuredOutputs:
    try:
        return StructuredOutputs(json=Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--json-schema: {name}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--json-schema: {name}: {error}") from error


def _bias_entry(text: str) -> tuple[int, float]:
    token, equals, value = text.partition("=")
    try:
        if equals:
            return int(token), float(value)
    except ValueError:
        pass
    raise ValueError(f"--logit-bias: {shown(text)} must be ID=VALUE, a token id and a number, e.g. 42=-5")


def _engine_values(given: dict[str, Any]) -> dict[str, Any]:
    if "kv_cache_bytes" in given:
        given["kv_cache_bytes"] = parse_size("--kv-cache", given["kv_cache_bytes"])
    if "gemm" in given:
        given["gemm"] = _gemms(given["gemm"])
    return given


def _gemms(texts: Sequence[str]) -> dict[str, str]:
    """LLM's mapping; what the names are is its to check."""
    chosen: dict[str, str] = {}
    for text in texts:
        product, equals, how = text.rpartition("=")
        name = product if equals else "*"
        if name in chosen:
            raise ValueError(f"--gemm: {shown(text)}: {shown(name)} has {chosen[name]} already")
        chosen[name] = how
    return chosen
