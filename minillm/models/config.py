"""Recipe sections for the student."""

from __future__ import annotations

from typing import Annotated, Literal

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
    """`prune` removes layers of the teacher. Otherwise a folder or hub id."""
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
