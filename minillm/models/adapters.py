"""A PEFT adapter merged into the model that it belongs to: all of it, or not at all."""

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
    """Refuse an adapter that does not fit the model `source`, of which no weights are read.

    Args:
        source: folder, hub id or GGUF file of the model.
        adapter: folder or hub id of the adapter.

    Raises:
        OSError: the adapter is not there, or a file of it is missing.
        ValueError: it cannot be read or merged, or not all of it has a place in the model, or not all places are filled.
    """
    check_adapter_source(adapter)
    with torch.device("meta"):
        base: Any = AutoModelForCausalLM.from_config(read_config(source))
    _adapted(base, adapter, source)


def merge_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The model with an adapter merged into its weights, in place.

    PEFT takes what fits and only warns of the rest: an adapter of a deeper model would be merged in part, and one whose keys
    have another prefix not at all.

    Raises:
        OSError, ValueError: as `check_adapter_files`; or rounding would leave nothing of the adapter.
    """
    check_adapter_source(adapter)
    before = _fingerprints(model)
    adapted = _adapted(model, adapter, model.name_or_path or type(model).__name__)
    nothing = all(not layer.get_delta_weight("default").any() for layer in _layers(adapted))
    try:
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, RuntimeError, TypeError) as error:
        raise InputError(f"{adapter}: the adapter cannot be merged: {_short(error)}") from error
    if _fingerprints(merged) == before:
        if not nothing:
            raise InputError(f"{adapter}: the adapter is too small to change a weight in {model.dtype}")
        logger.warning("%s: the adapter changes nothing: was it trained?", adapter)
    return merged.eval()


def _adapted(model: Any, adapter: str, source: str) -> Any:
    """The model with the adapter beside its layers. On the meta device nothing but names and shapes is used."""
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
    theirs = f"the adapter, which belongs to {config.base_model_name_or_path or 'a model that it does not name'}, does not fit {source}"
    config.inference_mode = True
    try:
        with torch.device(device):
            adapted = PeftModel(model, config, low_cpu_mem_usage=meta)
        loaded = adapted.load_adapter(
            adapter, "default", torch_device="cpu", low_cpu_mem_usage=meta,
            key_mapping=getattr(model, "_checkpoint_conversion_mapping", {}),
        )  # fmt: skip
    except (
        ValueError,
        KeyError,
        RuntimeError,
    ) as error:  # modules that are not there, tensors missing or of another shape
        raise InputError(f"{adapter}: {theirs}: {_short(error)}") from error
    faults = [
        f"{len(keys)} {what} ({keys[0]}{', …' if keys[1:] else ''})"
        for keys, what in (
            (loaded.unexpected_keys, "of its tensors have no place in the model"),
            (loaded.missing_keys, "that the model would need are not in it"),
        )
        if keys
    ]
    if faults:
        raise InputError(f"{adapter}: {theirs}: {', and '.join(faults)}")
    return adapted


def _layers(adapted: Any) -> list[Any]:
    return [
        module
        for module in adapted.modules()
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {})
    ]


def _fingerprints(model: Any) -> list[int]:
    """A number of each weight's bits, which are the same only where nothing changed: a copy may not fit beside the model."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [
        int(value.detach().contiguous().view(sizes[value.itemsize]).sum(dtype=torch.int64))
        for value in model.parameters()
    ]


def _short(error: BaseException) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 300)
