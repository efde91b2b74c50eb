"""What ``replicate status`` says, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nbdsnap.models import ReplicationStatus

LABELS = ("volume", "target")


class _Collector:
    def __init__(self, statuses: Sequence[ReplicationStatus]) -> None:
        self._statuses = statuses

    def collect(self) -> Iterable[Metric]:
        def gauge(name: str, text: str, pick: str) -> Metric:
            family = GaugeMetricFamily(f"nbdsnap_replication_{name}", text, labels=LABELS)
            for one in self._statuses:
                value = getattr(one, pick)
                if value is not None:
                    family.add_metric((one.volume, one.target), float(value))
            return family

        def counter(name: str, text: str, pick: str) -> Metric:
            family = CounterMetricFamily(f"nbdsnap_replication_{name}", text, labels=LABELS)
            for one in self._statuses:
                family.add_metric((one.volume, one.target), float(getattr(one, pick)))
            return family

        yield gauge("lag_seconds", "Age of what the target has, 0 where nothing was written since.", "lag_seconds")
        yield gauge("lag_bytes", "Bytes written since the snapshot that the target has.", "lag_bytes")
        yield gauge("rate_bytes_per_second", "Of the last transfer.", "rate")
        yield gauge("failures", "Failed cycles since the last good one.", "failures")
        yield counter("sent_bytes", "Bytes of delta streams sent.", "sent_bytes")
        yield counter("sent_snapshots", "Snapshots sent.", "sent_snapshots")
        point = GaugeMetricFamily(
            "nbdsnap_replication_point_timestamp_seconds",
            "When the newest snapshot that the target has was taken.",
            labels=LABELS,
        )
        for one in self._statuses:
            if one.point is not None:
                point.add_metric((one.volume, one.target), one.point.timestamp())
        yield point


def render(statuses: Sequence[ReplicationStatus]) -> bytes:
    """In Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(statuses))
    return generate_latest(registry)
