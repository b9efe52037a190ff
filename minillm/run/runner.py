"""A recipe's stages in order. Finished ones are skipped, interrupted ones continue."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from minillm.data.examples import read_texts
from minillm.data.files import read_jsonl, write_jsonl
from minillm.errors import Interrupted
from minillm.models.device import keep_freed_memory, release_memory
from minillm.run import processes
from minillm.run.context import Run
from minillm.run.recipe import Recipe

logger = logging.getLogger(__name__)
_WAVE = 128  # prompts answered between two writes of the responses file


def run(recipe: Recipe, only: str | None = None, redo: bool = False) -> Run:
    """Do the recipe's stages, or one of them.

    Under several processes (accelerate launch) the training stages run in all of them, the others in one.

    Raises:
        RunError, RecipeError, DataError, EngineError: before any model loads, where that is possible.
        Interrupted: after Ctrl-C; the same call continues.
    """
    this = Run(recipe)
    stages: list[str] = [only] if only else list(recipe.stages)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0:
        forgotten_stages = this.state.forget(stages[0]) if redo else []
        for forgotten in forgotten_stages:
            shutil.rmtree(this.dir / "work" / forgotten, ignore_errors=True)
            if forgotten == "responses":
                (this.dir / "responses.jsonl").unlink(missing_ok=True)
        if forgotten_stages[:1] == ["evaluate"]:
            shutil.rmtree(this.dir / "evaluate", ignore_errors=True)
    if world > 1:
        processes.rendezvous(this, rank)
    for stage in stages:
        this.state.check(stage)
        this.state.needs(stage, stages[: stages.index(stage)])
    try:
        _do_all(this, stages, rank, world)
    except BaseException:
        if rank == 0:
            processes.signal_abort(this)
        raise
    if world > 1:
        processes.destroy_process_group(this, rank)
    return this


def _do_all(this: Run, stages: list[str], rank: int, world: int) -> None:
    """What is not finished yet."""
    for number, stage in enumerate(stages, 1):
        if this.state.finished(stage) and stage != "report":
            _say(rank, f"[{number}/{len(stages)}] {stage}: finished before")
            continue
        if world > 1 and stage not in _IN_EVERY_PROCESS:
            processes.run_in_main_process(this, stage, rank)
            continue
        _say(rank, f"[{number}/{len(stages)}] {stage}")
        if rank == 0:
            this.state.begin(stage)
        started = time.perf_counter()
        try:
            _STAGES[stage](this)
        except KeyboardInterrupt:
            raise Interrupted(f"stage {stage} was interrupted; the same command continues it") from None
        release_memory()
        if rank == 0:
            this.state.finish(stage, time.perf_counter() - started, this.processes)
        _say(rank, f"[{number}/{len(stages)}] {stage}: {time.perf_counter() - started:.0f} s")


def _say(rank: int, text: str) -> None:
    if rank == 0:
        from rich import print as show

        show(f"[bold cyan]{text.replace('[', chr(92) + '[')}[/]", flush=True)


def _teacher(this: Run) -> None:
    from minillm.models.load import load_model

    if this.untuned == this.recipe.teacher.source:
        return  # a folder or hub id is used where it is
    model: Any = load_model(this.recipe.teacher.source)
    if this.recipe.teacher.adapter:
        from minillm.models.adapters import merge_adapter

        model = merge_adapter(model, this.recipe.teacher.adapter)
    model.save_pretrained(this.untuned)
    this.conventions.tokenizer.save_pretrained(this.untuned)


def _finetune(this: Run) -> None:
    _fine_tune(this, "finetune", this.untuned, this.teacher, this.recipe.finetune)


def _sft(this: Run) -> None:
    _fine_tune(this, "sft", this.start, this.fine_tuned, this.recipe.sft)


def _fine_tune(this: Run, stage: str, source: str, target: str, training: dict[str, Any]) -> None:
    from minillm.train.finetune import FineTuner

    arguments = _training_arguments(this, stage, training)
    validation = this.validation
    trainer = FineTuner(
        args=arguments, train_dataset=this.references, rollout=this.rollout(), eval_dataset=validation,
        teacher=None if stage == "finetune" or validation is None else _reading_teacher(this, arguments),
        **(_student_of(this, source, arguments) if stage == "sft" else {"model": source, "conventions": this.conventions}),
    )  # fmt: skip
    with keep_freed_memory():
        _train(this, trainer, target, stage, final=stage == "sft")


def _student(this: Run) -> None:
    import torch

    from minillm.models.device import device, working_dtype
    from minillm.models.load import load_model
    from minillm.models.pruning.apply import prune
    from minillm.models.pruning.depth import block_similarity, layers_to_keep

    settings = this.recipe.student
    if settings.source != "prune" or settings.keep_layers is None:
        return
    teacher: Any = load_model(this.teacher, working_dtype()).to(device())  # pyright: ignore[reportArgumentType]
    prompts = this.train_prompts[: settings.probe_prompts]
    similarity = block_similarity(teacher, [prompt.ids for prompt in prompts])
    kept = layers_to_keep(similarity, settings.keep_layers)
    prune(teacher.to(torch.bfloat16), kept).save_pretrained(this.start)
    this.conventions.tokenizer.save_pretrained(this.start)
    notes = {"kept": kept, "block_similarity": [round(float(x), 4) for x in similarity]}
    (Path(this.start) / "pruning.json").write_text(json.dumps(notes), encoding="utf-8")
    _say(0, f"  of {len(similarity)} layers, dropped {sorted(set(range(len(similarity))) - set(kept))}")


def _engine(this: Run, folder: str, new_tokens: int) -> Any:
    from minillm.rollout.engines.choose import make_engine

    return make_engine(this.recipe.rollout, folder, max_length=this.max_length(new_tokens), tokenizer=folder)


def _sampling(this: Run, new_tokens: int, temperature: float) -> Any:
    return this.conventions.sampling(new_tokens, temperature, this.recipe.rollout.stop)


def _responses(this: Run) -> None:
    from minillm.data.seeding import seed_of

    settings = this.recipe.responses
    file = this.dir / "responses.jsonl"
    prompts = this.train_prompts
    wanted = [(prompt, sample) for sample in range(settings.samples_per_prompt) for prompt in prompts]
    rows = read_jsonl(file) if file.is_file() else []
    sampling = _sampling(this, settings.max_new_tokens, settings.temperature)
    engine = None
    for start in range(len(rows), len(wanted), _WAVE):
        engine = engine or _engine(this, this.teacher, settings.max_new_tokens)
        wave = wanted[start : start + _WAVE]
        seeds = [seed_of(this.recipe.seed, "responses", prompt.example.row, sample) for prompt, sample in wave]
        drawn = engine.generate([prompt.ids for prompt, _ in wave], sampling, seeds, progress=True)
        rows += [
            {
                "row": prompt.example.row,
                "prompt_ids": prompt.ids,
                "response_ids": rollout.response_ids,
                "finished": rollout.finished,
            }
            for (prompt, _), rollout in zip(wave, drawn, strict=True)
        ]
        write_jsonl(file, rows)
    if engine:
        engine.close()


def _training_arguments(this: Run, stage: str, given: dict[str, Any]) -> Any:
    import torch
    from transformers import TrainingArguments

    from minillm.models.device import fast_bfloat16
    from minillm.train.best_checkpoint import with_given

    if given.get("bf16") and not fast_bfloat16():
        logger.warning(
            "This CPU emulates bfloat16, many times slower than float32: stage %s computes in float32.", stage
        )
        given = {**given, "bf16": False}
    defaults: dict[str, Any] = {
        "use_cpu": not torch.accelerator.is_available(),
        "report_to": "none",
        "logging_steps": 1,
        "save_total_limit": 2
        if given.get("load_best_model_at_end")
        else 1,  # of one, the last would go when training stops
        "logging_first_step": True,
        "bf16": os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16" and not given.get("fp16"),
    }
    return with_given(
        TrainingArguments(output_dir=str(this.dir / "work" / stage), seed=this.recipe.seed, **(defaults | given)), given
    )


def _student_of(this: Run, folder: str, arguments: Any) -> dict[str, Any]:
    """What a trainer is given of its student: a name, or a model with an adapter."""
    from minillm.models.lora import load_student

    lora = this.recipe.student.lora
    model = folder if lora is None else load_student(folder, lora, _computes_in(arguments))
    return {"model": model, "processing_class": this.conventions.tokenizer, "conventions": this.conventions}


def _computes_in(arguments: Any) -> Any:
    import torch

    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32


def _reading_teacher(this: Run, arguments: Any) -> Any:
    """The teacher as a trainer is given it: its name, or the model where that is quantised."""
    bits = this.recipe.teacher.quantization
    if bits is None:
        return this.teacher
    from minillm.models.load import load_model

    return load_model(this.teacher, _computes_in(arguments), bits)


def _train(this: Run, trainer: Any, folder: str, stage: str, *, final: bool) -> None:
    """Train a stage. `final`: no later stage goes on from what it leaves, which is saved as the student is wanted."""
    from minillm.train.resume import train

    this.processes = trainer.accelerator.num_processes
    train(trainer, folder, stage, _saved_in(this) if final else None)


def _saved_in(this: Run) -> Any:
    """The dtype that the student is saved in."""
    import torch

    from minillm.models.configs import text_config

    name = this.recipe.student.dtype
    if name == "auto":
        name = str(getattr(text_config(this.teacher), "dtype", None) or "float32").removeprefix("torch.")
    return getattr(torch, name)


def _warmup(this: Run) -> None:
    from minillm.train.supervised import SupervisedTrainer

    settings = this.recipe.warmup
    arguments = _training_arguments(this, "warmup", settings.training)
    trainer = SupervisedTrainer(
        **_student_of(this, this.start, arguments), teacher=_reading_teacher(this, arguments), args=arguments,
        shard_teacher=this.recipe.teacher.shard,
        train_dataset=_warmup_rows(this),
        cross_entropy=settings.cross_entropy, divergence=settings.divergence, temperature=settings.temperature, rollout=this.rollout(),
        cross_entropy_temperature=settings.cross_entropy_temperature, eval_dataset=this.validation,
    )  # fmt: skip
    _train(this, trainer, this.warmed, "warmup", final="minillm" not in this.recipe.stages)


def _warmup_rows(this: Run) -> list[dict[str, Any]]:
    given = this.recipe.responses.file
    if this.recipe.warmup.targets == "references":
        return this.references
    return read_jsonl(Path(this.answers)) if given is None else this.given_responses(given)


def _minillm(this: Run) -> None:
    from minillm.teacher.served import ServedTeacher
    from minillm.train.on_policy import MiniLLMTrainer

    recipe = this.recipe
    prompts = this.train_prompts
    rollout = this.rollout()
    arguments = _training_arguments(this, "minillm", recipe.training)
    teacher = _reading_teacher(this, arguments)
    if recipe.teacher.servers:
        # Without a single step and with sampled rewards only the drawn tokens count.
        rows = recipe.objective.single_step or recipe.objective.reward == "expected"
        teacher = ServedTeacher(
            recipe.teacher.servers,
            this.teacher,
            top_k=recipe.teacher.top_k if rows else 0,
            patience=rollout.server_patience,
        )
    trainer = MiniLLMTrainer(
        **_student_of(this, this.warmed, arguments), teacher=teacher, args=arguments, objective=recipe.objective,
        shard_teacher=recipe.teacher.shard, rollout=rollout, train_dataset=[{"prompt_ids": prompt.ids} for prompt in prompts],
        eval_dataset=this.validation, text_dataset=_texts(recipe),
        responses=this.references if rollout.on_policy < 1 else None,
    )  # fmt: skip
    _train(this, trainer, this.student, "minillm", final=True)


def _texts(recipe: Recipe) -> Iterable[dict[str, Any]] | None:
    """A file whole, a data set as a stream."""
    if recipe.data.text is None:
        return None
    rows = read_texts(recipe.data.text, recipe.seed)
    return rows if recipe.data.text.file is None else list(rows)


def _evaluate(this: Run) -> None:
    from minillm.evaluation.heldout import evaluate_heldout

    start = "pruned" if this.recipe.student.source == "prune" else "student"
    models = {"teacher": this.teacher, start: this.start}
    models |= {"warmed" if stage == "warmup" else stage: folder for stage, folder in this.trained().items()}
    evaluate_heldout(
        this.dir, models, this.heldout_prompts, this.conventions, this.rollout(), this.recipe.evaluate,
        recorded=this.state.settings("evaluate"), quantization=this.recipe.teacher.quantization,
    )  # fmt: skip


def describe(this: Run) -> None:
    """Write the report and the model cards from what is there."""
    from minillm.evaluation.report.run import write_report
    from minillm.run.model_card import write_card

    write_report(this.dir, {example.row: example.text for example in this.heldout_examples})
    for stage, folder in this.trained().items():
        if Path(folder).is_dir():
            write_card(Path(folder), this.recipe, stage)


def _report(this: Run) -> None:
    from minillm.run.model_card import push

    describe(this)
    done = [folder for folder in this.trained().values() if Path(folder).is_dir()]
    if this.recipe.push_to_hub and done:
        _say(0, f"  uploaded to {push(Path(done[-1]), this.recipe.push_to_hub, this.recipe.training.get('hub_token'))}")


_STAGES: dict[str, Callable[[Run], None]] = {
    "teacher": _teacher, "finetune": _finetune, "student": _student, "responses": _responses, "warmup": _warmup, "sft": _sft,
    "minillm": _minillm, "evaluate": _evaluate, "report": _report,
}  # fmt: skip
_IN_EVERY_PROCESS = ("finetune", "warmup", "sft", "minillm")
