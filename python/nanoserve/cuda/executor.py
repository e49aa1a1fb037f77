"""CudaExecutor: one model's forward pass on a GPU, behind the batcher's interface.

Construction copies the weights to the device, loads (or compiles) the kernels for its chip, and hands the native CudaStep a plan.
A step is one native call: inputs in one copy, launches or a graph. Its last kernel chooses the tokens; they, or rows of logits where the
host is to choose, come back when they are asked for.

Every output row's bits depend on its own tokens only, as on the CPU: an output of a product is chains along k that are cut where k
says, attention has fixed blocks and segments, and kernels are chosen by number of rows only among those that give the same bits.
That ends where cuBLAS is asked for (`gemm`): it is there to compare with, and for whoever wants its speed more than the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nanoserve.batch import Batch
from nanoserve.compiler.gpu.artifact import Artifact, ArtifactStore
from nanoserve.compiler.gpu.chip import CHIPS, Chip
from nanoserve.cuda.cublas import cublas_paths
from nanoserve.cuda.device_weights import DeviceWeights
from nanoserve.cuda.gemm_choice import choose_gemms
from nanoserve.cuda.launch import load_kernel
from nanoserve.cuda.op_binder import CudaOpBinder
from nanoserve.cuda.same_bits import check_same_bits
from nanoserve.cuda.same_bits import specs as compared_specs
from nanoserve.cuda.step_sizes import StepSizes
from nanoserve.draws import Draws
from nanoserve.kernels.cuda import choose
from nanoserve.kernels.cuda.library import load_artifacts
from nanoserve.logits import Logits
from nanoserve.models.config import ModelConfig
from nanoserve.models.decoder import forward_ops
from nanoserve.models.weights import Tensors, bind_weights
from nanoserve.native import CudaDevice, CudaKernel, CudaStep, KVCachePool
from nanoserve.packed_weights import OnProgress
from nanoserve.precision import Precision
from nanoserve.quantization_error import QuantizationReport


def chip_of(device: CudaDevice) -> Chip:
    """What code for a device is made for: of its own capability, with the instructions of that alone where there are any.

    Raises:
        ValueError: it is older than any that is known, with the list.
    """
    fitting = [chip for chip in CHIPS.values() if chip.runs_on(device.capability)]
    if not fitting:
        raise ValueError(
            f"device: {device.name} has compute capability {device.capability / 10:.1f}, kernels are made for "
            f"{', '.join(CHIPS)}"
        )
    return max(fitting, key=lambda chip: (chip.capability, chip.wgmma))


def default_buckets(most: int) -> list[int]:
    """Rows of graphs: powers of two, and from 16 on what lies halfway between, so that padding is at most a third."""
    buckets = {most}
    size = 1
    while size < most:
        buckets.add(size)
        if size >= 16 and size * 3 // 2 < most:
            buckets.add(size * 3 // 2)
        size *= 2
    return sorted(buckets)


class CudaStarted:
    """A step on its way."""

    def __init__(self, native: CudaStep, number: int, vocab_size: int) -> None:
        self._native, self._number, self._vocab_size = native, number, vocab_size
        self._tokens: list[int] | None = None

    def tokens(self) -> list[int]:
        """Waits. A token for each sampled row, -1 where a logit is not finite."""
        if self._tokens is None:
            self._tokens = self._native.finish(self._number).tolist()
        return self._tokens

    def logits(self, rows: Sequence[int]) -> Logits:
        """Of some of the sampled rows, in fresh memory; before another step is started."""
        values, block_max = self._native.read_logits(self._number, rows)
        return Logits(values[:, : self._vocab_size], block_max)


class CudaExecutor:
    """Runs one model's forward pass over a KV pool on a GPU.

    Args:
        config, weights: as NanoServingEngine's.
        device: where. kv_pool: there (nanoserve.native.cuda_pool), of the model's layers, KV heads, head size and element type.
        precision: float32 or bfloat16 arithmetic; None: float32.
        max_num_batched_tokens, max_num_seqs: most rows, and sequences, of one forward.
        max_model_len: longest sequence. None takes the config's max_seq_len.
        buckets: rows of the graphs; None: default_buckets; empty: no graphs.
        start_early: kernels begin before those in front of them end, where the device can do that.
        gemm: what multiplies: "mma" (our kernels for every chip), "wgmma" (of bfloat16, many rows by Hopper's warpgroup
            instructions), "cublas" (no bits are promised then), or a mapping from the decoder's products to those, as gemm_choice.py says.
        store: of compiled kernels; None: the user's. image: what of an artifact the driver loads, its cubin.
        on_progress: called as (done, total, kernel name) while kernels compile.
        on_load: called as (bytes done, bytes in total, weight name).

    Attributes:
        weight_bytes: in device memory. chooses_tokens: `start` gives tokens; a larger vocabulary is read by the host.
        gemm: what each product runs by. batch_invariant: whether a row's bits are the same whatever runs beside it.
        cublas: the library's (path, version), 130100 for 13.1.0; None where nothing needs it.
        num_threads: of the host, 1. quantization_report: None, nothing is quantised.

    Raises:
        ValueError: a size, a number format, a device or a choice that does not fit. CublasMissing: it is asked for, and not found.
        OtherBits: wgmma is asked for, and does not sum as mma does on this device.
        MemoryError: the device's memory does not suffice.
        KernelMissing: a kernel must be compiled, and no compiler is installed. CudaError: the driver fails.
    """

    num_threads = 1
    quantization_report: QuantizationReport | None = None

    def __init__(
        self,
        config: ModelConfig,
        weights: Tensors,
        kv_pool: KVCachePool,
        device: CudaDevice,
        *,
        precision: Precision | None = None,
        max_num_batched_tokens: int = 2048,
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        buckets: Sequence[int] | None = None,
        start_early: bool = True,
        gemm: str | Mapping[str, str] = "mma",
        store: ArtifactStore | None = None,
        image: Callable[[Artifact], bytes] = lambda artifact: artifact.cubin,
        on_progress: OnProgress | None = None,
        on_load: OnProgress | None = None,
    ) -> None:
        self.precision = precision = Precision() if precision is None else precision
        if precision.gemm_input == "u8":
            raise ValueError(
                "quantization: int8 is for the CPU; on a GPU, float32 and bfloat16 are supported"
            )
        self.config, self.kv_pool, self.device = config, kv_pool, device
        self.chip = chip_of(device)
        self.gemm = choose_gemms(gemm, config)
        self.chooses_tokens = config.vocab_size <= choose.MAX_COLS
        self.batch_invariant = "cublas" not in self.gemm.values()
        sizes = StepSizes.of(config, precision, max_num_batched_tokens, max_num_seqs, max_model_len)
        self.max_model_len, self._switch_len = sizes.max_model_len, sizes.switch_len
        ops = list(forward_ops(config, precision.gemm_input))
        buckets = default_buckets(sizes.max_sequences) if buckets is None else list(buckets)
        self._native = CudaStep(kv_pool, sizes.limits, buckets, start_early)
        self.cublas = None if self.batch_invariant else self._native.load_blas(cublas_paths())
        bound = bind_weights(config, weights)
        held = DeviceWeights(self._native, bound, self.max_model_len, self._switch_len, on_load)
        binder = CudaOpBinder(
            config, precision, self.chip, self._native, kv_pool.page_size, held, sizes, gemms=self.gemm
        )
        launches = [launch for op in ops for launch in binder.bind(op)]
        self.weight_bytes = self._native.weight_bytes
        specs = [spec for launch in launches for _, spec in launch.variants]
        mixes = "wgmma" in self.gemm.values()
        compared = compared_specs(self.chip) if mixes else ()
        loaded = load_artifacts([*specs, *compared], self.chip, store, on_progress)
        self.artifacts = {spec: loaded[spec] for spec in specs}
        self._image = image
        self._kernels: dict[int, CudaKernel] = {}
        if mixes:
            check_same_bits(device, self.chip, lambda spec: self._loaded(loaded[spec]))
        for launch in launches:
            launch.add_to(self._native, self.artifacts, self._loaded)

    def start(self, batch: Batch, draws: Draws | None = None) -> CudaStarted:
        """Launches a step whose tokens the device chooses; without draws, the largest logits. At most two run at once."""
        number = self._native.start(
            batch.input_ids, batch.tables, batch.starts, batch.counts, batch.sample_rows, self.config.vocab_size,
            self._position_offsets(batch), None if draws is None else draws.floats, None if draws is None else draws.ints,
            batch.sources,
        )  # fmt: skip
        return CudaStarted(self._native, number, self.config.vocab_size)

    def forward(self, batch: Batch) -> Logits:
        """Logits of the batch's `sample_rows`, in fresh memory; writes the KV of every row."""
        started = self.start(batch)
        started.tokens()
        return started.logits(range(len(batch.sample_rows)))

    @property
    def counts(self) -> dict[str, int]:
        """Steps, launches of graphs and of kernels (and how many of those began early), and graphs made."""
        return self._native.counts

    def _loaded(self, artifact: Artifact) -> CudaKernel:
        if id(artifact) not in self._kernels:
            self._kernels[id(artifact)] = load_kernel(self.device, artifact, self._image(artifact))
        return self._kernels[id(artifact)]

    def _position_offsets(self, batch: Batch) -> NDArray[np.int32] | None:
        """Where each sequence's rows of the rotary table begin; None: at 0, all of them."""
        if self._switch_len >= self.max_model_len:
            return None
        long_contexts = [request.long_context for request in batch.requests]
        return np.where(long_contexts, self.max_model_len, 0).astype(np.int32)
