"""Models of real shapes with random weights, made from configs: nothing has to be downloaded."""

import json
import shutil
from pathlib import Path

SHAPES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}


def make_base(name: str, folder: Path, dtype: str = "float32", device: str = "cpu") -> Path:
    """Make a model of ``SHAPES[name]`` in ``folder``, with the built-in base's tokenizer; return the folder.

    A vocabulary smaller than the tokenizer's cuts the tokenizer: its last merges are left out, so that every
    id has a row. One that is larger keeps its rows, as the head's cost depends on them.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from lorasmith.model.base import resolve_base
    from lorasmith.model.settings import BaseSettings

    done = folder / "made"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(0)
    config = LlamaConfig(
        **SHAPES[name], max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder)
    del model
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # the contenders need the room
    built_in = resolve_base(BaseSettings()).folder
    for file in ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (built_in / file).is_file():
            shutil.copyfile(built_in / file, folder / file)
    tokenizer = json.loads((built_in / "tokenizer.json").read_text("utf-8"))
    cut_vocabulary(tokenizer, config.vocab_size)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    done.touch()
    return folder


def cut_vocabulary(tokenizer: dict, size: int) -> None:
    """Take the entries from ``size`` on out of a byte-pair tokenizer's JSON, and the merges that make them."""
    model = tokenizer["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < size}

    def makes(merge: str | list[str]) -> str:
        return "".join(merge.split(" ") if isinstance(merge, str) else merge)

    model["merges"] = [merge for merge in model["merges"] if makes(merge) in model["vocab"]]
