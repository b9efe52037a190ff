"""Recipe sections for data."""

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
    """A JSONL file or a data set to read rows from. In a recipe, the path of a JSONL file alone is enough."""

    file: LocalPath | None = None
    """JSONL file, with one object per line."""
    dataset: ModelSource | None = None
    """Used instead of `file`: anything that `datasets.load_dataset` accepts, for example a hub id."""
    config: str | None = None
    """Configuration of the data set."""
    revision: str | None = None
    """Branch, tag or commit of the data set on the hub. For a data set that is still a program, `refs/convert/parquet`
    is the hub's own copy of its rows."""
    split: str = "train"
    """Split of the data set. Slices such as `train[:1000]` are allowed."""
    columns: dict[str, str] = {}
    """Names of the columns to read as `instruction`, `input`, `output`, `messages`, `text` or `teacher` (the name of a
    row's teacher, where a recipe has several). Needed only where the names are not recognised; those of Dolly
    (`context`, `response`) and Alpaca, `prompt`/`completion` and chats (`messages`) are."""

    @model_validator(mode="before")
    @classmethod
    def _accept_a_path(cls, given: Any) -> Any:
        return {"file": given} if isinstance(given, str | Path) else given

    @model_validator(mode="after")
    def _check_one_source(self) -> Source:
        if (self.file is None) == (self.dataset is None):
            raise InputError("exactly one of file and dataset is needed")
        return self

    @property
    def name(self) -> str:
        """The path or the name of the data set, for error messages."""
        return str(self.file or self.dataset)


class DataConfig(Section):
    """Data of a run, and how its rows become prompts."""

    train: Source
    """Training prompts: rows of `instruction` with an optional `input`, of `prompt`, or of `messages`. A row of
    `messages` is a chat; every answer of the assistant in it counts as one example. With several teachers, `teacher`
    names that of the row."""
    heldout: Source
    """Prompts that no stage trains on."""
    validation: Source | None = None
    """Prompts with references, on which training stages are validated as often as their `training.eval_steps` say."""
    validation_limit: Positive | None = None
    """Use only the first rows of `validation`."""
    text: Source | None = None
    """Rows of `text`, for the language-model term of the minillm stage and for the pretrain stage. Of a data set, or of
    a file of more than 20,000 rows, only as many are tokenised as the updates need."""
    heldout_text: Source | None = None
    """Rows of `text` that no stage trains on. The pretrain stage is validated on them as often as its
    `training.eval_steps` say, and the evaluate stage reports the loss of every model on them."""
    heldout_blocks: Positive = 64
    """How many blocks of `heldout_text`, of `pretrain.block` tokens each, are scored."""
    template: Template = "chat"
    """`chat`: the tokenizer's chat template. `alpaca`: the template of the MiniLLM paper. `plain`: the text unchanged.
    Any other value is a Jinja template of your own, as a `.jinja` file or as text, with the variables `instruction`,
    `input`, `system`, `messages`, `bos_token` and `eos_token`."""
    system: str | None = None
    """System message for the chat template. Without it the template's own is used. A chat that has a system message
    keeps it."""
    max_prompt_tokens: Positive = 256
    """Limit for rendered prompts. A longer prompt is left out, counted and reported; it is never cut. Where there are
    more than 20,000 rows, prompts are rendered when they are needed: 1,000 rows are counted before training begins, and
    in training another row stands in for one that is left out."""
    limit: Positive | None = None
    """Use only the first rows of each file, to try a recipe."""
