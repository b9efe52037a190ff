"""Loads, checks and saves students with a LoRA adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from minillm.errors import InputError
from minillm.models.config import AdapterConfig
from minillm.models.configs import read_config, text_config
from minillm.models.families import trains_quantized
from minillm.models.load import load_model
from minillm.models.quantization import check_quantization
from minillm.models.shards import full_tensor


def check_adapter(model: Any) -> None:
    """Refuse adapters that `plain_weights` cannot merge: the engine would sample from another student than is trained.

    Args:
        model: A PEFT model. Any other model passes.

    Raises:
        InputError: Naming the module.
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
            raise InputError(
                f"{name}: an adapter on a bare parameter (target_parameters) is not sent to the engine; use layers"
            )
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise InputError(
                f"{name}: modules_to_save and trainable tokens are not sent to the engine; use LoRA layers alone"
            )
        if not isinstance(module, BaseTunerLayer):
            continue
        if not (isinstance(module, LoraLayer) and hasattr(module, "get_delta_weight")):
            raise InputError(f"{name}: an adapter of kind {type(module).__name__} is not sent to the engine; use LoRA")
        if any(getattr(module, "use_dora", {}).values()):
            raise InputError(f"{name}: a DoRA adapter cannot be merged when it is sent to the engine; use plain LoRA")
        if any(getattr(module, "lora_bias", {}).values()):
            raise InputError(f"{name}: the bias of a LoRA adapter is not sent to the engine; set lora_bias=False")
        if module is embeddings and getattr(base.config, "tie_word_embeddings", False):
            raise InputError(
                f"{name}: a LoRA adapter on an embedding that is also the head changes only one of them; leave it out"
            )


def adapted_layers(model: Any) -> Iterator[tuple[str, list[tuple[Any, str]]]]:
    """Iterate over the layers of a PEFT model that have adapters.

    Yields:
        The name of the layer in the plain model, and for each of its active adapters the PEFT layer and the adapter's
        name.
    """
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "get_delta_weight"):
            yield name, [(module, adapter) for adapter in module.active_adapters if adapter in module.scaling]


def adapter_rank(model: Any) -> int:
    """Return the rank that the active LoRA adapters need as one adapter: the largest sum of ranks on a layer.

    Args:
        model: A model; 0 is returned for one without adapters.

    Raises:
        InputError: An adapter cannot be sent to the engine by itself, that is, unmerged.
    """
    if not hasattr(model, "get_base_model"):
        return 0
    check_adapter(model)
    for name, pairs in adapted_layers(model):
        if any(adapter not in module.lora_A for module, adapter in pairs):
            raise InputError(
                f"{name}: an adapter on an embedding can only be sent to the engine merged: set rollout.lora: merged"
            )
    return max((sum(module.r[adapter] for module, adapter in pairs) for _, pairs in adapted_layers(model)), default=0)


def save_adapter(model: Any, folder: str | Path, dtype: torch.dtype) -> None:
    """Save the active LoRA adapters as one adapter in PEFT's format, with α = r: the scaling of each layer is in its B.

    Sharded weights are gathered, so every process must call this.

    Args:
        model: A PEFT model.
        folder: Folder to write.
        dtype: Dtype of the saved tensors.
    """
    tensors: dict[str, Tensor] = {}
    for name, pairs in adapted_layers(model):
        for which, parts in (
            ("A", [full_tensor(module.lora_A[adapter].weight) for module, adapter in pairs]),
            ("B", [full_tensor(module.lora_B[adapter].weight) * module.scaling[adapter] for module, adapter in pairs]),
        ):
            whole = torch.cat(parts, dim=0 if which == "A" else 1) if parts else None
            if whole is not None:
                tensors[f"base_model.model.{name}.lora_{which}.weight"] = whole.detach().to("cpu", dtype).contiguous()
    rank = adapter_rank(model)
    layers = sorted({name.rsplit(".", 1)[-1] for name, pairs in adapted_layers(model) if pairs})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": layers,
        "bias": "none",
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def load_student(source: str | Path, lora: AdapterConfig | None = None, compute: torch.dtype = torch.float32) -> Any:
    """Load a student to train.

    Args:
        source: Folder, hub id or GGUF file.
        lora: Settings of an adapter to add, if any. It is in float32, and the base is frozen.
        compute: Dtype of a frozen base. Without an adapter the student is in float32.

    Raises:
        MissingError, NotAFolderError, SourceError, InputError: As for `load_model`.
        InputError: The student cannot take the adapter, or cannot be quantised.
    """
    if lora is None:
        return load_model(source, torch.float32)
    if lora.quantization:
        _check_quantizable(str(source))
    torch.manual_seed(0)  # the same adapter in every process, and in a run that is resumed
    base: Any = load_model(source, compute, lora.quantization)
    for module in base.modules():
        # On a CPU bitsandbytes repacks a layer that is used in evaluation mode, and no gradient passes through it
        # afterwards.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return _with_lora(base, lora)


def check_student(source: str, lora: AdapterConfig) -> None:
    """Refuse an adapter that the student cannot take, without reading its weights.

    Args:
        source: Folder, hub id or GGUF file of the student.
        lora: Settings of the adapter.

    Raises:
        InputError: Its targets are not modules of the student or cannot be scored, or the student cannot be quantised.
    """
    if lora.quantization:
        _check_quantizable(source)
        check_quantization(lora.quantization)
    with torch.device("meta"):
        _with_lora(AutoModelForCausalLM.from_config(read_config(source)), lora)


def _check_quantizable(source: str) -> None:
    """Refuse a student whose layers cannot be trained around once bitsandbytes has quantised them."""
    config = text_config(source)
    if not trains_quantized(config):
        raise InputError(
            f"student.lora.quantization: bitsandbytes stores the layers of {config.model_type} the other way round "
            f"when it quantises them ({source}): leave it out"
        )


def _with_lora(base: Any, lora: AdapterConfig) -> Any:
    """Add a new adapter to a model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (PEFT divides it, so a float works)
        use_rslora=lora.rslora,
        target_modules=lora.targets,
        task_type="CAUSAL_LM",
    )
    try:
        student = get_peft_model(base, config)
    except ValueError as error:  # PEFT names the modules that are not there
        raise InputError(f"student.lora: {error}") from error
    check_adapter(student)
    return student
