"""LLaMA-Factory's way from a data file to packed rows: its get_dataset with neat_packing.

    python data_llamafactory.py ROWS.jsonl BASE MAX_SEQ_LEN WORKERS

Runs in its own environment. Its template "smollm2" is the built-in base's chat template, but for a full stop at
the end of the system prompt, which is set to the base's here.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import transformers  # noqa: F401  before the stand-in below, so that it knows that torchaudio is not there

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def main() -> None:
    rows, base, max_seq_len, workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    # Its audio plugin imports torchaudio, which has no build for torch without CUDA here; text never calls it.
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    with tempfile.TemporaryDirectory() as cache:
        info = Path(cache) / "dataset_info.json"
        info.write_text(json.dumps({"rows": {"file_name": str(rows.resolve())}}))
        model_args, data_args, training_args, _, _ = get_train_args(
            {
                "stage": "sft",
                "do_train": True,
                "model_name_or_path": base,
                "finetuning_type": "lora",
                "dataset": "rows",
                "dataset_dir": cache,
                "cache_dir": f"{cache}/cache",
                "template": "smollm2",
                "default_system": SYSTEM,
                "cutoff_len": max_seq_len,
                "packing": True,
                "neat_packing": True,
                "preprocessing_num_workers": workers if workers > 1 else None,
                "output_dir": f"{cache}/output",
                "report_to": "none",
                "use_cpu": True,
            }
        )
        modules = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(modules["tokenizer"], data_args)
        with contextlib.redirect_stdout(sys.stderr):
            started = time.perf_counter()
            dataset = get_dataset(template, model_args, data_args, training_args, stage="sft", **modules)
            packed = time.perf_counter()
        count_rows(dataset["train_dataset"], packed - started)


def count_rows(dataset, seconds: float) -> None:
    num_rows = num_tokens = num_learnt = sum_of_ids = 0
    for batch in dataset.with_format("numpy").iter(1000):
        ids, labels, owners = (np.stack(batch[name]) for name in ("input_ids", "labels", "attention_mask"))
        is_token = owners > 0  # neat_packing numbers the rows of a pack from 1; 0 is padding
        num_rows += int(owners.max(axis=1).sum())
        num_tokens += int(is_token.sum())
        num_learnt += int((labels >= 0).sum())
        sum_of_ids += int(ids[is_token].sum())
    result = {
        "seconds": seconds,
        "num_rows": num_rows,
        "num_tokens": num_tokens,
        "num_learnt": num_learnt,
        "sum_of_ids": sum_of_ids,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
