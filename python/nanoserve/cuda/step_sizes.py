"""StepSizes: how large a device's step can get, from a model and what an engine allows. Whoever allocates and whoever plans reads it here."""

from __future__ import annotations

from dataclasses import dataclass

from nanoserve.kernels.cuda.layout import row_stride
from nanoserve.kernels.cuda.paged_attention import SEGMENT, AttentionForm
from nanoserve.kernels.logits import num_blocks
from nanoserve.logprobs import MAX_PROMPT_LOGPROB_ROWS
from nanoserve.models.config import ModelConfig
from nanoserve.native import CudaLimits
from nanoserve.precision import Precision

_MORE_PIECES = 8192  # than sequences: four million tokens of context in a step


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The most there can be of everything.

    Attributes:
        max_tokens, max_sequences, max_samples: rows, sequences, and rows with logits of a step.
        max_model_len: longest sequence. switch_len: longer ones use a second half of the rotary tables.
        max_pieces: segments of all sequences of one row together, for which attention has a program each. What has no room
            among them is computed as a prompt's rows are.
        chunk_rows: what attention's tiles have room for.
        vocab, logits_stride, num_blocks: of a row of logits: numbers, numbers to the next row, and maxima.
    """

    max_tokens: int
    max_sequences: int
    max_samples: int
    max_model_len: int
    switch_len: int
    max_pieces: int
    chunk_rows: int
    vocab: int
    logits_stride: int
    num_blocks: int

    @classmethod
    def of(
        cls, config: ModelConfig, precision: Precision, max_num_batched_tokens: int, max_num_seqs: int,
        max_model_len: int | None,
    ) -> StepSizes:  # fmt: skip
        """Arguments as CudaExecutor's."""
        longest = config.max_seq_len if max_model_len is None else max_model_len
        sequences = min(max_num_seqs, max_num_batched_tokens)
        segments = -(-longest // SEGMENT)
        return cls(
            max_tokens=max_num_batched_tokens, max_sequences=sequences,
            max_samples=min(sequences + MAX_PROMPT_LOGPROB_ROWS, max_num_batched_tokens), max_model_len=longest,
            switch_len=longest if config.switch_len is None else config.switch_len,
            max_pieces=min(sequences * segments, sequences + _MORE_PIECES), chunk_rows=_chunk_rows(config, precision), vocab=config.vocab_size,
            logits_stride=row_stride(config.vocab_size), num_blocks=num_blocks(config.vocab_size),
        )  # fmt: skip

    @property
    def limits(self) -> CudaLimits:
        """What CudaStep is to know of it."""
        halves = 2 if self.max_model_len > self.switch_len else 1
        return CudaLimits(
            max_tokens=self.max_tokens, max_positions=halves * self.max_model_len, max_sequences=self.max_sequences,
            max_pieces=self.max_pieces, max_samples=self.max_samples, chunk_rows=self.chunk_rows, segment=SEGMENT, vocab=self.vocab,
            logits_stride=self.logits_stride, num_blocks=self.num_blocks,
        )  # fmt: skip


def _chunk_rows(config: ModelConfig, precision: Precision) -> int:
    """What attention's tiles have room for; all layers alike."""
    heads, dim = config.n_head, config.dim_per_head
    narrow = precision.kv_element == "bf16" and precision.gemm_input == "bf16"
    return AttentionForm(
        heads, config.kv_heads, dim, 16, row_stride((heads + 2 * config.kv_heads) * dim), row_stride(heads * dim),
        dtype=precision.kv_element, narrow=narrow,
    ).chunk_rows  # fmt: skip
