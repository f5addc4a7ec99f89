"""What a database holds and did, as OpenMetrics text, which `backprompt-db stats --openmetrics` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.registry import CollectorRegistry

from backprompt_db.views.formatting import visible

if TYPE_CHECKING:
    from backprompt_db.database.statistics import Activity, Stats

_PREFIX = "backprompt_db_"


def exposition(stats: Stats) -> str:
    """Return the text. What is not known at the moment is left out. Sums over the store are gauges: they may fall."""
    registry = CollectorRegistry()
    registry.register(_Metrics(stats))
    text: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]
    return text.decode()


class _Metrics:
    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        yield from _facts(self._stats)
        yield from _sizes(self._stats)
        if self._stats.activity is not None:
            yield from _counts(self._stats.activity)


def _facts(stats: Stats) -> Iterator[Metric]:
    about = {"format": str(stats.format), "fidelity": stats.fidelity, "version": version("backprompt-db")}
    about |= {} if stats.namespace is None else {"namespace": _shown(stats.namespace)}
    yield InfoMetricFamily(f"{_PREFIX}database", "What kind of database it is.", value=about)
    yield from _gauge("representations", "Representations that are stored.", stats.num_representations)
    yield from _gauge("segments", "Segments of which a representation is stored.", stats.num_segments)
    yield from _gauge("models", "Models of which a representation is stored.", stats.num_models)
    yield from _gauge("tokens", "Tokens of the representations that are stored.", stats.num_tokens)
    yield from _gauge("uses", "Uses of the representations that are stored.", stats.num_hits)
    yield from _gauge("saved", "Computation that these uses have saved.", stats.saved_seconds, unit="seconds")


def _sizes(stats: Stats) -> Iterator[Metric]:
    yield from _gauge("live", "Pages of the store that are in use.", stats.live_nbytes, unit="bytes")
    yield from _gauge("limit", "The most that may be in use.", stats.max_nbytes, unit="bytes")
    yield from _gauge("files", "All files of the database.", stats.file_nbytes, unit="bytes")
    parts = [(nbytes, part.name.lower()) for part, nbytes in stats.nbytes.items()]
    yield _labelled("stored", "Parts that are stored.", ("part",), parts)
    if stats.by_model is not None:
        models = [(sum(each.nbytes.values()), each.weights_id.hex(), each.name) for each in stats.by_model]
        yield _labelled("model", "Parts that are stored of a model.", ("weights_id", "model"), models)
    if stats.by_namespace is not None:
        namespaces = [(sum(each.nbytes.values()), each.namespace) for each in stats.by_namespace]
        yield _labelled("namespace", "Parts that are stored in a namespace.", ("namespace",), namespaces)


def _counts(activity: Activity) -> Iterator[Metric]:
    hits = CounterMetricFamily(f"{_PREFIX}part_hits", "Parts that were found, by tier.", labels=["tier"])
    hits.add_metric(["memory"], activity.num_memory_hits)
    hits.add_metric(["disk"], activity.num_disk_hits)
    hits.add_metric(["base"], activity.num_base_hits)
    yield hits
    yield _counter("part_misses", "Parts that were nowhere.", activity.num_part_misses)
    yield _counter("computed_tokens", "Tokens that were computed.", activity.num_computed_tokens)
    yield _counter("computed", "What computing them took.", activity.computed_seconds, unit="seconds")
    yield _counter("evicted_parts", "Parts that were evicted.", activity.num_evicted)
    yield _counter("evicted", "Parts that were evicted.", activity.num_evicted_nbytes, unit="bytes")
    yield _counter("quarantined_parts", "Parts that were damaged.", activity.num_quarantined)
    yield _counter("read_failures", "Reads that the store failed.", activity.num_read_failures)
    yield _counter("write_failures", "Parts that could not be stored.", activity.num_write_failures)
    yield _counter("waits", "Computations of others that were waited for.", activity.num_waits)


def _gauge(name: str, documentation: str, value: float | None, *, unit: str = "") -> Iterator[Metric]:
    if value is not None:
        yield GaugeMetricFamily(f"{_PREFIX}{name}", documentation, value=value, unit=unit)


def _labelled(
    name: str, documentation: str, labels: Sequence[str], values: Iterable[tuple[int, *tuple[str, ...]]]
) -> Metric:
    family = GaugeMetricFamily(f"{_PREFIX}{name}", documentation, labels=labels, unit="bytes")
    for nbytes, *label in values:
        family.add_metric([_shown(each) for each in label], nbytes)
    return family


def _shown(label: str) -> str:
    """Return a label without control characters, which a terminal would obey; line ends are escaped by the format."""
    return "\n".join(map(visible, label.split("\n")))


def _counter(name: str, documentation: str, value: float, *, unit: str = "") -> Metric:
    return CounterMetricFamily(f"{_PREFIX}{name}", documentation, value=value, unit=unit)
