"""Exact sampling from the mixture p̃ = (1 − α)·q + α·p of student and teacher (section 2.2 of the MiniLLM paper).

Both models make every step, each with its own keys and values. A coin that shows the teacher with probability α decides
which of the two distributions a token is sampled from, so that p̃ itself is never computed over the vocabulary. The
sampled token's log q and log p are computed in the same step, and so is KL(q‖p) of the two distributions: objectives
that need it before the first update on a batch need no forward pass of the student for it.

The random numbers of a token are a function of the response's seed and the token's position in the response. A response
therefore does not depend on which others are sampled beside it, nor on the engine that samples it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from minillm.data.logprobs import LOG_ZERO
from minillm.data.rollouts import TeacherTargets
from minillm.errors import EngineError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_BLOCK = 256  # tokens whose probabilities are added up before one of them is looked for
_SEED_STEP, _FACTORS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # SplitMix64's constants
_MASK = (1 << 64) - 1


def uniform_numbers(seeds: Sequence[int], positions: Sequence[int]) -> Float[Tensor, "rows 2"]:
    """Return two uniform random numbers for each token, as a function of its seed and position alone.

    The numbers are those of the generator SplitMix64, which starts from a hash of the seed and can be read at any
    position. (A generator object for every response would have to be kept and restored with it.)

    Args:
        seeds: The seed of each row's response, of up to 64 bits.
        positions: The position of each row's token in its response, counted from 0.

    Returns:
        float64 on the CPU, at least 0 and below 1.
    """
    keys = np.array([seed & _MASK for seed in seeds], dtype=np.uint64)
    counters = 2 * np.array(positions, dtype=np.uint64)[:, None] + np.array([1, 2], dtype=np.uint64)
    with np.errstate(over="ignore"):
        bits = _scrambled(_scrambled(keys)[:, None] + counters * np.uint64(_SEED_STEP))
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _scrambled(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, a bijection of 64-bit numbers."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FACTORS[0])
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_FACTORS[1])
    return values ^ (values >> np.uint64(31))


@dataclass
class MixedTokens:
    """One token for each of R rows of a step.

    Attributes:
        tokens: The sampled tokens.
        student_logprobs: float32, log q of each token.
        teacher_logprobs: float32, log p of each token.
        reverse_kl: float32, KL(q‖p) of the distributions of each row.
    """

    tokens: Int[Tensor, " rows"]
    student_logprobs: Float[Tensor, " rows"]
    teacher_logprobs: Float[Tensor, " rows"]
    reverse_kl: Float[Tensor, " rows"]

    def select(self, rows: Int[Tensor, " rows"]) -> MixedTokens:
        """Return some of the rows."""
        return MixedTokens(**{name: values[rows] for name, values in vars(self).items()})


def sample_mixture(
    student: Float[Tensor, "rows head"],
    teacher: Float[Tensor, "rows head"],
    uniform: Float[Tensor, "rows 2"],
    alpha: float | Float[Tensor, " rows"],
    temperature: float | Float[Tensor, " rows"],
    vocab_size: int,
) -> MixedTokens:
    """Sample one token for each row from (1 − α)·q + α·p.

    Args:
        student: Logits of the student's whole head, which may be wider than the vocabulary.
        teacher: Logits of the teacher's.
        uniform: Two numbers for each row, as `uniform_numbers` makes them. The first is the coin, and the second is
            looked up in the chosen model's cumulative distribution.
        alpha: The teacher's share, of all rows or of each.
        temperature: What the logits are divided by, for all rows or for each.
        vocab_size: Number of ids that can be sampled.
    """
    uniform = uniform.to(student.device)
    q = _Distribution.of(student, temperature, vocab_size)
    p = _Distribution.of(teacher, temperature, vocab_size)
    from_teacher = uniform[:, 0] < alpha
    rows = torch.arange(len(uniform), device=student.device)
    sums = torch.where(from_teacher[:, None], p.sums, q.sums)
    block, rest = _look_up(sums.cumsum(-1), uniform[:, 1])
    within = torch.where(from_teacher[:, None], p.masses[rows, block], q.masses[rows, block])
    offset, _ = _look_up(within.double().cumsum(-1), rest)
    tokens = block * _BLOCK + offset
    return MixedTokens(tokens, q.logprobs(tokens), p.logprobs(tokens), q.divergence_from(p))


@dataclass
class _Distribution:
    """One model's next-token distributions, up to a factor for each row."""

    logits: Tensor  # [rows, vocabulary] float32
    masses: Tensor  # [rows, blocks, _BLOCK] float32, exp(logit − greatest logit)
    sums: Tensor  # [rows, blocks] float64
    log_total: Tensor  # [rows] float32, log Σ exp(logit)

    @classmethod
    def of(cls, logits: Tensor, temperature: float | Tensor, vocab_size: int) -> _Distribution:
        logits = logits[:, :vocab_size].float()
        if isinstance(temperature, Tensor):
            logits = logits / temperature[:, None]
        elif temperature != 1.0:
            logits = logits / temperature
        greatest = logits.amax(-1, keepdim=True)
        masses = torch.nn.functional.pad(torch.exp(logits - greatest), (0, -vocab_size % _BLOCK))
        masses = masses.view(len(logits), -1, _BLOCK)
        sums = masses.sum(-1).double()
        return cls(logits, masses, sums, greatest[:, 0] + sums.sum(-1).log().float())

    def logprobs(self, tokens: Tensor) -> Tensor:
        return self.logits.gather(1, tokens[:, None])[:, 0] - self.log_total

    def divergence_from(self, other: _Distribution) -> Tensor:
        """KL(self‖other) of each row; log-probabilities below `LOG_ZERO` count as that."""
        own, others = ((each.logits - each.log_total[:, None]).clamp(min=LOG_ZERO) for each in (self, other))
        masses = self.masses.flatten(1)[:, : own.shape[1]]
        return ((masses * (own - others)).sum(-1) / self.sums.sum(-1)).float()


