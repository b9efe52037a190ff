"""Loads models and tokenizers from folders, the hub, GGUF files, or a GGUF file inside an installed package."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.integrations import deepspeed

from minillm.errors import InputError, SourceError, one_line
from minillm.models.configs import read_config
from minillm.models.generation import read_generation_config
from minillm.models.gguf import load_gguf_tokenizer
from minillm.models.pickles import pickle_is_allowed
from minillm.models.quantization import check_quantization, quantization_config
from minillm.models.sources import check_source, find_gguf, locate

_FSDP_RAM_EFFICIENT_ENV = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # set by accelerate's default under FSDP


def load_model(
    source: str | Path, dtype: torch.dtype = torch.bfloat16, quantization: str | None = None
) -> PreTrainedModel:
    """Load a causal language model, in evaluation mode.

    Args:
        source: Folder, hub id or GGUF file.
        dtype: Dtype of the weights. A model to be trained needs float32: at a learning rate of 5e-6 a bfloat16 weight
            hardly ever changes.
        quantization: `8bit` or `4bit`, to quantise all linear layers except the head with bitsandbytes. They compute in
            `dtype`.

    Raises:
        MissingError, NotAFolderError, SourceError: The model is not there or not complete (see `check_source`), or has
            no safetensors.
        InputError: bitsandbytes is not installed, a GGUF file is to be quantised, or the weights are not those of the
            model that the config describes.
    """
    if quantization:
        check_quantization(quantization)
    config = read_config(source)
    check_source(str(source), ("weights",))
    folder, gguf = locate(source)
    if gguf and quantization:
        raise InputError(
            f"{source}: a GGUF file is not loaded in {quantization}; save it as a folder first (load_model, "
            "save_pretrained)"
        )
    given: dict[str, Any] = {}
    if gguf:
        # With the config that is known, transformers does not read the vocabulary once more for it.
        given = gguf | {"config": config, "quantization_config": GgufConfig(dequantize=True)}
    elif quantization:
        given = {"quantization_config": quantization_config(quantization, dtype)}
    if not gguf and not pickle_is_allowed(str(source)):
        given["use_safetensors"] = True
    given |= {"dtype": dtype, "generation_config": read_generation_config(source, config)}
    model, loaded = _read_weights(str(source), folder, given)
    _check_loaded(str(source), loaded)
    if gguf:
        # The weights are ordinary tensors now; with these attributes the model would refuse to be saved.
        for holder, name in (
            (model.config, "quantization_config"),
            (model, "hf_quantizer"),
            (model, "quantization_method"),
        ):
            if hasattr(holder, name):
                delattr(holder, name)
        setattr(model, "is_quantized", False)  # noqa: B010
    return model.eval()


def _read_weights(source: str, folder: str, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a model, and what transformers says of its weights."""
    try:
        with _disable_sharded_init():
            read: Any = AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, **given
            )
    except OSError as error:
        raise SourceError(
            f"{source}: its weights cannot be loaded: {one_line(error)} (a model without safetensors needs "
            "allow_pickle: true)"
        ) from error
    return read


def _check_loaded(source: str, loaded: dict[str, Any]) -> None:
    """Refuse missing or mismatched weights: transformers would initialise them at random, with only a warning."""
    for name, stored, wanted in sorted(loaded["mismatched_keys"]):
        raise InputError(
            f"{source}: {name} has the shape {list(stored)} in the weights, and {list(wanted)} by config.json"
        )
    absent = sorted(loaded["missing_keys"])
    if absent:
        more = f" and {len(absent) - 1} more" if absent[1:] else ""
        raise InputError(f"{source}: the weights do not hold {absent[0]}{more}, which its config.json asks for")


@contextmanager
def _disable_sharded_init() -> Iterator[None]:
    """Make transformers load complete weights in every process.

    Under a ZeRO-3 configuration it would shard the weights while it loads them. DeepSpeed shards the student's later,
    when it prepares the model, and the teacher is not sharded. Under accelerate's FSDP it would leave zeros in all
    processes except the first of a machine, and expect the first to send its weights to them, which never happens to a
    teacher's.
    """
    config, efficient = deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop(_FSDP_RAM_EFFICIENT_ENV, None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config
        if efficient is not None:
            os.environ[_FSDP_RAM_EFFICIENT_ENV] = efficient


def load_tokenizer(source: str | Path) -> Any:
    """Load a tokenizer. If it has no pad token, the EOS token becomes it.

    That of a GGUF file does what the file's header says (see `load_gguf_tokenizer`).

    Args:
        source: Folder, hub id or GGUF file.

    Raises:
        MissingError, NotAFolderError, SourceError: It is not there or cannot be loaded (see `check_source`).
        InputError: It cannot be read.
    """
    check_source(str(source), ("tokenizer",))
    file = find_gguf(str(source))
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source) if file is None else load_gguf_tokenizer(file)
    except InputError:
        raise
    except OSError as error:
        raise SourceError(f"{source}: its tokenizer cannot be loaded: {textwrap.shorten(str(error), 300)}") from error
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise InputError(f"{source}: its tokenizer cannot be read: {textwrap.shorten(str(error), 200)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_cached(source: str) -> str:
    """Return the folder of a hub model in the local cache.

    A local folder, or a model that is not cached, is returned unchanged.
    """
    if os.path.isdir(source):
        return source
    try:
        return snapshot_download(source, local_files_only=True)
    except (OSError, ValueError):  # not cached, or not a hub id
        return source


def without_dropout(model: torch.nn.Module) -> None:
    """Set every dropout of a model to 0, in place, as LMOps trains.

    The student that is scored must be the student that sampled: with dropout, log q of a token would differ from its
    log q_old before any weight update.
    """
    config = getattr(model, "config", None)
    for holder in (*model.modules(), *([] if config is None else [config, config.get_text_config()])):
        if isinstance(holder, torch.nn.modules.dropout._DropoutNd):
            holder.p = 0.0
        for name, value in list(vars(holder).items()):
            # Families name the rates of functional dropout differently: attention_dropout, attn_pdrop, layerdrop, …
            if isinstance(value, float) and ("drop" in name) and 0 < value < 1:
                setattr(holder, name, 0.0)
