"""Settings of the teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from minillm.config import ModelSource, Section
from minillm.errors import InputError

START_COMMAND = """vllm serve TEACHER --runner pooling --pooler-config '{"task": "token_embed"}'"""
"""How a server is started that returns the teacher's states, from which every score is exact."""


class TeacherConfig(Section):
    """Which model the teacher is, and how it is loaded."""

    source: ModelSource
    """A Hugging Face folder or hub id, a `.gguf` file, or `package:NAME` for a GGUF file inside an installed
    package."""
    adapter: ModelSource | None = None
    """Folder or hub id of a PEFT adapter, which the teacher stage merges into `source`."""
    shard: bool = False
    """Shard the teacher's decoder layers over all processes of the warm-up and minillm stages (FSDP2), for a teacher
    that does not fit on one GPU. It excludes teacher mixing, for which every process needs the whole teacher."""
    servers: list[str] = []
    """`http://host:port` of processes that hold the teacher: `vllm serve TEACHER --runner pooling --pooler-config
    '{"task": "token_embed"}'`. In the warm-up and minillm stages they return its final hidden states, and only the
    tokenizer, the config and the output head of `source` are read; every score is that of a teacher in this process.
    Servers that were started to generate return log-probabilities of a few tokens: then the minillm stage estimates
    KL(q‖p), as `minillm.teacher.served_logprobs` describes, and the warm-up loads `source`."""
    top_k: Annotated[int, Field(ge=1, le=19)] = 16
    """Of how many of the student's most likely tokens servers that were started to generate return log p."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Load the teacher in 8 bits (LLM.int8) or 4 bits (NF4) with bitsandbytes where it scores: in warm-up, minillm and
    evaluation. Its head and embeddings keep their dtype, and so does the teacher that answers in the responses
    stage."""

    @model_validator(mode="after")
    def _check_quantization(self) -> TeacherConfig:
        if self.quantization and (self.shard or self.servers):
            what = (
                "shard: bitsandbytes layers cannot be sharded"
                if self.shard
                else "servers: they hold the teacher as they were started"
            )
            raise InputError(f"quantization with {what}; set one of the two")
        return self
