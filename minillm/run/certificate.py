"""The certificate of a run: what it was made of, where and how, and everything that happened to it.

`certificate.json` is written with the report. It is derived from the run directory: from `state.json`, the logs, the
journal that every stage appends to, and the files of data and models, which are hashed. `minillm verify` compares it
with what is there now.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import minillm
from minillm.data.config import Source
from minillm.data.files import write_json
from minillm.distribution import versions
from minillm.errors import RunError
from minillm.evaluation.report.html import block, heading, note, table, text_cell
from minillm.models.hardware import machine_facts
from minillm.models.load import resolve_cached
from minillm.models.sources import find_gguf
from minillm.redaction import redacted
from minillm.run.directory import absolute_paths
from minillm.run.progress import JOURNAL, read_log, read_stages
from minillm.run.stages import STAGES
from minillm.run.written import Certificate, Event, read_certificate, read_lines, those_that_are
from minillm.teacher.config import teacher_label

if TYPE_CHECKING:
    from minillm.run.context import Run
    from minillm.run.recipe import Recipe
    from minillm.train.journal import Journal

FILE = "certificate.json"
_FORMAT = 1
# Of a model's folder: what decides what it computes. Model cards and logs are written again.
_OF_A_MODEL = (
    "*.safetensors",
    "*.bin",
    "*.gguf",
    "*config.json",
    "*.index.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
)
_NOT_OF_A_MODEL = ("training_args.bin",)
_EVENTS = ("resume", "skip", "stop", "alarm")
_LISTED = 1000  # events
_MADE = ("responses.jsonl", "results.json")
_NOT_PROVED = (
    "The sums of pushed weights are no cryptographic hashes: they find damage and mix-ups, not forgery.",
    "A server is not asked which weights it holds, only whether its process is still the one that loaded them.",
    "Data sets from a hub are named by revision and not hashed.",
    "On a GPU, and with another number of threads or other versions, kernels may round otherwise: the first batch and "
    "update that are made again then differ, and so would the whole run.",
)


def hash_of(file: Path) -> str:
    """The SHA-256 of a file, which is read in pieces."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def hash_of_value(value: Any) -> str:
    """The SHA-256 of what JSON can hold, in a form that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()


def hash_of_code() -> str:
    """The SHA-256 of this library's source files."""
    root = Path(minillm.__file__).parent
    files = {file.relative_to(root).as_posix(): hash_of(file) for file in sorted(root.rglob("*.py"))}
    return hash_of_value(files)


def model_files(source: str) -> dict[str, Path]:
    """The files of a model that decide what it computes, by name; none if it is not on this machine."""
    gguf = find_gguf(source)
    if gguf is not None:
        return {gguf.name: gguf}
    folder = Path(resolve_cached(source))
    found = {file.name: file for pattern in _OF_A_MODEL for file in folder.glob(pattern) if file.is_file()}
    return {name: found[name] for name in sorted(found) if name not in _NOT_OF_A_MODEL}


class _Hashes:
    """Hashes files once: those of a certificate hold while their sizes and times of change are the same."""

    def __init__(self, before: Mapping[str, Any]) -> None:
        self._before = before
        self.all: dict[str, Any] = {}

    def __call__(self, file: Path) -> str:
        path, status = str(file.absolute()), file.stat()
        facts = {"bytes": status.st_size, "changed": status.st_mtime_ns}
        kept = self.all.get(path) or self._before.get(path, {})
        known = kept.get("sha256") if facts.items() <= kept.items() else None
        self.all[path] = facts | {"sha256": known or hash_of(file)}
        return self.all[path]["sha256"]

    def of_model(self, source: str) -> dict[str, Any]:
        files = {name: self(file) for name, file in model_files(source).items()}
        if not files:
            return {"source": source, "why": "not on this machine"}
        return {"source": source, "sha256": hash_of_value(files), "files": files}


