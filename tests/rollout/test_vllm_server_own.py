"""The server that a run starts itself: what it refuses before anything loads, and the folder of its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from minillm.errors import EngineError
from minillm.models import load
from minillm.models.load import load_model
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines import choose, server
from minillm.rollout.engines import vllm as vllm_engine
from minillm.rollout.engines.base import EngineSizing
from minillm.run import runner
from minillm.run.recipe_file import load_recipe
from minillm.teacher.local import LocalTeacher
from tests.conftest import save, tiny_llama
from tests.loopback import short_backoff  # noqa: F401
from tests.rollout.test_vllm_server_pair import FakePair
from tests.run.tiny_recipe import RECIPE

AUTO = RolloutConfig(engine="server", servers="auto", server_patience=2)
SIZING = EngineSizing(64, torch.float32)


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is there, in its build for CPUs."""
    monkeypatch.setattr(vllm_engine, "vllm_is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def pair() -> Iterator[FakePair]:
    started = FakePair()
    yield started
    started.close()


def gpt2() -> Any:
    """A model whose heads are too small for vLLM on a CPU."""
    config = GPT2Config(vocab_size=32, n_positions=64, n_embd=64, n_layer=4, n_head=4, eos_token_id=1, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config)


def quantised() -> Any:
    model = tiny_llama(2)
    setattr(model.config, "quantization_config", {"load_in_4bit": True})  # noqa: B010
    return model


REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "a quantised teacher": (quantised, "a quantised teacher cannot be mixed in by vLLM.*: set rollout.engine=auto"),
    "small heads": (gpt2, r"vLLM on a CPU has no attention for heads of 16 .*: set rollout.engine=auto"),
}


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.usefixtures("on_a_cpu")
def test_a_teacher_that_the_server_cannot_hold_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(server, "start_for_all", lambda *_: pytest.fail("a server was started"))
    make, message = REFUSALS[kind]
    teacher, student = LocalTeacher(make()), tiny_llama(1)
    message = "rollout.servers: auto starts a vLLM server, and " + message
    with pytest.raises(EngineError, match=message):
        choose.make_engine(AUTO, tmp_path, SIZING, model=student, teacher=teacher, work=tmp_path)
    with pytest.raises(EngineError, match=message):
        choose.check_student_engine(AUTO, student.config, teacher.model.config)
    assert not list(tmp_path.iterdir())
    elsewhere = RolloutConfig(engine="server", servers=["http://127.0.0.1:9"])
    choose.check_student_engine(elsewhere, student.config, teacher.model.config)
    choose.check_student_engine(AUTO, student.config)


def test_a_server_without_vllm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "vllm_is_installed", lambda: False)
    message = r"auto starts a vLLM server, and vLLM is not installed: pip install 'minillm-distill\[vllm\]'"
    with pytest.raises(EngineError, match=message):
        choose.check_student_engine(AUTO)
    with pytest.raises(EngineError, match=message):
        choose.make_engine(AUTO, tmp_path, SIZING, model=tiny_llama(1), work=tmp_path)


@pytest.mark.parametrize("mix", [0.2, 0.0])
@pytest.mark.usefixtures("on_a_cpu")
def test_a_recipe_is_refused_before_its_weights_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mix: float
) -> None:
    """For its student too, without a teacher beside it."""
    data, file = tmp_path / "prompts.jsonl", tmp_path / "recipe.yaml"
    data.write_text("".join(f'{{"instruction": "w{i} w{i + 3}"}}\n' for i in range(10)))
    file.write_text(RECIPE.format(run=tmp_path / "run", data=data, teacher=save(gpt2(), tmp_path / "teacher")))
    monkeypatch.setattr(load, "load_model", lambda *_: pytest.fail("weights were loaded"))
    words = ["rollout.engine=server", "rollout.servers=auto", f"rollout.teacher_mix={mix}"]
    with pytest.raises(EngineError, match="auto starts a vLLM server, and vLLM on a CPU has no attention for heads of"):
        runner.run_recipe(load_recipe(file, words))


def same(folder: Path | str, model: Any) -> bool:
    """Whether a folder holds a model with the weights of `model`."""
    found, wanted = load_model(folder, torch.float32).state_dict(), model.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_teacher_is_saved_anew_and_whole(tmp_path: Path) -> None:
    """A folder that an earlier run has left holds another teacher, or half of one."""
    spare, part = tmp_path / "server-teacher", tmp_path / "server-teacher.part"
    for seed in (1, 2):
        part.mkdir()
        (part / "pytorch_model.bin").write_bytes(b"half")
        teacher = LocalTeacher(tiny_llama(seed))
        assert teacher.folder(spare) == str(spare)
        assert same(spare, teacher.model)
        assert [path.name for path in tmp_path.iterdir()] == ["server-teacher"]
        assert not (spare / "pytorch_model.bin").exists()


def test_one_process_saves_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is visible under its name only when it is whole, because that process starts the server."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    teacher, spare = LocalTeacher(tiny_llama(1)), tmp_path / "server-teacher"
    for rank, saved in ((1, False), (0, True)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        assert teacher.folder(spare) == str(spare)
        assert spare.is_dir() == saved
    assert same(spare, teacher.model)


def test_a_gguf_file_is_no_folder_for_another_process(tmp_path: Path) -> None:
    file = tmp_path / "teacher.gguf"
    file.touch()
    teacher = LocalTeacher(tiny_llama(1), source=str(file))
    assert teacher.folder(tmp_path / "saved") == str(tmp_path / "saved")
    assert same(tmp_path / "saved", teacher.model)
    for source in (str(tmp_path), "org/teacher"):
        assert LocalTeacher(tiny_llama(1), source=source).folder(tmp_path / "none") == source
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.usefixtures("on_a_cpu")
def test_the_saved_teacher_is_deleted_once_the_server_has_loaded_it(
    pair: FakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    work, own = tmp_path / "work", save(tiny_llama(3), tmp_path / "own")
    given: list[str] = []
    stopped: list[bool] = []

    def start(folder: Any, log: Any, sizing: Any, teacher: str) -> tuple[str, Any]:
        given.append(teacher)
        assert (Path(teacher) / "model.safetensors").is_file()
        return pair.url, SimpleNamespace(stop=lambda: stopped.append(True), exit_reason=lambda: None)

    monkeypatch.setattr(server, "start_for_all", start)
    for source in (None, own):
        teacher = LocalTeacher(tiny_llama(3), source=source)
        pair.start_faults = [lambda handler, _: handler.say(404, {})] if fails else []
        if fails:
            with pytest.raises(EngineError, match="holds no teacher"):
                choose.make_engine(AUTO, own, SIZING, model=tiny_llama(1), teacher=teacher, work=work)
        else:
            choose.make_engine(AUTO, own, SIZING, model=tiny_llama(1), teacher=teacher, work=work).close()
        assert given.pop() == (source or str(work / "server-teacher"))
        assert not (work / "server-teacher").exists()
        assert stopped.pop()
    assert (Path(own) / "model.safetensors").is_file()
