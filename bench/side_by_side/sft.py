"""Run the contenders of a training benchmark in turns, check that they train the same, and report.

A round is one step of each contender, one after the other, so that a slow moment of the machine hits all of
them. Numbers are medians over rounds; a ratio is the median of the rounds' own ratios.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from side_by_side.flops import ModelShape, Work
from side_by_side.report import gib, percent, print_table, tell
from side_by_side.task import Task
from side_by_side.workers import BENCH, Worker, WorkerDiedError, peer_python

CONTENDERS = BENCH / "contenders"
LONG_ENOUGH_SECONDS = (
    10.0  # a first step this long says enough about a setting; a shorter one is mostly start-up
)
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 3e-2}  # relative, of losses at the same weights


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a peer: a setup of sft_trainer.py, examples (or packed rows) a device, attention, Liger."""

    setup: str
    per_device: int
    attention: str = "sdpa"
    has_liger: bool = False

    def __str__(self) -> str:
        extras = ([] if self.attention == "sdpa" else [self.attention]) + (
            ["liger"] if self.has_liger else []
        )
        return " ".join([f"{self.setup} x{self.per_device}", *extras])

    def arguments(self) -> list[str]:
        liger = ["--liger"] if self.has_liger else []
        return [self.setup, str(self.per_device), "--attention", self.attention, *liger]


@dataclass(frozen=True, slots=True)
class Step:
    """What one contender did in one round."""

    seconds: float
    work: Work
    num_computed: int  # tokens that went through the layers: with padding, or shared ones once
    loss: float
    peak_bytes: int

    @classmethod
    def of(cls, answer: dict[str, Any]) -> "Step":
        return cls(**{**answer, "work": Work(**answer["work"])})

    @property
    def tokens_per_second(self) -> float:
        return self.work.num_tokens / self.seconds


class UnequalError(RuntimeError):
    """Two contenders do not train the same, so comparing their speed would say nothing."""


def check_loss(setting: str, ours: float, theirs: float, tolerance: float) -> None:
    """Refuse a first loss that differs: the same weights on the same learnt tokens give the same loss.

    Raises:
        UnequalError: by more than ``tolerance``, a share of lorasmith's.
    """
    if not abs(theirs - ours) <= tolerance * ours:
        raise UnequalError(
            f"The loss of the first step is {ours:.5f} with lorasmith and {theirs:.5f} with {setting}; allowed is "
            f"a difference of {tolerance:.1%}."
        )


def check_learnt(setting: str, ours: int, theirs: int) -> None:
    """Refuse other learnt tokens.

    Raises:
        UnequalError: the numbers differ.
    """
    if theirs != ours:
        raise UnequalError(f"Learnt tokens: {ours:,} with lorasmith, {theirs:,} with {setting}.")


