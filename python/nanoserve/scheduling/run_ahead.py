"""Scheduling overlaps with execution: while an executor computes a step, the one after it is decided and handed over.

    step n        decided | computed .............. | committed
    step n + 1              decided | waits | computed .............. | committed

The executor chooses step n's tokens itself and takes them as the ids of step n + 1, so the host hears of them when it has nothing
to hurry for. Only steps in which everybody decodes are decided so early (Scheduler.look_ahead); what else there is to do waits for
the commit. A request that ends in step n is in step n + 1 for nothing: its row is dropped, and its pages, which that step
still writes, are cleared before they are given back, in the order of the executor's stream.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from nanoserve.draws import AheadExecutor, Draws, StartedStep
from nanoserve.native import CudaDeviceLost
from nanoserve.scheduling.scheduler import Scheduler
from nanoserve.scheduling.scheduler_output import SchedulerOutput


@dataclass(slots=True)
class RunningStep:
    """A step that is decided.

    Attributes:
        started, draws: of one that the executor computes by itself, else None, both.
    """

    output: SchedulerOutput
    started: StartedStep | None = None
    draws: Draws | None = None

    @property
    def can_be_overtaken(self) -> bool:
        """Nothing of it is needed on the host to go on."""
        return self.draws is not None and not self.draws.on_host

    def wait(self) -> None:
        """Until it is over; nobody wants its tokens."""
        if self.started is not None:
            with suppress(Exception):
                self.started.tokens()


class RunAhead:
    """Starts the steps of one scheduler.

    Args:
        executor: None: nothing is started, and nothing is ahead.

    Attributes:
        num_ahead: steps that were started before the one before them was over.
    """

    def __init__(self, scheduler: Scheduler, executor: AheadExecutor | None) -> None:
        self._scheduler, self._executor = scheduler, executor
        self._ahead: RunningStep | None = None
        self.num_ahead = 0

    def take(self) -> RunningStep | None:
        """The step that was started ahead, as the one to go on with."""
        ahead, self._ahead = self._ahead, None
        return ahead

    def start(self, output: SchedulerOutput, ahead: int = 0) -> RunningStep:
        """Hands a step to the executor, if that chooses tokens itself, and they are all of the logits that are wanted."""
        if self._executor is None or output.batch.token_rows is not None:
            return RunningStep(output)
        try:
            draws = Draws.of(output.sampling_requests, ahead)
            return RunningStep(output, self._executor.start(output.batch, draws), draws)
        except CudaDeviceLost:
            raise
        except Exception:  # who computes it otherwise finds out whose fault it is
            return RunningStep(output)

    def look(self, running: RunningStep) -> None:
        """Starts the step after a running one, if it can be known."""
        if not running.can_be_overtaken:
            return
        output = self._scheduler.look_ahead()
        if output is None:
            return
        ahead = self.start(output, ahead=1)
        if ahead.started is None:
            self._scheduler.forget_ahead()
        else:
            self._ahead = ahead
            self.num_ahead += 1

    def forget(self) -> None:
        """The step that was started ahead counts for nothing; it is over when this returns."""
        ahead = self.take()
        if ahead is not None:
            ahead.wait()
            if self._scheduler.in_flight is ahead.output:
                self._scheduler.discard(ahead.output)
            else:
                self._scheduler.forget_ahead()

    def forget_if_nobodys(self) -> None:
        """No request of the step that was started ahead is live any more."""
        if self._ahead is not None and all(request.is_finished for request in self._ahead.output.requests):
            self.forget()
