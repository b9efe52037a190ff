"""vLLM inside the training process, on a GPU or on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.errors import EngineError
from minillm.rollout.engines.base import EngineCapabilities, NamedTensors, padding_bias
from minillm.rollout.engines.vllm_memory import (
    CPU_BLOCK,
    engine_limits,
    memory_settings,
)

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM keeps room for


def _sleep_beside_others(worker: Any) -> None:
    """On a card that other processes share, what they take while this one falls asleep is counted as its own, and vLLM gives up; it
    sleeps by then, and all is well.
    """
    sleep = worker.sleep

    def forgiving(*args: Any, **kwargs: Any) -> None:
        try:
            sleep(*args, **kwargs)
        except AssertionError as error:
            if "increased after sleeping" not in str(error):
                raise

    worker.sleep = forgiving


@contextmanager
def _process_group_kept() -> Iterator[None]:
    """vLLM, closed, destroys every process group, and the trainers' is not its own: the stages after would wait for ever."""
    destroy = torch.distributed.destroy_process_group
    own = torch.distributed.group.WORLD

    def destroy_others(group: Any = None) -> None:
        if group is not None and group is not own:
            destroy(group)

    torch.distributed.destroy_process_group = destroy_others
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


class _Tables(Sequence[dict[int, float]]):
    """Log-probabilities of the likeliest tokens of each place, out of vLLM's flat lists: a dictionary only where one is looked at."""

    def __init__(self, flat: Any) -> None:
        self._flat, self._ends = flat, list(zip(flat.start_indices, flat.end_indices, strict=True))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            cut = copy(self)
            cut._ends = self._ends[place]
            return cut
        start, end = self._ends[place]
        return dict(zip(self._flat.token_ids[start:end], self._flat.logprobs[start:end], strict=True))


