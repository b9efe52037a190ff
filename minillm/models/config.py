"""Settings of the student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from minillm.config import ModelSource, Positive, Section
from minillm.errors import InputError


class AdapterConfig(Section):
    """A LoRA adapter. It has no dropout: the student that is scored is the one that sampled."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    """The adapter is scaled by alpha/rank, or alpha/√rank with `rslora`."""
    rslora: bool = False
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the layers that get one; `all-linear` is every linear layer but the head."""
    quantization: Literal["4bit"] | None = None
    """QLoRA: the frozen base in 4 bits (NF4), by bitsandbytes. What is sampled and saved is what it stands for, with the adapter merged."""

    @model_validator(mode="after")
    def _not_on_the_head(self) -> AdapterConfig:
        if heads := sorted({"lm_head", "embed_out"} & set(self.targets)):
            raise InputError(f"targets: {', '.join(heads)}: an adapter on the output head is not scored; leave it out")
        return self


class StudentConfig(Section):
    source: ModelSource = "prune"
    """`prune`: the teacher with fewer layers; otherwise a folder or hub id."""
    keep_layers: Positive | None = None
    """Layers that stay when pruning."""
    probe_prompts: Positive = 64
    """Training prompts on which the similarity of each block's input and output is measured."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the student is saved in at the end; `auto` is what its teacher is saved in. Masters are float32 while it trains, and so are
    folders that a later stage goes on from."""
    lora: AdapterConfig | None = None
    """Every stage that trains the student trains an adapter of its own and leaves the student with it merged, the adapter itself
    beside it in `adapter`."""
