"""Counts the floating-point operations of a model's matrix products, by formula from its dimensions.

Conventions:

- A multiply-add is two operations. Only matrix products count: linear layers, QKᵀ, AV and the output head. Norms,
  activations, softmax, rotary embeddings and the optimiser are left out; they are limited by memory bandwidth.
- Attention is counted as fused kernels compute it: a pair of tokens that is masked, because it is in the future or
  outside a sliding window, is not multiplied. Eager attention multiplies the masked pairs of a sequence too; `masked`
  counts them. Grouped keys change nothing, because every query head is multiplied with keys and values.
- Only work that is needed counts: no padding, and nothing that gradient checkpointing or an attention kernel computes a
  second time in the backward pass. (`minillm plan` adds the former by itself.)
- A backward pass is twice the forward pass: one product for the gradient by the input and one for the gradient by the
  weight. A frozen weight has only the first. The gradient by the input of the first layer is counted for a frozen
  weight too, although it is not needed below the first adapter.
- Of a mixture of experts, the experts that a token is sent to are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from minillm.models.configs import head_size
from minillm.models.head import body, unwrap_adapter


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model's matrix products. Methods return floating-point operations.

    Lengths are tokens of single sequences; they may be fractions, as averages are.

    Attributes:
        trained: Number of weights in the body that every token is multiplied with and that have a gradient.
        frozen: Number of weights in the body that every token is multiplied with and that have none.
        hidden: Size of the final hidden states, which the head is multiplied with.
        inner: Width of the feed-forward layers.
        vocab: Rows of the output head.
        head_trained: Whether the output head has a gradient.
        attention: Size of all query heads of a layer together.
        windows: For each layer, how many tokens a token sees, itself included; None for all before it, and 0 for a
            layer without attention.
    """

    trained: float
    frozen: float
    hidden: int
    inner: int
    vocab: int
    head_trained: bool
    attention: int
    windows: tuple[int | None, ...]

    @property
    def weights(self) -> float:
        """Number of weights in the body that every token is multiplied with."""
        return self.trained + self.frozen

    def frozen_beside(self, adapter: float) -> Dimensions:
        """Return the dimensions of this model with all its weights frozen and an adapter added.

        Args:
            adapter: Number of weights of the adapter.
        """
        return replace(self, trained=adapter, frozen=self.weights, head_trained=False)

    def forward(self, lengths: Iterable[float], *, masked: bool = False) -> float:
        """Count the forward pass of the body over whole sequences.

        Args:
            lengths: Tokens of each sequence.
            masked: Whether pairs of tokens that are masked are multiplied too, as in eager attention.
        """
        return sum(2 * self.weights * length + self._attention(length, masked) for length in lengths)

    def backward(self, lengths: Iterable[float], *, masked: bool = False) -> float:
        """Count the backward pass of the body; the arguments are those of `forward`."""
        by_token = 4 * self.trained + 2 * self.frozen
        return sum(by_token * length + 2 * self._attention(length, masked) for length in lengths)

    def decoding(
        self, prompts: Sequence[float], responses: Sequence[float], cached: Sequence[float] | None = None
    ) -> float:
        """Count the sampling of responses with a key-value cache: body and output head.

        The body reads every token but the last one of a response once, and the head is multiplied once for each
        response token.

        Args:
            prompts: Tokens of each prompt.
            responses: Tokens of each response.
            cached: Tokens of each prompt whose keys and values are in the cache already; none by default.
        """
        total = 0.0
        for prompt, response, known in zip(prompts, responses, cached or [0.0] * len(prompts), strict=True):
            end = prompt + max(response - 1, 0)
            total += 2 * self.weights * (end - known) + self._attention(end, False) - self._attention(known, False)
            total += self.head(response)
        return total

    def head(self, tokens: float, width: int | None = None) -> float:
        """Count one product of the output head: logits, or a gradient.

        Args:
            tokens: Tokens whose logits are computed.
            width: Rows of the head that are used; all by default.
        """
        return 2 * tokens * self.hidden * (self.vocab if width is None else width)

    def head_training(self, tokens: float, width: int | None = None, teacher: float | None = None) -> float:
        """Count the products of the output head in an update: four, or three where the head is frozen.

        They are the logits of the student, the logits of the teacher, the gradient by the hidden states, and the
        gradient by the weights if these are trained.

        Args:
            tokens: Tokens that are scored.
            width: Rows of the head that both models have; all of this model by default.
            teacher: Size of the teacher's hidden states; None if the teacher's logits are not computed here.
        """
        own = (3 if self.head_trained else 2) * self.head(tokens, width)
        return own + (0 if teacher is None else self.head(tokens, width) / self.hidden * teacher)

    def products(self, rows: int = 512) -> list[tuple[int, int, int]]:
        """Return the shapes of the large matrix products, to measure a device with: rows, inner size and columns.

        Args:
            rows: Tokens that are multiplied together.
        """
        return [(rows, self.hidden, self.inner), (rows, self.inner, self.hidden), (rows, self.hidden, self.vocab)]

    def _attention(self, length: float, masked: bool) -> float:
        """Operations of QKᵀ and AV of all layers in a sequence."""
        pairs = sum(
            length * length if masked and window != 0 else _seen_pairs(length, window) for window in self.windows
        )
        return 4 * self.attention * pairs


