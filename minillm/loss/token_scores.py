"""Scores of response tokens and the gradient of a loss, computed from hidden states in one pass over chunks of tokens.

The logits of all tokens never exist at once: those of a chunk are freed before the next chunk. The gradients by the
student's hidden states and head are computed in the forward pass, because everything they depend on is available there.
That takes four matrix products per chunk (student logits, teacher logits, two for the gradients; three with a frozen
head), where autograd with recomputed chunks takes six. Two things are kept until the backward pass: one gradient of the
hidden states and, for a trained head, one float32 gradient of its weight. The backward pass returns the latter
without a copy, and autograd adds it in place to the gradient of earlier micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.loss.elementwise import Derivatives, Measures, Precision, elementwise_functions
from minillm.loss.gradients import Gradients, scaled
from minillm.loss.scores import ScoreGradients, TokenScores
from minillm.loss.sparse import SparseScorer
from minillm.loss.teacher_spans import SpanSettings, Teacher, TeacherSpan, teacher_spans
from minillm.loss.words import ChunkLogits, EndTokens
from minillm.models.device import float32_from_bfloat16_products, large_blocks_kept
from minillm.models.head import Head, LogitTransform, project

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_POLICY = ("logq", "going_on")  # the scores that a policy gradient is taken of
CHUNK = 512
"""Number of tokens in a chunk, at most."""
_CPU_LOGITS = 1 << 25  # of one chunk on a CPU, where more are not quicker


def chunk_of(vocabulary: int, *, gpu: bool) -> int:
    """Return the number of tokens in a chunk: fewer on a CPU for a wide vocabulary, whose logits are much memory."""
    return CHUNK if gpu else max(1, min(CHUNK, _CPU_LOGITS // vocabulary))


LossFn = Callable[[slice, TokenScores], tuple[Tensor, ScoreGradients]]
"""Computes the loss of a chunk and its derivatives, given the positions of the chunk's tokens and their scores.

It is called from the last chunk to the first. A return, which sums over later tokens, is then complete when its token
is reached."""

Sketch = Callable[[slice, Tensor, Tensor, Tensor], None]
"""Sees the positions, hidden states, and two gradients by the projections of every chunk: of the part of the loss that
depends on `logq` and `going_on`, and of the whole. See `minillm.loss.signal`."""

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Maps logits of student and teacher [chunk, vocab], divided by the temperature, to one value per token [chunk].

See `minillm.loss.divergences`."""


@dataclass(frozen=True)
class ScoringSettings:
    """How `token_scores` computes scores.

    Attributes:
        temperature: Divides the logits of student and teacher.
        text_temperature: Divides the logits for `text_logq` and `text_forward_kl`. None means `temperature`. A
            different value costs two more passes over the logits of a chunk, and no matrix product.
        width: Size of the vocabulary: the first rows of both heads; the other rows are padding. None means all rows,
            and then both heads must have the same number.
        chunk: Number of tokens in a chunk. A chunk also ends where the teacher changes.
        end_ids: The tokens that end a response, for losses that need `going_on`; empty if none does.
    """

    temperature: float = 1.0
    text_temperature: float | None = None
    width: int | None = None
    chunk: int = CHUNK
    end_ids: tuple[int, ...] = ()

    @property
    def other_text_temperature(self) -> float | None:
        """The temperature of text; None if it is the temperature of the other scores."""
        same = self.text_temperature is None or self.text_temperature == self.temperature
        return None if same or self.text_temperature is None else float(self.text_temperature)


@dataclass
class _Arguments:
    """Arguments of `token_scores` that autograd does not track, and the scores, which are its second result."""

    head: Head
    targets: Int[Tensor, " tokens"]
    teacher: Teacher | None
    loss_fn: LossFn | None
    divergence: Divergence | None
    settings: ScoringSettings
    sketch: Sketch | None = None
    scores: TokenScores | None = None


