"""Open a run as a transformers pipeline: the same prompt and the same end of an answer as everywhere else."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.pipelines import PIPELINE_REGISTRY

from lorasmith.data.example import Message
from lorasmith.generation.chat import Chat
from lorasmith.generation.instruct_pipeline import InstructionTextGenerationPipeline, Turns
from lorasmith.model.device import choose_device
from lorasmith.model.found import PIPELINE_TASK, Tell, find_model, say_nothing

# pipeline.save_pretrained() then saves the class's file too, and pipeline(PIPELINE_TASK, ...) finds it.
PIPELINE_REGISTRY.register_pipeline(
    PIPELINE_TASK, pipeline_class=InstructionTextGenerationPipeline, pt_model=AutoModelForCausalLM
)


def open_pipeline(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    base: str | None = None,
    tell: Tell = say_nothing,
) -> InstructionTextGenerationPipeline:
    """Open a run, an adapter, a merged folder or a base model as a transformers pipeline.

    Its greedy answers are those of ``open_chat``: the prompt is encoded by the recipe of run.json, and an answer
    ends where the recipe says. ``base`` as for ``open_chat``.

    Raises:
        LorasmithError: as ``open_chat``.
    """
    found = find_model(source, base=base, tell=tell)
    model: Any = found.load(choose_device(device, dtype))
    chat = Chat(model, found.tokenizer, found.recipe, name=found.name)

    def encode(turns: Turns) -> list[int]:
        return chat.encode_prompt([Message(turn["role"], turn["content"]) for turn in turns])  # type: ignore

    pad = found.tokenizer.pad_token_id
    ends = sorted(chat.stop_token_ids)
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=ends[0] if pad is None else pad
    )
    model.config.instruction_pipeline = found.recipe.answer_marks()
    return InstructionTextGenerationPipeline(
        model, found.tokenizer, task=PIPELINE_TASK, device=model.device, encode=encode
    )
