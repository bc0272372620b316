"""transformers.Trainer and TRL's SFTTrainer as contenders: their own loops, which wait before each step.

    python sft_trainer.py TASK.json SETUP PER_DEVICE [--attention NAME] [--liger]

``SETUP`` is one of SETUPS. Everybody gets lorasmith's token ids and starts from its adapter. The examples of a
step are the same for all, but for trl-packed: TRL packs the whole data set, and a step takes as many packed rows
as hold about ``batch_size`` examples. Its loss is therefore compared on the examples of the first step, by
TRL's own evaluation of them.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from side_by_side.flops import count_work
from side_by_side.machine import describe_packages, forget_peak_memory, peak_memory_bytes
from side_by_side.task import IGNORE_INDEX, Examples, Task, count_learnt
from side_by_side.workers import Channel

SETUPS = {
    "recipe-2023": "transformers.Trainer, every row padded to 256 tokens, activation checkpointing, float32",
    "trainer": "transformers.Trainer, rows padded to the longest of the batch",
    "trl-padded": "SFTTrainer, rows padded to the longest of the batch",
    "trl-flat": "SFTTrainer, padding_free: the batch as one sequence",
    "trl-packed": "SFTTrainer, packing=bfd",
}
RECIPE_2023_TOKENS = 256


class StepOfTrainer:
    """Mixed into a Trainer: notes what each step was given and what its loss was."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.given: list[dict[str, torch.Tensor]] = []
        self.losses: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        wanted = ("input_ids", "labels", "attention_mask", "position_ids")
        self.given.append({name: inputs[name] for name in wanted if name in inputs})
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.losses.append(loss)  # a share of the step's mean: Trainer divides by the step's learnt tokens
        return loss

    def take_step(self) -> dict[str, Any]:
        """Return what the last step was, and forget it."""
        lengths = [length for batch in self.given for length in example_lengths(batch)]
        num_learnt = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in self.given)
        step = {
            "work": asdict(count_work(lengths, num_learnt)),
            "num_computed": sum(batch["input_ids"].numel() for batch in self.given),
            "loss": float(sum(self.losses)),
        }
        self.given, self.losses = [], []
        return step


class TrainerContender(StepOfTrainer, Trainer):
    pass