class Comparison:
    """The running contenders of one task."""

    def __init__(self, task: Task, shape: ModelShape) -> None:
        self.task = task
        self.shape = shape
        self._path = task.write(Path(task.work_dir) / "task.json")
        self._environment = {"OMP_NUM_THREADS": str(task.threads)}
        self.ours = self._start(
            "lorasmith", [sys.executable, str(CONTENDERS / "sft_lorasmith.py"), self._path]
        )
        self.peers: dict[str, tuple[Setting, Worker]] = {}
        self.tried: list[dict[str, Any]] = []

    def _start(self, name: str, command: Sequence[object]) -> Worker:
        log = Path(self.task.work_dir) / f"{name.replace(' ', '_')}.log"
        return Worker(name, [str(word) for word in command], log, self._environment)

    def start_peer(self, setting: Setting) -> Worker:
        script = CONTENDERS / "sft_trainer.py"
        return self._start(str(setting), [peer_python(), script, self._path, *setting.arguments()])

    def choose(self, name: str, settings: Sequence[Setting]) -> Setting | None:
        """Return the fastest of ``settings`` by a step of each, or None where none of them ran."""
        if len(settings) == 1:
            return settings[0]
        speeds: dict[Setting, float] = {}
        for setting in settings:
            try:
                worker = self.start_peer(setting)
                step = Step.of(worker.ask())
                if step.seconds < LONG_ENOUGH_SECONDS:
                    step = Step.of(worker.ask())
            except WorkerDiedError as death:
                tell(f"  {name}: {setting}: {death}")
                self.tried.append({"contender": name, "setting": str(setting), "failed": str(death)})
                continue
            worker.close()
            speeds[setting] = step.tokens_per_second
            tell(f"  {name}: {setting}: {step.tokens_per_second:,.0f} tokens/s, {gib(step.peak_bytes)}")
            self.tried.append(
                {
                    "contender": name,
                    "setting": str(setting),
                    "tokens_per_second": step.tokens_per_second,
                    "peak_bytes": step.peak_bytes,
                }
            )
        return max(speeds, key=lambda setting: speeds[setting]) if speeds else None

    def add_peer(self, name: str, settings: Sequence[Setting]) -> None:
        setting = self.choose(name, settings)
        if setting is not None:
            self.peers[name] = (setting, self.start_peer(setting))

    def start_products(self, rows: int) -> Worker:
        path = Path(self.task.work_dir) / "linear.json"
        path.write_text(json.dumps(self.shape.linear))
        task = self.task
        script = CONTENDERS / "matrix_products.py"
        arguments = [path, task.dtype, task.device, task.threads, rows]
        return self._start("matrix products", [sys.executable, script, *arguments])

    def run(self, warmup: int, rounds: int, seconds: float, product_rows: int) -> dict[str, Any]:
        """Do the warm-up and the rounds, and return everything that was measured.

        Ends early when the rounds have taken ``seconds``.

        Raises:
            UnequalError: the contenders do not train the same.
        """
        workers = {"lorasmith": self.ours, **{name: worker for name, (_, worker) in self.peers.items()}}
        products = self.start_products(product_rows)
        steps: dict[str, list[Step]] = {name: [] for name in workers}
        bounds: list[float] = []
        started = time.monotonic()
        for number in range(warmup + rounds):
            if number == warmup:
                started = time.monotonic()
            for name, worker in workers.items():
                steps[name].append(Step.of(worker.ask()))
            if number == 0:
                self._check_equal(steps)
            if number >= warmup:
                bounds.append(products.ask()["flop_a_second"])
            what = "warm-up" if number < warmup else f"round {number - warmup + 1}"
            done = "  ".join(f"{name} {taken[-1].seconds:.1f} s" for name, taken in steps.items())
            tell(f"  {what}: {done}")
            if number >= warmup and time.monotonic() - started > seconds:
                tell(f"  {seconds:,.0f} seconds are over")
                break
        for worker in (*workers.values(), products):
            worker.close()
        return self._summarise({name: taken[warmup:] for name, taken in steps.items()}, steps, bounds)

    def _check_equal(self, steps: dict[str, list[Step]]) -> None:
        ours = steps["lorasmith"][0]
        for name, (setting, worker) in self.peers.items():
            theirs, ready = steps[name][0], worker.ready
            tolerance = TOLERANCE[self.task.dtype]
            if (
                setting.setup == "trl-packed"
            ):  # its steps hold other examples: compared on an evaluation, and in all
                check_loss(str(setting), ours.loss, ready["first_loss"], tolerance)
                check_learnt(str(setting), self.ours.ready["num_learnt"], ready["num_learnt"])
            else:
                check_loss(str(setting), ours.loss, theirs.loss, tolerance)
                check_learnt(str(setting), ours.work.num_learnt, theirs.work.num_learnt)
                if theirs.work != ours.work:
                    raise UnequalError(
                        f"A step is {ours.work} with lorasmith and {theirs.work} with {setting}."
                    )
            loss = ready.get("first_loss", theirs.loss)
            tell(f"  {name}: first loss {loss:.5f}, lorasmith {ours.loss:.5f}; the same learnt tokens")

    def _summarise(
        self, steps: dict[str, list[Step]], all_steps: dict[str, list[Step]], bounds: list[float]
    ) -> dict[str, Any]:
        bound = median(bounds)
        ready = self.ours.ready
        tokens_an_example = ready["num_tokens"] / ready["num_examples"]
        contenders = []
        for name, taken in steps.items():
            setting, worker = self.peers.get(name, (None, self.ours))
            dtype = worker.ready.get("dtype", self.task.dtype)
            speed = median(step.tokens_per_second for step in taken)
            ratios = [
                ours.tokens_per_second / theirs.tokens_per_second
                for ours, theirs in zip(steps["lorasmith"], taken, strict=True)
            ]
            useful = [self.shape.step_flop(step.work) / step.seconds for step in taken]
            first = all_steps[name][0]
            entry = {
                "name": name,
                "setting": str(setting or "defaults"),
                "dtype": dtype,
                "packages": worker.ready["packages"],
                "tokens_per_second": speed,
                "examples_per_second": speed / tokens_an_example,
                "lorasmith_is_faster_by": median(ratios),
                "computed_tokens_per_second": median(step.num_computed / step.seconds for step in taken),
                "peak_bytes": max(step.peak_bytes for step in all_steps[name]),
                "useful_flop_per_second": median(useful),
                "share_of_bound": median(useful) / bound,
                "first_loss": worker.ready.get("first_loss", first.loss),
                "losses": [step.loss for step in all_steps[name]],
                "seconds": [step.seconds for step in taken],
                "tokens": [step.work.num_tokens for step in taken],
                "learnt": [step.work.num_learnt for step in taken],
            }
            if name == "lorasmith":
                distinct = [
                    self.shape.shared_step_flop(step.work, step.num_computed) / step.seconds for step in taken
                ]
                entry["distinct_flop_per_second"] = median(distinct)
                entry["distinct_share_of_bound"] = median(distinct) / bound
            contenders.append(entry)
        return {
            "rounds": len(bounds),
            "data": {key: ready[key] for key in ("num_examples", "num_tokens", "num_learnt")},
            "bound_flop_per_second": bound,
            "bounds": bounds,
            "shape": self.shape.to_json(),
            "contenders": contenders,
            "tried": self.tried,
            "lorasmith_said": ready["said"],
        }


