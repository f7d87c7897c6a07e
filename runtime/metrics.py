"""What is counted, as Prometheus reads it (`/metrics`); names begin with vmoe_."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import vmoe
from vmoe.errors import MissingDependencyError

from .sources import STATES

if TYPE_CHECKING:
    from .pipeline import Pipeline

COUNTERS = {  # of Tally, by stream
    "frames": "Frames taken from the source",
    "frames_dropped": "Frames lost by the source, or dropped because a stage was too slow",
    "frames_duplicated": "Frames that the source gave twice",
    "frames_late": "Frames that came more than half a spacing late",
    "windows": "Windows labelled",
    "windows_incomplete": "Windows whose times the frames could not honour",
    "windows_dropped": "Windows that the engine was too slow for",
    "results_dropped": "Results that the sinks were too slow for",
    "epochs": "Connections or rounds of the source, and breaks in its times",
    "alarms": "Windows for which the guard raised its alarm",
}
QUANTILES = {"p50": "0.5", "p95": "0.95", "p99": "0.99"}


def exposed(pipeline: Pipeline | None) -> tuple[bytes, str]:
    """Return the metrics of a run as text, and the text's content type.

    Raises:
        MissingDependencyError: prometheus-client is not installed.
    """
    try:
        import prometheus_client as prometheus
    except ImportError as e:
        raise MissingDependencyError(
            "/metrics needs prometheus-client: pip install 'vmoe[metrics]'."
        ) from e
    registry = prometheus.CollectorRegistry()
    if pipeline is not None:
        registry.register(_Collector(pipeline))
    return prometheus.generate_latest(registry), prometheus.CONTENT_TYPE_LATEST


class _Collector:
    """Reads a run's counts when it is asked."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def collect(self) -> Iterator[Any]:
        """Yield every metric."""
        from prometheus_client.core import InfoMetricFamily

        info = InfoMetricFamily("vmoe", "What serves")
        info.add_metric([], {"version": vmoe.__version__, "guard": self._pipeline.guard_mode})
        yield info
        yield from self._streams()
        yield from self._whole()
        yield from self._sinks()

    def _streams(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        lanes, keys = self._pipeline.lanes, ["stream", "source"]
        for name, said in COUNTERS.items():
            counter = CounterMetricFamily(f"vmoe_{name}", said, labels=keys)
            for lane in lanes:
                counter.add_metric([str(lane.number), lane.source.name], getattr(lane.tally, name))
            yield counter
        state = GaugeMetricFamily(
            "vmoe_source_state", "1 for the state that a source is in", labels=[*keys, "state"]
        )
        for lane in lanes:
            for one in STATES:
                here = float(lane.source.state == one)
                state.add_metric([str(lane.number), lane.source.name, one], here)
        yield state
        age = GaugeMetricFamily(
            "vmoe_label_age_seconds", "How old the label that stands is now", labels=keys
        )
        first = GaugeMetricFamily(
            "vmoe_first_label_seconds", "From the first frame to the first label", labels=keys
        )
        for lane in lanes:
            who = [str(lane.number), lane.source.name]
            if (now_s := lane.tally.label_age_s()) is not None:
                age.add_metric(who, now_s)
            if lane.tally.first_label_ms is not None:
                first.add_metric(who, lane.tally.first_label_ms / 1000)
        yield from (age, first)

    def _whole(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        tally = self._pipeline.tally
        experts = CounterMetricFamily(
            "vmoe_expert_windows", "Windows that were routed to an expert", labels=["expert"]
        )
        for expert in range(self._pipeline.experts):
            experts.add_metric([str(expert)], tally.experts.get(expert, 0))
        yield experts
        latency = GaugeMetricFamily(
            "vmoe_latency_seconds",
            "Of the newest windows: age is capture to label, label_age how old a label became",
            labels=["stage", "quantile"],
        )
        for name in tally.times_ms:
            for key, value in (tally.percentiles(name) or {}).items():
                latency.add_metric([name.removesuffix("_ms"), QUANTILES[key]], value / 1000)
        yield latency
        again = CounterMetricFamily(
            "vmoe_server_retries", "Requests repeated because the model's server was away"
        )
        again.add_metric([], self._pipeline.retries)
        yield again

    def _sinks(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        failures = CounterMetricFamily("vmoe_sink_failures", "Failures of a sink", labels=["sink"])
        missed = CounterMetricFamily(
            "vmoe_sink_missed", "Results and events that a sink did not take", labels=["sink"]
        )
        for sink in self._pipeline.sinks:
            failures.add_metric([sink.name], sink.failures)
            missed.add_metric([sink.name], sink.missed)
        yield from (failures, missed)
