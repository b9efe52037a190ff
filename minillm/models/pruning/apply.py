"""Builds a student by depth pruning: the teacher without the blocks that change their input least."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from minillm.errors import InputError
from minillm.models.generation import mend_generation_config
from minillm.models.layers import decoder_layers
from minillm.models.pruning.layer_settings import cut_config

_CHECKED_TOKENS = 16  # more than one, so that a fault that depends on positions shows
# Largest relative error of the centred logits, in units of √ε of the dtype: far above rounding, and far below the
# effect of a wrong layer setting.
_TOLERANCE = 0.25


def prune(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Build a model from some of the layers of another.

    Args:
        model: The model to prune. It is not changed.
        kept: Indices of the layers to keep, in ascending order.

    Returns:
        The pruned model, on the CPU, in evaluation mode. It shares no memory with `model`.

    Raises:
        InputError: The pruned model does not compute what `model` computes with the other blocks skipped. This is
            tested on a few tokens.
    """
    name, layers = decoder_layers(model)
    new_index = {str(old): str(new) for new, old in enumerate(kept)}

    def keep_tensors(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Select the tensors of the pruned model, under the names that they have in it."""
        found = {}
        for key, value in tensors:
            index, _, tail = key.removeprefix(f"{name}.").partition(".")
            if not key.startswith(f"{name}."):
                found[key] = value
            elif index in new_index:
                found[f"{name}.{new_index[index]}.{tail}"] = value
        return found

    try:
        config, attention = cut_config(model.config, kept), model.config._attn_implementation
        with init_empty_weights(include_buffers=False):
            pruned: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=attention)
        # The tensors are the teacher's own until the check is done: a second copy may not fit into memory beside them.
        pruned.load_state_dict(keep_tensors(model.state_dict().items()), assign=True)
    except (RuntimeError, ValueError, LookupError) as error:
        raise _cannot(model, textwrap.shorten(str(error), 300)) from error
    pruned.tie_weights()
    pruned.to(model.device).eval()
    with _rounded(pruned, keep_tensors(model.named_buffers())):
        _check_pruned(model, [layer for i, layer in enumerate(layers) if str(i) not in new_index], pruned)
    for tensor in (*pruned.parameters(), *pruned.buffers()):
        tensor.data = tensor.data.to("cpu", copy=True)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    mend_generation_config(pruned)
    return pruned


def _cannot(model: PreTrainedModel, reason: str) -> InputError:
    return InputError(
        f"{type(model).__name__} cannot be pruned by depth: {reason}; set student.source to a smaller model of the "
        "family"
    )


@contextmanager
def _rounded(pruned: PreTrainedModel, like: dict[str, Tensor]) -> Iterator[None]:
    """Round the pruned model's buffers to the teacher's dtypes inside the context.

    `teacher.to(bfloat16)` has rounded the frequencies of its position embedding too.
    """
    exact = [(buffer, buffer.data) for buffer in pruned.buffers()]
    for key, buffer in pruned.named_buffers():
        buffer.data = buffer.data.to(like[key].dtype if key in like else buffer.dtype)
    try:
        yield
    finally:
        for buffer, value in exact:
            buffer.data = value


@torch.no_grad()
def _check_pruned(model: PreTrainedModel, dropped: Sequence[nn.Module], pruned: PreTrainedModel) -> None:
    """Compare a pruned model with the original in which the dropped blocks are skipped.

    This finds layer settings that `cut_config` misses, scales that depend on the number of a layer, and layers that use
    the keys or states of another layer.
    """
    config: Any = model.config.get_text_config()
    ids = torch.arange(1, _CHECKED_TOKENS + 1, device=model.device)[None] * 7919 % config.vocab_size
    was_training = model.training
    model.eval()
    with _skipped(dropped):
        want = model(input_ids=ids, use_cache=False).logits.float()
    model.train(was_training)
    off = pruned(input_ids=ids, use_cache=False).logits.float().log_softmax(-1) - want.log_softmax(-1)
    centred = want - want.mean(-1, keepdim=True)
    if not off.norm() <= _TOLERANCE * torch.finfo(model.dtype).eps ** 0.5 * centred.norm():
        differ = f"log-probabilities off by up to {float(off.abs().max()):.2g}"
        raise _cannot(model, f"the pruned model would differ from the model with those blocks skipped ({differ})")


@contextmanager
def _skipped(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Make blocks return their input inside the context."""

    def skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple | list) else given

    hooks = [layer.register_forward_hook(skip, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
