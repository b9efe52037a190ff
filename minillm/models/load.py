"""Models and tokenizers from folders, the hub, GGUF files, or a GGUF file inside an installed package."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations import deepspeed

from minillm.errors import InputError, SourceError
from minillm.models.configs import read_config
from minillm.models.generation import read_generation_config
from minillm.models.quantization import check_quantization, quantization_config
from minillm.models.sources import check_source, place

_FSDP_RAM_EFFICIENT_ENV = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # accelerate's default under FSDP


def load_model(
    source: str | Path, dtype: torch.dtype = torch.bfloat16, quantization: str | None = None
) -> PreTrainedModel:
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
        raise InputError(
            f"{source}: a GGUF file is not loaded in {quantization}; save it as a folder first (load_model, save_pretrained)"
        )
    given: dict[str, Any] = {}
    if gguf:
        from transformers import GgufConfig

        given = gguf | {"quantization_config": GgufConfig(dequantize=True)}
    elif quantization:
        given = {"quantization_config": quantization_config(quantization, dtype)}
    with _disable_sharded_init():
        read: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, generation_config=read_generation_config(source, config), output_loading_info=True,
            ignore_mismatched_sizes=True, **given,
        )  # fmt: skip
    model, loaded = read
    _check_loaded(str(source), loaded)
    if gguf:
        # The weights are dense now; with these left in place the model would refuse to be saved.
        for holder, name in (
            (model.config, "quantization_config"),
            (model, "hf_quantizer"),
            (model, "quantization_method"),
        ):
            if hasattr(holder, name):
                delattr(holder, name)
        setattr(model, "is_quantized", False)  # noqa: B010
    return model.eval()


def _check_loaded(source: str, loaded: dict[str, Any]) -> None:
    """transformers draws at random what it does not find, or finds in another shape, and only warns."""
    for name, stored, wanted in sorted(loaded["mismatched_keys"]):
        raise InputError(
            f"{source}: {name} has the shape {list(stored)} in the weights, and {list(wanted)} by config.json"
        )
    absent = sorted(loaded["missing_keys"])
    if absent:
        more = f" and {len(absent) - 1} more" if absent[1:] else ""
        raise InputError(f"{source}: the weights do not hold {absent[0]}{more}, which the model of its config.json has")


@contextmanager
def _disable_sharded_init() -> Iterator[None]:
    """Under a ZeRO-3 configuration transformers would deal the weights out while it loads them; DeepSpeed does that with the
    student's when it is prepared, and the teacher stays whole. Under accelerate's FSDP it would leave zeros in all processes but
    the first of a machine, for the first one's weights to be sent to; a teacher's never are."""
    kept, told = deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop(_FSDP_RAM_EFFICIENT_ENV, None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept
        if told is not None:
            os.environ[_FSDP_RAM_EFFICIENT_ENV] = told


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
    except OSError as error:
        raise SourceError(f"{source}: its tokenizer cannot be loaded: {textwrap.shorten(str(error), 300)}") from error
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise InputError(f"{source}: its tokenizer cannot be read: {textwrap.shorten(str(error), 200)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_cached(source: str) -> str:
    """The folder in which the hub's cache holds a model; a folder as it is, and what is not cached too."""
    if Path(source).is_dir():
        return source
    try:
        return snapshot_download(source, local_files_only=True)
    except (OSError, ValueError):  # not cached, or no hub id
        return source


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
