"""A tiny base with three adapters on it, each with its own recipe, and a server that answers for them."""

import threading
import time
from contextlib import contextmanager

import pytest
import torch

from lorasmith.model.found import find_adapted
from lorasmith.serve.models import open_models
from lorasmith.serve.service import Service
from lorasmith.serve.settings import ServeSettings

ADAPTERS = ("alpha", "beta", "gamma")


def make_adapter(folder, model, *, seed, r=4, **config):
    """Write a PEFT folder with random weights, large enough to change every answer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = {"target_modules": "all-linear", "lora_alpha": 8, **config}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=r, **config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.15)
    adapted.save_pretrained(folder)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, tiny_base_folder):
    """Folders of three adapters of unlike ranks and layers, by name."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("adapters")
    kinds = [
        {},
        {"r": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"r": 2, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.self_attn.q_proj": 20}},
    ]
    for seed, (name, kind) in enumerate(zip(ADAPTERS, kinds, strict=True)):
        model = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
        make_adapter(root / name, model, seed=seed, **kind)
    return {name: root / name for name in ADAPTERS}


@pytest.fixture(scope="session")
def lone_chats(adapters, tiny_base_folder):
    """A Chat over PEFT's own model for each name, and for the base: what the server must answer like."""
    from lorasmith.generation.chat import Chat, open_chat

    chats = {
        name: Chat.open(find_adapted(folder, base=str(tiny_base_folder)), device="cpu", dtype="float32")
        for name, folder in adapters.items()
    }
    return {**chats, "tiny": open_chat(tiny_base_folder, device="cpu", dtype="float32")}


@contextmanager
def serving(service, **options):
    """Run the server around ``service``; gives its URL. At the end it is told to stop."""
    from lorasmith.serve.app import create_app
    from lorasmith.serve.server import Server, listen

    server = Server(create_app(service, **options), service.settings)
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
            assert thread.is_alive()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def open_service(tiny_base_folder, adapters, **settings):
    limits = ServeSettings(**settings)
    models = open_models(
        list(adapters.items()),
        max_models=limits.max_models,
        base=str(tiny_base_folder),
        base_name="tiny",
        device="cpu",
        dtype="float32",
    )
    return Service(models, limits)