def print_result(result: dict[str, Any], peak_flop: float | None = None) -> None:
    """Print the table; with ``peak_flop``, the model FLOP utilisation of a GPU too."""
    data, shape = result["data"], result["shape"]
    print(
        f"\n{data['num_examples']:,} examples of {data['num_tokens'] / data['num_examples']:.0f} tokens, "
        f"{data['num_learnt'] / data['num_tokens']:.0%} of them learnt; {result['rounds']} rounds. "
        f"Needed: {shape['flop_a_token'] / 1e9:.3f} GFLOP a token, {shape['flop_a_learnt_token'] / 1e9:.3f} a learnt "
        f"token, and attention. Matrix products of the model's shapes: "
        f"{result['bound_flop_per_second'] / 1e9:,.1f} GFLOP/s.\n"
    )
    head = ["contender", "setting", "dtype", "examples/s", "tokens/s", "lorasmith faster", "peak memory"]
    head += ["of the bound", "first loss"] + (["MFU"] if peak_flop else [])
    rows = []
    for entry in result["contenders"]:
        share = percent(entry["share_of_bound"])
        if "distinct_share_of_bound" in entry:
            share += f" ({percent(entry['distinct_share_of_bound'])} computed)"
        row = [
            entry["name"],
            entry["setting"],
            entry["dtype"],
            f"{entry['examples_per_second']:,.3g}",
            f"{entry['tokens_per_second']:,.0f}",
            "" if entry["name"] == "lorasmith" else f"{entry['lorasmith_is_faster_by']:.2f} times",
            gib(entry["peak_bytes"]),
            share,
            f"{entry['first_loss']:.4f}",
        ]
        rows.append(row + ([percent(entry["useful_flop_per_second"] / peak_flop)] if peak_flop else []))
    print_table(head, rows)
    print(
        "\ntokens/s: tokens of the examples, without padding, shared ones counted for each example. examples/s: that "
        "divided by the data's mean length.\nof the bound: FLOP that the examples need, a second, by those of the "
        "products; in brackets what lorasmith computes after sharing prefixes."
    )
