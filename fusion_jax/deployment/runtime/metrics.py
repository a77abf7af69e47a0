"""What the server counts, as Prometheus reads it."""

import functools

import prometheus_client as prometheus


class Metrics:
    """What Prometheus is told."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        made = functools.partial(prometheus.Counter, registry=self.registry)
        self.requests = made("serve_requests", "Requests", ["route", "status"])
        self.tokens = made("serve_tokens", "Tokens written")
        histogram = functools.partial(prometheus.Histogram, registry=self.registry)
        self.seconds = histogram("serve_seconds", "Seconds to the last byte", ["route"])
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.batch = histogram("serve_batch_rows", "Rows computed together", buckets=sizes)
        gauge = functools.partial(prometheus.Gauge, registry=self.registry)
        self.waiting = gauge("serve_waiting", "Requests that wait")
        self.swaps = gauge("serve_swaps", "Artifacts that took the place of the one before")

    def count(self, name: str, value: float) -> None:
        """As the workers call it."""
        if name == "batch":
            self.batch.observe(value)
        else:
            self.tokens.inc(value)

    def text(self) -> tuple[bytes, str]:
        """All of it, and its content type."""
        return prometheus.generate_latest(self.registry), prometheus.CONTENT_TYPE_LATEST
