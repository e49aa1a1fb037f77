"""Workloads: what is asked of an engine when it is measured, as files, and how a run of one is timed.

    *.json         the workloads that come with nanoserve
    workload.py    Workload: a file read and checked; its requests, token by token
    player.py      play: a workload through any server that has `add` and `step`
    timeline.py    Timeline: when each token came, and the rates and latencies that follow
    engine_server.py   NanoServingEngine as such a server

Everything but engine_server.py needs the standard library only: bench/peers runs it in the environments of other engines,
so that all are timed by the same loop.
"""

from nanoserve.workloads.player import Server, play
from nanoserve.workloads.timeline import Timeline
from nanoserve.workloads.workload import Workload, WorkloadRequest, workload_names

__all__ = ["Server", "Timeline", "Workload", "WorkloadRequest", "play", "workload_names"]
