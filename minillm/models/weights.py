"""A trained model's weights under the names its plain architecture has, for an engine or a saved folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from minillm.models.generation import mend_generation_config


def is_sharded(model: Any) -> bool:
    """Whether every forward is a collective operation: FSDP in either form, and DeepSpeed ZeRO-3."""
    return isinstance(model, (FSDPModule, FullyShardedDataParallel)) or any(isinstance(p, DTensor) or _dealt(p) for p in model.parameters())


def _dealt(value: Tensor) -> bool:
    return hasattr(value, "ds_id")  # a parameter of which ZeRO-3 left this process a part


@contextmanager
def _in_full(values: Iterable[Tensor]) -> Iterator[None]:
    """ZeRO-3's parameters gathered for as long as this lasts, which every process must take part in."""
    parts = [value for value in values if _dealt(value)]
    if not parts:
        yield
        return
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters(parts):
        yield


def check_adapter(model: Any) -> None:
    """Refuse adapters that `plain_weights` could not hand over: the engine would sample another student than is trained.

    Raises:
        ValueError: naming the module.
    """
    if not hasattr(model, "get_base_model"):
        return
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = model.get_base_model()
    embeddings = base.get_input_embeddings()
    for name, module in base.named_modules():
        if getattr(module, "parameter_name", None):
            raise ValueError(f"{name}: an adapter on a bare parameter (target_parameters) is not handed to the engine; use layers")
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"{name}: modules_to_save and trainable tokens are not handed to the engine; use LoRA layers alone")
        if not isinstance(module, BaseTunerLayer):
            continue
        if not (isinstance(module, LoraLayer) and hasattr(module, "get_delta_weight")):
            raise ValueError(f"{name}: an adapter of kind {type(module).__name__} is not handed to the engine; use LoRA")
        if any(getattr(module, "use_dora", {}).values()):
            raise ValueError(f"{name}: a DoRA adapter cannot be merged on the way to the engine; use plain LoRA")
        if any(getattr(module, "lora_bias", {}).values()):
            raise ValueError(f"{name}: the bias of a LoRA adapter is not handed to the engine; set lora_bias=False")
        if module is embeddings and getattr(base.config, "tie_word_embeddings", False):
            raise ValueError(f"{name}: a LoRA adapter on an embedding that is also the head changes one of the two only; leave it out")


# vLLM ties a head of its own to the embedding, and both must be sent for both to move; of these architectures it has no head.
_HEADLESS_IN_VLLM = {"gemma2"}


def plain_weights(model: Any, dtype: torch.dtype, *, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every weight in full, tied ones under each of their names, adapters merged on the way out, or left out.

    The model itself is left alone: merging in place and taking out again would round the frozen base a little each time.
    Shards (FSDP2, ZeRO-3) are gathered one tensor at a time, which every process must take part in.
    """
    if not hasattr(model, "get_base_model"):
        for name, value in _stored(model):
            yield name, _whole(value).to(dtype)
        return
    check_adapter(model)
    deltas = {f"{name}.weight": pairs for name, pairs in _adapted(model)} if merged else {}
    for name, value in _stored(model.get_base_model()):
        if "lora_" not in name:
            plain = name.replace(".base_layer", "")
            whole = _whole(value)
            for module, adapter in deltas.get(plain, []):
                with _in_full(part for key, part in module.named_parameters() if "lora_" in key):
                    delta = _whole(module.get_delta_weight(adapter))
                whole = whole + delta.to(whole.dtype)
            yield plain, whole.to(dtype)


def is_quantized(model: Any) -> bool:
    """Whether some layers are held in 8 or 4 bits (bitsandbytes)."""
    return any(_quantized(module) for module in model.modules())


def _quantized(module: Any) -> bool:
    return type(module._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params")


def _stored(model: Any) -> Iterator[tuple[str, Tensor]]:
    """A model's weights by name as they are, those of quantised layers as the numbers they stand for."""
    layers = {name: module for name, module in model.named_modules() if _quantized(module)}
    headless = getattr(model.config, "model_type", None) in _HEADLESS_IN_VLLM and model.config.tie_word_embeddings
    for name, value in model.state_dict(keep_vars=True).items():
        if headless and name == "lm_head.weight":
            continue
        layer, _, what = name.rpartition(".")
        if layer in layers and what == "weight":
            from peft.utils.integrations import dequantize_module_weight

            yield name, dequantize_module_weight(layers[layer])
        elif what == "bias" or (layer not in layers and layer.partition(".weight")[0] not in layers):  # and not its scales
            yield name, value


def _adapted(model: Any) -> Iterator[tuple[str, list[tuple[Any, str]]]]:
    """The plain names of layers with adapters, and for each the layer and its active ones."""
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "get_delta_weight"):
            yield name, [(module, adapter) for adapter in module.active_adapters if adapter in module.scaling]


@torch.no_grad()
def _whole(value: Tensor) -> Tensor:
    if _dealt(value):
        with _in_full([value]):
            return value.detach().clone()
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()


def adapter_rank(model: Any) -> int:
    """The largest rank of a layer's active LoRA adapters together; 0 where there is none.

    Raises:
        ValueError: an adapter that could not be handed over by itself.
    """
    if not hasattr(model, "get_base_model"):
        return 0
    check_adapter(model)
    for name, pairs in _adapted(model):
        if any(adapter not in module.lora_A for module, adapter in pairs):
            raise ValueError(f"{name}: an adapter on an embedding reaches the engine merged only: set rollout.lora: merged")
    return max((sum(module.r[adapter] for module, adapter in pairs) for _, pairs in _adapted(model)), default=0)


def save_adapter(model: Any, folder: str | Path, dtype: torch.dtype) -> None:
    """Save the active LoRA adapters as one of PEFT's folders, with α = r: every layer's scaling is in its B.

    Shards are gathered, which every process must take part in.
    """
    tensors: dict[str, Tensor] = {}
    for name, pairs in _adapted(model):
        for which, parts in (
            ("A", [_whole(module.lora_A[adapter].weight) for module, adapter in pairs]),
            ("B", [_whole(module.lora_B[adapter].weight) * module.scaling[adapter] for module, adapter in pairs]),
        ):
            whole = torch.cat(parts, dim=0 if which == "A" else 1) if parts else None
            if whole is not None:
                tensors[f"base_model.model.{name}.lora_{which}.weight"] = whole.detach().to("cpu", dtype).contiguous()
    rank = adapter_rank(model)
    layers = sorted({name.rsplit(".", 1)[-1] for name, pairs in _adapted(model) if pairs})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": layers, "bias": "none"}
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


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
    for section in [said, *(value for key, value in said.items() if key.endswith("_config") and isinstance(value, dict))]:
        if "dtype" in section:
            section["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    index = Path(folder) / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))
        listed.get("metadata", {}).pop("total_size", None)  # of the weights as they were
        index.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
