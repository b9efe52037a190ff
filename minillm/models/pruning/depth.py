"""Which blocks go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm.errors import InputError
from minillm.models.layers import decoder_layers


@torch.no_grad()
def block_similarity(model: PreTrainedModel, prompts: Iterable[Sequence[int]]) -> Tensor:
    """Mean cosine of each block's input and output over all tokens, [layers].

    A block whose output points where its input did changes little and can go (ShortGPT, arXiv 2403.03853).
    """
    _, layers = decoder_layers(model)
    total, count = torch.zeros(len(layers), dtype=torch.float64), 0
    for ids in prompts:
        hidden = model(
            torch.tensor([list(ids)], device=model.device), output_hidden_states=True, use_cache=False
        ).hidden_states
        # The last entry is normalised after the last block; the block's own output is not kept, so it counts as kept.
        cosine = [torch.cosine_similarity(a.float(), b.float(), dim=-1).sum() for a, b in pairwise(hidden)]
        total += torch.stack(cosine).double().cpu()
        count += len(ids)
    if not count:
        raise InputError("no prompts to measure block similarity on")
    return total / count


def layers_to_keep(similarity: Tensor, keep: int) -> list[int]:
    """Drop the most similar blocks; the first and the last always stay."""
    depth = len(similarity)
    check_keep_layers(depth, keep)
    inner = sorted(range(1, depth - 1), key=lambda i: float(similarity[i]), reverse=True)
    dropped = set(inner[: depth - keep])
    return [i for i in range(depth) if i not in dropped]


def check_keep_layers(depth: int, keep: int) -> None:
    """Refuse to prune a teacher of `depth` layers to `keep`.

    Raises:
        ValueError: saying what is allowed.
    """
    if not 2 <= keep <= depth:
        raise InputError(f"student.keep_layers: must be between 2 and the teacher's {depth} layers (given: {keep})")
