"""Give a merged folder Dolly's pipeline: the file with its class, and the lines in config.json that name it."""

import importlib.resources
import json
from pathlib import Path

from lorasmith.data.prompts import PromptRecipe
from lorasmith.model.found import PIPELINE_TASK

_FILE = "instruct_pipeline.py"


def write_pipeline_code(recipe: PromptRecipe, folder: Path) -> None:
    """Make ``transformers.pipeline(model=folder, trust_remote_code=True)`` answer as the recipe was trained.

    Pipelines that the base's config.json names ask as the base did; they are no longer named.
    """
    code = importlib.resources.files("lorasmith") / "generation" / _FILE
    (folder / _FILE).write_text(code.read_text("utf-8"), "utf-8")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["custom_pipelines"] = {
        PIPELINE_TASK: {
            "impl": f"{Path(_FILE).stem}.InstructionTextGenerationPipeline",
            "pt": ["AutoModelForCausalLM"],
        }
    }
    config["instruction_pipeline"] = recipe.answer_marks()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
