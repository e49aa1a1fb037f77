"""A model made of hashes, for testing everything around a model.

FakeExecutor's logits are a function of a request's full token prefix and of nothing else, so the right output of a prompt
is known without running an engine (`rollout`), and no schedule may change it. Its "keys" are the prefix hashes themselves:
it writes them to the slots of the batch through the pool's own `store_kv`, and before a row is computed it reads the whole
prefix back through the request's page table. Any page that is stale, shared wrongly, freed too early, copied wrongly or
never written shows up as a KVMismatch at the row that would have read garbage. With `switch_len`, the hashes of sequences
longer than that begin elsewhere, all of their tokens': as a model's keys whose rotary angles depend on the length.

Faults, by request id: `raises` (the forward raises whenever the request is in the batch), `poisoned` (its keys, values and
logits are NaN); and `transient` (the next n forwards of more than one request raise), `before` and `after` (called at the
forward's beginning and end, to abort somebody or to raise).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoserve.batch import Batch
from nanoserve.cache.kv_pool import KVCachePool
from nanoserve.cache.radix_manager import RadixCacheManager
from nanoserve.draws import Draws
from nanoserve.logits import Logits
from nanoserve.request import Request
from nanoserve.sampling import Sampler, SamplingParams, mix64
from nanoserve.scheduling.audit import audit
from nanoserve.scheduling.chunked_prefill import ChunkedPrefillManager
from nanoserve.scheduling.continuous_batcher import ContinuousBatcher, StepOutput
from nanoserve.scheduling.decode_manager import DecodeManager

VOCAB = 32
_MASK = (1 << 48) - 1


class KVMismatch(AssertionError):
    """The model was about to read keys that are not those of the request's prefix."""


class ModelFault(RuntimeError):
    """What a faulty request makes the forward raise."""


def prefix_hashes(tokens: Any, long: bool = False) -> NDArray[np.float32]:
    """float32[n, 4], one row per position: token, position and the 48-bit hash of the prefix through it, exactly."""
    rows = np.empty((len(tokens), 4), np.float32)
    value = 0x10A6 if long else 0x5EED
    for position, token in enumerate(tokens):
        value = ((value ^ (token + 1)) * 0x9E3779B97F4A7C15 + position + 1) & _MASK
        rows[position] = (token, position, value & 0xFFFFFF, value >> 24)
    return rows


