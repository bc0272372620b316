"""A text's ids are those of its words, in a row: compared with the tokenizer on the whole text."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from conftest import CORPUS
from lorasmith.data import words
from lorasmith.data.prompts import Segment
from lorasmith.data.tokens import Encoder
from lorasmith.data.words import WordTable, cuts_at_words

GPT2, LLAMA3, QWEN2 = sorted(words._PATTERNS, key=lambda p: (p.startswith("(?i"), "{1,3}" not in p))


def split(pattern, *first):
    steps = [
        *first,
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


KINDS = {
    "gpt2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2 written out": (None, split(GPT2)),
    "smollm": (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])),
    "llama3": (None, split(LLAMA3)),
    "qwen2": (normalizers.NFC(), split(QWEN2)),
}


def make(normalizer, pre_tokenizer):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "a  b   c\n\n d \t e 's 12 345 !? ..."] * 3, trainer)
    return tokenizer


TOKENIZERS = {kind: make(*parts) for kind, parts in KINDS.items()}
# Letters of every class that the patterns tell apart, and some that Python and Rust class differently.
LETTERS = st.text(
    st.sampled_from("ab'sSt19,.!\u0301\u00a0\u2028\u0085\x1c\x1f\u200b \n\r\t é字🦙"), max_size=60
)


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(st.one_of(LETTERS, st.text(max_size=40)), max_size=4))
@example(texts=["a 's b 'S  c\n d \n\ne 12 345 , .\r\n x", "a \u0301b", " a ", ""])
def test_words_in_a_row_are_the_whole_text(kind, texts):
    tokenizer = TOKENIZERS[kind]
    assert cuts_at_words(json.loads(tokenizer.to_str()))
    table = WordTable(tokenizer)
    whole = [tokenizer.encode(text).ids for text in texts]
    assert table.encode_many(texts) == whole
    assert table.encode_many(texts) == whole  # now from memory


def test_words_that_came_before_are_not_cut_again(monkeypatch):
    asked = []

    class Counted:
        def encode_batch_fast(self, texts, **options):
            asked.extend(texts)
            return TOKENIZERS["gpt2"].encode_batch_fast(texts, **options)

    table = WordTable(Counted())
    long = "x" * (words._LONGEST_WORD + 1)
    table.encode_many([f"when is payday {long}"])
    table.encode_many(["when is payday", f"is payday {long}"])
    assert sorted(asked) == sorted(["when", " is", " payday", f" {long}", "is", f" {long}"])
    monkeypatch.setattr(words, "_MOST_WORDS", len(table._ids))
    table.encode_many(["one more"])
    assert "one" not in table._ids


def test_other_tokenizers_are_left_alone():
    def changed(**parts):
        return {**json.loads(TOKENIZERS["gpt2"].to_str()), **parts}

    assert cuts_at_words(changed())
    assert not cuts_at_words(changed(pre_tokenizer=None))
    assert not cuts_at_words(changed(normalizer={"type": "Lowercase"}))
    assert not cuts_at_words(changed(model={"type": "Unigram"}))
    assert not cuts_at_words(changed(model={"type": "BPE", "dropout": 0.1}))
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    assert not cuts_at_words(changed(pre_tokenizer=metaspace))
    unknown = json.loads(make(None, split(r"\w+ \w+|.")).to_str())
    assert not cuts_at_words(unknown)
    prefixing = json.loads(make(None, pre_tokenizers.ByteLevel(add_prefix_space=True)).to_str())
    assert not cuts_at_words(prefixing)


@pytest.mark.parametrize("options", [{"lstrip": True}, {"single_word": True}, {"content": "two words"}])
def test_an_added_token_that_looks_over_spaces_forbids_it(options):
    tokenizer = make(*KINDS["gpt2"])
    tokenizer.add_tokens([AddedToken(**{"content": "tool", "normalized": False, **options})])
    assert not cuts_at_words(json.loads(tokenizer.to_str()))
    tokenizer = make(*KINDS["gpt2"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    assert cuts_at_words(json.loads(tokenizer.to_str()))
    text = "a <tool> b<tool>c"
    assert WordTable(tokenizer).encode_many([text]) == [tokenizer.encode(text).ids]


def test_the_switch_changes_nothing_but_the_way(tiny_tokenizer):
    text = tiny_tokenizer.backend_tokenizer.to_str()
    segments = [Segment("A: when  is payday?\n", False, True), Segment("the 25 th 's day", True, True)]
    both = [Encoder(text, ["<s>"], remembers_words=on).encode_many([segments] * 2) for on in (True, False)]
    for (ids, learnt), (plain_ids, plain_learnt) in zip(*both, strict=True):
        assert ids.tolist() == plain_ids.tolist()
        assert learnt.tolist() == plain_learnt.tolist()
