"""Weights in 8 or 4 bits."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch

from minillm.errors import InputError


def is_quantized(model: Any) -> bool:
    """Whether some layers are held in 8 or 4 bits (bitsandbytes)."""
    return any(layer_is_quantized(module) for module in model.modules())


def layer_is_quantized(module: Any) -> bool:
    return type(module._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params")


def check_quantization(quantization: str) -> None:
    """Refuse `8bit` or `4bit` weights where bitsandbytes is not installed.

    Raises:
        ValueError: saying how to install it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"quantization: {quantization} needs bitsandbytes, which is not installed: pip install 'minillm[quantized]'"
        )


def quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(
            logging.ERROR
        )  # a line at every product, that it casts to float16
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
