"""A sum over all bits of a model's weights that is the same wherever it is computed, and however weights are laid out.

Each weight, read as an integer, is multiplied by an odd number that belongs to its column, and everything is added
modulo 2⁶⁴. Integers add up to the same sum in every order, so a GPU, a CPU and any number of threads agree bit by bit.
Rows of several matrices that an engine has put together into one (q, k and v) add up to the sum of the matrices, and
rows of zeros that it has appended add nothing. A single changed bit changes the sum. It is no cryptographic hash: it
finds weights that were damaged, lost or mistaken for others, and not weights that somebody made to have the same sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from minillm.models.weights import plain_weights, tied_names

_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # the fraction of the golden ratio, as a signed number
_CHUNK = 1 << 20  # weights that are multiplied at once, in 8 bytes each
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fingerprint:
    """The sum of the weights that it has seen.

    Args:
        left_out: Names of weights that do not count, such as the second name of a tied weight.
    """

    def __init__(self, left_out: Iterable[str] = ()) -> None:
        self._left_out, self._sum, self.count = frozenset(left_out), 0, 0

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype) -> Fingerprint:
        """The sum of a model's weights in a dtype. Shards are gathered, so every process must call this."""
        found = cls(tied_names(model))
        for _ in found.over(plain_weights(model, dtype)):
            pass
        return found

    def over(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass weights on, and add them to the sum."""
        for name, value in weights:
            if name not in self._left_out:
                self.add(value)
            yield name, value

    def add(self, value: Tensor) -> None:
        """Add one weight."""
        self._sum = (self._sum + bit_sum(value)) % (1 << 64)
        self.count += 1

    @property
    def total(self) -> str:
        """The sum in 16 hexadecimal digits."""
        return f"{self._sum:016x}"


def bit_sum(value: Tensor) -> int:
    """The sum of one tensor, as a number below 2⁶⁴."""
    if not value.numel():
        return 0
    whole = value.detach().reshape(-1, value.shape[-1] if value.dim() else 1).contiguous()
    bits = whole.view(_INTEGERS[whole.dtype.itemsize])
    odd = torch.arange(1, 2 * bits.shape[1], 2, device=bits.device) * _ODD  # an odd number times an odd one is odd
    total = 0
    for rows in bits.split(max(_CHUNK // bits.shape[1], 1)):
        total += int((rows.to(torch.int64) * odd).sum())
    return total % (1 << 64)


def sum_of_parameters(model: Any) -> str:
    """The sum of the weights that an engine keeps in a module; a head that is tied to the embeddings counts once."""
    found, tied = Fingerprint(), bool(getattr(model.config, "tie_word_embeddings", False))
    for name, value in model.named_parameters():
        if not (tied and name.endswith("lm_head.weight")):
            found.add(value)
    return found.total
