"""Scoring bound as a model's own forward.

DDP and FSDP2 gather the head's weights, and hook their gradients, inside the forward of the module they wrap. Scoring
from outside would read shards. (ZeRO-3 gathers a module's weights when that very module is called, which the head is not:
see `gather_head`.) A bound model called with `scoring=` returns the loss; called
otherwise it is what it was. Nothing is wrapped and no checkpoint key changes.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from minillm.data.batches import Padded, bucket, pad
from minillm.data.rollouts import TeacherRows
from minillm.loss.token_scores import Divergence, LossFn, TokenScores, token_scores
from minillm.models.head import Head, head_of, hidden_states, unwrap_adapter


@dataclass
class Scoring:
    """What a bound model needs to score a batch: see `token_scores`."""

    batch: Padded
    width: int
    teacher_hidden: Tensor | None = None
    teacher_head: Head | None = None
    loss_fn: LossFn | None = None
    temperature: float = 1.0
    teacher_rows: TeacherRows | None = None
    divergence: Divergence | None = None
    text_temperature: float | None = None


class _ScoringCall:
    """A scoring and what came of it, in no container that FSDP2 looks into: under bf16 it rounds every tensor that it finds in arguments
    and results, log-probabilities to a hundredth."""

    loss: Tensor
    scores: TokenScores

    def __init__(self, scoring: Scoring) -> None:
        self.scoring = scoring


def bind_scoring(model: PreTrainedModel) -> PreTrainedModel:
    """Teach `model.forward` the argument `scoring`. Binding twice changes nothing."""
    if getattr(model.forward, "takes_scoring", False):
        return model
    # Of the class, so that a copy of the model does not call the original's; another's patch is kept as it is.
    plain: Any = (
        (lambda self, *args, **kwargs: patched(*args, **kwargs))
        if (patched := vars(model).get("forward"))
        else type(model).forward
    )

    def forward(self: Any, *args: Any, scoring: _ScoringCall | None = None, **kwargs: Any) -> Any:
        if scoring is None:
            return plain(self, *args, **kwargs)
        asked = scoring.scoring
        hidden = hidden_states(self, asked.batch)
        head: Any = unwrap_adapter(self).get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()  # a unit of its own: its weights are gathered when it is called, and here it is not
        scoring.loss, scoring.scores = token_scores(
            hidden, head_of(self), asked.batch.targets, asked.teacher_hidden, asked.teacher_head,
            teacher_rows=asked.teacher_rows, loss_fn=asked.loss_fn, divergence=asked.divergence, temperature=asked.temperature,
            text_temperature=asked.text_temperature, width=asked.width,
        )  # fmt: skip
        return {"loss": scoring.loss}

    forward.takes_scoring = True  # pyright: ignore[reportFunctionMemberAccess]
    model.forward = types.MethodType(forward, model)
    return model


def score(model: Any, scoring: Scoring) -> tuple[Tensor, TokenScores]:
    """Loss and scores of a bound model, which may be wrapped by DDP or FSDP."""
    call = _ScoringCall(scoring)
    through = model(scoring=call)["loss"].float()  # by which a wrapper is told of the backward
    return through + (call.loss - through).detach(), call.scores


@torch.no_grad()
def score_responses(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], size: int, device: torch.device,
    scoring: Callable[[Padded, list[int]], Scoring],
) -> list[TokenScores]:  # fmt: skip
    """Scores of each response's tokens, on the CPU, by forwards of `size` sequences of like length, without gradient.

    Args:
        model: bound; it may be wrapped.
        scoring: how a batch is scored, given it and which of the sequences it holds.
    """
    out: dict[int, TokenScores] = {}
    for group in bucket([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], size):
        batch = pad([prompts[i] for i in group], [responses[i] for i in group], device)
        _, scores = score(model, scoring(batch, group))
        parts = {
            name: value.float().cpu().split(batch.lengths.tolist())
            for name, value in vars(scores).items()
            if value is not None
        }
        out |= {
            i: TokenScores(**{name: part[place].clone() for name, part in parts.items()})
            for place, i in enumerate(group)
        }
    return [out[i] for i in range(len(prompts))]
