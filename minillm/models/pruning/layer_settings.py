"""Cuts a config to some of its layers: their number, and the settings that belong to single layers."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

# Settings that are a number of layers, counted from the first layer and from the last.
_FROM_THE_FIRST = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
_FROM_THE_LAST = ("num_kv_shared_layers",)
# Lists of layer indices: Qwen's mlp_only_layers, Llama 4's moe_layers, Bamba's attn_layer_indices, LFM2's
# full_attn_idxs.
_LISTS_LAYERS = re.compile(r"layer|idx|indices|indexes")
_LISTS_TOKENS = re.compile(r"token_ids?$|_tokens$")


def cut_config(config: Any, kept: Sequence[int]) -> Any:
    """Return the config of a model with some of its layers. Settings of single layers are cut, whatever their names.

    The config is built as if it were read from a file, so that its class derives again what it derives from a pattern
    or a period. That can give a layer another setting than it had; `prune` checks that the model computes the same.

    Args:
        config: Config of the model.
        kept: Indices of the layers to keep, in ascending order.
    """
    text = config.get_text_config()
    depth = text.num_hidden_layers
    settings = text.to_dict()
    for name, value in settings.items():
        settings[name] = _cut(name, value, depth, kept)
    settings[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    # Patterns that are repeated up to the number of layers are written out.
    if "attention_types" in settings and hasattr(text, "attention_layers"):  # GPT-Neo
        settings["attention_types"] = [[[text.attention_layers[i] for i in kept], 1]]
    if "block_types" in settings and hasattr(text, "layers_block_type"):  # RecurrentGemma
        settings["block_types"] = [text.layers_block_type[i] for i in kept]
    cut = type(text).from_dict(settings)
    if text is config:
        return cut
    whole = copy.deepcopy(config)
    setattr(whole, next(name for name, value in vars(config).items() if value is text), cut)
    return whole


def _cut(name: str, value: Any, depth: int, kept: Sequence[int]) -> Any:
    """Return the value of a setting for the layers that are kept."""
    new_index = {old: new for new, old in enumerate(kept)}
    if name in _FROM_THE_FIRST and isinstance(value, int):
        return sum(i < value for i in kept)
    if name in _FROM_THE_LAST and isinstance(value, int):
        return sum(i >= depth - value for i in kept)
    if name == "per_layer_config" and isinstance(value, dict):
        return {new_index[int(i)]: setting for i, setting in value.items() if int(i) in new_index}
    if not isinstance(value, list) or _LISTS_TOKENS.search(name):
        return value
    if _LISTS_LAYERS.search(name) and value and _are_layer_indices(value, depth):
        return [new_index[i] for i in value if i in new_index]
    return [value[i] for i in kept] if len(value) == depth else value


def _are_layer_indices(value: list[Any], depth: int) -> bool:
    """Return whether a list is of ascending indices of layers."""
    return all(type(i) is int and 0 <= i < depth for i in value) and all(a < b for a, b in pairwise(value))
