"""A batch of several teachers: its loss and gradient are the sums of those of one batch for each teacher."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from minillm.errors import InputError
from minillm.loss import divergences
from minillm.loss.config import Objective
from minillm.loss.credit import SampledTokens
from minillm.loss.elementwise import Precision
from minillm.loss.on_policy import OnPolicyLoss
from minillm.loss.teacher_spans import SpanSettings, teacher_spans
from minillm.loss.terms import extra_divergence
from minillm.loss.token_scores import ScoringSettings, TokenScores, token_scores
from minillm.models.head import Head, LogitTransform, TeacherStates

WIDTHS = {"math": 12, "chat": 5}
LENGTHS = [5, 9, 1, 6, 7]
OWNERS = ["math", "chat", "chat", "math", "chat"]
TEXT = 4  # tokens of text after the responses
V, H, ROWS = 30, 8, 33  # vocabulary, width and rows of the heads


@dataclass
class Batch:
    """Hidden states of a student, and of the teacher of each response, with random log-probabilities of sampling."""

    hidden: Tensor
    head: Head
    targets: Tensor
    heads: dict[str, Head]
    states: list[Tensor]
    tokens: SampledTokens
    baseline: Tensor

    @classmethod
    def random(cls) -> Batch:
        g = torch.Generator().manual_seed(3)
        make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        count = sum(LENGTHS)
        heads = {
            "math": Head(make(ROWS, WIDTHS["math"]), make(ROWS), 0.7),
            "chat": Head(make(ROWS + 2, WIDTHS["chat"]), None, 1.0, 4.0),
        }
        states = [make(length, WIDTHS[owner]) for length, owner in zip(LENGTHS, OWNERS, strict=True)]
        old, behaviour, logp = (-make(count).abs() for _ in range(3))
        return cls(
            make(count + TEXT, H).requires_grad_(),
            Head(make(ROWS, H).requires_grad_(), make(ROWS).requires_grad_(), 1.3, 6.0),
            torch.randint(V, (count + TEXT,), generator=g),
            heads,
            states,
            SampledTokens(old, behaviour, logp, torch.tensor(LENGTHS)),
            make(count),
        )

    def part(self, owner: str | None) -> tuple[Tensor, list[int]]:
        """Positions of the tokens of one teacher, or of all, and the numbers of its responses; text is the last's."""
        chosen = [i for i, name in enumerate(OWNERS) if owner in (None, name)]
        ends = torch.tensor(LENGTHS).cumsum(0)
        positions = [torch.arange(int(ends[i]) - LENGTHS[i], int(ends[i])) for i in chosen]
        if owner in (None, OWNERS[-1]):
            positions.append(torch.arange(sum(LENGTHS), sum(LENGTHS) + TEXT))
        return torch.cat(positions), chosen

    def gradients(
        self, objective: Objective, chunk: int, owner: str | None = None
    ) -> tuple[list[Tensor], TokenScores, dict[str, Tensor]]:
        """Gradients, scores and metrics of the responses of one teacher, or of the whole batch."""
        positions, chosen = self.part(owner)
        sampled = positions[positions < sum(LENGTHS)]
        text = len(positions) - len(sampled)
        values = vars(self.tokens)
        tokens = SampledTokens(
            **{name: values[name][sampled] for name in ("student_logprobs", "behaviour_logprobs", "teacher_logprobs")},
            lengths=torch.tensor([LENGTHS[i] for i in chosen]),
        )
        loss_fn = OnPolicyLoss(objective, tokens, baseline=self.baseline[sampled], count=28.0, text_count=4.0)
        spans = [TeacherStates(self.states[i], self.heads[OWNERS[i]]) for i in chosen]
        if text:
            last = spans[-1]
            spans[-1] = TeacherStates(torch.cat([last.hidden, last.hidden.new_zeros(text, WIDTHS["chat"])]), last.head)
        single = None if owner is None else TeacherStates(torch.cat([each.hidden for each in spans]), self.heads[owner])
        loss, scores = token_scores(
            self.hidden[positions],
            self.head,
            self.targets[positions],
            spans if single is None else single,
            loss_fn=loss_fn,
            divergence=extra_divergence(objective.divergence),
            settings=ScoringSettings(0.7, 1.4, width=V, chunk=chunk),
        )
        weight, bias = self.head.weight, self.head.bias
        assert bias is not None
        grads = torch.autograd.grad(1.7 * loss, [self.hidden, weight, bias])
        return [loss.detach(), *grads], scores, loss_fn.tally.sums


OBJECTIVES = {
    "recommended": Objective.recommended(language_model=0.3),
    "sampled rewards": Objective.paper(language_model=0.3),
    "another divergence": Objective.recommended(
        long_term=0.0,
        single_step_weight="none",
        language_model=0.3,
        divergence={"name": "jensen_shannon", "beta": 0.3},
    ),
}


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_of_two_teachers_is_the_sum_of_two_batches(name: str, chunk: int) -> None:
    batch, objective = Batch.random(), OBJECTIVES[name]
    assert name == "another divergence" or (objective.length_norm and objective.long_term)
    together, scores, sums = batch.gradients(objective, chunk)
    apart = {owner: batch.gradients(objective, chunk, owner) for owner in WIDTHS}
    for i, ours in enumerate(together):
        want = apart["math"][0][i] + apart["chat"][0][i]
        torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)
    for owner, (_, own, _) in apart.items():
        positions, _ = batch.part(owner)
        for field, values in vars(own).items():
            if values is not None:
                torch.testing.assert_close(getattr(scores, field)[positions], values, rtol=1e-12, atol=1e-12)
    for metric, value in sums.items():
        want = sum(found.get(metric, torch.zeros(())) for _, _, found in apart.values())
        torch.testing.assert_close(value, torch.as_tensor(want, dtype=value.dtype), rtol=1e-12, atol=1e-12)


def test_the_scores_are_those_of_full_logits() -> None:
    batch = Batch.random()
    _, scores, _ = batch.gradients(OBJECTIVES["recommended"], 7)
    start = 0
    for length, owner, states in zip(LENGTHS, OWNERS, batch.states, strict=True):
        part = slice(start, start + length)
        student, teacher = batch.head.logits(batch.hidden[part].detach()), batch.heads[owner].logits(states)
        want = divergences.reverse_kl(student[:, :V], teacher[:, :V], 0.7)
        torch.testing.assert_close(scores.reverse_kl[part], want.detach(), rtol=1e-10, atol=1e-12)
        start += length


def test_a_head_is_converted_once_and_the_states_are_as_many_as_the_tokens() -> None:
    batch = Batch.random()
    parts = [TeacherStates(states, batch.heads[owner]) for states, owner in zip(batch.states, OWNERS, strict=True)]
    precision = Precision(torch.float32, torch.float32, False)
    settings = SpanSettings(LogitTransform(None, 1.0, None, 1.0), None, V, precision)
    spans = teacher_spans(parts, sum(LENGTHS), settings)
    assert len({id(span.weight) for span in spans}) == 2
    assert [len(list(span.chunks(4))) for span in spans] == [2, 3, 1, 2, 2]
    with pytest.raises(InputError, match="the teachers have 28 hidden states for 29 tokens"):
        teacher_spans(parts, sum(LENGTHS) + 1, settings)
