"""Every tuning method: trains, counts as its formula says, is saved, opened by plain PEFT, asked, merged or not."""

import json

import pytest
import torch
from peft import PeftModel

from conftest import make_tiny_model
from lorasmith.cli.run_file import load_run_file, train
from lorasmith.data.example import Message
from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.errors import AdapterError, MergeError, SettingsError
from lorasmith.export.merge import merge
from lorasmith.generation.chat import Chat
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.model.adapter import save_adapter
from lorasmith.model.adapter_folder import read_adapter_config
from lorasmith.model.boft import spare_boft_kernel
from lorasmith.model.method_settings import METHODS
from lorasmith.model.methods import attach_adapter, count_trainable
from lorasmith.model.run_record import read_run_record

D, MLP, KV, LAYERS, VOCAB = 32, 64, 16, 2, 400
SIZES = [(D, D), (D, KV), (D, KV), (D, D), (D, MLP), (D, MLP), (MLP, D)]
IN, OUT = sum(a for a, _ in SIZES), sum(b for _, b in SIZES)
R, V = 4, 3

LOW_RANK = LAYERS * R * (IN + OUT)
# options, trained numbers by the method's formula
CASES = {
    "lora": ({"r": R}, LOW_RANK),
    "rslora": ({"r": R}, LOW_RANK),
    "dora": ({"r": R}, LOW_RANK + LAYERS * OUT),
    "pissa": ({"r": R}, LOW_RANK),
    "olora": ({"r": R}, LOW_RANK),
    "lora_plus": ({"r": R}, LOW_RANK),
    "adalora": ({"init_r": R, "target_r": 2}, LOW_RANK + LAYERS * R * len(SIZES)),
    "vera": ({"r": 8}, LAYERS * (len(SIZES) * 8 + OUT)),
    "oft": ({"oft_block_size": 8}, LAYERS * IN // 8 * 28),
    "boft": ({"boft_block_size": 4}, LAYERS * (IN // 4 * 16 + OUT)),
    "ia3": ({}, LAYERS * (KV + KV + MLP)),  # keys, values, what enters down_proj
    "prompt": ({"num_virtual_tokens": V}, V * D),
    "prefix": ({"num_virtual_tokens": V}, V * LAYERS * 2 * KV),
    "p_tuning": (
        {"num_virtual_tokens": V, "encoder_hidden_size": 16},
        V * D + D * 16 + 16 + 16 * 16 + 16 + 16 * D + D,
    ),
    "full": ({}, None),
}
SHORT = SamplingSettings(max_tokens=8)
VIRTUAL = {"prompt", "prefix", "p_tuning"}


def test_there_is_a_case_for_every_method():
    assert CASES.keys() == METHODS.keys()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_base_folder, training_rows):
    """A short run of every method, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("methods")
    (folder / "faq.json").write_text(json.dumps(training_rows[:12]))
    made = {}

    def run(name):
        if name not in made:
            words = [f"base.model={tiny_base_folder}", f"data.train={folder / 'faq.json'}", "base.device=cpu"]
            words += [
                "training.epochs=3",
                "training.batch_size=4",
                "base.dtype=float32",
                f"method.name={name}",
            ]
            words += ["engine.threads=1", "engine.compile=false", "training.micro_batch_tokens=512"]
            words += [f"method.{key}={value}" for key, value in CASES[name][0].items()]
            reports = list(train(load_run_file(None, words, {}), folder / name))
            made[name] = folder / name, reports
        return made[name]

    return run


@pytest.mark.parametrize("name", CASES)
def test_a_run_counts_learns_and_is_asked(name, runs):
    run_dir, reports = runs(name)
    record = read_run_record(run_dir)
    expected = CASES[name][1]
    if name == "full":
        expected = sum(p.numel() for p in make_tiny_model("llama").parameters())
    assert record.result["trainable_numbers"] == expected
    assert reports[-1].loss < reports[0].loss
    chat = Chat.from_run(run_dir, device="cpu", dtype="float32")
    questions = ["What is 3 plus 3?", "What is 11 plus 11, and why?"]
    one_by_one = [chat.ask(question, sampling=SHORT).token_ids for question in questions]
    assert [answer.token_ids for answer in chat.ask_many(questions, sampling=SHORT)] == one_by_one
    base = chat.base()
    ids = torch.tensor([chat.encode_prompt(questions[0])])
    logits = [
        side._next_token(
            ids, side._next_token.new_cache(), torch.ones_like(ids), torch.arange(ids.shape[1])[None]
        )
        for side in (chat, base)
    ]
    assert not torch.allclose(*logits)
    assert torch.allclose(logits[1], plain_base(run_dir)(ids).logits[:, -1], atol=1e-5)


def plain_base(run_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(read_run_record(run_dir).base.id).eval()


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT's, of its own AdaLoRA
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"full"}))
def test_plain_peft_on_the_untouched_base_gives_the_same_logits(name, runs):
    run_dir, _ = runs(name)
    spare_boft_kernel()
    opened = PeftModel.from_pretrained(plain_base(run_dir), str(run_dir / "adapter")).eval()
    chat = Chat.from_run(run_dir, device="cpu", dtype="float32")
    ids = torch.tensor([chat.encode_prompt("What is 3 plus 3?")])
    theirs = opened(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
    ours = chat._next_token
    mine = ours(ids, ours.new_cache(), torch.ones_like(ids), torch.arange(ids.shape[1])[None])
    assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("name", sorted(CASES))
def test_merging_is_proven_or_refused_by_name(name, runs, tmp_path):
    run_dir, _ = runs(name)
    if name in VIRTUAL:
        with pytest.raises(MergeError, match="virtual tokens and changes no weight"):
            merge(run_dir, tmp_path / "merged", device="cpu")
    elif name == "full":
        with pytest.raises(MergeError, match=r"nothing to merge: .*model is the whole model"):
            merge(run_dir, tmp_path / "merged", device="cpu")
    else:
        asked = [[Message("user", f"What is {i} plus {i}?")] for i in (3, 11)]
        assert merge(run_dir, tmp_path / "merged", prompts=asked, device="cpu").faults() == []


@pytest.mark.parametrize("name", sorted(VIRTUAL))
def test_virtual_tokens_train_on_the_loss_of_plain_peft(name, tiny_llama):
    """Rows of unlike lengths in one padded batch; loss and gradient as PEFT gives each row alone."""
    import numpy as np

    from lorasmith.data.tokens import IGNORE_INDEX, TokenizedExample
    from lorasmith.engine.forward import PackForward
    from lorasmith.engine.settings import EngineSettings
    from lorasmith.packing.trie import pack_examples

    rows = [[1, 9, 30, 4, 2], [1, 9, 77, 250, 31, 8, 2]]
    examples = [
        TokenizedExample(np.array(r, np.int32), np.array([IGNORE_INDEX] * 2 + r[2:], np.int32), "here")
        for r in rows
    ]
    adapted = attach_adapter(tiny_llama, METHODS[name](**CASES[name][0]), seed=0)
    forward = PackForward(adapted, EngineSettings())
    assert any("virtual tokens" in note for note in forward.notes)
    (pack,) = pack_examples(examples, [0, 1], max_tokens=64, share_prefixes=forward.share_prefixes)
    forward.summed_loss(pack).backward()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    ours = {n: p.grad.clone() for n, p in trained.items()}
    adapted.zero_grad()
    total = 0.0
    for example in examples:
        ids, labels = torch.tensor([example.input_ids.tolist()]), torch.tensor([example.labels.tolist()])
        loss = adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss * (
            len(ids[0]) - 2
        )
        loss.backward()
        total += loss.item()
    assert forward.summed_loss(pack).item() == pytest.approx(total, rel=1e-5)
    for n, p in trained.items():
        assert torch.allclose(ours[n], p.grad, atol=1e-5), n


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_start_inside_the_base_is_the_base(name):
    ids = torch.tensor([[1, 30, 77]])
    before = make_tiny_model("llama")(ids).logits
    adapted = attach_adapter(make_tiny_model("llama"), METHODS[name](r=R), seed=0)
    changed = adapted.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.equal(changed, make_tiny_model("llama").model.layers[0].self_attn.q_proj.weight)
    assert torch.allclose(adapted(ids).logits, before, atol=1e-4)


def test_the_kinds_whose_b_starts_at_zero_learn_at_a_higher_rate_in_short_runs():
    for name in ("lora", "rslora", "dora"):
        assert [METHODS[name]().rate_multiple_for(n) for n in (1, 500, 501)] == [15, 15, 10]
    for name, multiple in (("full", 1), ("pissa", 2), ("lora_plus", 2.5), ("oft", 10)):
        assert {METHODS[name]().rate_multiple_for(n) for n in (1, 500, 501)} == {multiple}


def test_lora_plus_gives_b_its_own_rate():
    from lorasmith.training.method_steps import group_parameters

    method = METHODS["lora_plus"](r=R, loraplus_lr_ratio=8)
    first, second = group_parameters(attach_adapter(make_tiny_model("llama"), method, seed=0), method)
    assert (first["rate_multiple"], second["rate_multiple"]) == (1.0, 8)
    assert all(p.shape[0] == R for p in first["params"])
    assert all(p.shape[1] == R for p in second["params"])


def test_adalora_takes_ranks_away(runs):
    run_dir, _ = runs("adalora")
    pattern = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(map(sum, pattern.values())) == 2 * LAYERS * len(SIZES)


def test_the_count_of_frozen_numbers_is_that_of_the_base():
    from lorasmith.model.methods import count_frozen

    numbers = sum(p.numel() for p in make_tiny_model("llama").parameters())
    adapted = attach_adapter(make_tiny_model("llama"), METHODS["lora"](r=R), seed=0)
    assert (count_frozen(adapted), count_trainable(adapted)) == (numbers, LOW_RANK)


@pytest.mark.parametrize(
    ("name", "key", "most"), [("lora", "r", 32), ("pissa", "r", 16), ("adalora", "init_r", 32)]
)
def test_the_highest_rank_is_opened_again_and_one_above_is_refused_at_once(
    name, key, most, tiny_llama, tmp_path
):
    higher = dict.fromkeys({key, "init_r" if name == "adalora" else "r"}, most + 1)
    with pytest.raises(
        SettingsError, match=rf"method\.{key}={most + 1} .* 32 inputs and 32 outputs.*Use {most} or"
    ):
        attach_adapter(tiny_llama, METHODS[name](**higher), seed=0, num_steps=20)
    model = attach_adapter(make_tiny_model("llama"), METHODS[name](**{key: most}), seed=0, num_steps=20)
    save_adapter(model, tmp_path / "adapter", allow_no_effect=True)
    assert read_adapter_config(tmp_path / "adapter")[key] == most * (2 if name == "pissa" else 1)


@pytest.mark.parametrize(("size", "inputs", "nearest"), [(5, 32, 4), (64, 32, 32)])
def test_oft_blocks_that_do_not_fill_a_layer_are_refused(size, inputs, nearest, tiny_llama):
    # PEFT would take blocks of another size, and say so in a warning.
    wrong = rf"method\.oft_block_size={size} does not divide the {inputs} inputs .* Use {nearest}\."
    with pytest.raises(SettingsError, match=wrong):
        attach_adapter(tiny_llama, METHODS["oft"](oft_block_size=size), seed=0)


def test_what_peft_refuses_is_told_in_whole_sentences(tiny_llama):
    settings = METHODS["ia3"](target_modules=("q_proj",), feedforward_modules=("down_proj",))
    with pytest.raises(SettingsError, match=r"`target_modules`\. Change the method's settings"):
        attach_adapter(tiny_llama, settings, seed=0)


def test_prefix_says_itself_that_activations_cannot_be_recomputed(tiny_llama):
    model = attach_adapter(tiny_llama, METHODS["prefix"](num_virtual_tokens=V), seed=0)
    with pytest.raises(SettingsError, match=r"is true, and with method\.name=prefix no layer can recompute"):
        PackForward(model, EngineSettings(gradient_checkpointing=True))


@pytest.mark.parametrize("name", ["pissa", "adalora", "p_tuning", "full"])
def test_a_stopped_run_goes_on_bit_by_bit(name, runs, tmp_path, tiny_base_folder):
    from lorasmith.cli.run_file import RunFile, prepare
    from lorasmith.training.job import run_job

    run_dir, reports = runs(name)
    settings = RunFile.model_validate(read_run_record(run_dir).settings)
    stopped = []
    job = prepare(settings, tmp_path / "again")
    for report in run_job(job, lambda: len(stopped) == 4):
        stopped.append(report)
    rest = list(run_job(prepare(settings, tmp_path / "again")))
    assert [r.loss for r in stopped + rest] == [r.loss for r in reports]


def test_full_needs_float32(tiny_llama):
    from lorasmith.model.methods import train_all_weights

    with pytest.raises(SettingsError, match=r"small updates vanish.*base.dtype=float32"):
        train_all_weights(tiny_llama.bfloat16())


def test_an_adalora_of_a_rank_that_no_layer_has_is_refused(tiny_llama, tmp_path):
    model = attach_adapter(tiny_llama, METHODS["adalora"](init_r=4, target_r=2), seed=0, num_steps=20)
    save_adapter(model, tmp_path, allow_no_effect=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_r": 10**9}))
    (tmp_path / "SHA256SUMS").unlink(missing_ok=True)
    with pytest.raises(AdapterError, match=r"init_r is 1,000,000,000, and .* is a layer of \d+ inputs"):
        read_adapter_config(tmp_path)
