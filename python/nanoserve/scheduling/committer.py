"""What a computed step changes: tokens are appended, requests move on, end, or fail alone.

A request is committed as a whole or not at all: everything that can go wrong (non-finite logits, an impossible token, a
watcher or a constraint that raises) is asked before the first of its fields changes. They hear of a token here and nowhere
else, so exactly once: a step that was discarded had no tokens yet, and a preempted request's known tokens are not sampled
again. A constraint does not hear of the EOS or stop id that ends its request: what it constrains is the text before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nanoserve.logprobs import TokenLogprob
from nanoserve.observe.events import ReqId
from nanoserve.request import Request, RequestState
from nanoserve.scheduling.residents import Residents
from nanoserve.scheduling.scheduler_output import SchedulerOutput

_Ending = tuple[str | None, int | str | None]  # finish_reason and stop_reason; (None, None) goes on


@dataclass(slots=True)
class StepResults:
    """What was computed of a step's batch.

    Attributes:
        tokens: one per `batch.sampling_requests`, in their order.
        errors: why a request of the batch could not be computed: it ends, and its token is ignored.
        finite: per sampling request, False if its logits were not all finite: it ends with an error, its pages are zeroed
            and nothing of it is cached. None if all were.
        logprobs: of the tokens of those requests that want to know.
        prompt_logprobs: of the prompt tokens after `batch.prompt_rows`.
    """

    tokens: Sequence[int]
    errors: Mapping[ReqId, str] = field(default_factory=dict)
    finite: Sequence[bool] | None = None
    logprobs: Mapping[ReqId, TokenLogprob] = field(default_factory=dict)
    prompt_logprobs: Mapping[ReqId, Sequence[TokenLogprob]] = field(default_factory=dict)


class Committer:
    """Commits steps to the requests of one scheduler.

    Args:
        residents: who moves, shares and ends requests.
        eos_token_ids, max_model_len, vocab_size: as Scheduler's.
    """

    def __init__(
        self,
        residents: Residents,
        eos_token_ids: frozenset[int],
        max_model_len: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.residents = residents
        self.eos_token_ids = eos_token_ids
        self._max_len = 2**31 if max_model_len is None else max_model_len
        self._vocab_size = 2**31 if vocab_size is None else vocab_size

    def commit(self, output: SchedulerOutput, results: StepResults) -> None:
        """Every request of the step that is still live gets its part of the results."""
        batch, residents, finite = output.batch, self.residents, results.finite
        row = -1
        for request, start, count, sampled in zip(
            batch.requests, batch.starts, batch.counts, batch.sampled, strict=True
        ):
            row += sampled
            if request.state is RequestState.FINISHED:  # aborted in flight
                continue
            if results.errors and request.req_id in results.errors:
                residents.fail(request, results.errors[request.req_id])
            elif not sampled:
                self._advance(request, start + count, results)
            elif finite is not None and not finite[row]:
                residents.fail(request, f"the logits at position {start + count - 1} are not finite")
            else:
                token = int(results.tokens[row])
                ending = self._ending(request, token)
                if ending is None:
                    continue
                self._advance(request, start + count, results)
                request.validated_len = start + count
                request.append_output(token)
                output.new_tokens[request.req_id] = token
                if request.req_id in results.logprobs:
                    request.logprobs.append(results.logprobs[request.req_id])
                reason, request.stop_reason = ending
                if reason is not None:
                    if residents.share(request):
                        residents.finish(request, reason)
                elif residents.outgrew_its_angles(request):
                    if residents.share(request):
                        residents.preempt(request, by=request)
                elif request.state is RequestState.PREFILL and residents.share(request):
                    residents.start_decode(request)

    def ends_by_length(self, request: Request) -> bool:
        """Its next token is its last, whatever it is."""
        return (
            len(request.output_tokens) + 1 >= request.params.max_tokens
            or request.total_len + 1 >= self._max_len
        )

    def _advance(self, request: Request, computed: int, results: StepResults) -> None:
        request.cached_len = computed
        if request.prompt_logprobs is not None:
            request.prompt_logprobs.extend(results.prompt_logprobs.get(request.req_id, ()))

    def _ending(self, request: Request, token: int) -> _Ending | None:
        """How the request ends with this token, if it does; None if it has ended already, because of it."""
        if not 0 <= token < self._vocab_size:
            self.residents.fail(request, f"token {token} was sampled, it must be in [0, {self._vocab_size})")
            return None
        verdict = None
        if request.watcher is not None:
            try:
                verdict = request.watcher(token)
            except Exception as error:  # this request's trouble, not its neighbours'
                self.residents.fail(request, f"its watcher failed: {type(error).__name__}: {error}")
                return None
            if request.state is RequestState.FINISHED:  # the watcher aborted it
                return None
        params = request.params
        num_output = len(request.output_tokens) + 1
        if num_output > params.min_tokens:
            if token in self.eos_token_ids and not params.ignore_eos:
                return "stop", None
            if token in params.stop_token_ids:
                return "stop", token
        is_complete = False
        if request.constraint is not None:
            try:
                request.constraint.accept(token)
                is_complete = request.constraint.must_end()
            except Exception as error:
                self.residents.fail(request, f"its constraint failed: {type(error).__name__}: {error}")
                return None
        if verdict is not None and num_output > params.min_tokens:
            return "stop", verdict
        if is_complete:
            return "stop", None
        if self.ends_by_length(request):
            return "length", None
        return None, None
