"""What `minillm plan --calibrate` measures, keeps and uses again, and what it does not use."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from minillm.cli import app
from minillm.errors import InputError
from minillm.run.plan import calibrate
from minillm.run.plan.calibration import Calibration, Measured, find_calibration, folder
from minillm.run.plan.machine import Machine, machine_for
from minillm.run.plan.phases import plan
from tests.run.plans import on_disk, phase, recipe

FOUND = Calibration(flops=4e11, float32=1e11, bandwidth=2e10, utilisation=0.3, date="2026-11-29")
TINY = calibrate._Sizes(hidden=64, inner=128, layers=2, heads=(2, 1), vocab=64, prompts=2, tokens=4)  # pyright: ignore


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration that takes a second."""
    monkeypatch.setattr(calibrate, "_ON_CPU", TINY)
    monkeypatch.setattr(calibrate, "_SECONDS", 0.05)


@pytest.mark.usefixtures("small")
def test_a_plan_uses_what_was_measured(tmp_path: Path) -> None:
    run = CliRunner()
    done = run.invoke(app, ["plan", "--calibrate", "--gpus", "0"])
    assert done.exit_code == 0, done.output
    of = Measured.here(gpu=False)
    found, unused = find_calibration(of)
    assert found is not None
    assert not unused
    assert str(of.file) in done.output
    assert f"{found.flops:.2e} operations a second" in done.output
    assert 0 < found.utilisation < 1
    shown = run.invoke(app, ["plan", str(on_disk(tmp_path)), "--gpus", "0"])
    assert f"as calibrated on {found.date}" in shown.output
    assert f"at {found.utilisation:.0%} of {found.flops:.0e}" in shown.output
    both = run.invoke(app, ["plan", str(on_disk(tmp_path)), "--gpus", "0", "--calibrate"])
    assert both.output.startswith("calibrated ")
    assert "as calibrated on" in both.output


def test_numbers_of_a_calibration_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    FOUND.save(Measured.here(gpu=False))
    machine, said = machine_for(gpus=0)
    assert (machine.flops, machine.float32) == (4e11, 1e11)
    assert (machine.bandwidth, machine.utilisation) == (2e10, 0.3)
    assert "as calibrated on 2026-11-29" in said
    assert machine_for(gpus=0, utilisation=0.5)[0].utilisation == 0.5
    given, said = machine_for(gpus=0, flops=7e11)  # then the plan is for another machine
    assert (given.flops, given.utilisation) == (7e11, 0.6)
    assert "as given" in said
    card = SimpleNamespace(name="NVIDIA H200", total_memory=1 << 37, major=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    machine, said = machine_for()
    assert machine.flops == 989e12
    assert "the maker's numbers for NVIDIA H200, which is here; the calibration in " in said
    replace(FOUND, flops=7e14).save(Measured.here(gpu=True))
    machine, said = machine_for()
    assert (machine.processes, machine.flops, machine.utilisation) == (2, 7e14, 0.3)
    assert said.startswith("NVIDIA H200, which is here, as calibrated on 2026-11-29")


@pytest.mark.parametrize("change", [{"device": "Another"}, {"threads": 77}, {"torch": "1.0"}, {"minillm": "0.0.1"}])
def test_a_calibration_of_another_machine_or_version_is_not_used(change: dict[str, Any]) -> None:
    of = Measured.here(gpu=False)
    other = FOUND.save(replace(of, **change))
    found, unused = find_calibration(of)
    assert found is None
    assert str(other) in unused
    assert "another machine or version" in unused
    machine, said = machine_for(gpus=0)
    assert machine.utilisation == 0.6
    assert "as measured just now; the calibration in" in said
    # Nor if it was copied to the place of this machine's own.
    of.file.write_text(other.read_text(encoding="utf-8"), encoding="utf-8")
    found, unused = find_calibration(of)
    assert found is None
    assert f"{of.file} is not used, because it is of another machine or version" in unused
    FOUND.save(of)
    assert find_calibration(of) == (FOUND, "")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "it cannot be read"),
        ('{"of": {"dev', "it cannot be read"),
        ("[1]", "it cannot be read"),
        ("{}", "it cannot be read"),
        ('{"of": {}, "measured": {"flops": 1.0}}', "it cannot be read"),
        ({"flops": "fast"}, "its numbers are not speeds"),
        ({"utilisation": 0.0}, "its numbers are not speeds"),
        ({"bandwidth": None}, "its numbers are not speeds"),
    ],
)
def test_a_broken_file_is_not_used(content: Any, reason: str) -> None:
    of = Measured.here(gpu=False)
    FOUND.save(of)
    if isinstance(content, dict):
        content = json.dumps({"of": asdict(of), "measured": asdict(FOUND) | content})
    of.file.write_text(content, encoding="utf-8")
    found, unused = find_calibration(of)
    assert found is None
    assert f"because {reason}" in unused
    assert "as measured just now; the calibration in" in machine_for(gpus=0)[1]


@pytest.mark.usefixtures("small")
def test_an_interrupted_calibration_leaves_the_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    of = Measured.here(gpu=False)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    for earlier in (None, FOUND):
        if earlier is not None:
            earlier.save(of)
        with monkeypatch.context() as patched:
            patched.setattr(calibrate, "_update_speed", stop)
            with pytest.raises(KeyboardInterrupt):
                calibrate.calibrate(gpu=False)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", stop)  # the file is written, and not yet in its place
            with pytest.raises(KeyboardInterrupt):
                calibrate.calibrate(gpu=False)
        assert find_calibration(of) == (earlier, "")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("load", "said"), [(0.1, False), (64.0, True)])
def test_a_busy_processor_is_said(load: float, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    assert ("calibrate again when nothing else runs" in calibrate.calibrate(gpu=False)) == said


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot be kept.*XDG_CACHE_HOME"):
        FOUND.save(Measured.here(gpu=False))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert folder() == Path.home() / ".cache" / "minillm"


def test_what_the_command_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="a recipe is needed"):
        CliRunner().invoke(app, ["plan"], catch_exceptions=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no GPU here"):
        calibrate.calibrate(gpu=True)


def test_a_teacher_that_is_mixed_in_decodes_what_is_sampled(tmp_path: Path) -> None:
    def rollouts(machine: Machine, **changes: Any) -> Any:
        rollout, objective = {"num_rollouts": 64, **changes}, {"baseline": "none"}
        return phase(plan(recipe(tmp_path, rollout=rollout, objective=objective), machine), "rollouts")

    slow = Machine(gpu=False, flops=1e30, bandwidth=1e9)  # bound by what it reads
    alone, mixed = (rollouts(slow, teacher_mix=mix) for mix in (0, 0.2))
    assert mixed.seconds > 2 * alone.seconds
    assert mixed.flops == pytest.approx(alone.flops, rel=0.02)  # decoding replaces the forward pass of scoring
    served = rollouts(slow, teacher_mix=0.2, engine="server", servers=["http://x:1"])
    assert served.flops > 1.5 * mixed.flops  # the trainer's teacher scores what servers have sampled
