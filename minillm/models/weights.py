"""Reads the weights of a trained model under the names of its plain architecture, for an engine or a saved folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minillm.models.families import family_of
from minillm.models.lora import adapted_layers, check_adapter
from minillm.models.quantization import layer_is_quantized
from minillm.models.shards import full_tensor, gathered


def plain_weights(model: Any, dtype: torch.dtype, *, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the complete weights of a model. A tied weight appears under each of its names, as one tensor.

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
    adapted = hasattr(model, "get_base_model")
    if adapted:
        check_adapter(model)
    base = model.get_base_model() if adapted else model
    deltas = {f"{name}.weight": pairs for name, pairs in adapted_layers(model)} if adapted and merged else {}
    times = Counter(map(id, base.state_dict(keep_vars=True).values()))
    tied: dict[int, Tensor] = {}  # as they were gathered and cast for the first of their names
    for stored, value in _stored(base):
        if adapted and "lora_" in stored:
            continue
        name = stored.replace(".base_layer", "") if adapted else stored
        if pairs := deltas.get(name):
            yield name, _merged(value, pairs).to(dtype)
            continue
        whole = tied.get(id(value))
        if whole is None:
            whole = full_tensor(value, dtype)
        if times[id(value)] > 1:
            tied[id(value)] = whole
        yield name, whole


def tied_names(model: Any) -> set[str]:
    """The names under which `plain_weights` returns a weight that it has returned under another name before."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    seen: set[int] = set()
    found: set[str] = set()
    for name, value in base.state_dict(keep_vars=True).items():
        if id(value) in seen:
            found.add(name.replace(".base_layer", ""))
        seen.add(id(value))
    return found


def _merged(value: Tensor, pairs: Sequence[tuple[Any, str]]) -> Tensor:
    """A complete weight with the adapters of its layer, in the dtype that it is stored in."""
    whole = full_tensor(value)
    for module, adapter in pairs:
        with gathered(part for key, part in module.named_parameters() if "lora_" in key):
            delta = full_tensor(module.get_delta_weight(adapter))
        whole = whole + delta.to(whole.dtype)
    return whole


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
