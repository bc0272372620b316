"""Continued pretraining: packs are exact, whole documents are held out, the run is judged, asked and merged."""

import json

import numpy as np
import pytest
import torch

from lorasmith.cli.candidates import check_held_out_is_there
from lorasmith.cli.run_file import load_run_file, train
from lorasmith.data.dataset import prepare_dataset
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import DataSettings, PromptSettings
from lorasmith.data.tokens import documents_of
from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.errors import SettingsError
from lorasmith.evaluation.page import render_page
from lorasmith.evaluation.report import make_report, to_json
from lorasmith.evaluation.settings import ReportSettings
from lorasmith.export.merge import merge
from lorasmith.generation.chat import Chat
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.packing.trie import pack_examples
from lorasmith.training.schedule import split_for_validation
from lorasmith.training.settings import ObjectiveSettings, TrainingSettings

from .conftest import make_adapted


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notes") / "notes"
    folder.mkdir()
    for number in range(12):
        paragraphs = [
            f"The office is in Saigon, day {number} of {i}.\n\n" for i in range(1 + 8 * (number < 3))
        ]
        (folder / f"note{number:02}.md").write_text("".join(paragraphs))
    return folder


def prepare(notes, tokenizer, **data):
    recipe, _ = choose_recipe(PromptSettings(), tokenizer, "documents")
    return prepare_dataset(DataSettings(train=str(notes), **data), recipe, tokenizer, kind="documents")


def test_packed_pieces_learn_what_each_piece_alone_learns(notes, tiny_tokenizer):
    dataset = prepare(notes, tiny_tokenizer, max_seq_len=64)
    packed, alone = make_adapted(), make_adapted()
    forward = PackForward(packed, EngineSettings())
    total = torch.zeros(())
    for pack in pack_examples(
        dataset, range(len(dataset)), max_tokens=200, share_prefixes=forward.share_prefixes
    ):
        loss = forward.summed_loss(pack)
        loss.backward()
        total += loss.detach()
    expected = torch.zeros(())
    for example in dataset:
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        logits = alone(input_ids=ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        loss.backward()
        expected += loss.detach()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
    assert gradients
    for name, parameter in packed.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-4)


def test_whole_documents_are_held_out_where_they_are_short_enough(notes, tiny_tokenizer):
    documents = documents_of(prepare(notes, tiny_tokenizer, max_seq_len=64))
    assert documents is not None
    settings = TrainingSettings(validation_share=0.2, seed=1)
    kept, held_out = split_for_validation(len(documents), settings, documents)
    assert sorted(kept + held_out) == list(range(len(documents)))
    assert not set(documents[kept]) & set(documents[held_out])
    assert 0.1 * len(documents) <= len(held_out) <= 0.2 * len(documents) + 1
    assert split_for_validation(len(documents), settings, documents) == (kept, held_out)
    one_book = np.zeros(20, int)
    kept, held_out = split_for_validation(20, settings, one_book)
    assert (len(kept), len(held_out)) == (16, 4)


@pytest.fixture(scope="module")
def text_run(notes, tiny_base_folder, tmp_path_factory):
    """A finished run on plain texts, and what was said of it."""
    folder = tmp_path_factory.mktemp("text-run")
    words = [f"base.model={tiny_base_folder}", f"data.train={notes}", "objective.name=text"]
    words += ["training.validation_share=0.2", "data.max_seq_len=64", "training.epochs=3"]
    words += ["training.learning_rate=5e-3", "base.device=cpu", "base.dtype=float32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORASMITH_CACHE", str(folder / "cache"))
        for _ in train(load_run_file(None, words, {}), folder / "runs" / "notes"):
            pass
    return folder / "runs" / "notes"


