"""Attention over pages, as Triton compiles it, in the emulator: right, and the same bits whoever computes a row."""

from __future__ import annotations

import numpy as np
import pytest

from gpu.attention_problem import FORMS, AttentionProblem, numbers
from gpu.run_kernel import ORDERS, artifact
from nanoserve.kernels.cuda.paged_attention import AttentionForm

LENGTHS = (1, 37, 300, 1100)


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_what_they_should_be_and_have_the_same_bits_however_computed(name: str) -> None:
    form = FORMS[name]
    problem = AttentionProblem(form, LENGTHS)
    counts = (1, 20, form.chunk_rows + 3, 2)
    chunked = problem.attend(counts, order=2)
    tolerance = 1.5e-2 if form.narrow else 3e-6
    assert np.abs(numbers(form, chunked[problem.rows(counts)]) - problem.reference(counts)).max() < tolerance
    untouched = sorted(set(range(len(chunked))) - set(problem.rows(counts)))
    assert np.isnan(numbers(form, chunked[untouched])).all()
    alone = problem.attend((1,) * len(LENGTHS))
    split = problem.split()
    for other in (alone, split):
        assert numbers(form, other[problem.last]).tobytes() == numbers(form, chunked[problem.last]).tobytes()


@pytest.mark.parametrize("name", ["bf16", "f32"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_threads_changes_nothing(name: str, order: int) -> None:
    problem = AttentionProblem(FORMS[name], (5, 130), seed=order)
    assert problem.split(order).tobytes() == problem.split().tobytes()
    assert problem.attend((5, 30), order).tobytes() == problem.attend((5, 30)).tobytes()


@pytest.mark.parametrize("name", FORMS)
def test_what_is_compiled_fits_and_uses_tensor_cores(name: str) -> None:
    form = FORMS[name]
    for spec in (form.attend_spec(), form.split_spec(), form.merge_spec()):
        made = artifact(spec, "sm_90a")
        assert made.usage.spilled_bytes == 0
        has_products = "mma.sync" in made.ptx
        assert has_products == (form.narrow and dict(spec.params)["part"] != "merge")
        assert "fma" not in made.ptx or "fma.rn.f32" in made.ptx


def test_what_does_not_fit_is_refused() -> None:
    for fields, words in (
        ({"kv_heads": 3}, "multiple of kv_heads=3"),
        ({"page_size": 48}, "must divide 64"),
        ({"dtype": "f16"}, "'f16'"),
        ({"narrow": True}, "narrow"),
        ({"window": -1}, "window=-1"),
        ({"ld_out": 8}, "ld_out=8"),
    ):
        with pytest.raises(ValueError, match=words):
            AttentionForm(
                **{
                    "heads": 4,
                    "kv_heads": 2,
                    "head_dim": 16,
                    "page_size": 16,
                    "ld_q": 128,
                    "ld_out": 64,
                    **fields,
                }
            )  # type: ignore[arg-type]
