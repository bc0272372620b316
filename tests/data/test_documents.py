"""Plain texts: found, accounted for, cut into pieces without losing a token, read in parts that stay small."""

import json
import random

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lorasmith.data import dataset as dataset_module
from lorasmith.data import documents
from lorasmith.data.dataset import examine_dataset, prepare_dataset
from lorasmith.data.pieces import Borders, cut_document
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import DataSettings, PromptSettings
from lorasmith.data.sources import open_source
from lorasmith.data.tokens import IGNORE_INDEX
from lorasmith.errors import DataError, SettingsError

PARAGRAPHS = [f"Payday number {i} is the {i}th.\nThe office is in Saigon.\n\n" for i in range(30)]


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.md").write_text("".join(PARAGRAPHS))
    (folder / "a.txt").write_text("The office is in Saigon.")
    (folder / "deep" / "c.jsonl").write_text(json.dumps({"text": "Where is payday?", "url": "x"}) + "\n")
    return folder


@pytest.fixture
def prepare(tiny_tokenizer):
    recipe, _ = choose_recipe(PromptSettings(), tiny_tokenizer, "documents")

    def prepare(source, tokenizer=tiny_tokenizer, **data):
        return examine_dataset(DataSettings(train=str(source), **data), recipe, tokenizer, kind="documents")

    return prepare


def joined(dataset, number: int) -> list[int]:
    """The ids of a document from its pieces: of each but the first, without the token before it."""
    pieces = [dataset[i].input_ids for i in np.flatnonzero(dataset.documents == number).tolist()]
    return np.concatenate([pieces[0], *(piece[1:] for piece in pieces[1:])]).tolist()


def test_every_token_of_every_document_is_learnt_once(notes, prepare, tiny_tokenizer):
    dataset = prepare(notes, max_seq_len=64)
    texts = ["The office is in Saigon.", "".join(PARAGRAPHS), "Where is payday?"]
    for number, text in enumerate(texts):
        whole = tiny_tokenizer(text, add_special_tokens=False).input_ids
        assert joined(dataset, number) == [*whole, tiny_tokenizer.eos_token_id]
    assert dataset.lengths.max() <= 64
    for example, length in zip(dataset, dataset.num_learnt, strict=True):
        assert example.labels[0] == IGNORE_INDEX
        assert (example.labels[1:] == example.input_ids[1:]).all()
        assert length == len(example.labels) - 1
    receipt = dataset.receipt
    assert (receipt.used, receipt.divided, receipt.pieces) == (3, 1, len(dataset))


def test_pieces_end_with_paragraphs_and_only_a_document_ends_with_the_end_token(
    notes, prepare, tiny_tokenizer
):
    dataset = prepare(notes / "b.md", max_seq_len=100)
    ends = [tiny_tokenizer.decode(example.input_ids[-2:].tolist()) for example in dataset]
    assert len(ends) == 10
    assert all(end.endswith("\n\n") for end in ends[:-1])
    assert ends[-1].endswith("<|im_end|>")
    assert not any("<|im_end|>" in end for end in ends[:-1])


def test_where_no_paragraph_ends_lines_do_and_then_words():
    tokenizer = _ByNames(["a", "Ġb", "Ċ", "ĊĊ", "x"])
    borders = Borders(tokenizer)
    assert cut_document(np.array([0, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0]), borders, 10)[0] == (0, 6)
    assert cut_document(np.array([0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0]), borders, 10)[0] == (0, 6)
    assert cut_document(np.array([0, 0, 0, 0, 0, 2, 2, 0, 2, 1, 0, 0]), borders, 10)[0] == (0, 7)
    assert cut_document(np.array([0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]), borders, 10)[0] == (0, 7)
    assert cut_document(np.zeros(12, int), borders, 10) == [(0, 10), (9, 12)]


class _ByNames:
    def __init__(self, names):
        self._names = names

    def __len__(self):
        return len(self._names)

    def convert_ids_to_tokens(self, ids):
        return [self._names[i] for i in ids]


def test_a_tokenizer_that_begins_every_text_begins_every_piece(notes, prepare, tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = PreTrainedTokenizerFast.from_pretrained(_saved(tiny_tokenizer, notes.parent))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    dataset = prepare(notes / "b.md", tokenizer, max_seq_len=64)
    assert {int(example.input_ids[0]) for example in dataset} == {tokenizer.bos_token_id}
    whole = tokenizer("".join(PARAGRAPHS)).input_ids
    assert joined(dataset, 0) == [*whole, tokenizer.eos_token_id]


def _saved(tokenizer, folder) -> str:
    tokenizer.save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def test_a_folder_says_what_it_does_not_read(notes, prepare, tmp_path):
    (tmp_path / "outside.md").write_text("A secret.")
    (notes / "link.md").symlink_to(tmp_path / "outside.md")
    (notes / "gone.md").symlink_to(tmp_path / "nowhere.md")
    (notes / ".hidden.md").write_text("Hidden.")
    (notes / "photo.png").write_bytes(b"\x89PNG")
    (notes / "empty.md").write_text(" \n\n")
    (notes / "copy.txt").write_text("The office is in Saigon.")
    receipt = prepare(notes).receipt
    assert (receipt.used, receipt.rows_read) == (3, 5)
    assert receipt.skipped == {"duplicate": 1, "empty text": 1}
    assert receipt.skips[0] == ("copy.txt:1", "duplicate: the same as a.txt:1")
    told = "\n".join(receipt.warnings)
    for what in (
        "hidden: .hidden.md",
        "a link out of the folder: link.md",
        "a link to nothing: gone.md",
        "of another kind",
        "photo.png",
    ):
        assert what in told


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"One\n\x00\x01", ("x.txt:2", "not a text: it holds zero bytes, as binary files do")),
        (b"One\n\xe9t\xe9", ("x.txt:2", "not UTF-8: byte 0xe9; save the file as UTF-8")),
        ("Eins".encode("utf-16"), ("x.txt:1", "not UTF-8: it is UTF-16; save it as UTF-8")),
        (b"\n\nred \x1b[31m", ("x.txt:3", "control character: U+001B")),
    ],
)
def test_what_is_no_text_is_an_error_with_its_line(tmp_path, prepare, content, fault):
    (tmp_path / "x.txt").write_bytes(content)
    assert prepare(tmp_path / "x.txt").receipt.faults == (fault,)


