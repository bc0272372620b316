"""TRL's way from a data file to packed rows: datasets.map and bfd packing, inside SFTTrainer's constructor.

    python data_trl.py ROWS.jsonl BASE MAX_SEQ_LEN WORKERS

The model is a tiny one, since the constructor wants one; it is made before the clock starts.
"""

import json
import sys
import tempfile
import time

import numpy as np
from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer


def main() -> None:
    rows, base, max_seq_len, workers = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    with tempfile.TemporaryDirectory() as cache:
        config = SFTConfig(
            output_dir=cache,
            packing=True,
            max_length=max_seq_len,
            dataset_num_proc=workers if workers > 1 else None,
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
        )
        started = time.perf_counter()
        dataset = load_dataset("json", data_files=rows, split="train", cache_dir=cache)
        loaded = time.perf_counter()
        trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
        packed = time.perf_counter()
        ids, labels, lengths = (
            np.concatenate([np.asarray(value) for value in trainer.train_dataset[name]])
            for name in ("input_ids", "labels", "seq_lengths")
        )
    result = {
        "seconds": packed - started,
        "load_seconds": loaded - started,
        "num_rows": len(lengths),
        "num_tokens": len(ids),
        "num_learnt": int((labels >= 0).sum()),
        "sum_of_ids": int(ids.sum()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
