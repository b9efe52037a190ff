"""Samples of rollouts that a training logs: against an independent forward, after a resume, and to trackers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minillm.models.load import load_model, load_tokenizer
from minillm.train.on_policy import MiniLLMTrainer
from minillm.train.samples import SampleLog, drop_later_lines, tell_trackers, token_texts
from tests.run.tensorboard_events import read_events
from tests.train.common import PROMPTS, ROLLOUT, arguments


def logged(pair: tuple[str, str], folder: Path, **changes: Any) -> tuple[MiniLLMTrainer, list[dict[str, Any]]]:
    trainer = MiniLLMTrainer(*pair, arguments(folder, **changes), rollout=ROLLOUT, train_dataset=PROMPTS)
    trainer.add_callback(SampleLog(trainer, folder / "samples.jsonl", every=2))
    trainer.train()
    return trainer, [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_a_line_says_of_each_token_what_an_independent_forward_does(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer, lines = logged(pair, tmp_path, max_steps=1)
    student, teacher = (load_model(folder, torch.float32) for folder in pair)
    trained = [rollout for rollout in trainer.rollouts if rollout.advantage is not None]
    assert len(lines) == len(trained) == 4
    for line, rollout in zip(lines, trained, strict=True):
        ids, start = torch.tensor([rollout.prompt_ids + rollout.response_ids]), len(rollout.prompt_ids) - 1
        with torch.no_grad():
            logq, logp = (torch.log_softmax(model(ids).logits[0, start:-1], -1) for model in (student, teacher))
        kl = (logq.exp() * (logq - logp)).sum(-1)
        chosen = torch.tensor(rollout.response_ids)[:, None]
        q, p = (values.gather(1, chosen)[:, 0].exp() for values in (logq, logp))
        alpha = ROLLOUT.teacher_mix
        assert line["kl"] == pytest.approx(kl.tolist(), abs=1e-3)
        assert line["teacher_share"] == pytest.approx((alpha * p / (alpha * p + (1 - alpha) * q)).tolist(), abs=1e-3)
        assert line["prompt"] == PROMPTS[line["row"]]["prompt"]
        assert "".join(line["tokens"]) == trainer.student_tokenizer.decode(rollout.response_ids)
        assert (line["update"], line["length"]) == (1, len(rollout.response_ids))
    of_all = [value for line in lines for value in line["advantage"]]
    assert sum(of_all) / len(of_all) == pytest.approx(trainer.state.log_history[0]["advantage"], abs=1e-3)


def test_samples_are_logged_every_so_many_updates_and_again_after_a_resume(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    _, lines = logged(pair, tmp_path, max_steps=4)
    assert [line["update"] for line in lines[::4]] == [1, 2, 4]
    file = tmp_path / "samples.jsonl"
    file.write_text(file.read_text() + '{"update": 4, "cut')
    drop_later_lines(file, "update", 2)
    assert [json.loads(line)["update"] for line in file.read_text().splitlines()] == [1] * 4 + [2] * 4
    logged(pair, tmp_path, max_steps=1)  # a training that starts anew drops them all
    assert len(file.read_text().splitlines()) == 4


def test_a_character_of_several_tokens_belongs_to_the_last() -> None:
    class Bytes:
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode(errors="replace")

    assert token_texts(Bytes(), list("aé!".encode())) == ["a", "", "é", "!"]
    assert token_texts(Bytes(), list("é".encode()[:1])) == ["\ufffd"]


def test_a_tokens_text_has_the_space_before_it(pair: tuple[str, str]) -> None:
    tokenizer = load_tokenizer(pair[0])
    ids = tokenizer.encode("w1 w2 w3")
    assert token_texts(tokenizer, ids)[-2:] == [" w2", " w3"]


LINE = {"prompt": "a | b", "tokens": ["c", "\nd"], "kl": [1.0, 2.0], "advantage": [0.0, 1.0], "teacher_share": None}


def test_trackers_get_a_table(caplog: pytest.LogCaptureFixture) -> None:
    written: list[Any] = []

    class TensorBoardCallback:
        tb_writer = SimpleNamespace(add_text=lambda *given: written.append(given))

    class TrackioCallback:  # without trackio, it fails, and training goes on
        pass

    handler = SimpleNamespace(callbacks=[TensorBoardCallback(), TrackioCallback()])
    for _ in range(2):
        tell_trackers(SimpleNamespace(callback_handler=handler), [LINE], 7)
    name, text, step = written[0]
    assert (name, step) == ("samples", 7)
    assert text.splitlines()[2] == "| a \\| b | c d | 1.50 | 0.50 |  |"
    assert sum("TrackioCallback takes no table" in record.message for record in caplog.records) == 1


def test_tensorboard_reads_what_was_logged(pair: tuple[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    """With the real TensorBoard, where it is installed."""
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer, lines = logged(pair, tmp_path, max_steps=3, report_to="tensorboard")
    scalars, texts = read_events(tmp_path / "board")
    for key in ("loss", "reverse_kl", "advantage", "response_length", "finished"):
        wanted = [(entry["step"], pytest.approx(entry[key], rel=1e-5)) for entry in trainer.state.log_history[:3]]
        assert scalars[f"train/{key}"] == wanted
    tables = dict(texts["samples/text_summary"])
    assert list(tables) == [1, 2]
    for line in lines:
        answer = "".join(line["tokens"])
        kl = sum(line["kl"]) / len(line["kl"])
        assert f"| {line['prompt']} | {answer} | {kl:.2f} |" in tables[line["update"]]


def test_trackio_takes_metrics_and_samples(pair: tuple[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    """With the real trackio, where it is installed."""
    trackio = pytest.importorskip("trackio")
    told: list[str] = []
    original = trackio.log
    monkeypatch.setattr(trackio, "log", lambda given, **rest: (told.extend(given), original(given, **rest)))
    logged(pair, tmp_path, max_steps=1, report_to="trackio", project="minillm-test")
    assert "samples" in told
