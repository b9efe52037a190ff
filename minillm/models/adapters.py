"""Merges a PEFT adapter into the model that it belongs to: all of it, or an error."""

from __future__ import annotations

import logging
import textwrap
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from minillm.errors import InputError
from minillm.models.configs import read_config
from minillm.models.sources import check_adapter_source

logger = logging.getLogger(__name__)


def check_adapter_files(source: str, adapter: str) -> None:
    """Refuse an adapter that does not fit a model. The weights of the model are not read.

    Args:
        source: Folder, hub id or GGUF file of the model.
        adapter: Folder or hub id of the adapter.

    Raises:
        MissingError: The adapter is not there, or one of its files is missing.
        SourceError: The hub does not provide it.
        InputError: It cannot be read or merged, it has tensors that the model has no place for, or it lacks tensors.
    """
    check_adapter_source(adapter)
    with torch.device("meta"):
        base: Any = AutoModelForCausalLM.from_config(read_config(source))
    _with_adapter(base, adapter, source)


def merge_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Merge an adapter into the weights of a model, in place.

    PEFT loads the tensors that fit and only warns about the others: part of an adapter of a deeper model would be
    merged, and nothing of one whose keys have another prefix. Here both are errors.

    Args:
        model: The model.
        adapter: Folder or hub id of the adapter.

    Returns:
        The merged model, in evaluation mode.

    Raises:
        MissingError, SourceError: As for `check_adapter_files`.
        InputError: As for `check_adapter_files`, or rounding would leave nothing of the adapter.
    """
    check_adapter_source(adapter)
    before = _fingerprints(model)
    adapted = _with_adapter(model, adapter, model.name_or_path or type(model).__name__)
    is_zero = all(not layer.get_delta_weight("default").any() for layer in _lora_layers(adapted))
    try:
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, RuntimeError, TypeError) as error:
        raise InputError(f"{adapter}: the adapter cannot be merged: {_short(error)}") from error
    if _fingerprints(merged) == before:
        if not is_zero:
            raise InputError(f"{adapter}: the adapter is too small to change a weight in {model.dtype}")
        logger.warning("%s: the adapter changes nothing: was it trained?", adapter)
    return merged.eval()


def _with_adapter(model: Any, adapter: str, source: str) -> Any:
    """Load an adapter into a model, unmerged. On the meta device only names and shapes are compared."""
    from peft import PeftConfig, PeftModel
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    device = next(model.parameters()).device
    meta = device.type == "meta"
    try:
        config: Any = PeftConfig.from_pretrained(adapter)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{adapter}: adapter_config.json cannot be read: {_short(error)}") from error
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if config.is_prompt_learning or not hasattr(tuner, "merge_and_unload"):
        raise InputError(
            f"{adapter}: an adapter of kind {config.peft_type.value} cannot be merged into the model's weights"
        )
    base = config.base_model_name_or_path or "a model that it does not name"
    mismatch = f"{adapter}: the adapter, which belongs to {base}, does not fit {source}"
    config.inference_mode = True
    try:
        with torch.device(device):
            adapted = PeftModel(model, config, low_cpu_mem_usage=meta)
        loaded = adapted.load_adapter(
            adapter,
            "default",
            torch_device="cpu",
            low_cpu_mem_usage=meta,
            key_mapping=getattr(model, "_checkpoint_conversion_mapping", {}),
        )
    except (ValueError, KeyError, RuntimeError) as error:
        # Modules are missing from the model, or tensors are missing from the adapter or have another shape.
        raise InputError(f"{mismatch}: {_short(error)}") from error
    faults = [
        f"{len(keys)} {what} ({keys[0]}{', …' if keys[1:] else ''})"
        for keys, what in (
            (loaded.unexpected_keys, "of its tensors have no place in the model"),
            (loaded.missing_keys, "that the model would need are not in it"),
        )
        if keys
    ]
    if faults:
        raise InputError(f"{mismatch}: {', and '.join(faults)}")
    return adapted


def _lora_layers(adapted: Any) -> list[Any]:
    return [
        module
        for module in adapted.modules()
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {})
    ]


def _fingerprints(model: Any) -> list[int]:
    """Return one number per weight, computed from its bits, to see whether any changed.

    A copy of the weights to compare with may not fit into memory beside the model.
    """
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [
        int(value.detach().contiguous().view(sizes[value.itemsize]).sum(dtype=torch.int64))
        for value in model.parameters()
    ]


def _short(error: BaseException) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 300)