def token_scores(
    hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    targets: Int[Tensor, " tokens"],
    teacher: Teacher | None = None,
    *,
    loss_fn: LossFn | None = None,
    divergence: Divergence | None = None,
    settings: ScoringSettings | None = None,
    sketch: Sketch | None = None,
) -> tuple[Float[Tensor, ""], TokenScores]:
    """Compute the scores of N response tokens, and the gradient of a loss of these scores.

    Args:
        hidden: Final hidden states of the student that predict the targets.
        head: Output head of the student.
        targets: Token ids of the responses.
        teacher: States (without gradient) and head of the teacher, or rows of log-probabilities at the same
            temperature. Rows contain only some tokens. All others count as one event, so both divergences are those
            of a coarser partition of the vocabulary: they are at most the true ones, and KL(q‖p) is lower than the
            true one by q(others) · KL within the others. The gradients are exactly those of the coarser divergences.
            A sequence of states is of several teachers, each with the next tokens; the heads may differ in all but the
            vocabulary. `SparseTargets` give `target_cross_entropy` and no other score that compares with a teacher.
        loss_fn: Computes the loss chunk by chunk. None only computes scores, and the returned loss is 0.
        divergence: An additional divergence to compute: any function that autograd can differentiate. It costs some
            passes over the logits of a chunk, and no matrix product.
        settings: Temperatures, size of the vocabulary and of a chunk. Defaults to `ScoringSettings()`.
        sketch: Sees the gradients of each chunk, for which the elementwise part is differentiated twice.

    Returns:
        The loss, a scalar that backpropagates to `hidden`, `head.weight` and `head.bias`; and the scores.
    """
    arguments = _Arguments(head, targets, teacher, loss_fn, divergence, settings or ScoringSettings(), sketch)
    loss: Any = _GradientInForward.apply(hidden, head.weight, head.bias, arguments)
    assert arguments.scores is not None
    return loss, arguments.scores