class VLLMEngine:
    """One vLLM engine in this process.

    Args:
        folder: a Hugging Face model folder or hub id; later weights come by `update_weights`.
        max_length: prompt and response together.
        sequences: rollouts in a batch, whose keys and values should all find room (a draft goes on where the one before
            ended); see `memory_settings`.
        memory: GiB of key-value cache instead.
        tokenizer: folder of the tokenizer, for stop strings to end a response early; without it they cut it afterwards.
        options: further arguments of `vllm.LLM`.
        lora_rank: the model in `folder` stays as it is, and what is sampled is it with the adapter of `update_adapter`.

    On a GPU `rest` gives back weights and cache until new weights come (vLLM's sleep).
    """

    capabilities = EngineCapabilities(max_top_logprobs=20, max_logprobs_by_id=128)  # vLLM's own bounds
    takes_adapter = False
    _adapter: Any = None
    _guest = False  # in a process that trains with others

    def __init__(
        self, folder: str | Path, *, max_length: int, sequences: int = 64, memory: float | None = None,
        dtype: torch.dtype = torch.bfloat16, version: int = 0, tokenizer: str | Path | None = None, lora_rank: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if lora_rank > _LORA_RANKS[-1]:
            raise EngineError(
                f"rollout.lora: adapter: vLLM takes ranks up to {_LORA_RANKS[-1]}, not {lora_rank}; use merged"
            )
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        set_threads = torch.set_num_threads  # vLLM's CPU worker replaces it by a no-op in the whole process
        from vllm import LLM

        cpu = not torch.cuda.is_available()
        settings: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
        settings |= memory_settings(folder, max_length=max_length, sequences=sequences, dtype=dtype, memory=memory)
        if cpu:
            settings |= {"block_size": CPU_BLOCK, "enforce_eager": True}
            # A seeded request whose prompt is prefilled in parts fails on the CPU: it has no generator offset to rewind.
            settings |= {"enable_chunked_prefill": False}
        else:
            settings |= {"enable_sleep_mode": True}
        if lora_rank:
            settings |= {
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": next(r for r in _LORA_RANKS if r >= lora_rank),
            }
        self._guest = torch.distributed.is_initialized()
        if self._guest:
            # Every training process has its own engine; without this vLLM would build one over all of them.
            settings["distributed_executor_backend"] = "external_launcher"
        settings |= engine_limits(max_length, sequences) | dict(options or {})
        self._llm = LLM(
            str(folder), max_model_len=max_length,
            logprobs_mode="processed_logprobs", tokenizer=None if tokenizer is None else str(tokenizer),
            skip_tokenizer_init=tokenizer is None, enable_prefix_caching=True, seed=0, **settings,
        )  # fmt: skip
        torch.set_num_threads = set_threads
        if not cpu:
            self._llm.collective_rpc(_sleep_beside_others)
        self._sleeps, self._asleep, self._decodes = not cpu, False, tokenizer is not None
        self._width = self._llm.model_config.get_vocab_size()
        self.takes_adapter = lora_rank > 0
        self.version = version

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], progress: bool = False
    ) -> list[Rollout]:
        from vllm import SamplingParams

        self.capabilities.check(sampling)
        bias = self._padding(sampling)
        text: dict[str, Any] = {"detokenize": False}
        if sampling.stop is not None and self._decodes:
            text = {
                "stop": list(sampling.stop.strings),
                "include_stop_str_in_output": True,
                "skip_special_tokens": True,
            }
        params = [
            SamplingParams(
                temperature=sampling.temperature, max_tokens=sampling.max_new_tokens, seed=seed, logprobs=sampling.top_logprobs,
                stop_token_ids=list(sampling.eos_ids), ignore_eos=True, logit_bias=bias, flat_logprobs=True, **text,
            )
            for seed in seeds
        ]  # fmt: skip
        rollouts = []
        for prompt, completion in zip(prompts, self._run(prompts, params, progress), strict=True):
            ids = list(completion.token_ids)
            flat = completion.logprobs
            logprobs = [
                flat.logprobs[start] for start in flat.start_indices
            ]  # of each place the drawn token comes first
            tables = _Tables(flat) if sampling.top_logprobs else None
            stopped = completion.finish_reason == "stop"
            rollouts.append(
                Rollout.drawn(prompt, ids, logprobs, sampling, self.version, stopped=stopped, top_logprobs=tables)
            )
        return rollouts

    def logprobs_of(self, prefixes: Sequence[list[int]], ids: Sequence[list[int]], sampling: Sampling) -> list[Tensor]:
        from vllm import SamplingParams

        bias = self._padding(sampling)
        params = [
            SamplingParams(
                temperature=sampling.temperature, max_tokens=1, logprob_token_ids=some, detokenize=False,
                logit_bias=bias,
            )
            for some in ids
        ]  # fmt: skip
        outputs = self._run(prefixes, params, False)
        return [
            torch.tensor([completion.logprobs[0][token].logprob for token in some])
            for completion, some in zip(outputs, ids, strict=True)
        ]

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # the update's memory is what it wakes into
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise EngineError(
                "vLLM's prefix cache could not be dropped: keys and values of the weights before would be used"
            )
        self.version = version

    def update_adapter(self, folder: str | Path, version: int) -> None:
        """Sample with the LoRA adapter in a folder, which must stay there until the next one comes."""
        from vllm.lora.request import LoRARequest

        if self._asleep:
            torch.cuda.empty_cache()
            self._llm.wake_up()
            self._asleep = False
        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
        number = 1 if self._adapter is None else self._adapter.lora_int_id + 1  # keys and values are cached by adapter
        self._adapter = LoRARequest(f"student-{number}", number, str(folder))
        self._llm.llm_engine.add_lora(self._adapter)
        self.version = version

    def sleep(self) -> None:
        if self._sleeps and not self._asleep:
            # Weights that are replaced before the next draw need not be kept; under an adapter they stay.
            self._llm.sleep(level=1 if self.takes_adapter else 2)
            self._asleep = True

    def close(self) -> None:
        if hasattr(self, "_llm"):
            with _process_group_kept() if self._guest else nullcontext():
                self._llm.llm_engine.engine_core.shutdown()
            del self._llm

    def _padding(self, sampling: Sampling) -> dict[int, float] | None:
        return padding_bias(sampling.vocab_size, self._width, limited=torch.cuda.is_available())

    def _run(self, prompts: Sequence[list[int]], params: list[Any], progress: bool) -> list[Any]:
        requests: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return [
            request.outputs[0]
            for request in self._llm.generate(requests, params, use_tqdm=progress, lora_request=self._adapter)
        ]