def _seen_pairs(length: float, window: int | None) -> float:
    """How many pairs of a token and one that it sees a sequence has."""
    start = length if window is None else min(length, window)
    return start * (start + 1) / 2 + (length - start) * start


@dataclass(frozen=True)
class UpdateFlops:
    """The operations of one weight update by phase."""

    sampling: float
    """Decoding of the responses by the student, and by the teacher if it is mixed in."""
    teacher: float
    """The teacher's forward pass up to its hidden states; 0 if it is mixed in, because decoding returns them."""
    student: float
    """Forward and backward pass of the student's body."""
    head: float
    """The products of both output heads."""

    @property
    def total(self) -> float:
        """The operations of the whole update."""
        return self.sampling + self.teacher + self.student + self.head


def update_flops(
    student: Dimensions,
    teacher: Dimensions,
    prompts: Sequence[float],
    responses: Sequence[float],
    *,
    width: int | None = None,
    mixed: bool = False,
) -> UpdateFlops:
    """Count an update on responses that are sampled for it, with a teacher in the process.

    Args:
        student: The student.
        teacher: The teacher.
        prompts: Tokens of each prompt; no two prompts are taken to be the same.
        responses: Tokens of each response.
        width: Size of the shared vocabulary; the student's head by default.
        mixed: Whether the teacher is mixed into the sampling.
    """
    lengths = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    return UpdateFlops(
        sampling=student.decoding(prompts, responses) + (teacher.decoding(prompts, responses) if mixed else 0.0),
        teacher=0.0 if mixed else teacher.forward(lengths),
        student=student.forward(lengths) + student.backward(lengths),
        head=student.head_training(sum(responses), width, teacher.hidden),
    )


def dimensions_of(model: PreTrainedModel) -> Dimensions:
    """Return the dimensions of a model, by its config and by the sizes that its layers state.

    Weights are not read: they may be on the meta device, quantised, or sharded over processes.

    Args:
        model: The model, with or without an adapter.
    """
    config: Any = model.config.get_text_config()
    head: Any = unwrap_adapter(model).get_output_embeddings()
    trained = frozen = 0.0
    for module in body(model).modules():
        for count, has_gradient in _multiplied_by(module, config):
            trained, frozen = (trained + count, frozen) if has_gradient else (trained, frozen + count)
    return Dimensions(
        trained=trained,
        frozen=frozen,
        hidden=head.in_features,
        inner=inner_size(config),
        vocab=head.out_features,
        head_trained=head.weight.requires_grad,
        attention=heads * head_size(config) if (heads := getattr(config, "num_attention_heads", None)) else 0,
        windows=_windows(config),
    )


def inner_size(config: Any) -> int:
    """Return the width of the feed-forward layers of a model with this (text) config."""
    named = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    return next((size for size in named if size), 4 * config.hidden_size)


def _multiplied_by(module: Any, config: Any) -> list[tuple[float, bool]]:
    """How many weights of a module itself each token is multiplied with, and whether they have a gradient."""
    if hasattr(module, "base_layer"):  # a layer with an adapter repeats the sizes of the layer inside it
        return []
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return [(module.in_features * module.out_features, module.weight.requires_grad)]
    if hasattr(module, "nx") and hasattr(module, "nf"):  # Conv1D, the linear layer of GPT-2
        return [(module.nx * module.nf, module.weight.requires_grad)]
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    if not experts or not chosen:
        return []
    # The weights of all experts are one parameter [experts, rows, columns].
    stacked = [weight for weight in module.parameters(recurse=False) if weight.ndim == 3 and len(weight) == experts]
    return [(weight.numel() * chosen / experts, weight.requires_grad) for weight in stacked]


def _windows(config: Any) -> tuple[int | None, ...]:
    """For each layer the size of its sliding window, None for full attention, and 0 for a layer without attention."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * config.num_hidden_layers
    local = {"sliding_attention": window, "chunked_attention": getattr(config, "attention_chunk_size", None)}
    # Linear attention, convolutions and state spaces multiply no pairs of tokens.
    return tuple(local.get(kind, None if kind == "full_attention" else 0) for kind in kinds)
