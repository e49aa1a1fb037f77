"""Comparison: engines on one model in one width, interleaved: A B C A B C ..., only one of them computing at a time.

Engines stay loaded between rounds where memory allows. Where it does not, each is started once per round and plays all
workloads before the next one is: still interleaved, but coarsely.

Before each run, the process that plays it has been warmed up on that workload's first requests, the machine's limits are
measured, and what others take of the machine meanwhile is counted. Every round has its own tokens, so a prefix cache finds
only what it could find within a round. An engine that fails at a workload is started anew for the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.disturbance import Disturbance
from bench.peers.engine_process import EngineFailed, EngineProcess
from bench.peers.installation import Engine, NotInstalled
from bench.peers.limits import Limits, LimitsProbe
from bench.peers.roofline import WIDTH_BYTES, ideal_timeline
from nanoserve.machine_memory import available_memory
from nanoserve.models.config import ModelConfig
from nanoserve.models.decoder import num_parameters
from nanoserve.workloads import Timeline, Workload

PROCESS_BYTES = 3 * 2**29  # libraries, buffers and compiled code of an engine
KV_CACHE_BYTES = (2**30, 4 * 2**30)  # least, as engines count in GiB, and most
BLOCK_TOKENS = 128  # the largest page of any engine
SETTLE_S = 0.3  # threads that spin for the next step give up within this


@dataclass(frozen=True)
class Settings:
    """What all engines get alike."""

    rounds: int
    threads: int
    max_num_seqs: int = 64
    kv_cache_bytes: int | None = None  # None: what the largest workload has in flight, within KV_CACHE_BYTES
    answer_s: float = 600.0


@dataclass
class Run:
    """One engine, one workload, one round."""

    metrics: dict[str, float | None]
    first_tokens: list[int]
    limits: Limits | None
    ideal: dict[str, float | None] | None  # metrics at these limits
    others_cores: float | None


@dataclass
class Comparison:
    """What to compare; `run` does.

    Attributes:
        runs: by workload and engine, in the order of the rounds; None where an engine failed.
        failed: why, by workload and engine. left_out: engines that are not there, or did not come up.
        facts: what each engine's driver says it loaded.
    """

    engines: Sequence[Engine]
    model: str
    checkpoint: Path  # with the config.json all of them share
    width: str
    workloads: Sequence[Workload]
    settings: Settings
    probe: LimitsProbe | None = None
    say: Callable[[str], None] = print
    runs: dict[tuple[str, str], list[Run | None]] = field(default_factory=dict)
    failed: dict[tuple[str, str], str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._config = ModelConfig.from_pretrained(self.checkpoint)
        self._kv_cache_bytes = kv_cache_bytes(self._config, self.width, self.workloads, self.settings)
        self._processes: dict[str, EngineProcess] = {}
        self._warm: set[tuple[str, str]] = set()
        for workload in self.workloads:
            if workload.longest > self._config.max_seq_len:
                raise ValueError(
                    f"workload {workload.name}: sequences of {workload.longest} tokens, {self.model} takes "
                    f"{self._config.max_seq_len}"
                )

    def run(self) -> None:
        """All rounds; everything is stopped at the end, whatever happens."""
        for engine in self.engines:
            try:
                engine.checkpoint(self.model, self.width)
            except NotInstalled as error:
                self._leave_out(engine, str(error))
        stays = self._fits()
        if not stays:
            self.say("memory does not hold all engines at once: each is started once per round")
        try:
            for round_number in range(1, 1 + self.settings.rounds):
                pairs = [(workload, engine) for workload in self.workloads for engine in self.engines]
                if not stays:
                    pairs.sort(
                        key=lambda pair: self.engines.index(pair[1])
                    )  # stable: workloads keep their order
                for at, (workload, engine) in enumerate(pairs):
                    self._play(workload, engine, round_number)
                    if not stays and (at + 1 == len(pairs) or pairs[at + 1][1] is not engine):
                        self._stop(engine.name)
        finally:
            for name in list(self._processes):
                self._stop(name)

    def _play(self, workload: Workload, engine: Engine, round_number: int) -> None:
        key = workload.name, engine.name
        if engine.name in self.left_out:
            return
        runs = self.runs.setdefault(key, [])
        if key in self.failed:
            runs.append(None)
            return
        try:
            process = self._process(engine)
        except EngineFailed as error:
            self._leave_out(engine, str(error))
            return
        try:
            run = self._measure(process, workload, round_number)
        except EngineFailed as error:
            self.failed[key] = str(error)
            self.say(f"{workload.name}: {error}")
            del self._processes[engine.name]  # it has been stopped
            runs.append(None)
            return
        runs.append(run)
        others = "" if run.others_cores is None else f", others used {run.others_cores:.2f} cores"
        self.say(f"{self.model} {self.width} {workload.name} round {round_number} {engine.name}: "
                 f"{run.metrics[workload.metric] or 0:.1f} tokens/s in {run.metrics['wall_s']:.2f} s{others}")  # fmt: skip

    def _measure(self, process: EngineProcess, workload: Workload, round_number: int) -> Run:
        if (process.name, workload.name) not in self._warm:
            process.serve(workload.warm_up(self._config.vocab_size), workload.max_in_flight)
            self._warm.add((process.name, workload.name))
        requests = workload.draw(self._config.vocab_size, round_number)
        time.sleep(SETTLE_S)
        limits = None if self.probe is None else self.probe.measure()
        disturbance = Disturbance(process.pid)
        timeline = process.serve(requests, workload.max_in_flight)
        others = disturbance.cores()
        ideal: Timeline | None = None
        if limits is not None:
            ideal = ideal_timeline(self._config, self.width, limits, requests, workload.max_in_flight)
        return Run(
            timeline.metrics(),
            [one.tokens[0] for one in timeline.requests],
            limits,
            None if ideal is None else ideal.metrics(),
            others,
        )

    def _process(self, engine: Engine) -> EngineProcess:
        if engine.name not in self._processes:
            begin = time.monotonic()
            process = self._start(engine)
            self._processes[engine.name] = process
            self.facts[engine.name] = process.facts
            self.say(
                f"{engine.name} loaded {self.model} in {time.monotonic() - begin:.1f} s: {process.facts}"
            )
        return self._processes[engine.name]

    def _start(self, engine: Engine) -> EngineProcess:
        longest = max(workload.longest for workload in self.workloads)
        options = {
            "model": str(engine.checkpoint(self.model, self.width)),
            "width": self.width,
            "threads": self.settings.threads,
            "max_model_len": min(self._config.max_seq_len, -(-longest // 256) * 256),
            "max_num_seqs": self.settings.max_num_seqs,
            "kv_cache_bytes": self._kv_cache_bytes,
            "kv_cache_tokens": self._kv_cache_bytes // token_bytes(self._config, self.width),
            **engine.options,
        }
        if engine.binary is not None:
            options["binary"] = str(engine.binary)
        environment = {"OMP_NUM_THREADS": str(self.settings.threads), **engine.environment}
        # -P: a file in the folder it runs in must not hide a module.
        command = [str(engine.python), "-P", "-m", f"bench.peers.drivers.{engine.driver}"]
        return EngineProcess(engine.name, command, environment, options, answer_s=self.settings.answer_s)

    def _stop(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            process.stop()
        self._warm = {pair for pair in self._warm if pair[0] != name}

    def _leave_out(self, engine: Engine, why: str) -> None:
        self.left_out[engine.name] = why
        self.say(f"{engine.name} is left out: {why}")

    def _fits(self) -> bool:
        """Whether all engines can stay loaded: weights as converted and as packed, the cache, and the rest."""
        weights = 2 * WIDTH_BYTES[self.width] * num_parameters(self._config)
        each = weights + self._kv_cache_bytes + PROCESS_BYTES
        return (len(self.engines) - len(self.left_out)) * each <= available_memory()


def kv_cache_bytes(config: ModelConfig, width: str, workloads: Sequence[Workload], settings: Settings) -> int:
    """Bytes of KV cache that every engine gets, in whole GiB."""
    if settings.kv_cache_bytes is not None:
        return settings.kv_cache_bytes
    most_tokens = 0
    for workload in workloads:
        sizes = sorted((prompt + output for prompt, output in workload.lengths()), reverse=True)
        each = (workload.shared_prefix_tokens + size for size in sizes[: workload.max_in_flight])
        most_tokens = max(most_tokens, sum(-(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS for tokens in each))
    gibibytes = -(-most_tokens * token_bytes(config, width) // 2**30)
    least, most = KV_CACHE_BYTES
    return max(least, min(most, gibibytes * 2**30))


def token_bytes(config: ModelConfig, width: str) -> int:
    """Of a token's keys and values; int8 weights go with 16-bit caches."""
    return config.kv_values_per_token * max(2, WIDTH_BYTES[width])
