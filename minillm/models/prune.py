"""A student by depth pruning: the teacher without the blocks that change their input least."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's blocks, whatever the architecture calls them."""
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise ValueError(f"{type(model).__name__}: no list of {depth} decoder blocks was found; it cannot be pruned by depth")


@torch.no_grad()
def block_similarity(model: PreTrainedModel, prompts: Iterable[Sequence[int]]) -> Tensor:
    """Mean cosine of each block's input and output over all tokens, [layers].

    A block whose output points where its input did changes little and can go (ShortGPT, arXiv 2403.03853).
    """
    _, layers = decoder_layers(model)
    total, count = torch.zeros(len(layers), dtype=torch.float64), 0
    for ids in prompts:
        hidden = model(torch.tensor([list(ids)], device=model.device), output_hidden_states=True, use_cache=False).hidden_states
        # The last entry is normalised after the last block; the block's own output is not kept, so it counts as kept.
        cosine = [torch.cosine_similarity(a.float(), b.float(), dim=-1).sum() for a, b in pairwise(hidden)]
        total += torch.stack(cosine).double().cpu()
        count += len(ids)
    if not count:
        raise ValueError("no prompts to measure block similarity on")
    return total / count


def layers_to_keep(similarity: Tensor, keep: int) -> list[int]:
    """Drop the most similar blocks; the first and the last always stay."""
    depth = len(similarity)
    if not 2 <= keep <= depth:
        raise ValueError(f"student.keep_layers: must be between 2 and the teacher's {depth} layers (given: {keep})")
    inner = sorted(range(1, depth - 1), key=lambda i: float(similarity[i]), reverse=True)
    dropped = set(inner[: depth - keep])
    return [i for i in range(depth) if i not in dropped]


def prune(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A new model with the layers `kept`, in order, sharing no memory with `model`."""
    name, _ = decoder_layers(model)
    config: Any = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.num_hidden_layers = len(kept)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i] for i in kept]
    pruned = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    places = {old: new for new, old in enumerate(kept)}
    state = {}
    for key, value in model.state_dict().items():
        rest = key.removeprefix(f"{name}.")
        if rest == key:
            state[key] = value
            continue
        index, _, tail = rest.partition(".")
        if int(index) in places:
            state[f"{name}.{places[int(index)]}.{tail}"] = value
    pruned.load_state_dict(state)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.eval()
