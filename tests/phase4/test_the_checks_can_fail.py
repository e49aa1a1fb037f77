"""Phase 4: the checkers themselves. A model or an audit that cannot fail proves nothing."""

from __future__ import annotations

from typing import Any

import pytest

from nanoserve.request import Request
from phase4.kv_worker import KVWorker
from phase4.test_prefix_cache_model import PrefixCacheMachine


def test_the_model_notices_a_page_shared_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine can fail: a manager that commits what is computed but not validated is caught."""
    commit = KVWorker(1).manager.__class__.commit

    def hasty(self: Any, request: Request) -> None:
        request.validated_len = request.cached_len
        commit(self, request)

    machine = PrefixCacheMachine()
    monkeypatch.setattr(type(machine.manager), "commit", hasty)
    request = machine.worker.admit([0, 1, 1, 0])
    machine.worker.compute(request)
    request.validated_len = 0
    machine.add(request.token_ids[: request.validated_len], request.kv_pages)
    machine.manager.commit(request)
    with pytest.raises(AssertionError):
        machine.the_tree_is_the_model()


def test_the_worker_notices_a_page_written_while_shared() -> None:
    """The KV check can fail: one foreign number in a shared page is reported for its reader and for the tree."""
    worker = KVWorker(num_pages=4)
    worker.run([1, 2, 3, 4])
    worker.admit([1, 2, 3, 4, 5])
    assert worker.problems() == []
    worker.pool.get_layer_cache(1)[0][0, 2] += 1
    assert [problem.split(":")[0] for problem in worker.problems()] == ["request 0", "node 1"]
