"""The interface of sampling engines: what they return, what they need to start, and what they state about themselves.

This module loads neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from minillm.errors import EngineError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from minillm.data.rollouts import Rollout
    from minillm.data.sampling import Sampling
    from minillm.rollout.config import RolloutConfig
    from minillm.teacher.local import LocalTeacher

    NamedTensors = Iterable[tuple[str, Tensor]]

_EXCLUDING_BIAS = -100.0  # the lowest logit bias that vLLM accepts
SHARED = "it samples the trained weights themselves"
"""What an engine without weights of its own says of them."""
_MAX_BIASED_TOKENS = 1024  # per request, on a GPU: one more crashes vLLM


@dataclass(frozen=True)
class EngineCapabilities:
    """Limits of an engine, in addition to the exact log-probability of every sampled token, which all engines return.

    Attributes:
        max_top_logprobs: How many of the most likely tokens an engine returns at each position, at most.
        mixes_teacher: Whether the engine was started with a teacher, so that it can sample from the mixture
            (`Sampling.teacher_mix`).
        supports_no_repeat_ngram: Whether the engine can block repeated n-grams.
        supports_overlap: Whether the engine can sample while the student trains (`rollout.overlap`), because it holds
            weights of its own and computes in other processes.
    """

    max_top_logprobs: int
    mixes_teacher: bool = False
    supports_no_repeat_ngram: bool = False
    supports_overlap: bool = False

    def check(self, sampling: Sampling) -> None:
        """Refuse sampling settings that the engine would ignore.

        Raises:
            EngineError: A setting is not supported; the message says what to use instead.
        """
        if sampling.no_repeat_ngram and not self.supports_no_repeat_ngram:
            raise EngineError("no_repeat_ngram: vLLM blocks no n-grams; use engine: transformers")
        if sampling.teacher_mix and not self.mixes_teacher:
            raise EngineError("teacher_mix: the engine was started without a teacher to mix in")
        if sampling.teacher_mix and (sampling.top_logprobs or sampling.no_repeat_ngram):
            raise EngineError("teacher_mix: an engine that mixes returns no top_logprobs and blocks no n-grams")
        if sampling.top_logprobs > self.max_top_logprobs:
            raise EngineError(
                f"the engine returns at most {self.max_top_logprobs} top log-probabilities per position; "
                f"{sampling.top_logprobs} were requested"
            )


@dataclass(frozen=True)
class EngineSizing:
    """How much an engine must be able to hold.

    Attributes:
        max_length: Maximum number of tokens of prompt and response together.
        dtype: Dtype of the weights, and of the key-value cache.
        sequences: How many responses are sampled together; the key-value cache should hold all of them at full length.
        memory: Size of vLLM's key-value cache in GiB; None computes it from the other fields.
        new_tokens: Maximum number of tokens of a response, if it is known apart from the prompt.
    """

    max_length: int
    dtype: torch.dtype
    sequences: int = 64
    memory: float | None = None
    new_tokens: int | None = None

    @classmethod
    def from_config(
        cls, config: RolloutConfig, max_length: int, sequences: int = 64, dtype: torch.dtype | None = None
    ) -> EngineSizing:
        """Return the sizing of an engine that is started for `config`.

        Args:
            config: Settings of the rollouts, of which `engine_memory` counts here.
            max_length: Maximum number of tokens of prompt and response together.
            sequences: How many responses are sampled together.
            dtype: Dtype of the model; None uses the dtype that is fast on this machine.
        """
        from minillm.models.device import working_dtype

        return cls(max_length, dtype or working_dtype(), sequences, config.engine_memory)

    @property
    def dtype_name(self) -> str:
        """The dtype as vLLM spells it, such as `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class EngineRequest:
    """What `make_engine` hands to the engine that it creates; each engine reads what it needs.

    Attributes:
        config: Settings of the rollouts.
        folder: Model folder or hub id that the engine loads.
        sizing: How much the engine must be able to hold.
        work: Folder for the engine's own files: weights on their way to servers, and a server's log.
        tokenizer: Folder of the tokenizer, for stop strings; None without one.
        model: The model in training, of which `folder` holds a copy; None when the engine samples another model.
        lora_rank: Rank of the student's LoRA adapter where the adapter alone is sent to the engine, else 0.
        teacher: The teacher that `Sampling.teacher_mix` mixes in; None for an engine that samples the student alone.
    """

    config: RolloutConfig
    folder: str | Path
    sizing: EngineSizing
    work: Path
    tokenizer: str | Path | None = None
    model: PreTrainedModel | None = None
    lora_rank: int = 0
    teacher: LocalTeacher | None = None


@dataclass(frozen=True)
class Unavailable:
    """Why an engine cannot be used.

    Attributes:
        reason: What is missing or not supported.
        remedy: What would help, in addition to choosing another engine; empty where nothing does.
    """

    reason: str
    remedy: str = ""


class Engine(Protocol):
    """Samples from one model, whose weights can be replaced."""

    capabilities: EngineCapabilities
    version: int
    """Version of the current weights, which every rollout carries as `weights_version`."""

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], progress: bool = False
    ) -> list[Rollout]:
        """Sample one response to each prompt.

        Args:
            prompts: Token ids of each prompt.
            sampling: How tokens are sampled, and where a response ends.
            seeds: One seed for each prompt. The same seed, prompt and weights give the same response.
            progress: Whether to show a progress bar.

        Returns:
            One rollout for each prompt, in the same order. With `sampling.teacher_mix`, engines in this process return
            the teacher's targets in it.
        """
        ...

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        """Replace every weight of the student; a teacher that is mixed in stays as it is.

        Args:
            weights: Pairs of name and tensor. The names are those of the model's state dict.
            version: Version of the new weights.
        """
        ...

    def sleep(self) -> None:
        """Release the memory of weights and cache until the next weights arrive, where the engine can."""
        ...

    def close(self) -> None:
        """Stop the engine and release what it holds."""
        ...


@runtime_checkable
class SupportsAdapter(Protocol):
    """An engine that can sample with a LoRA adapter on the base model that it keeps."""

    takes_adapter: bool
    """Whether this engine was started for an adapter; else it takes all weights."""

    def update_adapter(self, folder: str | Path, version: int) -> None:
        """Sample with the adapter in `folder` from now on."""
        ...


@runtime_checkable
class TellsWeights(Protocol):
    """An engine that can say which weights it holds."""

    @property
    def shares_weights(self) -> bool:
        """Whether it samples the trained model itself, so that no weights are sent."""
        ...

    def weights_sum(self) -> WeightsSum:
        """Return the sum over the weights that the engine samples from, read back from where it keeps them."""
        ...


@dataclass(frozen=True)
class WeightsSum:
    """What an engine says of its weights.

    Attributes:
        total: Their sum, as `minillm.models.fingerprint.Fingerprint.total` of the same weights; None if it is unknown.
        why: Why it is unknown, or need not be compared.
    """

    total: str | None
    why: str = ""


@dataclass(frozen=True)
class Push:
    """Weights that were sent to an engine.

    Attributes:
        version: Their version.
        sent: Their sum on the trainer's side; None for an engine that samples the trainer's own weights.
        held: What the engine says that it holds.
    """

    version: int
    sent: str | None
    held: WeightsSum


class RegisteredEngine(Engine, Protocol):
    """An engine that `minillm.rollout.engines.choose` can select by its name.

    Attributes:
        name: Its value of `rollout.engine`.
        only_in_training: Whether the engine samples the student in training and no other model. Other models are then
            sampled as with `rollout.engine: auto`.
    """

    name: ClassVar[str]
    only_in_training: ClassVar[bool]

    @classmethod
    def unavailable(cls, model: Any = None, teacher: Any = None) -> Unavailable | None:
        """Return why the engine cannot sample a model on this machine, or None where it can.

        Args:
            model: The text config of the model, or None where it is not known yet.
            teacher: The text config of the teacher that is mixed in, or None without one.
        """
        ...

    @classmethod
    def create(cls, request: EngineRequest) -> Engine:
        """Start an engine.

        Raises:
            EngineError: The engine cannot be started.
        """
        ...


def padding_bias(vocab_size: int, width: int, *, limited: bool = True) -> dict[int, float] | None:
    """Return the logit biases that keep vLLM from sampling the rows of a head beyond the vocabulary.

    vLLM's list of allowed tokens would exclude those rows exactly, but on a GPU it has room for 1,024 tokens only.

    Args:
        vocab_size: Number of tokens in the vocabulary.
        width: Number of rows of the model's head.
        limited: Whether vLLM runs on a GPU, or may do so, where the number of biases is limited.

    Returns:
        Token ids with their biases, or None where the head has no such rows.

    Raises:
        EngineError: The head has more such rows than vLLM accepts biases.
    """
    if limited and width - vocab_size > _MAX_BIASED_TOKENS:
        raise EngineError(
            f"the model's head has {width - vocab_size:,} rows beyond the tokenizer's {vocab_size:,} tokens, of which "
            f"vLLM leaves out {_MAX_BIASED_TOKENS:,} at most; use the tokenizer that belongs to the model, cut the "
            "head (model.resize_token_embeddings(len(tokenizer))), or use rollout.engine: transformers"
        )
    return dict.fromkeys(range(vocab_size, width), _EXCLUDING_BIAS) or None
