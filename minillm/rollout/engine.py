"""What every sampling engine gives: responses, and the log-probabilities that drew them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from minillm.data.rollouts import EngineError, Rollout, Sampling

NamedTensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Offers:
    """What an engine returns exactly: log-probabilities of drawn tokens always, of others so many at a place.

    likeliest: most of the likeliest tokens. named: most that can be asked for by id. Rows of a padded head are never drawn.
    """

    likeliest: int
    named: int
    blocks_ngrams: bool = False

    def check(self, sampling: Sampling) -> None:
        """Refuse what an engine would not heed.

        Raises:
            EngineError: naming what to use instead.
        """
        if sampling.no_repeat_ngram and not self.blocks_ngrams:
            raise EngineError("no_repeat_ngram: vLLM blocks no n-grams; use engine: transformers")
        if sampling.likeliest > self.likeliest:
            raise EngineError(f"{sampling.likeliest} likeliest tokens a place are asked for; this engine tells {self.likeliest}")


class Engine(Protocol):
    """Samples from one model whose weights can be replaced."""

    offers: Offers
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
