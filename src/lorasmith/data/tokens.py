"""Segments -> token ids, with the learnt ones marked.

    segments   <|im_start|>user\n | Hi </s> | <|im_end|>\n<|im_start|>assistant\n || Hello | <|im_end|>
    runs       S  "user\nHi </s>"  S "\n" S "assistant\n"                          || "Hello"  S

S is a special token that the template wrote: its one id. A run is the text between two of them, template and
content together, so that it is cut into tokens as the plain tokenizer would cut the whole string. Only the
border || between prompt and answer always ends a run: when the model is asked, the prompt ends there.
Inside a run, text that looks like a special token is ordinary text: "</s>" in a question ends nothing.
"""

import json
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from lorasmith.data.prompts import Segment, special_token_pattern, special_tokens
from lorasmith.data.words import WordTable, cuts_at_words
from lorasmith.errors import RecipeError

IGNORE_INDEX = -100

# Characters put before a run that continues a text, so that no tokenizer takes it for the text's start. The
# first one that stays a token of its own is used: "\n" does unless the run begins with another "\n".
_ANCHORS = ("\n", "a", ".", "=")


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One example as the model gets it.

    T is its number of tokens. ``labels`` is not shifted: ``labels[t]`` is ``input_ids[t]`` where token t is
    learnt, else IGNORE_INDEX.
    """

    input_ids: np.ndarray  # int32 [T]
    labels: np.ndarray  # int32 [T]
    where: str


def examples_per_row(dataset: Sequence[TokenizedExample]) -> int:
    """Return 2 where ``dataset`` holds pairs, the chosen example before the rejected one, else 1."""
    return getattr(dataset, "examples_per_row", 1)


def num_rows(dataset: Sequence[TokenizedExample]) -> int:
    """Return the examples of ``dataset``, a pair counted once: what a step's batch_size counts."""
    return len(dataset) // examples_per_row(dataset)


def documents_of(dataset: Sequence[TokenizedExample]) -> np.ndarray | None:
    """Return int [N], the number of the document that each example is a piece of; None where it is no plain text."""
    return getattr(dataset, "documents", None)


@dataclass(frozen=True, slots=True)
class _Run:
    """Text without special tokens, or one special token (then ``token_id`` is set).

    ``is_constant``: template text only, the same in the next example. ``needs_anchor``: the tokenizer would
    take the run for the start of a text, and it is not.
    """

    text: str
    is_learnt: bool
    is_constant: bool = True
    needs_anchor: bool = False
    token_id: int | None = None