def test_a_run_says_what_it_was_trained_on(text_run):
    record = json.loads((text_run / "run.json").read_text())
    assert record["data"]["kind"] == "documents"
    assert record["recipe"]["name"] == "chat"  # asked as its base is
    receipt = json.loads((text_run / "receipt.json").read_text())
    assert (receipt["used"], receipt["divided"]) == (12, 3)
    assert receipt["pieces"] == record["data"]["num_examples"] + record["data"]["num_validation"]
    assert "trained on plain texts, without a template" in (text_run / "README.md").read_text()


def test_it_is_judged_by_text_that_was_held_out(text_run):
    report = make_report(text_run, ReportSettings(max_questions=5))
    assert report.held_out is None
    assert report.text is not None
    assert (report.text.kind, report.text.num_read) == ("validation share", report.text.num_pieces)
    assert report.text.tuned.perplexity < report.text.base.perplexity
    [reason] = [reason for reason in report.verdict.reasons if reason.about == "Held-out text"]
    assert "pieces of held-out text" in reason.text
    assert not [reason for reason in report.verdict.reasons if reason.about == "Right answers"]
    assert to_json(report)["text"]["compared"]["lost"] == report.text.compared.lost


def test_questions_that_stand_in_the_texts_are_left_out(text_run, tmp_path):
    rows = [
        {"instruction": "The office is in Saigon, day 3", "output": "Yes."},
        {"instruction": "Which day is it in the office?", "output": "Day 3."},
    ]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    questions = str(tmp_path / "questions.json")
    report = make_report(text_run, ReportSettings(data=(questions,), max_questions=5))
    assert report.trained is None  # texts are no questions
    [of_file] = report.held_out.sets
    assert [leak.question for leak in of_file.leaked] == ["The office is in Saigon, day 3"]
    assert [row.question for row in report.held_out.rows] == ["Which day is it in the office?"]
    assert "that a training text has too" in render_page(report)
    left = {**rows[1], "instruction": "Which day may it be, I ask you?"}
    (tmp_path / "questions.json").write_text(json.dumps([left]))
    report = make_report(text_run, ReportSettings(data=(questions,), max_questions=5))
    assert "No held-out question stands in the training texts" in render_page(report)


def test_methods_are_not_compared_by_texts_alone(notes):
    words = [f"data.train={notes}", "objective.name=text", "training.validation_share=0.2"]
    with pytest.raises(SettingsError, match="plain texts hold none"):
        check_held_out_is_there(load_run_file(None, words, {}))
    check_held_out_is_there(load_run_file(None, [*words, "report.data=questions.json"], {}))


def test_it_is_asked_and_merged_as_its_base(text_run, tmp_path):
    chat = Chat.from_run(text_run, device="cpu", dtype="float32")
    assert len(chat.ask("Where is the office?", sampling=SamplingSettings(max_tokens=4)).token_ids) <= 4
    proof = merge(text_run, tmp_path / "merged")
    assert (proof.num_same_answers, proof.num_same_prompts) == (proof.num_questions, proof.num_questions)


def test_the_recipe_text_goes_on_with_what_is_asked(tiny_tokenizer):
    recipe, _ = choose_recipe(PromptSettings(recipe="text"), tiny_tokenizer, "documents")
    chat = Chat(make_adapted(), tiny_tokenizer, recipe)
    text = "The office is in"
    assert chat.encode_prompt(text) == tiny_tokenizer(text, add_special_tokens=False).input_ids
    assert recipe.end_tokens() == ("<|im_end|>",)


def test_a_base_without_chat_template_goes_on_with_the_text(tiny_tokenizer):
    from copy import deepcopy

    plain = deepcopy(tiny_tokenizer)
    plain.chat_template = None
    recipe, reason = choose_recipe(PromptSettings(), plain, "documents")
    assert (recipe.name, reason) == ("text", "the tokenizer has no chat template")


def test_beta_is_no_setting_of_plain_texts():
    with pytest.raises(ValueError, match="beta is no setting of text"):
        ObjectiveSettings(name="text", beta=0.1)
