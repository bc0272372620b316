"""A base that is too large for one GPU: each process keeps its part of every decoder layer.

    process 0   [layer 0: first half ] [layer 1: first half ] ...    embeddings, head, adapter
    process 1   [layer 0: second half] [layer 1: second half] ...    embeddings, head, adapter
                 \\________________/  gathered just before it computes, forward and backward, and let go again

torch's ``fully_shard`` does it. The base is frozen, so no gradient of it is ever sent. The adapter stays whole in
every process: its gradients are summed as always (distributed.py), and it is saved as always, with nothing to gather.
A layer is gathered when every process asks for it, so all must make the same passes, in the same order.
"""

from typing import Any

import torch
from peft import PeftModel
from torch.distributed.fsdp import fully_shard

from lorasmith.engine.settings import EngineSettings
from lorasmith.errors import SettingsError
from lorasmith.model.method_settings import MethodSettings
from lorasmith.model.settings import BaseSettings
from lorasmith.training.distributed import Team
from lorasmith.training.settings import OutputSettings


def check_sharding(
    engine: EngineSettings, method: MethodSettings, base: BaseSettings, output: OutputSettings
) -> None:
    """Refuse what has not been proven, or cannot work, with a sharded base.

    Raises:
        SettingsError: ``engine.shard_base`` is on beside something that it does not go with; names all of it.
    """
    if not engine.shard_base:
        return
    faults = []
    if method.name != "lora":
        faults.append(f"method.name is {method.name}: only lora was proven to give the same adapter")
    if base.quantization != "none":
        faults.append(f"base.quantization is {base.quantization}: its packed weights cannot be cut here")
    if output.sample_questions:
        faults.append("run.sample_questions are asked by one process, and a layer needs all of them")
    if engine.compile is True:
        faults.append("engine.compile is true: a compiled layer was not tried")
    if faults:
        raise SettingsError(
            "engine.shard_base does not go with:\n"
            + "\n".join(f"  - {fault}" for fault in faults)
            + "\nChange these, or leave it out: a base that fits one GPU trains faster whole."
        )


def shard_base(model: PeftModel, team: Team, device: torch.device) -> None:
    """Keep this process's part of the frozen weights of every decoder layer on ``device``, all the rest whole there."""
    base: Any = model.get_base_model()
    decoder = base.get_decoder()
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    mesh = team.mesh(device)
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    # The outermost one orders the gathering of the layers inside; of its own it cuts nothing.
    fully_shard(decoder, mesh=mesh, ignored_params=set(own_parameters(decoder)) | whole)
    model.to(device)


def own_parameters(decoder: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return what stands outside the layers: the embeddings and the last norm."""
    return [p for name, p in decoder.named_parameters() if not name.startswith("layers.")]
