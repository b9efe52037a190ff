"""Loading, sampling and scoring the models of an evaluation, one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from minillm.data.examples import Prompt
from minillm.data.sampling import Sampling
from minillm.errors import InputError
from minillm.evaluation.answers import DIVERGENCES, Row, add_divergences, answer
from minillm.models.device import device, working_dtype
from minillm.models.load import load_model
from minillm.models.vocabulary import head_width
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.choose import ReusableEngine
from minillm.teacher.local import LocalTeacher
from minillm.teacher.routed import ExactTeacher, RoutedTeacher


class Evaluator:
    """Samples one model after another with one engine, and scores their answers with one teacher, or with several.

    The engine is started for the first model and reused for later models of the same shape. The teacher is loaded when
    it is first needed. Call `close` at the end, e.g. by way of `contextlib.closing`.

    Args:
        rollout: Chooses the engine.
        max_length: Tokens of the longest prompt and response together.
        sequences: Number of responses that are sampled at the same time.
        teacher: Folder or hub id of the teacher, or of several by name, each for the prompts whose example names it.
            None where nothing is scored with one.
        quantization: `8bit` or `4bit`, the precision in which the teacher is loaded; of several by name.
    """

    def __init__(
        self,
        rollout: RolloutConfig,
        max_length: int,
        *,
        sequences: int = 64,
        teacher: str | Mapping[str, str] | None = None,
        quantization: Mapping[str, str | None] | str | None = None,
    ) -> None:
        self._engines = ReusableEngine(rollout, max_length, sequences)
        self._folders = {"": teacher} if isinstance(teacher, str) else dict(teacher or {})
        self._quantization = quantization if isinstance(quantization, Mapping) else {"": quantization}
        self._teachers: dict[str, LocalTeacher] = {}

    def load(self, folder: str) -> PreTrainedModel:
        """Load a model onto this process's device."""
        return _to_device(load_model(folder, working_dtype()))

    @property
    def teacher(self) -> LocalTeacher:
        """The teacher, which is loaded at the first access.

        Raises:
            InputError: The evaluation has no teacher.
        """
        return self._teacher_of("")

    @property
    def scorer(self) -> ExactTeacher:
        """The teacher, or all of several. They are loaded when they are first needed.

        Raises:
            InputError: The evaluation has no teacher.
        """
        if "" in self._folders or not self._folders:
            return self.teacher
        return RoutedTeacher({name: self._teacher_of(name) for name in self._folders})

    def _teacher_of(self, name: str) -> LocalTeacher:
        if name not in self._teachers:
            if name not in self._folders:
                raise InputError("this evaluation has no teacher to score answers with")
            model = load_model(self._folders[name], working_dtype(), self._quantization.get(name))
            self._teachers[name] = LocalTeacher(_to_device(model))
        return self._teachers[name]

    def score_with(self, teacher: PreTrainedModel, name: str = "") -> None:
        """Use a loaded model as the teacher, or as the one of this name, unless that is to be quantised."""
        if self._quantization.get(name) is None:
            self._teachers[name] = LocalTeacher(teacher)

    def answer(
        self,
        model: PreTrainedModel,
        folder: str | Path,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        tokenizer: Any,
    ) -> dict[int, list[Row]]:
        """Sample a loaded model; see `minillm.evaluation.answers.answer`.

        Args:
            model: The model.
            folder: Where it was loaded from, for an engine that reads weights itself.
            prompts: Rendered prompts.
            sampling: How tokens are sampled.
            seeds: Sampling seeds.
            tokenizer: Decodes the answers.
        """
        return answer(self._engines.of(model, folder), prompts, sampling, seeds, tokenizer)

    def add_divergences(
        self,
        rows: Sequence[Row],
        prompts: Sequence[Prompt],
        model: PreTrainedModel,
        sampling: Sampling,
        keys: Sequence[str] = DIVERGENCES,
    ) -> None:
        """Write divergences between a model and the teacher into answers; see `answers.add_divergences`."""
        add_divergences(rows, prompts, model, self.scorer, self.shared_width(sampling), sampling.temperature, keys)

    def shared_width(self, sampling: Sampling) -> int:
        """Size of the vocabulary that a sampled model shares with the teacher, or with all teachers."""
        teachers = [self._teacher_of(name) for name in self._folders or ("",)]
        return min(sampling.vocab_size, *(head_width(teacher.model) for teacher in teachers))

    def sleep(self) -> None:
        """Have the engine release its memory, where it can, until the next model is sampled."""
        self._engines.sleep()

    def close(self) -> None:
        """Shut the engine down."""
        self._engines.close()


def _to_device(model: Any) -> PreTrainedModel:
    return model.to(device())