class Encoder:
    """Cuts segments into tokens with the Rust tokenizer that a JSON text describes.

    A SentencePiece tokenizer puts a space before the first word of a text (some: also after each special
    token). A run in the middle of a text must not get one; it is encoded behind an anchor, whose ids are
    then dropped. Which runs need that is found out once, by trying the tokenizer on "a".

    ``remembers_words``: words that came before are not cut again, where the tokenizer allows it; the ids are
    the same.
    """

    def __init__(
        self, tokenizer_json: str, special_tokens: Sequence[str], *, remembers_words: bool = True
    ) -> None:
        values = json.loads(tokenizer_json)
        values["truncation"] = values["padding"] = None
        rules = {
            token["content"]: token
            for token in values["added_tokens"]
            if token["content"] in set(special_tokens)
        }
        for rule in rules.values():
            rule["special"] = True  # else the Rust side finds it in contents, whatever we ask
        self._tokenizer = Tokenizer.from_str(json.dumps(values))
        self._ids = {text: rule["id"] for text, rule in rules.items()}
        self._pattern = special_token_pattern(self._ids)
        self._eats_left = {text for text, rule in rules.items() if rule["lstrip"]}
        self._eats_right = {text for text, rule in rules.items() if rule["rstrip"]}
        after_special = self._plain(next(iter(rules)) + "a")[1:] if rules else None
        self._tokenizer.encode_special_tokens = True
        self._anchors = {anchor: self._plain(anchor) for anchor in _ANCHORS}
        self._marks_start = self._plain("a") != self._encode_anchored("a")
        self._marks_start_after_special = after_special == self._plain("a")
        self._constants: dict[tuple[str, bool], list[int]] = {}  # ids of template text, known once
        self._pieces: dict[str, tuple[tuple[str, int | None], ...]] = {}
        self._words = WordTable(self._tokenizer) if remembers_words and cuts_at_words(values) else None

    @classmethod
    def of(cls, tokenizer) -> "Encoder":
        """Return the encoder of a transformers tokenizer, the same one each time."""
        num_tokens, encoder = _encoders.get(tokenizer, (0, None))
        if encoder is None or num_tokens != len(tokenizer):  # tokens were added since
            encoder = cls(tokenizer_json(tokenizer), special_tokens(tokenizer))
            _encoders[tokenizer] = (len(tokenizer), encoder)
        return encoder

    def encode_many(self, conversations: Iterable[Sequence[Segment]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (input_ids int32 [T], is_learnt bool [T]) of each; one call into Rust for all of them."""
        rows = [self._split_into_runs(segments) for segments in conversations]
        texts = [run for runs in rows for run in runs if run.token_id is None]
        new = {(r.text, r.needs_anchor): r for r in texts if r.is_constant}
        new = {key: run for key, run in new.items() if key not in self._constants}
        self._constants |= zip(new, self._encode_runs(list(new.values())), strict=True)
        varying = iter(self._encode_runs([run for run in texts if not run.is_constant]))
        return [self._join(runs, varying) for runs in rows]

    def _join(self, runs: list[_Run], varying: Iterator[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        ids: list[int] = []
        learnt: list[slice] = []
        for run in runs:
            start = len(ids)
            if run.token_id is not None:
                ids.append(run.token_id)
            elif run.is_constant:
                ids += self._constants[run.text, run.needs_anchor]
            else:
                ids += next(varying)
            if run.is_learnt:
                learnt.append(slice(start, len(ids)))
        is_learnt = np.zeros(len(ids), dtype=bool)
        for span in learnt:
            is_learnt[span] = True
        return np.array(ids, dtype=np.int32), is_learnt

    def _split_into_runs(self, segments: Sequence[Segment]) -> list[_Run]:
        runs: list[_Run] = []
        pieces: list[str] = []
        is_learnt, is_constant, eats_space = False, True, False
        starts_section = self._marks_start  # a run that stands here would be given a space, and rightly so

        def close(keeps_right: bool = True) -> None:
            nonlocal is_constant, starts_section
            text = "".join(pieces) if keeps_right else "".join(pieces).rstrip()
            pieces.clear()
            if text:
                runs.append(_Run(text, is_learnt, is_constant, self._marks_start and not starts_section))
                starts_section = False
            is_constant = True

        for segment in segments:
            if segment.is_learnt != is_learnt:
                close()
                is_learnt = segment.is_learnt
            # A content is text, whatever it looks like.
            parts = ((segment.text, None),) if segment.is_content else self._split(segment.text)
            for text, token_id in parts:
                if token_id is not None:
                    close(keeps_right=text not in self._eats_left)
                    runs.append(_Run(text, is_learnt, token_id=token_id))
                    starts_section, eats_space = self._marks_start_after_special, text in self._eats_right
                    continue
                text = text.lstrip() if eats_space else text
                if text:
                    pieces.append(text)
                    is_constant = is_constant and not segment.is_content
                    eats_space = False
        close()
        return runs

    def _split(self, template_text: str) -> tuple[tuple[str, int | None], ...]:
        """Return (text, None) and (special token, its id) in order; the same few texts come again."""
        pieces = self._pieces.get(template_text)
        if pieces is None:
            found: list[tuple[str, int | None]] = []
            position = 0
            for match in self._pattern.finditer(template_text):
                found.append((template_text[position : match.start()], None))
                found.append((match.group(), self._ids[match.group()]))
                position = match.end()
            found.append((template_text[position:], None))
            pieces = self._pieces[template_text] = tuple(piece for piece in found if piece[0])
        return pieces

    def _encode_runs(self, runs: list[_Run]) -> list[list[int]]:
        if self._words is not None:
            return self._words.encode_many(run.text for run in runs)
        texts = [_ANCHORS[0] + run.text if run.needs_anchor else run.text for run in runs]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        anchor = self._anchors[_ANCHORS[0]]
        results = []
        for run, encoding in zip(runs, encodings, strict=True):
            ids = encoding.ids
            if run.needs_anchor:
                stands_alone = ids[: len(anchor)] == anchor
                ids = ids[len(anchor) :] if stands_alone else self._encode_anchored(run.text)
            results.append(ids)
        return results

    def _encode_anchored(self, text: str) -> list[int]:
        for anchor, anchor_ids in self._anchors.items():
            ids = self._plain(anchor + text)
            if ids[: len(anchor_ids)] == anchor_ids:
                return ids[len(anchor_ids) :]
        raise RecipeError(
            f"The tokenizer cannot cut a text in two: each of {list(_ANCHORS)} grows together with "
            f"{text[:40]!r}. lorasmith cannot use this tokenizer; please report it."
        )

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


_encoders: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def encode(segments: Sequence[Segment], tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return (input_ids int32 [T], is_learnt bool [T]) of one conversation.

    The ids equal plain tokenising of the whole text where no content holds special-token text and the border
    between prompt and answer is a border between tokens.

    Raises:
        RecipeError: the tokenizer has no Rust backend.
    """
    return Encoder.of(tokenizer).encode_many([segments])[0]


def label(input_ids: np.ndarray, is_learnt: np.ndarray) -> np.ndarray:
    """Return labels int32 [T]: the id where it is learnt, else IGNORE_INDEX."""
    return np.where(is_learnt, input_ids, np.int32(IGNORE_INDEX)).astype(np.int32, copy=False)


def truncate(
    input_ids: np.ndarray, is_learnt: np.ndarray, max_seq_len: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Cut an example to ``max_seq_len`` tokens such that it still ends with a learnt end token.

    Inside an answer the last kept place is given to the example's end token. A cut inside a later question
    goes back to the end of the answer before it. None where not one token of an answer would be left.

        max_seq_len 6   q q q a a a a E    ->   q q q a a E
                        q q a E q q q a E  ->   q q a E
                        q q q q q a a E    ->   None
    """
    if len(input_ids) <= max_seq_len:
        return input_ids, is_learnt
    cuts_answer = is_learnt[max_seq_len - 1] and is_learnt[max_seq_len - 2]
    if cuts_answer:
        ids = np.append(input_ids[: max_seq_len - 1], input_ids[-1])
        return ids, is_learnt[:max_seq_len]
    learnt = np.flatnonzero(is_learnt[: max_seq_len - 1])
    if len(learnt) == 0:
        return None
    end = int(learnt[-1]) + 1
    return input_ids[:end], is_learnt[:end]


def tokenizer_json(tokenizer) -> str:
    """Return the JSON of the Rust tokenizer inside a transformers tokenizer.

    Raises:
        RecipeError: it has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise RecipeError(
            f"The tokenizer is a {type(tokenizer).__name__} without a Rust backend (no tokenizer.json). "
            "lorasmith needs one: convert it with transformers' AutoTokenizer and save it, or choose "
            "another base."
        )
    return backend.to_str()
