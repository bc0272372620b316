"""Every model gets its turn, the queue has an end, who leaves is gone, and a fault strikes once."""

import threading
import time
from types import SimpleNamespace

import pytest

from lorasmith.generation.sampling import SamplingSettings
from lorasmith.serve.batch import Batch, FailedError, Row
from lorasmith.serve.models import open_models
from lorasmith.serve.scheduler import BusyError, Scheduler, StoppedError


@pytest.fixture
def models(tiny_base_folder, adapters):
    return open_models(
        list(adapters.items()), base=str(tiny_base_folder), base_name="tiny", device="cpu", dtype="float32"
    )


@pytest.fixture
def finished():
    """The rows that are over, in that order."""
    return []


@pytest.fixture
def start(models, finished):
    """Start a scheduler whose first forward waits for ``scheduler.go``; it is closed after the test."""
    begun = []

    def start(**limits):
        batch = Batch(models.model, max_rows=2, cache_tokens=4096, kept_tokens=512, chunk_tokens=64)
        options = {"max_waiting": 50, "max_rows": 2, "note": finished.append, **limits}
        scheduler = Scheduler(batch, **options)
        scheduler.go = threading.Event()
        models.model.register_forward_pre_hook(lambda *_: scheduler.go.wait(20) and None)
        begun.append(scheduler)
        return scheduler

    yield start
    for scheduler in begun:
        scheduler.go.set()
        scheduler.close()


def make_row(model, question="Hi", max_tokens=4):
    sampling = SamplingSettings(max_tokens=max_tokens)
    prompt = model.chat.encode_prompt(question)
    told = []
    row = Row(prompt, model.adapter, sampling, model.chat.new_writer(prompt, sampling), told.append)
    row.told = told
    return row


def wait_until(holds):
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_one_question_is_not_behind_a_hundred_of_another_model(models, start, finished):
    scheduler = start()
    many = [make_row(models.find("alpha"), max_tokens=30) for _ in range(20)]
    scheduler.submit(many)
    wait_until(lambda: scheduler.num_running)
    one = make_row(models.find("beta"))
    scheduler.submit([one])
    scheduler.go.set()
    wait_until(lambda: len(finished) == 21)
    assert finished.index(one) <= 2  # two rows of alpha were in the batch when it came
    assert [row for row in finished if row is not one] == many


def test_a_full_queue_says_when_to_come_again(models, start):
    scheduler = start(max_waiting=3)
    scheduler.submit([make_row(models.base) for _ in range(2)])
    wait_until(lambda: scheduler.num_waiting == 0)
    scheduler.submit([make_row(models.base) for _ in range(2)])
    with pytest.raises(
        BusyError, match="2 answers are waiting and 2 more are asked for; this server lets 3 wait"
    ) as busy:
        scheduler.submit([make_row(models.base) for _ in range(2)])
    assert busy.value.retry_seconds >= 1
    scheduler.submit([make_row(models.base)])  # all of a request or none: one more does fit


def test_cancelled_rows_leave_wherever_they_are(models, start, finished):
    scheduler = start()
    running = [make_row(models.base, max_tokens=400) for _ in range(2)]
    waiting = [make_row(models.base) for _ in range(3)]
    scheduler.submit(running)
    wait_until(lambda: scheduler.num_running == 2)
    scheduler.submit(waiting)
    scheduler.cancel([running[0], *waiting[:2]])
    scheduler.go.set()
    wait_until(lambda: waiting[2].is_over)
    assert {id(row) for row in finished[:3]} == {id(row) for row in (running[0], *waiting[:2])}
    assert len(running[0].writer.token_ids) < 3
    scheduler.cancel(running)
    wait_until(lambda: scheduler.num_running == 0)


@pytest.mark.parametrize(
    ("fault", "why"),
    [(RuntimeError("out of memory\nand a long story"), "out of memory"), (MemoryError(), "MemoryError")],
)
def test_a_fault_ends_the_rows_it_struck_and_no_others(models, start, finished, fault, why):
    scheduler = start()
    scheduler.go.set()
    layer = models.model.model.layers[1]

    def fail(*_):
        raise fault

    hook = layer.register_forward_pre_hook(fail)
    struck = make_row(models.base)
    scheduler.submit([struck])
    wait_until(lambda: finished)
    hook.remove()
    (told,) = struck.told
    assert isinstance(told, FailedError)
    assert str(told) == f"The answer could not be computed: {why}"
    after = make_row(models.base)
    scheduler.submit([after])
    wait_until(lambda: after.is_over)
    assert after.told[-1].finish_reason


def test_who_waits_is_counted_while_rows_come_and_go():
    class Rows:
        def __len__(self):
            waiting.pop("alpha", None)  # as the thread with the model does meanwhile
            return 1

    waiting = {"alpha": Rows(), "beta": Rows()}
    assert Scheduler.num_waiting.fget(SimpleNamespace(_waiting=waiting)) == 2


def test_closing_tells_everybody(models, start):
    scheduler = start()
    rows = [make_row(models.base, max_tokens=400) for _ in range(4)]
    scheduler.submit(rows)
    scheduler.go.set()
    scheduler.close()
    assert all(isinstance(row.told[-1], StoppedError) for row in rows)
    with pytest.raises(StoppedError, match="The server is going down"):
        scheduler.submit([make_row(models.base)])


def test_an_adapter_is_forgotten_once_its_rows_have_left(models, start, finished):
    scheduler = start()
    alpha, beta = (models.find(name) for name in ("alpha", "beta"))
    row = make_row(alpha, max_tokens=20)
    scheduler.submit([row, make_row(beta)])
    wait_until(lambda: scheduler.num_running)
    scheduler.forget(alpha.adapter)
    scheduler.go.set()
    batch = scheduler._batch
    wait_until(lambda: len(finished) == 2 and set(batch._adapters._starts) == {beta.adapter})
    assert row.writer.finish_reason
    assert {kept.adapter for kept in batch.beginnings._kept} == {beta.adapter}


def test_a_long_system_prompt_is_read_once_by_rows_that_come_together(models, start, finished):
    scheduler = start()
    question = "You are a helpful assistant. " * 20
    rows = [make_row(models.base, f"{question}{i}") for i in range(4)]
    scheduler.submit(rows)
    scheduler.go.set()
    wait_until(lambda: len(finished) == 4)
    assert [row.shared > 100 for row in rows] == [False, True, True, True]
