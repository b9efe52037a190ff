"""Turns sequences of unequal length into the tensors of one micro-batch.

Values that belong to response tokens are stored flat: one tensor of N tokens holds all responses of the batch, one
after another, and `lengths` says where each ends. Padding is known from the lengths and never from the id of a pad
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclass
class Padded:
    """Prompts with their responses, in right-padded rows.

    Attributes:
        input_ids: Token ids. Padding has id 0.
        positions: Indices into the flattened `input_ids` at which the model's outputs predict the response tokens: each
            is one before the position of the token itself.
        targets: The response tokens, the responses one after another.
        lengths: Number of response tokens of each sequence; they sum to the number of `targets`.
        position_ids: Position of each token in its own sequence, counted from 0. None if every row holds one sequence,
            because models count the positions the same way by themselves.
    """

    input_ids: Int[Tensor, "rows width"]
    positions: Int[Tensor, " tokens"]
    targets: Int[Tensor, " tokens"]
    lengths: Int[Tensor, " sequences"]
    position_ids: Int[Tensor, "rows width"] | None = None

    def sequence_lengths(self) -> list[int]:
        """Return the number of tokens of each sequence, prompt and response together.

        Sequences whose response is empty are left out.
        """
        last = self.positions[self.lengths[self.lengths > 0].cumsum(0) - 1]
        width = self.input_ids.shape[1]
        own = last % width if self.position_ids is None else self.position_ids.flatten()[last]
        return (own + 2).tolist()  # the last token follows the one that predicts it, and positions count from 0


def pad(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    *,
    rows: Sequence[int] | None = None,
) -> Padded:
    """Join each prompt with its response and pad the rows to one width.

    Args:
        prompts: Token ids of each prompt, at least one token each.
        responses: Token ids of each response.
        device: Device of the resulting tensors.
        rows: Index of the row for each sequence, as `share_rows` chooses them. Sequences with the same row follow each
            other in it. By default every sequence has a row of its own.

    Returns:
        The padded batch. Its rows are as wide as the longest of them.
    """
    rows = range(len(prompts)) if rows is None else rows
    ends = [0] * (max(rows) + 1)
    starts = []
    for row, prompt, response in zip(rows, prompts, responses, strict=True):
        starts.append(ends[row])
        ends[row] += len(prompt) + len(response)
    width = max(ends)
    ids = torch.zeros(len(ends), width, dtype=torch.long)
    position_ids = torch.arange(width).repeat(len(ends), 1)
    positions, targets = [], []
    for row, start, prompt, response in zip(rows, starts, prompts, responses, strict=True):
        first, end = start + len(prompt), start + len(prompt) + len(response)
        ids[row, start:end] = torch.tensor([*prompt, *response])
        position_ids[row, start:] = torch.arange(width - start)
        positions.append(torch.arange(first - 1, end - 1) + row * width)
        targets.append(ids[row, first:end])
    lengths = torch.tensor([len(response) for response in responses])
    packed = len(ends) < len(prompts)
    return Padded(
        input_ids=ids.to(device),
        positions=torch.cat(positions).to(device),
        targets=torch.cat(targets).to(device),
        lengths=lengths.to(device),
        position_ids=position_ids.to(device) if packed else None,
    )


def share_rows(lengths: Sequence[int], width: int) -> list[int]:
    """Assign sequences to rows, each to the first row that still has room for it.

    Args:
        lengths: Number of tokens of each sequence, none above `width`.
        width: Largest number of tokens in a row.

    Returns:
        The index of the row for each sequence, for `pad`.
    """
    room: list[int] = []
    rows = []
    for length in lengths:
        row = next((i for i, left in enumerate(room) if left >= length), len(room))
        if row == len(room):
            room.append(width)
        room[row] -= length
        rows.append(row)
    return rows


def bucket(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Group sequences of similar length, so that a batch of each group needs little padding.

    Args:
        lengths: Number of tokens of each sequence.
        size: Number of sequences in a group; the last group may have fewer.

    Returns:
        The indices of the sequences of each group, the shortest first.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[start : start + size] for start in range(0, len(order), size)]
