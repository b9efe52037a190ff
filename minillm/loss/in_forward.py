"""Scoring as part of a model's own forward.

DDP and FSDP2 gather the head's weights, and register the hooks of their gradients, in the forward of the module that
they wrap. Code outside that forward would see only a shard of the weights. (ZeRO-3 gathers a module's weights when
that module itself is called, which does not happen to the head; see `gather_head`.) `bind_scoring` therefore adds a
keyword argument `scoring` to a model's forward, with which it returns a loss. Without it the forward is unchanged.
The model is not wrapped, and no name in its state dict changes.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from minillm.data.batches import Padded, bucket, pad
from minillm.loss.token_scores import Divergence, LossFn, ScoringSettings, Sketch, Teacher, TokenScores, token_scores
from minillm.models.head import head_of, hidden_states, unwrap_adapter

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass
class Scoring:
    """What a bound model needs to score a batch: the batch, and the arguments of `token_scores`.

    Attributes:
        batch: Prompts with the responses whose tokens are scored.
        settings: Temperatures and size of the vocabulary.
        teacher: The teacher's states that predict the response tokens, or its rows of log-probabilities. None scores by
            the student alone.
        loss_fn: Computes the loss. None only scores.
        divergence: An additional divergence to compute.
        sketch: Sees the gradients of each chunk.
    """

    batch: Padded
    settings: ScoringSettings
    teacher: Teacher | None = None
    loss_fn: LossFn | None = None
    divergence: Divergence | None = None
    sketch: Sketch | None = None


class _ScoringCall:
    """A scoring and its results, in an object that FSDP2 does not look into.

    With bf16 mixed precision FSDP2 rounds every tensor that it finds in the arguments and results of a forward, which
    would leave log-probabilities with an error of a hundredth.
    """

    loss: Tensor
    scores: TokenScores

    def __init__(self, scoring: Scoring) -> None:
        self.scoring = scoring


def bind_scoring(model: PreTrainedModel) -> PreTrainedModel:
    """Add the keyword argument `scoring` to `model.forward`. Binding a model twice changes nothing.

    Args:
        model: The model, which is changed in place.

    Returns:
        The same model.
    """
    if getattr(model.forward, "takes_scoring", False):
        return model
    # The method of the class is called with `self`, so that a copy of the model does not call the original's forward. A
    # forward that somebody else has patched into the model is kept.
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
            head.unshard()  # as an FSDP unit of its own it would be gathered when called, but it is not called here
        scoring.loss, scoring.scores = token_scores(
            hidden,
            head_of(self),
            asked.batch.targets,
            asked.teacher,
            loss_fn=asked.loss_fn,
            divergence=asked.divergence,
            settings=asked.settings,
            sketch=asked.sketch,
        )
        return {"loss": scoring.loss}

    forward.takes_scoring = True  # pyright: ignore[reportFunctionMemberAccess]
    model.forward = types.MethodType(forward, model)
    return model


def score(model: Any, scoring: Scoring) -> tuple[Float[Tensor, ""], TokenScores]:
    """Score a batch with a model.

    Args:
        model: A model after `bind_scoring`. DDP or FSDP may wrap it.
        scoring: What to score, and how.

    Returns:
        The loss, which backpropagates to the model's weights, and the scores of the batch's response tokens.
    """
    call = _ScoringCall(scoring)
    # A wrapper registers the backward pass on the loss that it returns. It may have rounded it: the exact value
    # replaces it.
    through = model(scoring=call)["loss"].float()
    return through + (call.loss - through).detach(), call.scores


@torch.no_grad()
def score_responses(
    model: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    size: int,
    device: torch.device,
    scoring: Callable[[Padded, list[int]], Scoring],
) -> list[TokenScores]:
    """Score the tokens of each response without gradient, in batches of sequences of similar length.

    Args:
        model: A model after `bind_scoring`. DDP or FSDP may wrap it.
        prompts: Token ids of each prompt.
        responses: Token ids of each response.
        size: Number of sequences in a batch.
        device: Device that the batches are put on.
        scoring: Returns how to score a batch, given the batch and the indices of its sequences.

    Returns:
        The scores of each response, in float32 on the CPU.
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
        for position, i in enumerate(group):
            out[i] = TokenScores(**{name: part[position].clone() for name, part in parts.items()})
    return [out[i] for i in range(len(prompts))]
