"""Constraints made of lists, for engine tests that need no grammar."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class AllowList:
    """At step i only the tokens of `steps[i]` may come (None: all); at the end of the list it must end.

    Args:
        may_end: before that, too.
        raises: of "allowed", "accept" and "must_end" the question that raises, at the step of that number.

    Attributes:
        accepted: what it was told. mask: what it said last.
    """

    def __init__(
        self,
        steps: Sequence[set[int] | None],
        vocab: int,
        *,
        may_end: bool = False,
        raises: tuple[str, int] | None = None,
    ) -> None:
        self.steps, self.vocab, self._may_end, self._raises = steps, vocab, may_end, raises
        self.accepted: list[int] = []
        self.mask = np.zeros(-(-vocab // 32), np.uint32)

    def _fault(self, question: str) -> None:
        if self._raises == (question, len(self.accepted)):
            raise RuntimeError(f"no {question}")

    def allowed(self) -> np.ndarray | None:
        self._fault("allowed")
        tokens = self.steps[len(self.accepted)]
        if tokens is None:
            return None
        bits = np.zeros(len(self.mask) * 32, np.uint8)
        bits[list(tokens)] = 1
        self.mask[:] = np.packbits(bits, bitorder="little").view(np.uint32)
        return self.mask

    def accept(self, token: int) -> None:
        self._fault("accept")
        tokens = self.steps[len(self.accepted)]
        assert tokens is None or token in tokens, f"{token} is not allowed"
        self.accepted.append(token)

    def may_end(self) -> bool:
        return self._may_end or self.must_end()

    def must_end(self) -> bool:
        self._fault("must_end")
        return len(self.accepted) == len(self.steps)
