"""A trained model's weights under the names its plain architecture has, for an engine or a saved folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minillm.models.lora import adapted_layers, check_adapter
from minillm.models.quantization import layer_is_quantized
from minillm.models.shards import full_tensor, gathered

# vLLM ties a head of its own to the embedding, and both must be sent for both to move; of these architectures it has no head.
_HEADLESS_IN_VLLM = {"gemma2"}


def plain_weights(model: Any, dtype: torch.dtype, *, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every weight in full, tied ones under each of their names, adapters merged on the way out, or left out.

    The model itself is left alone: merging in place and taking out again would round the frozen base a little each time.
    Shards (FSDP2, ZeRO-3) are gathered one tensor at a time, which every process must take part in.
    """
    if not hasattr(model, "get_base_model"):
        for name, value in _stored(model):
            yield name, full_tensor(value).to(dtype)
        return
    check_adapter(model)
    deltas = {f"{name}.weight": pairs for name, pairs in adapted_layers(model)} if merged else {}
    for name, value in _stored(model.get_base_model()):
        if "lora_" not in name:
            plain = name.replace(".base_layer", "")
            whole = full_tensor(value)
            for module, adapter in deltas.get(plain, []):
                with gathered(part for key, part in module.named_parameters() if "lora_" in key):
                    delta = full_tensor(module.get_delta_weight(adapter))
                whole = whole + delta.to(whole.dtype)
            yield plain, whole.to(dtype)


def _stored(model: Any) -> Iterator[tuple[str, Tensor]]:
    """A model's weights by name as they are, those of quantised layers as the numbers they stand for."""
    layers = {name: module for name, module in model.named_modules() if layer_is_quantized(module)}
    headless = getattr(model.config, "model_type", None) in _HEADLESS_IN_VLLM and model.config.tie_word_embeddings
    for name, value in model.state_dict(keep_vars=True).items():
        if headless and name == "lm_head.weight":
            continue
        layer, _, what = name.rpartition(".")
        if layer in layers and what == "weight":
            from peft.utils.integrations import dequantize_module_weight

            yield name, dequantize_module_weight(layers[layer])
        elif what == "bias" or (
            layer not in layers and layer.partition(".weight")[0] not in layers
        ):  # and not its scales
            yield name, value
