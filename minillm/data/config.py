"""Settings of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, model_validator

from minillm.config import LocalPath, ModelSource, Positive, Section, expand_home
from minillm.errors import InputError


def _is_template(name: str) -> str:
    if name in ("chat", "alpaca", "plain") or name.endswith(".jinja") or "{{" in name or "{%" in name:
        return name
    raise InputError("chat, alpaca, plain, a .jinja file or a Jinja text is needed")


Template = Annotated[str, AfterValidator(_is_template), BeforeValidator(expand_home)]


class Source(Section):
    """Where rows come from; the path of a JSONL file alone will do."""

    file: LocalPath | None = None
    """JSONL, one object a line."""
    dataset: ModelSource | None = None
    """Instead: anything that `datasets.load_dataset` takes, e.g. a hub id."""
    config: str | None = None
    """Its configuration."""
    revision: str | None = None
    """Its branch, tag or commit on the hub; `refs/convert/parquet` is the hub's own copy of one that is still a program."""
    split: str = "train"
    """Its split, slices included: `train[:1000]`."""
    columns: dict[str, str] = {}
    """Which of its columns is `instruction`, `input`, `output`, `messages` or `text`, where that is not known: the names of Dolly
    (`context`, `response`), Alpaca, `prompt`/`completion` and chats (`messages`) are."""

    @model_validator(mode="before")
    @classmethod
    def _just_a_file(cls, given: Any) -> Any:
        return {"file": given} if isinstance(given, str | Path) else given

    @model_validator(mode="after")
    def _one_source(self) -> Source:
        if (self.file is None) == (self.dataset is None):
            raise InputError("either file or dataset is needed, and not both")
        return self

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.file or self.dataset)


class DataConfig(Section):
    train: Source
    """Training prompts: `instruction` with an optional `input`, `prompt`, or `messages`, a chat of which every answer of the
    assistant counts as one row."""
    heldout: Source
    """Prompts that no stage trains on."""
    validation: Source | None = None
    """Prompts with references, on which training stages are validated as often as their `training.eval_steps` say."""
    validation_limit: Positive | None = None
    """Use its first rows only."""
    text: Source | None = None
    """Rows of `text`, for the language-model term of the minillm stage; as many are read as its updates need."""
    template: Template = "chat"
    """`chat`: the tokenizer's chat template; `alpaca`: the MiniLLM paper's; `plain`: the text as it stands; or your own in Jinja, as
    a `.jinja` file or as text, of `instruction`, `input`, `system`, `messages`, `bos_token` and `eos_token`."""
    system: str | None = None
    """System message of the chat template; none leaves the template's own. A chat that brings one keeps it."""
    max_prompt_tokens: Positive = 256
    """A rendered prompt longer than this is left out, counted and reported; it is never cut."""
    limit: Positive | None = None
    """Use only the first rows of each file (to try a recipe)."""
