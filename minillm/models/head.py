"""The output head: from hidden states to logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm.data.batches import Padded, pad
from minillm.errors import InputError
from minillm.models.device import cpu_multiplies_bfloat16, float32_from_bfloat16_products

if TYPE_CHECKING:
    from jaxtyping import Float

# Relative errors of logits and hidden states that count as a difference: far above rounding, far below a wrong head or
# a sequence that sees another.
_HEAD_TOLERANCE = 0.05
_PACKING_TOLERANCE = 0.02
_BLOCK = 1 << 21  # weights that are converted to float32 at once: 8 MiB


def body(model: PreTrainedModel) -> Any:
    """Return the model without its output head. Adapters inside it are included."""
    return unwrap_adapter(model).base_model


def unwrap_adapter(model: Any) -> Any:
    """Return the model inside a PEFT model, and any other model unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: PreTrainedModel) -> Head:
    """Return the output head of a model: its weights, and the constants that its family applies to logits.

    Raises:
        InputError: The head has an adapter.
    """
    module: Any = unwrap_adapter(model).get_output_embeddings()
    if hasattr(module, "base_layer") or hasattr(module, "modules_to_save"):
        raise InputError(
            "an adapter on the output head is not scored; leave lm_head out of target_modules and modules_to_save"
        )
    config: Any = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere
    if scale is None:
        scale = 1.0 / getattr(config, "logits_scaling", 1.0)  # Granite divides
    return Head(module.weight, getattr(module, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


def hidden_states(model: PreTrainedModel, batch: Padded) -> Float[Tensor, "tokens hidden"]:
    """Return the final hidden states that predict the response tokens of a batch.

    No attention mask is needed, because padding is on the right and attention is causal; the fast attention kernels do
    not accept one.

    Args:
        model: The model.
        batch: The batch, on the device of the model. Sequences may share a row if `keeps_sequences_apart`.
    """
    positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    states = body(model)(input_ids=batch.input_ids, use_cache=False, **positions).last_hidden_state
    return states.reshape(-1, states.shape[-1]).index_select(0, batch.positions)


@torch.no_grad()
def check_head(model: PreTrainedModel, name: str) -> None:
    """Check on a few tokens that `head_of` gives the model's own logits.

    Args:
        model: The model.
        name: `student` or `teacher`, for the error message.

    Raises:
        InputError: The model computes its logits in a way that `Head` does not implement.
    """
    ids = torch.tensor([[1, 2, 3, 1]], device=model.device)
    was_training = model.training
    model.eval()
    own = model(input_ids=ids, use_cache=False).logits[0].float()
    ours = head_of(model).logits(body(model)(input_ids=ids, use_cache=False).last_hidden_state[0])
    model.train(was_training)
    check_logits(model, name, own, ours)


def check_logits(model: PreTrainedModel, name: str, own: Tensor, ours: Tensor) -> None:
    """Check that logits of a `Head` are the model's own.

    Args:
        model: The model.
        name: `student` or `teacher`, for the error message.
        own: Logits of the model, float32.
        ours: Logits of its head.

    Raises:
        InputError: They differ by more than rounding.
    """
    if not (own - ours.to(own.dtype)).norm() <= _HEAD_TOLERANCE * own.norm() + 1e-6:
        raise InputError(
            f"the {name} ({type(model).__name__}) makes its logits in a way that is not scored here: supported is a "
            "linear head with a bias, a scale (logit_scale, logits_scaling) and a soft cap (final_logit_softcapping)"
        )


@torch.no_grad()
def keeps_sequences_apart(model: PreTrainedModel) -> bool:
    """Return whether sequences that share a row do not see each other, tested on the model itself."""
    pieces = [[1, 2, 3], [3, 2, 1, 2], [2, 1, 3]]
    prompts, responses = [ids[:1] for ids in pieces], [ids[1:] for ids in pieces]
    was_training = model.training
    model.eval()
    apart, together = (
        hidden_states(model, pad(prompts, responses, model.device, rows=rows)).float()
        for rows in ([0, 1, 2], [0, 0, 1])
    )
    model.train(was_training)
    return bool((apart - together).norm() <= _PACKING_TOLERANCE * apart.norm())


def gather_head(model: PreTrainedModel) -> None:
    """Make DeepSpeed ZeRO-3 gather the head's weights in every forward and backward pass of the whole model."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    head: Any = unwrap_adapter(model).get_output_embeddings()
    for parameter in head.parameters(recurse=False):
        deepspeed.zero.register_external_parameter(model, parameter)


@dataclass
class Head:
    """The map from hidden states to logits: softcap(scale · (h Wᵀ + b)) / temperature.

    Attributes:
        weight: W.
        bias: b, if there is one.
        scale: Factor before the soft cap.
        softcap: Bound of the logits, c in c · tanh(x / c), if there is one.
    """

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def narrow(self, width: int) -> Head:
        """Return the head of the first `width` ids. It shares memory with this one."""
        if width == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:width]
        return Head(self.weight[:width], bias, self.scale, self.softcap)

    def converted_once(self) -> Head:
        """Return the head for many products with 16-bit states: `project` then converts no weights."""
        if self.weight.dtype == torch.bfloat16 and self.weight.device.type == "cpu":
            return replace(self, weight=self.weight.float())
        return self

    def logits(self, hidden: Float[Tensor, "tokens hidden"], temperature: float = 1.0) -> Float[Tensor, "tokens vocab"]:
        """Return the logits of the whole vocabulary, in float32, or in float64 if the hidden states are.

        They take much memory, so this is for a few tokens at a time.

        Args:
            hidden: Final hidden states of the body.
            temperature: Temperature that the logits are divided by.
        """
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return LogitTransform.of(self, temperature, wide).logits(project(hidden, self.weight), wide)


@dataclass
class TeacherStates:
    """The teacher's final hidden states that predict a batch's response tokens, without gradient, and its head."""

    hidden: Float[Tensor, "tokens hidden_size"]
    head: Head


class LogitTransform(NamedTuple):
    """The steps from h Wᵀ to logits: bias, scale, soft cap and temperature.

    They are applied in float32 or float64 after the matrix product, which has its own rounding.
    """

    bias: Float[Tensor, " vocab"] | None
    scale: float
    softcap: float | None
    temperature: float

    @classmethod
    def of(cls, head: Head, temperature: float, wide: torch.dtype) -> LogitTransform:
        """Return the steps of a head.

        Args:
            head: The head.
            temperature: Temperature that the logits are divided by.
            wide: Dtype of the bias.
        """
        bias = None if head.bias is None else head.bias.detach().to(wide)
        return cls(bias, float(head.scale), None if head.softcap is None else float(head.softcap), float(temperature))

    def logits(self, projected: Float[Tensor, "tokens vocab"], wide: torch.dtype) -> Float[Tensor, "tokens vocab"]:
        """Return the logits.

        Args:
            projected: h Wᵀ.
            wide: Dtype of the logits.
        """
        logits = projected.to(wide)
        if self.bias is not None:
            logits = logits + self.bias
        if self.softcap is None:
            return logits * (self.scale / self.temperature)
        return torch.tanh(logits * (self.scale / self.softcap)) * (self.softcap / self.temperature)

    def slope(self, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"] | float:
        """Return the derivative of the logits with respect to h Wᵀ, computed from the logits."""
        if self.softcap is None:
            return self.scale / self.temperature
        # d cap·tanh(x/cap)/dx = 1 − tanh²
        return (1 - (logits * (self.temperature / self.softcap)) ** 2) * (self.scale / self.temperature)


def project(
    states: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "vocab hidden"]
) -> Float[Tensor, "tokens vocab"]:
    """Return h Wᵀ, in float32 if the backend can compute it: rounding logits to 16 bits costs gradient accuracy.

    Args:
        states: h, the final hidden states of the body.
        weight: W, the weights of the head, which are converted where their dtype is another one.
    """
    if states.device.type == "cpu" and torch.bfloat16 in (states.dtype, weight.dtype):
        with float32_from_bfloat16_products():
            return _project_by_blocks(states.float(), weight)
    weight = weight.to(states.dtype)
    if states.is_cuda and states.dtype.itemsize == 2:
        return torch.mm(states, weight.t(), out_dtype=torch.float32)
    return states @ weight.t()


def _project_by_blocks(states: Tensor, weight: Tensor) -> Tensor:
    """Multiply by weights that are converted to float32 block by block, in memory that stays in the cache."""
    rows = max(1, _BLOCK // weight.shape[1])
    tracked = torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad)
    if weight.dtype == torch.float32 or len(weight) <= rows or tracked:
        return states @ weight.float().t()
    out, block = states.new_empty(len(states), len(weight)), states.new_empty(rows, weight.shape[1])
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        torch.mm(states, block[: len(part)].copy_(part).t(), out=out[:, start : start + len(part)])
    return out


def project_back(
    grad: Float[Tensor, "tokens vocab"], weight: Float[Tensor, "vocab hidden"]
) -> Float[Tensor, "tokens hidden"]:
    """Return G W, the gradient by the states of a loss with the gradient G by h Wᵀ.

    Args:
        grad: G.
        weight: W. In bfloat16 on a CPU, the result is rounded to bfloat16 too, which the states are as well.
    """
    if grad.dtype == weight.dtype:
        return grad @ weight
    if cpu_multiplies_bfloat16():
        return grad.to(weight.dtype) @ weight
    rows, out = max(1, _BLOCK // weight.shape[1]), grad.new_zeros(len(grad), weight.shape[1])
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        out.addmm_(grad[:, start : start + len(part)], part.to(grad.dtype))
    return out
