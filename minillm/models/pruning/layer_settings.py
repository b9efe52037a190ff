"""The depth of a config: how many layers it has, and the settings that belong to single ones."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

# Settings that count layers: from the first one on, and back from the last.
_FROM_THE_FIRST = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
_FROM_THE_LAST = ("num_kv_shared_layers",)
# Lists of layers, by index: Qwen's mlp_only_layers, Llama 4's moe_layers, Bamba's attn_layer_indices, LFM2's full_attn_idxs.
_LISTS_LAYERS = re.compile(r"layer|idx|indices|indexes")
_LISTS_TOKENS = re.compile(r"token_ids?$|_tokens$")


def cut_config(config: Any, kept: Sequence[int]) -> Any:
    """The config of the model with the layers `kept` alone: every setting that belongs to single layers is cut, whatever its name.

    It is made as one that is read from a file is, so that what the class works out from a pattern or a period is worked out again:
    `prune` makes sure that the model still is what it was.
    """
    text = config.get_text_config()
    depth = text.num_hidden_layers
    settings = text.to_dict()
    for name, value in settings.items():
        settings[name] = _cut(name, value, depth, kept)
    settings[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    # Patterns that are repeated to the depth are written out.
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
    places = {old: new for new, old in enumerate(kept)}
    if name in _FROM_THE_FIRST and isinstance(value, int):
        return sum(i < value for i in kept)
    if name in _FROM_THE_LAST and isinstance(value, int):
        return sum(i >= depth - value for i in kept)
    if name == "per_layer_config" and isinstance(value, dict):
        return {places[int(i)]: setting for i, setting in value.items() if int(i) in places}
    if not isinstance(value, list) or _LISTS_TOKENS.search(name):
        return value
    if _LISTS_LAYERS.search(name) and value and _ascends(value, depth):
        return [places[i] for i in value if i in places]
    return [value[i] for i in kept] if len(value) == depth else value


def _ascends(value: list[Any], depth: int) -> bool:
    """Whether a list can be one of layers' indices."""
    return all(type(i) is int and 0 <= i < depth for i in value) and all(a < b for a, b in pairwise(value))
