"""A stopped run goes on bit by bit; a damaged checkpoint is noticed; nothing half-written is left."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.errors import ResumeError
from lorasmith.training.checkpoint import best_checkpoint, last_checkpoint
from lorasmith.training.loop import train
from lorasmith.training.settings import TrainingSettings

from .conftest import make_adapted, make_examples

SETTINGS = TrainingSettings(batch_size=4, epochs=4, learning_rate=1e-2, save_every=3, keep_checkpoints=2)


def run(
    run_dir,
    *,
    stop_after=None,
    resume=False,
    model=None,
    examples=None,
    settings=SETTINGS,
    rate=1e-2,
    **options,
):
    model = model or make_adapted(**options)
    examples = examples or make_examples(20)
    steps = 0

    def should_stop():
        nonlocal steps
        steps += 1
        return steps == stop_after

    resume_from = last_checkpoint(run_dir)[0] if resume else None
    forward = PackForward(model, EngineSettings())
    validation = make_examples(5, seed=8)
    reports = list(
        train(
            model,
            examples,
            settings,
            forward=forward,
            learning_rate=1e-2,
            run_dir=run_dir,
            validation=validation,
            resume_from=resume_from,
            should_stop=should_stop,
        )
    )
    return model, reports


def weights(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stop_after", [1, 4, 19])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, stop_after, dropout):
    whole, expected = run(tmp_path / "whole", lora_dropout=dropout)
    _, first = run(tmp_path / "cut", stop_after=stop_after, lora_dropout=dropout)
    assert len(first) == stop_after
    torch.manual_seed(1234)  # whatever a new process draws before must not matter
    resumed, second = run(tmp_path / "cut", resume=True, lora_dropout=dropout)
    assert [r.loss for r in first + second] == [r.loss for r in expected]
    assert [r.validation_loss for r in first + second] == [r.validation_loss for r in expected]
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name


def test_the_last_ones_and_the_best_are_kept(tmp_path, monkeypatch):
    # The validation losses are given: best at step 7, between two others that are saved.
    losses = iter([abs(step - 7) + 1.0 for step in range(1, 21)])
    monkeypatch.setattr("lorasmith.training.loop.mean_losses", lambda *args, **options: [next(losses)])
    run(tmp_path, settings=SETTINGS.model_copy(update={"evaluate_every": 1, "save_every": 5}))
    names = {folder.name for folder in (tmp_path / "checkpoints").glob("step-*")}
    assert names == {"step-000007", "step-000015", "step-000020"}
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert best.name == "step-000007"
    for folder in names:
        state = json.loads((tmp_path / "checkpoints" / folder / "state.json").read_text())
        assert state["best_validation"] == 1.0


def test_going_back_from_a_damaged_checkpoint_keeps_the_new_ones(tmp_path):
    settings = SETTINGS.model_copy(update={"keep_checkpoints": 1})
    run(tmp_path, stop_after=7, settings=SETTINGS)  # leaves steps 6 and 7
    (tmp_path / "checkpoints" / "step-000007" / "state.json").unlink()
    run(tmp_path, resume=True, stop_after=2, settings=settings)
    checkpoint, complaints = last_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, complaints) == (8, [])


def test_another_cut_into_packs_is_no_reason_to_refuse(tmp_path):
    run(tmp_path, stop_after=7)
    _, reports = run(tmp_path, resume=True, settings=SETTINGS.model_copy(update={"micro_batch_size": 1}))
    assert reports[0].step == 8


def test_a_checkpoint_is_an_adapter_that_plain_peft_opens(tmp_path):
    from peft import PeftModel

    from conftest import make_tiny_model

    model, _ = run(tmp_path)
    opened = PeftModel.from_pretrained(
        make_tiny_model("llama"), tmp_path / "checkpoints" / "step-000020" / "adapter"
    )
    ids = torch.tensor([[1, 30, 40, 50]])
    model.get_base_model().set_attn_implementation("sdpa")
    with torch.no_grad():  # the engine's LoRA layers round in another order
        torch.testing.assert_close(opened(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("file", ["adapter/adapter_model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, file, harm):
    run(tmp_path)
    broken = tmp_path / "checkpoints" / "step-000020" / file
    content = bytearray(broken.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 0xFF
        broken.write_bytes(content)
    elif harm == "cut":
        broken.write_bytes(content[: len(content) // 2])
    else:
        broken.unlink()
    checkpoint, complaints = last_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 18
    assert len(complaints) == 1
    assert "step-000020" in complaints[0]


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
    assert last_checkpoint(tmp_path) == (None, [])


def test_other_data_under_a_resumed_run_is_noticed_by_its_loss(tmp_path):
    run(tmp_path, stop_after=5)
    with pytest.raises(ResumeError, match=r"saved with a loss of .* now give"):
        run(tmp_path, resume=True, examples=make_examples(20, seed=99))


def test_another_rank_under_a_resumed_run_is_refused(tmp_path):
    from conftest import make_tiny_model
    from lorasmith.model.method_settings import LoraSettings
    from lorasmith.model.methods import attach_adapter

    run(tmp_path, stop_after=5)
    other = attach_adapter(make_tiny_model("llama"), LoraSettings(r=8, lora_alpha=8), seed=3)
    with pytest.raises(ResumeError, match="other method settings"):
        run(tmp_path, resume=True, model=other)


def test_the_optimizer_file_holds_both_moments_of_every_trained_tensor(tmp_path):
    model, _ = run(tmp_path)
    saved = load_file(tmp_path / "checkpoints" / "step-000020" / "optimizer.safetensors")
    names = weights(model).keys()
    assert set(saved) == {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq", "step") for name in names}
