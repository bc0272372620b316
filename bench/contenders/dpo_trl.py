"""TRL's DPOTrainer as a contender: its own loop, which waits before each step.

    python dpo_trl.py TASK.json SETUP PER_DEVICE

It gets lorasmith's token ids, pairs in the same order, and starts from its adapter. ``SETUP``: "trl" asks the reference
in each step, "trl-precomputed" before the first one. Its padding_free is switched off by TRL 1.16 itself.
"""

import math
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from contenders.sft_trainer import WaitBeforeSteps
from side_by_side.machine import describe_packages
from side_by_side.task import IGNORE_INDEX, Examples, Task
from side_by_side.workers import Channel


class DpoContender(DPOTrainer):
    """Notes what each step was given and what its loss was; takes rows that are tokenised already."""

    reference_seconds = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[float] = []
        self.num_tokens = self.num_computed = 0
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        started = time.perf_counter()
        dataset = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds = time.perf_counter() - started
        return dataset

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.num_tokens += int(inputs["attention_mask"].sum())
        self.num_computed += inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(loss.item())
        return loss

    def take_step(self) -> dict[str, Any]:
        """Return what the last step was, and forget it."""
        step = {"num_tokens": self.num_tokens, "num_computed": self.num_computed, "loss": sum(self.losses)}
        self.losses, self.num_tokens, self.num_computed = [], 0, 0
        return step


def pairs_of(task: Task, examples: Examples) -> list[dict[str, list[int]]]:
    """Return the pairs in the order of the steps, as DPOTrainer has them when they are tokenised."""
    indices = [index for step in examples.order for index in step]
    pairs = []
    for chosen, rejected in zip(indices[::2], indices[1::2], strict=True):
        start = next(at for at, label in enumerate(examples.labels[chosen]) if label != IGNORE_INDEX)
        pairs.append(
            {
                "prompt_ids": examples.input_ids[chosen][:start],
                "chosen_ids": examples.input_ids[chosen][start:],
                "rejected_ids": examples.input_ids[rejected][start:],
            }
        )
    return pairs


def main() -> None:
    channel = Channel()
    task, setup, per_device = Task.read(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(task.threads)
    base = AutoModelForCausalLM.from_pretrained(task.base, dtype=getattr(torch, task.dtype))
    base.config.use_cache = False
    trainer = DpoContender(
        model=PeftModel.from_pretrained(base, str(task.adapter), is_trainable=True),
        args=DPOConfig(
            output_dir=f"{task.work_dir}/{setup}",
            max_steps=task.num_steps,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=math.ceil(task.batch_size / per_device),
            precompute_ref_log_probs=setup == "trl-precomputed",
            train_sampling_strategy="sequential",
            learning_rate=task.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch",
            bf16=task.dtype == "bfloat16",
            gradient_checkpointing=False,
            max_length=None,
            beta=0.1,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(pairs_of(task, Examples.read(task.examples))),
        processing_class=AutoTokenizer.from_pretrained(task.base),
    )
    trainer.add_callback(WaitBeforeSteps(channel, trainer.take_step, is_cuda=False))
    channel.send({"packages": describe_packages(), "reference_seconds": trainer.reference_seconds})
    trainer.train()


if __name__ == "__main__":
    main()