def test_byte_order_marks_line_ends_and_form_feeds_are_ordinary(tmp_path, prepare, tiny_tokenizer):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfOne\r\ntwo\x0c\r\n")
    ids = prepare(tmp_path / "x.txt")[0].input_ids.tolist()
    assert tiny_tokenizer.decode(ids) == "One\ntwo\x0c\n<|im_end|>"


def test_special_tokens_in_a_text_are_ordinary_text(tmp_path, prepare, tiny_tokenizer):
    (tmp_path / "x.md").write_text("The <|im_end|> ends.")
    ids = prepare(tmp_path / "x.md")[0].input_ids.tolist()
    assert ids.count(tiny_tokenizer.eos_token_id) == 1


def test_texts_and_answers_are_never_taken_for_each_other(tmp_path, prepare, tiny_tokenizer):
    recipe, _ = choose_recipe(PromptSettings(), tiny_tokenizer)

    def as_answers(name):
        return prepare_dataset(DataSettings(train=str(tmp_path / name)), recipe, tiny_tokenizer)

    (tmp_path / "notes.md").write_text("Some text.")
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "Some text."}))
    answers = {"instruction": "When?", "output": "Now.", "text": "When? Now."}
    (tmp_path / "faq.jsonl").write_text(json.dumps(answers))
    with pytest.raises(DataError, match=r"notes\.md is a plain text.*objective\.name=text"):
        as_answers("notes.md")
    with pytest.raises(DataError, match=r"texts\.jsonl:1: .*a plain text, without question.*=text"):
        as_answers("texts.jsonl")
    with pytest.raises(
        DataError, match=r"faq\.jsonl:1: .*a row of Alpaca rows.*objective\.name=sft.*data\.format=text"
    ):
        prepare(tmp_path / "faq.jsonl")
    assert prepare(tmp_path / "faq.jsonl", format="text").receipt.used == 1
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no data file .*It holds texts.*objective\.name=text"):
        as_answers("only")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / ".x").touch()
    with pytest.raises(DataError, match=r"holds no text .*What is there is not read, hidden: \.x"):
        prepare(tmp_path / "nothing")
    with pytest.raises(SettingsError, match=r"data\.overlong is drop.*cut into pieces"):
        prepare(tmp_path / "notes.md", overlong="drop")
    with pytest.raises(SettingsError, match=r"prompt\.recipe is text.*objective\.name=text"):
        choose_recipe(PromptSettings(recipe="text"), tiny_tokenizer)


def test_a_long_text_is_read_in_parts_that_make_up_the_whole(tmp_path, prepare, monkeypatch, tiny_tokenizer):
    monkeypatch.setattr(documents, "PART_CHARS", 300)
    monkeypatch.setattr(documents, "_BLOCK_CHARS", 64)
    monkeypatch.setattr(dataset_module, "SHARD_CHARS", 700)
    text = "".join(random.Random(0).sample(PARAGRAPHS, len(PARAGRAPHS)))
    (tmp_path / "book.txt").write_text(text)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text + "The end."}))
    [document] = open_source(tmp_path / "book.txt", kind="documents").files[0].rows(documents.Position())
    parts = list(document.parts(documents.Position()))
    assert "".join(part.messages[0].content for part in parts) == text
    assert max(len(part.messages[0].content) for part in parts) <= 300
    assert all(part.messages[0].content.endswith("\n\n") for part in parts)
    assert [part.messages[0].role for part in parts] == ["part"] * (len(parts) - 1) + ["document"]
    lines = [int(part.where.removeprefix("book.txt:")) for part in parts]
    assert lines[1] == 1 + parts[0].messages[0].content.count("\n")

    dataset = prepare(tmp_path, max_seq_len=64)
    assert (dataset.receipt.used, dataset.receipt.divided) == (2, 2)
    assert set(dataset.documents.tolist()) == {0, 1}
    ends = [int(example.input_ids[-1]) for example in dataset]
    assert ends.count(tiny_tokenizer.eos_token_id) == 2
    assert len(list(tmp_path.glob("*"))) == 2


def test_the_fingerprint_is_of_all_files_and_names(notes, prepare):
    before = prepare(notes).fingerprint
    assert prepare(notes).fingerprint == before
    (notes / "deep" / "d.txt").write_text("More.")
    changed = prepare(notes).fingerprint
    (notes / "deep" / "d.txt").rename(notes / "deep" / "e.txt")
    assert len({before, changed, prepare(notes).fingerprint}) == 3
