"""What a run records of its first start is what it goes on with."""

import torch

from conftest import make_tiny_model
from lorasmith.engine.settings import EngineSettings
from lorasmith.model.base import BaseRef
from lorasmith.model.method_settings import LoraSettings
from lorasmith.model.run_record import RunRecord
from lorasmith.model.settings import BaseSettings
from lorasmith.training.fit import Fit
from lorasmith.training.same_run import setting_differences
from lorasmith.training.settings import ObjectiveSettings, TrainingSettings
from lorasmith.training.settled import (
    recorded_fit,
    settle_device,
    settle_rate,
    settle_threads,
    with_fit,
    with_settled,
)

RECORDED = {"base": {"dtype": "bfloat16"}, "engine": {"threads": 1}}


def recorded():
    base = BaseRef("x", None, "f" * 64)
    return RunRecord(name="r", base=base, recipe={}, settings=RECORDED, data={})


def test_the_number_format_and_threads_of_the_first_start_stay():
    threads, then = torch.get_num_threads(), recorded()
    try:
        assert settle_device(then, BaseSettings(), LoraSettings()).dtype is torch.bfloat16
        assert settle_device(then, BaseSettings(dtype="float32"), LoraSettings()).dtype is torch.float32
        assert settle_threads(then, EngineSettings(), lambda line: None) == 1
        assert settle_threads(then, EngineSettings(threads=2), lambda line: None) == 2
    finally:
        torch.set_num_threads(threads)


def test_the_automatic_rate_of_the_first_start_stays():
    def rate_of(then, rate="auto"):
        training = TrainingSettings(learning_rate=rate)
        model = make_tiny_model("llama")
        return settle_rate(then, training, LoraSettings(), ObjectiveSettings(), model, 20, lambda line: None)

    def begun_with(rate):
        return recorded().model_copy(update={"settings": {"training": {"learning_rate": rate}}})

    found = rate_of(None)
    assert rate_of(begun_with(found / 3)) == found / 3
    assert rate_of(begun_with("auto")) == found  # a run.json of before the rate was recorded
    assert rate_of(begun_with(found / 3), 1e-3) == 1e-3
    settled = with_settled(begun_with("auto"), EngineSettings(), found)
    assert settled.settings["training"]["learning_rate"] == found


def settings(**changes):
    all_settings = {
        "base": {"dtype": "float32", "device": "cpu"},
        "engine": {"threads": 2},
        "method": {"r": 16, "lora_dropout": 0.0},
        "training": {"epochs": 3, "micro_batch_tokens": 2048},
        "run": {"name": "a"},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        all_settings[section] = {**all_settings[section], key: value}
    return all_settings


def test_what_matters_is_told_apart_from_what_does_not():
    old = settings()
    assert setting_differences(old, settings(run__name="b", engine__threads=1, base__device="cuda")) == []
    assert setting_differences(old, settings(base__dtype="auto", training__micro_batch_tokens=512)) == []
    assert setting_differences(old, settings(method__r=8, training__epochs=4)) == [
        "method.r: 16 then, 8 now",
        "training.epochs: 3 then, 4 now",
    ]
    # With dropout another cut into packs draws other masks.
    with_dropout = settings(method__lora_dropout=0.1)
    changed = settings(method__lora_dropout=0.1, training__micro_batch_tokens=512)
    assert setting_differences(with_dropout, changed) == ["training.micro_batch_tokens: 2048 then, 512 now"]


def test_a_default_of_the_objective_is_the_same_written_out_and_left_out():
    def objective(**given):
        return {**settings(), "objective": ObjectiveSettings(**given).model_dump(mode="json")}

    assert setting_differences(objective(name="dpo"), objective(name="dpo", beta=0.1)) == []
    assert setting_differences(objective(name="simpo", beta=2, margin=1), objective(name="simpo")) == []
    assert setting_differences(objective(name="kto", desirable_weight=1), objective(name="kto")) == []
    assert setting_differences(settings(), objective(name="sft")) == []
    changed = setting_differences(objective(name="dpo"), objective(name="dpo", beta=0.2))
    assert changed == ["objective.beta: 0.1 then, 0.2 now"]


def record_with(fit, micro_batch_tokens="auto"):
    auto = {
        "training": {"micro_batch_tokens": micro_batch_tokens},
        "engine": {"gradient_checkpointing": "auto"},
    }
    base = BaseRef("x", None, "f" * 64)
    return with_fit(RunRecord(name="r", base=base, recipe={}, settings=auto, data={}), fit)


def test_the_cut_of_the_first_start_is_recorded_and_stays():
    fit = Fit(1024, True, "measured", 900, 1e5, 10**9, 900, 0.01)
    record = record_with(fit)
    assert record.settings["training"]["micro_batch_tokens"] == 1024
    assert record.settings["engine"]["gradient_checkpointing"] is True
    assert recorded_fit(None, TrainingSettings(), EngineSettings()) is None
    assert recorded_fit(record, TrainingSettings(), EngineSettings()) == fit
    # A cut that is named anew wins.
    assert recorded_fit(record, TrainingSettings(micro_batch_tokens=512), EngineSettings()) is None
    assert recorded_fit(record, TrainingSettings(), EngineSettings(gradient_checkpointing=False)) is None


def test_what_running_out_of_memory_found_stays_under_the_same_settings():
    record = record_with(Fit(2048, False), micro_batch_tokens=2048)
    fit = recorded_fit(
        with_fit(record, Fit(512, False)), TrainingSettings(micro_batch_tokens=2048), EngineSettings()
    )
    assert fit is not None
    assert fit.micro_batch_tokens == 512
