"""Finds the decoder blocks of a model."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from minillm.errors import InputError


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the decoder's blocks, whatever the architecture calls them.

    Raises:
        InputError: The model has no list of as many blocks as its config says.
    """
    depth = model.config.get_text_config().num_hidden_layers
    names = {module: name for name, module in model.named_modules()}
    # The decoder's own modules are searched first: a vision tower that comes before it may have as many blocks.
    for module in (*model.get_decoder().modules(), *names):
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return names[module], module
    raise InputError(
        f"{type(model).__name__}: no list of {depth} decoder blocks was found; it cannot be pruned by depth"
    )
