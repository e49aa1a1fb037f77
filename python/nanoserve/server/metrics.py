"""Metrics, with vLLM's meanings, under our name: nanoserve:num_requests_running is vllm:num_requests_running, and so on.

Time to first token counts from when the connection was accepted, or, on one that is used again, from the request's first
byte: what a client measures, the queue included. Observing is on the way of every token, so histograms are counted here, in
lists; prometheus-client gets them when it is asked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from nanoserve.server.job import Job

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
)
_BETWEEN = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
)
_LATENCY = (
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    60.0,
    120.0,
    240.0,
    480.0,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

_ENDINGS = {
    "queue_timeout": "timeout",
    "deadline_exceeded": "timeout",
    "shutting_down": "abort",
}  # by a failure's code


class Histogram:
    """Counts by bucket."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name, self.text, self._bounds = name, text, list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        return sum(self._counts)

    def family(self) -> Metric:
        below, buckets = 0, []
        for bound, count in zip([*map(float, self._bounds), float("inf")], self._counts, strict=True):
            below += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), below))
        return HistogramMetricFamily(self.name, self.text, buckets=buckets, sum_value=self.total)


class Metrics:
    """What is counted. `gauges` is asked when somebody looks."""

    def __init__(self) -> None:
        self.gauges: Callable[[], dict[str, Any]] = dict
        self.ttft = Histogram(
            "nanoserve:time_to_first_token_seconds", "From accepting the request to its first token.", _TTFT
        )
        self.between = Histogram(
            "nanoserve:inter_token_latency_seconds", "Between two tokens of a request.", _BETWEEN
        )
        self.queued = Histogram(
            "nanoserve:request_queue_time_seconds", "Until the engine got the request.", _LATENCY
        )
        self.took = Histogram(
            "nanoserve:e2e_request_latency_seconds", "From accepting the request to its end.", _LATENCY
        )
        self.prompts = Histogram("nanoserve:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.outputs = Histogram(
            "nanoserve:request_generation_tokens", "Output tokens of a request.", _TOKENS
        )
        self.endings: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.answers: Counter[tuple[str, int]] = Counter()
        self.prompt_tokens = self.output_tokens = 0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    # ---- what happens

    def refused(self, why: str) -> None:
        self.refusals[why] += 1

    def answered(self, route: str, status: int) -> None:
        self.answers[route, status] += 1

    def started(self, job: Job) -> None:
        assert job.started_s is not None
        self.queued.observe(job.started_s - job.received_s)

    def tokens(self, job: Job, counts: Sequence[int], now: float) -> None:
        """A job got tokens, so many per sequence: those that were told together count as evenly apart."""
        count, steps = sum(counts), max(counts)
        if not count:
            return
        job.output_tokens += count
        self.output_tokens += count
        if job.last_token_s is None:
            job.first_token_s = now
            self.prompt_tokens += job.prompt_tokens
            self.ttft.observe(now - job.accepted_s)
        else:
            self.between.observe((now - job.last_token_s) / steps, count)
        job.last_token_s = now

    def ended(self, job: Job, now: float) -> None:
        if job.failure is not None:
            self.endings[_ENDINGS.get(job.failure.code, "error")] += 1
        elif not job.is_complete:
            self.endings["abort"] += 1
        else:
            for reason in job.finish_reasons:
                self.endings[reason] += 1
        self.took.observe(now - job.accepted_s)
        self.prompts.observe(job.prompt_tokens)
        self.outputs.observe(job.output_tokens)

    # ---- what is shown

    def collect(self) -> Iterator[Metric]:
        """For prometheus-client."""
        now = self.gauges()
        if "device" in now:
            device = GaugeMetricFamily("nanoserve:device_info", "Where the model runs; 1.", labels=["device"])
            device.add_metric([now["device"]], 1)
            yield device
        for name, text in (
            ("num_requests_running", "Requests that the engine computes."),
            ("num_requests_waiting", "Requests that wait for it."),
            ("kv_cache_usage_perc", "Share of KV pages in use; 1 is all."),
            ("last_step_age_seconds", "Since a step ended."),
            ("last_token_age_seconds", "Since a token was sampled."),
        ):
            if name in now:
                yield GaugeMetricFamily(f"nanoserve:{name}", text, value=now[name])
        for name, text in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
            ("prefix_cache_hits", "Prompt tokens found there."),
            ("num_preemptions", "Requests that lost their pages for a while."),
            ("engine_steps", "Steps."),
            ("engine_step_failures", "Steps that raised."),
        ):
            if name in now:
                yield CounterMetricFamily(f"nanoserve:{name}", text, value=now[name])
        yield CounterMetricFamily(
            "nanoserve:prompt_tokens", "Prompt tokens computed or found.", value=self.prompt_tokens
        )
        yield CounterMetricFamily("nanoserve:generation_tokens", "Output tokens.", value=self.output_tokens)
        for family, counts in (
            (
                CounterMetricFamily(
                    "nanoserve:request_success", "Ended requests.", labels=["finished_reason"]
                ),
                self.endings,
            ),
            (
                CounterMetricFamily("nanoserve:requests_refused", "Refused requests.", labels=["reason"]),
                self.refusals,
            ),
        ):
            for why, count in sorted(counts.items()):
                family.add_metric([why], count)
            yield family
        answers = CounterMetricFamily("nanoserve:http_responses", "Answers.", labels=["route", "status"])
        for (route, status), count in sorted(self.answers.items()):
            answers.add_metric([route, str(status)], count)
        yield answers
        for histogram in (self.ttft, self.between, self.queued, self.took, self.prompts, self.outputs):
            yield histogram.family()

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
