"""Code that the training stages share: their arguments, the models that their trainers get, and how they are run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from minillm.evaluation.language_model import heldout_blocks, score_blocks
from minillm.evaluation.language_model_metrics import text_scores
from minillm.loss.in_forward import bind_scoring
from minillm.models.configs import text_config
from minillm.models.device import device, fast_bfloat16, keep_freed_memory, release_memory, working_dtype
from minillm.models.head import keeps_sequences_apart
from minillm.models.load import load_model
from minillm.models.lora import load_student
from minillm.run.certificate import note_inputs
from minillm.run.context import Run
from minillm.run.live import LiveLog, LiveProgress, LiveReport, keep_events
from minillm.run.processes import world_size
from minillm.run.progress import JOURNAL
from minillm.run.stages.stage import Stage
from minillm.run.training_arguments import STAGE_DEFAULTS, with_update_sizes
from minillm.teacher.served import ServedTeacher
from minillm.train.best_checkpoint import with_given
from minillm.train.journal import Journal, Proof
from minillm.train.pair import compute_dtype
from minillm.train.resume import train as train_resumably
from minillm.train.watch import FixedRows, advice, can_watch, decline

logger = logging.getLogger(__name__)


def training_arguments(run: Run, stage: Stage, given: dict[str, Any] | None = None) -> TrainingArguments:
    """The `TrainingArguments` of a stage, with defaults that suit a stage of a run.

    Args:
        run: the run.
        stage: the stage.
        given: the arguments that the user set; by default those in the recipe.
    """
    given = with_update_sizes(stage.arguments(run.recipe) if given is None else given, world_size())
    if given.get("bf16") and not fast_bfloat16():
        logger.warning(
            "This CPU emulates bfloat16, many times slower than float32: stage %s computes in float32.", stage.name
        )
        given = {**given, "bf16": False}
    defaults = STAGE_DEFAULTS | {
        "use_cpu": not torch.accelerator.is_available(),
        # With a limit of 1, only the best checkpoint would be left when training stops, and not the last.
        "save_total_limit": 2 if given.get("load_best_model_at_end") else 1,
        "bf16": os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16" and not given.get("fp16"),
    }
    folder = str(run.dir / "work" / stage.name)
    return with_given(TrainingArguments(output_dir=folder, seed=run.recipe.seed, **(defaults | given)), given)


def student_arguments(run: Run, folder: str, arguments: TrainingArguments) -> dict[str, Any]:
    """Keyword arguments that give a trainer its student: a folder's name, or a loaded model with a LoRA adapter."""
    lora = run.recipe.student.lora
    model = folder if lora is None else load_student(folder, lora, compute_dtype(arguments))
    return {"model": model, "processing_class": run.conventions.tokenizer, "conventions": run.conventions}


def on_policy_teacher(run: Run, arguments: TrainingArguments) -> Any:
    """The teacher as the minillm stage takes it: served where the recipe names servers; several by name."""
    return _each(run, lambda name: _served(run, name) or _loaded(run, arguments, name))


def supervised_teacher(run: Run, arguments: TrainingArguments) -> Any:
    """The teacher as the warm-up takes it: as in the minillm stage, but loaded if its servers return no states.

    Several teachers must have servers that return states, which the trainer checks.
    """

    def one(name: str) -> Any:
        served = _served(run, name)
        by_servers = served is not None and (run.recipe.teacher.several or served.returns_states())
        return served if by_servers else _loaded(run, arguments, name)

    return _each(run, one)


def local_teacher(run: Run, arguments: TrainingArguments) -> Any:
    """The teacher in this process, wherever it is served; several by name."""
    return _each(run, lambda name: _loaded(run, arguments, name))


def teacher_text_loss(run: Run) -> float:
    """The teacher's loss on the held-out text of the recipe, for a training that does not hold the teacher."""
    data, tokenizer = run.recipe.data, run.conventions.tokenizer
    blocks = heldout_blocks(run.heldout_texts or [], tokenizer, run.recipe.pretrain.block, data.heldout_blocks)
    model: Any = load_model(run.teacher, working_dtype(), run.recipe.teacher.first.quantization)
    model = bind_scoring(model if run.recipe.teacher.first.quantization else model.to(device()))
    share = keeps_sequences_apart(model)
    rows = score_blocks(model, blocks, tokenizer, run.conventions.vocab_size, share_rows=share)
    del model
    release_memory()
    return text_scores(rows)["text_loss"]


def _each(run: Run, one: Callable[[str], Any]) -> Any:
    """What a trainer takes: a single teacher, or a mapping of several."""
    return {name: one(name) for name in run.teachers} if run.recipe.teacher.several else one("")


