"""Runs the attention kernels in Triton's interpreter and prints how far they are from the reference, by form and kernel.

A process interprets all Triton functions or none, and decides when they are decorated: hence a program of its own,
`TRITON_INTERPRET=1 python -m tests.gpu.interpreted_attention`.

Products of bfloat16 are left to the emulator: the interpreter of Triton 3.6 multiplies their bits as integers, and cuts float32
off where it should round. One thing is mended here, since no loop over a length works without it: a tensor of one element becomes
an integer through int(array), which NumPy 2.4 refuses for arrays of one dimension.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from tests.gpu.attention_problem import FORMS, AttentionProblem, form_of, numbers
from triton.runtime import interpreter

from nanoserve.kernels.cuda import paged_attention_triton as kernels

INTERPRETED = {
    **{name: form for name, form in FORMS.items() if not form.narrow},
    "f32, cap": form_of(2, 3, 32, softcap=5.0),
    "f32, window and cap": form_of(1, 4, 64, window=100, softcap=20.0),
}
LENGTHS = (1, 37, 130, 1100)


def mend_index() -> None:
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def distances(problem: AttentionProblem) -> dict[str, float]:
    form = problem.form

    def pages(cache: np.ndarray) -> torch.Tensor:
        stored = torch.from_numpy(problem.stored(cache))
        return stored.view(torch.bfloat16) if form.dtype == "bf16" else stored

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array)

    inputs = (tensor(problem.q), pages(problem.k), pages(problem.v), tensor(problem.table))
    counts = (1, 3, form.chunk_rows + 1, 2)
    spans, out = problem.spans(counts, form.chunk_rows), problem.empty()
    kernels.attend[(len(spans), form.kv_heads)](
        *inputs, tensor(spans), tensor(out), len(spans), **form.constants("attend")
    )
    found = {
        "attend": np.abs(numbers(form, out[problem.rows(counts)]) - problem.reference(counts)).max()
    }  # NaN, which is not below any bound, where a foreign page was read
    ones, merged = (1,) * len(LENGTHS), problem.empty()
    decodes, pieces = problem.pieces()
    parts = np.full((len(pieces), form.heads, form.head_dim), np.nan, np.float32)
    sums = np.full((len(pieces), form.heads, 2), np.nan, np.float32)
    kernels.split[(len(pieces), form.kv_heads)](
        *inputs, tensor(pieces), tensor(parts), tensor(sums), len(pieces), **form.constants("split")
    )
    kernels.merge[(len(decodes), form.heads)](
        tensor(parts), tensor(sums), tensor(decodes), tensor(merged), len(decodes), **form.constants("merge")
    )
    found["split and merge"] = np.abs(numbers(form, merged[problem.last]) - problem.reference(ones)).max()
    return {name: float(value) for name, value in found.items()}


if __name__ == "__main__":
    mend_index()
    print(
        json.dumps({name: distances(AttentionProblem(form, LENGTHS)) for name, form in INTERPRETED.items()})
    )