class _GradientInForward(torch.autograd.Function):
    """Computes the loss and its gradients in the forward pass; the backward pass only scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "tokens hidden"],
        weight: Float[Tensor, "rows hidden"],
        bias: Float[Tensor, " rows"] | None,
        arguments: _Arguments,
    ) -> Tensor:
        precision = Precision.of(hidden)
        head = Head(weight, bias, arguments.head.scale, arguments.head.softcap)
        on_cpu = hidden.device.type == "cpu"
        with (
            torch.autocast(hidden.device.type, enabled=False),
            float32_from_bfloat16_products(on_cpu and precision.rounded),
            large_blocks_kept(on_cpu and len(hidden) * weight.shape[0] > _CPU_LOGITS),  # several chunks of equal size
        ):
            scorer = _ChunkedScorer(hidden, head, arguments, precision, ctx.needs_input_grad[:3])
            loss = scorer.run()
        arguments.scores, gradients = scorer.scores, scorer.gradients
        ctx.grads = [
            (grad, None if tensor is None else tensor.dtype)
            for grad, tensor in ((gradients.hidden, hidden), (gradients.weight, weight), (gradients.bias, bias))
        ]
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        grads = [None if grad is None else grad.mul_(upstream).to(dtype) for grad, dtype in ctx.grads]
        ctx.grads = None
        return *grads, None


@dataclass
class _Chunk:
    """Projections and scores of one chunk. `divergence` depends on `divergence_logits` in an autograd graph."""

    part: slice
    span: TeacherSpan
    student: Float[Tensor, "chunk vocab"]
    teacher: Float[Tensor, "chunk vocab"]
    targets: Int[Tensor, " chunk"]
    measures: Measures
    scores: TokenScores
    text_measures: Measures | None = None
    divergence_logits: Float[Tensor, "chunk vocab"] | None = None
    divergence: Float[Tensor, " chunk"] | None = None

    @property
    def logits(self) -> ChunkLogits:
        return ChunkLogits(self.student, self.teacher, self.targets, self.measures, self.span.transforms)


class _ChunkedScorer:
    """Computes scores, loss and gradients chunk by chunk. After `run`, `scores` and `gradients` are complete.

    Args:
        hidden: Hidden states of the student.
        head: Output head of the student, as autograd tracks it.
        arguments: The other arguments of `token_scores`.
        precision: The dtypes to compute in.
        needs_grad: Whether hidden states, weight and bias need a gradient.
    """

    def __init__(
        self, hidden: Tensor, head: Head, arguments: _Arguments, precision: Precision, needs_grad: Sequence[bool]
    ) -> None:
        settings, (dtype, wide, _) = arguments.settings, precision
        width = head.weight.shape[0] if settings.width is None else settings.width
        self._arguments, self._precision = arguments, precision
        self._num_tokens = len(arguments.targets)
        needed = needs_grad if arguments.loss_fn is not None else (False, False, False)
        self.gradients = Gradients(hidden, head, width, needed, wide)
        head = head.narrow(width)
        self._weight, self._states = precision.factor(head.weight), hidden.detach().to(dtype)
        transform = LogitTransform.of(head, settings.temperature, wide)
        self._text_temperature = settings.other_text_temperature
        self._ends = EndTokens(settings.end_ids, hidden.device, wide) if settings.end_ids else None
        shared = SpanSettings(transform, self._text_temperature, width, precision)
        self._sparse = SparseScorer.of(arguments.teacher, self._num_tokens, arguments.divergence, wide)
        self._spans = teacher_spans(arguments.teacher, self._num_tokens, shared)
        self.scores = self._empty_scores(hidden)
        self._loss = hidden.new_zeros((), dtype=wide)
        self._chunk = min(settings.chunk, chunk_of(width, gpu=hidden.is_cuda))
        num_logits = min(self._chunk, self._num_tokens) * width
        self._measure, self._differentiate = elementwise_functions(num_logits, hidden.device, precision)

    def _empty_scores(self, hidden: Tensor) -> TokenScores:
        left_out = {"divergence"} if self._arguments.divergence is None else set()
        if self._text_temperature is None:
            left_out |= {"text_logq", "text_forward_kl"}
        left_out |= {"going_on"} if self._ends is None else set()
        left_out |= {"target_cross_entropy"} if self._sparse is None else set()
        self._score_names = [field.name for field in fields(TokenScores) if field.name not in left_out]
        shape, wide = (self._num_tokens,), self._precision.wide
        return TokenScores(**{name: hidden.new_zeros(shape, dtype=wide) for name in self._score_names})

    def run(self) -> Float[Tensor, ""]:
        """Process all chunks from the last to the first, and return the loss."""
        for span in reversed(self._spans):
            for part in span.chunks(self._chunk):
                self._process(part, span)
        return self._loss

    def _process(self, part: slice, span: TeacherSpan) -> None:
        chunk = self._score(part, span)
        if self._arguments.loss_fn is None:
            return
        value, by_scores = self._arguments.loss_fn(part, chunk.scores)
        self._loss += value
        if not self.gradients.needed:
            return
        by_score, unit = self._in_units(by_scores, torch.zeros_like(chunk.scores.logq))
        grad = self._projection_gradient(chunk, by_scores, by_score)
        if self._arguments.sketch is not None:
            some = {name: value if name in _POLICY else torch.zeros_like(value) for name, value in by_score.items()}
            given = ScoreGradients(logq=by_scores.logq, going_on=by_scores.going_on)
            of_policy = self._projection_gradient(chunk, given, some)
            self._arguments.sketch(part, self._states[part], scaled(of_policy, unit), scaled(grad, unit))
        del chunk  # frees the logits before the matrix products
        self.gradients.add(part, grad, self._states[part], self._weight, unit)

    def _score(self, part: slice, span: TeacherSpan) -> _Chunk:
        """Compute the projections and scores of a chunk, and store the scores."""
        arguments, wide = self._arguments, self._precision.wide
        targets = arguments.targets[part]
        student = project(self._states[part], self._weight)
        teacher = span.projection(part, student, wide)
        measures = self._measure(student, teacher, targets, span.transforms, wide)
        _, _, *values = measures
        scores = TokenScores(*values)
        chunk = _Chunk(part, span, student, teacher, targets, measures, scores)
        if span.text_transforms is not None:
            text_measures = self._measure(student, teacher, targets, span.text_transforms, wide)
            scores.text_logq, scores.text_forward_kl = text_measures.logq, text_measures.forward_kl
            chunk.text_measures = text_measures
        if self._ends is not None:
            scores.going_on = self._ends.going_on(chunk.logits)
        if self._sparse is not None:
            scores.target_cross_entropy = self._sparse.cross_entropy(part, chunk.logits)
        if arguments.divergence is not None:
            with torch.enable_grad():
                logits = span.transforms.student.logits(student, wide).requires_grad_()
                theirs = None if self._sparse is None else self._sparse.logits(part, logits.shape[1])
                theirs = span.transforms.teacher.logits(teacher, wide) if theirs is None else theirs
                values = arguments.divergence(logits, theirs)
            scores.divergence = values.detach()
            chunk.divergence_logits, chunk.divergence = logits, values
        for name in self._score_names:
            getattr(self.scores, name)[part] = getattr(scores, name)
        return chunk

    def _in_units(self, by_scores: ScoreGradients, zero: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the derivatives by each score, with zeros for None, and the unit that they are multiples of.

        The unit is None, for 1, unless matrices are multiplied in float16. Derivatives are shares of a token count,
        which are too small for float16, and the loss has not been scaled up at this point.
        """
        wide = self._precision.wide
        by_score = {name: zero if value is None else value.to(wide) for name, value in vars(by_scores).items()}
        unit = None
        if self._precision.matmul == torch.float16:
            unit = torch.stack([value.abs().max() for value in by_score.values()]).max().clamp(min=1e-30)
            by_score = {name: value / unit for name, value in by_score.items()}
        if self._text_temperature is None:  # then these are derivatives by the same numbers
            by_score["logq"] = by_score["logq"] + by_score["text_logq"]
            by_score["forward_kl"] = by_score["forward_kl"] + by_score["text_forward_kl"]
        return by_score, unit

    def _projection_gradient(self, chunk: _Chunk, given: ScoreGradients, by_score: dict[str, Tensor]) -> Tensor:
        """Return the gradient by the student's projections of a chunk, in the dtype of the matrix products.

        Args:
            chunk: The chunk.
            given: The derivatives as `loss_fn` returned them, of which only None matters here.
            by_score: The derivatives by each score, as numbers.
        """
        dtype, wide, _ = self._precision
        transforms = chunk.span.transforms
        derivatives = Derivatives(by_score["logq"], by_score["reverse_kl"], by_score["forward_kl"])
        if self._sparse is not None:
            by_target = self._sparse.derivative(given, by_score)
            grad = self._sparse.differentiate(
                self._differentiate, chunk.part, chunk.logits, derivatives, by_target, dtype
            )
        elif self._ends is not None and given.going_on is not None and chunk.scores.going_on is not None:
            going_on, by_going_on = chunk.scores.going_on, by_score["going_on"]
            grad = self._ends.differentiate(
                self._differentiate, chunk.logits, derivatives, by_going_on, going_on, dtype
            )
        else:
            grad = self._differentiate(
                chunk.student, chunk.teacher, chunk.targets, chunk.measures, derivatives, transforms, wide, dtype
            )
        text_given = given.text_logq is not None or given.text_forward_kl is not None
        text_transforms = chunk.span.text_transforms
        if chunk.text_measures is not None and text_transforms is not None and text_given:
            zero = torch.zeros_like(chunk.scores.logq)
            derivatives = Derivatives(by_score["text_logq"], zero, by_score["text_forward_kl"])
            measures = chunk.text_measures
            grad = grad + self._differentiate(
                chunk.student, chunk.teacher, chunk.targets, measures, derivatives, text_transforms, wide, dtype
            )
        if chunk.divergence is not None and chunk.divergence_logits is not None and given.divergence is not None:
            logits = chunk.divergence_logits
            [by_logits] = torch.autograd.grad(chunk.divergence, logits, by_score["divergence"])
            grad = grad + (by_logits * transforms.student.slope(logits.detach())).to(dtype)
        return grad