def models_of(run: Run) -> dict[str, str]:
    """The sources of the run's models: every teacher, the student before training, and after each stage that trains."""
    roles = {teacher_label(name): source for name, source in run.teachers.items()}
    if run.untuned != run.teacher:
        roles["teacher before finetune"] = run.untuned
    roles["student before"] = run.start
    return roles | {
        f"student after {stage}": folder for stage, folder in run.trained().items() if Path(folder).is_dir()
    }


def note_inputs(run: Run, stage: str, journal: Journal) -> threading.Thread:
    """Write the hashes of the models that a stage begins with to the journal, beside the training.

    Returns:
        The thread that does it.
    """
    own = run.trained().get(stage)

    def work() -> None:
        hashes = _Hashes({})
        roles = {role: source for role, source in models_of(run).items() if source != own}
        with suppress(OSError):  # a folder that is gone is told of by whoever reads it
            found = {role: hashes.of_model(source).get("sha256") for role, source in roles.items()}
            journal.write("inputs", models=found)

    thread = threading.Thread(target=work, name="hashes", daemon=True)
    thread.start()
    return thread


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe as a certificate holds them: paths are absolute, and secrets are hidden."""
    tree = absolute_paths(recipe)
    if "max_prompt_tokens" not in recipe.rollout.model_fields_set:
        del tree["rollout"]["max_prompt_tokens"]  # data.max_prompt_tokens is the limit of every stage
    return redacted(tree)


def write_certificate(run: Run) -> Path:
    """Write `certificate.json` of a run from what its directory holds.

    Returns:
        Its path.
    """
    file, stages, journal = run.dir / FILE, read_stages(run.dir), read_journal(run.dir)
    hashes, settings = _Hashes(_hashed_before(file)), settings_of(run.recipe)
    inputs = [entry for entry in journal if entry.get("kind") == "inputs"]
    models = {role: hashes.of_model(source) for role, source in models_of(run).items()}
    certificate = {
        "format": _FORMAT,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": run.dir.absolute().name,
        "versions": versions(),
        "code": hash_of_code(),
        "hardware": machine_facts(),
        "seeds": {"seed": run.recipe.seed, "evaluate": list(run.recipe.evaluate.seeds)},
        "recipe": {"sha256": hash_of_value(settings), "settings": settings},
        "data": {name: _data(source, hashes) for name, source in _sources(run.recipe)},
        "models": models,
        "changed": _changed(models, inputs),
        "made_files": {name: hashes(run.dir / name) for name in _MADE if (run.dir / name).is_file()},
        "stages": {name: _stage(entry) for name, entry in stages.items()},
        "engine_mismatch": _mismatches(run.dir, stages),
        "pushes": pushes(journal),
        "batches": sum(entry.get("kind") == "batch" for entry in journal),
        "events": dict(Counter(entry["kind"] for entry in journal if entry.get("kind") in _EVENTS)),
        "listed_events": [entry for entry in journal if entry.get("kind") in _EVENTS][:_LISTED],
        "not_proved": list(_NOT_PROVED),
        "hashed": hashes.all,
    }
    write_json(file, redacted(certificate))
    return file


def read_journal(run_dir: Path) -> list[dict[str, Any]]:
    """The entries of a run's journal that can be read."""
    return those_that_are(Event, read_lines(run_dir / JOURNAL))


def _hashed_before(file: Path) -> dict[str, Any]:
    """The hashes in a certificate that is replaced; none if it cannot be read."""
    try:
        return read_certificate(file).hashed if file.is_file() else {}
    except RunError:
        return {}


def _sources(recipe: Recipe) -> Iterable[tuple[str, Source | Path]]:
    yield from ((name, value) for name, value in recipe.data if isinstance(value, Source))
    if recipe.data.template.endswith(".jinja"):
        yield "template", Path(recipe.data.template)
    if recipe.responses.file is not None:
        yield "responses", Path(recipe.responses.file)


def _data(source: Source | Path, hashes: _Hashes) -> dict[str, Any]:
    file = source if isinstance(source, Path) else source.file
    if file is None and isinstance(source, Source):
        return {"dataset": source.name, "revision": source.revision, "split": source.split, "why": "not hashed"}
    assert file is not None
    return {"file": str(file.absolute()), "bytes": file.stat().st_size, "sha256": hashes(file)}


