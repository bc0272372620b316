"""Steps are cut to fit into memory; out of memory, a step is done again in smaller packs; measuring leaves no trace."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch

from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.errors import TrainingError
from lorasmith.training import fit as fitting
from lorasmith.training.fit import Fit, choose_fit, has_room_for, heaviest_pack, longest_input
from lorasmith.training.loop import train
from lorasmith.training.rehearsal import Rehearsal, copy_without_weights
from lorasmith.training.settings import TrainingSettings

from .conftest import make_adapted, make_examples

SETTINGS = TrainingSettings(batch_size=8, epochs=2, learning_rate=1e-2)


def parts(examples=None, engine=EngineSettings(), **lora):  # noqa: B008 (frozen)
    model = make_adapted(**lora)
    sketch = copy_without_weights(model)
    return model, PackForward(model, engine), Rehearsal(sketch, engine), examples or make_examples(20)


@pytest.fixture(autouse=True)
def same_waste(monkeypatch):
    """In models this small the allocator's waste would hide what recomputing saves."""
    monkeypatch.setitem(fitting._WASTE, "cpu", (2.0, 2.0))


@functools.cache
def shared_parts():
    """Parts for tests that leave them as they are; rehearsals are remembered among them."""
    return parts()


def choose(settings=SETTINGS, checkpointing="auto", **options):
    model, forward, rehearsal, examples = shared_parts()
    return choose_fit(model, forward, rehearsal, examples, settings, checkpointing, **options)


def with_free_memory(monkeypatch, num_bytes):
    monkeypatch.setattr(fitting, "free_bytes", lambda device: num_bytes)


@functools.cache
def needs(tokens, checkpointing=False):
    """Bytes that the computed choice wants for packs of so many tokens, with everything around them."""
    model, _, rehearsal, examples = shared_parts()
    pack = heaviest_pack(examples, SETTINGS, tokens, rehearsal.forward)
    activations = (
        fitting._WASTE["cpu"][checkpointing] * rehearsal.of(pack, checkpointing=checkpointing).peak_bytes
    )
    return (activations + fitting.bytes_of_training(model)) / fitting._SAFE_SHARE


class Tight(PackForward):
    """A forward whose allocator refuses packs of more than ``limit`` tokens; another limit with checkpointing."""

    limit = 10**9
    limit_checkpointing = 10**9
    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def summed_loss(self, pack, name=None):
        loss = super().summed_loss(pack, name)
        torch.rand(3)  # what a refused pass drew must not matter
        if pack.num_tokens > (self.limit_checkpointing if self.checkpointing else self.limit):
            raise self.error
        return loss


def run(tmp_path, forward, model, examples, settings=SETTINGS, **options):
    return list(
        train(model, examples, settings, forward=forward, learning_rate=1e-2, run_dir=tmp_path, **options)
    )


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_a_short_run_is_computed_and_says_so():
    fit = choose()
    assert (fit.micro_batch_tokens, fit.gradient_checkpointing) == (2048, False)
    assert fit.measured_tokens == 0
    assert "computed, not measured, since the run is short" in fit.reason


def test_a_long_run_is_measured():
    fit = choose(SETTINGS.model_copy(update={"epochs": 200.0}))
    assert fit.measured_tokens == fit.largest_pack_tokens > 0
    assert fit.seconds_per_token > 0
    assert fit.reason.startswith("measured by ")


def test_between_them_a_part_is_measured_and_the_rest_extrapolated():
    examples = make_examples(20)
    largest = heaviest_pack(examples, SETTINGS, 2048, parts()[1]).num_tokens
    epochs = 1.2 * largest / fitting._SHARE_FOR_MEASURING / sum(len(e.input_ids) for e in examples)
    fit = choose(SETTINGS.model_copy(update={"epochs": epochs}))
    assert 0 < fit.measured_tokens < fit.largest_pack_tokens
    assert f"extrapolated from {fit.measured_tokens} measured tokens by" in fit.reason


