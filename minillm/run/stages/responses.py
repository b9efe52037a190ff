"""Stage `responses`: the teacher answers the training prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from minillm.config import LocalPath, Positive, Section
from minillm.run.stages.stage import PROMPT_SETTINGS, Stage

if TYPE_CHECKING:
    from minillm.run.context import Run
    from minillm.run.plan.phases import Phase, Planner

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
        from minillm.data.files import read_jsonl, write_jsonl
        from minillm.data.seeding import seed_of
        from minillm.models.device import release_memory

        settings, file = run.recipe.responses, run.dir / "responses.jsonl"
        # With several teachers, one answers all its prompts before the next is loaded.
        wanted = [
            (name, prompt, sample)
            for name in run.teachers
            for sample in range(settings.samples_per_prompt)
            for prompt in run.train_prompts
            if name in ("", prompt.example.teacher)
        ]
        rows = read_jsonl(file) if file.is_file() else []
        sampling = run.sampling(settings.max_new_tokens, settings.temperature)
        engine, answering = None, ""
        while len(rows) < len(wanted):
            name, wave = wanted[len(rows)][0], wanted[len(rows) : len(rows) + _WAVE]
            wave = [(prompt, sample) for other, prompt, sample in wave if other == name]
            if engine is not None and name != answering:
                engine.close()
                release_memory()
                engine = None
            engine, answering = engine or run.engine(run.teachers[name], settings.max_new_tokens), name
            seeds = [seed_of(run.recipe.seed, "responses", prompt.example.row, sample) for prompt, sample in wave]
            rollouts = engine.generate([prompt.ids for prompt, _ in wave], sampling, seeds, progress=True)
            rows += [
                {
                    "row": prompt.example.row,
                    "prompt_ids": prompt.ids,
                    "response_ids": rollout.response_ids,
                    "finished": rollout.finished,
                    **run.of_teacher(prompt),
                }
                for (prompt, _), rollout in zip(wave, rollouts, strict=True)
            ]
            write_jsonl(file, rows)
        if engine:
            engine.close()

    def has_made_something(self, run_dir: Path) -> bool:
        return (run_dir / "responses.jsonl").is_file()

    def discard(self, run: Run, requested: bool) -> None:
        (run.dir / "responses.jsonl").unlink(missing_ok=True)

    def phases(self, planner: Planner) -> list[Phase]:
        return planner.responses()
