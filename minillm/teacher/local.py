"""A teacher as a model in this process."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm.data.batches import bucket, pad
from minillm.models.head import Head, head_of, hidden_states
from minillm.models.saving import save_plain
from minillm.models.shards import is_sharded
from minillm.models.sources import find_gguf
from minillm.models.weights import plain_weights
from minillm.teacher.states import StatesTeacher

if TYPE_CHECKING:
    from jaxtyping import Float

# Tokens and sequences that a GPU processes at once. It waits for kernel launches unless each one has more to do.
_GPU_TOKENS, _GPU_SEQUENCES = 1 << 15, 256


class LocalTeacher(StatesTeacher):
    """A frozen teacher in this process.

    Args:
        model: the teacher, which is put in evaluation mode and frozen; it keeps its own dtype.
        batch_size: sequences in one forward; on a GPU more, where the sequences are short.
        source: the folder, hub id or GGUF file that the model was loaded from, if it is as it is there.

    Attributes:
        source: the folder or hub id from which another process can load the same model, if there is one. A GGUF file is
            none: vLLM and `AutoConfig` read it in another way than `load_model`.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int = 16, source: str | None = None) -> None:
        self.source = None if source is None or find_gguf(source) else source
        self.model = model.eval().requires_grad_(False)
        self.batch_size = batch_size
        self.sharded = is_sharded(model)

    @property
    def head(self) -> Head:
        """The output head of the model."""
        return head_of(self.model)

    def reading(self) -> AbstractContextManager[Any]:
        """Context manager for every forward of the teacher."""
        return nullcontext()

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the weights as `plain_weights` does, for an engine that samples from the teacher too."""
        return plain_weights(self.model, dtype)

    def folder(self, spare: Path) -> str:
        """Return a folder of the teacher for another process, which the first training process starts.

        This is the teacher's own folder or hub id, or else `spare`, in which the first process saves the teacher. What
        an earlier run has left there is replaced. Every process must call this, because shards are gathered.
        """
        if self.source is not None:
            return self.source
        write = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        part = spare.with_name(spare.name + ".part")
        if write:
            shutil.rmtree(part, ignore_errors=True)
        self._save(part, write)
        if write:
            shutil.rmtree(spare, ignore_errors=True)
            part.rename(spare)
        return str(spare)

    def _save(self, folder: Path, write: bool) -> None:
        save_plain(self.model, folder, write=write)

    def save_config(self, folder: str) -> None:
        """Save the model's config, with the name of its class."""
        config = copy.deepcopy(self.model.config)
        config.architectures = [type(self.model).__name__]
        config.save_pretrained(folder)

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of the sequences that go through the model together, sequences of similar length in one group."""
        size = self.batch_size
        # With shards, every process must run the same number of forwards, so the size may not depend on the lengths.
        if self.model.device.type != "cpu" and not self.sharded:
            size = max(size, min(_GPU_TOKENS // max(lengths, default=1), _GPU_SEQUENCES))
        return bucket(lengths, size)

    def hidden(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[Float[Tensor, "tokens hidden"]]:
        """Final hidden states, each response's in one forward; see `StatesTeacher.hidden`."""
        out: list[Tensor | None] = [None] * len(prompts)
        for group in self.groups([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]):
            with torch.no_grad(), self.reading():
                batch = pad([prompts[i] for i in group], [responses[i] for i in group], self.model.device)
                states = hidden_states(self.model, batch).split(batch.lengths.tolist())
            for i, state in zip(group, states, strict=True):
                out[i] = state
        return [state for state in out if state is not None]

    def close(self) -> None:
        """Nothing has to be released."""


class AdapterOff(LocalTeacher):
    """The base model of a student with an adapter, as it is with the adapter disabled; it takes no memory of its own.

    Args:
        student: a PEFT model.
        batch_size: sequences in one forward.
    """

    def __init__(self, student: Any, batch_size: int = 16) -> None:
        self._student, self.source = student, None
        self.model, self.batch_size, self.sharded = student.get_base_model(), batch_size, False

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the weights of the base model; see `LocalTeacher.weights`."""
        return plain_weights(self._student, dtype, merged=False)

    def _save(self, folder: Path, write: bool) -> None:
        save_plain(self._student, folder, merged=False, write=write)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Disable the adapter for a forward, and put the student in evaluation mode."""
        training = self._student.training
        self._student.eval()  # in training mode, checkpointed layers keep no keys and values
        try:
            with self._student.disable_adapter():
                yield
        finally:
            self._student.train(training)
