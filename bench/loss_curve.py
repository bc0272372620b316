"""Train the same 100 steps twice, by lorasmith's engine and by plain transformers + PEFT, and compare the losses.

    python bench/loss_curve.py --data alpaca_600.json --dtype bfloat16 --plot docs/bf16_curve.png

Both start from the same adapter and take the same examples in the same order, with AdamW at the same constant rate.
The plain path computes one example at a time, as the models come from transformers and PEFT. In bfloat16 the two
round differently and so drift apart; how far, is compared with what another rounding of the engine itself does: the
same steps in float32.

On a CPU without 16-bit units torch's own 16-bit products run at a thirtieth of float32's speed. There the plain path's
products are computed in float32 and rounded once each, which is what the units of other machines do.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorasmith.data.dataset import TokenizedDataset, prepare_dataset
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import DataSettings, PromptSettings
from lorasmith.data.tokens import IGNORE_INDEX
from lorasmith.engine.forward import PackForward
from lorasmith.engine.linear import choose_product_dtype
from lorasmith.engine.settings import EngineSettings
from lorasmith.model.base import load_base, load_tokenizer, resolve_base
from lorasmith.model.device import choose_device
from lorasmith.model.memory import keep_freed_memory
from lorasmith.model.method_settings import LoraSettings
from lorasmith.model.methods import attach_adapter
from lorasmith.model.settings import BaseSettings
from lorasmith.packing.trie import pack_examples
from lorasmith.training.schedule import order_steps
from lorasmith.training.settings import TrainingSettings

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class ProductsInFloat32(TorchDispatchMode):
    """Compute 16-bit matrix products by float32 ones, each rounded once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and args[-1].dtype in (torch.bfloat16, torch.float16):
            return func(*(factor.float() for factor in args), **(kwargs or {})).to(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def read_data(model: str, data: str, max_seq_len: int) -> TokenizedDataset:
    base = resolve_base(BaseSettings(model=model))
    tokenizer = load_tokenizer(base)
    recipe, _ = choose_recipe(PromptSettings(recipe="alpaca"), tokenizer)
    settings = DataSettings(train=data, max_seq_len=max_seq_len, overlong="drop")
    return prepare_dataset(settings, recipe, tokenizer)


def train(
    path: str, dtype: str, model: str, dataset: TokenizedDataset, training: TrainingSettings
) -> Iterator[float]:
    """Yield the mean loss of each step, before its update, of ``path`` engine or plain."""
    base = load_base(resolve_base(BaseSettings(model=model)), choose_device("cpu", dtype))
    adapted = attach_adapter(base, LoraSettings(r=8), seed=training.seed).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=0.0)
    order = order_steps(dataset, training)
    if path == "engine":
        forward = PackForward(adapted, EngineSettings())
        products = contextlib.nullcontext()
    else:
        base.set_attn_implementation("sdpa")
        slow = choose_product_dtype(base.device, base.dtype) == "float32"
        products = ProductsInFloat32() if slow else contextlib.nullcontext()

    def by_engine(indices: list[int], num_learnt: int) -> float:
        total = 0.0
        for pack in pack_examples(dataset, indices, max_tokens=2048, cost=forward.cost):
            loss = forward.summed_loss(pack)
            (loss / num_learnt).backward()
            total += loss.item()
        return total

    def one_by_one(indices: list[int], num_learnt: int) -> float:
        total = 0.0
        for index in indices:
            example = dataset[index]
            logits = adapted(
                input_ids=torch.from_numpy(example.input_ids).long()[None], use_cache=False
            ).logits
            labels = torch.from_numpy(example.labels[1:]).long()
            loss = torch.nn.functional.cross_entropy(
                logits[0, :-1].float(), labels, reduction="sum", ignore_index=IGNORE_INDEX
            )
            (loss / num_learnt).backward()
            total += loss.item()
        return total

    for step in range(training.max_steps or 100):
        indices = order.examples_of(step)
        num_learnt = sum(int((dataset[i].labels[1:] != IGNORE_INDEX).sum()) for i in indices)
        optimizer.zero_grad(set_to_none=True)
        with products:
            total = (by_engine if path == "engine" else one_by_one)(indices, num_learnt)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        yield total / num_learnt


def compare(curves: dict[str, list[float]]) -> dict[str, float]:
    """Return how far the curves are apart: mean and largest difference of a step, and of means of ten steps."""
    plain, engine, exact = (np.array(curves[name]) for name in ("plain", "engine", "engine, float32"))
    return {
        "first_step_difference": float(abs(plain[0] - engine[0])),
        "mean_difference": float(abs(plain - engine).mean()),
        "largest_difference": float(abs(plain - engine).max()),
        "mean_difference_of_float32": float(abs(plain - exact).mean()),
        "last_ten_plain": float(plain[-10:].mean()),
        "last_ten_engine": float(engine[-10:].mean()),
        "last_ten_engine_float32": float(exact[-10:].mean()),
    }


def draw(curves: dict[str, list[float]], dtype: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, apart) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=[2, 1])
    styles = {"plain": "C0-", "engine": "C1--", "engine, float32": "C2:"}
    for name, curve in curves.items():
        losses.plot(
            range(1, len(curve) + 1), curve, styles[name], label=name if "," in name else f"{name}, {dtype}"
        )
    plain = np.array(curves["plain"])
    for name in ("engine", "engine, float32"):
        apart.plot(
            range(1, len(plain) + 1), np.array(curves[name]) - plain, styles[name], label=f"{name} - plain"
        )
    losses.set_ylabel("loss (nats a token)")
    apart.set_ylabel("difference")
    apart.set_xlabel("step")
    apart.set_ylim(top=2 * apart.get_ylim()[1])  # room for the legend
    for axes in (losses, apart):
        axes.legend(frameon=False, ncols=2 if axes is apart else 1, loc="upper right")
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="Alpaca rows")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-seq-len", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    dataset = read_data(arguments.model, arguments.data, arguments.max_seq_len)
    training = TrainingSettings(
        batch_size=arguments.batch_size,
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        micro_batch_tokens=2048,
    )
    curves: dict[str, list[float]] = {}
    for name, path, dtype in (
        ("plain", "plain", arguments.dtype),
        ("engine", "engine", arguments.dtype),
        ("engine, float32", "engine", "float32"),
    ):
        curves[name] = []
        for step, loss in enumerate(train(path, dtype, arguments.model, dataset, training), start=1):
            curves[name].append(loss)
            print(f"{name}: step {step}, loss {loss:.4f}", flush=True)
    found = compare(curves)
    for name, value in found.items():
        print(f"{name}: {value:.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"curves": curves, **found}, indent=1))
    if arguments.plot:
        draw(curves, arguments.dtype, arguments.plot)


if __name__ == "__main__":
    main()
