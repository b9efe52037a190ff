"""Students with a LoRA adapter."""

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
from minillm.models.load import load_model
from minillm.models.quantization import check_quantization
from minillm.models.shards import full_tensor


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
            raise InputError(
                f"{name}: an adapter on a bare parameter (target_parameters) is not handed to the engine; use layers"
            )
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise InputError(
                f"{name}: modules_to_save and trainable tokens are not handed to the engine; use LoRA layers alone"
            )
        if not isinstance(module, BaseTunerLayer):
            continue
        if not (isinstance(module, LoraLayer) and hasattr(module, "get_delta_weight")):
            raise InputError(
                f"{name}: an adapter of kind {type(module).__name__} is not handed to the engine; use LoRA"
            )
        if any(getattr(module, "use_dora", {}).values()):
            raise InputError(f"{name}: a DoRA adapter cannot be merged on the way to the engine; use plain LoRA")
        if any(getattr(module, "lora_bias", {}).values()):
            raise InputError(f"{name}: the bias of a LoRA adapter is not handed to the engine; set lora_bias=False")
        if module is embeddings and getattr(base.config, "tie_word_embeddings", False):
            raise InputError(
                f"{name}: a LoRA adapter on an embedding that is also the head changes one of the two only; leave it out"
            )


def adapted_layers(model: Any) -> Iterator[tuple[str, list[tuple[Any, str]]]]:
    """The plain names of layers with adapters, and for each the layer and its active ones."""
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "get_delta_weight"):
            yield name, [(module, adapter) for adapter in module.active_adapters if adapter in module.scaling]


def adapter_rank(model: Any) -> int:
    """The largest rank of a layer's active LoRA adapters together; 0 where there is none.

    Raises:
        ValueError: an adapter that could not be handed over by itself.
    """
    if not hasattr(model, "get_base_model"):
        return 0
    check_adapter(model)
    for name, pairs in adapted_layers(model):
        if any(adapter not in module.lora_A for module, adapter in pairs):
            raise InputError(
                f"{name}: an adapter on an embedding reaches the engine merged only: set rollout.lora: merged"
            )
    return max((sum(module.r[adapter] for module, adapter in pairs) for _, pairs in adapted_layers(model)), default=0)


def save_adapter(model: Any, folder: str | Path, dtype: torch.dtype) -> None:
    """Save the active LoRA adapters as one of PEFT's folders, with α = r: every layer's scaling is in its B.

    Shards are gathered, which every process must take part in.
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
    """A student to train: in float32, or with a LoRA adapter of float32 on a frozen base in `compute`."""
    if lora is None:
        return load_model(source, torch.float32)
    if lora.quantization and text_config(str(source)).model_type == "gpt2":
        raise InputError(
            f"{source}: student.lora.quantization: GPT-2's layers are stored the other way round once they are quantised; leave it out"
        )
    torch.manual_seed(0)  # the same adapter in every process, and in a run that goes on
    base: Any = load_model(source, compute, lora.quantization)
    for module in base.modules():
        # On a CPU bitsandbytes repacks a layer that is read in evaluation mode, and what trains through it then has no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return _with_lora(base, lora)


def check_student(source: str, lora: AdapterConfig) -> None:
    """Refuse an adapter that the student cannot take, without reading its weights.

    Raises:
        ValueError: its targets are no modules of the student, or cannot be scored; bitsandbytes is missing.
    """
    if lora.quantization:
        check_quantization(lora.quantization)
    with torch.device("meta"):
        _with_lora(AutoModelForCausalLM.from_config(read_config(source)), lora)


def _with_lora(base: Any, lora: AdapterConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, use_rslora=lora.rslora, target_modules=lora.targets, task_type="CAUSAL_LM"
    )  # pyright: ignore[reportArgumentType]
    try:
        student = get_peft_model(base, config)
    except ValueError as error:  # PEFT names the modules that are not there
        raise InputError(f"student.lora: {error}") from error
    check_adapter(student)
    return student
