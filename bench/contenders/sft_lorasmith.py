"""lorasmith as a contender: its own way from a run file to steps. Prepares examples and adapter for the others.

python sft_lorasmith.py TASK.json
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path

from lorasmith.model.memory import keep_freed_memory
from side_by_side.flops import count_work
from side_by_side.machine import describe_packages, forget_peak_memory, peak_memory_bytes
from side_by_side.task import Examples, Task, count_learnt
from side_by_side.workers import Channel


def settings_of(task: Task) -> list[str]:
    """Return the task as a run file's settings, those of the command line last."""
    return [
        f"base.model={task.base}",
        f"base.dtype={task.dtype}",
        f"base.device={task.device}",
        f"data.train={task.data}",
        f"data.max_seq_len={task.max_seq_len}",
        "data.overlong=drop",
        f"data.cache_dir={task.work_dir}/cache",
        f"prompt.recipe={task.recipe}",
        f"method.r={task.r}",
        f"method.lora_alpha={task.lora_alpha}",
        f"engine.threads={task.threads}",
        f"training.batch_size={task.batch_size}",
        f"training.learning_rate={task.learning_rate}",
        "training.lr_schedule=constant",
        "training.warmup_steps=0",
        # One step more than is ever asked for, since the last one saves; and no other reason to save.
        f"training.max_steps={task.num_steps + 1}",
        f"training.epochs={task.num_steps + 1}",
        f"training.save_every={10**9}",
        *task.lorasmith_settings,
    ]


def main() -> None:
    channel = Channel()
    task = Task.read(sys.argv[1])
    keep_freed_memory()  # as the command `lorasmith train` does, before torch allocates anything

    import torch

    from lorasmith.cli.run_file import load_run_file, prepare
    from lorasmith.training.job import hold_run, run_job
    from lorasmith.training.schedule import order_steps

    is_cuda = task.device.startswith("cuda")
    said: list[str] = []
    run_file = load_run_file(None, settings_of(task), environ={})
    run_dir = Path(task.work_dir) / "lorasmith"
    with hold_run(run_dir):
        job = prepare(run_file, run_dir, say=said.append)
        job.model.save_pretrained(task.adapter)
        dataset = [job.dataset[i] for i in range(len(job.dataset))]
        steps_in_order = order_steps(dataset, run_file.training)
        order = [steps_in_order.examples_of(step) for step in range(task.num_steps)]
        examples = Examples(
            [example.input_ids.tolist() for example in dataset],
            [example.labels.tolist() for example in dataset],
            order,
        )
        examples.write(task.examples)
        channel.send(
            {
                "packages": describe_packages(),
                "said": said,
                "num_examples": len(dataset),
                "num_tokens": sum(map(len, examples.input_ids)),
                "num_learnt": sum(map(count_learnt, examples.labels)),
            }
        )
        steps = run_job(job)
        forget_peak_memory()
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        for indices in order:
            channel.wait()
            started = time.perf_counter()
            report = next(steps)
            if is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            work = count_work([len(examples.input_ids[i]) for i in indices], report.num_learnt_tokens)
            channel.send(
                {
                    "seconds": seconds,
                    "work": asdict(work),
                    "num_computed": report.num_tokens,
                    "loss": report.loss,
                    "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else peak_memory_bytes(),
                }
            )
        channel.wait()


if __name__ == "__main__":
    main()
