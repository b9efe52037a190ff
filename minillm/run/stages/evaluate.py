"""Stage `evaluate`: every model of the run answers the held-out prompts, and the answers are scored."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.evaluation.config import EvaluateConfig
from minillm.run.stages.stage import PROMPT_SETTINGS, Stage

if TYPE_CHECKING:
    from minillm.run.context import Run
    from minillm.run.plan.phases import Phase, Planner


class Evaluate(Stage):
    name = "evaluate"
    fields = {"evaluate": (EvaluateConfig, EvaluateConfig(), "How the models of the run are compared.")}
    needs = ("minillm", "sft")
    reads = (
        "data.heldout",
        *PROMPT_SETTINGS[1:],
        "evaluate",
        "rollout.stop",
        "student.source",
        "teacher.quantization",
    )
    engine = True

    def discard(self, run: Run, requested: bool) -> None:
        if requested:
            shutil.rmtree(run.dir / "evaluate", ignore_errors=True)

    def phases(self, planner: Planner) -> list[Phase]:
        return planner.evaluation()

    def run(self, run: Run) -> None:
        from minillm.data.files import read_jsonl, write_json, write_jsonl
        from minillm.evaluation import answers as evaluation
        from minillm.evaluation import scores, verdict
        from minillm.models.device import device, working_dtype
        from minillm.models.load import load_model
        from minillm.rollout.engines.choose import ReusableEngine
        from minillm.run.processes import print_progress
        from minillm.run.stages import stage_named
        from minillm.teacher.local import LocalTeacher

        settings = run.recipe.evaluate
        start = "pruned" if run.recipe.student.source == "prune" else "student"
        folders = {
            "teacher": run.teacher,
            start: run.start,
            **{str(stage_named(stage).label): folder for stage, folder in run.trained().items()},
        }
        prompts = run.heldout_prompts
        sampling = run.sampling(settings.max_new_tokens, settings.temperature)
        tokenizer = run.conventions.tokenizer
        teacher: LocalTeacher | None = None
        engines = ReusableEngine(run.recipe.rollout, run.max_length(settings.max_new_tokens))
        rows: dict[str, list[dict[str, Any]]] = {}
        for name, folder in folders.items():
            file = run.dir / "evaluate" / f"{name}.jsonl"
            made_from = _made_from(run, folder)
            note = file.with_suffix(".json")
            if file.is_file() and note.is_file() and json.loads(note.read_text(encoding="utf-8")) == made_from:
                rows[name] = read_jsonl(file)
                continue
            print_progress(f"  {name}")
            model: Any = load_model(folder, working_dtype()).to(device())  # pyright: ignore[reportArgumentType]
            engine = engines.of(model, folder)
            by_seed = evaluation.answer(engine, prompts, sampling, settings.seeds, tokenizer)
            engines.sleep()
            rows[name] = [row for some in by_seed.values() for row in some]
            if name != "teacher":
                teacher = teacher or LocalTeacher(
                    load_model(run.teacher, working_dtype(), run.recipe.teacher.quantization).to(device())
                )  # pyright: ignore[reportArgumentType]
                evaluation.add_reverse_kl(
                    rows[name], prompts, model, teacher, sampling.vocab_size, settings.temperature
                )
            else:
                for row in rows[name]:
                    row["reverse_kl"] = 0.0  # of a model to itself
                if run.recipe.teacher.quantization is None:
                    teacher = LocalTeacher(model)
            write_jsonl(file, rows[name])
            note.write_text(json.dumps(made_from), encoding="utf-8")
        engines.close()
        scored = {name: scores.collect(some, rows["teacher"]) for name, some in rows.items()}
        results: dict[str, Any] = {
            "models": {name: scores.summarise(some, settings.bootstrap) for name, some in scored.items()},
            "prompts": len(prompts),
            "seeds": settings.seeds,
        }
        if "warmed" in scored and "minillm" in scored:
            changes = scores.compare(scored["warmed"], scored["minillm"], settings.bootstrap)
            results |= {"minillm_against_warmed": changes, "check": verdict.check(changes, settings)}
        write_json(
            run.dir / "evaluate" / "prompts.json", {prompt.example.row: prompt.example.text for prompt in prompts}
        )
        write_json(run.dir / "results.json", results)


def _made_from(run: Run, folder: str) -> dict[str, Any]:
    """What a model's answers depend on: if it is the same, they need not be made again."""
    from minillm.models.configs import text_config
    from minillm.rollout.engines.choose import choose_engine

    weights: Any = {file.name: file.stat().st_mtime_ns for file in sorted(Path(folder).glob("*.safetensors"))}
    settings = run.state.settings("evaluate")
    own = {
        key: value
        for key, value in settings.items()
        if key.startswith(("evaluate.", "data.", "rollout.stop", "teacher."))
    }
    return {
        "weights": weights or folder,
        "settings": own,
        "prompts": _digest_of(run),
        "engine": choose_engine(run.recipe.rollout.engine, text_config(folder)),
    }


def _digest_of(run: Run) -> str:
    """Of the held-out prompts as they are drawn from, and of where answers end."""
    seen = [prompt.ids for prompt in run.heldout_prompts], run.conventions.eos_ids, run.conventions.vocab_size
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
