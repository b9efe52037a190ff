"""Seeds and orders that depend only on their arguments."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*parts: int | str) -> int:
    """Derive a seed from its parts, the same on every machine and in every process.

    The parts of a call are part of a run's randomness: with other parts, or in another order, the same recipe samples other
    tokens.

    Args:
        parts: Whatever tells this use of randomness from others, for example the run's seed, a purpose and a row.

    Returns:
        A seed of 63 bits that depends on every part.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permutation(n: int, *seed: int | str) -> list[int]:
    """Return a random order of the numbers from 0 to n - 1.

    Args:
        n: Length of the order.
        seed: Parts of the seed, as for `seed_of`.
    """
    generator = torch.Generator().manual_seed(seed_of(*seed))
    return torch.randperm(n, generator=generator).tolist()
