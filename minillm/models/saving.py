"""Saved folders of a trained model."""

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
    """Save as a folder of the plain architecture, adapters merged, or left out.

    Every process that writes leaves a whole folder (`save_pretrained` leaves one where the process is the first alone).

    Args:
        write: whether this process writes; where shards are gathered every process has to call it.
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
        del config.quantization_config  # what is saved is not quantised
    config.save_pretrained(target)
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.save_pretrained(target)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def cast_folder(folder: str | Path, dtype: torch.dtype) -> None:
    """Cast the floating-point weights of a saved model, a file at a time, each replaced when its successor is whole."""
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
    said = json.loads(config.read_text(encoding="utf-8"))
    for section in [
        said,
        *(value for key, value in said.items() if key.endswith("_config") and isinstance(value, dict)),
    ]:
        if "dtype" in section:
            section["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    index = Path(folder) / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))
        listed.get("metadata", {}).pop("total_size", None)  # of the weights as they were
        index.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