def logits_after(row: NDArray[np.float32], vocab: int = VOCAB) -> NDArray[np.float32]:
    """float32[vocab] in [0, 8): the logits that follow a prefix with this last hash row."""
    value = np.uint64(int(row[2]) + (int(row[3]) << 24))
    mixed = mix64(np.arange(1, vocab + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + value)
    return ((mixed >> np.uint64(40)).astype(np.float64) * (8.0 / 2**24)).astype(np.float32)


class PairWatcher:
    """Ends a request at two equal tokens in a row; `seen` is what it was told."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, token: int) -> str | None:
        self.seen.append(token)
        return f"{token} twice" if self.seen[-2:] == [token, token] else None


def rollout(
    request: Request,
    eos: Collection[int] = (),
    max_len: int = 2**31,
    vocab: int = VOCAB,
    switch_len: int = 2**31,
) -> list[int]:
    """The output the request must get, computed alone and from scratch for every token."""
    copy = Request(
        request.req_id, request.prompt_tokens, params=request.params, bad_word_ids=request.bad_word_ids
    )
    copy.seed = request.seed
    params, sampler = copy.params, Sampler()
    watcher = None if request.watcher is None else type(request.watcher)()
    while len(copy.output_tokens) < params.max_tokens and copy.total_len < max_len:
        logits = logits_after(prefix_hashes(copy.token_ids, copy.total_len > switch_len)[-1], vocab)
        (token,) = sampler.sample(Logits.of(logits[None]), [copy], eos)
        copy.append_output(token)
        stops = (*params.stop_token_ids, *(() if params.ignore_eos else eos))
        ends = token in stops
        if watcher is not None:
            ends = watcher(token) is not None or ends
        if ends and len(copy.output_tokens) > params.min_tokens:
            break
    return copy.output_tokens


class FakeExecutor:
    """The hash model over a pool of one layer, one head and head_dim >= 4."""

    def __init__(self, kv_pool: KVCachePool, vocab: int = VOCAB, switch_len: int = 2**31) -> None:
        assert (kv_pool.num_layers, kv_pool.num_heads) == (1, 1)
        assert kv_pool.head_dim >= 4
        self.kv_pool = kv_pool
        self.vocab = vocab
        self.switch_len = switch_len
        self.raises: set[Any] = set()
        self.poisoned: set[Any] = set()
        self.transient = 0
        self.before: Callable[[], None] | None = None
        self.after: Callable[[], None] | None = None
        self.telling: Callable[[], None] | None = None  # before a device's tokens are told
        self.mismatches: list[
            str
        ] = []  # all that was wrong: the batcher turns exceptions into failed requests
        self.num_forwards = 0
        self.batches: list[
            list[tuple[Any, int, int]]
        ] = []  # (request id, start, count) per piece of each forward

    def forward(self, batch: Batch) -> Logits:
        return self._computed(batch, [request.token_ids for request in batch.requests])

    def _computed(self, batch: Batch, tokens: Sequence[Sequence[int]]) -> Logits:
        self.num_forwards += 1
        self.batches.append(
            list(zip([r.req_id for r in batch.requests], batch.starts, batch.counts, strict=True))
        )
        if self.before is not None:
            self.before()
        if self.transient and batch.size > 1:
            self.transient -= 1
            raise MemoryError("no memory for a batch of this size")
        for request in batch.requests:
            if request.req_id in self.raises:
                raise ModelFault(f"request {request.req_id!r} breaks the model")
        self.demand(len({int(slot) for slot in batch.out_loc}) == batch.num_tokens, "two rows write one slot")
        rows = []
        pieces = zip(batch.requests, batch.tables, batch.starts, batch.counts, batch.sampled, strict=True)
        for index, (request, table, start, count, sampled) in enumerate(pieces):
            end = start + count
            long = len(tokens[index]) > self.switch_len
            self.demand(request.long_context is long, f"the wrong rotary angles for {request.req_id!r}")
            expected = prefix_hashes(tokens[index][:end], long)
            poisoned = request.req_id in self.poisoned
            self._check_prefix(request, table, expected[:start])
            self._write(table, expected[start:] * np.float32(np.nan if poisoned else 1), start)
            positions = [*batch.prompt_rows.get(index, ()), *([end - 1] if sampled else [])]
            for position in positions:
                logits = logits_after(expected[position], self.vocab)
                rows.append(logits * np.float32(np.nan) if poisoned else logits)
        assert len(rows) == len(batch.sample_rows)
        logits = np.stack(rows) if rows else np.zeros((0, self.vocab), np.float32)
        if self.after is not None:
            self.after()
        return Logits.of(logits)

    def _write(self, table: Any, values: NDArray[np.float32], start: int) -> None:
        rows = np.zeros((len(values), 1, self.kv_pool.head_dim), np.float32)
        rows[:, 0, :4] = values
        self.kv_pool.store_kv(rows, rows, table.slots(start, len(values)), 0)

    def _check_prefix(self, request: Request, table: Any, expected: NDArray[np.float32]) -> None:
        if not len(expected):
            return
        slots = table.slots(0, len(expected))
        for name, cache in zip(("K", "V"), self.kv_pool.get_layer_cache(0), strict=True):
            held = cache[slots // self.kv_pool.page_size, slots % self.kv_pool.page_size, 0, :4]
            same = (held == expected) | (np.isnan(held) if request.req_id in self.poisoned else False)
            wrong = np.flatnonzero(~same.all(axis=1))
            if len(wrong):
                at = int(wrong[0])
                why = f"{name} at position {at} (slot {slots[at]}) is {held[at]}, not {expected[at]}"
                self.demand(False, f"request {request.req_id!r}: {why}")

    def demand(self, holds: bool, otherwise: str) -> None:
        """Raises, and does not forget it."""
        if not holds:
            self.mismatches.append(otherwise)
            raise KVMismatch(otherwise)


class DeviceExecutor(FakeExecutor):
    """The same as a device with a stream: what is started is computed at once and in order, its tokens are told later."""

    chooses_tokens = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._last: Started | None = None
        self.num_waiting = 0
        self.num_ahead = 0

    def start(self, batch: Batch, draws: Draws) -> Started:
        self.demand(self.num_waiting < 2, "more than two steps at once")
        known = [list(request.token_ids) for request in batch.requests]
        if batch.sources is not None:
            assert self._last is not None
            self.num_ahead += 1
            for tokens, source in zip(known, batch.sources.tolist(), strict=True):
                tokens.append(max(self._last.chosen[source], 0))
        logits = self._computed(batch, known)
        floats, uniforms = draws.floats.astype(np.float64), draws.ints[:, 1].view(np.uint32) / 2.0**32
        temperatures = [1 / one if one else 0.0 for one in floats[:, 0].tolist()]
        filters = [
            (k, p if t else 1.0, q)
            for k, (_, p, q, _), t in zip(
                draws.ints[:, 0].tolist(), floats.tolist(), temperatures, strict=True
            )
        ]
        top_k, top_p, min_p = (list(each) for each in zip(*filters, strict=True)) if filters else ([], [], [])
        rows = range(len(temperatures))
        chosen = logits.reader.sample(
            logits.values, logits.block_max, rows, temperatures, top_k, top_p, min_p, uniforms.tolist()
        )
        chosen = [token if is_finite else -1 for token, is_finite in zip(chosen, logits.finite, strict=True)]
        self._last = Started(self, logits, chosen)
        self.num_waiting += 1
        return self._last


class Started:
    def __init__(self, executor: DeviceExecutor, logits: Logits, chosen: list[int]) -> None:
        self._executor, self._logits, self.chosen, self._is_told = executor, logits, chosen, False

    def tokens(self) -> list[int]:
        if not self._is_told:
            self._is_told = True
            self._executor.num_waiting -= 1
            if self._executor.telling is not None:
                self._executor.telling()
        return list(self.chosen)

    def logits(self, rows: Sequence[int]) -> Logits:
        self._executor.demand(self._executor._last is self, "another step was started: the logits are gone")
        return self._logits.take(list(rows))


class System:
    """A whole engine around the hash model, small enough to run out of everything."""

    def __init__(
        self,
        num_pages: int = 64,
        page_size: int = 4,
        chunk_size: int = 16,
        max_batch_size: int = 8,
        max_num_batched_tokens: int = 64,
        cache: bool = True,
        prefill_mgr: Any = None,
        eos: Collection[int] = (),
        vocab: int = VOCAB,
        switch_len: int | None = None,
        device: bool = False,
        **options: Any,
    ) -> None:
        self.switch_len = 2**31 if switch_len is None else switch_len
        self.pool = KVCachePool(num_pages, page_size, 1, 1, 4) if prefill_mgr is None else prefill_mgr.kv_pool
        self.executor = (DeviceExecutor if device else FakeExecutor)(self.pool, vocab, self.switch_len)
        self.radix = RadixCacheManager(self.pool, enabled=cache)
        self.prefill = prefill_mgr or ChunkedPrefillManager(self.pool, chunk_size, max_num_batched_tokens)
        self.decode = DecodeManager(max_batch_size)
        self.eos = frozenset(eos)
        self.batcher = ContinuousBatcher(
            self.executor,
            self.radix,
            self.prefill,
            self.decode,
            self.eos,
            max_num_batched_tokens=max_num_batched_tokens,
            vocab_size=vocab,
            switch_len=switch_len,
            **options,
        )
        self.scheduler = self.batcher.scheduler

    def add(
        self,
        req_id: Any,
        prompt: Any,
        max_tokens: int = 4,
        priority: int = 0,
        *,
        watcher: Any = None,
        bad_word_ids: Any = (),
        constraint: Any = None,
        **params: Any,
    ) -> Request:
        """Queue a greedy request that ignores EOS, unless told otherwise."""
        fields = {"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens, **params}
        request = Request(
            req_id,
            prompt,
            params=SamplingParams(**fields),
            priority=priority,
            bad_word_ids=bad_word_ids,
            watcher=watcher,
            constraint=constraint,
        )
        self.batcher.add_request(request)
        return request

    def step(self) -> StepOutput:
        """One step and a check of everything."""
        output = self.batcher.step()
        if output.batch is not None:
            assert output.batch.num_tokens <= self.scheduler.max_num_batched_tokens
        self.check()
        return output

    def check(self) -> None:
        """Nothing disagrees, no row read another's keys, and what nobody uses or everybody may use is finite."""
        audit(self.scheduler)
        assert not self.executor.mismatches, self.executor.mismatches
        cached = set(self.radix.tree_pages())
        for cache in self.pool.get_layer_cache(0):
            for page in np.flatnonzero(~np.isfinite(cache).all(axis=(1, 2, 3))):
                assert self.pool.ref_count(int(page)), f"page {page} is free and not finite"
                assert page not in cached, f"page {page} is cached and not finite"

    def drain(self, limit: int = 2000) -> list[StepOutput]:
        """Steps until nobody is live; a wedge is a failure, not a hang."""
        outputs = []
        while self.batcher.has_unfinished:
            outputs.append(self.step())
            assert len(outputs) < limit, (
                f"{self.scheduler.pool.num_live} requests still live after {limit} steps"
            )
        return outputs

    def expected(self, request: Request) -> list[int]:
        return rollout(request, self.eos, switch_len=self.switch_len)

    def check_nothing_is_held(self) -> None:
        """Only the prefix tree has pages left, and they can all be had."""
        assert self.pool.num_used_pages == len(self.radix.tree_pages())
        assert self.radix.num_available_pages == self.pool.num_pages


def prompt(length: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()
