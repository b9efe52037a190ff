"""Reads the output head of a model without the rest of its weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils.hub import cached_file

from minillm.models.configs import read_config
from minillm.models.head import Head, check_head, check_logits, head_of
from minillm.models.load import load_model
from minillm.models.sources import check_source, find_gguf

logger = logging.getLogger(__name__)


def load_head(source: str, dtype: torch.dtype, device: torch.device, name: str = "teacher") -> Head:
    """Load the output head of a causal language model, and check that it gives the model's own logits.

    Only the head's tensors are read where the weights are in safetensors format and have the names that transformers
    gives them. Any other model is loaded whole, on the CPU, and all of it but the head is dropped.

    Args:
        source: Folder, hub id or GGUF file.
        dtype: Dtype of the weights.
        device: Where they are put.
        name: `student` or `teacher`, for the error message.

    Raises:
        MissingError, NotAFolderError, SourceError: The model is not there or not complete (see `check_source`).
        InputError: The model computes its logits in a way that `Head` does not implement.
    """
    check_source(source, ("config", "weights"))
    head = None if find_gguf(source) else _read_head(source, dtype, name)
    if head is None:
        logger.info("%s: the whole model is loaded to get its output head", source)
        model = load_model(source, dtype)
        check_head(model, name)
        head = head_of(model)
    bias = None if head.bias is None else head.bias.detach().to(device)
    return Head(head.weight.detach().to(device), bias, head.scale, head.softcap)


def _read_head(source: str, dtype: torch.dtype, name: str) -> Head | None:
    """Read the head's tensors alone; None if they are not found, or cannot be checked without the body."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(read_config(source))
    module = model.get_output_embeddings()
    for kind, parameter in list(module.named_parameters(recurse=False)):
        stored = _read_tensor(source, _stored_names(model, kind))
        if stored is None or stored.shape != parameter.shape:
            return None
        setattr(module, kind, nn.Parameter(stored.to(dtype), requires_grad=False))
    head = head_of(model)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 4, head.weight.shape[1], generator=generator).to(dtype)
    setattr(model, model.base_model_prefix, _FixedBody(states))
    with torch.no_grad():
        try:
            own = model.eval()(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False).logits[0].float()
        except (AttributeError, TypeError):  # the model needs more of its body than its final states
            return None
        check_logits(model, name, own, head.logits(states[0]))
    return head


class _FixedBody(nn.Module):
    """Stands in for the body of a model, with the same final hidden states for every input."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    @property
    def decoder(self) -> _FixedBody:
        """Itself: the OPT family calls the decoder inside the body."""
        return self

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        states: Any = self.states
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)


def _stored_names(model: Any, kind: str) -> Iterator[str]:
    """Names that a parameter of the output head may have in a file, `kind` being `weight` or `bias`.

    A head that is tied to the embedding is stored as the embedding. Files of a bare body lack the body's prefix.
    """
    modules = [model.get_output_embeddings()]
    if kind == "weight" and modules[0].weight is model.get_input_embeddings().weight:
        modules.append(model.get_input_embeddings())
    for name, module in model.named_modules(remove_duplicate=False):
        if any(module is wanted for wanted in modules):
            yield f"{name}.{kind}"
            yield f"{name.removeprefix(f'{model.base_model_prefix}.')}.{kind}"
    yield f"embed_out.{kind}"  # GPT-NeoX, as its models are published


def _read_tensor(source: str, names: Iterator[str]) -> Tensor | None:
    """Read the first of these tensors that a model's safetensors files hold; None if they hold none."""
    index, single = (_find(source, f"model.safetensors{end}") for end in (".index.json", ""))
    files: dict[str, str] = {}
    if single is None and index is not None:
        with open(index, encoding="utf-8") as opened:
            files = json.load(opened)["weight_map"]
    for name in names:
        file = single if index is None or single is not None else files.get(name) and _find(source, files[name])
        if file is None:
            continue
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118
                return tensors.get_tensor(name)
    return None


def _find(source: str, file: str) -> str | None:
    """The path of a file of a model, which is downloaded if necessary; None if the model has no such file."""
    return cached_file(source, file, _raise_exceptions_for_missing_entries=False)
