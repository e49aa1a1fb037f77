"""A driver's side of the conversation with the runner: JSON lines on stdin and stdout.

    runner -> driver   {"model": folder or file, "width": ..., "threads": ..., ...}     once: what to load
    driver -> runner   {"ready": {"version": ..., ...}}                                 what was loaded, in words
    runner -> driver   {"requests": [[prompt token ids, output tokens], ...], "max_in_flight": n}
    driver -> runner   {"timeline": ...}                                                once per message
    driver -> runner   {"error": text}                                                  instead of either; then it ends

Engines print what they like, so stdout is moved out of their way first: file descriptor 1 becomes stderr.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from nanoserve.workloads.player import Server, play
from nanoserve.workloads.workload import WorkloadRequest

Load = Callable[[dict[str, Any]], tuple[Server, dict[str, Any]]]


def run_driver(load: Load) -> None:
    """Serve the runner until it closes stdin.

    Args:
        load: from options to a server, and facts about it that the results should name.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        server, facts = load(json.loads(sys.stdin.readline()))
        _say(replies, {"ready": facts})
        for line in sys.stdin:
            message = json.loads(line)
            requests = [WorkloadRequest(prompt, output) for prompt, output in message["requests"]]
            timeline = play(server, requests, message["max_in_flight"])
            _say(replies, {"timeline": timeline.as_json()})
    except Exception as error:
        traceback.print_exc()
        _say(replies, {"error": f"{type(error).__name__}: {error}"})
        replies.flush()
        os._exit(1)  # threads of an engine in an unknown state must not keep the process


def _say(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()
