"""Chooses the blocks that depth pruning keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from minillm.errors import InputError
from minillm.models.layers import decoder_layers

if TYPE_CHECKING:
    from jaxtyping import Float


@torch.no_grad()
def block_similarity(model: PreTrainedModel, prompts: Iterable[Sequence[int]]) -> Float[Tensor, " layers"]:
    """Return the mean cosine similarity of each block's input and output over all tokens.

    A block whose output points in the direction of its input changes little and can be removed (ShortGPT,
    arXiv 2403.03853).

    Args:
        model: The model.
        prompts: Token ids of the prompts to measure on.

    Returns:
        One value per block, in float64.

    Raises:
        InputError: There are no prompts.
    """
    _, layers = decoder_layers(model)
    total, count = torch.zeros(len(layers), dtype=torch.float64), 0
    for ids in prompts:
        hidden = model(
            torch.tensor([list(ids)], device=model.device), output_hidden_states=True, use_cache=False
        ).hidden_states
        # The last entry has passed the final norm, because the last block's own output is not returned. That does not
        # matter, because the last block is always kept.
        cosine = [torch.cosine_similarity(a.float(), b.float(), dim=-1).sum() for a, b in pairwise(hidden)]
        total += torch.stack(cosine).double().cpu()
        count += len(ids)
    if not count:
        raise InputError("no prompts to measure block similarity on")
    return total / count


def layers_to_keep(similarity: Float[Tensor, " layers"], keep: int) -> list[int]:
    """Choose the blocks to keep: the first, the last, and those with the lowest similarity.

    Args:
        similarity: Similarity of each block's input and output, as from `block_similarity`.
        keep: Number of blocks to keep.

    Returns:
        Their indices, in ascending order.

    Raises:
        InputError: As for `check_keep_layers`.
    """
    depth = len(similarity)
    check_keep_layers(depth, keep)
    inner = sorted(range(1, depth - 1), key=lambda i: float(similarity[i]), reverse=True)
    dropped = set(inner[: depth - keep])
    return [i for i in range(depth) if i not in dropped]


def check_keep_layers(depth: int, keep: int) -> None:
    """Refuse to prune a teacher to a number of layers that is impossible.

    Args:
        depth: Layers of the teacher.
        keep: Layers to keep.

    Raises:
        InputError: Saying what is allowed.
    """
    if not 2 <= keep <= depth:
        raise InputError(f"student.keep_layers: must be between 2 and the teacher's {depth} layers (given: {keep})")


def check_prunable(config: Any) -> None:
    """Refuse a model whose blocks are not found, by its config; no weights are read.

    Raises:
        InputError: As for `decoder_layers`.
    """
    with torch.device("meta"):
        decoder_layers(AutoModelForCausalLM.from_config(config))
