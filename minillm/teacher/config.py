"""Settings of the teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from minillm.config import ModelSource, Section
from minillm.errors import InputError


class TeacherConfig(Section):
    source: ModelSource
    """A Hugging Face folder or hub id, a `.gguf` file, or `package:NAME` for a GGUF file inside an installed package."""
    adapter: ModelSource | None = None
    """A PEFT adapter's folder or hub id, which the teacher stage merges into `source`."""
    shard: bool = False
    """Deal its blocks out over all processes of the warm-up and minillm stages (FSDP2), for a teacher that one GPU does not hold.
    Not with teacher mixing, whose rounds differ between processes."""
    servers: list[str] = []
    """`http://host:port` of `vllm serve` processes that hold the teacher: in the minillm stage they score the rollouts, and
    only `source`'s tokenizer and config are read. See `minillm.teacher.served` for what that costs in exactness."""
    top_k: Annotated[int, Field(ge=1, le=19)] = 16
    """The student's likeliest tokens of which a served teacher tells log p, for the single-step term."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Hold it in 8 bits (LLM.int8) or 4 (NF4), by bitsandbytes, where it reads: in warm-up, minillm and evaluation. Its head and
    embeddings stay as they are, and so does the teacher that answers in the responses stage."""

    @model_validator(mode="after")
    def _quantized_here(self) -> TeacherConfig:
        if self.quantization and (self.shard or self.servers):
            what = (
                "shard: bitsandbytes' layers are not dealt out"
                if self.shard
                else "servers: they hold the teacher as they were started"
            )
            raise InputError(f"quantization with {what}; set one of the two")
        return self
