"""Saves trained models as folders, and casts saved ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillm.models.generation import mend_generation_config
from minillm.models.shards import is_sharded
from minillm.models.weights import plain_weights


def save_plain(model: Any, folder: str | Path, *, merged: bool = True, write: bool = True) -> None:
    """Save a model as a folder of its plain architecture.

    Every process that writes leaves a complete folder, while `save_pretrained` leaves one only in the first process.

    Args:
        model: A model, with or without adapters, quantised layers or shards.
        folder: Folder to write.
        merged: Whether adapters are merged into the weights. Otherwise they are left out.
        write: Whether this process writes. The weights of a sharded model are gathered, so every process must call
            this.
    """
    adapted = hasattr(model, "get_base_model")
    base = model.get_base_model() if adapted else model
    mend_generation_config(base)
    if write and not adapted and not is_sharded(model) and not torch.distributed.is_initialized():
        base.save_pretrained(folder)
        return
    if not write and not is_sharded(model):
        return
    tied: set[str] = set()
    seen: set[int] = set()
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            tied.add(name.replace(".base_layer", ""))
        seen.add(id(parameter))
    weights: dict[str, Tensor] = {}
    for name, value in plain_weights(model, base.dtype, merged=merged):
        if write and name not in tied:
            weights[name] = value.cpu().clone(memory_format=torch.contiguous_format)
    if not write:
        return
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__.removeprefix("FSDP")]
    config.dtype = base.dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the saved weights are not quantised
    config.save_pretrained(target)
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.save_pretrained(target)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def cast_folder(folder: str | Path, dtype: torch.dtype) -> None:
    """Cast the floating-point weights of a saved model, one file at a time.

    A file is replaced when the new one is complete.

    Args:
        folder: Folder of the model.
        dtype: Dtype to cast to.
    """
    for file in sorted(Path(folder).glob("*.safetensors")):
        weights = load_file(file)
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
        if all(cast[name] is weights[name] for name in weights):
            continue
        part = file.with_name(file.name + ".part")
        save_file(cast, part, metadata={"format": "pt"})
        del weights  # its memory is mapped from the file
        part.replace(file)
    config = Path(folder) / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    nested = [value for key, value in settings.items() if key.endswith("_config") and isinstance(value, dict)]
    for section in [settings, *nested]:
        if "dtype" in section:
            section["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    index = Path(folder) / "model.safetensors.index.json"
    if index.is_file():
        entries = json.loads(index.read_text(encoding="utf-8"))
        entries.get("metadata", {}).pop("total_size", None)  # the size in the old dtype
        index.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
