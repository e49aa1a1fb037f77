"""Requests that arrive together and begin alike: the shared part is computed once, nobody else waits, nobody waits for ever."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nanoserve import ModelConfig, NanoServingEngine, random_weights
from nanoserve.native import KVCachePool
from nanoserve.request import Request, RequestState
from nanoserve.scheduling.policies import AGING_TOKENS_PER_STEP, PRIORITY_TOKENS
from nanoserve.scheduling.prefill_manager import PrefillManager
from nanoserve.scheduling.request_pool import LOOKAHEAD
from support.fakes import System, prompt
from support.recording import greedy

SHARED = prompt(48)  # 12 pages of 4


def own(seed: int, length: int = 8) -> list[int]:
    """Tokens that differ from those of another seed at once."""
    return [seed % 32, *prompt(length - 1, 1000 + seed)]


def crowd(system: System, size: int, shared: list[int] = SHARED, **params: Any) -> list[Request]:
    return [system.add(i, shared + own(i), 2, **params) for i in range(size)]


def check(system: System, requests: list[Request]) -> None:
    """Everybody is served to the end, with what it would have got alone."""
    system.drain()
    for request in requests:
        assert request.finish_reason == "length", request
        assert request.output_tokens == system.expected(request)
    system.check_nothing_is_held()


def prefilled(system: System) -> int:
    tokens: int = system.batcher.get_stats()["prefill_tokens"]
    return tokens


def held_back(system: System, req_id: Any) -> list[dict[str, Any]]:
    return [event.detail for event in system.scheduler.events.of(req_id) if event.kind == "held_back"]


@pytest.mark.parametrize("policy", ["fcfs", "sjf", "ljf", "priority", "lpm"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_shared_part_is_computed_once(policy: str, whole: bool) -> None:
    """Eight prompts of 48 + 8 tokens at once: 56 tokens for the first, 8 for each other."""
    manager = PrefillManager(KVCachePool(200, 4, 1, 1, 4), 64) if whole else None
    system = System(num_pages=200, policy=policy, prefill_mgr=manager)
    requests = crowd(system, 8)
    check(system, requests)
    assert prefilled(system) == 48 + 8 * 8
    assert [held_back(system, i) for i in range(8)] == [[]] + 7 * [[{"by": 0, "tokens": 48}]]
    assert system.batcher.get_stats()["num_held_back"] == 7


def test_others_go_on_meanwhile() -> None:
    """A stranger behind the twins gets its first chunk in the elder's first step, and is done before the twins begin."""
    system = System(num_pages=200)
    twins = crowd(system, 4)
    stranger = system.add("stranger", prompt(12, 7), 2)
    assert system.step().scheduled == {0: 16, "stranger": 12}
    assert system.step().scheduled == {"stranger": 1, 0: 16}
    assert stranger.is_finished
    assert {twin.state for twin in twins[1:]} == {RequestState.WAITING}
    check(system, [*twins, stranger])


def test_equal_prompts_share_all_but_their_last_token() -> None:
    """A twin whose prompt is the elder's, to the last token, computes that token."""
    system = System(num_pages=200)
    requests = [system.add(i, SHARED, 3) for i in range(4)]
    check(system, requests)
    assert prefilled(system) == 48 + 3