def _look_up(cumulative: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Find where a number between 0 and 1 falls in each row of cumulative masses.

    Returns:
        The index of the entry, which has a mass above 0, and how far into that entry the number reaches, again between
        0 and 1.
    """
    total = cumulative[:, -1:]
    target = uniform[:, None] * total
    index = torch.searchsorted(cumulative, target, right=True)
    # Rounding may take the target to the total itself; then it is the last entry that has any mass.
    index = torch.minimum(index, (cumulative < total).sum(-1, keepdim=True))
    upper = cumulative.gather(1, index)
    lower = torch.where(index > 0, cumulative.gather(1, (index - 1).clamp(min=0)), 0.0)
    rest = (target - lower) / (upper - lower).clamp(min=1e-300)
    return index[:, 0], rest.clamp(0, 1 - 2**-53)[:, 0]


class MixtureRecord:
    """What the steps of one `Engine.generate` call found out about every token: `MixedTokens` and the teacher's states.

    Attributes:
        number: Number of the record in this process. Engines that work ahead use it to recognise a step that belongs to
            an earlier call.
    """

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self._keys: list[tuple[int, int]] = []  # row and position of every token, in the order they were added
        self._tokens: list[Tensor] = []  # log q, log p and KL(q‖p), [3, rows] of each step
        self._states: list[Tensor] = []

    def add(self, keys: Sequence[tuple[int, int]], tokens: MixedTokens, states: Float[Tensor, "tokens hidden"]) -> None:
        """Add the tokens of one step.

        Args:
            keys: For each token the number of its response, and its position there.
            tokens: The tokens.
            states: The teacher's final hidden states that predicted them.
        """
        self._keys += keys
        self._tokens.append(torch.stack([tokens.student_logprobs, tokens.teacher_logprobs, tokens.reverse_kl]))
        self._states.append(states)

    def finish(self, lengths: Sequence[int]) -> list[tuple[Float[Tensor, " tokens"], TeacherTargets]]:
        """Return log q and the teacher's targets of each response.

        Args:
            lengths: The number of tokens of each response. Later tokens, which engines that work ahead have sampled,
                are left out.

        Raises:
            EngineError: A token of these responses was not added: the engine did not sample it from the mixture.
        """
        # An engine that runs out of memory may repeat a step; the latest one counts.
        index = {key: i for i, key in enumerate(self._keys)}
        wanted = [(row, t) for row, n in enumerate(lengths) for t in range(n)]
        for row, position in wanted:
            if (row, position) not in index:
                raise EngineError(
                    f"the engine did not sample token {position} of response {row} from the mixture of student and "
                    "teacher: something replaces its sampler, such as an engine option for speculative decoding: leave "
                    "that out, or set rollout.teacher_mix: 0"
                )
        order = torch.tensor([index[key] for key in wanted], dtype=torch.long)
        split: Any = lambda values: values.split(list(lengths))  # noqa: E731
        numbers = [split(values[order]) for values in torch.cat(self._tokens, dim=1).cpu()]
        states = torch.cat(self._states)
        self._states = []
        states = split(states[order.to(states.device)])
        return [
            (logq, TeacherTargets(logp, hidden=hidden, reverse_kl=reverse_kl))
            for logq, logp, reverse_kl, hidden in zip(*numbers, states, strict=True)
        ]
