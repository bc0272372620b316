"""Prove a .gguf file: real llama.cpp answers as the merged model does, and its weights cost so much perplexity.

The only module that imports xllamacpp, which brings llama.cpp as a wheel.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorasmith.data.prompts import PromptRecipe
from lorasmith.errors import MissingExtraError
from lorasmith.export.proof import ANSWER_TOKENS, answer_greedily
from lorasmith.model.base import ResolvedBase, load_base, resolve_base
from lorasmith.model.device import DeviceChoice
from lorasmith.model.memory import give_back_freed_memory
from lorasmith.model.settings import BaseSettings

NUM_QUESTIONS = 20
# Least share of equal greedy answers. Four bits round so much that no share can be promised: it is only told.
LEAST_AGREEING = {"f32": 1.0, "f16": 1.0, "bf16": 0.9, "q8_0": 0.9, "q4_0": 0.0}


@dataclass(frozen=True)
class GgufProof:
    """How the file's answers and perplexity compare with those of the merged model.

    Answers are greedy, by llama.cpp. Perplexity is that of the questions and the merged model's answers, computed
    in float32 by transformers from the file's dequantised weights.
    """

    quant: str
    num_questions: int
    num_same_answers: int
    perplexity_merged: float
    perplexity_gguf: float

    @property
    def is_faithful(self) -> bool:
        return self.num_same_answers >= LEAST_AGREEING[self.quant] * self.num_questions

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def require_llama_cpp() -> None:
    """Raise MissingExtraError unless llama.cpp is installed."""
    _import()


def prove(
    merged: ResolvedBase,
    file: Path,
    prompts: Sequence[Sequence[int]],
    recipe: PromptRecipe,
    tokenizer,
    quant: str,
) -> GgufProof:
    """Return how ``file`` compares with the merged model over ``prompts`` (token ids).

    Raises:
        MissingExtraError: xllamacpp is not installed. BaseModelError: transformers cannot read the file.
    """
    stops = recipe.stop_token_ids(tokenizer)
    choice = DeviceChoice(torch.device("cpu"), torch.float32, "to compare")
    model = load_base(merged, choice)
    answers = [list(answer.tokens) for answer in answer_greedily(model, prompts, stops)]
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    expected = [tokenizer.decode([t for t in answer if t not in stops]) for answer in answers]
    perplexity = _perplexity(model, texts)
    del model
    give_back_freed_memory()
    read_back = load_base(resolve_base(BaseSettings(model=str(file))), choice)
    perplexity_gguf = _perplexity(read_back, texts)
    del read_back
    give_back_freed_memory()
    said = answer_with_llama_cpp(file, prompts)
    same = sum(one.strip() == other.strip() for one, other in zip(expected, said, strict=True))
    return GgufProof(quant, len(prompts), same, perplexity, perplexity_gguf)


def answer_with_llama_cpp(
    file: Path, prompts: Sequence[Sequence[int]], lora: Path | None = None
) -> list[str]:
    """Return llama.cpp's greedy answer to each prompt of token ids."""
    xllamacpp = _import()
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = max(map(len, prompts)) + ANSWER_TOKENS + 8
    params.n_parallel = 1
    params.verbosity = -1
    params.warmup = False
    # Rounding of its own, such as a cache in float16, would part answers that the file's weights do not part.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(params)
    answers = []
    for prompt in prompts:
        asked = {"prompt": list(prompt), "n_predict": ANSWER_TOKENS, "temperature": 0, "cache_prompt": False}
        answers.append(server.handle_completions(asked)["choices"][0]["text"])
    return answers


def _perplexity(model: Any, texts: Sequence[Sequence[int]]) -> float:
    losses = []
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([text])
            losses.append(
                torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            )
    return float(torch.cat(losses).mean().exp())


def _import() -> Any:
    try:
        import xllamacpp
    except ImportError as fault:
        raise MissingExtraError("The proof by llama.cpp", "xllamacpp", "llama-cpp") from fault
    return xllamacpp
