"""What every contender is told to train, and the examples it is given: the very same token ids, in the same order."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Task:
    """One training, in words that each contender translates into its own settings."""

    base: str  # folder of a transformers model
    data: str
    recipe: str
    max_seq_len: int  # tokens
    batch_size: int  # examples a step
    num_steps: int
    dtype: str
    device: str
    threads: int
    r: int
    lora_alpha: int
    learning_rate: float  # constant
    work_dir: str
    lorasmith_settings: tuple[str, ...] = ()  # section.key=value, for comparisons within lorasmith

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def read(cls, path: str) -> "Task":
        values = json.loads(Path(path).read_text())
        return cls(**{**values, "lorasmith_settings": tuple(values["lorasmith_settings"])})

    @property
    def adapter(self) -> Path:
        """Where the adapter lies that everybody starts from."""
        return Path(self.work_dir) / "adapter_at_start"

    @property
    def examples(self) -> Path:
        return Path(self.work_dir) / "examples.npz"


@dataclass(frozen=True, slots=True)
class Examples:
    """Tokenised examples, and which of them each step takes."""

    input_ids: list[list[int]]
    labels: list[list[int]]
    order: list[list[int]]  # for each step, indices of examples

    def of_steps(self, first: int, last: int) -> list[dict[str, Any]]:
        """Return the examples of the steps ``first`` to ``last - 1``, one after the other."""
        indices = [index for step in self.order[first:last] for index in step]
        return [{"input_ids": self.input_ids[i], "labels": self.labels[i]} for i in indices]

    def write(self, path: Path) -> None:
        np.savez(
            path,
            input_ids=np.concatenate([np.array(ids) for ids in self.input_ids]),
            labels=np.concatenate([np.array(labels) for labels in self.labels]),
            lengths=np.array([len(ids) for ids in self.input_ids]),
            order=np.array([index for step in self.order for index in step]),
            step_sizes=np.array([len(step) for step in self.order]),
        )

    @classmethod
    def read(cls, path: Path) -> "Examples":
        with np.load(path) as file:
            ends = np.cumsum(file["lengths"])[:-1]
            step_ends = np.cumsum(file["step_sizes"])[:-1]
            return cls(
                [part.tolist() for part in np.split(file["input_ids"], ends)],
                [part.tolist() for part in np.split(file["labels"], ends)],
                [part.tolist() for part in np.split(file["order"], step_ends)],
            )


def count_learnt(labels: Sequence[int]) -> int:
    return sum(label != IGNORE_INDEX for label in labels)
