"""Figures for Prometheus, of one app: its own registry, so that two apps in a process do not meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from ritocco.batcher import Snapshot
from ritocco.server.store import Record

_STEP_BUCKETS = (0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.12, 0.25, 0.5, 1, 2, 4, 8)
_TIME_BUCKETS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class _Batch(Collector):
    """A batcher's own figures, at the moment that they are asked for."""

    def __init__(self, batch: Callable[[], Snapshot]) -> None:
        self._batch = batch

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        found = self._batch()
        steps = CounterMetricFamily("ritocco_steps", "Steps taken, by pictures in them.", labels=["pictures"])
        for pictures, count in found.steps.items():
            steps.add_metric([str(pictures)], count)
        yield steps
        yield GaugeMetricFamily("ritocco_batch_fill", "Pictures in a step, on average.", found.fill)
        yield GaugeMetricFamily("ritocco_set_aside", "Requests that others have passed.", found.set_aside)
        yield GaugeMetricFamily("ritocco_healthy", "Whether some engine works.", float(found.healthy))
        yield GaugeMetricFamily("ritocco_engines", "Engines that work.", found.engines)
        yield _labelled(
            "ritocco_measured_step_seconds",
            "Of one step on the device, by engine, picture and UNet rows.",
            ("engine", "width", "height", "rows"),
            {
                (engine, *size): seconds
                for engine, measured in enumerate(found.step_seconds)
                for size, seconds in measured.items()
            },
        )
        yield _labelled(
            "ritocco_memory_bytes",
            "By engine: its budget; of a CUDA device what is allocated, reserved, and the most allocated.",
            ("engine", "kind"),
            {(engine, kind): size for engine, held in enumerate(found.memory) for kind, size in held.items()},
        )


def _labelled(
    name: str, text: str, labels: Sequence[str], values: Mapping[tuple[object, ...], float]
) -> GaugeMetricFamily:
    made = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        made.add_metric([str(part) for part in key], value)
    return made


class Metrics:
    """Counted where it happens; the queue is looked at when somebody asks."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.accepted = Counter("ritocco_predictions_accepted", "Predictions accepted.", registry=registry)
        self.refused = Counter(
            "ritocco_requests_refused", "Requests refused, by status.", ["status"], registry=registry
        )
        self.step_seconds = Histogram(
            "ritocco_step_seconds",
            "From one step of a prediction to its next, the time in which others passed it included.",
            buckets=_STEP_BUCKETS,
            registry=registry,
        )
        self._outcomes = Counter(
            "ritocco_predictions_ended", "Predictions ended, by status.", ["status"], registry=registry
        )
        self._seconds = Histogram(
            "ritocco_prediction_seconds",
            "Seconds of predictions that succeeded, without their wait.",
            buckets=_TIME_BUCKETS,
            registry=registry,
        )
        self._queue = Gauge("ritocco_queue_depth", "Predictions that wait.", registry=registry)
        self._running = Gauge("ritocco_predictions_running", "Predictions that run.", registry=registry)
        self._lanes = Gauge("ritocco_lanes", "Pictures that are painted.", registry=registry)
        for status in ("succeeded", "failed", "canceled"):
            self._outcomes.labels(status)

    def watch(self, figures: Callable[[], tuple[int, int, int]], batch: Callable[[], Snapshot]) -> None:
        """Where to look: waiting and running predictions, and the latter's pictures; the batcher."""
        self._registry.register(_Batch(batch))
        self._queue.set_function(lambda: figures()[0])
        self._running.set_function(lambda: figures()[1])
        self._lanes.set_function(lambda: figures()[2])

    def ended(self, record: Record) -> None:
        """One more."""
        self._outcomes.labels(record.status).inc()
        if record.status == "succeeded":
            self._seconds.observe(float(record.metrics.get("predict_time", 0.0)))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
