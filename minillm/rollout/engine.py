"""What every sampling engine gives: responses, and the log-probabilities that drew them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from minillm.data.rollouts import Rollout, Sampling

NamedTensors = Iterable[tuple[str, Tensor]]


class Engine(Protocol):
    """Samples from one model whose weights can be replaced."""

    version: int

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], progress: bool = False) -> list[Rollout]:
        """One response a prompt, in order. The same seed, prompt and weights draw the same response."""
        ...

    def logprobs_of(self, prefixes: Sequence[list[int]], ids: Sequence[list[int]], sampling: Sampling) -> list[Tensor]:
        """Log-probability, as `generate` would draw it, of each of `ids[i]` as the token after `prefixes[i]`."""
        ...

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        """Replace every weight; names are those of the model's state dict."""
        ...

    def rest(self) -> None:
        """Give memory back, where there is some to give, until new weights come."""
        ...

    def close(self) -> None: ...
