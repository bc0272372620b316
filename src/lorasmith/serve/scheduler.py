"""One thread owns the model; requests from everywhere become rows of its batch, in an order fair to every model.

Whose row comes next is decided when a place is free: of the models that have rows waiting, the one with the fewest
rows in the batch; among equals, the one that was served longest ago. So a model with a hundred questions and one
with a single question are both answered at once.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from lorasmith.errors import LorasmithError, first_line
from lorasmith.serve.adapters import LoraWeights
from lorasmith.serve.batch import Batch, FailedError, Row

logger = logging.getLogger("lorasmith.serve")


class BusyError(LorasmithError):
    """Raised when the queue is full; ``retry_seconds`` is how long a place is likely to take."""

    def __init__(self, num_waiting: int, num_asked: int, max_waiting: int, retry_seconds: int) -> None:
        self.retry_seconds = retry_seconds
        super().__init__(
            f"{num_waiting} answers are waiting and {num_asked} more are asked for; this server lets {max_waiting} "
            f"wait. Try again in about {retry_seconds} s."
        )


class StoppedError(LorasmithError):
    """Raised when the server is going down, or the thread that owns the model has died."""


class Scheduler:
    """Answers rows until it is closed. ``submit``, ``cancel``, ``forget`` may be called from any thread."""

    def __init__(
        self, batch: Batch, *, max_waiting: int, max_rows: int, note: Callable[[Row], None] = lambda row: None
    ) -> None:
        """Start the thread. ``note`` is called by it with each row that is over."""
        self._batch, self._note = batch, note
        self._max_waiting, self._max_rows = max_waiting, max_rows
        self._waiting: dict[LoraWeights | None, deque[Row]] = {}
        self._last_served: dict[LoraWeights | None, int] = {}
        self._turns = itertools.count()
        self._forgotten: list[LoraWeights] = []
        self._row_seconds = 1.0  # a running mean of how long a row stays in the batch
        self._joined_at: dict[Row, float] = {}
        self._wake = threading.Condition()
        self._is_closing = False
        self.is_alive = True
        self._thread = threading.Thread(target=self._run, name="lorasmith-model", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return sum(len(rows) for rows in list(self._waiting.values()))  # whoever asks does not hold the lock

    @property
    def num_running(self) -> int:
        return len(self._batch)

    def submit(self, rows: list[Row]) -> None:
        """Queue the rows of one request: all of them, or none.

        Raises:
            BusyError: there is no room in the queue. StoppedError: nothing is answered any more.
        """
        with self._wake:
            if self._is_closing or not self.is_alive:
                raise StoppedError("The server is going down. Ask another one, or try again later.")
            if self.num_waiting + len(rows) > self._max_waiting:
                rounds = (self.num_waiting + self._max_rows) / self._max_rows
                seconds = max(1, round(rounds * self._row_seconds))
                raise BusyError(self.num_waiting, len(rows), self._max_waiting, seconds)
            for row in rows:
                self._waiting.setdefault(row.adapter, deque()).append(row)
            self._wake.notify()

    def cancel(self, rows: list[Row]) -> None:
        """Stop answering; the rows leave before the next token."""
        with self._wake:
            for row in rows:
                row.is_cancelled = True
            self._wake.notify()

    def forget(self, adapter: LoraWeights) -> None:
        """Give back what is kept of an adapter, once its rows have left."""
        with self._wake:
            self._forgotten.append(adapter)
            self._wake.notify()

    def stop(self) -> None:
        """Take nothing more and give up what is not finished, before the next token."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()

    def close(self) -> None:
        """Stop, and wait for the thread's end."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._work()
        finally:
            self.is_alive = False
            with self._wake:
                left = [*self._batch.drop(), *itertools.chain(*self._waiting.values())]
                self._waiting.clear()
            for row in left:
                row.tell(StoppedError("The server went down before the answer was finished."))
                self._note(row)

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._is_closing or self._forgotten or self._waiting or len(self._batch)):
                self._wake.wait()
            return not self._is_closing

    def _work(self) -> None:
        """Do one round: who is over leaves, who waits may join, a chunk is read, everybody gets a token."""
        self._forget()
        self._drop_cancelled()
        try:
            self._leave()
            with self._wake:
                self._batch.join(self._next_row, self._take_next)
            if self._batch.reading:
                self._batch.read()
                self._leave()
            if self._batch.writing:
                self._batch.write()
        except (RuntimeError, MemoryError, LookupError, ValueError) as fault:  # out of memory, above all
            logger.exception("the batch failed; its rows were given up")
            for row in self._batch.drop():
                self._joined_at.pop(row, None)
                row.tell(FailedError(f"The answer could not be computed: {first_line(fault)[:200]}"))
                self._note(row)

    def _leave(self) -> None:
        for row in self._batch.leave():
            seconds = time.monotonic() - self._joined_at.pop(row)
            self._row_seconds += 0.1 * (seconds - self._row_seconds)
            self._note(row)

    def _forget(self) -> None:
        """Forget the adapters that no row needs any more."""
        with self._wake:
            needed = {row.adapter for row in (*self._batch.writing, *self._batch.reading)} | set(
                self._waiting
            )
            free = [adapter for adapter in self._forgotten if adapter not in needed]
            self._forgotten = [adapter for adapter in self._forgotten if adapter in needed]
        for adapter in free:
            self._batch.forget(adapter)
            self._last_served.pop(adapter, None)

    def _drop_cancelled(self) -> None:
        with self._wake:
            gone = [row for rows in self._waiting.values() for row in rows if row.is_cancelled]
            for adapter, rows in list(self._waiting.items()):
                left = deque(row for row in rows if not row.is_cancelled)
                if left:
                    self._waiting[adapter] = left
                else:
                    del self._waiting[adapter]
        for row in gone:
            self._note(row)

    def _next_adapter(self) -> LoraWeights | None:
        running = [row.adapter for row in (*self._batch.writing, *self._batch.reading)]
        return min(
            self._waiting, key=lambda adapter: (running.count(adapter), self._last_served.get(adapter, -1))
        )

    def _next_row(self) -> Row | None:
        return self._waiting[self._next_adapter()][0] if self._waiting else None

    def _take_next(self) -> Row:
        adapter = self._next_adapter()
        row = self._waiting[adapter].popleft()
        if not self._waiting[adapter]:
            del self._waiting[adapter]
        self._last_served[adapter] = next(self._turns)
        self._joined_at[row] = time.monotonic()
        return row
