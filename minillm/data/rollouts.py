"""A sampled response, and what its tokens are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.data.sampling import Sampling


@dataclass
class TeacherRows:
    """Log p of a few tokens after each of N prefixes, for a teacher that is not at hand to give all of them.

    ids, logprobs: [N, K]. Slot 0 is the token that was drawn; a slot that is not used repeats it.
    """

    ids: Tensor
    logprobs: Tensor


@dataclass
class Rollout:
    """One sampled response; nothing is padded.

    Attributes:
        response_ids: T tokens, up to and including the first EOS.
        student_logprobs: [T] float32, log q_old(y_t) in the engine's own numbers.
        behaviour_logprobs: [T] float32, log-probability under the distribution that really drew y_t.
        weights_version: which weights q_old is.
        finished: it ended with an EOS or a stop string rather than at the limit.
        teacher_logprobs: [T] float32, log p(y_t); None until scored.
        teacher_hidden: [T, H_p], the teacher's final states that predict y_t; None until scored, and for a served teacher.
        teacher_rows: what a served teacher tells instead; None otherwise.
        likeliest: for each place, log q of the likeliest tokens by id; None unless asked for.
        reverse_kl: [T] float32, KL(q‖p) after each prefix, of the student that first trained on it; None until then.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    student_logprobs: Tensor
    behaviour_logprobs: Tensor
    weights_version: int
    finished: bool
    teacher_logprobs: Tensor | None = None
    teacher_hidden: Tensor | None = None
    teacher_rows: TeacherRows | None = None
    reverse_kl: Tensor | None = None
    top_logprobs: Sequence[dict[int, float]] | None = None

    @classmethod
    def drawn(
        cls, prompt: list[int], ids: list[int], logprobs: Sequence[float], sampling: Sampling, version: int, *,
        stopped: bool = False, top_logprobs: Sequence[dict[int, float]] | None = None,
    ) -> Rollout:  # fmt: skip
        """What an engine drew, cut after the token that ends it; `stopped`: the engine saw an end."""
        length = sampling.length(ids)
        values = torch.tensor(logprobs[:length], dtype=torch.float32)
        finished = stopped or length is not None
        return cls(
            prompt, ids[:length], values, values, version, finished, top_logprobs=top_logprobs and top_logprobs[:length]
        )


def join(rows: Sequence[TeacherRows]) -> TeacherRows:
    """Rows of several responses, one after another."""
    width = max(row.ids.shape[1] for row in rows)
    wide = [(_widened(row.ids, width), _widened(row.logprobs, width)) for row in rows]
    return TeacherRows(torch.cat([ids for ids, _ in wide]), torch.cat([logprobs for _, logprobs in wide]))


def _widened(values: torch.Tensor, width: int) -> torch.Tensor:
    return torch.cat([values, values[:, :1].expand(-1, width - values.shape[1])], dim=1)
