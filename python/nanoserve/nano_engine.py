"""NanoServingEngine: model, memory and scheduler behind four verbs: add_request, step, abort, generate.

It only wires the parts together and guards the door. What runs when is ContinuousBatcher's, what is cached is
RadixCacheManager's, what is computed is ModelExecutor's. One thread drives an engine; nothing in it is locked.

Answers are bit-exact: a request's tokens depend on its prompt, its parameters and its seed, never on what else runs.
A request without a seed gets one from the engine's own (`seed`) and its place in the order of arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from nanoserve.cache.kv_pool import KVCachePool
from nanoserve.cache.radix_manager import RadixCacheManager
from nanoserve.checks import shown, truth, whole_number
from nanoserve.compiler.target import host
from nanoserve.constraint import Constraint
from nanoserve.device_name import device_ordinal, refuse_options
from nanoserve.errors import RequestRefused
from nanoserve.executor import ModelExecutor
from nanoserve.models.config import ModelConfig
from nanoserve.models.weights import Tensors
from nanoserve.precision import Precision
from nanoserve.request import Request, Watcher
from nanoserve.sampling import SamplingParams
from nanoserve.scheduling.audit import audit
from nanoserve.scheduling.chunked_prefill import ChunkedPrefillManager
from nanoserve.scheduling.continuous_batcher import ContinuousBatcher, StepOutput
from nanoserve.scheduling.decode_manager import DecodeManager

if TYPE_CHECKING:
    from nanoserve.cuda.executor import CudaExecutor


class NanoServingEngine:
    """Serves one model.

    Args:
        config: the model's shape and options.
        weights: tensors by checkpoint name, as `load_weights` returns them.
        kv_cache_pages: pages of KV memory, `page_size` tokens each.
        max_chunk_size: most prompt tokens of one request per step; None: 256, on a GPU all that a step may compute.
        max_batch_size: most requests running at once.
        max_num_batched_tokens: most tokens computed in one step, decode rows and prompt chunks together.
        eos_token_id: token(s) that end a request; None takes the config's.
        page_size: tokens per page, a multiple of 16.
        policy: order of the waiting queue: fcfs, sjf, ljf, priority or lpm.
        max_model_len: longest prompt + output; None takes the config's max_seq_len, or what the pool holds if that is less.
        precision: number formats of the forward pass and the KV pool; None: float32, both.
        enable_prefix_cache: keep finished prefixes in the radix tree for later requests.
        num_threads: threads of a forward pass on the CPU; None takes the machine's cores.
        device: where the forward pass runs and KV memory lies: "cpu", or "cuda" (or "cuda:1") for a GPU of NVIDIA's.
        gemm: on a GPU, what multiplies: as CudaExecutor's; None: "mma".
        seed: source of the seeds of requests that bring none.
        on_progress: called as (done, total, kernel name) while kernels compile.
        on_load, weight_cache: as ModelExecutor's; a GPU's weights are not cached.

    Attributes:
        device_name: where it runs, as a person reads it.

    Raises:
        ValueError: naming the field, its value and its limit.
        CudaDriverMissing: a GPU is asked for and there is no driver.
        CheckpointError: the weights do not fit the config.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Tensors,
        kv_cache_pages: int = 256,
        max_chunk_size: int | None = None,
        max_batch_size: int = 32,
        max_num_batched_tokens: int = 2048,
        eos_token_id: int | Iterable[int] | None = None,
        *,
        page_size: int = 16,
        policy: str = "fcfs",
        max_model_len: int | None = None,
        precision: Precision | None = None,
        enable_prefix_cache: bool = True,
        num_threads: int | None = None,
        device: str = "cpu",
        gemm: str | Mapping[str, str] | None = None,
        seed: int = 0,
        on_progress: Callable[[int, int, str], None] | None = None,
        on_load: Callable[[int, int, str], None] | None = None,
        weight_cache: bool = True,
    ) -> None:
        if max_chunk_size is None:  # products of few rows leave a GPU idle, and a CPU busy
            max_chunk_size = 256 if device_ordinal(device) is None else max_num_batched_tokens
        for name, value in (
            ("kv_cache_pages", kv_cache_pages),
            ("max_chunk_size", max_chunk_size),
            ("max_batch_size", max_batch_size),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("page_size", page_size),
        ):
            whole_number(name, value, 1, 2**31 - 1)
        if max_num_batched_tokens < max_batch_size:
            raise ValueError(
                f"max_num_batched_tokens: {max_num_batched_tokens} must be at least max_batch_size={max_batch_size}: "
                "every running request computes a token per step"
            )
        if max_model_len is None:
            max_model_len = min(config.max_seq_len, kv_cache_pages * page_size)
        whole_number("max_model_len", max_model_len, 1, config.max_seq_len, "the model's ")
        if num_threads is not None:
            whole_number("num_threads", num_threads, 1, 4096)
        truth("enable_prefix_cache", enable_prefix_cache)
        truth("weight_cache", weight_cache)
        refuse_options(device, {"num_threads": num_threads}, {"gemm": gemm})
        self.config = config
        self.eos_token_ids = _eos_ids(config, eos_token_id)
        precision = Precision() if precision is None else precision
        self.kv_pool: KVCachePool
        self.executor: ModelExecutor | CudaExecutor
        self.device_name = f"cpu ({host().name})"
        if device_ordinal(device) is None:
            self.kv_pool = KVCachePool(
                kv_cache_pages,
                page_size,
                config.n_layer,
                config.kv_heads,
                config.dim_per_head,
                precision.kv_element,
            )
            self.executor = ModelExecutor(
                config,
                weights,
                self.kv_pool,
                precision=precision,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=max_model_len,
                num_threads=num_threads,
                on_progress=on_progress,
                on_load=on_load,
                weight_cache=weight_cache,
            )
        else:
            from nanoserve.cuda.backend import open_device

            gpu = open_device(device)
            self.device_name = gpu.name
            self.kv_pool = gpu.make_pool(config, precision, kv_cache_pages, page_size)
            self.executor = gpu.make_executor(
                config,
                weights,
                self.kv_pool,
                precision=precision,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_seqs=max_batch_size,
                max_model_len=max_model_len,
                gemm="mma" if gemm is None else gemm,
                on_progress=on_progress,
                on_load=on_load,
            )
        self.radix_mgr = RadixCacheManager(self.kv_pool, enabled=enable_prefix_cache)
        self.batcher = ContinuousBatcher(
            self.executor,
            self.radix_mgr,
            ChunkedPrefillManager(self.kv_pool, max_chunk_size, max_num_batched_tokens),
            DecodeManager(max_batch_size),
            self.eos_token_ids,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            vocab_size=config.vocab_size,
            policy=policy,
            seed=seed,
            switch_len=config.switch_len,
        )
        self._ids = count()

    def prepare(
        self,
        prompt_tokens: Sequence[int],
        params: SamplingParams | None = None,
        *,
        req_id: int | str | None = None,
        priority: int = 0,
        bad_word_ids: Sequence[Sequence[int]] = (),
        watcher: Watcher | None = None,
        constraint: Constraint | None = None,
        cache_space: int = 0,
    ) -> Request:
        """A request that `submit` will accept; nothing is queued yet. Any thread may call it. Arguments as Request's.

        Args:
            cache_space: requests find each other's prefixes within a space only; at most `max_cache_space`.

        Raises:
            ValueError: a bad token or parameter. RequestRefused (a ValueError): it can never fit; the message has the numbers.
        """
        whole_number("cache_space", cache_space, 0, self.max_cache_space)
        request = Request(
            self._unused_id() if req_id is None else req_id, prompt_tokens,
            params=SamplingParams() if params is None else params, priority=priority, bad_word_ids=bad_word_ids,
            watcher=watcher, constraint=constraint, cache_offset=cache_space * self.config.vocab_size,
        )  # fmt: skip
        self.batcher.check(request)
        return request

    @property
    def max_cache_space(self) -> int:
        """Spaces are told apart in the 31 bits of a token: by multiples of the vocabulary's size."""
        return (2**31 - 1) // self.config.vocab_size - 1

    def submit(self, request: Request) -> None:
        """Queue a prepared request."""
        self.batcher.add_request(request)

    def add_request(
        self, prompt_tokens: Sequence[int], params: SamplingParams | None = None, **options: Any
    ) -> Request:
        """`prepare` and `submit` in one."""
        request = self.prepare(prompt_tokens, params, **options)
        self.submit(request)
        return request

    def step(self) -> StepOutput:
        """Compute one mixed batch and commit what it produced."""
        return self.batcher.step()

    def abort(self, req_id: int | str) -> bool:
        """Drop a request in whatever state it is; False when it is not (or no longer) live."""
        return self.batcher.abort(req_id)

    @property
    def has_unfinished(self) -> bool:
        return self.batcher.has_unfinished

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Request]:
        """Serve prompts to completion; finished requests in prompt order.

        All prompts are checked before any is queued, so a bad one takes nothing with it.

        Raises:
            ValueError: as add_request, naming the prompt's index.
        """
        prompts = as_list("prompts", prompts)
        per_prompt = params_per_prompt(params, len(prompts))
        requests = []
        for index, (prompt, one) in enumerate(zip(prompts, per_prompt, strict=True)):
            try:
                requests.append(self.prepare(prompt, one))
            except RequestRefused as error:
                raise RequestRefused(f"prompts[{index}]: {error}") from error
            except ValueError as error:
                raise ValueError(f"prompts[{index}]: {error}") from error
        return self.batcher.run_until_complete(requests)

    def _unused_id(self) -> int:
        """The next number that no live request goes by."""
        return next(number for number in self._ids if number not in self.batcher.scheduler.pool.live)

    def get_stats(self) -> dict[str, Any]:
        """Counters since the start or `reset_stats`: cache_hit_rate, avg_tokens_per_step, preemptions, kv_* and more."""
        stats = self.batcher.get_stats()
        stats.update({f"kv_{name}": value for name, value in self.kv_pool.stats().items()})
        return stats

    def reset_stats(self) -> None:
        self.batcher.reset_stats()

    def audit(self) -> None:
        """Check pool, tables and tree against each other; raises InvariantViolation with what disagrees."""
        audit(self.batcher.scheduler)


def _eos_ids(config: ModelConfig, given: int | Iterable[int] | None) -> tuple[int, ...]:
    if given is None:
        return config.eos_token_ids
    listed = list(given) if isinstance(given, Iterable) else [given]
    return tuple(whole_number("eos_token_id", token, 0, config.vocab_size - 1) for token in listed)


def as_list(name: str, values: Any) -> list[Any]:
    """Any iterable of entries as a list; a ValueError for text, a mapping, or a single value."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{name}: {shown(values)} must be a sequence with one entry per prompt")
    return list(values)


def params_per_prompt(params: Any, count: int) -> list[SamplingParams]:
    """One SamplingParams for each prompt, from none, one for all, or a sequence."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    listed: list[SamplingParams] = as_list("params", params)
    if len(listed) != count:
        raise ValueError(f"params: {len(listed)} sampling parameters for {count} prompts")
    for index, one in enumerate(listed):
        if not isinstance(one, SamplingParams):
            raise ValueError(f"params[{index}]: {shown(one)} must be SamplingParams")
    return listed
