"""Reads the weights of a trained model under the names of its plain architecture, for an engine or a saved folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minillm.models.families import family_of
from minillm.models.lora import adapted_layers, check_adapter
from minillm.models.quantization import layer_is_quantized
from minillm.models.shards import full_tensor, gathered


def plain_weights(model: Any, dtype: torch.dtype, *, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the complete weights of a model. A tied weight appears under each of its names.

    The model itself is not changed: merging an adapter in place and unmerging it again would round the frozen base a
    little each time. Sharded weights (FSDP2, ZeRO-3) are gathered one tensor at a time, so every process must iterate.

    Args:
        model: A model, with or without adapters, quantised layers or shards.
        dtype: Dtype of the weights.
        merged: Whether adapters are merged into the weights. Otherwise they are left out.

    Yields:
        The name and the value of each weight.

    Raises:
        InputError: The model has an adapter that cannot be merged (see `check_adapter`).
    """
    if not hasattr(model, "get_base_model"):
        for name, value in _stored(model):
            yield name, full_tensor(value, dtype)
        return
    check_adapter(model)
    deltas = {f"{name}.weight": pairs for name, pairs in adapted_layers(model)} if merged else {}
    for name, value in _stored(model.get_base_model()):
        if "lora_" not in name:
            plain = name.replace(".base_layer", "")
            pairs = deltas.get(plain, [])
            # A weight that an adapter is added to is rounded after that, and so is gathered as it is stored.
            whole = full_tensor(value, None if pairs else dtype)
            for module, adapter in pairs:
                with gathered(part for key, part in module.named_parameters() if "lora_" in key):
                    delta = full_tensor(module.get_delta_weight(adapter))
                whole = whole + delta.to(whole.dtype)
            yield plain, whole.to(dtype)


def _stored(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Iterate over a model's weights as they are stored. Those of quantised layers are dequantised."""
    layers = {name: module for name, module in model.named_modules() if layer_is_quantized(module)}
    headless = family_of(model.config).tied_head_absent_in_vllm and model.config.tie_word_embeddings
    for name, value in model.state_dict(keep_vars=True).items():
        if headless and name == "lm_head.weight":
            continue
        layer, _, what = name.rpartition(".")
        if layer in layers and what == "weight":
            from peft.utils.integrations import dequantize_module_weight

            yield name, dequantize_module_weight(layers[layer])
        elif what == "bias" or (layer not in layers and layer.partition(".weight")[0] not in layers):
            # Everything else that a quantised layer stores are the scales of its weights.
            yield name, value
