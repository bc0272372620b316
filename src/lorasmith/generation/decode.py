"""Prompt ids -> the next token, again and again: the visible loop behind every answer.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

import copy
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lorasmith.generation.sampler import Sampler
from lorasmith.generation.stream import AnswerWriter
from lorasmith.model.methods import num_virtual_tokens

_ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)

MIN_SHARED_TOKENS = 4  # a shorter common beginning is not worth a forward of its own
# That a group must save: a batch's 64 decoding steps cost about as much as reading them.
MIN_SAVED_TOKENS = 512
MAX_BATCH_TOKENS = 16_384  # bounds the keys and values: 0.8 GB for a 135M model in float32


class NextToken:
    """The model as the loop sees it: token ids in, float32 logits of the last position [B, V] out.

    ``without_adapter`` switches the adapter off for the length of each forward, and no longer: two of these
    over one model can be used in turn, and from two threads, and a model that is being trained stays as it
    was (its dropout is off while it answers).
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model
        self._turn = threading.Lock()
        self._switched_off: list[BaseTunerLayer | AuxiliaryTrainingWrapper] = []
        bare = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(bare, PreTrainedModel)
        self._bare = bare
        self._num_virtual = num_virtual_tokens(model)
        self._understood = inspect.signature(bare.forward).parameters
        self._config = bare.config.get_text_config(decoder=True)

    def without_adapter(self) -> "NextToken":
        """Return the same weights with the adapter off; the two take turns."""
        bare = NextToken(self.model)
        bare._turn = self._turn
        bare._switched_off = [part for part in self.model.modules() if isinstance(part, _ADAPTED)]
        if self._num_virtual:  # the base itself is all there is without them
            bare.model, bare._num_virtual = self._bare, 0
        return bare

    @property
    def max_context(self) -> int | None:
        """The longest sequence the model was made for, in tokens; None where its config names none."""
        longest = getattr(self._config, "max_position_embeddings", None)
        return longest and longest - self._num_virtual

    @torch.inference_mode()
    def new_cache(self) -> DynamicCache:
        """Return a cache in which nothing has been read but a method's virtual tokens, where it has any."""
        if not self._num_virtual:
            return DynamicCache(config=self._config)
        model: Any = self.model
        with self.answering():
            start = model.get_prompt(batch_size=1)
            if isinstance(start, DynamicCache):  # prefix tuning: keys and values of every layer
                return start
            cache = DynamicCache(config=self._config)
            self._bare(
                inputs_embeds=start.to(self._bare.dtype),
                past_key_values=cache,
                use_cache=True,
                **({"logits_to_keep": last_of(start)} if "logits_to_keep" in self._understood else {}),
            )
            return cache

    @torch.inference_mode()
    def __call__(
        self, input_ids: torch.Tensor, cache: Cache, mask: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """Read ``input_ids`` [B, T] after what ``cache`` holds, and extend it; ``mask`` is [B, held + T]."""
        device = self.model.device
        if self._num_virtual:  # they stand before every row, and the cache holds them
            mask = torch.cat([mask.new_ones(len(mask), self._num_virtual), mask], dim=1)
            position_ids = position_ids + self._num_virtual
        input_ids = input_ids.to(device)
        optional = {"position_ids": position_ids.to(device), "logits_to_keep": last_of(input_ids)}
        with self.answering() as model:
            reader: Any = self._bare if self._num_virtual else model
            logits = reader(
                input_ids=input_ids,
                attention_mask=mask.to(device),
                past_key_values=cache,
                use_cache=True,
                **{name: value for name, value in optional.items() if name in self._understood},
            ).logits
        return logits[:, -1].float()

    @contextmanager
    def answering(self) -> Iterator[PreTrainedModel | PeftModel]:
        """Lend the model to one at a time: in eval mode, its adapter off where this is the untuned side."""
        with self._turn, self._switched():
            yield self.model

    @contextmanager
    def _switched(self) -> Iterator[None]:
        in_training = [part for part in self.model.modules() if part.training] if self.model.training else []
        if in_training:
            self.model.eval()
        # PEFT's own disable_adapter() takes longer than a token of a small model (it inspects every module,
        # 0.1 s for 135M) and leaves frozen adapters marked as trainable; its flag is all that a forward
        # looks at.
        for part in self._switched_off:
            part._disable_adapters = True
        try:
            yield
        finally:
            for part in self._switched_off:
                part._disable_adapters = False
            for part in in_training:
                part.training = True


def last_of(inputs: torch.Tensor) -> torch.Tensor:
    """Return the last position of ``inputs`` [B, T, ...] as transformers' ``logits_to_keep``, int64 [1].

    As a number, 1, it makes the model cut a view out of the hidden states, which torch multiplies by a copy of the
    head for every row: at 32 rows of a 135M model in bfloat16 on a CPU 1.5 s and 1.8 GB, instead of 9 ms by the index.
    """
    return torch.full((1,), inputs.shape[1] - 1, device=inputs.device)


@dataclass
class KeptTurn:
    """The keys and values of the last prompt and answer, for a next prompt that begins with the same tokens.

    The next turn of a conversation, or another question under the same system prompt, reads only its new
    tokens. Whoever decodes takes the cache out and puts it back when done, so that no two answers ever write
    to one cache. Only plain attention layers can be shortened to any length: others always start anew.
    """

    token_ids: list[int]
    cache: DynamicCache | None = None

    def take(self, prompt_ids: Sequence[int]) -> tuple[DynamicCache, int] | None:
        """Return the cache of the common beginning and its length; at least one token is left to be read."""
        cache, self.cache = self.cache, None
        if cache is None:
            return None
        shared = min(count_shared([self.token_ids, prompt_ids]), len(prompt_ids) - 1)
        if shared < MIN_SHARED_TOKENS:
            return None
        cache.crop(shared - len(self.token_ids))
        return cache, shared

    def put(self, token_ids: list[int], cache: DynamicCache) -> None:
        if is_plain(cache):
            self.token_ids, self.cache = token_ids, cache


def is_plain(cache: DynamicCache) -> bool:
    """Say whether every layer keeps all keys and values: no sliding window, no recurrent state."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def count_shared(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the common beginning of all ``sequences``."""
    rows = [tuple(sequence) for sequence in sequences]
    first, last = min(rows), max(rows)  # in the order of a dictionary, so no two differ earlier
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def decode(
    next_token: NextToken, prompt_ids: Sequence[int], sampler: Sampler, writer: AnswerWriter, kept: KeptTurn
) -> Iterator[str]:
    """Decode one answer; yield the text that becomes final with each token (often empty)."""
    cache, held = kept.take(prompt_ids) or (next_token.new_cache(), 0)
    dice = [sampler.new_dice()]
    unread = list(prompt_ids[held:])
    is_whole = True  # false while a forward is under way: an interrupt leaves some layers behind others
    try:
        while writer.finish_reason is None:
            is_whole = False
            logits = next_token(
                torch.tensor([unread]),
                cache,
                mask=torch.ones(1, held + len(unread), dtype=torch.long),
                position_ids=torch.arange(held, held + len(unread))[None],
            )
            held += len(unread)
            is_whole = True
            unread = sampler.choose(logits, dice)
            yield writer.write(unread[0])
    finally:
        if is_whole:
            kept.put([*prompt_ids, *writer.token_ids][:held], cache)


def decode_many(
    next_token: NextToken,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    writers: Sequence[AnswerWriter],
    *,
    batch_size: int,
    on_finished: Callable[[], None],
) -> None:
    """Decode every prompt into the writer of the same index; ``on_finished`` is called when some are done.

    What the prompts of a group have in common is read once. In a group, prompts of like length share a batch,
    the longest first.
    """
    for group in group_by_beginning(prompts):
        shared = _read_shared(next_token, [prompts[row] for row in group])
        lengths = [len(prompts[row]) + writers[row].max_tokens for row in group]
        for places in plan_batches(lengths, batch_size):
            rows = [group[place] for place in places]
            _decode_batch(
                next_token,
                [list(prompts[row]) for row in rows],
                shared,
                sampler,
                [writers[row] for row in rows],
                on_finished,
            )


def group_by_beginning(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return all row numbers, in groups that are worth reading their common beginning once.

    Ten questions on each of five documents, under one system prompt, are five groups; ninety short questions
    under it are one: a group of its own is one more batch to decode, and must save more than that.

        s d d d d q      s + document d
        s d d d d r
        s e e e e q      s + document e
        s e e e e t u
        s v              s alone
    """
    order = sorted(range(len(prompts)), key=lambda row: tuple(prompts[row]))
    shared = [count_shared([prompts[a], prompts[b]]) for a, b in itertools.pairwise(order)]
    groups: list[list[int]] = []

    def gather(low: int, high: int, held: int) -> list[int]:
        """Add the groups among order[low:high], and return the rows that stay with those sharing ``held`` tokens."""
        if high - low < 2 or (max(shared[low : high - 1]) - held) * (high - low - 1) < MIN_SAVED_TOKENS:
            return order[low:high]
        common = min(shared[low : high - 1])
        is_group = (common - held) * (high - low - 1) >= MIN_SAVED_TOKENS
        cuts = [low, *(at + 1 for at in range(low, high - 1) if shared[at] == common), high]
        staying = [
            row for a, b in itertools.pairwise(cuts) for row in gather(a, b, common if is_group else held)
        ]
        if is_group and staying:
            groups.append(staying)
        return [] if is_group else staying

    rest = gather(0, len(order), 0)
    return [*groups, rest] if rest else groups


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return batches of row numbers, the longest rows first, none above MAX_BATCH_TOKENS when padded.

    ``lengths`` are those of prompts with the longest answers that they may get.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        newest = batches[-1] if batches else []
        fits = (
            newest and len(newest) < batch_size and lengths[newest[0]] * (len(newest) + 1) <= MAX_BATCH_TOKENS
        )
        if fits:
            newest.append(row)
        else:
            batches.append([row])
    return batches


@dataclass(frozen=True)
class SharedStart:
    """The beginning that all prompts have in common, read once as a batch of one row."""

    num_tokens: int
    cache: DynamicCache

    def spread(self, num_rows: int) -> DynamicCache:
        """Return a cache of its own for ``num_rows`` rows, each of which begins like this."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(num_rows)
        return cache


@torch.inference_mode()
def _read_shared(next_token: NextToken, prompts: Sequence[Sequence[int]]) -> SharedStart:
    """Read the common beginning of all prompts, leaving each at least one token of its own.

    Nothing is shared where a layer is not plain: the padding between the shared tokens and a row's own ones
    would count as distance in a sliding window.
    """
    cache = next_token.new_cache()
    num_tokens = min(count_shared(prompts), min(map(len, prompts)) - 1)
    if len(prompts) == 1 or num_tokens < MIN_SHARED_TOKENS or not is_plain(cache):
        return SharedStart(0, cache)
    ids = torch.tensor([list(prompts[0][:num_tokens])])
    next_token(ids, cache, mask=torch.ones_like(ids), position_ids=torch.arange(num_tokens)[None])
    return SharedStart(num_tokens, cache)


@torch.inference_mode()
def _decode_batch(
    next_token: NextToken,
    prompts: Sequence[Sequence[int]],
    shared: SharedStart,
    sampler: Sampler,
    writers: Sequence[AnswerWriter],
    on_finished: Callable[[], None],
) -> None:
    """Decode a batch, whose rows leave it as they finish.

    Each row is padded between the shared beginning (s) and its own tokens (p, q), so that all rows end in the
    same column; positions do not count the padding:

        ids        s s s _ p p        mask   1 1 1 0 1 1        positions   0 1 2 _ 3 4
                   s s s q q q               1 1 1 1 1 1                    0 1 2 3 4 5
    """
    own = [list(prompt[shared.num_tokens :]) for prompt in prompts]
    width = max(map(len, own))
    input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in own])
    mask = torch.tensor([[1] * shared.num_tokens + [0] * (width - len(ids)) + [1] * len(ids) for ids in own])
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, shared.num_tokens :]
    cache = shared.spread(len(prompts))
    dice = [sampler.new_dice() for _ in prompts]
    writing = list(writers)
    while True:
        token_ids = sampler.choose(next_token(input_ids, cache, mask, position_ids), dice)
        for writer, token_id in zip(writing, token_ids, strict=True):
            writer.write(token_id)
        going_on = [row for row, writer in enumerate(writing) if writer.finish_reason is None]
        if len(going_on) < len(writing):
            on_finished()
            if not going_on:
                return
            cache.batch_select_indices(torch.tensor(going_on))
            writing = [writing[row] for row in going_on]
            dice = [dice[row] for row in going_on]
        input_ids = torch.tensor([[token_ids[row]] for row in going_on])
        position_ids = position_ids[going_on, -1:] + 1
        mask = torch.cat([mask[going_on], mask.new_ones(len(going_on), 1)], dim=1)