def test_a_chain_of_nested_prefixes_ends() -> None:
    """Each shares more with its predecessor than with those before: one after the other, every token computed once."""
    system = System(num_pages=400)
    text = prompt(64, 3)
    requests = [system.add(i, text[: 16 * (i + 1)], 2) for i in range(4)]
    check(system, requests)
    assert prefilled(system) == 64
    assert [[event["by"] for event in held_back(system, i)] for i in range(4)] == [[], [0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize(("length", "waits"), [(24, True), (25, False)])
def test_what_is_cached_is_no_gain(length: int, waits: bool) -> None:
    """48 tokens are in the tree: sharing 56 is a gain of 8, which is to be a quarter of what is not in the tree."""
    system = System(num_pages=200)
    system.add("warm", SHARED, 1)
    system.drain()
    requests = [system.add(i, SHARED + prompt(8, 5) + own(i, length), 2) for i in range(2)]
    assert set(system.step().scheduled) == ({0} if waits else {0, 1})
    assert held_back(system, 1) == ([{"by": 0, "tokens": 8}] if waits else [])
    check(system, requests)


@pytest.mark.parametrize(
    ("elder", "waiter", "waits"),
    [
        (SHARED[:8] + own(1), SHARED[:8] + own(2), True),
        (SHARED[:4] + own(1), SHARED[:4] + own(2), False),  # one page is too little to wait for
        (SHARED[:7] + own(1), SHARED[:7] + own(2), False),  # only whole pages are shared
        (SHARED[:11] + own(1, 32), SHARED[:11] + own(2, 25), False),  # nor is part of one a gain
        (SHARED[:7], SHARED, False),  # the elder's second page is not whole
        (SHARED[:8] + own(1, 32), SHARED[:8] + own(2, 24), True),  # a quarter
        (SHARED[:8] + own(1, 32), SHARED[:8] + own(2, 25), False),  # less than a quarter
        (SHARED[:16] + own(1, 24), SHARED[:16] + own(2), True),  # 40 to go, 24 + 16 to win
        (SHARED[:16] + own(1, 25), SHARED[:16] + own(2), False),  # the elder takes too long
    ],
)
def test_who_is_worth_waiting_for(elder: list[int], waiter: list[int], waits: bool) -> None:
    """The bounds of the rules, one token to either side."""
    system = System(num_pages=200, chunk_size=64, max_num_batched_tokens=256)
    requests = [system.add("elder", elder, 2), system.add("waiter", waiter, 2)]
    assert set(system.step().scheduled) == ({"elder"} if waits else {"elder", "waiter"})
    assert bool(held_back(system, "waiter")) is waits
    check(system, requests)


def test_who_takes_nothing_from_the_cache_does_not_wait() -> None:
    """A disabled cache, and prompts whose rows of logits are wanted. The latter can be waited for."""
    system = System(num_pages=200, cache=False, max_num_batched_tokens=256)
    requests = crowd(system, 4)
    assert set(system.step().scheduled) == {0, 1, 2, 3}
    check(system, requests)

    system = System(num_pages=200, max_num_batched_tokens=256)
    requests = crowd(system, 2, prompt_logprobs=0)
    requests += [system.add("plain", SHARED + own(5), 2)]
    assert set(system.step().scheduled) == {0, 1}
    check(system, requests)
    assert prefilled(system) == 2 * 56 + 8
    assert all(len(request.prompt_logprobs or []) == 56 for request in requests[:2])


def test_other_rotary_angles_are_no_twin() -> None:
    """Equal tokens whose keys have other angles are not in the same place of the tree: nobody waits for them."""
    system = System(num_pages=200, switch_len=56, max_num_batched_tokens=256)
    requests = [system.add("short", SHARED + own(1), 2), system.add("long", SHARED + own(2, 9), 2)]
    assert set(system.step().scheduled) == {"short", "long"}
    requests += [system.add("longer", SHARED + own(3, 10), 2), system.add("shorter", SHARED + own(4, 7), 2)]
    assert set(system.step().scheduled) == {"short", "long"}
    assert held_back(system, "longer") == [{"by": "long", "tokens": 48}]
    assert held_back(system, "shorter") == [{"by": "short", "tokens": 48}]
    check(system, requests)


# ---- the elder leaves


def test_an_aborted_elder_lets_the_next_one_go() -> None:
    """The foremost of those who waited goes in the next step, and the others wait for it."""
    system = System(num_pages=200)
    requests = crowd(system, 4)
    system.step()
    assert system.batcher.abort(0)
    assert system.step().scheduled == {1: 16}
    assert [event["by"] for event in held_back(system, 2)] == [0, 1]
    check(system, requests[1:])
    assert prefilled(system) == 16 + 48 + 3 * 8


@pytest.mark.parametrize("fault", ["raises", "poisoned"])
def test_a_failed_elder_lets_the_next_one_go(fault: str) -> None:
    """Nothing of it is cached, and nobody waits for the dead."""
    system = System(num_pages=200)
    getattr(system.executor, fault).add(0)
    requests = crowd(system, 4)
    system.drain()
    assert requests[0].finish_reason == "error"
    check(system, requests[1:])
    assert [event["by"] for event in held_back(system, 3)] == [0, 1]


def test_a_preempted_elder_lets_its_twin_ask_anew() -> None:
    """It goes back to its place before the twin, and the twin waits for it again once it is readmitted."""
    system = System(num_pages=200)
    requests = crowd(system, 2)
    system.step()
    system.scheduler.residents.preempt(requests[0], by=requests[0])
    assert system.step().scheduled == {0: 16}
    assert [event["by"] for event in held_back(system, 1)] == [0, 0]
    check(system, requests)


def test_a_held_request_can_be_aborted() -> None:
    """Nothing of it remains, and its elder and the other twins do not care."""
    system = System(num_pages=200)
    requests = crowd(system, 3)
    system.step()
    assert system.batcher.abort(1)
    check(system, [requests[0], requests[2]])


def test_nobody_waits_for_a_newcomer_the_policy_does_not_prefer() -> None:
    """Somebody behind it in the queue was let past; when its own elder is gone it does not wait for that one too."""
    system = System(num_pages=200, chunk_size=4)
    system.add("elder", SHARED[:32] + own(1, 32), 2)
    waiter = system.add("waiter", SHARED[:32] + own(2), 2)
    newcomer = system.add("newcomer", SHARED[:16] + own(3, 4), 2)
    assert set(system.step().scheduled) == {"elder", "newcomer"}  # too short to wait for the elder
    assert held_back(system, "waiter") == [{"by": "elder", "tokens": 32}]
    system.batcher.abort("elder")
    assert set(system.step().scheduled) == {"newcomer", "waiter"}
    check(system, [waiter, newcomer])


def test_whoever_the_policy_prefers_is_waited_for() -> None:
    """Of two in the queue the later, preferred one goes first, and the earlier one waits for it."""
    system = System(num_pages=200, policy="priority")
    requests = [system.add("early", SHARED + own(1), 2, 1), system.add("preferred", SHARED + own(2), 2, 0)]
    assert set(system.step().scheduled) == {"preferred"}
    check(system, requests)
    assert prefilled(system) == 56 + 8


def test_whoever_came_earlier_is_waited_for() -> None:
    """Somebody with a better place in the queue than the elder had waits all the same: it is done sooner."""
    system = System(num_pages=200, policy="priority")
    requests = [system.add("early", SHARED + own(1), 2, 1)]
    system.step()
    requests.append(system.add("preferred", SHARED + own(2), 2, 0))
    assert set(system.step().scheduled) == {"early"}
    check(system, requests)
    assert prefilled(system) == 56 + 8


def test_a_flood_of_elders_starves_nobody() -> None:
    """Favourites that share its prefix arrive in every step and are aborted before they are computed: it is served all the same."""
    system = System(num_pages=200, policy="priority", chunk_size=4, max_batch_size=4)
    victim = system.add("victim", SHARED + own(1), 2, priority=1)
    for step in range(200):
        system.add(step, SHARED + own(step), 2, priority=-1)
        system.step()
        if victim.is_finished:
            break
        for request in list(system.scheduler.pool.running.values()):
            if request is not victim:
                system.batcher.abort(request.req_id)
    assert victim.finish_reason == "length"
    # Two levels of priority: until a favourite's arrival, 4 tokens per step, makes up for them.
    assert 100 < len(held_back(system, "victim")) <= 2 * PRIORITY_TOKENS / AGING_TOKENS_PER_STEP
    system.drain()


# ---- tight systems, long queues


@pytest.mark.parametrize("num_pages", [15, 16, 20, 29, 30, 31])
@pytest.mark.parametrize("chunk_size", [4, 16])
def test_tiny_pools_serve_all_twins(num_pages: int, chunk_size: int) -> None:
    """A pool for little more than one prompt: twins end one by one, with preemptions and evictions in between."""
    system = System(num_pages=num_pages, chunk_size=chunk_size)
    requests = [system.add(i, SHARED + own(i), 2 + i % 3) for i in range(6)]
    check(system, requests)


def test_random_families_of_twins() -> None:
    """Bursts of requests from a tree of prefixes, aborts and preemptions, audited after every step."""
    assert sum(random_family(seed) for seed in range(30)) > 80


def random_family(seed: int) -> int:
    """Serves it; returns how often somebody was held back."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4])
    system = System(
        page_size=page_size,
        num_pages=rng.randint(64, 160) // page_size,
        chunk_size=rng.choice([2, 4, 16]),
        max_batch_size=rng.randint(2, 6),
        max_num_batched_tokens=rng.choice([8, 40]),
        policy=rng.choice(["fcfs", "sjf", "ljf", "priority", "lpm"]),
        switch_len=rng.choice([None, 30]),
    )
    family = [prompt(40, seed)]
    requests: list[Request] = []
    for _ in range(60):
        for _ in range(rng.choice([0, 0, 1, 4])):
            base = rng.choice(family)
            text = base[: rng.randint(1, len(base))] + prompt(rng.randint(0, 8), len(requests))
            family.append(text[:48])
            req_id, asks = len(requests), rng.choice([None, None, None, 0])
            requests.append(
                system.add(req_id, text[:48], rng.randint(1, 6), rng.randint(-1, 1), prompt_logprobs=asks)
            )
        live = [request for request in requests if not request.is_finished]
        if live and rng.random() < 0.1:
            system.batcher.abort(rng.choice(live).req_id)
        system.step()
    system.drain()
    for request in requests:
        expected = system.expected(request)
        assert request.output_tokens == expected[: len(request.output_tokens)]
        assert request.finish_reason in ("length", "abort")
    system.check_nothing_is_held()
    held: int = system.batcher.get_stats()["num_held_back"]
    return held


def test_a_long_queue_is_looked_at_in_part() -> None:
    """Of thousands who wait for one elder, or for nobody, a bounded number is asked per admission, each compared once."""
    system = System(num_pages=4000, chunk_size=4, max_batch_size=8)
    compared: list[Any] = []
    peek = system.radix.peek
    system.radix.peek = lambda tokens: compared.append(0) or peek(tokens)  # type: ignore[func-returns-value]
    for i in range(3000):
        system.add(i, SHARED + own(i), 1)
    for _ in range(3):
        assert set(system.step().scheduled) == {0}
    assert len(compared) == LOOKAHEAD
    for i in range(3000):
        system.batcher.abort(i)
    system.step()

    compared.clear()
    for i in range(3000):
        system.add(i, own(i // 32, 3) + prompt(40, i), 1)
    system.step()
    assert compared == []


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_the_queue_is_searched_no_further_than_the_lookahead(policy: str) -> None:
    """Whoever is passed over costs time: the search for somebody who may go ends."""
    system = System(policy=policy)
    for i in range(2 * LOOKAHEAD):
        system.add(i, prompt(4, i))
    asked: list[Any] = []
    head = system.scheduler.pool.head(lambda tokens: 0, lambda request: bool(asked.append(request)))  # type: ignore[func-returns-value]
    assert head is None
    assert len(asked) == LOOKAHEAD


# ---- the real model


def test_equal_prompts_on_the_real_model() -> None:
    """Eight equal prompts together: one is computed, and of the others the last token; the answers are those given one by one."""
    config = ModelConfig(vocab_size=64, n_layer=2, n_head=2, n_embd=32, max_seq_len=256)
    weights = random_weights(config, seed=4)
    engine = NanoServingEngine(config, weights, max_batch_size=8, num_threads=1)
    alone = NanoServingEngine(config, weights, enable_prefix_cache=False, num_threads=1)
    text = [(7 * i) % 64 for i in range(150)]
    together = engine.generate([text] * 8, greedy(6))
    assert engine.get_stats()["prefill_tokens"] <= 150 + 8 * engine.kv_pool.page_size
    (expected,) = alone.generate([text], greedy(6))
    assert [request.output_tokens for request in together] == [expected.output_tokens] * 8
