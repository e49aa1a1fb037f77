"""nanoserve serve: an OpenAI-compatible server."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nanoserve.checks import shown
from nanoserve.cli.byte_size import parse_size
from nanoserve.cli.opening import open_model
from nanoserve.cli.options import Option, with_engine, with_group
from nanoserve.cli.terminal import say

KEYS_VARIABLE = "NANOSERVE_API_KEYS"
MAX_KEY_FILE_BYTES = 2**20
_LIMITS, _TIMES = "Limits", "Times, in seconds"
SERVER = (
    Option("max_body_bytes", ("--max-body",), str, _LIMITS, "SIZE", "Largest body of a request.", "8MiB"),
    Option("max_header_bytes", ("--max-headers",), str, _LIMITS, "SIZE", "Largest headers of a request.", "32KiB"),
    Option("max_pending_bytes", ("--max-pending",), str, _LIMITS, "SIZE", "Bodies that are being read or prepared, together.", "64MiB"),
    Option("max_connections", ("--max-connections",), int, _LIMITS, "COUNT", "Most open connections.", "1000"),
    Option("max_json_depth", ("--max-json-depth",), int, _LIMITS, "LEVELS", "Deepest nesting of a body.", "64"),
    Option("max_n", ("--max-n",), int, _LIMITS, "COUNT", "Most sequences per prompt.", "16"),
    Option("max_prompts", ("--max-prompts",), int, _LIMITS, "COUNT", "Most prompts of one call of /v1/completions.", "64"),
    Option("max_sequences", ("--max-sequences",), int, _LIMITS, "COUNT", "Most sequences of one call: prompts times n.", "256"),
    Option("max_queue_requests", ("--max-queue",), int, _LIMITS, "COUNT", "Requests that may wait; more get 429.", "256"),
    Option("max_queue_tokens", ("--max-queue-tokens",), int, _LIMITS, "TOKENS",
           "Prompt and output tokens of requests that may wait.", "1000000"),
    Option("max_requests_per_key", ("--max-per-key",), int, _LIMITS, "COUNT", "Waiting and running requests of one key.", "128"),
    Option("queue_timeout_s", ("--queue-timeout",), float, _TIMES, "SECONDS", "Longest wait for the engine.", "60"),
    Option("request_timeout_s", ("--request-timeout",), float, _TIMES, "SECONDS", "Longest time of a request in all.", "600"),
    Option("read_timeout_s", ("--read-timeout",), float, _TIMES, "SECONDS", "For a request to arrive whole.", "30"),
    Option("stall_timeout_s", ("--stall-timeout",), float, _TIMES, "SECONDS", "How long a client may take nothing of its answer.", "60"),
    Option("stream_interval_s", ("--stream-interval",), float, _TIMES, "SECONDS",
           "How long tokens may be kept to be sent together while many stream; 0 sends each by itself.", "0.1"),
    Option("keep_alive_s", ("--keep-alive",), float, _TIMES, "SECONDS", "How long a connection may be idle.", "30"),
    Option("drain_timeout_s", ("--drain-timeout",), float, _TIMES, "SECONDS", "What running requests get after SIGTERM.", "30"),
    Option("wedged_after_s", ("--wedged-after",), float, _TIMES, "SECONDS", "A longer step makes the server unhealthy.", "60"),
)  # fmt: skip


def _values(given: dict[str, Any]) -> dict[str, Any]:
    for name, flag in (
        ("max_body_bytes", "--max-body"),
        ("max_header_bytes", "--max-headers"),
        ("max_pending_bytes", "--max-pending"),
    ):
        if name in given:
            given[name] = parse_size(flag, given[name])
    return given


@with_engine
@lambda command: with_group(command, "limits", SERVER, _values)
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub repository.", show_default=False)],
    host: Annotated[str, typer.Option("--host", help="Address to listen on. Beyond this machine it takes a key, or --insecure.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", metavar="KEY", help="A key that opens the server. May be given several times; others see it in "
                     f"the list of processes, so a file or the variable {KEYS_VARIABLE} (NAME:KEY,NAME:KEY) is better.", show_default=False),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="Lines of NAME:KEY.", show_default=False)
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Serve other machines without keys.")] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", metavar="NAME", help="A name the server goes by, for the Host header; * for any.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--served-model-name", metavar="NAME", help="The model's name in the API. [the directory's]", show_default=False)
    ] = None,
    share_prefix_cache: Annotated[
        bool, typer.Option("--share-prefix-cache", help="Let keys find each other's prompts in the prefix cache. Answers' times then tell.")
    ] = False,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Serve the page at /, and what it shows of the engine.")] = True,
    log_level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
    access_log: Annotated[bool, typer.Option("--access-log/--no-access-log", help="Log a line per request.")] = True,
    *,
    limits: dict[str, Any],
    engine: dict[str, Any],
) -> None:  # fmt: skip
    """Serve a model over HTTP, as OpenAI's API: /v1/chat/completions, /v1/completions and a page to try it at /.

    It answers once it is warm, refuses what it cannot do instead of ignoring it, and ends on SIGTERM when accepted requests are
    finished. /v1/capabilities tells every parameter, /metrics how it is doing.

    Examples:
      nanoserve serve Qwen/Qwen3-0.6B
      nanoserve serve MODEL --host 0.0.0.0 --api-key-file keys.txt
      curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "Qwen3-0.6B", "messages": [{"role": "user", "content": "Hello"}]}'
    """
    from nanoserve.server.logs import start_logging
    from nanoserve.server.settings import ServerSettings

    if log_level not in ("debug", "info", "warning", "error"):
        raise ValueError(f"--log-level: {shown(log_level)} must be debug, info, warning or error")
    settings = ServerSettings(
        host=host, port=port, api_keys=_keys(api_key or [], api_key_file), insecure=insecure,
        allowed_hosts=tuple(allowed_host or ()), model_name=name, share_prefix_cache=share_prefix_cache, page=page, **limits,
    )  # fmt: skip
    llm = open_model(model, engine)
    from nanoserve.server.run import Server

    log = start_logging(log_level, access_log)
    try:
        finished = Server(llm, settings, on_listening=_greet).run()
    except RuntimeError as error:
        say(f"error: {error}")
        raise typer.Exit(1) from error
    finally:
        log.stop()
    if not finished:
        say("some requests were cut off: see --drain-timeout")


def _greet(url: str) -> None:
    if sys.stderr.isatty():  # in a log the line that says so is enough
        say(f"serving at {url}, and a page to try it; Ctrl-C ends it")


def _keys(given: list[str], file: Path | None) -> tuple[Any, ...]:
    from nanoserve.server.settings import ApiKey

    keys = [ApiKey(f"key-{number}", secret) for number, secret in enumerate(given, start=1)]
    # Taken out of the environment: the linker and whoever else is started has no use for it.
    lines = [(KEYS_VARIABLE, one) for one in os.environ.pop(KEYS_VARIABLE, "").split(",") if one.strip()]
    if file is not None:
        if file.stat().st_size > MAX_KEY_FILE_BYTES:
            raise ValueError(f"--api-key-file: {file} is larger than {MAX_KEY_FILE_BYTES} bytes")
        text = file.read_text(encoding="utf-8")
        lines += [
            ("--api-key-file", one) for one in text.splitlines() if one.strip() and not one.startswith("#")
        ]
    for source, line in lines:
        name, colon, secret = line.strip().partition(":")
        if not colon or not name or not secret:
            raise ValueError(f"{source}: each key must be NAME:KEY")
        keys.append(ApiKey(name, secret))
    return tuple(keys)
