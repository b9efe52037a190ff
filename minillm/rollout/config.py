"""Settings of the rollouts: the `rollout` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from minillm.config import Positive, Section, Share
from minillm.errors import InputError

# Arguments of `vllm.LLM` that follow from the recipe, so that `engine_options` must not set them.
RESERVED_ENGINE_OPTIONS = frozenset(
    {
        "model",
        "tokenizer",
        "skip_tokenizer_init",
        "dtype",
        "seed",
        "max_model_len",
        "logprobs_mode",
        "enable_prefix_caching",
        "enable_lora",
        "max_loras",
        "max_lora_rank",
        "kv_cache_memory_bytes",
        "gpu_memory_utilization",
        "distributed_executor_backend",
        "enable_sleep_mode",
        "block_size",
        "enable_chunked_prefill",
    }
)
_FILTERS = ("top_p", "top_k", "min_p", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size")


class RolloutConfig(Section):
    """How the student's responses are sampled."""

    engine: Literal["auto", "vllm", "transformers", "server"] = "auto"
    """Which engine samples the responses. `auto` uses vLLM in the training process where it is installed and can run
    the model, and otherwise falls back to transformers with a warning. `vllm` and `transformers` use that engine or
    fail. `server` uses the vLLM servers in `servers`. They sample the student in training; the stages that sample
    another model, such as `responses` and `evaluate`, choose an engine as with `auto`."""
    servers: list[str] | Literal["auto"] = []
    """Addresses (`http://host:port`) of running `vllm serve` processes, for `engine: server`. The module
    `minillm.rollout.engines.server` says how to start them. With `auto`, process 0 starts one server on this machine,
    which all training processes share and which stops at the end of training. (With `engine: vllm` every training
    process has an engine of its own.) A run on several machines needs addresses that all of them reach, and servers
    that read its `run_dir` at the same path."""
    server_patience: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for which requests to an unreachable or failing server are retried. After that the run saves a checkpoint
    and stops."""
    server_timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that a server may take for one request: to sample or score one response, or to load new weights. Increase
    it for long responses or slow servers."""
    mismatch_limit: Annotated[float, Field(gt=0)] = 1.0
    """Nats per token. An update is refused (`on_fault`) where log q of the sampled tokens differs by more, on average,
    between the engine and the trainer, which hold the same weights: the engine then samples from another model. Engines
    that compute in bfloat16 differ by some hundredths; from 0.3 on a warning is logged."""
    overlap: bool = False
    """Sample the next batch of rollouts while the student trains on the current one. The next batch is then sampled
    with the weights from before the current batch, so training is one batch off-policy. Requires `engine: server`,
    `objective.old_logprobs: engine`, and `objective.importance: none` or `token`."""
    num_rollouts: Positive = 32
    """Responses per batch of rollouts, over all processes. The engine receives new weights before each batch. Must be a
    multiple of `samples_per_prompt` and of the responses of one weight update (`training.responses_per_update`, or else
    `per_device_train_batch_size` × `gradient_accumulation_steps` × number of processes). The batch holds the same
    prompts and responses on any number of processes. Which of them share an update is the same too if one update takes
    the whole batch; otherwise each process mixes those that it sampled."""
    samples_per_prompt: Positive = 1
    """Responses to each prompt of a batch. A batch holds `num_rollouts` / `samples_per_prompt` different prompts."""
    inner_epochs: Positive = 2
    """Passes over each batch of rollouts (`ppo_epochs` in LMOps)."""
    on_policy: Share = 1.0
    """Share of each batch that the student samples; the rest are given responses from the data (λ in GKD). Values below
    1 are only possible without the long-term term of the objective, because that term is an expectation over the
    student's own samples."""
    replay: Share = 0.0
    """Share of the student's responses in each batch that are taken again from earlier batches instead of being sampled
    (the replay buffer of DistiLLM)."""
    replay_size: Positive = 1000
    """Responses that the replay buffer holds, over all processes. The oldest are dropped first."""
    teacher_mix: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    """Mixing coefficient α of teacher-mixed sampling: tokens are sampled from (1−α)·q + α·p, where q is the student and
    p is the teacher (section 2.2 of the paper). The engine then holds the teacher beside the student. With 0, tokens
    are sampled from the student alone."""
    max_new_tokens: Positive = 128
    """Maximum number of tokens in a response. A longer response is cut there and counts as unfinished."""
    max_prompt_tokens: Positive = 256
    """Maximum number of tokens in a prompt; the trainer refuses a longer one. In a recipe, set `data.max_prompt_tokens`
    instead, which applies to every stage."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the student and of the teacher. The logits of both are divided by it, in sampling and in the
    loss."""
    stop: list[str] = []
    """Strings that end a response. A response ends with the token that completes the first of them to appear in its
    text, and that token belongs to the response."""
    lora: Literal["merged", "adapter"] = "merged"
    """How the weights of a LoRA student reach the engine. `merged` sends all weights, with the adapter merged into the
    base model. `adapter` sends the adapter alone to vLLM in the training process, which keeps the base model: less is
    sent, and the engine rounds as the trainer does. vLLM mixes no teacher with it: set `teacher_mix: 0` as well."""
    engine_memory: Annotated[float, Field(gt=0)] | None = None
    """Size of vLLM's key-value cache in GiB. By default the cache holds all rollouts of a batch at full length, as far
    as the memory allows."""
    engine_options: dict[str, Any] = {}
    """Further arguments of `vllm.LLM`, for vLLM in the training process. For example, `{enforce_eager: true}` makes it
    start sooner and sample more slowly."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_filters(cls, given: Any) -> Any:
        for key in _FILTERS:
            if isinstance(given, dict) and key in given:
                raise InputError(
                    f"{key}: importance weights need every token that the student can sample, and the loss needs the "
                    "very distribution that tokens are sampled from; a filter removes tokens from sampling but not "
                    "from the loss. Use temperature instead"
                )
        return given

    @model_validator(mode="before")
    @classmethod
    def _refuse_drafts(cls, given: Any) -> Any:
        if isinstance(given, dict) and "draft_tokens" in given:
            raise InputError(
                "draft_tokens: tokens of the mixture are sampled one by one now, without drafts: leave it out"
            )
        return given

    @model_validator(mode="after")
    def _check_batch_size(self) -> RolloutConfig:
        if self.num_rollouts % self.samples_per_prompt:
            raise InputError(
                f"num_rollouts ({self.num_rollouts}) must be a multiple of samples_per_prompt "
                f"({self.samples_per_prompt})"
            )
        return self

    @model_validator(mode="after")
    def _check_servers(self) -> RolloutConfig:
        if (self.engine == "server") != bool(self.servers):
            raise InputError(
                "engine: server needs servers (http://host:port, one or several), and servers need engine: server"
            )
        return self

    @model_validator(mode="after")
    def _check_one_gpu(self) -> RolloutConfig:
        if "tensor_parallel_size" in self.engine_options or "pipeline_parallel_size" in self.engine_options:
            raise InputError(
                "engine_options: an engine in the training process has one GPU; start vllm serve "
                "--tensor-parallel-size N and set engine: server"
            )
        return self

    @model_validator(mode="after")
    def _check_engine_options(self) -> RolloutConfig:
        if reserved := sorted(set(self.engine_options) & RESERVED_ENGINE_OPTIONS):
            raise InputError(
                f"engine_options: {', '.join(reserved)} follows from the recipe, because exact log-probabilities and "
                "memory depend on it; leave it out"
            )
        if self.engine_options and self.engine in ("server", "transformers"):
            raise InputError(
                f"engine_options are of vLLM in the training process, not of engine: {self.engine}; leave them out"
            )
        return self

    @model_validator(mode="after")
    def _check_speculation(self) -> RolloutConfig:
        if self.teacher_mix and "speculative_config" in self.engine_options:
            raise InputError(
                "engine_options: speculative_config with teacher_mix: vLLM accepts or rejects drafts by the student's "
                "distribution alone, not by the mixture: leave it out, or set teacher_mix: 0"
            )
        return self

    @model_validator(mode="after")
    def _check_lora(self) -> RolloutConfig:
        if self.lora == "adapter" and self.engine == "server":
            raise InputError(
                "lora: adapter is for vLLM in the training process; servers take merged weights: set lora: merged"
            )
        if self.lora == "adapter" and self.teacher_mix and self.engine != "transformers":
            default = "" if "teacher_mix" in self.model_fields_set else ", the default"
            raise InputError(
                f"lora: adapter with teacher_mix: {self.teacher_mix:g}{default}: vLLM mixes a teacher with a student "
                "of merged weights only: set lora: merged, or teacher_mix: 0"
            )
        return self
