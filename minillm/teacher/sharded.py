"""A teacher sharded over processes."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from minillm.models.layers import decoder_layers


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Shard a frozen model's decoder layers over all processes (FSDP2).

    Each layer is gathered for its own forward. Everything else, including the embeddings and the head, stays whole in
    each process. Every process must then run the same number of forwards.

    Args:
        model: the model, which is changed in place.
        device: this process's device.

    Returns:
        The same model.
    """
    _, blocks = decoder_layers(model)
    for block in blocks:
        fully_shard(block.to(device))  # one after another: the whole model is never on a device
    parts = {id(parameter) for parameter in blocks.parameters()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in parts:
                getattr(module, name).data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model
