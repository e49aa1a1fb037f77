"""Simulation: random operations on systems small enough to run out of everything, with every check after each of them.

An operation is an arrival, an abort in any state (also while a step is in flight), a step, or a step in which something
breaks. After each, pool, tables, tree and queues must agree and no row may have read a key that is not its own; in the end
every request has ended, and whoever was left in peace has exactly the output it would have got alone.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from nanoserve.errors import RequestRefused
from nanoserve.logprobs import token_logprob
from nanoserve.native import KVCachePool
from nanoserve.request import Request
from nanoserve.scheduling.prefill_manager import PrefillManager
from support.fakes import PairWatcher, System, logits_after, prefix_hashes, rollout

NUM_SEEDS, OPERATIONS = 50, 200  # 10,000 operations


class Simulation:
    """One random system and its history."""

    def __init__(self, seed: int) -> None:
        self.random = rng = random.Random(seed)
        page_size = rng.choice([1, 2, 4, 8])
        budget = rng.choice([6, 8, 16, 40])
        pages = rng.randint(4, 16)
        whole = rng.random() < 0.2
        self.max_tokens = pages * page_size
        self.system = System(
            num_pages=pages,
            page_size=page_size,
            chunk_size=rng.choice([1, 3, 4, 8, 16]),
            max_batch_size=rng.randint(1, 6),
            max_num_batched_tokens=budget,
            cache=rng.random() < 0.8,
            prefill_mgr=PrefillManager(KVCachePool(pages, page_size, 1, 1, 4), budget) if whole else None,
            eos=(3, 4, 5) if rng.random() < 0.5 else (),
            policy=rng.choice(["fcfs", "sjf", "ljf", "priority", "lpm"]),
            max_model_len=rng.choice([None, self.max_tokens]),
            switch_len=rng.choice([None, rng.randint(1, self.max_tokens)]),
            device=seed % 2 == 1,
        )
        self.is_plain = seed % 4 == 1  # nothing that a device leaves to the host: steps are started ahead
        self.prefixes = [[rng.randrange(32) for _ in range(self.max_tokens)] for _ in range(3)]
        self.requests: list[Request] = []
        self.aborted: set[Any] = set()
        self.trace: list[Any] = []

    def arrive(self) -> None:
        rng = self.random
        length = rng.randint(1, max(1, self.max_tokens * 3 // 4))
        shared = rng.randint(0, length)
        tokens = rng.choice(self.prefixes)[:shared] + [rng.randrange(32) for _ in range(length - shared)]
        req_id = len(self.requests)
        fault = rng.random()
        if fault < 0.04:
            self.system.executor.raises.add(req_id)
        elif fault < 0.08:
            self.system.executor.poisoned.add(req_id)
        params: dict[str, Any] = {
            "ignore_eos": rng.random() < 0.5,
            "temperature": rng.choice([0.0, 0.0, 1.0]),
        }
        max_tokens = rng.randint(1, 20)
        params["min_tokens"] = 0 if self.is_plain else rng.choice([0, 0, rng.randint(0, max_tokens)])
        if rng.random() < 0.3 and not self.is_plain:
            params["repetition_penalty"] = rng.choice([1.0, 1.3])
            params["frequency_penalty"] = rng.choice([0.0, 0.5])
            params["logit_bias"] = rng.choice([None, {rng.randrange(32): 5.0}])
            params["bad_word_ids"] = rng.choice(
                [(), [(rng.randrange(32),), (rng.randrange(32), rng.randrange(32))]]
            )
        if rng.random() < 0.3:
            params["watcher"] = PairWatcher()
        if not self.is_plain:
            params["logprobs"] = rng.choice([None, None, 0, 2])
            params["prompt_logprobs"] = rng.choice([None, None, None, 1])
        try:
            request = self.system.add(req_id, tokens, max_tokens, priority=rng.randint(-2, 2), **params)
        except RequestRefused as refused:
            self.trace.append(("refused", str(refused)))
        else:
            self.requests.append(request)

    def abort(self) -> None:
        live = [r.req_id for r in self.requests if not r.is_finished]
        req_id = self.random.choice([*live, -1])
        was_live = req_id in live
        assert self.system.batcher.abort(req_id) is was_live
        assert self.system.batcher.abort(req_id) is False
        self.aborted.add(req_id)

    def step(self) -> None:
        executor = self.system.executor
        trouble = self.random.random()
        if trouble < 0.03:
            executor.transient = self.random.randint(1, 2)
        elif trouble < 0.06:
            setattr(executor, self.random.choice(["after", "telling"]), self.interrupt)
        elif trouble < 0.07:
            executor.telling = self.lose
        elif trouble < 0.12:
            executor.before = self.abort_in_flight
        try:
            output = self.system.step()
        except KeyboardInterrupt:
            self.trace.append("interrupted")
        else:
            ended = [(r.req_id, r.finish_reason, r.error) for r in output.finished]
            self.trace.append((output.scheduled, output.new_tokens, ended, output.preempted))
        executor.before = executor.after = executor.telling = None
        executor.transient = 0

    def interrupt(self) -> None:
        """Once: the batcher lets no second one through before it has put things in order."""
        self.system.executor.after = self.system.executor.telling = None
        raise KeyboardInterrupt

    def lose(self) -> None:
        raise MemoryError("the tokens are lost")

    def abort_in_flight(self) -> None:
        self.system.executor.before = None
        self.abort()

    def run(self, operations: int) -> None:
        for _ in range(operations):
            what = self.random.random()
            if what < 0.25:
                self.arrive()
            elif what < 0.28:
                self.abort()
            else:
                self.step()
            self.system.check()
        self.system.executor.before = self.system.executor.after = None
        for output in self.system.drain():
            self.trace.append((output.scheduled, output.new_tokens))
        self.trace += [(e.step, e.kind, e.req_id, e.detail) for e in self.system.scheduler.events]

    def verify(self) -> None:
        executor = self.system.executor
        for request in self.requests:
            longest = self.system.scheduler.door.max_model_len or 2**31
            expected = rollout(request, self.system.eos, longest, switch_len=self.system.switch_len)
            assert request.is_finished
            self.verify_reports(request)
            assert request.output_tokens == expected[: len(request.output_tokens)], request
            if request.req_id in self.aborted and request.finish_reason == "abort":
                continue
            if request.req_id in executor.raises or request.req_id in executor.poisoned:
                assert request.finish_reason == "error", request
                assert request.error is not None
                continue
            assert request.finish_reason in ("stop", "length"), (request, request.error)
            assert request.output_tokens == expected, request
        self.system.check_nothing_is_held()

    def verify_reports(self, request: Request) -> None:
        """Whatever happened on the way, each token was told, and its log-probability kept, once."""
        short, long = (prefix_hashes(request.token_ids, long) for long in (False, True))
        switch = self.system.switch_len
        params, known = request.params, request.token_ids
        if isinstance(request.watcher, PairWatcher):
            assert request.watcher.seen == request.output_tokens
        if params.logprobs is not None:
            assert request.logprobs == [
                token_logprob(
                    logits_after((long if at > switch else short)[at - 1]), known[at], params.logprobs
                )
                for at in range(request.num_prompt_tokens, len(known))
            ]
        if request.prompt_logprobs is not None:
            had = len(request.prompt_logprobs)
            hashes = long if request.num_prompt_tokens > switch else short
            assert had == request.num_prompt_tokens or not request.output_tokens
            assert request.prompt_logprobs[1:] == [
                token_logprob(logits_after(hashes[at - 1]), known[at], params.prompt_logprobs or 0)
                for at in range(1, had)
            ]


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_random_operations_leave_nothing_behind(seed: int) -> None:
    """200 operations per seed, audited one by one; everyone ends, and the undisturbed get their own output."""
    simulation = Simulation(seed)
    simulation.run(OPERATIONS)
    simulation.verify()


def test_the_simulation_meets_every_kind_of_event() -> None:
    """Over all seeds each kind of event and each way to end occurs, or the simulation proves less than it says."""
    kinds: dict[str, int] = {}
    ends: dict[str | None, int] = {}
    for seed in range(0, NUM_SEEDS, 2):
        simulation = Simulation(seed)
        simulation.run(OPERATIONS)
        for event in simulation.system.scheduler.events:
            kinds[event.kind] = kinds.get(event.kind, 0) + 1
        for request in simulation.requests:
            ends[request.finish_reason] = ends.get(request.finish_reason, 0) + 1
    assert set(kinds) == {
        "admitted", "prefix_hit", "chunk", "pages_granted", "pages_freed", "preempted", "finished", "aborted", "refused",
        "error", "held_back",
    }, kinds  # fmt: skip
    assert set(ends) == {"stop", "length", "abort", "error"}
    assert min(*kinds.values(), *ends.values()) >= 20, (kinds, ends)


def test_the_simulation_starts_steps_ahead() -> None:
    """With the device, and often where nothing is left to the host; some of them turn out to be somebody's for nothing."""
    ahead = 0
    for seed in range(1, NUM_SEEDS, 4):
        simulation = Simulation(seed)
        simulation.run(OPERATIONS)
        ahead += simulation.system.executor.num_ahead
    assert ahead > 300


@pytest.mark.parametrize("seed", [1, 7, 23])
def test_the_same_seed_gives_the_same_trace(seed: int) -> None:
    """Schedules, tokens and events are a function of the operations: nothing depends on time, hashes or addresses."""
    first, second = Simulation(seed), Simulation(seed)
    first.run(OPERATIONS)
    second.run(OPERATIONS)
    assert first.trace == second.trace
    assert len(first.trace) > OPERATIONS
