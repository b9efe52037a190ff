"""Sequences of unequal length to the tensors of one micro-batch.

Responses stay flat: everything that is per token of a response is one tensor [N], the responses one after another,
with `lengths` [B]. Nothing is read off the pad id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Padded:
    """B sequences, right-padded.

    input_ids: [B, L]. positions: [N], indices into the flattened [B·L] whose hidden states predict the
    N response tokens. targets: [N], those tokens. lengths: [B], response tokens per sequence.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    lengths: Tensor


def pad(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Padded:
    """Join prompts (each at least one token) with their responses."""
    lengths = [len(response) for response in responses]
    width = max(len(p) + n for p, n in zip(prompts, lengths, strict=True))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    positions, targets = [], []
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[b, :end] = torch.tensor([*prompt, *response])
        positions.append(torch.arange(len(prompt) - 1, end - 1) + b * width)
        targets.append(ids[b, len(prompt) : end])
    parts = Padded(ids, torch.cat(positions), torch.cat(targets), torch.tensor(lengths))
    return Padded(**{name: value.to(device) for name, value in vars(parts).items()})


def bucket(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in groups of `size`, like lengths together, so that padding is small."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[start : start + size] for start in range(0, len(order), size)]


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permutation(n: int, *seed: int | str) -> list[int]:
    generator = torch.Generator().manual_seed(seed_of(*seed))
    return torch.randperm(n, generator=generator).tolist()


def pack_text(documents: Sequence[Sequence[int]], block: int, eos: int) -> list[list[int]]:
    """Cut each document, ended by `eos`, into blocks of at most `block` tokens; a block holds one document only."""
    blocks = []
    for document in documents:
        ids = [*document, eos]
        blocks += [ids[start : start + block] for start in range(0, len(ids) - 1, block)]
    return [ids for ids in blocks if len(ids) > 1]
