"""A model's decoder blocks."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from minillm.errors import InputError


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's blocks, whatever the architecture calls them."""
    depth = model.config.get_text_config().num_hidden_layers
    names = {module: name for name, module in model.named_modules()}
    for module in (
        *model.get_decoder().modules(),
        *names,
    ):  # a vision tower, which may come first, may have as many blocks
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return names[module], module
    raise InputError(
        f"{type(model).__name__}: no list of {depth} decoder blocks was found; it cannot be pruned by depth"
    )
