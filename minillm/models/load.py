"""Models and tokenizers from folders, the hub, GGUF files, or a GGUF file inside an installed package."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations import deepspeed

from minillm.models.generation import read_generation_config
from minillm.models.sources import check_source, place
from minillm.models.sources import find_gguf as find_gguf
from minillm.models.weights import check_adapter
from minillm.recipe import AdapterConfig

_FIRST_ALONE = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # accelerate's default under FSDP


def load_model(source: str | Path, dtype: torch.dtype = torch.bfloat16, quantization: str | None = None) -> PreTrainedModel:
    """A causal language model in evaluation mode, dropout off.

    A trained model wants float32: at a learning rate of 5e-6 a bfloat16 weight hardly ever moves.

    Args:
        quantization: `8bit` or `4bit`: its linear layers but the head in so many bits (bitsandbytes); they compute in `dtype`.

    Raises:
        OSError: the model is not there, or not whole (see `check_source`).
        ValueError: bitsandbytes is not installed, the source is a GGUF file, or its weights are not all of the model's.
    """
    if quantization:
        check_quantization(quantization)
    config = read_config(source)
    check_source(str(source), ("weights",))
    folder, gguf = place(source)
    if gguf and quantization:
        raise ValueError(f"{source}: a GGUF file is not loaded in {quantization}; save it as a folder first (load_model, save_pretrained)")
    given: dict[str, Any] = {}
    if gguf:
        from transformers import GgufConfig

        given = gguf | {"quantization_config": GgufConfig(dequantize=True)}
    elif quantization:
        given = {"quantization_config": _bits(quantization, dtype)}
    with _in_one_piece():
        read: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, generation_config=read_generation_config(source, config), output_loading_info=True,
            ignore_mismatched_sizes=True, **given,
        )  # fmt: skip
    model, loaded = read
    _check_loaded(str(source), loaded)
    if gguf:
        # The weights are dense now; with these left in place the model would refuse to be saved.
        for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
            if hasattr(holder, name):
                delattr(holder, name)
        setattr(model, "is_quantized", False)  # noqa: B010
    return model.eval()


def _check_loaded(source: str, loaded: dict[str, Any]) -> None:
    """transformers draws at random what it does not find, or finds in another shape, and only warns."""
    for name, stored, wanted in sorted(loaded["mismatched_keys"]):
        raise ValueError(f"{source}: {name} has the shape {list(stored)} in the weights, and {list(wanted)} by config.json")
    absent = sorted(loaded["missing_keys"])
    if absent:
        more = f" and {len(absent) - 1} more" if absent[1:] else ""
        raise ValueError(f"{source}: the weights do not hold {absent[0]}{more}, which the model of its config.json has")


def check_quantization(quantization: str) -> None:
    """Refuse `8bit` or `4bit` weights where bitsandbytes is not installed.

    Raises:
        ValueError: saying how to install it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"quantization: {quantization} needs bitsandbytes, which is not installed: pip install 'minillm[quantized]'")


def _bits(quantization: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line at every product, that it casts to float16
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)


def load_student(source: str | Path, lora: AdapterConfig | None = None, compute: torch.dtype = torch.float32) -> Any:
    """A student to train: in float32, or with a LoRA adapter of float32 on a frozen base in `compute`."""
    if lora is None:
        return load_model(source, torch.float32)
    if lora.quantization and text_config(str(source)).model_type == "gpt2":
        raise ValueError(
            f"{source}: student.lora.quantization: GPT-2's layers are stored the other way round once they are quantised; leave it out"
        )
    torch.manual_seed(0)  # the same adapter in every process, and in a run that goes on
    base: Any = load_model(source, compute, lora.quantization)
    for module in base.modules():
        # On a CPU bitsandbytes repacks a layer that is read in evaluation mode, and what trains through it then has no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return _adapted(base, lora)


