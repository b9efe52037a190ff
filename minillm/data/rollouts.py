"""Sampled responses, and what a teacher returns about their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.data.logprobs import mixture_logprobs
from minillm.data.sampling import Sampling

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass
class TeacherRows:
    """Log p of a few tokens at each of N positions, from a teacher that does not return whole distributions.

    Attributes:
        ids: token ids. Slot 0 of each row is the sampled token; a slot that is not needed repeats it.
        logprobs: float32, log p of the tokens in `ids`.
    """

    ids: Int[Tensor, "tokens slots"]
    logprobs: Float[Tensor, "tokens slots"]


@dataclass
class SparseTargets:
    """A distribution of the next token at each of N positions, as a few tokens with weights; all others have weight 0.

    The weights alone decide what they stand for: one token of weight 1 is a hard label, a teacher's most likely tokens
    renormalised are the targets of arXiv 2410.16215, counts of draws those of RS-KD (arXiv 2503.16870), and the
    samplers of `minillm.teacher.sampling` an unbiased estimate of p.

    Attributes:
        ids: token ids. A token may occur twice in a row; its weights then add up.
        weights: float32, the weight of each token; a slot that is not needed has weight 0.
        entropy: float32, the entropy of the distribution that they stand for, in nats, if it is known.
    """

    ids: Int[Tensor, "tokens slots"]
    weights: Float[Tensor, "tokens slots"]
    entropy: Float[Tensor, " tokens"] | None = None


@dataclass
class TeacherTargets:
    """What a teacher returns about one response of T tokens.

    Either `hidden` or `rows` is given: final hidden states from a teacher in this process or from a server that returns
    them, rows from any other server.

    Attributes:
        token_logprobs: float32, log p(y_t) of the response's own tokens. None where nobody has needed them yet: they
            follow from the states, and scoring the states for the loss gives them in passing.
        hidden: the teacher's final hidden states that predict the tokens.
        rows: log p of a few tokens at each position.
        reverse_kl: float32, KL(q‖p) after each prefix for the student that sampled, from an engine that mixed the
            teacher in.
    """

    token_logprobs: Float[Tensor, " tokens"] | None
    hidden: Float[Tensor, "tokens hidden"] | None = None
    rows: TeacherRows | None = None
    reverse_kl: Float[Tensor, " tokens"] | None = None

    def first(self, length: int) -> TeacherTargets:
        """Return the targets of the first `length` tokens."""
        hidden = None if self.hidden is None else self.hidden[:length]
        rows = None if self.rows is None else TeacherRows(self.rows.ids[:length], self.rows.logprobs[:length])
        logprobs, reverse_kl = (
            None if values is None else values[:length] for values in (self.token_logprobs, self.reverse_kl)
        )
        return TeacherTargets(logprobs, hidden, rows, reverse_kl)


@dataclass
class Rollout:
    """One sampled response of T tokens, without padding.

    Attributes:
        prompt_ids: the prompt's tokens.
        response_ids: the response's tokens, up to and including the first EOS.
        student_logprobs: float32, log q_old(y_t) as the engine computed it.
        behaviour_logprobs: float32, log-probability of y_t under the distribution that it was sampled from.
        weights_version: the version of the weights that q_old stands for.
        finished: whether the response ended with an EOS or a stop string, rather than at the length limit.
        teacher: what the teacher returned; None until the response is scored.
        reverse_kl: float32, KL(q‖p) after each prefix: for the student that sampled the response, from an engine that
            mixed the teacher in, or for the one that first trained on it. None until then.
        top_logprobs: log q of the most likely tokens at each position, by token id; None unless they were requested.
        teacher_name: the teacher that scores the response, where there are several; None where there is one.
        row: the row of the training data, or of the given responses, that it belongs to; None if that is not known.
        entropy: float32, entropy of the student's distribution after each prefix, in nats; None where nobody needs it.
        advantage: float32, A_t when the student first trained on the response; None until then. It is only shown.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    student_logprobs: Float[Tensor, " tokens"]
    behaviour_logprobs: Float[Tensor, " tokens"]
    weights_version: int
    finished: bool
    teacher: TeacherTargets | None = None
    reverse_kl: Float[Tensor, " tokens"] | None = None
    top_logprobs: Sequence[dict[int, float]] | None = None
    teacher_name: str | None = None
    row: int | None = None
    entropy: Float[Tensor, " tokens"] | None = None
    advantage: Float[Tensor, " tokens"] | None = None

    @classmethod
    def drawn(
        cls,
        prompt: list[int],
        ids: list[int],
        logprobs: Sequence[float] | Float[Tensor, " tokens"],
        sampling: Sampling,
        version: int,
        *,
        stopped: bool = False,
        top_logprobs: Sequence[dict[int, float]] | None = None,
        teacher: TeacherTargets | None = None,
    ) -> Rollout:
        """Build a rollout from an engine's output, cut after the token that ends the response.

        Args:
            prompt: the prompt's tokens.
            ids: the sampled tokens, which may continue after the end of the response.
            logprobs: log q of each of `ids`.
            sampling: how the tokens were sampled; it says where a response ends.
            version: the version of the weights that sampled.
            stopped: whether the engine itself reported the end of the response.
            top_logprobs: log q of the most likely tokens at each position.
            teacher: the teacher's targets of `ids`, with their log-probabilities, where it was mixed in. The behaviour
                log-probabilities are then those of the mixture. Targets that hold nothing but log p are used for these
                alone, and the response remains to be scored.
        """
        length = sampling.length(ids)
        finished = stopped or length is not None
        values = torch.as_tensor(logprobs[:length], dtype=torch.float32)
        rollout = cls(
            prompt, ids[:length], values, values, version, finished, top_logprobs=top_logprobs and top_logprobs[:length]
        )
        if teacher is not None:
            targets = teacher.first(len(rollout.response_ids))
            assert targets.token_logprobs is not None
            rollout.behaviour_logprobs = mixture_logprobs(values, targets.token_logprobs, sampling.teacher_mix)
            rollout.teacher = None if targets.hidden is None and targets.rows is None else targets
            rollout.reverse_kl = targets.reverse_kl
        return rollout

    def to_saved(self) -> dict[str, Any]:
        """The fields for a checkpoint.

        The teacher's targets are left out: they are large, and the teacher returns them again. So is the advantage,
        which is only shown.
        """
        return {name: value for name, value in vars(self).items() if name not in ("teacher", "advantage")}

    @classmethod
    def from_saved(cls, fields: Mapping[str, Any]) -> Rollout:
        """Restore a rollout from `to_saved`, or from a checkpoint of an earlier version.

        Earlier versions saved no `row` and no `teacher_name`, `top_logprobs` as `likeliest`, and three fields for the
        teacher's targets, which they left empty.
        """
        kept = dict(fields)
        for name in ("teacher_hidden", "teacher_logprobs", "teacher_rows"):
            kept.pop(name, None)
        if "likeliest" in kept:
            kept["top_logprobs"] = kept.pop("likeliest")
        return cls(**kept)


def concatenate_rows(rows: Sequence[TeacherRows]) -> TeacherRows:
    """Rows of several responses, one response after another, padded to the most slots."""
    width = max(row.ids.shape[1] for row in rows)
    return TeacherRows(
        torch.cat([_widened(row.ids, width) for row in rows]),
        torch.cat([_widened(row.logprobs, width) for row in rows]),
    )


def _widened(values: Tensor, width: int) -> Tensor:
    """Repeat slot 0 up to `width` slots."""
    return torch.cat([values, values[:, :1].expand(-1, width - values.shape[1])], dim=1)
