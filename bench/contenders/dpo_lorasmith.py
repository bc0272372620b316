"""lorasmith as a contender in DPO: from a run file to steps. Prepares pairs and adapter for TRL.

python dpo_lorasmith.py TASK.json
"""

import sys
import time
from pathlib import Path

from contenders.sft_lorasmith import settings_of
from lorasmith.model.memory import keep_freed_memory
from side_by_side.machine import describe_packages, forget_peak_memory, peak_memory_bytes
from side_by_side.task import Examples, Task
from side_by_side.workers import Channel


def main() -> None:
    channel = Channel()
    task = Task.read(sys.argv[1])
    keep_freed_memory()

    from lorasmith.cli.run_file import load_run_file, prepare
    from lorasmith.training.job import hold_run, run_job
    from lorasmith.training.schedule import order_steps

    asked_at: list[float] = []

    def note(what: str, share: float) -> None:
        if what.startswith("Asking the base"):
            asked_at.append(time.perf_counter())

    def start_of_reference(line: str) -> None:
        said.append(line)
        if line.startswith("Reference:"):
            asked_at.append(time.perf_counter())

    said: list[str] = []
    run_file = load_run_file(None, [*settings_of(task), "objective.name=dpo"], environ={})
    run_dir = Path(task.work_dir) / "lorasmith"
    with hold_run(run_dir):
        job = prepare(run_file, run_dir, say=start_of_reference, progress=note)
        job.model.save_pretrained(task.adapter)
        order = order_steps(job.dataset, run_file.training)
        examples = Examples(
            [job.dataset[i].input_ids.tolist() for i in range(len(job.dataset))],
            [job.dataset[i].labels.tolist() for i in range(len(job.dataset))],
            [list(order.examples_of(step)) for step in range(task.num_steps)],
        )
        examples.write(task.examples)
        channel.send(
            {
                "packages": describe_packages(),
                "said": said,
                "num_pairs": len(job.dataset) // 2,
                "num_tokens": sum(map(len, examples.input_ids)),
                "reference_seconds": asked_at[-1] - asked_at[0],
            }
        )
        steps = run_job(job)
        forget_peak_memory()
        for indices in examples.order:
            channel.wait()
            started = time.perf_counter()
            report = next(steps)
            channel.send(
                {
                    "seconds": time.perf_counter() - started,
                    "num_tokens": sum(len(examples.input_ids[i]) for i in indices),
                    "num_computed": report.num_tokens,
                    "loss": report.loss,
                    "peak_bytes": peak_memory_bytes(),
                }
            )
        channel.wait()


if __name__ == "__main__":
    main()
