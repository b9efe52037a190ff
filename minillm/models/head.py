"""The output head: from hidden states to logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm.data.batches import Padded, pad
from minillm.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float


def body(model: PreTrainedModel) -> Any:
    """The model without its head, adapters inside it included."""
    return unwrap_adapter(model).base_model


def unwrap_adapter(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: PreTrainedModel) -> Head:
    """The head's weights and the constants that its family applies to logits."""
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
        raise InputError(
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
    return bool(
        (apart - together).norm() <= 0.02 * apart.norm()
    )  # seeing each other changes far more than rounding does


def gather_head(model: PreTrainedModel) -> None:
    """Have DeepSpeed ZeRO-3 gather the head's weights for every forward and backward of the whole model."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    head: Any = unwrap_adapter(model).get_output_embeddings()
    for parameter in head.parameters(recurse=False):
        deepspeed.zero.register_external_parameter(model, parameter)


@dataclass
class Head:
    """The map from hidden states [N, H] to logits [N, V]: softcap(scale · (h Wᵀ + b)) / temperature."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def narrow(self, width: int) -> Head:
        """The head of the first `width` tokens."""
        if width == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:width]
        return Head(self.weight[:width], bias, self.scale, self.softcap)

    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """All of them, [N, V], in float32 or better: for a few rows at a time."""
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return LogitTransform.of(self, temperature, wide).logits(project(hidden, self.weight.to(hidden.dtype)), wide)


@dataclass
class TeacherStates:
    """Final hidden states of the teacher that predict a batch's response tokens, without gradient, and its output head."""

    hidden: Float[Tensor, "tokens hidden_size"]
    head: Head


class LogitTransform(NamedTuple):
    """What turns h Wᵀ into the logits that are compared; applied in float32, after the matmul's own rounding."""

    bias: Tensor | None
    scale: float
    softcap: float | None
    temperature: float

    @classmethod
    def of(cls, head: Head, temperature: float, wide: torch.dtype) -> LogitTransform:
        bias = None if head.bias is None else head.bias.detach().to(wide)
        return cls(bias, float(head.scale), None if head.softcap is None else float(head.softcap), float(temperature))

    def logits(self, projected: Tensor, wide: torch.dtype) -> Tensor:
        logits = projected.to(wide)
        if self.bias is not None:
            logits = logits + self.bias
        if self.softcap is None:
            return logits * (self.scale / self.temperature)
        return torch.tanh(logits * (self.scale / self.softcap)) * (self.softcap / self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the logits by the projection, from the logits themselves."""
        if self.softcap is None:
            return self.scale / self.temperature
        # d cap·tanh(x/cap)/dx = 1 − tanh²
        return (1 - (logits * (self.temperature / self.softcap)) ** 2) * (self.scale / self.temperature)


def project(states: Tensor, weight: Tensor) -> Tensor:
    """h Wᵀ, in float32 where the backend can give it: rounding logits to 16 bits costs gradient accuracy."""
    if states.is_cuda and states.dtype.itemsize == 2:
        return torch.mm(states, weight.t(), out_dtype=torch.float32)
    return states @ weight.t()