def _served(run: Run, name: str) -> ServedTeacher | None:
    """The teacher behind the servers that the recipe names, if it names any."""
    recipe, teacher = run.recipe, run.recipe.teacher.by_name[name]
    if not teacher.servers:
        return None
    # Without a single step, and with sampled rewards, the log-probabilities of the sampled tokens are enough.
    needs_rows = recipe.objective.single_step or recipe.objective.reward == "expected"
    return ServedTeacher(
        teacher.servers,
        run.teachers[name],
        top_k=teacher.top_k if needs_rows else 0,
        patience=run.rollout().server_patience,
        timeout=run.rollout().server_timeout,
    )


def _loaded(run: Run, arguments: TrainingArguments, name: str) -> Any:
    """The teacher as a trainer takes it: its folder's name, or the loaded model if it is quantised."""
    bits, folder = run.recipe.teacher.by_name[name].quantization, run.teachers[name]
    return folder if bits is None else load_model(folder, compute_dtype(arguments), bits)


def fine_tune(run: Run, stage: Stage, source: str, target: str) -> None:
    """Fine-tune the model in `source` on the references of the data, and leave it in `target`."""
    from minillm.train.finetune import FineTuner

    arguments, validation, of_student = training_arguments(run, stage), run.validation, stage.trains == "student"
    model = {"model": source, "conventions": run.conventions}
    trainer = FineTuner(
        args=arguments,
        train_dataset=run.references,
        rollout=run.rollout(),
        eval_dataset=validation,
        teacher=local_teacher(run, arguments) if of_student and validation is not None else None,
        **(student_arguments(run, source, arguments) if of_student else model),
    )
    with keep_freed_memory():
        train(run, stage, trainer, target, final=of_student)


def train(run: Run, stage: Stage, trainer: Any, folder: str, *, final: bool) -> None:
    """Train a stage, or continue from its last checkpoint, and leave the model in `folder`.

    Args:
        run: the run.
        stage: the stage.
        trainer: the trainer of the stage.
        folder: where the trained model is saved.
        final: whether no later stage trains this model further. It is then saved in the dtype that the recipe asks for.
    """
    run.processes = trainer.accelerator.num_processes
    for callback in (ProgressCallback, PrinterCallback):  # a line for a stage, in place of bars and dictionaries
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(LiveProgress())
    keep_proof(run, stage, trainer)
    trainer.add_callback(LiveLog(run.dir, stage.name))
    trainer.add_callback(LiveReport(run.dir))
    keep_events(trainer, run.dir, stage.name)
    dtype = _saved_dtype(run) if final else None
    train_resumably(trainer, folder, stage.name, dtype, keep_checkpoint=run.recipe.keep_checkpoint)
    if trainer.is_world_process_zero() and not trainer.args.load_best_model_at_end:
        _tell_of_decline(stage, trainer)


def keep_proof(run: Run, stage: Stage, trainer: Any) -> None:
    """Have a trainer keep the journal of the run, and the batches of updates that it refuses."""
    trainer.journal = Journal(run.dir / JOURNAL, stage.name, trainer.accelerator.process_index)
    trainer.on_fault, trainer.fault_folder = run.recipe.on_fault, run.dir / "faults" / stage.name
    trainer.add_callback(Proof(trainer))
    if trainer.is_world_process_zero():
        note_inputs(run, stage.name, trainer.journal)


def watch_rows(stage: Stage, trainer: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Let a trainer score a few of its rows now and then, if its teacher can; see `FixedRows`."""
    if can_watch(trainer):
        trainer.add_callback(FixedRows(trainer, rows, advice(str(stage.training), trainer.args.learning_rate)))


def _tell_of_decline(stage: Stage, trainer: Any) -> None:
    """Warn if a stage ended worse than it began, before a later stage is spent on what it left."""
    found = decline(trainer.state.log_history, stage.watched)
    if found is not None:
        logger.warning(
            "Stage %s ended worse than it began: %s rose from %.2f to %.2f nats a token; %s, and make it again "
            "(--stage %s --redo)",
            stage.name,
            found.what,
            found.before,
            found.after,
            advice(str(stage.training), trainer.args.learning_rate),
            stage.name,
        )


def _saved_dtype(run: Run) -> torch.dtype:
    """The dtype in which the finished student is saved."""
    name = run.recipe.student.dtype
    if name == "auto":
        name = str(getattr(text_config(run.teacher), "dtype", None) or "float32").removeprefix("torch.")
    return getattr(torch, name)
