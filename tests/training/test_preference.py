"""Preference losses equal TRL's and plain formulas, in packs whose pairs share their prompt; bad data is refused."""

import contextlib
import importlib.util
import json

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lorasmith.data.tokens import IGNORE_INDEX, TokenizedExample
from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.errors import DataError, SettingsError
from lorasmith.model.method_settings import LoraSettings
from lorasmith.packing.trie import pack_examples
from lorasmith.training.distributed import ALONE, Team
from lorasmith.training.loop import train
from lorasmith.training.preference import Preference, reference_log_probs
from lorasmith.training.schedule import order_steps
from lorasmith.training.settings import ObjectiveSettings, TrainingSettings

from .conftest import make_adapted

SETTINGS = TrainingSettings(
    batch_size=4, epochs=2, learning_rate=1e-2, warmup_steps=0, seed=5, max_grad_norm=1e9
)
# SETTINGS in TRL's words, and nothing that is saved, told or drawn.
TRL_SETTINGS = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "max_grad_norm": 1e9,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "beta": 0.1,
}
PAIRWISE = ("dpo", "ipo", "orpo", "simpo")


class Pairs(list):
    examples_per_row = 2


def make_pairs(count: int, *, prompt_tokens: int = 14, answer_tokens: int | None = None) -> Pairs:
    """Pairs of random tokens; answers of 3 to 9 tokens, or all of ``answer_tokens``."""
    random = np.random.default_rng(7)
    pairs = Pairs()
    for number in range(count):
        prompt = random.integers(20, 400, prompt_tokens)
        for _ in range(2):
            answer = random.integers(20, 400, answer_tokens or random.integers(3, 10))
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            labels = np.where(np.arange(len(ids)) < len(prompt), IGNORE_INDEX, ids).astype(np.int32)
            pairs.append(TokenizedExample(ids, labels, f"pairs.jsonl:{number + 1}"))
    return pairs


def objective_of(settings: ObjectiveSettings, model, forward, pairs) -> Preference:
    references = {}
    if settings.needs_reference:
        references["train"] = reference_log_probs(
            model, forward, pairs, "train", LoraSettings(), base_key="tiny", max_tokens=200
        )
    return Preference(settings, references)


def run(pairs, folder, settings=SETTINGS, model=None, **objective):
    model = model or make_adapted()
    forward = PackForward(model, EngineSettings())
    learns = objective_of(ObjectiveSettings(**objective), model, forward, pairs)
    reports = list(
        train(
            model,
            pairs,
            settings,
            forward=forward,
            learning_rate=settings.learning_rate,
            run_dir=folder,
            objective=learns,
        )
    )
    return model, reports


def weights_of(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n and ".default." in n}


