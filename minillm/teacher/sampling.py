"""Reduces a teacher's distribution of the next token to a few weighted tokens, for a store.

A sample of p is unbiased if the expectation of its weights is p. Then so is the gradient of any objective that is
linear in p. `threshold` has the least expected squared error of all unbiased samples of K tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minillm.teacher.config import SamplerConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

_LEAST_SLOTS = 4  # below it, two tokens that are always kept would leave too few for the draw
_DUST = 1e-12  # probability that counts as none: far below what float32 logits resolve


@dataclass
class Sample:
    """Weighted tokens at each of N positions.

    Attributes:
        ids: token ids [N, K].
        weights: float64; they sum to 1. Slots at and after `counts` have weight 0.
        counts: number of tokens at each position.
        explicit: number of leading tokens with a weight of their own; the others share the weight of the last of these.
        entropy: entropy in nats of the distribution that the sample stands for.
        kept: probability of the tokens together, at the temperature of the sample.
    """

    ids: Int[Tensor, "tokens slots"]
    weights: Float[Tensor, "tokens slots"]
    counts: Int[Tensor, " tokens"]
    explicit: Int[Tensor, " tokens"]
    entropy: Float[Tensor, " tokens"]
    kept: Float[Tensor, " tokens"]


def sample(
    logits: Float[Tensor, "tokens vocab"],
    config: SamplerConfig,
    temperature: float,
    generator: torch.Generator,
    always: Int[Tensor, "tokens few"] | None = None,
) -> Sample:
    """Draw a sample at each position.

    Args:
        logits: the teacher's logits, not divided by the temperature.
        config: the method.
        temperature: τ. `threshold` and `random` sample from softmax(logits / τ); `top_p_k` chooses its tokens at
            temperature 1 and gives them their probabilities at τ, as the paper does.
        generator: on the CPU; gives the same sample on every device.
        always: tokens that `threshold` keeps as they are where their probability is at least `config.floor`: the one
            that comes next in the text, and the end token.
    """
    p = torch.softmax(logits.double() / temperature, -1)
    if config.method == "top_p_k":
        return _top_p_k(torch.softmax(logits.double(), -1), p, config)
    if config.method == "random":
        return _random(p, config.tokens, generator)
    uniform = torch.rand(len(p), dtype=torch.float64, generator=generator)
    order = torch.randperm(p.shape[1], generator=torch.Generator().manual_seed(p.shape[1]))
    if always is None or config.tokens < _LEAST_SLOTS:
        return threshold(p, config.tokens, uniform.to(p.device), order.to(p.device))
    certain = torch.zeros_like(p, dtype=torch.bool).scatter(1, always, p.gather(1, always) >= config.floor)
    return threshold(p, config.tokens, uniform.to(p.device), order.to(p.device), certain)


def threshold(
    p: Float[Tensor, "tokens vocab"],
    slots: int,
    uniform: Float[Tensor, " tokens"],
    order: Int[Tensor, " vocab"],
    certain: Bool[Tensor, "tokens vocab"] | None = None,
) -> Sample:
    """Keep the tokens with p ≥ λ, and draw from the others, each with probability p/λ and then with weight λ.

    λ is chosen so that K tokens are expected, Σ min(1, p/λ) = K. The draw is systematic: the tokens lie on a line, each
    with the length p/λ, and are taken where one of the points U, U + 1, … falls. Lengths are below 1, so no token is
    taken twice, and exactly K are.

    Args:
        p: probabilities in float64.
        slots: K.
        uniform: U of each position, from 0 to below 1.
        order: the order of the tokens on the line.
        certain: tokens that are kept with their own weight in any case, fewer than K at each position; λ is then that
            of the others. The expectation is still p.

    Returns:
        Samples whose weights sum to 1 and have the expectation p over U.
    """
    width = p.shape[1]
    slots = min(slots, width)
    # What is certain comes first, and then the most likely tokens.
    key = p if certain is None else p + certain
    top_ids = key.topk(min(slots + 1, width), -1).indices
    top = p.gather(1, top_ids)
    if top.shape[1] == slots:  # the whole vocabulary
        top = torch.cat([top, top.new_zeros(len(p), 1)], 1)
    number = torch.arange(slots, device=p.device)
    # After h of the most likely tokens, what is left of the mass and the λ that follows from it.
    rest = (1 - torch.cat([top.new_zeros(len(p), 1), top[:, :slots].cumsum(-1)], 1)).clamp(min=0)
    rest = torch.where(rest < _DUST, 0.0, rest)
    level = rest[:, :slots] / (slots - number)
    below = top[:, :slots] < level
    if certain is not None:
        below &= ~certain.gather(1, top_ids[:, :slots])
    head = torch.where(below.any(-1), below.int().argmax(-1), slots)
    is_head = number < head[:, None]
    head_ids = top_ids[:, :slots]
    tail = p.scatter(1, head_ids, torch.where(is_head, 0.0, p.gather(1, head_ids)))[:, order]
    line = tail.cumsum(-1)
    drawn = slots - head
    turn = (number - head[:, None]).clamp(min=0)
    points = (uniform[:, None] + turn) / drawn.clamp(min=1)[:, None] * line[:, -1:]
    taken = order[torch.searchsorted(line, points, right=True).clamp(max=width - 1)]
    each = (rest.gather(1, head[:, None]) / drawn.clamp(min=1)[:, None]).expand(-1, slots)
    ids = torch.where(is_head, head_ids, taken)
    weights = torch.where(is_head, top[:, :slots], each)
    counts = (weights > _DUST).sum(-1)
    weights = torch.where(number < counts[:, None], weights, 0.0)
    kept = torch.where(number < counts[:, None], p.gather(1, ids), 0.0).sum(-1)
    weights = weights / weights.sum(-1, keepdim=True)
    return Sample(ids, weights, counts, torch.minimum(head + 1, counts), _entropy(p), kept)


def _top_p_k(plain: Tensor, p: Tensor, config: SamplerConfig) -> Sample:
    """The most likely tokens up to a probability and a number, renormalised at the temperature."""
    top, ids = plain.topk(min(config.tokens, plain.shape[1]), -1)
    before = top.cumsum(-1) - top
    counts = (before < config.top_p).sum(-1)
    chosen = torch.arange(ids.shape[1], device=p.device) < counts[:, None]
    weights = torch.where(chosen, p.gather(1, ids), 0.0)
    kept = weights.sum(-1)
    weights = weights / kept[:, None]
    return Sample(ids, weights, counts, counts, _entropy(weights), kept)


def _random(p: Tensor, draws: int, generator: torch.Generator) -> Sample:
    """Draws with repetition; the weight of a token is its share of them."""
    uniform = torch.rand(len(p), draws, dtype=torch.float64, generator=generator).to(p.device)
    line = p.cumsum(-1)
    drawn = torch.searchsorted(line, uniform * line[:, -1:], right=True).clamp(max=p.shape[1] - 1).sort(-1).values
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = first.cumsum(-1) - 1  # equal tokens are neighbours and share a slot
    counts = slot[:, -1] + 1
    ids = torch.zeros_like(drawn).scatter(1, slot, drawn)
    weights = torch.zeros_like(p[:, :1]).expand(-1, draws).clone()
    weights.scatter_add_(1, slot, torch.full_like(weights, 1 / draws))
    used = torch.arange(draws, device=p.device) < counts[:, None]
    kept = torch.where(used, p.gather(1, ids), 0.0).sum(-1)
    return Sample(ids, weights, counts, counts, _entropy(p), kept)


def _entropy(p: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    return torch.special.entr(p).sum(-1)
