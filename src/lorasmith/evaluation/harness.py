"""Tasks of lm-evaluation-harness, on base and tuned: the only importer of lm_eval."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorasmith.errors import MissingExtraError, SettingsError
from lorasmith.generation.chat import Chat


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One number of one task, such as acc; ``stderr`` is the harness's own estimate."""

    task: str
    metric: str
    value: float
    stderr: float | None


def run_tasks(
    chat: Chat, tasks: Sequence[str], *, limit: int | None = None, batch_size: int = 8
) -> list[TaskScore]:
    """Return the scores of ``tasks``: names that the harness knows, or .yaml files of tasks of one's own.

    The model is asked as the harness does it, without the prompt recipe. A known task whose data set is not on this
    machine needs the network.

    Raises:
        MissingExtraError: lm-eval is not installed. SettingsError: a task is neither known nor a task file.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError("--tasks", "lm-eval", "lm-eval") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [Path(task) for task in tasks if Path(task).suffix in (".yaml", ".yml")]
    names = [_task_name(Path(task)) if Path(task) in files else task for task in tasks]
    manager = TaskManager(include_path=[str(file.resolve().parent) for file in files] or None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise SettingsError(
            f"lm-eval knows no task {unknown[0]}. Name one of `lm_eval ls tasks`, or a .yaml file of your own."
        )
    evaluate: Any = lm_eval.simple_evaluate  # its types are hidden by a decorator
    with chat.answering() as model:
        found = evaluate(
            model=HFLM(pretrained=model, tokenizer=chat.tokenizer, batch_size=batch_size),  # type: ignore[arg-type]
            tasks=names,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
        )
    return _read_scores(found["results"])


def _task_name(file: Path) -> str:
    """Return the name that a task file gives its task."""
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as fault:
        raise SettingsError(f"The task file {file} cannot be read: {fault}") from fault
    name = content.get("task") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise SettingsError(f'The task file {file} names no task: it needs a line "task: NAME".')
    return name


def _read_scores(results: dict[str, dict[str, Any]]) -> list[TaskScore]:
    """Return the numbers of lm-eval's results: {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...} a task."""
    scores = []
    for task, values in results.items():
        for key, value in values.items():
            metric, _, which = key.partition(",")
            if isinstance(value, int | float) and which and not metric.endswith("_stderr"):
                stderr = values.get(f"{metric}_stderr,{which}")
                known = isinstance(stderr, int | float)
                scores.append(TaskScore(task, metric, float(value), float(stderr) if known else None))
    return scores
