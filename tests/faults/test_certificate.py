"""A run can prove what it was: its certificate, and `minillm verify`, which derives it again and says what differs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner

from minillm.cli import app
from minillm.data.files import read_json, write_json
from minillm.errors import MissingError, RunError
from minillm.models import fingerprint
from minillm.models.fingerprint import Fingerprint, bit_sum
from minillm.models.weights import plain_weights
from minillm.rollout.engines.choose import sync_weights
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.run import certificate
from minillm.run.certificate import FILE, write_certificate
from minillm.run.context import Run
from minillm.run.progress import JOURNAL
from minillm.run.recipe_file import load_recipe
from minillm.run.report import write_run_report
from minillm.run.verification import Verdict, verify
from minillm.train.journal import Journal, Proof
from tests.conftest import save, tiny_llama
from tests.run.tiny_recipe import run_tiny_recipe
from tests.train.common import PROMPTS, ROLLOUT, OwnEngine, arguments, stop_after
from tests.train.test_finite import make

VERDICTS = get_args(Verdict)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe and of its finished run."""
    root = tmp_path_factory.mktemp("run")
    save(tiny_llama(2, layers=3), root / "teacher")
    run_tiny_recipe(root, str(root / "teacher"))
    return root


@pytest.fixture
def run(finished: Path) -> Any:
    """The run directory, which is as it was after each test. Certificates name places, so it is not copied elsewhere."""
    kept = finished.with_name(finished.name + "-kept")
    shutil.copytree(finished, kept)
    yield finished / "run"
    shutil.rmtree(finished)
    kept.rename(finished)


def journal(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / JOURNAL).read_text().splitlines()]


def test_a_run_that_nobody_touched_is_verified(run: Path) -> None:
    found = read_json(run / FILE)
    assert set(found["models"]) == {"teacher", "student before", "student after warmup", "student after minillm"}
    assert all(len(model["sha256"]) == 64 for model in found["models"].values())
    assert set(found["data"]) == {"train", "heldout"}
    assert found["changed"] == []
    assert found["seeds"] == {"seed": 0, "evaluate": [1, 2]}
    assert found["pushes"]["all"] == found["pushes"]["not_compared"]["it samples the trained weights themselves"] > 0
    assert 0 <= found["engine_mismatch"]["minillm"] < 1e-3
    kinds = [entry["kind"] for entry in journal(run) if entry["stage"] == "minillm"]
    assert {"begin", "inputs", "push", "batch", "update"} <= set(kinds)
    result = CliRunner().invoke(app, ["verify", str(run)])
    assert result.exit_code == 0, result.output
    # Where standard output is no real one, the libraries that train write between the lines.
    lines = [line for line in result.stdout.splitlines() if line.startswith(VERDICTS)]
    assert all(line.startswith("same") for line in lines), result.output
    for what in (
        "recipe",
        "data.train",
        "teacher",
        "student after minillm",
        "tokens of the first batch",
        "weights after",
    ):
        assert any(what in line for line in lines), what
    page = (run / "report.html").read_text()
    assert "<h2>Certificate" in page
    assert found["models"]["teacher"]["sha256"] in page


