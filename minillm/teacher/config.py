"""Settings of the teacher, or of several teachers by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from minillm.config import ModelSource, Section
from minillm.errors import InputError

START_COMMAND = """vllm serve TEACHER --runner pooling --pooler-config '{"task": "token_embed"}'"""
"""How a server is started that returns the teacher's states, from which every score is exact."""


class TeacherConfig(Section):
    """Which model the teacher is, and how it is loaded. For several teachers see `TeachersConfig`."""

    source: ModelSource
    """A Hugging Face folder or hub id, a `.gguf` file, or `package:NAME` for a GGUF file inside an installed
    package."""
    adapter: ModelSource | None = None
    """Folder or hub id of a PEFT adapter, which the teacher stage merges into `source`."""
    allow_pickle: bool = False
    """Read weights that are no safetensors (`pytorch_model.bin`). A pickle is a program; PyTorch reads it with a
    restricted reader."""
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

    @model_validator(mode="before")
    @classmethod
    def _refuse_names(cls, given: Any) -> Any:
        """Explain a mixture of the two forms, which an override or `extends` can make."""
        if isinstance(given, dict):
            names = [name for name, value in given.items() if name not in cls.model_fields and _is_section(value)]
            beside = [name for name in given if name in cls.model_fields]
            if names and beside:
                raise InputError(
                    f"{', '.join(names)} beside {', '.join(beside)}: a section of several teachers holds names alone, "
                    "{name: {source: …}}; leave out one of the two"
                )
        return given

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

    @property
    def by_name(self) -> dict[str, TeacherConfig]:
        """The teacher under the empty name, so that code for several teachers reads this section too."""
        return {"": self}

    @property
    def first(self) -> TeacherConfig:
        """The teacher itself."""
        return self

    @property
    def several(self) -> bool:
        """Whether rows of the data name their teacher."""
        return False


class TeachersConfig(Section):
    """Several teachers by name, `{math: {source: …}, chat: {source: …}}`, each with the settings of `TeacherConfig`.

    Every row of the data names its teacher in the column `teacher` (`columns: {teacher: domain}` reads another one),
    and its tokens are scored by that teacher alone. All teachers have the student's tokenizer.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, TeacherConfig]  # pyright: ignore[reportIncompatibleVariableOverride]

    @model_validator(mode="after")
    def _check_teachers(self) -> TeachersConfig:
        for name, teacher in self.by_name.items():
            if not re.fullmatch(r"[\w-]+", name):
                raise InputError(f"{name!r}: the name of a teacher consists of letters, digits, _ and -")
            if teacher.adapter is not None:
                raise InputError(
                    f"{name}.adapter with several teachers: merge it beforehand (the teacher stage of a run with this "
                    "teacher alone leaves the folder teacher/), and name that folder as source"
                )
            if teacher.shard:
                raise InputError(
                    f"{name}.shard with several teachers: processes would ask each of them unequally often: leave it "
                    "out, or serve the teacher (servers)"
                )
        return self

    @property
    def by_name(self) -> dict[str, TeacherConfig]:
        """The teachers by name, in the order of the recipe."""
        return self.__pydantic_extra__

    @property
    def first(self) -> TeacherConfig:
        """The first teacher.

        Its tokenizer has the chat template and the end tokens of the run, a pruned student is made from it, and
        `student.dtype: auto` is its dtype.
        """
        return next(iter(self.by_name.values()))

    @property
    def several(self) -> bool:
        """Whether rows of the data name their teacher."""
        return True


_ONE, _SEVERAL = "one teacher", "several teachers"
FORMS = (_ONE, _SEVERAL)
"""Tags of the two forms, which pydantic puts into the location of a fault."""


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping | Section)


def _form(given: Any) -> str:
    """Which form a section has: several teachers if it holds sections alone, none named like a setting of one."""
    if isinstance(given, TeachersConfig):
        return _SEVERAL
    several = isinstance(given, Mapping) and given and all(map(_is_section, given.values()))
    return _SEVERAL if several and not set(given) & set(TeacherConfig.model_fields) else _ONE


TeacherSection = Annotated[
    Annotated[TeacherConfig, Tag(_ONE)] | Annotated[TeachersConfig, Tag(_SEVERAL)], Discriminator(_form)
]
"""A teacher, or several by name."""


def teacher_label(name: str) -> str:
    """What results and messages call a teacher of a recipe: `teacher`, followed by its name if it has one."""
    return f"teacher {name}" if name else "teacher"


class SamplerConfig(Section):
    """How many tokens of a distribution are kept, and which."""

    method: Literal["threshold", "top_p_k", "random"] = "threshold"
    """`threshold`: the most likely tokens as they are and a few of the others drawn without repetition, unbiased.
    `top_p_k`: the most likely ones, renormalised, as in arXiv 2410.16215: biased. `random`: draws from p with their
    counts, as in RS-KD (arXiv 2503.16870), unbiased."""
    tokens: Annotated[int, Field(ge=1, le=255)] = 12
    """K: tokens that `threshold` keeps at each position, the most that `top_p_k` keeps, and the draws of `random`, of
    which several may fall on one token."""
    floor: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """For `threshold` of 4 tokens or more: the token that really comes next and the end token are kept with their own
    probability where it is at least this, and not left to the draw. 1: only where they are certain."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """For `top_p_k`: no more of the most likely tokens are kept than reach this probability together."""
