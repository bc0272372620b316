"""What the model sees of an example, the learnt tokens marked."""

import itertools

from rich.text import Text

from lorasmith.data.tokens import IGNORE_INDEX, TokenizedExample


def decode_spans(example: TokenizedExample, tokenizer) -> list[tuple[str, bool]]:
    """Return (text, is_learnt) of each run of tokens that are learnt, or are not; special tokens stay visible."""
    is_learnt = (example.labels != IGNORE_INDEX).tolist()
    borders = [0, *(t for t in range(1, len(is_learnt)) if is_learnt[t] != is_learnt[t - 1]), len(is_learnt)]
    spans = []
    for start, stop in itertools.pairwise(borders):
        text = tokenizer.decode(
            example.input_ids[start:stop].tolist(),
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        spans.append((text, is_learnt[start]))
    return spans


def preview(example: TokenizedExample, tokenizer, *, has_colour: bool = True) -> Text:
    """Return the example as text: learnt parts in green, or in 「 」 where there are no colours."""
    shown = Text()
    for text, is_learnt in decode_spans(example, tokenizer):
        if not is_learnt:
            shown.append(text, style="dim")
        else:
            shown.append(text if has_colour else f"「{text}」", style="bold green")
    return shown
