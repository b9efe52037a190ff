"""What every sampling engine gives: responses, and the log-probabilities that drew them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.errors import EngineError

NamedTensors = Iterable[tuple[str, Tensor]]

_LEAST_BIAS = -100.0  # that vLLM takes
_MOST_BIASED = 1024  # tokens of a request, on a GPU: one more ends vLLM


@dataclass(frozen=True)
class EngineCapabilities:
    """What an engine returns exactly: log-probabilities of drawn tokens always, of others so many at a place.

    Attributes:
        max_top_logprobs: most of the likeliest tokens per position.
        max_logprobs_by_id: most tokens per position that can be asked for by id.
        supports_no_repeat_ngram: whether repeated n-grams can be blocked.
    """

    max_top_logprobs: int
    max_logprobs_by_id: int
    supports_no_repeat_ngram: bool = False

    def check(self, sampling: Sampling) -> None:
        """Refuse what an engine would not heed.

        Raises:
            EngineError: naming what to use instead.
        """
        if sampling.no_repeat_ngram and not self.supports_no_repeat_ngram:
            raise EngineError("no_repeat_ngram: vLLM blocks no n-grams; use engine: transformers")
        if sampling.top_logprobs > self.max_top_logprobs:
            raise EngineError(
                f"{sampling.top_logprobs} likeliest tokens a place are asked for; this engine tells {self.max_top_logprobs}"
            )


def padding_bias(vocab_size: int, width: int, *, limited: bool = True) -> dict[int, float] | None:
    """What vLLM adds to the logits of a head's rows beyond the vocabulary, so that it draws none of them.

    Its list of allowed tokens would say so exactly, but on a GPU it has room for 1,024.

    Args:
        limited: where vLLM runs on a GPU, or may.
    Raises:
        EngineError: more rows than vLLM takes.
    """
    if limited and width - vocab_size > _MOST_BIASED:
        raise EngineError(
            f"the model's head has {width - vocab_size:,} rows beyond the tokenizer's {vocab_size:,} tokens, of which vLLM leaves out "
            f"{_MOST_BIASED:,} at most; use the tokenizer that belongs to the model, cut the head "
            "(model.resize_token_embeddings(len(tokenizer))), or rollout.engine: transformers"
        )
    return dict.fromkeys(range(vocab_size, width), _LEAST_BIAS) or None


class Engine(Protocol):
    """Samples from one model whose weights can be replaced."""

    capabilities: EngineCapabilities
    version: int

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], progress: bool = False
    ) -> list[Rollout]:
        """One response a prompt, in order. The same seed, prompt and weights draw the same response."""
        ...

    def logprobs_of(self, prefixes: Sequence[list[int]], ids: Sequence[list[int]], sampling: Sampling) -> list[Tensor]:
        """Log-probability, as `generate` would draw it, of each of `ids[i]` as the token after `prefixes[i]`."""
        ...

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        """Replace every weight; names are those of the model's state dict."""
        ...

    def sleep(self) -> None:
        """Give memory back, where there is some to give, until new weights come."""
        ...

    def close(self) -> None: ...
