"""MemoryPlan: what a model takes of a machine's memory, decided from its config before a weight is read.

    memory = weights + activations + KV pool

Weights are as packed (the zeros that fill a matrix's last panel are not counted, under a percent), in the precision's types;
where the caller does not know the files, they are taken for float32. Activations are
the executor's buffers, rotary tables, a step's logits, and what threads that share a long context's attention leave for each other:
the most there can be, which few steps come near. The pool gets what is left, within three limits: no more than
`max_num_seqs` sequences of `max_model_len` can ever use; without a budget of the user's, no more than a quarter of what is
available, for a default must not eat the machine; and slots are int32.

Decision: the quarter gives way to one sequence of a `max_model_len` that was asked for by name. The price is that a machine
which runs other things gets tight; the alternative is to refuse what would have worked. Everything is a function of the
arguments, except that memory_bytes=None asks the machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanoserve.cache.kv_pool import pages_for_budget
from nanoserve.checks import whole_number
from nanoserve.kernels import attention
from nanoserve.logprobs import MAX_PROMPT_LOGPROB_ROWS
from nanoserve.machine_memory import available_memory
from nanoserve.models.config import ModelConfig
from nanoserve.models.decoder import Attention, buffers, forward_ops, num_parameters
from nanoserve.models.weights import expected_bytes
from nanoserve.native import LOGITS_BLOCK, StepExecutor, default_num_threads
from nanoserve.precision import ELEMENT_BYTES, Precision

DEFAULT_SHARE = 4  # the pool's part of an unlimited machine: one in this many bytes
MAX_SLOTS = 2**31 - 1
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes and tokens of one model on one machine.

    Attributes:
        num_parameters: of the model; a tied head is counted once.
        weight_bytes: in memory, without the padding of packed panels.
        stored_bytes: the checkpoint's files, when the caller knows.
        activation_bytes: buffers, rotary tables, partial results of attention and logits of the largest step.
        kv_bytes_per_token, page_bytes, page_size, num_pages: of the pool; page_size in tokens.
        max_model_len: longest prompt + output that model and pool allow.
        max_num_seqs: most sequences that run at once.
        memory_bytes: what the plan was made for; None when only kv_cache_bytes was given.
        precision: the number formats it was made for.
    """

    num_parameters: int
    weight_bytes: int
    stored_bytes: int | None
    activation_bytes: int
    kv_bytes_per_token: int
    page_bytes: int
    page_size: int
    num_pages: int
    max_model_len: int
    max_num_seqs: int
    memory_bytes: int | None
    precision: Precision

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens the pool holds."""
        return self.num_pages * self.page_size

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes + self.kv_cache_bytes

    @property
    def concurrency(self) -> int:
        """How many sequences of max_model_len the pool holds, whatever max_num_seqs lets run."""
        return self.concurrency_at(self.max_model_len)

    def concurrency_at(self, num_tokens: int) -> int:
        """How many sequences of this length the pool holds."""
        return self.num_pages // -(-num_tokens // self.page_size)


def plan_memory(
    config: ModelConfig,
    *,
    memory_bytes: int | None = None,
    kv_cache_bytes: int | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int = 32,
    page_size: int = 16,
    weight_bytes: int | None = None,
    stored_bytes: int | None = None,
    max_num_batched_tokens: int = 2048,
    precision: Precision | None = None,
    num_threads: int | None = None,
) -> MemoryPlan:
    """Divide memory between weights, activations and the KV pool.

    Args:
        memory_bytes: for all of it; None takes the memory available to this process, unless kv_cache_bytes is given.
        kv_cache_bytes: for the pool; None lets it have what is sensible.
        max_model_len: longest prompt + output that must fit; None takes what model and pool allow.
        max_num_seqs, page_size, max_num_batched_tokens: as the engine's max_batch_size and the like.
        weight_bytes: what the checkpoint's weights take in memory (`loaded_bytes`); None: float32, all of them.
        stored_bytes: size of the checkpoint's files, passed on.
        precision: number formats; None: float32, all of them.
        num_threads: as the engine's.

    Raises:
        ValueError: sizes that contradict each other or do not fit, with the numbers.
    """
    if memory_bytes is not None:
        whole_number("memory_bytes", memory_bytes, 1)
    pool = PoolRules(config, precision or Precision(), page_size, max_num_seqs, max_model_len, kv_cache_bytes)
    whole_number("max_num_batched_tokens", max_num_batched_tokens, 1, MAX_SLOTS)
    if num_threads is not None:
        whole_number("num_threads", num_threads, 1, 4096)
    threads = default_num_threads() if num_threads is None else num_threads
    if weight_bytes is None:
        weight_bytes = expected_bytes(config, "f32", pool.precision)
    weights = whole_number("weight_bytes", weight_bytes, 1)
    activations = _activation_bytes(
        config, pool.precision, max_num_batched_tokens, max_num_seqs, pool.longest
    )
    activations += _parts_bytes(config, pool.precision, max_num_batched_tokens, pool.longest, threads)
    if kv_cache_bytes is not None:
        budget = None if memory_bytes is None else Budget(memory_bytes, f"memory_bytes={memory_bytes}", "")
        return pool.plan(weights, activations, stored_bytes, budget)
    source, share = "", 1
    if memory_bytes is None:
        memory_bytes, source, share = available_memory(), ", available on this machine,", DEFAULT_SHARE
    budget = Budget(memory_bytes, "", f"memory_bytes: {memory_bytes}{source} is", share)
    return pool.plan(weights, activations, stored_bytes, budget)


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes for weights, activations and pool.

    Attributes:
        limit, subject: it as the end and as the beginning of a sentence that refuses: "memory_bytes=5", "memory_bytes: 5 is".
        share: the pool gets one byte in this many, unless a sequence of a length that was asked for needs more.
    """

    num_bytes: int
    limit: str
    subject: str
    share: int = 1