def _changed(models: Mapping[str, Any], inputs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The models that are no longer what they were when a stage last began, or went on, with them."""
    latest = {str(entry.get("stage")): entry for entry in inputs}
    return sorted(
        {
            f"{role}, since stage {stage} began"
            for stage, entry in latest.items()
            for role, sha256 in entry.get("models", {}).items()
            if sha256
            and role in models
            and models[role].get("sha256") not in (None, sha256)
            # A stage that is made again changes what earlier stages had begun with.
            and not role.startswith("student after")
        }
    )


def _stage(entry: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("finished", "seconds", "processes", "versions")
    return {name: entry[name] for name in kept if name in entry} | {
        "settings": hash_of_value(entry.get("settings", {}))
    }


def _mismatches(run_dir: Path, stages: dict[str, Any]) -> dict[str, float]:
    """The largest difference between engine and trainer that each stage has logged, in nats per token."""
    found = {}
    for stage in STAGES:
        if stage.training and stage.name in stages:
            logged = [entry.get("engine_mismatch") for entry in read_log(run_dir, stage, stages)]
            values = [value for value in logged if value is not None]
            found |= {stage.name: max(values)} if values else {}
    return found


def pushes(journal: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Count the weights that were sent to engines, and what is known of their arrival."""
    found = [entry for entry in journal if entry.get("kind") == "push"]
    return {
        "all": len(found),
        "same_on_both_sides": sum(entry.get("same") is True for entry in found),
        "different": sum(entry.get("same") is False for entry in found),
        "not_compared": dict(Counter(entry.get("why", "") for entry in found if entry.get("same") is None)),
    }


def certificate_section(run_dir: Path) -> str:
    """The part of a run's report that tells what was recorded of it; empty without certificate and journal."""
    file = run_dir / FILE
    events = [entry for entry in read_journal(run_dir) if entry["kind"] in _EVENTS]
    if not file.is_file() and not events:
        return ""
    out = heading("Certificate")
    if file.is_file():
        out += table(["what", ""], [[text_cell(name), text_cell(told)] for name, told in _told(read_certificate(file))])
        out += note(f"`minillm verify {run_dir.name}` compares {FILE} with what is there, and makes one update again.")
    rows = [
        (f"{entry['kind']}, stage {entry.get('stage')}, update {entry.get('update', 0)}", _what(entry))
        for entry in events[-_LISTED:]
    ]
    title = f"{len(rows)} restarts, refused updates and alarms"
    return out + block("settings", title=title, explained="", rows=rows) if rows else out


def _told(found: Certificate) -> Iterable[tuple[str, str]]:
    hardware, sent = found.hardware, found.pushes
    yield "recipe", found.recipe.sha256
    yield "code", f"minillm {found.versions.get('minillm')}, {found.code}"
    yield "hardware", f"{'; '.join(hardware.gpus) or hardware.processor}, {hardware.threads} threads"
    yield "seed", str(found.seeds.seed)
    for name, data in found.data.items():
        yield f"data.{name}", data.sha256 or data.why
    for role, model in found.models.items():
        yield role, f"{model.source}: {model.sha256 or model.why}"
    compared = f"{sent.same_on_both_sides} the same on both sides, {sent.different} different"
    why = "".join(f", {count} not compared ({reason})" for reason, count in sent.not_compared.items())
    yield "weights sent to engines", f"{sent.all}: {compared}{why}"
    for stage, value in found.engine_mismatch.items():
        yield f"engine against trainer, {stage}", f"at most {value:.2g} nats a token"
    yield "changed since it was used", "; ".join(found.changed) or "nothing"
    yield "events", ", ".join(f"{count} {kind}" for kind, count in found.events.items()) or "none"


def _what(entry: Mapping[str, Any]) -> str:
    what = entry.get("what", "")
    return "; ".join(what) if isinstance(what, list) else str(what)
