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
from minillm.loss.token_scores import Divergence, Head, TokenScores, Weigh, token_scores


@dataclass
class Scoring:
    """What a bound model needs to score a batch: see `token_scores`."""

    batch: Padded
    width: int
    teacher_hidden: Tensor | None = None
    teacher_head: Head | None = None
    weigh: Weigh | None = None
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


def body(model: PreTrainedModel) -> Any:
    """The model without its head, adapters inside it included."""
    return _unwrap_adapter(model).base_model


def _unwrap_adapter(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: PreTrainedModel) -> Head:
    """The head's weights and the constants that its family applies to logits."""
    module: Any = _unwrap_adapter(model).get_output_embeddings()
    if hasattr(module, "base_layer") or hasattr(module, "modules_to_save"):
        raise ValueError("an adapter on the output head is not scored; leave lm_head out of target_modules and modules_to_save")
    config: Any = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere
    if scale is None:
        scale = 1.0 / getattr(config, "logits_scaling", 1.0)  # Granite divides
    return Head(module.weight, getattr(module, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


def hidden_states(model: PreTrainedModel, batch: Padded) -> Tensor:
    """Final hidden states [N, H] that predict the batch's response tokens.

    Padding is on the right and attention causal, so no mask is needed, and the fast attention kernels take none.
    """
    places = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    states = body(model)(input_ids=batch.input_ids, use_cache=False, **places).last_hidden_state
    return states.reshape(-1, states.shape[-1]).index_select(0, batch.positions)


@torch.no_grad()
def check_head(model: PreTrainedModel, name: str) -> None:
    """Make sure, on a few tokens, that `head_of` gives the model's own logits.

    Raises:
        ValueError: a family does to its logits what is not known here.
    """
    ids = torch.tensor([[1, 2, 3, 1]], device=model.device)
    was_training = model.training
    model.eval()
    own = model(input_ids=ids, use_cache=False).logits[0].float()
    ours = head_of(model).logits(body(model)(input_ids=ids, use_cache=False).last_hidden_state[0])
    model.train(was_training)
    if not (own - ours.to(own.dtype)).norm() <= 0.05 * own.norm() + 1e-6:  # far above what rounding does
        raise ValueError(
            f"the {name} ({type(model).__name__}) makes its logits in a way that is not scored here: only a linear head with a "
            "bias, a scale (logit_scale, logits_scaling) and a soft cap (final_logit_softcapping) is"
        )


@torch.no_grad()
def keeps_sequences_apart(model: PreTrainedModel) -> bool:
    """Whether sequences that share a row do not see each other, tried on this very model."""
    pieces = [[1, 2, 3], [3, 2, 1, 2], [2, 1, 3]]
    prompts, responses = [ids[:1] for ids in pieces], [ids[1:] for ids in pieces]
    was_training = model.training
    model.eval()
    apart, together = (
        hidden_states(model, pad(prompts, responses, model.device, rows=rows)).float() for rows in ([0, 1, 2], [0, 0, 1])
    )  # fmt: skip
    model.train(was_training)
    return bool((apart - together).norm() <= 0.02 * apart.norm())  # seeing each other changes far more than rounding does


def bind_scoring(model: PreTrainedModel) -> PreTrainedModel:
    """Teach `model.forward` the argument `scoring`. Binding twice changes nothing."""
    if getattr(model.forward, "takes_scoring", False):
        return model
    # Of the class, so that a copy of the model does not call the original's; another's patch is kept as it is.
    plain: Any = (
        (lambda self, *args, **kwargs: patched(*args, **kwargs)) if (patched := vars(model).get("forward")) else type(model).forward
    )

    def forward(self: Any, *args: Any, scoring: _ScoringCall | None = None, **kwargs: Any) -> Any:
        if scoring is None:
            return plain(self, *args, **kwargs)
        asked = scoring.scoring
        hidden = hidden_states(self, asked.batch)
        head: Any = _unwrap_adapter(self).get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()  # a unit of its own: its weights are gathered when it is called, and here it is not
        scoring.loss, scoring.scores = token_scores(
            hidden, head_of(self), asked.batch.targets, asked.teacher_hidden, asked.teacher_head,
            teacher_rows=asked.teacher_rows, weigh=asked.weigh, divergence=asked.divergence, temperature=asked.temperature,
            text_temperature=asked.text_temperature, width=asked.width,
        )  # fmt: skip
        return {"loss": scoring.loss}

    forward.takes_scoring = True  # pyright: ignore[reportFunctionMemberAccess]
    model.forward = types.MethodType(forward, model)
    return model


def gather_head(model: PreTrainedModel) -> None:
    """Have DeepSpeed ZeRO-3 gather the head's weights for every forward and backward of the whole model."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    head: Any = _unwrap_adapter(model).get_output_embeddings()
    for parameter in head.parameters(recurse=False):
        deepspeed.zero.register_external_parameter(model, parameter)


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
        parts = {name: value.float().cpu().split(batch.lengths.tolist()) for name, value in vars(scores).items() if value is not None}
        out |= {i: TokenScores(**{name: part[place].clone() for name, part in parts.items()}) for place, i in enumerate(group)}
    return [out[i] for i in range(len(prompts))]
