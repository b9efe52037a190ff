"""Stage `responses`: the teacher answers the training prompts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from minillm.config import LocalPath, Positive, Section
from minillm.run.stages.stage import PROMPT_SETTINGS, Stage

if TYPE_CHECKING:
    from minillm.data.examples import Prompt
    from minillm.data.rollouts import Rollout
    from minillm.run.context import Run
    from minillm.run.plan.phases import Phase, Planner
    from minillm.run.responses_file import Progress

_WAVE = 128  # prompts that are answered between two writes of the responses file


class ResponsesConfig(Section):
    """Answers of the teacher to the training prompts, for sequence-level distillation in the warm-up."""

    file: LocalPath | None = None
    """The `responses.jsonl` of another run with the same teacher and prompts, instead of answers made by this run."""
    max_new_tokens: Positive = 128
    """Longest answer, in tokens. References that a stage trains on are cut at the same length."""
    samples_per_prompt: Positive = 1
    """Answers to each prompt."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature of the teacher."""


class Responses(Stage):
    name = "responses"
    fields = {"responses": (ResponsesConfig, ResponsesConfig(), "Answers of the teacher to the training prompts.")}
    needs = ("finetune",)
    reads = (*PROMPT_SETTINGS, "responses", "rollout.stop", "seed")
    engine = True
    response_section = "responses"

    def run(self, run: Run) -> None:
        from minillm.data.seeding import seed_of
        from minillm.models.device import release_memory
        from minillm.run.responses_file import ResponsesFile
        from minillm.terminal import RESPONSES, whole

        settings, file = run.recipe.responses, ResponsesFile(run.dir / "responses.jsonl")
        sampling = run.sampling(settings.max_new_tokens, settings.temperature)
        names = list(run.teachers)
        total = len(run.train_prompts) * settings.samples_per_prompt
        with whole(total, RESPONSES, file.progress.count):
            # With several teachers, one answers all its prompts before the next is loaded.
            for name in names[0 if file.progress.teacher is None else names.index(file.progress.teacher) :]:
                engine = None
                wanted = _unanswered(run, name, file.progress)
                while wave := list(islice(wanted, _WAVE)):
                    engine = engine or run.engine(run.teachers[name], settings.max_new_tokens)
                    seeds = [seed_of(run.recipe.seed, "responses", each.example.row, sample) for each, sample in wave]
                    prompts = [prompt for prompt, _ in wave]
                    rollouts = engine.generate([prompt.ids for prompt in prompts], sampling, seeds, progress=True)
                    file.append([_row(run, *answered) for answered in zip(prompts, rollouts, strict=True)])
                if engine is not None:
                    engine.close()
                    release_memory()

    def has_made_something(self, run_dir: Path) -> bool:
        return (run_dir / "responses.jsonl").is_file()

    def discard(self, run: Run, requested: bool) -> None:
        (run.dir / "responses.jsonl").unlink(missing_ok=True)

    def phases(self, planner: Planner) -> list[Phase]:
        return planner.responses()


def _row(run: Run, prompt: Prompt, rollout: Rollout) -> dict[str, Any]:
    """The row of an answer in the file of responses."""
    row = {"row": prompt.example.row, "prompt_ids": prompt.ids, "response_ids": rollout.response_ids}
    return row | {"finished": rollout.finished, **run.of_teacher(prompt)}


def _unanswered(run: Run, name: str, done: Progress) -> Iterator[tuple[Prompt, int]]:
    """The prompts of a teacher that it has not answered yet, with the number of the sample."""
    begun = done.teacher == name
    first, row = (done.sample, done.row) if begun else (0, -1)  # read now: `done` moves on with every answer
    for sample in range(first, run.recipe.responses.samples_per_prompt):
        for prompt in run.prompts_after(row if sample == first else -1, name):
            yield prompt, sample