def flip(file: Path, at: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def edit(file: Path, change: Callable[[Any], object]) -> None:
    found = read_json(file)
    change(found)
    write_json(file, found)


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (
        lambda run: flip(run / "student" / "model.safetensors"),
        "student after minillm: .*model.safetensors is",
    ),
    "a tokenizer": (
        lambda run: flip(run.parent / "teacher" / "tokenizer.json"),
        "teacher: .*tokenizer.json is another",
    ),
    "a file less": (
        lambda run: (run / "warmed" / "config.json").unlink(),
        "student after warmup: .*config.json is gone",
    ),
    "a file more": (lambda run: (run / "warmed" / "vocab.txt").touch(), "student after warmup: .*vocab.txt is new"),
    "data": (lambda run: (run.parent / "prompts.jsonl").write_text('{"instruction": "w1"}\n'), "data.train: "),
    "no data": (lambda run: (run.parent / "prompts.jsonl").unlink(), "data.heldout: .* is gone"),
    "results": (lambda run: flip(run / "results.json", 10), "results.json: "),
    "the recipe": (lambda run: edit(run / FILE, lambda c: c["recipe"]["settings"].update(seed=9)), "recipe: "),
    "settings of a stage": (
        lambda run: edit(run / "state.json", lambda s: s["stages"]["warmup"]["settings"].update(seed=9)),
        "settings of warmup: ",
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_changed_afterwards_is_named(run: Path, what: str) -> None:
    change, said = TAMPERED[what]
    change(run)
    result = CliRunner().invoke(app, ["verify", str(run), "--files-only"])
    assert result.exit_code == 1, result.output
    differs = [line for line in result.output.splitlines() if line.startswith("differs")]
    assert any(re.search(said, line) for line in differs), result.output
    assert len(differs) <= 2  # train and heldout are one file


def test_a_batch_and_an_update_that_are_made_again_are_compared(run: Path) -> None:
    lines = journal(run)
    for entry in lines:
        if entry["kind"] == "batch":
            entry["tokens"] = "0" * 64
        if entry["kind"] == "update":
            entry["weights"] = "0" * 16
    (run / JOURNAL).write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    there = sorted(run.rglob("*"))
    differs = {found.what for found in verify(run) if found.verdict == "differs"}
    assert differs == {"tokens of the first batch", "weights after the first update"}
    assert sorted(run.rglob("*")) == there, "verifying leaves nothing behind"


def test_a_run_without_a_certificate_and_one_that_cannot_be_read_are_told_of(run: Path) -> None:
    (run / FILE).write_text('{"recipe": 1}')
    with pytest.raises(RunError, match="cannot be read as a certificate"):
        list(verify(run))
    (run / FILE).unlink()
    with pytest.raises(MissingError, match="the report stage writes it"):
        list(verify(run))


def test_files_are_hashed_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    hash_of = certificate.hash_of
    monkeypatch.setattr(certificate, "hash_of", lambda file: hashed.append(file) or hash_of(file))
    monkeypatch.setattr(certificate, "hash_of_code", lambda: "code")
    this = Run(load_recipe(run.parent / "recipe.yaml"))
    before = read_json(run / FILE)
    write_certificate(this)
    assert hashed == []
    flip(run / "student" / "model.safetensors")
    write_certificate(this)
    assert hashed == [(run / "student" / "model.safetensors")]
    after = read_json(run / FILE)
    assert before["models"]["teacher"] == after["models"]["teacher"]
    assert before["models"]["student after minillm"] != after["models"]["student after minillm"]


def test_a_model_that_changed_under_a_run_is_named(run: Path) -> None:
    flip(run.parent / "teacher" / "model.safetensors")
    write_certificate(Run(load_recipe(run.parent / "recipe.yaml")))
    assert read_json(run / FILE)["changed"] == [
        "teacher, since stage minillm began",
        "teacher, since stage warmup began",
    ]


def test_restarts_refusals_and_alarms_are_in_certificate_and_report(run: Path) -> None:
    hostile = "</td><script>alert(1)</script>"
    log = Journal(run / JOURNAL, "minillm")
    before = read_json(run / FILE)["events"]
    log.write("skip", update=3, what=[f"the loss is nan {hostile}"], batch="faults/x.json")
    log.write("alarm", update=4, what="most responses are the same")
    (run / JOURNAL).open("a").write('{"kind": 5}\nno json\n[1]\n')
    write_certificate(Run(load_recipe(run.parent / "recipe.yaml")))
    events = read_json(run / FILE)["events"]
    assert events == before | {"skip": 1, "alarm": before.get("alarm", 0) + 1}
    page = write_run_report(run).read_text()
    assert f"{sum(events.values())} restarts, refused updates and alarms" in page
    assert hostile not in page
    assert "the loss is nan &lt;/td&gt;" in page


def test_a_training_that_goes_on_is_noted(pair: tuple[str, str], tmp_path: Path) -> None:
    for resume in (None, str(tmp_path / "checkpoint-1")):
        trainer = make("supervised", pair, arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=2))
        trainer.journal = Journal(tmp_path / "journal.jsonl", "warmup")
        trainer.add_callback(Proof(trainer))
        stop_after(trainer, None if resume else 1)
        trainer.train(resume_from_checkpoint=resume)
    kinds = [(entry["kind"], entry["update"]) for entry in journal_lines(tmp_path)]
    assert kinds == [("begin", 0), ("update", 1), ("resume", 1)]


def journal_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


class Careless(OwnEngine):
    """An engine that tells which weights it holds, and loses some of the third push."""

    pushed = 0

    def update_weights(self, weights: Any, version: int) -> None:
        self.pushed += 1
        kept = [(name, value) for name, value in weights if self.pushed < 3 or "layers.1" not in name]
        super().update_weights(kept, version)


def test_weights_that_did_not_arrive_are_an_alarm(pair: tuple[str, str], tmp_path: Path) -> None:
    from minillm.train.on_policy import MiniLLMTrainer

    config = ROLLOUT.model_copy(update={"inner_epochs": 1, "teacher_mix": 0.0, "mismatch_limit": 1e3})
    args = arguments(tmp_path, max_steps=6, learning_rate=1e-2)
    trainer = MiniLLMTrainer(*pair, args, rollout=config, train_dataset=PROMPTS, engine=Careless(pair, []))
    trainer.journal = Journal(tmp_path / "journal.jsonl", "minillm")
    trainer.train()
    pushes = [entry for entry in journal_lines(tmp_path) if entry["kind"] == "push"]
    assert [entry["same"] for entry in pushes] == [True, True, False]
    assert pushes[0]["sent"] == pushes[0]["held"]
    assert certificate.pushes(pushes)["different"] == 1
    [alarm] = [
        entry for entry in journal_lines(tmp_path) if entry["kind"] == "alarm" and "holds other" in entry["what"]
    ]
    assert alarm["update"] == 5


def reference(tensors: list[torch.Tensor]) -> int:
    """The same sum, one number after another, in Python's own integers."""
    total = 0
    for tensor in tensors:
        rows = tensor.reshape(-1, tensor.shape[-1])
        bits = rows.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)
        for row in bits.tolist():
            total += sum(value * (2 * i + 1) * 0x9E3779B97F4A7C15 for i, value in enumerate(row))
    return total % (1 << 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_of_weights(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = (torch.randn(5, 7, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    wanted = reference([q])
    assert bit_sum(q) == wanted
    monkeypatch.setattr(fingerprint, "_CHUNK", 8)
    assert bit_sum(q) == wanted
    # Matrices that an engine has joined, and rows of zeros that it has appended.
    assert bit_sum(torch.cat([q, k, torch.zeros(3, 7, dtype=dtype)])) == (bit_sum(q) + bit_sum(k)) % (1 << 64)
    assert bit_sum(q[:, [1, 0, *range(2, 7)]]) != wanted
    changed = q.clone()
    changed.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[4, 6] ^= 1
    assert bit_sum(changed) != wanted
    assert bit_sum(torch.zeros(0, 7)) == 0
    assert bit_sum(torch.tensor(1.0)) == reference([torch.tensor([1.0])])


def test_a_tied_weight_counts_once() -> None:
    model = tiny_llama(1, tied=True)
    once = [value for name, value in model.state_dict().items() if name != "lm_head.weight"]
    assert Fingerprint.of(model, torch.float32).total == f"{reference(once):016x}"
    push = sync_weights(TransformersEngine(tiny_llama(5)), model, torch.float32, 3, "work", prove=True)
    assert push is not None
    assert push.sent == push.held.total == f"{reference(once):016x}"
    assert sync_weights(TransformersEngine(tiny_llama(5)), model, torch.float32, 3, "work") is None
    assert [name for name, _ in plain_weights(model, torch.float32)].count("lm_head.weight") == 1
