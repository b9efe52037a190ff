"""Seeds and orders that depend on their arguments alone."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permutation(n: int, *seed: int | str) -> list[int]:
    generator = torch.Generator().manual_seed(seed_of(*seed))
    return torch.randperm(n, generator=generator).tolist()
