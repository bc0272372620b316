"""The preview shows the text as the model gets it, and marks what it learns."""

import numpy as np

from lorasmith.data.preview import decode_spans, preview
from lorasmith.data.tokens import TokenizedExample


def test_learnt_parts_are_marked(tiny_tokenizer):
    parts = [("<|im_start|>user\nPayday?", False), ("The 1st.<|im_end|>", True), ("\n", False), ("So.", True)]
    ids = [tiny_tokenizer(text).input_ids for text, _ in parts]
    labels = [part if learnt else [-100] * len(part) for part, (_, learnt) in zip(ids, parts, strict=True)]
    example = TokenizedExample(np.concatenate(ids), np.concatenate(labels), "rows.jsonl:1")
    assert decode_spans(example, tiny_tokenizer) == parts
    assert preview(example, tiny_tokenizer, has_colour=False).plain == (
        "<|im_start|>user\nPayday?「The 1st.<|im_end|>」\n「So.」"
    )
    coloured = preview(example, tiny_tokenizer)
    assert coloured.plain == "".join(text for text, _ in parts)
    assert [coloured.plain[s.start : s.end] for s in coloured.spans if "green" in str(s.style)] == [
        "The 1st.<|im_end|>",
        "So.",
    ]
