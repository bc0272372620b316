"""The loss of one pack, by the fast parts that this model and these settings allow.

    Pack -> [kept states of frozen layers] -> decoder over the pack -> hidden states at learnt positions -> loss

Whatever is off is off by name: ``notes`` says why, for the screen.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lorasmith.data.tokens import TokenizedExample
from lorasmith.engine.attention import (
    PACKED,
    Backend,
    choose_backend,
    lay_out_attention,
    why_not,
    why_not_packed,
)
from lorasmith.engine.compilation import compile_layers, restore_layers, why_not_compile
from lorasmith.engine.frozen import (
    FrozenStates,
    compute_frozen_states,
    first_adapted_layer,
    num_bytes,
    only_layers,
)
from lorasmith.engine.linear import choose_product_dtype, count_unfused, restore_lora, speed_up_lora
from lorasmith.engine.loss import cross_entropies
from lorasmith.engine.settings import EngineSettings
from lorasmith.errors import SettingsError
from lorasmith.model.boft import rotate_by_blocks, rotate_by_matrices
from lorasmith.model.methods import num_virtual_tokens
from lorasmith.packing.cost import PackCost
from lorasmith.packing.trie import Pack, pack_examples

# Settings by which a model changes its logits after the head; each needs the model's own head.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class PackForward:
    """Computes the summed loss of packs for one model."""

    def __init__(self, model: PeftModel | PreTrainedModel, settings: EngineSettings) -> None:
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        config = base.config.get_text_config()
        notes: list[str] = []
        self._num_virtual = num_virtual_tokens(model)
        reason = why_not_packed(base)
        if self._num_virtual:
            reason = f"the method's {self._num_virtual} virtual tokens stand before every example"
        device = base.get_output_embeddings().weight.device
        self._backend: Backend = choose_backend(base, device)
        if settings.attention not in ("auto", "padded"):
            self._backend = settings.attention
            reason = reason or why_not(base, self._backend, device)
            if reason:
                raise SettingsError(
                    f"engine.attention is {settings.attention}, but {reason}. Use engine.attention=auto for this model."
                )
        self.packed = settings.attention != "padded" and reason is None
        if not self.packed and reason:
            notes.append(f"padded rows instead of packs: {reason}")
        dropout = max(m.p for m in [nn.Dropout(0.0), *base.modules()] if isinstance(m, nn.Dropout))
        dropout = max(dropout, getattr(config, "attention_dropout", None) or 0.0)
        self.share_prefixes = settings.share_prefixes and self.packed and dropout == 0.0
        if settings.share_prefixes and self.packed and dropout > 0.0:
            notes.append(
                f"shared prefixes are computed for each example apart: with dropout {dropout:g} one mask would "
                "serve them all"
            )
        base.set_attn_implementation(PACKED if self.packed else "sdpa")

        self._model = model
        self._base = base
        self._decoder: Any = base.get_decoder() if hasattr(base, "get_decoder") else base.base_model
        head = base.get_output_embeddings()
        own_head = [name for name in _LOGIT_CHANGES if getattr(config, name, None) not in (None, 1, 1.0)]
        plain_head = type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())
        self._chunked = settings.chunked_loss and plain_head and not own_head and not self._num_virtual
        if settings.chunked_loss and not self._chunked:
            why = own_head[0] if own_head else "the head is trained"
            notes.append(
                f"logits by the model's own head: {'the virtual tokens' if self._num_virtual else why}"
            )
        self._head = head
        self.cost = _count_cost(self._decoder, head, config)
        products = settings.product_dtype
        if products == "auto":
            products = choose_product_dtype(device, base.dtype)
        self._product_dtype: torch.dtype | None = None
        if products == "float32" and base.dtype is not torch.float32:
            self._product_dtype = torch.float32
            notes.append(f"the {str(base.dtype).removeprefix('torch.')} base is multiplied in float32")
        restore_lora(base)  # what an earlier PackForward made of it
        rotate_by_matrices(base)
        restore_layers(self._decoder)
        if settings.fused_lora:
            speed_up_lora(base, self._product_dtype)
            rotate_by_blocks(base)
            if num_unfused := count_unfused(base):
                notes.append(
                    f"{num_unfused} adapted layers are computed by PEFT: the method is not plain LoRA"
                )
        self._frozen: dict[str, FrozenStates] = {}
        self._cut = 0
        if settings.reuse_frozen_layers and self.packed and dropout == 0.0:
            self._cut = first_adapted_layer(self._decoder)
        if settings.gradient_checkpointing is True:
            self.set_checkpointing(True)
        if settings.compile is True and (reason := why_not_compile(self._decoder, device)):
            notes.append(f"not compiled: {reason}")
        elif settings.compile is True:
            compile_layers(self._decoder)
            notes.append("the layers are compiled at the first step, which takes a minute or two")
        self.notes = tuple(notes)

    @property
    def device(self) -> torch.device:
        return self._head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format that the base computes in."""
        return self._base.dtype

    @property
    def is_sharded(self) -> bool:
        """Whether other processes hold parts of the layers: all must make the same passes, in the same order."""
        return isinstance(self._decoder, FSDPModule)

    @property
    def frozen_layers(self) -> int:
        """How many layers are computed once; 0 if nothing is kept."""
        return self._cut if self._frozen else 0

    @property
    def can_checkpoint(self) -> bool:
        """Whether the layers of this model can be told to recompute their activations."""
        return bool(self._base.supports_gradient_checkpointing) and not self._brings_keys

    @property
    def _brings_keys(self) -> bool:
        # transformers drops the keys and values that prefix tuning brings when it recomputes a layer.
        return isinstance(self._model, PeftModel) and "PREFIX" in str(self._model.peft_type)

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return bool(self._base.is_activation_checkpointing)

    def set_checkpointing(self, wanted: bool) -> None:
        """Recompute the layers' activations in the backward pass from now on, or keep them; the bits are the same.

        Raises:
            SettingsError: it is wanted, and the model cannot.
        """
        if wanted and not self.can_checkpoint:
            why = (
                "with method.name=prefix no layer can recompute its activations"
                if self._brings_keys
                else f"{self._base.config.model_type} has no layers that can recompute their activations"
            )
            raise SettingsError(
                f"engine.gradient_checkpointing is true, and {why}. Use a smaller training.micro_batch_tokens instead."
            )
        if wanted:
            self._base.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        elif self.checkpointing:
            self._base.activation_checkpointing_disable()

    def keep_frozen_states(
        self,
        name: str,
        dataset: Sequence[TokenizedExample],
        *,
        max_tokens: int,
        max_bytes: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> str | None:
        """Compute and keep the states below the first adapted layer; return in words what was done, if anything.

        Packs of ``dataset`` must then be given to :meth:`summed_loss` with the same ``name``.
        """
        if self._cut == 0:
            return None
        config = self._base.config.get_text_config()
        needed = num_bytes(dataset, config.hidden_size, self._base.dtype)
        if needed > max_bytes:
            return (
                f"layers 0 to {self._cut - 1} are frozen, but keeping their results takes {needed / 2**20:,.0f} MiB, "
                f"more than the {max_bytes / 2**20:,.0f} MiB set aside: computed anew every epoch"
            )
        if not self._split_is_exact(dataset):
            return (
                f"{config.model_type} does not split at a layer: its frozen layers are computed every epoch"
            )
        self._frozen[name] = compute_frozen_states(
            dataset, self._lower, max_tokens=max_tokens, on_progress=on_progress
        )
        return f"layers 0 to {self._cut - 1} are frozen: computed once and kept ({needed / 2**20:,.0f} MiB)"

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Let the model answer questions for a while: stock attention and no dropout, then back."""
        was_training = self._model.training
        self._base.set_attn_implementation("sdpa")
        self._model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._base.set_attn_implementation(PACKED if self.packed else "sdpa")
            self._model.train(was_training)

    def summed_loss(self, pack: Pack, name: str | None = None) -> torch.Tensor:
        """Return the sum of cross-entropies over the learnt tokens of ``pack``, a float32 scalar with a graph.

        Divide by the learnt tokens of the whole optimizer step for the mean that is trained on. ``name`` is the
        data set whose kept states to use.
        """
        return (self._losses(pack, name) * torch.from_numpy(pack.weights).to(self.device)).sum()

    def log_probs(self, pack: Pack, name: str | None = None) -> torch.Tensor:
        """Return the log probability of the learnt tokens of each of ``pack.examples``, summed; float32, a graph."""
        losses = self._losses(pack, name)
        of_examples = np.repeat(np.arange(len(pack.examples)), pack.learnt_of)
        each = losses.index_select(0, torch.from_numpy(pack.predictions).to(self.device))
        sums = torch.zeros(len(pack.examples), dtype=each.dtype, device=self.device)
        return -sums.index_add(0, torch.from_numpy(of_examples).to(self.device), each)

    def _losses(self, pack: Pack, name: str | None) -> torch.Tensor:
        """Return the cross-entropy of each of the N predictions of ``pack``, float32 [N] with a graph."""
        targets = torch.from_numpy(pack.targets).to(self.device)
        if self._chunked:
            hidden = self._run(self._decoder, pack, name).last_hidden_state
            learnt = hidden.flatten(0, 1).index_select(0, self._learnt_rows(pack))
            return cross_entropies(learnt, self._head.weight, self._head.bias, targets, self._product_dtype)
        if self.packed:
            logits = self._run(self._base, pack, name, logits_to_keep=self._learnt_rows(pack)).logits[0]
        else:
            logits = self._run(self._model if self._num_virtual else self._base, pack, name).logits
            longest = max(segment.stop - segment.start for segment in pack.segments)
            logits = logits[:, logits.shape[1] - longest :]  # without those of virtual tokens
            logits = logits.flatten(0, 1)[self._learnt_rows(pack)]
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")

    def _run(self, module: Any, pack: Pack, name: str | None = None, **extra: Any) -> Any:
        """Call ``module``, the decoder or the whole model, on ``pack`` and return its output value."""
        # A pass without gradients would be compiled once more, for a few passes a run.
        eager = (
            contextlib.nullcontext() if torch.is_grad_enabled() else torch.compiler.set_stance("force_eager")
        )
        with eager:
            return self._run_layers(module, pack, name, **extra)

    def _run_layers(self, module: Any, pack: Pack, name: str | None, **extra: Any) -> Any:
        if not self.packed:
            return module(**self._padded_inputs(pack), use_cache=False, **extra)
        if name in self._frozen:
            with only_layers(self._decoder, slice(self._cut, None), keep_norm=True):
                return self._run_packed(module, pack, inputs_embeds=self._frozen[name].of(pack), **extra)
        return self._run_packed(module, pack, input_ids=self._input_ids(pack), **extra)

    def _run_packed(self, module: Any, pack: Pack, **inputs: Any) -> Any:
        return module(
            **inputs,
            position_ids=torch.from_numpy(pack.position_ids).to(self.device)[None],
            pack_layout=lay_out_attention(pack, self._backend, self.device, self._product_dtype),
            use_cache=False,
        )

    def _input_ids(self, pack: Pack) -> torch.Tensor:
        return torch.from_numpy(pack.input_ids).to(self.device)[None]

    def _learnt_rows(self, pack: Pack) -> torch.Tensor:
        """Return which rows of the flattened hidden states the targets are predicted from, int64 [N]."""
        rows = pack.logit_positions
        if not self.packed:  # one segment a row, each padded to the longest
            longest = max(segment.stop - segment.start for segment in pack.segments)
            row_of_token = np.repeat(
                np.arange(len(pack.segments)), [segment.stop - segment.start for segment in pack.segments]
            )
            rows = row_of_token[rows] * longest + pack.position_ids[rows]
        return torch.from_numpy(rows).to(self.device)

    def _padded_inputs(self, pack: Pack) -> dict[str, torch.Tensor]:
        """Return the examples of an unshared pack one a row, padded on the right: input_ids and mask [B, T]."""
        rows = [torch.from_numpy(pack.input_ids[segment.start : segment.stop]) for segment in pack.segments]
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        attention_mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"input_ids": input_ids.to(self.device), "attention_mask": attention_mask.to(self.device)}

    def _lower(self, pack: Pack) -> torch.Tensor:
        """Return the states [1, T, D] that enter the first adapted layer."""
        with only_layers(self._decoder, slice(0, self._cut), keep_norm=False):
            return self._run_packed(self._decoder, pack, input_ids=self._input_ids(pack)).last_hidden_state

    @torch.no_grad()
    def _split_is_exact(self, dataset: Sequence[TokenizedExample]) -> bool:
        """Compare the split model with the whole one on the first example: some models do more between layers."""
        pack = pack_examples(dataset, [0], max_tokens=len(dataset[0].input_ids))[0]
        whole = self._run(self._decoder, pack).last_hidden_state
        lower = self._lower(pack)
        with only_layers(self._decoder, slice(self._cut, None), keep_norm=True):
            split = self._run_packed(self._decoder, pack, inputs_embeds=lower).last_hidden_state
        return bool(torch.allclose(whole, split, rtol=1e-4, atol=1e-4))


def _count_cost(decoder: Any, head: Any, config: Any) -> PackCost:
    """Return what a pack costs: two FLOP a token for every number of a matrix, in one forward pass."""
    matrices = (p.numel() for p in getattr(decoder, "layers", decoder).parameters() if p.dim() == 2)
    return PackCost(
        per_token=2.0 * sum(matrices),
        per_learnt=2.0 * head.weight.numel(),
        per_pair=4.0 * config.num_hidden_layers * config.hidden_size,
    )
