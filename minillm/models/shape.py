"""Sizes of a model whose weights are not read.

What autograd keeps of a forward is counted, not guessed: the body is run on fake tensors, which have shapes and no data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from minillm.models.configs import head_size, read_config
from minillm.models.families import KNOWN
from minillm.models.pruning.depth import check_keep_layers
from minillm.models.pruning.layer_settings import cut_config


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    name: str
    config: Any
    parameters: int
    head: int  # parameters of the output head, tied or not

    @property
    def hidden(self) -> int:
        return self.config.hidden_size

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def inner(self) -> int:
        """Width of the feed-forward layers."""
        return (
            getattr(self.config, "intermediate_size", None) or getattr(self.config, "ffn_dim", None) or 4 * self.hidden
        )

    @property
    def body(self) -> int:
        """Parameters that multiply in the body."""
        tied = getattr(self.config, "tie_word_embeddings", False)
        return self.parameters - (self.head if tied else 2 * self.head)

    def cached(self, itemsize: int) -> int:
        """Bytes of one token's keys and values."""
        return cached_bytes(self.config, itemsize)


def cached_bytes(config: Any, itemsize: int) -> int:
    """Bytes of one token's keys and values in all layers of a (text) config."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_size(config) * itemsize


def shape_of(source: str, keep_layers: int | None = None) -> Shape:
    """From a folder, from published dimensions, or from the hub's config.

    Args:
        keep_layers: layers that are left after pruning.

    Raises:
        ValueError: the model has fewer layers than that, or fewer than 2 would be left.
    """
    config = _config(source)
    if keep_layers is not None:
        depth = config.get_text_config().num_hidden_layers
        check_keep_layers(depth, keep_layers)
        config = cut_config(config, [*range(keep_layers - 1), depth - 1])  # which will go is not known yet
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    return Shape(source, config.get_text_config(), model.num_parameters(), model.get_output_embeddings().weight.numel())


def _config(source: str) -> Any:
    if source in KNOWN and not Path(source).is_dir():
        sizes = dict(KNOWN[source])
        return AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    return read_config(source)


def kept_bytes(
    shape: Shape, rows: int, length: int, *, half: bool, checkpointing: bool, sharded: bool = False
) -> float:
    """What autograd keeps of the body's forward over `rows` sequences of `length` tokens, float32 weights left out.

    Args:
        half: under autocast to bfloat16, whose copies of the weights count.
        checkpointing: then one block is computed again at a time, and autocast's copies live through the forward.
        sharded: weights are gathered in bfloat16 a block at a time, and let go of; there are no copies.
    """
    config, kind = shape.config.to_json_string(use_diff=False), type(shape.config)
    copies = 2.0 * shape.body if half else 0.0
    whole = _kept(config, kind, rows, length, half, False)
    if not checkpointing:
        return whole - copies if sharded else whole
    block = (whole - copies if sharded else whole) / shape.layers
    return _kept(config, kind, rows, length, half, True) + (block if sharded else max(block, copies))


@cache
def _kept(config: str, kind: Any, rows: int, length: int, half: bool, checkpointing: bool) -> int:
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        model: Any = AutoModelForCausalLM.from_config(kind.from_dict(json.loads(config)), dtype=torch.float32)
        model.eval()  # dropout is off in training too, and OPT draws a number for each layer, which a fake one cannot be
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            place = tensor.untyped_storage()._cdata
            if place not in weights:
                kept[place] = tensor  # held, so that no other takes its place
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