def test_nothing_remains_of_the_measurement():
    model, forward, rehearsal, examples = parts(lora_dropout=0.5)
    model.eval()
    before, state = weights(model), torch.get_rng_state()
    choose_fit(model, forward, rehearsal, examples, SETTINGS, "auto", must_measure=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert not forward.checkpointing
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name
        if parameter.requires_grad:
            assert torch.equal(parameter, before[name])


def test_the_first_rung_that_fits_is_taken(monkeypatch):
    longest = longest_input(make_examples(20))
    settings = SETTINGS.model_copy(update={"micro_batch_tokens": 64})
    rungs = [(64, False), (longest, False), (64, True), (longest, True)]
    found = set()
    for rung in rungs:
        free = needs(*rung) * 1.01
        with_free_memory(monkeypatch, free)
        fit = choose(settings)
        chosen = (fit.micro_batch_tokens, fit.gradient_checkpointing)
        assert chosen == next(better for better in rungs if needs(*better) <= free)
        found.add(chosen)
    assert {rungs[0], rungs[1], rungs[3]} <= found
    with_free_memory(monkeypatch, needs(longest, True) * 0.9)
    with pytest.raises(TrainingError, match=r"longest example alone: data.jsonl:\d+, \d+ tokens.*Ways out"):
        choose(settings)


def test_checkpointing_that_is_set_to_false_is_not_taken(monkeypatch):
    with_free_memory(monkeypatch, needs(longest_input(make_examples(20)), True) * 1.01)
    with pytest.raises(TrainingError, match="gradient_checkpointing=true or auto"):
        choose(checkpointing=False)
    assert choose(checkpointing=True).gradient_checkpointing


def test_a_measurement_that_runs_out_of_memory_goes_a_rung_down():
    model, _, rehearsal, examples = parts()
    forward = Tight(model, EngineSettings())
    forward.limit = 60
    settings = SETTINGS.model_copy(update={"micro_batch_tokens": 96})
    fit = choose_fit(model, forward, rehearsal, examples, settings, "auto", must_measure=True)
    assert (fit.micro_batch_tokens, fit.gradient_checkpointing) == (48, False)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_out_of_memory_gives_the_bits_of_the_smaller_packs(tmp_path, error, dropout):
    """The first step is refused once, so the whole run must be that of half-size packs."""
    examples = make_examples(20)
    model = make_adapted(lora_dropout=dropout)
    forward = Tight(model, EngineSettings())
    forward.limit, forward.error = 50, error
    start = Fit(96, False)
    changes = []
    reports = run(tmp_path / "tight", forward, model, examples, fit=start, record_fit=changes.append)
    assert [c.gradient_checkpointing for c in changes] == [False] * len(changes)
    assert "Out of memory in a pack of" in reports[0].memory_note
    assert f"{changes[-1].micro_batch_tokens} tokens a pack" in reports[0].memory_note
    assert reports[1].memory_note is None
    assert len(changes) == 1

    plain = make_adapted(lora_dropout=dropout)
    expected = run(tmp_path / "plain", Tight(plain, EngineSettings()), plain, examples, fit=changes[-1])
    assert [r.loss for r in reports] == [r.loss for r in expected]
    for name, weight in weights(model).items():
        assert torch.equal(weight, weights(plain)[name]), name


def test_activations_are_recomputed_when_the_packs_cannot_be_smaller(tmp_path):
    examples, model = make_examples(20), make_adapted()
    forward = Tight(model, EngineSettings())
    forward.limit = 5
    changes = []
    reports = run(tmp_path, forward, model, examples, record_fit=changes.append)
    assert changes[-1].gradient_checkpointing
    assert changes[-1].micro_batch_tokens == longest_input(examples)
    assert forward.checkpointing
    assert len(reports) == 6


@pytest.mark.parametrize(("may_checkpoint", "limit_checkpointing"), [(True, 5), (False, 10**9)])
def test_with_nothing_left_the_longest_example_is_named_and_the_checkpoint_stays(
    tmp_path, may_checkpoint, limit_checkpointing
):
    examples, model = make_examples(20), make_adapted()
    forward = Tight(model, EngineSettings())
    longest = max(examples, key=lambda e: len(e.input_ids))
    reports = []

    def train_into_the_wall():
        for report in train(
            model,
            examples,
            SETTINGS.model_copy(update={"save_every": 1}),
            forward=forward,
            learning_rate=1e-2,
            run_dir=tmp_path,
            may_checkpoint=may_checkpoint,
        ):
            reports.append(report)
            if report.step == 2:
                forward.limit, forward.limit_checkpointing = 5, limit_checkpointing

    with pytest.raises(TrainingError) as caught:
        train_into_the_wall()
    assert longest.where in str(caught.value)
    assert "The last checkpoint is kept" in str(caught.value)
    assert len(reports) == 2
    assert (tmp_path / "checkpoints" / "step-000002" / "state.json").is_file()


def test_another_error_is_not_taken_for_memory(tmp_path):
    model = make_adapted()
    forward = Tight(model, EngineSettings())
    forward.limit, forward.error = 5, RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes"):
        run(tmp_path, forward, model, make_examples(20))


def test_a_cpu_pack_is_refused_before_the_kernel_would_kill(monkeypatch):
    pack, cpu = SimpleNamespace(num_tokens=100), torch.device("cpu")
    fit = Fit(2048, False, bytes_per_token=1000.0)
    for free, has_room in ((200_000, True), (50_000, False)):
        with_free_memory(monkeypatch, free)
        assert has_room_for(pack, fit, cpu) == has_room
    assert has_room_for(pack, Fit(2048, False), cpu), "of an unknown need nothing can be said"
    assert has_room_for(pack, fit, torch.device("cuda")), "CUDA's allocator refuses by itself"


def test_the_heaviest_pack_is_about_as_large_as_any_of_the_run():
    _, forward, _, examples = parts()
    from lorasmith.packing.trie import pack_examples
    from lorasmith.training.schedule import order_steps

    order = order_steps(examples, SETTINGS)
    for most in (40, 70, 2048):
        packs = [
            pack
            for step in range(SETTINGS.num_steps(len(examples)))
            for pack in pack_examples(examples, order.examples_of(step), max_tokens=most, cost=forward.cost)
        ]
        largest = max(fitting._weight(pack) for pack in packs)
        assert fitting._weight(heaviest_pack(examples, SETTINGS, most, forward)) >= 0.95 * largest


def test_a_fit_survives_json():
    fit = choose(must_measure=True)
    assert Fit.from_json(json.loads(json.dumps(fit.to_json()))) == fit
