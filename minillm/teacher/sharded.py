"""A teacher sharded over processes."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from minillm.models.layers import decoder_layers


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Deal a frozen model's blocks out over all processes (FSDP2), each block put together for its own forward; what is no block, the
    embeddings and the head among it, stays whole in each. Every process must then call as many forwards as the others.
    """
    from torch.distributed.fsdp import fully_shard

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
