"""lorasmith's way from a data file to packs, once, with an empty cache.

    python data_lorasmith.py ROWS.jsonl BASE MAX_SEQ_LEN

Packs are laid out for every step of an epoch of BATCH_SIZE examples, in a seeded order. lorasmith decides by
itself how many processes it takes: one a core where the rows are many.
"""

import json
import sys
import tempfile
import time

import numpy as np
from transformers import AutoTokenizer

from lorasmith.data.dataset import prepare_dataset
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import DataSettings, PromptSettings
from lorasmith.packing.trie import pack_examples

BATCH_SIZE = 32


def main() -> None:
    rows, base, max_seq_len = sys.argv[1], sys.argv[2], int(sys.argv[3])
    tokenizer = AutoTokenizer.from_pretrained(base)
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        data = DataSettings(train=rows, max_seq_len=max_seq_len, cache_dir=cache)
        recipe, _ = choose_recipe(PromptSettings(recipe="chat"), tokenizer)
        dataset = prepare_dataset(data, recipe, tokenizer)
        tokenised = time.perf_counter()
        order = np.random.default_rng(0).permutation(len(dataset))
        num_packed = 0
        for low in range(0, len(order), BATCH_SIZE):
            packs = pack_examples(dataset, order[low : low + BATCH_SIZE].tolist(), max_tokens=8192)
            num_packed += sum(pack.num_tokens for pack in packs)
        packed = time.perf_counter()
        examples = [dataset[i] for i in range(len(dataset))]
    result = {
        "seconds": packed - started,
        "tokenise_seconds": tokenised - started,
        "pack_seconds": packed - tokenised,
        "num_rows": len(examples),
        "num_tokens": sum(len(example.input_ids) for example in examples),
        "num_learnt": sum(int((example.labels >= 0).sum()) for example in examples),
        "sum_of_ids": sum(int(example.input_ids.sum()) for example in examples),
        "num_packed": num_packed,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
