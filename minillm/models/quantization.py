"""Weights in 8 or 4 bits, by bitsandbytes."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from minillm.distribution import install_command
from minillm.errors import InputError


def is_quantized(model: Any) -> bool:
    """Return whether a layer of the model has weights in 8 or 4 bits."""
    return any(layer_is_quantized(module) for module in model.modules())


def layer_is_quantized(module: Any) -> bool:
    """Return whether the layer itself has weights in 8 or 4 bits."""
    return type(module._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params")


def check_quantization(quantization: str) -> None:
    """Refuse quantised weights if bitsandbytes is not installed.

    Args:
        quantization: `8bit` or `4bit`.

    Raises:
        InputError: Saying how to install it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"quantization: {quantization} needs bitsandbytes, which is not installed: {install_command('quantized')}"
        )


def quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    """Return the settings with which transformers quantises a model while loading it.

    Args:
        quantization: `8bit` or `4bit` (NF4, with its scales quantised too).
        dtype: Dtype in which layers of 4 bits compute.
    """
    if quantization == "8bit":
        # It logs at every matrix product that it casts to float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
