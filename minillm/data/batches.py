"""Sequences of unequal length to the tensors of one micro-batch.

Responses stay flat: everything that is per token of a response is one tensor [N], the responses one after another,
with `lengths` [B]. Nothing is read off the pad id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Padded:
    """Sequences in R rows of L tokens, right-padded.

    input_ids: [R, L]. positions: [N], indices into the flattened [R·L] whose hidden states predict the
    N response tokens. targets: [N], those tokens. lengths: response tokens per sequence. position_ids: [R, L], starting
    from 0 at every sequence; None where no row holds more than one.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    lengths: Tensor
    position_ids: Tensor | None = None


def pad(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device | str = "cpu", *,
    rows: Sequence[int] | None = None,
) -> Padded:  # fmt: skip
    """Join prompts (each at least one token) with their responses.

    Args:
        rows: the row that each sequence is put in, after those already there; by default one each.
    """
    rows = range(len(prompts)) if rows is None else rows
    ends = [0] * (max(rows) + 1)
    starts = []
    for row, prompt, response in zip(rows, prompts, responses, strict=True):
        starts.append(ends[row])
        ends[row] += len(prompt) + len(response)
    width = max(ends)
    ids = torch.zeros(len(ends), width, dtype=torch.long)
    places = torch.arange(width).repeat(len(ends), 1)
    positions, targets = [], []
    for row, start, prompt, response in zip(rows, starts, prompts, responses, strict=True):
        first, end = start + len(prompt), start + len(prompt) + len(response)
        ids[row, start:end] = torch.tensor([*prompt, *response])
        places[row, start:] = torch.arange(width - start)
        positions.append(torch.arange(first - 1, end - 1) + row * width)
        targets.append(ids[row, first:end])
    lengths = torch.tensor([len(response) for response in responses])
    packed = len(ends) < len(prompts)
    ids, places, at, drawn, lengths = (
        part.to(device) for part in (ids, places, torch.cat(positions), torch.cat(targets), lengths)
    )
    return Padded(ids, at, drawn, lengths, places if packed else None)


def share_rows(lengths: Sequence[int], width: int) -> list[int]:
    """A row for each sequence, so that none is longer than `width`: the first with room for it (no sequence may be longer itself)."""
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
    """Indices in groups of `size`, like lengths together, so that padding is small."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[start : start + size] for start in range(0, len(order), size)]
