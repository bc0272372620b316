"""Merging: the merged folder is base + adapter, proven, and a wrong one is refused and leaves nothing."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorasmith.export.fold as fold_module
from conftest import make_tiny_model
from lorasmith.data.example import Message
from lorasmith.data.prompts import PromptRecipe, choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.errors import AdapterError, BaseModelError, MergeError, RunError
from lorasmith.export.merge import merge
from lorasmith.model.adapter import save_adapter
from lorasmith.model.base import resolve_base
from lorasmith.model.method_settings import LoraSettings
from lorasmith.model.methods import attach_adapter
from lorasmith.model.run_record import RunRecord, write_run_record
from lorasmith.model.settings import BaseSettings

IDS = torch.tensor([[1, 17, 60, 200, 5, 9, 320, 44]])
QUESTIONS = [(Message("user", text),) for text in ("When is payday?", "Where is the office?", "gm", "2 + 2?")]


def fill(adapted, seed=0):
    """Give the adapter numbers as training would: enough to change answers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


def make_base(folder: Path, tokenizer, family="llama", dtype=torch.float32) -> Path:
    make_tiny_model(family).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_run(run_dir: Path, base: Path, tokenizer, prompt=None, **method) -> Path:
    """Write a run folder as training leaves it."""
    recipe, _ = choose_recipe(prompt or PromptSettings(), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = fill(attach_adapter(model, LoraSettings(r=4, lora_alpha=8, **method), seed=0))
    save_adapter(adapted, run_dir / "adapter")
    record = RunRecord(
        name=run_dir.name,
        base=resolve_base(BaseSettings(model=str(base))).ref,
        recipe=recipe.to_json(),
        settings={},
        data={},
        result={},
    )
    write_run_record(run_dir, record)
    return run_dir


@pytest.fixture
def run(tmp_path, tiny_base_folder, tiny_tokenizer):
    return make_run(tmp_path / "run", tiny_base_folder, tiny_tokenizer)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def with_adapter(base, adapter):
    return PeftModel.from_pretrained(plain(base), str(adapter))


def test_plain_transformers_opens_it_with_the_logits_of_base_plus_adapter(tmp_path, run, tiny_base_folder):
    proof = merge(run, tmp_path / "merged", prompts=QUESTIONS)
    merged = logits(plain(tmp_path / "merged"))
    tuned, base = logits(with_adapter(tiny_base_folder, run / "adapter")), logits(plain(tiny_base_folder))
    assert torch.allclose(merged, tuned, atol=1e-5)
    assert (tuned - base).abs().max() > 1
    assert (proof.num_same_answers, proof.num_same_prompts, proof.num_questions) == (4, 4, 4)
    assert str(proof).startswith("4 of 4 greedy answers are the same (float32); logits part by at most ")
    assert proof.way == "shard by shard"
    assert json.loads((tmp_path / "merged" / "merge_proof.json").read_text())["faults"] == []


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen", "gpt_neox"])
def test_every_family_is_folded_without_loading_it(tmp_path, tiny_tokenizer, family):
    base = make_base(tmp_path / "base", tiny_tokenizer, family)
    run = make_run(tmp_path / "run", base, tiny_tokenizer)
    proof = merge(run, tmp_path / "merged", prompts=QUESTIONS)
    assert proof.way == "shard by shard"
    assert torch.allclose(
        logits(plain(tmp_path / "merged")), logits(with_adapter(base, run / "adapter")), atol=1e-4
    )


def test_each_weight_is_the_base_plus_scaled_product(tmp_path, run, tiny_base_folder):
    merge(run, tmp_path / "merged", prompts=QUESTIONS)
    base = load_file(tiny_base_folder / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    changed = {key for key in base if not torch.equal(base[key], merged[key])}
    assert len(changed) == 2 * 7
    for key in changed:
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        update = 8 / 4 * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
        assert torch.allclose(merged[key], base[key] + update, atol=1e-6)


def test_merging_twice_gives_the_same_bytes_and_leaves_base_and_adapter_alone(
    tmp_path, run, tiny_base_folder
):
    watched = [tiny_base_folder / "model.safetensors", run / "adapter" / "adapter_model.safetensors"]
    before = [file.read_bytes() for file in watched]
    for name in ("one", "two"):
        merge(run, tmp_path / name, prompts=QUESTIONS)
    for file in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert [file.read_bytes() for file in watched] == before


def test_merging_into_the_merged_model_is_refused(tmp_path, run):
    merge(run, tmp_path / "merged", prompts=QUESTIONS)
    with pytest.raises(BaseModelError, match="On other weights its answers would be noise"):
        merge(run, tmp_path / "again", base=str(tmp_path / "merged"), prompts=QUESTIONS)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("mutation", "dtype"),
    [
        ("scale 2% off", "float32"),  # in bfloat16 that is within rounding
        ("scale doubled", "float32"),
        ("scale doubled", "bfloat16"),
        ("one matrix left out", "float32"),
        ("one matrix left out", "bfloat16"),
        ("transposed", "float32"),
        ("transposed", "bfloat16"),
    ],
)
def test_a_wrong_merge_is_refused_and_leaves_nothing(tmp_path, run, monkeypatch, mutation, dtype):
    plan = fold_module.plan_updates

    def wrong_plan(*arguments):
        updates = plan(*arguments)
        name = "model.layers.1.mlp.up_proj.weight" if mutation == "one matrix left out" else None
        name = name or "model.layers.0.self_attn.q_proj.weight"
        update = updates[name]
        if mutation == "one matrix left out":
            updates[name] = dataclasses.replace(update, scaling=0.0)
        elif mutation == "transposed":
            updates[name] = dataclasses.replace(update, is_transposed=True)
        else:
            factor = 2 if mutation == "scale doubled" else 1.02
            updates |= {k: dataclasses.replace(u, scaling=factor * u.scaling) for k, u in updates.items()}
        return updates

    monkeypatch.setattr(fold_module, "plan_updates", wrong_plan)
    with pytest.raises(MergeError, match="was not kept: logits part by"):
        merge(run, tmp_path / "merged", dtype=dtype, prompts=QUESTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_proven_within_its_own_tolerance(tmp_path, run, dtype):
    proof = merge(run, tmp_path / "merged", dtype=dtype, prompts=QUESTIONS)
    assert proof.dtype == dtype
    assert proof.tolerance.of_range > 1e-4
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype


def test_the_bases_own_dtype_is_kept(tmp_path, tiny_tokenizer):
    base = make_base(tmp_path / "base", tiny_tokenizer, dtype=torch.bfloat16)
    run = make_run(tmp_path / "run", base, tiny_tokenizer)
    assert merge(run, tmp_path / "merged", prompts=QUESTIONS).dtype == "bfloat16"


def test_numbers_beyond_float16_are_refused(tmp_path, run):
    file = run / "adapter" / "adapter_model.safetensors"
    (run / "adapter" / "SHA256SUMS").unlink()
    save_file({k: v * 1000 if "lora_B" in k else v for k, v in load_file(file).items()}, file)
    save_file({k: v * 1000 if "lora_A" in k else v for k, v in load_file(file).items()}, file)
    with pytest.raises(MergeError, match="beyond the range of float16"):
        merge(run, tmp_path / "merged", dtype="float16", prompts=QUESTIONS)


def test_shards_are_read_and_written(tmp_path, tiny_tokenizer, monkeypatch):
    make_tiny_model("qwen").save_pretrained(tmp_path / "base", max_shard_size="40KB")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    run = make_run(tmp_path / "run", tmp_path / "base", tiny_tokenizer)
    monkeypatch.setattr(
        fold_module.fold, "__kwdefaults__", fold_module.fold.__kwdefaults__ | {"shard_bytes": 60_000}
    )
    merge(run, tmp_path / "merged", prompts=QUESTIONS)
    shards = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(file.stat().st_size < 70_000 for file in shards)
    same = torch.allclose(
        logits(plain(tmp_path / "merged")),
        logits(with_adapter(tmp_path / "base", run / "adapter")),
        atol=1e-5,
    )
    assert same


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("rslora", {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
        (
            "patterns",
            {
                "r": 4,
                "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
                "alpha_pattern": {"q_proj": 3, "down_proj": 32},
                "target_modules": ["q_proj", "up_proj", "down_proj"],
            },
        ),
        ("tied output head", {"r": 4, "target_modules": ["q_proj", "lm_head"]}),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_kinds_of_plain_lora_are_folded_shard_by_shard(tmp_path, tiny_base_folder, kind, config):
    adapter = write_plain_peft(tmp_path / "adapter", tiny_base_folder, **config)
    proof = merge(adapter, tmp_path / "merged", prompts=QUESTIONS)
    assert proof.way == "shard by shard"
    assert torch.allclose(
        logits(plain(tmp_path / "merged")), logits(with_adapter(tiny_base_folder, adapter)), atol=1e-4
    )


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("dora", {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
        ("trained norms", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    ],
)
def test_other_kinds_go_through_peft(tmp_path, tiny_base_folder, kind, config):
    adapter = write_plain_peft(tmp_path / "adapter", tiny_base_folder, **config)
    proof = merge(adapter, tmp_path / "merged", prompts=QUESTIONS)
    assert proof.way.startswith("through PEFT")
    assert torch.allclose(
        logits(plain(tmp_path / "merged")), logits(with_adapter(tiny_base_folder, adapter)), atol=1e-4
    )


def write_plain_peft(folder, base, **config):
    """Write an adapter with PEFT alone, as somebody else's script would."""
    model = fill(get_peft_model(plain(base), LoraConfig(lora_alpha=8, task_type="CAUSAL_LM", **config)))
    model.save_pretrained(str(folder))
    return folder


def test_an_adapter_of_plain_peft_is_merged_with_the_recipe_guessed_aloud(tmp_path, tiny_base_folder):
    adapter = write_plain_peft(
        tmp_path / "adapter", tiny_base_folder, r=4, target_modules=["q_proj", "v_proj"]
    )
    said = []
    proof = merge(adapter, tmp_path / "merged", prompts=QUESTIONS, tell=said.append)
    assert proof.num_same_answers == 4
    assert any("It is asked with the recipe chat" in line for line in said)


def test_the_adapter_folder_of_a_run_counts_as_the_run(tmp_path, run):
    said = []
    merge(run / "adapter", tmp_path / "merged", prompts=QUESTIONS, tell=said.append)
    assert not any("It is asked with" in line for line in said)


def test_without_prompts_general_questions_are_asked(tmp_path, run):
    assert merge(run, tmp_path / "merged").num_questions == 12


@pytest.mark.parametrize(
    "prompt",
    [
        PromptSettings(recipe="alpaca"),
        PromptSettings(recipe="alpaca", system='Say "gm"\nand {{ no more }} \\n.'),
        PromptSettings(recipe="chat"),
        PromptSettings(recipe="chat", system='Be "kind"\nalways.'),
    ],
)
def test_plain_chat_template_asks_as_was_trained(tmp_path, tiny_base_folder, tiny_tokenizer, prompt):
    run = make_run(tmp_path / "run", tiny_base_folder, tiny_tokenizer, prompt)
    talk = (Message("user", "gm"), Message("assistant", "gm!"), Message("user", "Why?"))
    with_input = (Message("user", "Translate.", input="xin chào"),)
    proof = merge(run, tmp_path / "merged", prompts=[*QUESTIONS, talk, with_input])
    assert proof.num_same_prompts == proof.num_questions == 6
    recipe, _ = choose_recipe(prompt, tiny_tokenizer)
    asked = AutoTokenizer.from_pretrained(tmp_path / "merged").apply_chat_template(
        [{"role": "user", "content": "gm"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "".join(s.text for s in recipe.render_prompt((Message("user", "gm"),)))


def test_a_users_own_template_is_written_as_a_chat_template(tmp_path, tiny_base_folder, tiny_tokenizer):
    file = tmp_path / "faq.jinja"
    file.write_text("Context: {{ input }}\nQ: {{ instruction }}\nA: ")
    run = make_run(tmp_path / "run", tiny_base_folder, tiny_tokenizer, PromptSettings(recipe=str(file)))
    questions = [
        (Message("user", "Why?", input="The sky is blue."),),
        (Message("user", "When?", input="Now"),),
    ]
    assert merge(run, tmp_path / "merged", prompts=questions).num_same_prompts == 2


def test_the_folder_says_what_it_is(tmp_path, run, tiny_tokenizer):
    merge(run, tmp_path / "merged", prompts=QUESTIONS)
    about = json.loads((tmp_path / "merged" / "lorasmith.json").read_text())
    recipe, _ = choose_recipe(PromptSettings(), tiny_tokenizer)
    assert PromptRecipe.from_json(about["recipe"]) == recipe
    assert about["run"] == "run"
    assert about["proof"]["num_same_answers"] == 4
    defaults = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert (defaults["eos_token_id"], defaults.get("do_sample", False)) == (2, False)


def test_an_existing_folder_is_not_overwritten_unless_asked(tmp_path, run):
    merge(run, tmp_path / "merged", prompts=QUESTIONS)
    (tmp_path / "merged" / "old").touch()
    with pytest.raises(MergeError, match=r"exists already.*--overwrite"):
        merge(run, tmp_path / "merged", prompts=QUESTIONS)
    assert (tmp_path / "merged" / "old").exists()
    merge(run, tmp_path / "merged", prompts=QUESTIONS, overwrite=True)
    assert not (tmp_path / "merged" / "old").exists()


def test_overwrite_spares_what_no_merge_wrote(tmp_path, run):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(MergeError, match="was not written by a merge"):
        merge(run, tmp_path / "photos", prompts=QUESTIONS, overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_neither_run_nor_base_can_be_the_target(tmp_path, run, tiny_base_folder):
    for taken in (run, run / "adapter", tiny_base_folder, tmp_path):
        with pytest.raises(MergeError, match="Choose another folder"):
            merge(run, taken, prompts=QUESTIONS, overwrite=True)
    assert (run / "run.json").exists()


def test_a_changed_base_is_refused(tmp_path, tiny_tokenizer):
    base = make_base(tmp_path / "base", tiny_tokenizer)
    run = make_run(tmp_path / "run", base, tiny_tokenizer)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"trained on .* with weights"):
        merge(run, tmp_path / "merged", prompts=QUESTIONS)


def test_a_quantised_base_is_refused(tmp_path, tiny_tokenizer):
    base = make_base(tmp_path / "base", tiny_tokenizer)
    run = make_run(tmp_path / "run", base, tiny_tokenizer)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match="quantised on disk"):
        merge(run, tmp_path / "merged", prompts=QUESTIONS)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="is not there"):
        merge(tmp_path / "nothing", tmp_path / "merged")


def test_an_adapter_without_effect_is_refused(tmp_path, tiny_base_folder):
    fresh = attach_adapter(plain(tiny_base_folder), LoraSettings(r=2), seed=0)
    save_adapter(fresh, tmp_path / "adapter", allow_no_effect=True)
    with pytest.raises(AdapterError, match="has no effect"):
        merge(tmp_path / "adapter", tmp_path / "merged", prompts=QUESTIONS)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_has_learnt_next_to_nothing_is_said_to_be_so(
    tmp_path, tiny_base_folder, tiny_tokenizer
):
    run_dir = make_run(tmp_path / "faq", tiny_base_folder, tiny_tokenizer)
    weights = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    small = {key: tensor * 1e-3 for key, tensor in weights.items()}
    save_file(small, run_dir / "adapter" / "adapter_model.safetensors")
    (run_dir / "adapter" / "SHA256SUMS").unlink()
    with pytest.raises(
        MergeError, match=r"moves no logit by more than .* cannot be told.* learnt next to nothing"
    ):
        merge(run_dir, tmp_path / "merged", device="cpu")
    assert not (tmp_path / "merged").exists()
