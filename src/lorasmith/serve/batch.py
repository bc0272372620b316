"""The rows that are answered together. Rows join and leave between tokens; each has its own adapter and settings.

    slots      0 1 2 3 4          5 6
               writing            reading: joined together, their prompts read chunk by chunk, left-padded
    forward    one token a row    a chunk of tokens a row

Shapes: B rows, T tokens, V vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from lorasmith.errors import LorasmithError
from lorasmith.generation.decode import last_of
from lorasmith.generation.sampler import Sampler
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.generation.stream import AnswerWriter, FinishReason
from lorasmith.model.memory import give_back_freed_memory
from lorasmith.serve.adapters import AdaptedRows, LoraWeights
from lorasmith.serve.beginnings import Beginning, Beginnings, count_usable
from lorasmith.serve.guide import Guide
from lorasmith.serve.slots import Place, SlotCache, SlotMasks, count_layers, left_pad

MIN_WORTH_WAITING = 64  # shared tokens for which a row lets another one read first


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer. Log probabilities are the model's own, before temperature; None unless asked for."""

    id: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """A part of an answer: its text, and the tokens that this text stands for, the end token among them."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None


class FailedError(LorasmithError):
    """Told to a row whose answer could not be computed: memory ran out, for one."""


Tell = Callable[[Delta | LorasmithError], None]


@dataclass(eq=False)
class Row:
    """One answer on its way. ``tell`` is called by the thread that owns the model and must return at once.

    ``num_top`` None: no log probabilities. ``need`` is the most tokens that it can come to hold.
    """

    prompt_ids: Sequence[int]
    adapter: LoraWeights | None
    sampling: SamplingSettings
    writer: AnswerWriter
    tell: Tell
    num_top: int | None = None
    guide: Guide | None = None
    is_cancelled: bool = False
    held: int = 0  # tokens whose keys stand in its slot
    shared: int = 0  # of them, those that were not read for it
    token_ids: list[int] = field(init=False)
    need: int = field(init=False)
    _untold: list[Token] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)
        self.need = len(self.prompt_ids) + self.writer.max_tokens
        self.sampler = Sampler(self.sampling)
        self.dice = self.sampler.new_dice()

    @property
    def num_unread(self) -> int:
        return len(self.token_ids) - self.held

    @property
    def is_over(self) -> bool:
        return self.is_cancelled or self.writer.finish_reason is not None

    def take(self, logits: torch.Tensor) -> None:
        """Choose the next token by ``logits`` [V] and tell what became final with it."""
        allowed = logits if self.guide is None else self.guide.restrict(logits)
        self.write(self.sampler.choose(allowed[None], [self.dice])[0], logits)

    def write(self, token_id: int, scores: torch.Tensor) -> None:
        """Add a token that was chosen by ``scores`` [V], and tell what became final with it."""
        if self.guide is not None and (fault := self.guide.accept(token_id)):
            self.is_cancelled = True
            self.tell(
                FailedError(f"The answer cannot follow its schema any further: {fault.splitlines()[0]}")
            )
            return
        self.token_ids.append(token_id)
        self._untold.append(_weigh(token_id, scores, self.num_top))
        text = self.writer.write(token_id)
        if text or self.writer.finish_reason:
            tokens, self._untold = tuple(self._untold), []
            self.tell(Delta(text, tokens, self.writer.finish_reason))


def _weigh(token_id: int, scores: torch.Tensor, num_top: int | None) -> Token:
    if num_top is None:
        return Token(token_id)
    logprobs = scores.log_softmax(dim=-1)
    values, ids = logprobs.topk(num_top)
    return Token(token_id, float(logprobs[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


class Batch:
    """The model and the rows that it answers now. Used by one thread."""

    def __init__(
        self, model: PreTrainedModel, *, max_rows: int, cache_tokens: int, kept_tokens: int, chunk_tokens: int
    ) -> None:
        self._model = model
        self._max_rows, self._cache_tokens, self._chunk_tokens = max_rows, cache_tokens, chunk_tokens
        self._cache = SlotCache(count_layers(model), max_slots=max_rows, max_tokens=cache_tokens)
        self._masks = SlotMasks(model)
        self._understood = inspect.signature(model.forward).parameters
        self._adapters = AdaptedRows(model)
        self.beginnings = Beginnings(kept_tokens)
        self.writing: list[Row] = []
        self.reading: list[Row] = []

    def __len__(self) -> int:
        return len(self.writing) + len(self.reading)

    def join(self, next_row: Callable[[], Row | None], take: Callable[[], Row]) -> None:
        """Let rows in, as ``next_row`` shows them, until one must wait; ``take`` removes the one shown.

        A row waits for a slot, for memory, for the rows that are being read, and for another row that reads most
        of the same prompt.
        """
        if self.reading:
            return
        while (row := next_row()) is not None and self._has_room(row):
            best, shared, source = self._find_beginning(row)
            unread = len(row.token_ids) - shared
            widest = max(unread, *(other.num_unread for other in self.reading), 0)
            is_too_wide = self.reading and widest * (len(self.reading) + 1) > self._chunk_tokens
            if is_too_wide or self._reads_the_same(row, shared):
                return
            assert take() is row
            slot = len(self)
            self.reading.append(row)
            self._make_room()
            if isinstance(source, Beginning):
                self._cache.put(slot, source.kept, shared)
            elif best is not None:
                self._cache.copy(best, slot, shared)
            row.held = row.shared = shared

    def _has_room(self, row: Row) -> bool:
        if len(self) >= self._max_rows:
            return False
        longest = max([row.need, *(other.need for other in (*self.writing, *self.reading))])
        return len(self) == 0 or (len(self) + 1) * longest <= self._cache_tokens

    def _make_room(self) -> None:
        self._cache.make_room(len(self), max(row.need for row in (*self.writing, *self.reading)))

    def _reads_the_same(self, row: Row, shared: int) -> bool:
        return any(
            other.adapter is row.adapter
            and count_usable(other.token_ids, row.token_ids) - shared >= MIN_WORTH_WAITING
            for other in self.reading
        )

    def _find_beginning(self, row: Row) -> tuple[int | None, int, Beginning | None]:
        """Return who holds most of the row's beginning: a slot or a finished row's, and how many tokens."""
        found = self.beginnings.find(row.adapter, row.token_ids)
        source, shared = found or (None, 0)
        best = None
        for slot, other in enumerate(self.writing):
            if other.adapter is row.adapter:
                usable = count_usable(other.token_ids[: other.held], row.token_ids)
                if usable > shared:
                    best, shared, source = slot, usable, None
        return best, shared, source

    def read(self) -> None:
        """Read the next chunk of the joined rows' prompts; after the last one each has its first token."""
        rows = self.reading
        left = max(row.num_unread for row in rows)
        width = min(left, max(1, self._chunk_tokens // len(rows)))
        counts = [max(0, min(row.num_unread, left) - (left - width)) for row in rows]
        chunks = [row.token_ids[row.held : row.held + count] for row, count in zip(rows, counts, strict=True)]
        spans = [range(row.held, row.held + count) for row, count in zip(rows, counts, strict=True)]
        logits = self._forward(
            rows,
            len(self.writing),
            left_pad(chunks, width, 0),
            left_pad(spans, width, 0),
            left_pad(spans, width, self._cache.num_columns - 1),
        )
        for row, count in zip(rows, counts, strict=True):
            row.held += count
        if left == width:
            self.writing += rows
            self.reading = []
            self._take(rows, logits)

    def write(self) -> None:
        """Add a token to every row that is being written."""
        rows = self.writing
        ids = torch.tensor([[row.token_ids[-1]] for row in rows])
        positions = torch.tensor([[row.held] for row in rows])
        logits = self._forward(rows, 0, ids, positions, positions)
        for row in rows:
            row.held += 1
        self._take(rows, logits)

    def _take(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        likeliest = logits.argmax(dim=-1).tolist()
        for row, scores, token_id in zip(rows, logits, likeliest, strict=True):
            if row.is_cancelled:
                continue
            if row.sampling.is_greedy and row.guide is None:
                row.write(token_id, scores)
            else:
                row.take(scores)

    @torch.inference_mode()
    def _forward(
        self,
        rows: Sequence[Row],
        first: int,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        columns: torch.Tensor,
    ) -> torch.Tensor:
        """Read ``input_ids`` [B, T] into the slots from ``first`` on; return float32 logits of the last ones [B, V]."""
        device = self._model.device
        positions = positions.to(device)
        width = int(positions.max()) + 1
        self._adapters.choose([row.adapter for row in rows])
        self._cache.place = Place(first, columns.to(device), width)
        optional = {"position_ids": positions, "logits_to_keep": last_of(positions)}
        logits = self._model(
            input_ids=input_ids.to(device),
            attention_mask=self._masks.of(positions, width),
            past_key_values=self._cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self._understood},
        ).logits
        return logits[:, -1].float()

    def leave(self) -> list[Row]:
        """Take out the rows that are over and return them; what they read is kept for others that begin alike."""
        gone = [row for row in self.writing if row.is_over]
        for row in gone:
            slot = self.writing.index(row)
            self.beginnings.add(
                Beginning(row.adapter, tuple(row.token_ids[: row.held]), self._cache.take(slot, row.held))
            )
            self._remove(slot)
        if self.reading and all(row.is_cancelled for row in self.reading):
            gone += self.reading
            self.reading = []
        if gone and not len(self):
            self._cache.release()
        return gone

    def _remove(self, slot: int) -> None:
        """Close the gap: the last row that is written moves there, and a row that is read moves after it."""
        last = self.writing.pop()
        end = len(self.writing)
        if slot != end:
            self._cache.copy(end, slot, last.held)
            self.writing[slot] = last
        if self.reading:
            moved = self.reading.pop()
            self._cache.copy(end + 1 + len(self.reading), end, moved.held)
            self.reading.insert(0, moved)

    def forget(self, adapter: LoraWeights) -> None:
        """Drop what is kept of an adapter that no row has."""
        self.beginnings.forget(adapter)
        self._adapters.forget(adapter)
        give_back_freed_memory()  # each adapter is read by another thread, and glibc keeps what was freed by thread

    def drop(self) -> list[Row]:
        """Give up all rows and all memory, after a fault."""
        gone = [*self.writing, *self.reading]
        self.writing, self.reading = [], []
        self._cache.release()
        return gone
