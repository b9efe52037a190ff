"""Recipe sections for the student."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from minillm.config import ModelSource, Positive, Section
from minillm.errors import InputError


class AdapterConfig(Section):
    """A LoRA adapter. It has no dropout, because the student that is scored must be the student that sampled."""

    rank: Positive = 16
    """r: the adapter of a layer has rank r."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The adapter is scaled by alpha/rank, or by alpha/√rank with `rslora`."""
    rslora: bool = False
    """Scale the adapter by alpha/√rank (rank-stabilised LoRA)."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the layers that get an adapter. `all-linear` means every linear layer except the output head."""
    quantization: Literal["4bit"] | None = None
    """QLoRA: the frozen base has 4-bit weights (NF4, by bitsandbytes). The student that samples and is saved has these
    weights as ordinary numbers, with the adapter merged."""

    @model_validator(mode="after")
    def _check_targets(self) -> AdapterConfig:
        if heads := sorted({"lm_head", "embed_out"} & set(self.targets)):
            raise InputError(f"targets: {', '.join(heads)}: an adapter on the output head is not scored; leave it out")
        return self


class StudentConfig(Section):
    """The student, and how it is made from the teacher if it is."""

    source: ModelSource = "prune"
    """`prune` removes layers of the teacher. `config` makes a model with random weights, for the pretrain stage.
    Otherwise a folder or hub id."""
    like: ModelSource | None = None
    """For `source: config`, a folder or hub id of a model of the same class, of which only the config is read. By
    default the teacher."""
    shape: dict[str, Any] = {}
    """For `source: config`, what differs from the config of `like`, by the names of its class: `hidden_size`,
    `intermediate_size`, `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`, … The vocabulary is the
    teacher's."""
    allow_pickle: bool = False
    """Read weights of `source` that are no safetensors; see the teacher's."""
    keep_layers: Positive | None = None
    """Number of layers that pruning keeps."""
    probe_prompts: Positive = 64
    """Number of training prompts on which the similarity of each block's input and output is measured, for pruning."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype in which the final student is saved. `auto` is the dtype in which its teacher is saved. While it trains the
    weights are float32, and so are the folders from which a later stage continues."""
    lora: AdapterConfig | None = None
    """Every stage that trains the student trains a new adapter. It saves the student with the adapter merged, and the
    adapter by itself in the folder `adapter`."""

    @model_validator(mode="after")
    def _check_source(self) -> StudentConfig:
        if self.source == "prune" and (self.like is not None or self.shape):
            raise InputError("like and shape describe a student with random weights: set source: config")
        if self.source == "config" and self.lora is not None:
            raise InputError(
                "lora with source: config: an adapter on random weights learns little; leave one of them out"
            )
        return self

    @property
    def is_made(self) -> bool:
        """Whether the student stage makes the student."""
        return self.source in ("prune", "config")

    def model_like(self, teacher: str) -> str:
        """The model whose class and tokenizer the student has: its own source, or what it is made from.

        Args:
            teacher: The teacher's source.
        """
        if self.source == "config":
            return self.like or teacher
        return teacher if self.source == "prune" else self.source
