"""Toy worlds that are small enough to enumerate every response in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillm.loss import credit
from minillm.loss.config import Objective
from minillm.loss.credit import SampledTokens
from minillm.loss.on_policy import OnPolicyLoss
from minillm.loss.token_scores import ScoringSettings, token_scores
from minillm.models.head import Head, TeacherStates

V, LENGTH, H, EOS = 3, 3, 4, 0


@dataclass
class World:
    """Student and teacher states for every prefix of a three-token vocabulary, up to LENGTH tokens."""

    states: Tensor  # [prefixes, H], parameters of the student
    head: Tensor
    teacher_states: Tensor
    teacher_head: Tensor
    place: dict[tuple[int, ...], int]

    @classmethod
    def random(cls, seed: int) -> World:
        g = torch.Generator().manual_seed(seed)
        prefixes = [p for n in range(LENGTH) for p in itertools.product(range(V), repeat=n) if EOS not in p]
        make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        return cls(
            make(len(prefixes), H).requires_grad_(),
            make(V, H).requires_grad_(),
            make(len(prefixes), H),
            make(V, H),
            {p: i for i, p in enumerate(prefixes)},
        )

    def responses(self) -> list[tuple[int, ...]]:
        """Return all responses: those that end with EOS, and those cut off at LENGTH tokens."""
        found = []
        for n in range(1, LENGTH + 1):
            for y in itertools.product(range(V), repeat=n):
                if EOS not in y[:-1] and (y[-1] == EOS or n == LENGTH):
                    found.append(y)
        return found

    def rows(self, y: tuple[int, ...]) -> list[int]:
        return [self.place[y[:t]] for t in range(len(y))]

    def logq(self) -> Tensor:
        return torch.log_softmax(self.states @ self.head.t(), -1)

    def logp(self) -> Tensor:
        return torch.log_softmax(self.teacher_states @ self.teacher_head.t(), -1)

    def exact(self) -> list[Tensor]:
        """Return the gradient of Σ_y q(y) log q(y)/p(y)."""
        logq, logp = self.logq(), self.logp()
        total = torch.zeros((), dtype=torch.float64)
        for y in self.responses():
            index = torch.tensor(self.rows(y)), torch.tensor(y)
            total = total + logq[index].sum().exp() * (logq[index] - logp[index]).sum()
        return list(torch.autograd.grad(total, [self.states, self.head]))

    def rate(self, credit_for: str, kappa: float | None = None) -> list[Tensor]:
        """Return E[T] times the gradient of J₂ = E[Σ KL_t] / E[T], from the objective itself, by autograd.

        Args:
            credit_for: "words" holds the probabilities of ending fixed in the distribution of responses.
            kappa: The price of a token, for the gradient of E[Σ KL_t] − κ E[T]. By default J₂, which is J₂'s gradient.
        """
        logq, logp = self.logq(), self.logp()
        kl = (logq.exp() * (logq - logp)).sum(-1)
        if credit_for == "words":
            end = logq[:, EOS].detach().exp()
            word = logq - torch.log1p(-logq[:, EOS].exp())[:, None] + torch.log1p(-end)[:, None]
            logq = torch.where(torch.arange(V) == EOS, end.log()[:, None], word)
        total, length = torch.zeros(2, dtype=torch.float64)
        for y in self.responses():
            rows, ids = torch.tensor(self.rows(y)), torch.tensor(y)
            probability = logq[rows, ids].sum().exp()
            total, length = total + probability * kl[rows].sum(), length + probability * len(y)
        if kappa is None:
            return [length.detach() * g for g in torch.autograd.grad(total / length, [self.states, self.head])]
        return list(torch.autograd.grad(total - kappa * length, [self.states, self.head]))

    def kappa(self) -> float:
        """Return J₂ = E[Σ KL_t] / E[T] of responses that the student samples."""
        logq, logp = self.logq().detach(), self.logp()
        kl = (logq.exp() * (logq - logp)).sum(-1)
        total, length = 0.0, 0.0
        for y in self.responses():
            rows, ids = torch.tensor(self.rows(y)), torch.tensor(y)
            probability = float(logq[rows, ids].sum().exp())
            total, length = total + probability * float(kl[rows].sum()), length + probability * len(y)
        return total / length

    def one(
        self, y: tuple[int, ...], objective: Objective, alpha: float, logq_old: Tensor | None = None, **settings: Any
    ) -> tuple[float, list[Tensor]]:
        """Return the probability of a response under the mixture, and the estimated gradient for this response.

        Args:
            y: The response.
            objective: The loss.
            alpha: Share of the teacher in the mixture.
            logq_old: log q_old [prefixes, V] of the student that sampled. By default the student that is trained.
            **settings: Other arguments of `OnPolicyLoss`; and `offset`, κ of all tokens.
        """
        rows, ids = torch.tensor(self.rows(y)), torch.tensor(y)
        q, p = (self.logq().detach() if logq_old is None else logq_old)[rows, ids], self.logp()[rows, ids]
        behaviour = ((1 - alpha) * q.exp() + alpha * p.exp()).log()
        settings = {"slots": LENGTH, **settings}
        known = p if credit.needs_sampled_rewards_first(objective) else None
        tokens = SampledTokens(q, behaviour, known, torch.tensor([len(y)]), is_end=ids == EOS)
        if (offset := settings.pop("offset", None)) is not None:
            tokens.offset = torch.full_like(q, offset)
        loss_of = OnPolicyLoss(objective, tokens, **settings)
        return float(behaviour.sum().exp()), self.gradients(rows, ids, loss_of)

    def gradients(self, rows: Tensor, ids: Tensor, loss_of: OnPolicyLoss) -> list[Tensor]:
        """Return the gradients of a loss of some tokens by the states and by the head.

        Args:
            rows: The prefix of each token.
            ids: The tokens.
            loss_of: The loss.
        """
        loss, _ = token_scores(
            self.states[rows],
            Head(self.head),
            ids,
            TeacherStates(self.teacher_states[rows], Head(self.teacher_head)),
            loss_fn=loss_of,
            settings=ScoringSettings(chunk=2, end_ids=(EOS,)),
        )
        return list(torch.autograd.grad(loss, [self.states, self.head]))

    def expectation(self, objective: Objective, alpha: float, **settings: Any) -> list[Tensor]:
        total: Any = None
        for y in self.responses():
            probability, grads = self.one(y, objective, alpha, **settings)
            grads = [probability * g for g in grads]
            total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
        return total

    def bias(self, objective: Objective, alpha: float) -> float:
        exact, got = (torch.cat([g.flatten() for g in gs]) for gs in (self.exact(), self.expectation(objective, alpha)))
        return float((got - exact).norm() / exact.norm())

    def mean_return(self, objective: Objective, alpha: float) -> float:
        """Return the baseline that a large batch of rollouts would have."""
        total, count = 0.0, 0.0
        logq, logp = self.logq().detach(), self.logp()
        kl = (logq.exp() * (logq - logp)).sum(-1)
        for y in self.responses():
            rows, ids = torch.tensor(self.rows(y)), torch.tensor(y)
            q, p = logq[rows, ids], logp[rows, ids]
            behaviour = ((1 - alpha) * q.exp() + alpha * p.exp()).log()
            value, n = credit.return_sum(SampledTokens(q, behaviour, p, torch.tensor([len(y)]), kl[rows]), objective)
            total += float(behaviour.sum().exp()) * float(value)
            count += float(behaviour.sum().exp()) * float(n)
        return total / count
