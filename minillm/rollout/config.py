"""Settings of the rollouts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from minillm.config import Positive, Section, Share
from minillm.errors import InputError

# Arguments of vllm.LLM that are not the user's.
RESERVED_ENGINE_OPTIONS = {
    "model", "tokenizer", "skip_tokenizer_init", "dtype", "seed", "max_model_len", "logprobs_mode", "enable_prefix_caching", "enable_lora",
    "max_loras", "max_lora_rank", "kv_cache_memory_bytes", "gpu_memory_utilization", "distributed_executor_backend", "enable_sleep_mode",
    "block_size", "enable_chunked_prefill",
}  # fmt: skip


class RolloutConfig(Section):
    """How the student's responses are drawn."""

    engine: Literal["auto", "vllm", "transformers", "server"] = "auto"
    """`auto`: vLLM where it is installed, else transformers, saying so; `vllm` and `transformers` insist; `server`: the
    `servers`, for the student's rollouts."""
    servers: list[str] | Literal["auto"] = []
    """`http://host:port` of running `vllm serve` processes; see `minillm.rollout.engines.server` for how to start them. `auto`:
    process 0 starts one on this machine, which all training processes share (with `engine: vllm` each has its own)."""
    server_patience: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for which a server that is gone is tried again, before the run stops with a checkpoint."""
    server_timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that one answer of a server may take: longer where responses are long and the server slow."""
    overlap: bool = False
    """Draw the next batch of rollouts while this one trains, with the weights before it: one batch off policy."""
    num_rollouts: Positive = 32
    """Responses drawn, over all processes, between two weight updates of the engine."""
    samples_per_prompt: Positive = 1
    """Responses of each prompt in a batch; `num_rollouts` counts responses."""
    inner_epochs: Positive = 2
    """Passes over each batch of rollouts (`ppo_epochs` in the authors' code)."""
    on_policy: Share = 1.0
    """Share of each batch that is drawn from the student; the rest are the given responses (GKD's λ). Below 1 only without a
    long-term term, which counts on the student's own samples."""
    replay: Share = 0.0
    """Of what is drawn from the student, the share that comes from earlier batches again (DistiLLM)."""
    replay_size: Positive = 1000
    """Responses that are kept for that, over all processes; the oldest go first."""
    teacher_mix: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    """α: tokens are drawn from (1−α)·q + α·p (paper section 2.2)."""
    max_new_tokens: Positive = 128
    max_prompt_tokens: Positive = 256
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits of student and teacher, in sampling and in the loss alike."""
    draft_tokens: Positive | Literal["auto"] = "auto"
    """Student tokens drafted before the teacher checks them (teacher-mixed sampling); `auto`: for each batch of rollouts what
    the acceptance of the batch before makes best."""
    stop: list[str] = []
    """Strings of which the first to appear in a response's text ends it; the token that completes it belongs to it."""
    lora: Literal["merged", "adapter"] = "merged"
    """How a LoRA student reaches the engine: merged into its base, whole; or `adapter`: alone, to vLLM in this process, which keeps
    the base. That sends little, and rounds as the trainer does."""
    engine_memory: Annotated[float, Field(gt=0)] | None = None
    """vLLM's key-value cache in GiB; by default what the rollouts of a batch need at full length, as far as there is room."""
    engine_options: dict[str, Any] = {}
    """Further arguments of `vllm.LLM` in this process, as {enforce_eager: true} to start sooner and draw more slowly."""

    @model_validator(mode="before")
    @classmethod
    def _filters(cls, given: Any) -> Any:
        for key in ("top_p", "top_k", "min_p", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size"):
            if isinstance(given, dict) and key in given:
                raise InputError(
                    f"{key}: importance weights need every token that the student can draw, and the loss the very distribution "
                    "that draws; a filter takes tokens away from one and not from the other. Use temperature"
                )
        return given

    @model_validator(mode="after")
    def _servers(self) -> RolloutConfig:
        if self.num_rollouts % self.samples_per_prompt:
            raise InputError(
                f"num_rollouts ({self.num_rollouts}) must be a multiple of samples_per_prompt ({self.samples_per_prompt})"
            )
        if (self.engine == "server") != bool(self.servers):
            raise InputError(
                "engine: server needs servers (http://host:port, one or several), and servers need engine: server"
            )
        if "tensor_parallel_size" in self.engine_options or "pipeline_parallel_size" in self.engine_options:
            raise InputError(
                "engine_options: an engine in the training process has one GPU; start vllm serve --tensor-parallel-size N and set "
                "engine: server"
            )
        if taken := sorted(set(self.engine_options) & RESERVED_ENGINE_OPTIONS):
            raise InputError(
                f"engine_options: {', '.join(taken)} follows from the recipe; exactness and memory depend on it"
            )
        if self.engine_options and self.engine in ("server", "transformers"):
            raise InputError(f"engine_options are of vLLM in the training process, not of engine: {self.engine}")
        if self.lora == "adapter" and self.engine == "server":
            raise InputError(
                "lora: adapter is for vLLM in the training process; servers take merged weights: set lora: merged"
            )
        return self
