"""What Prometheus may ask: GET /metrics. The only importer of prometheus_client."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lorasmith.serve.batch import Batch, Row
from lorasmith.serve.scheduler import Scheduler

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server. Labels are names of served models and statuses, nothing that a client makes up."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "lorasmith_requests",
            "Requests, by model and HTTP status.",
            ["model", "status"],
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "lorasmith_prompt_tokens", "Prompt tokens of rows that are over.", registry=registry
        )
        self._shared_tokens = Counter(
            "lorasmith_shared_prompt_tokens", "Of them, those that were not read again.", registry=registry
        )
        self._answer_tokens = Counter("lorasmith_answer_tokens", "Tokens written.", registry=registry)
        self._cancelled = Counter("lorasmith_cancelled", "Answers whose client left.", registry=registry)
        self._first = Histogram(
            "lorasmith_first_token_seconds", "Until the first text.", buckets=SECONDS, registry=registry
        )
        self._whole = Histogram(
            "lorasmith_request_seconds", "Until the last token.", buckets=SECONDS, registry=registry
        )

    def watch(self, scheduler: Scheduler, batch: Batch) -> None:
        """Show how full the server is, at the moment of asking."""
        for name, text, count in (
            ("rows_running", "Answers being written.", lambda: scheduler.num_running),
            ("rows_waiting", "Answers that wait for a place.", lambda: scheduler.num_waiting),
            (
                "kept_tokens",
                "Tokens kept of finished answers.",
                lambda: batch.beginnings.num_tokens,
            ),
        ):
            Gauge(f"lorasmith_{name}", text, registry=self._registry).set_function(count)

    def note_row(self, row: Row) -> None:
        """Count a row that is over; called by the thread with the model."""
        self._prompt_tokens.inc(len(row.prompt_ids))
        self._shared_tokens.inc(row.shared)
        self._answer_tokens.inc(len(row.writer.token_ids))
        if row.is_cancelled:
            self._cancelled.inc()

    def note_request(self, model: str, status: int) -> None:
        self._requests.labels(model, str(status)).inc()

    def note_times(self, first_seconds: float | None, seconds: float) -> None:
        if first_seconds is not None:
            self._first.observe(first_seconds)
        self._whole.observe(seconds)

    def page(self) -> bytes:
        return generate_latest(self._registry)
