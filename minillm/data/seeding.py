"""Seeds and orders that depend only on their arguments."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*parts: int | str) -> int:
    """Derive a seed from its parts, the same on every machine and in every process.

    The parts of a call are part of a run's randomness: with other parts, or in another order, the same recipe samples
    other tokens.

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
    return _order(n, *seed).tolist()


def _order(n: int, *seed: int | str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed_of(*seed))
    return torch.randperm(n, generator=generator)


class ShuffledPasses:
    """Endless passes over the numbers from 0 to n - 1, each pass in a random order of its own.

    The order of a pass is `permutation(n, *seed, pass)`. It is drawn once, so that the cost of a position does not grow
    with n, and kept as 8 bytes a number until another pass is asked for.

    Args:
        n: Length of a pass, at least 1.
        seed: Parts of the seed, as for `seed_of`.
    """

    def __init__(self, n: int, *seed: int | str) -> None:
        self._n, self._seed = n, seed
        self._drawn: tuple[int, torch.Tensor] | None = None

    def __getitem__(self, position: int) -> int:
        """Return the number at a position of the endless sequence of passes, counted from 0."""
        number, index = divmod(position, self._n)
        if self._drawn is None or self._drawn[0] != number:
            self._drawn = number, _order(self._n, *self._seed, number)
        return int(self._drawn[1][index])
