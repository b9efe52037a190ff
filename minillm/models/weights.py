"""A trained model's weights under the names its plain architecture has, for an engine or a saved folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def is_sharded(model: Any) -> bool:
    """Whether every forward is a collective operation: FSDP in either form."""
    return isinstance(model, (FSDPModule, FullyShardedDataParallel)) or any(isinstance(p, DTensor) for p in model.parameters())


def check_adapter(model: Any) -> None:
    """Refuse adapters that `plain_weights` could not hand over: the engine would sample another student than is trained.

    Raises:
        ValueError: naming the module.
    """
    if not hasattr(model, "get_base_model"):
        return
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = model.get_base_model()
    embeddings = base.get_input_embeddings()
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"{name}: modules_to_save and trainable tokens are not handed to the engine; use LoRA layers alone")
        if not isinstance(module, BaseTunerLayer):
            continue
        if not (isinstance(module, LoraLayer) and hasattr(module, "get_delta_weight")):
            raise ValueError(f"{name}: an adapter of kind {type(module).__name__} is not handed to the engine; use LoRA")
        if any(getattr(module, "use_dora", {}).values()):
            raise ValueError(f"{name}: a DoRA adapter cannot be merged on the way to the engine; use plain LoRA")
        if any(getattr(module, "lora_bias", {}).values()):
            raise ValueError(f"{name}: the bias of a LoRA adapter is not handed to the engine; set lora_bias=False")
        if module is embeddings and getattr(base.config, "tie_word_embeddings", False):
            raise ValueError(f"{name}: a LoRA adapter on an embedding that is also the head changes one of the two only; leave it out")


def plain_weights(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every weight in full, tied ones under each of their names, adapters merged on the way out.

    The model itself is left alone: merging in place and taking out again would round the frozen base a little each time.
    Shards (FSDP2) are gathered one tensor at a time, which every process must take part in.
    """
    if not hasattr(model, "get_base_model"):
        for name, value in model.state_dict().items():
            yield name, _whole(value).detach().to(dtype)
        return
    check_adapter(model)
    deltas = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "get_delta_weight"):
            deltas[f"{name}.weight"] = [(module, adapter) for adapter in module.active_adapters if adapter in module.scaling]
    for name, value in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            plain = name.replace(".base_layer", "")
            whole = _whole(value).detach()
            for module, adapter in deltas.get(plain, []):
                whole = whole + _whole(module.get_delta_weight(adapter)).detach().to(whole.dtype)
            yield plain, whole.to(dtype)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def save_plain(model: Any, folder: str | Path) -> None:
    """Save as a folder of the plain architecture, adapters merged."""
    if not hasattr(model, "get_base_model"):
        model.save_pretrained(folder)
        return
    base = model.get_base_model()
    merged = dict(plain_weights(model, base.dtype))
    base.config.save_pretrained(folder)
    base.generation_config.save_pretrained(folder)
    with torch.device("meta"):
        plain = type(base)(base.config)
    plain.load_state_dict(merged, assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