@contextlib.contextmanager
def gradients_of_steps(beside=None):
    """The weights and their gradients before each step of whatever optimizer, as lists of tensors.

    ``beside``: the same of another run. Its weights are taken over after each step, so that every gradient is that of
    the same weights, and no rounding of the steps before is compared.
    """
    found = []

    def weights_in(optimizer):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        return [weight for weight in weights if weight.grad is not None]

    def note(optimizer, args, kwargs):
        weights = weights_in(optimizer)
        found.append([[tensor.detach().clone() for tensor in (w, w.grad)] for w in weights])

    def take_over(optimizer, args, kwargs):
        if beside and len(found) < len(beside):
            with torch.no_grad():
                for weight, (theirs, _) in zip(weights_in(optimizer), beside[len(found)], strict=True):
                    weight.copy_(theirs)

    handles = [register_optimizer_step_pre_hook(note), register_optimizer_step_post_hook(take_over)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def assert_same_gradients(expected, found) -> None:
    """All weights in one vector: each of the ten gradients within 1e-5 of its length."""
    assert len(expected) == len(found) == 10
    for step, (right, ours) in enumerate(zip(expected, found, strict=True)):
        a, b = (torch.cat([gradient.flatten() for _, gradient in side]) for side in (right, ours))
        apart = float((a - b).norm() / a.norm())
        assert apart <= 1e-5, (step, apart)


def plain_log_prob(model, example) -> torch.Tensor:
    """The log probability of an example's learnt tokens, by transformers alone."""
    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    logits = model(input_ids=ids).logits[0, :-1].float()
    labels = torch.from_numpy(example.labels[1:].astype(np.int64))
    each = torch.log_softmax(logits, -1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return each[labels != IGNORE_INDEX].sum()


def plain_loss(name: str, model, pairs, rows, beta: float, margin: float) -> torch.Tensor:
    """The mean loss of ``rows`` as the papers write it, one example after the other."""
    losses = []
    for row in rows:
        c, r = plain_log_prob(model, pairs[2 * row]), plain_log_prob(model, pairs[2 * row + 1])
        with torch.no_grad(), model.disable_adapter():
            c0, r0 = plain_log_prob(model, pairs[2 * row]), plain_log_prob(model, pairs[2 * row + 1])
        nc, nr = (int((pairs[2 * row + side].labels != IGNORE_INDEX).sum()) for side in (0, 1))
        pc, pr = torch.exp(c / nc), torch.exp(r / nr)
        losses.append(
            {
                "dpo": -torch.log(torch.sigmoid(beta * ((c - c0) - (r - r0)))),
                "ipo": ((c - c0) / nc - (r - r0) / nr - 1 / (2 * beta)) ** 2,
                "orpo": (
                    -c / nc - beta * torch.log(torch.sigmoid(torch.log(pc / (1 - pc) / (pr / (1 - pr)))))
                ),
                "simpo": -torch.log(torch.sigmoid(beta * (c / nc - r / nr) - margin)),
            }[name]
        )
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", PAIRWISE)
def test_ten_steps_equal_the_formula_in_plain_torch(name, tmp_path):
    pairs = make_pairs(20)
    ours, reports = run(pairs, tmp_path, name=name)
    theirs = make_adapted()
    theirs.get_base_model().set_attn_implementation("sdpa")
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], weight_decay=0.0)
    order = order_steps(pairs, SETTINGS)
    defaults = ObjectiveSettings(name=name)
    expected = []
    for step, report in enumerate(reports):
        rows = [example // 2 for example in order.examples_of(step)[::2]]
        loss = plain_loss(name, theirs, pairs, rows, defaults.scale, defaults.target_margin)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = report.learning_rate
        optimizer.step()
        expected.append(loss.item())
    assert len(reports) == 10
    assert expected[-1] < expected[0], "something must be learnt for the comparison to mean something"
    assert [report.loss for report in reports] == pytest.approx(expected, rel=1e-5)
    for key, weight in weights_of(theirs).items():
        assert torch.allclose(weights_of(ours)[key], weight, rtol=1e-5, atol=1e-5), key


needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")


def train_by_trl(model, pairs, folder, tokenizer, loss_type: str, num_steps: int, start=None):
    """Train ``model`` by DPOTrainer on the pairs in our order; return the loss of each step.

    ``start``: weights of the adapter to begin with. TRL's reference is the adapter as it was given, here the base.
    """
    import datasets
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    order = order_steps(pairs, SETTINGS)
    rows = [example // 2 for step in range(num_steps) for example in order.examples_of(step)[::2]]
    prompt = 14
    dataset = datasets.Dataset.from_list(
        [
            {
                "prompt_ids": pairs[2 * row].input_ids[:prompt].tolist(),
                "chosen_ids": pairs[2 * row].input_ids[prompt:].tolist(),
                "rejected_ids": pairs[2 * row + 1].input_ids[prompt:].tolist(),
            }
            for row in rows
        ]
    )
    losses = []

    class Recording(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(dataset)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    class Start(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            model.load_state_dict(start or {}, strict=False)

    arguments = DPOConfig(
        output_dir=str(folder),
        **TRL_SETTINGS,
        loss_type=[loss_type],
    )
    model.get_base_model().set_attn_implementation("sdpa")
    model.get_base_model().name_or_path = "tiny"
    trainer = Recording(
        model, args=arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[Start()]
    )
    trainer.train()
    return losses


@needs_trl
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "loss_type"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_ten_steps_equal_trl(name, loss_type, tmp_path, tiny_tokenizer):
    pairs, theirs = make_pairs(20), make_adapted()
    with gradients_of_steps() as expected:
        losses = train_by_trl(theirs, pairs, tmp_path / "trl", tiny_tokenizer, loss_type, 10)
    ours, reports = run(pairs, tmp_path / "ours", name=name)
    assert len(losses) == 10
    assert [report.loss for report in reports] == pytest.approx(losses, rel=1e-5)
    trained = weights_of(theirs)
    for key, weight in weights_of(ours).items():
        assert torch.allclose(weight, trained[key], rtol=1e-5, atol=1e-5), key
    with gradients_of_steps(beside=expected) as found:
        run(pairs, tmp_path / "beside", name=name)
    assert_same_gradients(expected, found)


@needs_trl
@pytest.mark.filterwarnings("ignore")
def test_both_sides_of_an_adapter_get_the_gradient_that_trl_gives_them(tmp_path, tiny_tokenizer):
    """Each matrix by itself, from random weights: at its start an adapter's B is zero, and so is the gradient of A."""
    pairs, ours = make_pairs(4), make_adapted()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    theirs, start = make_adapted(), weights_of(ours)
    with gradients_of_steps() as expected:
        train_by_trl(theirs, pairs, tmp_path / "trl", tiny_tokenizer, "sigmoid", 1, start)
    with gradients_of_steps() as found:
        run(pairs, tmp_path / "ours", SETTINGS.model_copy(update={"max_steps": 1}), ours, name="dpo")
    assert len(expected[0]) == len(found[0]) == len(start)
    for (_, right), (_, gradient) in zip(expected[0], found[0], strict=True):
        assert right.norm() > 0
        assert (gradient - right).norm() <= 1e-5 * right.norm()


@needs_trl
@pytest.mark.filterwarnings("ignore")
def test_ten_steps_of_orpo_equal_trl(tmp_path, tiny_tokenizer):
    """TRL learns the prompt too, and takes the mean over all tokens: alike for a prompt of one token, equal answers."""
    import datasets
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    pairs = make_pairs(20, prompt_tokens=1, answer_tokens=7)
    order = order_steps(pairs, SETTINGS)
    examples = [example for step in range(10) for example in order.examples_of(step)]
    rows = [
        {
            "prompt": "",
            **dict.fromkeys(("chosen", "rejected"), ""),
            "ids": [pairs[example].input_ids.tolist() for example in pair],
        }
        for pair in zip(examples[::2], examples[1::2], strict=True)
    ]
    losses = []

    class Recording(ORPOTrainer):
        def tokenize_row(self, feature, model=None):
            made = {}
            for side, ids in zip(("chosen", "rejected"), feature["ids"], strict=True):
                made[f"{side}_input_ids"], made[f"{side}_labels"] = ids, [IGNORE_INDEX, *ids[1:]]
                made[f"{side}_attention_mask"] = [1] * len(ids)
            return made

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    arguments = ORPOConfig(
        output_dir=str(tmp_path / "trl"),
        **TRL_SETTINGS,
    )
    theirs = make_adapted()
    theirs.get_base_model().set_attn_implementation("sdpa")
    with gradients_of_steps() as expected:
        Recording(
            theirs,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tiny_tokenizer,
        ).train()
    _, reports = run(pairs, tmp_path / "ours", name="orpo")
    assert [report.loss for report in reports] == pytest.approx(losses, rel=1e-5)
    with gradients_of_steps(beside=expected) as found:
        run(pairs, tmp_path / "beside", name="orpo")
    assert_same_gradients(expected, found)


def test_a_cut_into_packs_changes_nothing_and_tears_no_pair(tmp_path):
    pairs = make_pairs(20)
    packs = pack_examples(pairs, list(range(16)), max_tokens=60, together=2)
    assert len(packs) > 2
    for pack in packs:
        assert sorted(pack.examples)[::2] == [example - 1 for example in sorted(pack.examples)[1::2]]
    _, expected = run(pairs, tmp_path / "whole", name="dpo")
    _, found = run(
        pairs, tmp_path / "cut", SETTINGS.model_copy(update={"micro_batch_tokens": 60}), name="dpo"
    )
    assert [r.loss for r in found] == pytest.approx([r.loss for r in expected], rel=1e-5)
    for key in ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected"):
        theirs = [r.measured[key] for r in expected]
        assert [r.measured[key] for r in found] == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    # The prompt of a pair stands once: 14 tokens, and each answer without its last.
    first = [pairs[example] for example in order_steps(pairs, SETTINGS).examples_of(0)]
    alone = sum(len(example.input_ids) - 1 for example in first)
    assert expected[0].num_tokens == alone - 14 * 4


def test_the_reference_is_the_base_and_comes_from_the_cache_the_second_time(monkeypatch):
    pairs, model = make_pairs(6), make_adapted()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)  # an adapter that matters, and that must not be asked
    forward = PackForward(model, EngineSettings())

    def ask():
        return reference_log_probs(
            model, forward, pairs, "train", LoraSettings(), base_key="tiny", max_tokens=90
        )

    first = ask()
    monkeypatch.setattr(PackForward, "log_probs", None)  # calling it would fail
    assert np.array_equal(ask(), first)
    monkeypatch.undo()
    model.get_base_model().set_attn_implementation("sdpa")
    with torch.no_grad(), model.disable_adapter():
        expected = [plain_log_prob(model, example).item() for example in pairs]
    assert first == pytest.approx(expected, rel=1e-5)


def run_file(folder, base, rows, *words):
    from lorasmith.cli.run_file import load_run_file

    (folder / "rows.json").write_text(json.dumps(rows))
    words = (f"base.model={base}", f"data.train={folder / 'rows.json'}", "base.dtype=float32", *words)
    return load_run_file(None, ["base.device=cpu", "training.epochs=2", *words], {})


def test_a_run_on_pairs_learns_them_and_goes_on_after_a_stop(tmp_path, tiny_base_folder):
    from lorasmith.cli.run_file import prepare, train
    from lorasmith.evaluation.held_out import TrainingData, choose_questions
    from lorasmith.evaluation.settings import ReportSettings
    from lorasmith.generation.chat import Chat
    from lorasmith.model.run_record import read_run_record
    from lorasmith.training.job import run_job
    from lorasmith.training.reporters import read_metrics

    rows = [
        {
            "prompt": f"What is {i} plus {i}?",
            "chosen": f"It is {2 * i}.",
            "rejected": f"Perhaps {2 * i + 1}, who knows.",
        }
        for i in range(24)
    ]
    words = ["objective.name=dpo", "training.validation_share=0.25", "training.learning_rate=1e-2"]
    words.append(f"data.cache_dir={tmp_path / 'cache'}")
    settings = run_file(tmp_path, tiny_base_folder, rows, *words)
    reports = list(train(settings, tmp_path / "whole"))
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 2, "of training and validation"
    assert reports[-1].num_steps == 2 * 3  # 18 pairs, 8 a step
    assert reports[0].measured["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert reports[-1].measured["reward_accuracy"] == 1
    assert reports[-1].validation_loss < 0.69
    metrics = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert metrics[-1]["reward_margin"] > metrics[0]["reward_margin"]
    assert metrics[-1]["validation_reward_accuracy"] == 1
    assert "validation_reward_accuracy" not in metrics[0]
    assert json.loads((tmp_path / "whole" / "receipt.json").read_text())["used"] == 24
    for report in run_job(job := prepare(settings, tmp_path / "stopped"), lambda: True):
        assert report.step == 1
    assert job.dataset.examples_per_row == 2
    rest = list(train(settings, tmp_path / "stopped"))
    assert [r.loss for r in rest] == pytest.approx([r.loss for r in reports[1:]], rel=1e-5)
    # A report asks the questions of the pairs that are held out; the chosen answers are what it compares with.
    run, record, chat = (
        tmp_path / "whole",
        read_run_record(tmp_path / "whole"),
        Chat.from_run(tmp_path / "whole"),
    )
    trained = TrainingData(run, record)
    (questions,) = choose_questions(run, record, trained, ReportSettings(), chat.recipe, chat.tokenizer)
    assert len(questions.rows) == 6
    assert all(row.reference.startswith("It is") for row in questions.rows)
    answers = [example.answer for example in trained.answers()]
    assert len(answers) == 18
    assert all(answer.startswith("It is") for answer in answers)


PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
ANSWER = {"instruction": "Why?", "output": "So."}


@pytest.mark.parametrize(
    ("row", "objective", "text"),
    [
        (PAIR, "sft", "preference rows .* objective.name=dpo learns from pairs"),
        (ANSWER, "dpo", "a row with one answer. This objective needs preference rows"),
        (
            {**PAIR, "rejected": "So."},
            "dpo",
            r"no row can be used .1 chosen and rejected are the same.. A row needs .* two answers that differ; "
            "lorasmith check --pairs ",
        ),
        ({**PAIR, "chosen": "  "}, "dpo", "no row can be used .1 empty chosen answer."),
    ],
)
def test_the_wrong_rows_are_refused_in_words(row, objective, text, tmp_path, tiny_base_folder):
    from lorasmith.cli.run_file import prepare

    with pytest.raises(DataError, match=text):
        prepare(run_file(tmp_path, tiny_base_folder, [row], f"objective.name={objective}"), tmp_path / "run")


def test_a_setting_of_another_objective_is_refused(tmp_path, tiny_base_folder):
    with pytest.raises(SettingsError, match="margin is no setting of dpo; it belongs to simpo"):
        run_file(tmp_path, tiny_base_folder, [PAIR], "objective.name=dpo", "objective.margin=2")
    with pytest.raises(SettingsError, match="beta is no setting of sft"):
        run_file(tmp_path, tiny_base_folder, [PAIR], "objective.beta=2")


class Half(Team):
    """One of two processes, asked alone: what the other finds is 0."""

    def total(self, *numbers):
        return list(numbers)


def test_processes_share_the_passes_over_the_base():
    pairs, model = make_pairs(40), make_adapted()
    forward = PackForward(model, EngineSettings())
    passes, plain = [], forward.log_probs
    forward.log_probs = lambda pack, name: passes.append(pack) or plain(pack, name)

    def ask(team, key):
        passes.clear()
        settings = {"base_key": key, "max_tokens": 200, "team": team}
        return reference_log_probs(model, forward, pairs, "train", LoraSettings(), **settings), len(passes)

    halves = [ask(Half(rank=rank, count=2), f"half {rank}") for rank in (0, 1)]
    alone, num_passes = ask(ALONE, "whole")
    np.testing.assert_allclose(halves[0][0] + halves[1][0], alone, rtol=1e-5)
    assert max(count for _, count in halves) < 0.7 * num_passes