@dataclass(frozen=True, slots=True)
class PoolRules:
    """What a pool's size follows from, on any device: arguments as plan_memory's.

    Raises:
        ValueError: naming the field, its value and its limit.
    """

    config: ModelConfig
    precision: Precision
    page_size: int
    max_num_seqs: int
    max_model_len: int | None
    kv_cache_bytes: int | None

    def __post_init__(self) -> None:
        if self.kv_cache_bytes is not None:
            whole_number("kv_cache_bytes", self.kv_cache_bytes, 1)
        if self.max_model_len is not None:
            whole_number("max_model_len", self.max_model_len, 1, self.config.max_seq_len, "the model's ")
        whole_number("max_num_seqs", self.max_num_seqs, 1, MAX_SLOTS)
        if whole_number("page_size", self.page_size, 1, 2**16) % 16:
            raise ValueError(
                f"page_size: {self.page_size} must be a multiple of 16, the width of a vector of scores"
            )

    @property
    def longest(self) -> int:
        return self.config.max_seq_len if self.max_model_len is None else self.max_model_len

    @property
    def page_bytes(self) -> int:
        """Of one page, keys and values of all layers."""
        return self.config.kv_values_per_token * ELEMENT_BYTES[self.precision.kv_element] * self.page_size

    def plan(
        self, weights: int, activations: int, stored_bytes: int | None, budget: Budget | None
    ) -> MemoryPlan:
        """What is left of a budget as pages, or what kv_cache_bytes buys; a budget of None is not looked at.

        Raises:
            ValueError: it does not fit, with the numbers.
        """
        parameters = num_parameters(self.config)
        item = ELEMENT_BYTES[self.precision.kv_element]
        page = self.page_bytes
        per_token = page // self.page_size
        per_sequence = -(-self.longest // self.page_size)
        most_pages = MAX_SLOTS // self.page_size
        given = self.kv_cache_bytes
        if given is not None:
            needed = weights + activations + given
            if budget is not None and needed > budget.num_bytes:
                raise ValueError(
                    f"kv_cache_bytes: {given} + {weights} of weights + {activations} of activations is {needed}, "
                    f"more than {budget.limit}"
                )
            pages = _pages(self.config, given, self.page_size, item)
            if pages > most_pages:
                raise ValueError(
                    f"kv_cache_bytes: {given} is {pages} pages of {page} bytes, the pool's limit is {most_pages}"
                )
        else:
            assert budget is not None, "a plan needs one of the two"
            left = budget.num_bytes - weights - activations
            if left < page:
                raise ValueError(
                    f"{budget.subject} less than {weights} of weights ({parameters} parameters) "
                    f"+ {activations} of activations + {page} of one KV page"
                )
            pages = min(self.max_num_seqs * per_sequence, left // page, most_pages)
            if budget.share > 1:
                asked = 1 if self.max_model_len is None else per_sequence
                pages = min(pages, max(budget.num_bytes // budget.share // page, asked))
        if self.max_model_len is not None and pages < per_sequence:
            raise ValueError(
                f"max_model_len: {self.max_model_len} tokens need {per_sequence} KV pages of {page} bytes "
                f"({per_sequence * page}), there is room for {pages} ({pages * page})"
            )
        return MemoryPlan(
            num_parameters=parameters, weight_bytes=weights, stored_bytes=stored_bytes, activation_bytes=activations,
            kv_bytes_per_token=per_token, page_bytes=page, page_size=self.page_size, num_pages=pages,
            max_model_len=min(self.longest, pages * self.page_size), max_num_seqs=self.max_num_seqs,
            memory_bytes=None if budget is None else budget.num_bytes, precision=self.precision,
        )  # fmt: skip


def _pages(config: ModelConfig, budget_bytes: int, page_size: int, itemsize: int) -> int:
    return pages_for_budget(
        budget_bytes, num_layers=config.n_layer, num_heads=config.kv_heads, head_dim=config.dim_per_head,
        page_size=page_size, itemsize=itemsize,
    )  # fmt: skip


def _activation_bytes(
    config: ModelConfig, precision: Precision, rows: int, samples: int, positions: int
) -> int:
    """What ModelExecutor holds besides weights, pool and attention's parts while it runs the largest step."""
    per_row = 0
    for buffer in buffers(config, precision.gemm_input).values():
        item = ELEMENT_BYTES[buffer.element]
        per_row += StepExecutor.stride(buffer.cols, item) * item + (
            _FLOAT_BYTES if buffer.element == "u8" else 0
        )
    logits = StepExecutor.logits_stride(config.vocab_size) + -(
        -config.vocab_size // LOGITS_BLOCK
    )  # and block maxima
    ropes = {config.layer_rope(layer) for layer in range(config.n_layer)} - {None}
    halves = 1 if config.switch_len is None or config.switch_len >= positions else 2
    rotary = sum(halves * positions * rope.dims for rope in ropes if rope is not None)
    sampled = min(samples + MAX_PROMPT_LOGPROB_ROWS, rows)
    return rows * per_row + _FLOAT_BYTES * (sampled * logits + rotary)


def _parts_bytes(config: ModelConfig, precision: Precision, rows: int, positions: int, threads: int) -> int:
    """At most what attention's segments leave for each other; layers of one window share the memory."""
    group, heads, dim = config.n_head // config.kv_heads, config.kv_heads, config.dim_per_head
    small, large = attention.tilings(group, heads, dim, precision.kv_element)
    operations = forward_ops(config, precision.gemm_input)
    windows = {operation.window for operation in operations if isinstance(operation, Attention)}
    return sum(
        StepExecutor.most_parts_bytes(
            (small.rows, small.tiles), (large.rows, large.tiles), group, heads, dim, rows, positions, threads, window
        )
        for window in windows
    )  # fmt: skip
