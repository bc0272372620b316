"""What a run leaves to "auto", settled at its first start and recorded: a run that goes on rounds alike.

    threads, number format    before the base is loaded
    products, compilation     for the model that was loaded
    learning rate             for that model, the method and the run's length
    cut of the steps          by a measurement (fit.py); another one when memory runs out

The settings in run.json name what was found, so nothing is measured a second time. What the user names anew wins.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lorasmith.data.workers import count_cores
from lorasmith.engine.compilation import choose_compilation
from lorasmith.engine.linear import choose_product_dtype
from lorasmith.engine.settings import EngineSettings
from lorasmith.engine.threads import choose_threads
from lorasmith.model.device import DeviceChoice, choose_device
from lorasmith.model.method_settings import FullSettings, MethodSettings
from lorasmith.model.run_record import RunRecord
from lorasmith.model.settings import BaseSettings
from lorasmith.training.distributed import ALONE, Team
from lorasmith.training.fit import Fit
from lorasmith.training.schedule import choose_learning_rate
from lorasmith.training.settings import ObjectiveSettings, TrainingSettings

Say = Callable[[str], None]


def settle_threads(then: RunRecord | None, engine: EngineSettings, say: Say, team: Team = ALONE) -> int:
    """Set torch's CPU threads and return their number: that of the run's first start, so that sums round alike."""
    if engine.threads != "auto":
        threads, reason = engine.threads, "as set"
    elif team.count > 1:  # a measurement that all make at once would find a busy machine
        threads = max(1, count_cores() // team.local_count)
        several = team.local_count > 1
        reason = f"{team.local_count} processes share the cores" if several else "one for each core"
        threads = team.from_first(lambda: threads)
    elif then is not None and then.processes > 1:
        threads, reason = choose_threads()
    elif then is not None:
        threads, reason = then.settings["engine"]["threads"], "as at the run's start"
    else:
        threads, reason = choose_threads()
    torch.set_num_threads(threads)
    say(f"CPU threads: {threads} ({reason})")
    return threads


def settle_device(
    then: RunRecord | None, base: BaseSettings, method: MethodSettings, team: Team = ALONE
) -> DeviceChoice:
    """Return where and in which number format to compute; a run that goes on keeps the format it began with."""
    if base.dtype == "auto" and isinstance(method, FullSettings):
        return replace(
            choose_device(base.device, "float32"), reason="what is trained is float32, here every weight"
        )
    if base.dtype == "auto" and then is None and team.count > 1:  # one measures, and all do alike
        dtype, reason = team.from_first(lambda: _as_words(choose_device(base.device)))
        return replace(choose_device(base.device, dtype), reason=reason)
    if base.dtype == "auto" and then is not None:
        return replace(
            choose_device(base.device, then.settings["base"]["dtype"]), reason="as at the run's start"
        )
    return choose_device(base.device, base.dtype)


def _as_words(choice: DeviceChoice) -> list[str]:
    return [str(choice.dtype).removeprefix("torch."), choice.reason]


def settle_engine(
    then: RunRecord | None,
    engine: EngineSettings,
    model: PeftModel | PreTrainedModel,
    num_tokens: int,
    say: Say,
    team: Team,
) -> EngineSettings:
    """Return ``engine`` with what changes the rounding decided: as at the run's start, or for ``num_tokens`` now."""
    recorded: dict[str, Any] = {} if then is None else then.settings["engine"]
    found: dict[str, Any] = {}
    if engine.product_dtype == "auto":
        found["product_dtype"] = recorded.get("product_dtype") or team.from_first(
            lambda: choose_product_dtype(model.device, model.dtype)
        )
    if engine.compile == "auto" and "compile" in recorded:
        found["compile"] = recorded["compile"]
    elif engine.compile == "auto":
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        found["compile"], reason = team.from_first(lambda: choose_compilation(base, num_tokens))
        say(f"Compiled: {'yes' if found['compile'] else 'no'} ({reason})")
    return engine.model_copy(update=found)


def settle_rate(
    then: RunRecord | None,
    training: TrainingSettings,
    method: MethodSettings,
    objective: ObjectiveSettings,
    model: PeftModel | PreTrainedModel,
    num_steps: int,
    say: Say,
) -> float:
    """Return the highest learning rate: as asked, as at the run's start, or for this model, method and length."""
    if training.learning_rate != "auto":
        return training.learning_rate
    recorded = "auto" if then is None else then.settings["training"]["learning_rate"]
    if recorded != "auto":
        return float(recorded)
    rate = choose_learning_rate(model.config, method, objective, num_steps)
    size = model.config.get_text_config().hidden_size
    say(f"Learning rate: {rate:.2g} (for a hidden size of {size} and {num_steps:,} steps)")
    return rate


def with_settled(record: RunRecord, engine: EngineSettings, rate: float) -> RunRecord:
    """Return ``record`` with what "auto" was found to be in the engine and as learning rate."""
    found = {
        "engine": {"product_dtype": engine.product_dtype, "compile": engine.compile},
        "training": {"learning_rate": rate},
    }
    settings = {name: {**values, **found.get(name, {})} for name, values in record.settings.items()}
    return record.model_copy(update={"settings": settings})


def recorded_fit(record: RunRecord | None, training: TrainingSettings, engine: EngineSettings) -> Fit | None:
    """Return how the run's steps were cut so far, so that the rest rounds alike; None if it must be chosen.

    A cut that the settings name anew wins: a run that goes on elsewhere may need one.
    """
    if record is None:
        return None
    then = (
        record.settings["training"].get("micro_batch_tokens"),
        record.settings["engine"].get("gradient_checkpointing"),
    )
    now = (training.micro_batch_tokens, engine.gradient_checkpointing)
    if record.fit is None or any(new not in ("auto", old) for old, new in zip(then, now, strict=True)):
        return None
    return Fit.from_json(record.fit)


def with_fit(record: RunRecord, fit: Fit) -> RunRecord:
    """Return ``record`` with the cut, and with what "auto" was found to be among its settings."""
    training, engine = record.settings["training"], record.settings["engine"]
    if training["micro_batch_tokens"] == "auto":
        training = {**training, "micro_batch_tokens": fit.micro_batch_tokens}
    if engine["gradient_checkpointing"] == "auto":
        engine = {**engine, "gradient_checkpointing": fit.gradient_checkpointing}
    settings = {**record.settings, "training": training, "engine": engine}
    return record.model_copy(update={"settings": settings, "fit": fit.to_json()})