def check_student(source: str, lora: AdapterConfig) -> None:
    """Refuse an adapter that the student cannot take, without reading its weights.

    Raises:
        ValueError: its targets are no modules of the student, or cannot be scored; bitsandbytes is missing.
    """
    if lora.quantization:
        check_quantization(lora.quantization)
    with torch.device("meta"):
        _adapted(AutoModelForCausalLM.from_config(read_config(source)), lora)


def _adapted(base: Any, lora: AdapterConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, use_rslora=lora.rslora, target_modules=lora.targets, task_type="CAUSAL_LM")  # pyright: ignore[reportArgumentType]
    try:
        student = get_peft_model(base, config)
    except ValueError as error:  # PEFT names the modules that are not there
        raise ValueError(f"student.lora: {error}") from error
    check_adapter(student)
    return student


@contextmanager
def _in_one_piece() -> Iterator[None]:
    """Under a ZeRO-3 configuration transformers would deal the weights out while it loads them; DeepSpeed does that with the
    student's when it is prepared, and the teacher stays whole. Under accelerate's FSDP it would leave zeros in all processes but
    the first of a machine, for the first one's weights to be sent to; a teacher's never are."""
    kept, told = deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop(_FIRST_ALONE, None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept
        if told is not None:
            os.environ[_FIRST_ALONE] = told


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer, with a pad token (the EOS token where there was none).

    Raises:
        OSError: it is not there (see `check_source`).
        ValueError: it cannot be read.
    """
    check_source(str(source), ("tokenizer",))
    folder, gguf = place(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"{source}: its tokenizer cannot be read: {textwrap.shorten(str(error), 200)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_config(source: str | Path) -> Any:
    """The config of a folder, hub id or GGUF file, of which no weights are read."""
    check_source(str(source), ("config",))
    folder, gguf = place(source)
    if not gguf:
        return AutoConfig.from_pretrained(folder)
    return copy.deepcopy(_config_of_gguf(folder, gguf["gguf_file"], (Path(folder) / gguf["gguf_file"]).stat().st_mtime_ns))


@cache
def _config_of_gguf(folder: str, file: str, _changed: int) -> Any:
    """A GGUF file's metadata holds its vocabulary: seconds to read, and several are asked for it."""
    return AutoConfig.from_pretrained(folder, gguf_file=file)


def text_config(model: PreTrainedModel | str) -> Any:
    """Of a model, or of the one in a folder, under a hub id or in a GGUF file, whose weights are not read."""
    config: Any = read_config(model) if isinstance(model, str) else model.config
    return config.get_text_config()


def attends_fully(config: Any) -> bool:
    """Whether every layer of a model with this (text) config attends to all that came before."""
    kinds = set(getattr(config, "layer_types", None) or [])
    return not kinds - {"full_attention"} and (bool(kinds) or not getattr(config, "sliding_window", None))


def cached(source: str) -> str:
    """The folder in which the hub's cache holds a model; a folder as it is, and what is not cached too."""
    if Path(source).is_dir():
        return source
    try:
        return snapshot_download(source, local_files_only=True)
    except (OSError, ValueError):  # not cached, or no hub id
        return source


def head_size(config: Any) -> int:
    """Numbers in one head of attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def context_length(config: Any) -> int | None:
    """Positions a model was built for, where its config says."""
    return getattr(config, "max_position_embeddings", None)


def without_dropout(model: torch.nn.Module) -> None:
    """Set every dropout to 0, in place, as the authors train.

    The student that is scored must be the student that sampled: with dropout on, log q of a token would differ from its
    log q_old before any update.
    """
    config = getattr(model, "config", None)
    for thing in (*model.modules(), *([] if config is None else [config, config.get_text_config()])):
        if isinstance(thing, torch.nn.modules.dropout._DropoutNd):
            thing.p = 0.0
        for name, value in list(vars(thing).items()):
            # Families keep shares for functional dropout under many names: attention_dropout, attn_pdrop, layerdrop, …
            if isinstance(value, float) and ("drop" in name) and 0 < value < 1:
                setattr(thing, name, 0.0)
