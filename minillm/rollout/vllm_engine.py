"""vLLM inside the training process, on a GPU or on the CPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.rollout.engine import EngineError, NamedTensors, Rollout, Sampling

GIB = 1 << 30
# On the CPU vLLM's blocks are 128 tokens by default; a resumed draft would prefill up to 127 of them again.
_CPU_BLOCK = 32
# The card is shared with the trained model, its optimiser and the teacher.
_GPU_SHARE = 0.3


def vllm_is_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


class VLLMEngine:
    """One vLLM engine in this process.

    Args:
        folder: a Hugging Face model folder or hub id; later weights come by `update_weights`.
        max_length: prompt and response together.
        memory: GiB of key-value cache; by default 1 on the CPU, and on a GPU what 30 % of the card leaves beside the weights.
    """

    def __init__(
        self, folder: str | Path, *, max_length: int, memory: float | None = None, max_sequences: int = 64,
        dtype: torch.dtype = torch.bfloat16, version: int = 0,
    ) -> None:  # fmt: skip
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        set_threads = torch.set_num_threads  # vLLM's CPU worker replaces it by a no-op in the whole process
        from vllm import LLM

        cpu = not torch.cuda.is_available()
        settings: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
        if cpu:
            settings |= {"block_size": _CPU_BLOCK, "enforce_eager": True, "kv_cache_memory_bytes": int((memory or 1) * GIB)}
            # A seeded request whose prompt is prefilled in parts fails on the CPU: it has no generator offset to rewind.
            settings |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, max_length)}
        elif memory is not None:
            settings |= {"kv_cache_memory_bytes": int(memory * GIB)}
        else:
            settings |= {"gpu_memory_utilization": _GPU_SHARE}
        if torch.distributed.is_initialized():
            # Every training process has its own engine; without this vLLM would build one over all of them.
            settings["distributed_executor_backend"] = "external_launcher"
        self._llm = LLM(
            str(folder), max_model_len=max_length, max_num_seqs=max_sequences,
            logprobs_mode="processed_logprobs", skip_tokenizer_init=True, enable_prefix_caching=True, seed=0, **settings,
        )  # fmt: skip
        torch.set_num_threads = set_threads
        self._width = self._llm.model_config.get_vocab_size()
        self.version = version

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], progress: bool = False) -> list[Rollout]:
        from vllm import SamplingParams

        allowed = self._allowed(sampling)
        params = [
            SamplingParams(
                temperature=sampling.temperature, max_tokens=sampling.max_new_tokens, seed=seed, logprobs=sampling.likeliest,
                stop_token_ids=list(sampling.eos_ids), ignore_eos=True, detokenize=False, allowed_token_ids=allowed,
            )
            for seed in seeds
        ]  # fmt: skip
        rollouts = []
        for prompt, completion in zip(prompts, self._run(prompts, params, progress), strict=True):
            ids = list(completion.token_ids)
            logprobs = torch.tensor([step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True)])
            rollout = Rollout(prompt, ids, logprobs, logprobs, self.version, ids[-1] in sampling.eos_ids)
            if sampling.likeliest:
                rollout.likeliest = [{token: entry.logprob for token, entry in step.items()} for step in completion.logprobs]
            rollouts.append(rollout)
        return rollouts

    def logprobs_of(self, prefixes: Sequence[list[int]], ids: Sequence[list[int]], sampling: Sampling) -> list[Tensor]:
        from vllm import SamplingParams

        allowed = self._allowed(sampling)
        params = [
            SamplingParams(
                temperature=sampling.temperature, max_tokens=1, logprob_token_ids=some, detokenize=False,
                allowed_token_ids=allowed,
            )
            for some in ids
        ]  # fmt: skip
        outputs = self._run(prefixes, params, False)
        return [
            torch.tensor([completion.logprobs[0][token].logprob for token in some]) for completion, some in zip(outputs, ids, strict=True)
        ]

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights)})
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM's prefix cache could not be dropped: keys and values of the weights before would be used")
        self.version = version

    def close(self) -> None:
        if hasattr(self, "_llm"):
            self._llm.llm_engine.engine_core.shutdown()
            del self._llm

    def _allowed(self, sampling: Sampling) -> list[int] | None:
        """The ids below `vocab_size`, where the model's head is padded beyond it."""
        return list(range(sampling.vocab_size)) if sampling.vocab_size < self._width else None

    def _run(self, prompts: Sequence[list[int]], params: list[Any], progress: bool) -> list[Any]:
        requests: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return [request.outputs[0] for request in self._llm.generate(requests, params, use_tqdm=progress)]
