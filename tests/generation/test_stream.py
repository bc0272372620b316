"""Text comes out whole: no half characters, no part of a stop string, no special tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.generation.stream import AnswerWriter, StopGuard, TextDecoder

PAD, START, END = 0, 1, 2


def new_writer(tokenizer, stop=(), max_tokens=100, lead=""):
    return AnswerWriter(
        tokenizer,
        stop_token_ids={END},
        hidden_token_ids={PAD, START, END},
        stop=stop,
        max_tokens=max_tokens,
        lead=lead,
    )


def write_all(writer, ids):
    """Return the pieces of text that came out until the answer was finished."""
    pieces = []
    for token_id in ids:
        pieces.append(writer.write(token_id))
        if writer.finish_reason:
            break
    return pieces


@pytest.mark.parametrize("text", ["plain words", "Sài Gòn, Đà Nẵng", "🙂👩‍👩‍👧 ok", "\n a\n\n  b", "𝄞"])
def test_pieces_are_whole_and_add_up(tiny_tokenizer, text):
    ids = tiny_tokenizer(text, add_special_tokens=False).input_ids
    decoder = TextDecoder(tiny_tokenizer)
    pieces = [decoder.push(token_id) for token_id in ids] + [decoder.flush()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 1 or len(text) == 1  # it did stream


def test_a_sentencepiece_tokenizer_keeps_its_spaces():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁The": 256, "▁office": 257, "s": 258}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    decoder = TextDecoder(wrapped)
    ids = [256, 257, 258, *"é".encode(), 257]
    assert [decoder.push(token_id) for token_id in ids] == ["The", " office", "s", "", "é", " office"]


def test_an_unfinished_last_character_is_left_out(tiny_tokenizer):
    ids = tiny_tokenizer("ok 🙂", add_special_tokens=False).input_ids
    writer = new_writer(tiny_tokenizer, max_tokens=len(ids) - 1)
    write_all(writer, ids)
    assert (writer.text, writer.finish_reason) == ("ok ", "length")


def test_the_end_token_stops_and_has_no_text(tiny_tokenizer):
    ids = tiny_tokenizer("Payday.", add_special_tokens=False).input_ids
    writer = new_writer(tiny_tokenizer)
    write_all(writer, [*ids, END, *ids])
    assert (writer.text, writer.finish_reason, writer.token_ids) == ("Payday.", "stop", [*ids, END])


def test_the_end_token_at_the_last_allowed_place_is_a_stop(tiny_tokenizer):
    writer = new_writer(tiny_tokenizer, max_tokens=1)
    write_all(writer, [END])
    assert writer.finish_reason == "stop"


def test_special_tokens_are_not_shown(tiny_tokenizer):
    ids = tiny_tokenizer("a b", add_special_tokens=False).input_ids
    writer = new_writer(tiny_tokenizer)
    write_all(writer, [START, *ids, PAD, *ids, END])
    assert writer.text == "a ba b"


def test_a_stop_string_spread_over_pieces_is_never_shown(tiny_tokenizer):
    ids = tiny_tokenizer("yes### Inst no", add_special_tokens=False).input_ids
    assert len(ids) > 6
    writer = new_writer(tiny_tokenizer, stop=("### Inst",))
    pieces = write_all(writer, ids)
    assert "".join(pieces) == writer.text == "yes"
    assert writer.finish_reason == "stop"


def test_a_stop_string_that_stays_unfinished_is_shown_at_the_end(tiny_tokenizer):
    ids = tiny_tokenizer("yes ##", add_special_tokens=False).input_ids
    writer = new_writer(tiny_tokenizer, stop=("###",))
    write_all(writer, [*ids, END])
    assert writer.text == "yes ##"


def test_the_earliest_of_several_stop_strings_wins():
    guard = StopGuard(("cd", "bcdx", "b"))
    assert (guard.push("abcd"), guard.found) == ("a", True)


@given(text=st.text("ab\n", max_size=12), stop=st.text("ab\n", min_size=1, max_size=4), cuts=st.data())
@settings(max_examples=300, deadline=None)
def test_the_guard_equals_cutting_the_whole_text(text, stop, cuts):
    guard, shown, rest = StopGuard((stop,)), "", text
    while rest and not guard.found:
        size = cuts.draw(st.integers(1, len(rest)))
        shown += guard.push(rest[:size])
        rest = rest[size:]
        assert text.partition(stop)[0].startswith(shown)
    assert guard.found == (stop in text)
    assert shown + ("" if guard.found else guard.flush()) == text.partition(stop)[0]


@given(ids=st.lists(st.integers(3, 399), max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_ids_add_up_to_what_the_tokenizer_decodes(tiny_tokenizer, ids):
    decoder = TextDecoder(tiny_tokenizer)
    shown = "".join(decoder.push(token_id) for token_id in ids) + decoder.flush()
    assert shown.rstrip("\ufffd") == tiny_tokenizer.decode(ids).rstrip("\ufffd")


@pytest.mark.parametrize(
    ("written", "shown"), [(" Paris is", "Paris is"), ("  Paris", " Paris"), ("Paris", "Paris")]
)
def test_the_space_that_the_template_writes_before_an_answer_is_not_shown(tiny_tokenizer, written, shown):
    writer = new_writer(tiny_tokenizer, lead=" ")
    pieces = [writer.write(i) for i in tiny_tokenizer(written, add_special_tokens=False).input_ids]
    pieces.append(writer.write(tiny_tokenizer.eos_token_id))
    assert writer.text == "".join(pieces) == shown
