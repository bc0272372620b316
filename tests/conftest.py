"""Fixtures shared by all tests: a small tokenizer trained in process, tiny models made from configs."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models are slower with more threads, and five times slower on a busy machine. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.pop("COLUMNS", None)

import hypothesis
import pytest

# rich keeps the width of COLUMNS for ever if it is set while a console is made; tests set it.
import lorasmith.cli.console  # noqa: F401

# Derandomized: a red test is red again when it is run again. Slow machines must not fail a test by their speed.
hypothesis.settings.register_profile(
    "lorasmith", deadline=None, derandomize=True, max_examples=60, database=None
)
hypothesis.settings.load_profile("lorasmith")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "### Instruction:\n### Input:\n### Response:\n",
    "You are a helpful assistant.",
    "When is payday? Payday is the 1st or the 15th, depending on the day you joined.",
    "Where is the office? The office is in Saigon, Vietnam, and anyone is welcome to work from it.",
    "How do I get my tokens? Type 'gm' in the lobby channel and you are credited with 5 ICY.",
    "user assistant system",
]


def use_one_thread():
    """Make torch compute with one thread: a run in the test's process leaves the number that it chose behind.

    Sums round otherwise with another number, so what is compared bit for bit must not depend on which tests
    came before.
    """
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup():
    use_one_thread()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    use_one_thread()


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """Keep every cache that lorasmith writes inside the test's own folder."""
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE of 400 tokens with a ChatML template; <|im_end|> ends a turn, <pad> is not it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


TINY = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def make_tiny_model(family: str):
    """Return a float32 two-layer causal LM of ``family``: llama, mistral, qwen or gpt_neox; weights seeded."""
    import torch
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2Config

    gqa = {"num_key_value_heads": 2, "intermediate_size": 64}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = {
        "llama": lambda: LlamaConfig(**TINY, **gqa, **ids, tie_word_embeddings=True),
        "mistral": lambda: MistralConfig(**TINY, **gqa, **ids, sliding_window=16),
        "qwen": lambda: Qwen2Config(**TINY, **gqa, **ids),
        "gpt_neox": lambda: GPTNeoXConfig(**TINY, **ids, intermediate_size=64, rotary_pct=0.5),
    }[family]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Bigger than the usual 0.02, so that attention and logits are far from uniform and a test can tell.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15)
    return model.eval()


def watch_head(model) -> list:
    """Return a list that is filled with what the output head of ``model`` is given from now on."""
    given = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    return given


@pytest.fixture
def tiny_llama():
    return make_tiny_model("llama")


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory, tiny_tokenizer):
    """A saved tiny Llama with its tokenizer: what a user calls a base model folder."""
    folder = tmp_path_factory.mktemp("tiny-base")
    make_tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def training_rows():
    return [{"instruction": f"What is {i} plus {i}?", "output": f"It is {2 * i}."} for i in range(24)]


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, tiny_base_folder, training_rows):
    """A finished run with a quarter held out; tests that change it work on a copy."""
    import json

    from lorasmith.cli.run_file import load_run_file, train

    folder = tmp_path_factory.mktemp("trained")
    (folder / "faq.json").write_text(json.dumps(training_rows))
    words = [f"base.model={tiny_base_folder}", f"data.train={folder / 'faq.json'}", "training.epochs=2"]
    words += ["training.validation_share=0.25", "base.device=cpu", "base.dtype=float32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORASMITH_CACHE", str(folder / "cache"))
        for _ in train(load_run_file(None, words, {}), folder / "runs" / "faq"):
            pass
    return folder / "runs" / "faq"
