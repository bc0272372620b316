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
from lorasmith.errors import BaseModelError, SettingsError
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
    if base.quantization == "int8":
        faults.append(
            "base.quantization is int8: its weights are no floats, and torch cuts only floats; nf4 goes"
        )
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


def shard_base(model: PeftModel, team: Team, device: torch.device) -> list[torch.Tensor]:
    """Keep this process's part of the frozen weights of every decoder layer on ``device``, all the rest whole there.

    Nothing is sent yet. What is returned is for :func:`check_gathered`.
    """
    base: Any = model.get_base_model()
    decoder = base.get_decoder()
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    mesh = team.mesh(device)
    packed = _packed_bytes(decoder.layers[0])
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    # The outermost one orders the gathering of the layers inside; of its own it cuts nothing.
    fully_shard(decoder, mesh=mesh, ignored_params=set(own_parameters(decoder)) | whole)
    for module in model.modules():
        # The scales of 4-bit weights, a thirtieth of their size, stay whole beside them: no parameter of torch.
        if (scales := getattr(module, "quant_state", None)) is not None:
            scales.to(device)
    model.to(device)
    return packed


def _packed_bytes(layer: torch.nn.Module) -> list[torch.Tensor]:
    """Return a copy of the bytes of a layer's 4-bit weights; of other weights there are none."""
    return [
        module.weight.detach().cpu().view(torch.uint8).clone()  # type: ignore[union-attr, operator]
        for module in layer.modules()
        if getattr(module, "quant_state", None) is not None
    ]


def check_gathered(model: Any, packed: list[torch.Tensor]) -> None:
    """Raise BaseModelError unless 4-bit weights, cut and gathered as if they were floats, come back bit for bit.

    Many of these bytes read as NaN, and a copy may write another NaN (bitsandbytes' issue 1945, of bfloat16 storage).
    Of the first layer; all processes must call this at the same time.
    """
    if not packed:
        return
    layer = model.get_base_model().get_decoder().layers[0]
    layer.unshard()
    gathered = _packed_bytes(layer)
    layer.reshard()
    if not all(map(torch.equal, packed, gathered)):
        raise BaseModelError(
            "Sharding changed the bytes of 4-bit weights on this machine. Use base.quantization=none, or leave "
            "engine.shard_base out."
        )


def own_parameters(decoder: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return what stands outside the layers: the embeddings and the last norm."""
    return [p for name, p in decoder.named_parameters() if not name.startswith("layers.")]