def example_lengths(batch: dict[str, torch.Tensor]) -> list[int]:
    """Return the length of each example in a batch: by the mask, or where positions begin again."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum(1).tolist()
    positions = batch["position_ids"].flatten()
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    return [stop - start for start, stop in itertools.pairwise(starts)]


def pad_rows(num_tokens: int) -> Callable[[Sequence[dict[str, list[int]]]], dict[str, torch.Tensor]]:
    """Return a collator that pads to ``num_tokens``, or to the longest of the batch where that is longer."""

    def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(num_tokens, *(len(row["input_ids"]) for row in rows))

        def stack(values: list[list[int]], padding: int) -> torch.Tensor:
            return torch.tensor([value + [padding] * (longest - len(value)) for value in values])

        return {
            "input_ids": stack([row["input_ids"] for row in rows], 0),
            "labels": stack([row["labels"] for row in rows], IGNORE_INDEX),
            "attention_mask": stack([[1] * len(row["input_ids"]) for row in rows], 0),
        }

    return collate


def training_arguments(task: Task, setup: str, per_device: int) -> dict[str, Any]:
    """Return what TrainingArguments and SFTConfig have in common here."""
    is_cpu = task.device == "cpu"
    return {
        "output_dir": f"{task.work_dir}/{setup}",
        "max_steps": task.num_steps,
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": math.ceil(task.batch_size / per_device),
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "bf16": task.dtype == "bfloat16" and setup != "recipe-2023",
        "gradient_checkpointing": setup == "recipe-2023",
        "train_sampling_strategy": "random" if setup == "trl-packed" else "sequential",
        "use_cpu": is_cpu,
        "dataloader_pin_memory": not is_cpu,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def make_trainer(
    task: Task, setup: str, per_device: int, examples: Examples, model: Any, *, liger: bool
) -> Any:
    arguments = training_arguments(task, setup, per_device)
    # max_steps rows in the task's order, so that a step takes the same examples as everybody's.
    in_order = Dataset.from_list(examples.of_steps(0, task.num_steps))
    if not setup.startswith("trl"):
        return TrainerContender(
            model=model,
            args=TrainingArguments(**arguments, remove_unused_columns=False),
            data_collator=pad_rows(RECIPE_2023_TOKENS if setup == "recipe-2023" else 0),
            train_dataset=in_order,
        )

    from trl import SFTConfig, SFTTrainer

    class TrlContender(StepOfTrainer, SFTTrainer):
        pass

    packs = setup == "trl-packed"
    config = SFTConfig(
        **arguments,
        packing=packs,
        padding_free=setup == "trl-flat",
        max_length=task.max_seq_len if packs else None,
        use_liger_kernel=liger,
        per_device_eval_batch_size=task.batch_size,
    )
    every = Dataset.from_list(
        [{"input_ids": i, "labels": y} for i, y in zip(examples.input_ids, examples.labels, strict=True)]
    )
    trainer = TrlContender(
        model=model,
        args=config,
        train_dataset=every if packs else in_order,
        eval_dataset=Dataset.from_list(examples.of_steps(0, 1)) if packs else None,
        processing_class=AutoTokenizer.from_pretrained(task.base),
    )
    if packs:
        rows_a_step = task.batch_size * len(trainer.train_dataset) / len(every)
        trainer.args.gradient_accumulation_steps = max(1, round(rows_a_step / per_device))
        trainer.accelerator.gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


class WaitBeforeSteps(TrainerCallback):
    """Hold the training loop until the driver asks for a step; the clock runs from there to the step's end."""

    def __init__(self, channel: Channel, take_step: Callable[[], dict[str, Any]], *, is_cuda: bool) -> None:
        self._channel = channel
        self._take_step = take_step
        self._is_cuda = is_cuda
        self._started = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        forget_peak_memory()
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
        self._wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        peak = torch.cuda.max_memory_allocated() if self._is_cuda else peak_memory_bytes()
        self._channel.send({"seconds": seconds, **self._take_step(), "peak_bytes": peak})
        self._wait()

    def _wait(self) -> None:
        self._channel.wait()
        self._started = time.perf_counter()


def main() -> None:
    channel = Channel()
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("setup", choices=SETUPS)
    parser.add_argument("per_device", type=int)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--liger", action="store_true")
    options = parser.parse_args()
    task = Task.read(options.task)
    torch.set_num_threads(task.threads)
    examples = Examples.read(task.examples)
    dtype = "float32" if options.setup == "recipe-2023" else task.dtype
    base = AutoModelForCausalLM.from_pretrained(
        task.base, dtype=getattr(torch, dtype), attn_implementation=options.attention
    )
    base.config.use_cache = False
    model = PeftModel.from_pretrained(base, str(task.adapter), is_trainable=True)
    if options.setup == "recipe-2023":
        model.enable_input_require_grads()  # what prepare_model_for_int8_training did
    trainer = make_trainer(task, options.setup, options.per_device, examples, model, liger=options.liger)
    ready: dict[str, Any] = {
        "packages": describe_packages(),
        "dtype": dtype,
        "rows_a_step": options.per_device * trainer.args.gradient_accumulation_steps,
    }
    if options.setup == "trl-packed":
        ready["first_loss"] = trainer.evaluate()["eval_loss"]
        ready["num_learnt"] = sum(map(count_learnt, trainer.train_dataset["labels"]))
    is_cuda = task.device.startswith("cuda")
    trainer.add_callback(WaitBeforeSteps(channel, trainer.take_step, is_cuda=is_cuda))
    channel.send(ready)
    trainer.train()


if __name__ == "__main__":
    main()
