"""`minillm verify`: derives again what a certificate says, and says what differs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from minillm.distribution import versions
from minillm.errors import MinillmError, MissingError
from minillm.run.certificate import FILE, hash_of, hash_of_code, hash_of_value, model_files, read_journal
from minillm.run.context import Run
from minillm.run.progress import JOURNAL, read_stages
from minillm.run.recipe_file import recipe_of
from minillm.run.stages import shared, stage_named
from minillm.run.stages.minillm import MiniLLM
from minillm.run.written import Certificate, CertifiedModel, read_certificate
from minillm.train.journal import Journal, Proof

Verdict = Literal["same", "differs", "not checked", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        verdict: `differs` alone makes the verification fail. A `note` says what may explain a difference.
        what: What was looked at.
        why: What differs, or why it was not checked; empty for what is the same.
    """

    verdict: Verdict
    what: str
    why: str = ""


def verify(run_dir: Path, *, again: bool = True) -> Iterator[Finding]:
    """Compare a run with its certificate.

    Args:
        run_dir: The run directory. Its models and data are looked for at the places that the certificate names.
        again: Whether to sample the first batch of the minillm stage and to make its first update again.

    Yields:
        What was found, one thing after another.

    Raises:
        MissingError: `run_dir` has no certificate.
        RunError: The certificate cannot be read.
    """
    file = run_dir / FILE
    if not file.is_file():
        raise MissingError(f"{run_dir}: no {FILE} is there: the report stage writes it (--stage report)")
    found = read_certificate(file)
    yield from _on_paper(run_dir, found)
    journal = [entry for entry in read_journal(run_dir) if entry.get("stage") == "minillm"]
    if not again:
        yield Finding("not checked", "first batch and first update", "not asked for")
    else:
        yield from _made_again(found.recipe.settings, journal, _threads(journal) or found.hardware.threads)


def _on_paper(run_dir: Path, found: Certificate) -> Iterator[Finding]:
    """What is compared without a model."""
    yield _compared("recipe", found.recipe.sha256, hash_of_value(found.recipe.settings))
    stages = read_stages(run_dir)
    for name, entry in found.stages.items():
        yield _compared(f"settings of {name}", entry.settings, hash_of_value(stages.get(name, {}).get("settings", {})))
    for name, data in found.data.items():
        yield _file(f"data.{name}", data.file, data.sha256, data.why)
    for name, sha256 in found.made_files.items():
        yield _file(name, str(run_dir / name), sha256)
    for role, model in found.models.items():
        yield _model(role, model)
    for role in found.changed:
        yield Finding("differs", role, "when the certificate was made")
    if found.pushes.different:
        yield Finding("differs", "weights in the engine", f"{found.pushes.different} times from those it was sent")
    for name, then in found.versions.items():
        if (now := versions().get(name)) != then:
            yield Finding("note", f"version of {name}", f"{then} then, {now} now")
    if found.code != hash_of_code():
        yield Finding("note", "source code of minillm", "is not what made the certificate")


def _model(role: str, model: CertifiedModel) -> Finding:
    """Compare the files of a model, and name those that differ."""
    if model.sha256 is None:
        return Finding("not checked", role, model.why)
    try:
        there, then = model_files(model.source), model.files
    except MissingError as error:
        return Finding("differs", role, str(error))
    if not there:
        return Finding("differs", role, f"{model.source} is gone")
    try:
        now = {name: hash_of(file) for name, file in there.items()}
    except OSError as error:
        return Finding("not checked", role, f"{model.source} cannot be read ({error.strerror})")
    wrong = [
        f"{name} is {'gone' if name not in now else 'new' if name not in then else 'another'}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    return Finding("differs", role, f"{model.source}: {', '.join(wrong)}") if wrong else Finding("same", role)


def _file(what: str, file: str | None, sha256: str | None, why: str = "") -> Finding:
    if file is None or sha256 is None:
        return Finding("not checked", what, why)
    if not os.path.isfile(file):
        return Finding("differs", what, f"{file} is gone")
    try:
        return _compared(what, sha256, hash_of(Path(file)))
    except OSError as error:
        return Finding("not checked", what, f"{file} cannot be read ({error.strerror})")


def _compared(what: str, then: str | None, now: str | None) -> Finding:
    return Finding("same", what) if then == now else Finding("differs", what, f"{then} then, {now} now")


class _StopAfterOne(TrainerCallback):
    """Ends a training after its first update, without a checkpoint and without a validation."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop, control.should_save, control.should_evaluate = True, False, False
        return control


def _made_again(settings: dict[str, Any], journal: list[Any], threads: int) -> Iterator[Finding]:
    """Sample the first batch and make the first update again, from the warmed-up student."""
    both = "first batch and first update"
    batch, update = (_first(journal, kind) for kind in ("batch", "update"))
    if batch is None or update is None:
        yield Finding("not checked", both, "the journal of the minillm stage has none")
        return
    if any(entry.get("process") for entry in journal):
        yield Finding("not checked", both, "they were made by several processes")
        return
    stage = stage_named("minillm")
    assert isinstance(stage, MiniLLM)
    try:
        run = Run(recipe_of(settings, FILE))
        with tempfile.TemporaryDirectory() as spare:
            found = _first_update(run, stage, Path(spare), threads)
    except MinillmError as error:
        yield Finding("not checked", both, str(error))
        return
    for what, kind, then, key in (
        ("tokens of the first batch", "batch", batch, "tokens"),
        ("log-probabilities of the first batch", "batch", batch, "logprobs"),
        ("weights after the first update", "update", update, "weights"),
    ):
        yield _compared(what, then.get(key), (_first(found, kind) or {}).get(key))


def _first_update(run: Run, stage: MiniLLM, folder: Path, threads: int) -> list[Any]:
    """Return the journal of a training of one update; nothing is written to the run directory."""
    arguments = shared.training_arguments(run, stage)
    arguments.output_dir = str(folder / "work")
    trainer = stage.trainer(run, arguments)
    trainer.journal, trainer.fault_folder = Journal(folder / JOURNAL, stage.name), folder / "faults"
    trainer.on_fault = run.recipe.on_fault
    trainer.add_callback(Proof(trainer))
    trainer.add_callback(_StopAfterOne())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        trainer.train()
    finally:
        trainer.close()
        torch.set_num_threads(before)
    return read_journal(folder)


def _threads(journal: list[Any]) -> int:
    """The threads that PyTorch used when the training of a journal began; 0 if it does not say."""
    machine = next((entry.get("machine") for entry in reversed(journal) if entry["kind"] == "begin"), None)
    threads = machine.get("threads") if isinstance(machine, dict) else None
    return threads if isinstance(threads, int) else 0


def _first(journal: Iterable[Any], kind: str) -> Any:
    """The first entry of a kind of the training that the stage ended with."""
    found = None
    for entry in journal:
        if entry.get("kind") == "begin":
            found = None  # the stage was made again
        elif entry.get("kind") == kind and found is None:
            found = entry
    return found
