"""Sizes of a model, computed without its weights.

The memory that autograd keeps from a forward pass is counted, not estimated: the model's body runs on fake tensors,
which have shapes and no data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
from minillm.models.flops import Dimensions, dimensions_of, inner_size
from minillm.models.initialise import config_like
from minillm.models.pruning.depth import check_keep_layers
from minillm.models.pruning.layer_settings import cut_config


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        name: Folder, hub id or GGUF file of the model.
        config: Config of its text model.
        parameters: Number of parameters. A tied head counts once.
        head: Number of parameters of the output head, tied or not.
        dimensions: Sizes of its matrix products, as if every weight were trained.
    """

    name: str
    config: Any
    parameters: int
    head: int
    dimensions: Dimensions

    @property
    def hidden(self) -> int:
        """Size of the hidden states."""
        return self.config.hidden_size

    @property
    def layers(self) -> int:
        """Number of decoder blocks."""
        return self.config.num_hidden_layers

    @property
    def inner(self) -> int:
        """Width of the feed-forward layers."""
        return inner_size(self.config)

    @property
    def body(self) -> int:
        """Number of parameters without embedding and head."""
        tied = getattr(self.config, "tie_word_embeddings", False)
        return self.parameters - (self.head if tied else 2 * self.head)

    def cached(self, itemsize: int) -> int:
        """Return the bytes of one token's keys and values in all layers.

        Args:
            itemsize: Bytes of one number.
        """
        return cached_bytes(self.config, itemsize)


def cached_bytes(config: Any, itemsize: int) -> int:
    """Return the bytes of one token's keys and values in all layers of a model.

    Args:
        config: Config of the text model.
        itemsize: Bytes of one number.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_size(config) * itemsize


def shape_of(source: str, keep_layers: int | None = None) -> Shape:
    """Return the sizes of a model, from a folder, from published dimensions or from the config on the hub.

    Args:
        source: Folder, hub id or GGUF file.
        keep_layers: Number of layers that pruning keeps, to get the sizes of the pruned model.

    Raises:
        MissingError, NotAFolderError, SourceError: The model is not there.
        InputError: The model has fewer layers than `keep_layers`, or `keep_layers` is below 2.
    """
    config = published_config(source)
    if keep_layers is not None:
        depth = config.get_text_config().num_hidden_layers
        check_keep_layers(depth, keep_layers)
        # Which layers pruning will remove is not known yet, and does not change the sizes.
        config = cut_config(config, [*range(keep_layers - 1), depth - 1])
    return _shape(source, config)


def shape_like(source: str, settings: Mapping[str, Any], vocab_size: int) -> Shape:
    """Return the sizes of a model that `minillm.models.initialise` makes.

    Args:
        source: Folder or hub id of the model of the same class.
        settings: What differs from its config.
        vocab_size: Rows of the embedding.

    Raises:
        MissingError, NotAFolderError, SourceError: The model is not there.
        InputError: The class has no such setting, or the sizes do not fit.
    """
    return _shape(f"like {source}", config_like(published_config(source), settings, vocab_size))


def _shape(source: str, config: Any) -> Shape:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings().weight.numel()
    return Shape(source, config.get_text_config(), model.num_parameters(), head, dimensions_of(model))


def published_config(source: str) -> Any:
    """Return the config of a folder, of a model of a shipped recipe, which needs no network, or from the hub."""
    if source in KNOWN and not Path(source).is_dir():
        sizes = dict(KNOWN[source])
        return AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    return read_config(source)


def kept_bytes(
    shape: Shape,
    rows: int,
    length: int,
    *,
    half: bool,
    checkpointing: bool,
    sharded: bool = False,
    attention: str | None = None,
) -> float:
    """Return the bytes that autograd keeps from a forward pass of the body. float32 weights are not counted.

    Args:
        shape: Sizes of the model.
        rows: Number of sequences.
        length: Tokens of each sequence.
        half: Whether the forward pass runs under autocast to bfloat16, whose copies of the weights are counted.
        checkpointing: Whether gradients are checkpointed. One block at a time is then computed again, and autocast's
            copies exist only during the forward pass.
        sharded: Whether weights are sharded. They are then gathered in bfloat16 one block at a time and freed again, so
            there are no copies.
        attention: Implementation of attention; None for the one that transformers chooses.
    """
    config, kind = shape.config.to_json_string(use_diff=False), type(shape.config)
    copies = 2.0 * shape.body if half else 0.0
    whole = _count_kept_bytes(config, kind, rows, length, half, False, attention)
    if not checkpointing:
        return whole - copies if sharded else whole
    block = (whole - copies if sharded else whole) / shape.layers
    checkpoints = _count_kept_bytes(config, kind, rows, length, half, True, attention)
    return checkpoints + (block if sharded else max(block, copies))


@cache
def _count_kept_bytes(
    config: str, kind: Any, rows: int, length: int, half: bool, checkpointing: bool, attention: str | None
) -> int:
    """Count the bytes that autograd keeps, on fake tensors. `config` is JSON, so that results can be cached."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        model: Any = AutoModelForCausalLM.from_config(
            kind.from_dict(json.loads(config)), dtype=torch.float32, attn_implementation=attention
        )
        # Dropout is off in training too, and OPT draws a random number for each layer, which cannot be a fake tensor.
        model.eval()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            address = tensor.untyped_storage()._cdata
            if address not in weights:
                kept[address] = tensor  # holding the tensor keeps another one from getting its address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
