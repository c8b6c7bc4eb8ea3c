"""What Prometheus scrapes: requests, waiting, latency, tokens, the champion and its changes, failures, memory."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agentlab.hardware.monitor import memory_stats, process_ram_mb

if TYPE_CHECKING:
    from agentlab.agent import ReasoningResult

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)  # 2 s is the target of an answer
_MB = 2**20


class Metrics:
    """All series of one server, in a registry of their own. Times are counted from the arrival of a request."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.responses = Counter(
            "agentlab_http_responses", "HTTP responses begun, by path and status code.", ["path", "code"], registry=own
        )
        self.in_flight = Gauge("agentlab_requests_in_flight", "Chat requests waiting or being answered.", registry=own)
        self.queued = Gauge("agentlab_requests_queued", "Chat requests waiting for their turn.", registry=own)
        self.answers = Counter("agentlab_answers", "Answers that ended, by the agent's state.", ["state"], registry=own)
        self.failures = Counter("agentlab_failures", "Requests without an answer, by reason.", ["reason"], registry=own)
        self.latency = Histogram(
            "agentlab_request_seconds", "From arrival to the whole answer.", buckets=_SECONDS, registry=own
        )
        self.first_token = Histogram(
            "agentlab_first_token_seconds", "From arrival to the first piece of the answer.", buckets=_SECONDS,
            registry=own,
        )  # fmt: skip
        self.waiting = Histogram(
            "agentlab_queue_wait_seconds", "From arrival to the turn.", buckets=_SECONDS, registry=own
        )
        self.tokens = Counter("agentlab_tokens", "Tokens read (prompt) and written.", ["kind"], registry=own)
        self.swaps = Counter("agentlab_champion_swaps", "Champions taken over while serving.", registry=own)
        self.swap_failures = Counter(
            "agentlab_champion_swap_failures", "New champions that could not be loaded.", registry=own
        )
        self._champion = Gauge(
            "agentlab_champion_info", "Who answers under the stable name.", ["run", "adapter", "model"], registry=own
        )
        own.register(_Memory())

    def champion(self, *, run: str, adapter: str, model: str) -> None:
        """From now on this one answers."""
        self._champion.clear()
        self._champion.labels(run, adapter, model).set(1)

    def ended(self, result: "ReasoningResult") -> None:
        """Count an answer and its tokens."""
        self.answers.labels(result.state).inc()
        self.tokens.labels("prompt").inc(result.prompt_tokens)
        self.tokens.labels("completion").inc(result.completion_tokens)

    def text(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)


class _Memory(Collector):
    """Read when it is scraped, not between."""

    def collect(self) -> Iterator[Metric]:
        stats = memory_stats()
        memory = GaugeMetricFamily(
            "agentlab_memory_bytes", "Memory of the machine and its GPUs.", labels=["device", "kind"]
        )
        for device, total, used, free in (
            ("gpu", stats.gpu_total, stats.gpu_used, stats.gpu_free),
            ("cpu", stats.cpu_total, stats.cpu_used, stats.cpu_free),
        ):
            for kind, value_mb in (("total", total), ("used", used), ("free", free)):
                memory.add_metric([device, kind], value_mb * _MB)
        yield memory
        yield GaugeMetricFamily("agentlab_process_memory_bytes", "Memory of the server.", value=process_ram_mb() * _MB)
