"""A linear prediction of returns, as a baseline that knows where a response stands.

The value of token t is f_t = θ·φ_t, where φ_t depends on the tokens before y_t only: KL_t and the entropy of the
distribution that y_t is sampled from, the mean of KL_1 … KL_t, the position, and 1. It predicts the return R_t of the
credit for y_t, which begins with the reward of token t+1. θ is fitted to the batch before, by least squares, and is
therefore independent of the responses that it is a baseline for: it biases nothing.

With λ below 1 (`trace`), the advantage is that of arXiv 1506.02438 (equation 16):

    A_t = Σ_{l≥0} (γλ)^l δ_{t+l},    δ_t = x_{t+1} + γ f_{t+1} − f_t

where x_k is the reward of token k with its price, and x and f are 0 after the end. λ = 1 gives A_t = R_t − f_t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minillm.loss import credit
from minillm.loss.config import Objective
from minillm.loss.credit import SampledTokens
from minillm.loss.leave_one_out import Gather, alone

if TYPE_CHECKING:
    from jaxtyping import Float

NUM_FEATURES = 5
_RIDGE = 1e-4  # of the mean square of a feature: keeps θ finite where a feature is constant
_POSITION = 100.0  # tokens; brings positions to the size of the other features


def features(tokens: SampledTokens, entropy: Float[Tensor, " tokens"]) -> Float[Tensor, "tokens features"]:
    """Return φ_t of each token, in float64.

    Args:
        tokens: The sampled tokens, with KL(q‖p).
        entropy: Entropy of the distribution that each token was sampled from, in nats.
    """
    assert tokens.reverse_kl is not None
    kl = tokens.reverse_kl.double()
    starts = (tokens.lengths.cumsum(0) - tokens.lengths)[tokens.segments]
    position = torch.arange(len(kl), device=kl.device) - starts + 1
    so_far = kl.cumsum(0)
    before = (so_far - kl)[starts.clamp(max=max(len(kl) - 1, 0))]
    return torch.stack(
        [torch.ones_like(kl), kl, entropy.double(), (so_far - before) / position, position / _POSITION], 1
    )


def fit(
    phi: Float[Tensor, "tokens features"], returns: Float[Tensor, " tokens"], gather: Gather = alone
) -> list[float]:
    """Fit θ to the returns of a batch by least squares, over all processes.

    Args:
        phi: φ_t of this process's tokens.
        returns: Their returns.
        gather: Collects objects from all processes.
    """
    parts = gather((phi.t() @ phi, phi.t() @ returns.double()))
    square, product = (sum(part[i].cpu() for part in parts) for i in (0, 1))
    assert isinstance(square, Tensor)
    assert isinstance(product, Tensor)
    ridge = _RIDGE * torch.diag(square.diag().clamp(min=torch.finfo(torch.float64).tiny))
    return torch.linalg.solve(square + ridge, product).tolist()


def baselines_by_value(
    tokens: SampledTokens, objective: Objective, phi: Float[Tensor, "tokens features"], theta: list[float]
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Return R_t − A_t, what is subtracted from the return of each token; and the returns R_t, both in float64.

    Args:
        tokens: The sampled tokens, with KL(q‖p).
        objective: `discount` and `trace` are read.
        phi: φ_t of each token.
        theta: θ of the batch before; empty for the first batch, which then has no baseline.
    """
    rewards = credit.precomputed_rewards(tokens, objective)
    assert rewards is not None
    rewards = rewards.double() if tokens.offset is None else rewards.double() + tokens.offset.double()
    returns = credit.returns(rewards, tokens, objective)
    if not theta:
        return torch.zeros_like(returns), returns
    value = phi @ phi.new_tensor(theta)
    if objective.trace == 1:
        return value, returns
    goes_on = tokens.remaining > 0
    following = torch.where(goes_on, (rewards + objective.discount * value).roll(-1), 0.0)
    decayed = objective.model_copy(update={"discount": objective.discount * objective.trace, "return_from": "current"})
    if decayed.discount == 0:
        return returns - (following - value), returns
    return returns - credit.returns(following - value, tokens, decayed), returns
