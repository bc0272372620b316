"""KTO's losses equal TRL's and the paper's formula, in packs and with several processes; bad labels are refused."""

import json

import numpy as np
import pytest
import torch

from lorasmith.data.tokens import IGNORE_INDEX
from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.errors import DataError, SettingsError
from lorasmith.model.method_settings import LoraSettings
from lorasmith.training.kto import Kto, advise_weights, exchange_answer, places_of_others
from lorasmith.training.loop import mean_losses, train
from lorasmith.training.preference import reference_log_probs
from lorasmith.training.schedule import order_steps
from lorasmith.training.settings import ObjectiveSettings

from .conftest import make_adapted
from .test_preference import (
    SETTINGS,
    TRL_SETTINGS,
    assert_same_gradients,
    gradients_of_steps,
    make_pairs,
    needs_trl,
    plain_log_prob,
    run_file,
)

PROMPT = 14
OBJECTIVE = ObjectiveSettings(name="kto", desirable_weight=1.5, undesirable_weight=0.8)


def make_labelled(count: int = 20):
    """Two answers to each question, of 3 to 9 tokens, and which of them are bad."""
    rows = make_pairs(count // 2)
    rows.examples_per_row = 1
    return rows, np.random.default_rng(3).random(count) < 0.4


def run(rows, is_rejected, folder, settings=SETTINGS):
    model = make_adapted()
    forward = PackForward(model, EngineSettings())
    reference = reference_log_probs(
        model, forward, rows, "train", LoraSettings(), base_key="tiny", max_tokens=200
    )
    longest = max(len(row.input_ids) for row in rows)
    learns = Kto(model, OBJECTIVE, {"train": reference}, {"train": is_rejected}, longest)
    rate = settings.learning_rate
    return model, list(
        train(model, rows, settings, forward=forward, learning_rate=rate, run_dir=folder, objective=learns)
    )


def plain_loss(model, rows, is_rejected, indices) -> torch.Tensor:
    """The mean loss of a step as the paper writes it, one example after the other."""

    def gain(row):
        with torch.no_grad(), model.disable_adapter():
            base = plain_log_prob(model, row)
        return plain_log_prob(model, row) - base

    others = [
        exchange_answer(rows[i], rows[indices[place]], 99)
        for i, place in zip(indices, places_of_others([rows[i] for i in indices]), strict=True)
    ]
    with torch.no_grad():
        kl = torch.stack([gain(row) for row in others]).mean().clamp(min=0)
    losses = []
    for index in indices:
        value = 0.1 * (gain(rows[index]) - kl)
        is_bad = is_rejected[index]
        losses.append(0.8 * (1 - torch.sigmoid(-value)) if is_bad else 1.5 * (1 - torch.sigmoid(value)))
    return torch.stack(losses).mean()


def test_ten_steps_equal_the_formula_in_plain_torch(tmp_path):
    rows, is_rejected = make_labelled()
    _, reports = run(rows, is_rejected, tmp_path / "ours")
    theirs = make_adapted()
    theirs.get_base_model().set_attn_implementation("sdpa")
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], weight_decay=0.0)
    order = order_steps(rows, SETTINGS)
    expected = []
    with gradients_of_steps() as gradients:
        for step, report in enumerate(reports):
            loss = plain_loss(theirs, rows, is_rejected, order.examples_of(step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = report.learning_rate
            optimizer.step()
            expected.append(loss.item())
    assert len(reports) == 10
    assert [report.loss for report in reports] == pytest.approx(expected, rel=1e-5)
    assert max(report.measured["kl"] for report in reports) > 0.01, "a term that is always 0 shows nothing"
    with gradients_of_steps(beside=gradients) as found:
        run(rows, is_rejected, tmp_path / "beside")
    assert_same_gradients(gradients, found)


@needs_trl
@pytest.mark.filterwarnings("ignore")
def test_ten_steps_equal_trl(tmp_path, tiny_tokenizer):
    import datasets
    from trl import KTOConfig, KTOTrainer

    rows, is_rejected = make_labelled()
    order = order_steps(rows, SETTINGS)
    steps = [order.examples_of(step) for step in range(10)]
    answers = [[rows[i].input_ids[PROMPT:].tolist() for i in step] for step in steps]
    others = [places_of_others([rows[i] for i in step]) for step in steps]
    dataset = datasets.Dataset.from_list(
        [
            {
                "prompt_ids": rows[index].input_ids[:PROMPT].tolist(),
                "completion_ids": answer,
                "KL_completion_ids": of_step[place],
                "label": not is_rejected[index],
            }
            for step, of_step, places in zip(steps, answers, others, strict=True)
            for index, answer, place in zip(step, of_step, places, strict=True)
        ]
    )
    losses, kls = [], []

    class Recording(KTOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            kls.append(self._metrics["train"]["kl"][-1])
            return loss

    arguments = KTOConfig(
        output_dir=str(tmp_path / "trl"),
        **TRL_SETTINGS,
        desirable_weight=1.5,
        undesirable_weight=0.8,
        train_sampling_strategy="sequential",
    )
    theirs = make_adapted()
    theirs.get_base_model().set_attn_implementation("sdpa")
    theirs.get_base_model().name_or_path = "tiny"
    with gradients_of_steps() as gradients:
        Recording(theirs, args=arguments, train_dataset=dataset, processing_class=tiny_tokenizer).train()
    _, reports = run(rows, is_rejected, tmp_path / "ours")
    assert len(losses) == 10
    assert [report.loss for report in reports] == pytest.approx(losses, rel=1e-5)
    assert [report.measured["kl"] for report in reports] == pytest.approx(kls, rel=1e-4, abs=1e-6)
    with gradients_of_steps(beside=gradients) as found:
        run(rows, is_rejected, tmp_path / "beside")
    assert_same_gradients(gradients, found)


def test_a_cut_into_packs_changes_nothing(tmp_path):
    rows, is_rejected = make_labelled()
    _, expected = run(rows, is_rejected, tmp_path / "whole")
    _, found = run(
        rows, is_rejected, tmp_path / "cut", SETTINGS.model_copy(update={"micro_batch_tokens": 40})
    )
    assert [r.loss for r in found] == pytest.approx([r.loss for r in expected], rel=1e-5)
    for key in expected[0].measured:
        theirs = [r.measured[key] for r in expected]
        assert [r.measured[key] for r in found] == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_rewards_of_a_validation_are_means_over_all_of_its_rows_of_a_kind():
    rows, _ = make_labelled(80)  # read in parts of 64: the first has good ones only
    is_rejected = np.arange(80) >= 70
    model = make_adapted()
    forward = PackForward(model, EngineSettings())
    zeros = np.zeros(80, np.float32)
    learns = Kto(model, OBJECTIVE, {"validation": zeros}, {"validation": is_rejected}, 99)
    means = mean_losses(model, rows, SETTINGS, forward, objective=learns, name="validation")
    found = dict(zip(learns.tells, means[1:], strict=True))
    with torch.no_grad(), forward.asking():
        rewards = 0.1 * np.array([plain_log_prob(model, row).item() for row in rows])
    assert found["reward_desirable"] == pytest.approx(rewards[:70].mean(), rel=1e-4)
    assert found["reward_undesirable"] == pytest.approx(rewards[70:].mean(), rel=1e-4)


def test_an_exchanged_answer_stands_behind_the_other_question():
    rows = make_pairs(2)
    made = exchange_answer(rows[0], rows[3], 99)
    assert made.input_ids.tolist() == [*rows[0].input_ids[:PROMPT], *rows[3].input_ids[PROMPT:]]
    assert (made.labels != IGNORE_INDEX).sum() == len(rows[3].input_ids) - PROMPT
    assert len(exchange_answer(rows[0], rows[3], 15).input_ids) == 15


@pytest.mark.parametrize(
    ("questions", "places"),
    [
        ("abcd", [3, 0, 1, 2]),
        ("aabb", [2, 3, 0, 1]),
        ("abac", [1, 0, 3, 2]),
        ("aab", [1, 2, 0]),  # two of three: one is left with an answer to its own
        ("a", [0]),
    ],
)
def test_an_answer_is_exchanged_for_one_to_another_question(questions, places):
    pairs = make_pairs(3)
    rows = [pairs[2 * "abc".index(letter)] if letter != "d" else make_pairs(4)[6] for letter in questions]
    assert places_of_others(rows) == places


def label(number: int, is_good: bool) -> dict:
    answer = f"It is {2 * number}." if is_good else f"Perhaps {2 * number + 1}, who knows."
    return {"prompt": f"What is {number} plus {number}?", "completion": answer, "label": is_good}


LABELLED = [label(number, number % 3 > 0) for number in range(24)]


def test_a_run_on_labels_learns_them_goes_on_after_a_stop_and_is_reported(tmp_path, tiny_base_folder):
    from lorasmith.cli.run_file import prepare, train
    from lorasmith.evaluation.held_out import TrainingData, choose_questions, sample_training
    from lorasmith.evaluation.settings import ReportSettings
    from lorasmith.generation.chat import Chat
    from lorasmith.model.run_record import read_run_record
    from lorasmith.training.job import run_job

    words = ["objective.name=kto", "training.validation_share=0.25", "training.learning_rate=1e-2"]
    settings = run_file(tmp_path, tiny_base_folder, LABELLED, *words, "training.epochs=4")
    said = []
    reports = list(train(settings, tmp_path / "whole"))
    assert reports[-1].measured["reward_desirable"] > 0 > reports[-1].measured["reward_undesirable"]
    assert reports[-1].measured["reward_accuracy"] == 1
    assert reports[-1].validation_loss < reports[0].loss
    job = prepare(settings, tmp_path / "stopped", say=said.append)
    for report in run_job(job, lambda: True):
        assert report.step == 1
    assert any("Labels: " in line for line in said)
    rest = list(train(settings, tmp_path / "stopped"))
    assert [r.loss for r in rest] == pytest.approx([r.loss for r in reports[1:]], rel=1e-5)
    # What is asked by a report are held-out questions whose answers are good.
    record = read_run_record(tmp_path / "whole")
    chat = Chat.from_run(tmp_path / "whole")
    training = TrainingData(tmp_path / "whole", record)
    (questions,) = choose_questions(
        tmp_path / "whole", record, training, ReportSettings(), chat.recipe, chat.tokenizer
    )
    assert questions.rows
    assert all(row.reference.startswith("It is") for row in questions.rows)
    assert all(example.answer.startswith("It is") for example in training.answers())
    num_answers = training.count_answers()
    assert num_answers == len(list(training.answers())) < record.data["num_examples"]
    assert len(sample_training(training.answers(), num_answers, 6)) == 6
    # The labels of CSV are 1 and 0 as well.
    (tmp_path / "new.csv").write_text("prompt,completion,label\nWho?,We.,1\nWho?,Nobody.,0\n")
    new = ReportSettings(data=(str(tmp_path / "new.csv"),))
    (questions,) = choose_questions(tmp_path / "whole", record, training, new, chat.recipe, chat.tokenizer)
    assert [row.reference for row in questions.rows] == ["We."]


def test_pairs_are_a_good_and_a_bad_answer_each(tmp_path, tiny_base_folder):
    from lorasmith.cli.run_file import prepare

    pairs = [{"prompt": f"Why {n}?", "chosen": f"So {n}.", "rejected": f"No {n}."} for n in range(4)]
    job = prepare(run_file(tmp_path, tiny_base_folder, pairs, "objective.name=kto"), tmp_path / "run")
    assert job.dataset.is_rejected.tolist() == [False, True] * 4
    assert job.dataset.receipt.used == 4


def test_both_answers_of_a_pair_are_held_out_or_neither(tmp_path, tiny_base_folder):
    from lorasmith.cli.run_file import prepare

    pairs = [{"prompt": f"Why {n}?", "chosen": f"So {n}.", "rejected": f"No {n}."} for n in range(12)]
    for share in ("0.25", "0.05"):
        words = ("objective.name=kto", f"training.validation_share={share}")
        job = prepare(run_file(tmp_path, tiny_base_folder, pairs, *words), tmp_path / f"run{share}")
        assert job.validation is not None
        assert job.validation.is_rejected.tolist() == [False, True] * (len(job.validation) // 2)
        assert len(job.validation) == max(2, round(24 * float(share)))
        held_out, kept = (
            {row.input_ids[: np.argmax(row.labels >= 0)].tobytes() for row in rows}
            for rows in (job.validation, job.dataset)
        )
        assert len(held_out) + len(kept) == 12
        assert not held_out & kept


@pytest.mark.parametrize(
    ("rows", "objective", "text"),
    [
        (LABELLED, "sft", "labelled rows .* objective.name=kto learns from them.* would learn the bad ones"),
        (LABELLED, "dpo", "labelled rows .* This objective needs preference rows"),
        ([{"prompt": "Why?", "completion": "So."}], "kto", "a row with an answer and no label"),
        (
            [label(1, True), label(2, True)],
            "kto",
            "all 2 answers are labelled true.*add answers labelled false",
        ),
        (
            [label(1, False), label(2, False)],
            "kto",
            "all 2 answers are labelled false.*add answers labelled true",
        ),
        ([label(1, True), {**label(2, True), "label": "good"}], "kto", "label is not true or false.*'good'"),
        ([label(1, True), {**label(2, True), "label": None}], "kto", "label is not true or false"),
        ([label(1, True), {"prompt": "Why?", "label": False}], "kto", "a label, and no answer"),
    ],
)
def test_the_wrong_rows_are_refused_in_words(rows, objective, text, tmp_path, tiny_base_folder):
    from lorasmith.cli.run_file import prepare

    with pytest.raises(DataError, match=text):
        prepare(run_file(tmp_path, tiny_base_folder, rows, f"objective.name={objective}"), tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["method.name=full"], "kto asks the base in every step, and method.name=full changes"),
        (["method.name=pissa"], "method.name=pissa changes the base's own weights"),
        (
            ["training.batch_size=1"],
            "batch_size is 1, and objective.name=kto compares each answer with others",
        ),
        (["objective.margin=1"], "margin is no setting of kto"),
    ],
)
def test_what_kto_cannot_have_is_refused(words, text, tmp_path, tiny_base_folder):
    from lorasmith.cli.run_file import prepare

    with pytest.raises(SettingsError, match=text):
        prepare(
            run_file(tmp_path, tiny_base_folder, LABELLED, "objective.name=kto", *words), tmp_path / "run"
        )
    with pytest.raises(SettingsError, match="desirable_weight is no setting of dpo; it belongs to kto"):
        run_file(tmp_path, tiny_base_folder, LABELLED, "objective.name=dpo", "objective.desirable_weight=2")


def test_weights_are_advised_where_the_kinds_do_not_weigh_alike():
    few_bad = np.array([True] + [False] * 4)
    settings = ObjectiveSettings(name="kto")
    assert advise_weights(few_bad, settings) == "objective.undesirable_weight=4"
    assert advise_weights(~few_bad, settings) == "objective.desirable_weight=4"
    assert advise_weights(few_bad, ObjectiveSettings(name="kto", undesirable_weight=4)) is None


def test_labels_of_csv_are_words_and_both_ways_is_warned_of(tmp_path, tiny_tokenizer):
    from lorasmith.data.dataset import examine_dataset
    from lorasmith.data.prompts import choose_recipe
    from lorasmith.data.settings import DataSettings, PromptSettings

    (tmp_path / "rows.csv").write_text("prompt,completion,label\nWhy?,So.,TRUE\nWhy?,So.,false\nWhy?,No.,0\n")
    recipe, _ = choose_recipe(PromptSettings(recipe="alpaca"), tiny_tokenizer)
    data = DataSettings(train=str(tmp_path / "rows.csv"), cache_dir=str(tmp_path / "cache"))
    dataset = examine_dataset(data, recipe, tiny_tokenizer, kind="labelled")
    assert dataset.is_rejected.tolist() == [False, True, True]
    assert dataset.receipt.warnings == ("rows.csv:3: rows.csv:2 labels the same answer otherwise",)


def test_an_answer_that_is_chosen_in_one_pair_and_rejected_in_another_is_warned_of(tmp_path, tiny_tokenizer):
    from lorasmith.data.dataset import examine_dataset
    from lorasmith.data.prompts import choose_recipe
    from lorasmith.data.settings import DataSettings, PromptSettings

    pairs = [("So.", "No."), ("So.", "Never."), ("Never.", "No.")]  # the first two agree: So. is good
    rows = [{"prompt": "Why?", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe, _ = choose_recipe(PromptSettings(recipe="alpaca"), tiny_tokenizer)
    data = DataSettings(train=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    dataset = examine_dataset(data, recipe, tiny_tokenizer, kind="labelled")
    assert dataset.receipt.warnings == ("rows.jsonl:3: rows.jsonl:2 labels the same answer otherwise",)
