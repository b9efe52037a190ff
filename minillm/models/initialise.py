"""A model with random weights: the class of another model, in a size of one's own."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedModel

from minillm.errors import InputError
from minillm.models.pruning.layer_settings import cut_config

_DERIVED = ("layer_types",)  # lists with an entry for each layer, which a config makes again for another number
_HEAD_SIZE = ("hidden_size", "num_attention_heads")  # whose quotient it is, unless a family says another
_NOT_A_SIZE = {
    "model_type": "name a model of that type in student.like",
    "vocab_size": "it is the teacher's, because both predict the same tokens",
    "torch_dtype": "set student.dtype",
    "dtype": "set student.dtype",
}


def config_like(config: Any, shape: Mapping[str, Any], vocab_size: int) -> Any:
    """Return the config of a model of the same class in another size.

    Args:
        config: Config of the other model. Of one with several parts, the text part counts.
        shape: Settings of the config that differ, by the names of its class, such as `hidden_size`.
        vocab_size: Rows of the embedding.

    Raises:
        InputError: The class has no such setting, or sizes that do not divide.
    """
    text = config.get_text_config()
    names = {*text.to_dict(), *text.attribute_map}
    for name in shape:
        if name in _NOT_A_SIZE:
            raise InputError(f"student.shape: {name} is not set here: {_NOT_A_SIZE[name]}")
        if name not in names:
            near = difflib.get_close_matches(name, names, 3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise InputError(f"student.shape: {type(text).__name__} has no {name}{hint}")
    given = {text.attribute_map.get(name, name): value for name, value in shape.items()}
    try:
        made = type(text).from_dict({**_settings_beside(text, given), **given, "vocab_size": vocab_size})
        _check_sizes(made)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(made)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, ArithmeticError, KeyError, StrictDataclassError) as error:
        raise InputError(f"student.shape: {type(text).__name__}: {textwrap.shorten(str(error), 300)}") from error
    return made


def _settings_beside(text: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config that others replace, without those that follow from what is replaced."""
    depth, settings = text.num_hidden_layers, text.to_dict()
    layers = given.get(text.attribute_map.get("num_hidden_layers", "num_hidden_layers"), depth)
    if 0 < layers < depth:
        settings = cut_config(text, range(layers)).to_dict()
    elif layers > depth:
        settings = {name: value for name, value in settings.items() if name not in _DERIVED}
    if settings.get("head_dim") == text.hidden_size // text.num_attention_heads:
        sizes = {name: given.get(text.attribute_map.get(name, name), getattr(text, name)) for name in _HEAD_SIZE}
        settings["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    return settings


def _check_sizes(config: Any) -> None:
    """Refuse sizes that no forward pass could be made with."""
    if config.num_hidden_layers < 1:
        raise InputError(f"student.shape: num_hidden_layers must be at least 1 (given: {config.num_hidden_layers})")
    width, heads = config.hidden_size, config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "head_dim", None) in (None, width // heads) and width % heads:
        raise InputError(f"student.shape: hidden_size {width} is no multiple of num_attention_heads {heads}")
    if heads % groups:
        raise InputError(
            f"student.shape: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}: set both"
        )


def random_model(config: Any, seed: int) -> PreTrainedModel:
    """Return a model of a config with the weights that its class begins training with, in float32.

    Args:
        config: Config of the model.
        seed: Seed of the weights. The generators of the process are as before afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()
