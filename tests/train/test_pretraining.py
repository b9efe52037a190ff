"""Pre-training against a teacher, live or on disk: against float64, resumed, and without a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from minillm.data.text import TextBlocks
from minillm.errors import InputError
from minillm.evaluation.language_model import heldout_blocks, score_blocks
from minillm.evaluation.language_model_metrics import text_scores
from minillm.loss.config import DivergenceConfig
from minillm.loss.in_forward import bind_scoring
from minillm.models.load import load_model
from minillm.teacher.config import SamplerConfig
from minillm.teacher.local import LocalTeacher
from minillm.teacher.store import StoreFacts, StoreWriter, TargetStore
from minillm.teacher.store_writing import Drawing, digest_of_weights, write_missing
from minillm.train.alpha import AlphaConfig
from minillm.train.pretraining import PretrainingTrainer
from tests.conftest import tiny_tokenizer
from tests.train.common import arguments, stop_after

TEXT = [{"text": " ".join(f"w{(i * j + i) % 28}" for j in range(9 + i))} for i in range(20)]
BLOCK = 16
SGD: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "learning_rate": 0.5}


def pretrain(
    pair: tuple[str, str], folder: Path, *, resume: str | None = None, stop: int | None = None, **changes: Any
) -> PretrainingTrainer:
    keys = ("alpha", "divergence", "store", "temperature", "text_dataset", "block")
    keys += ("eval_dataset", "eval_blocks", "teacher_loss")
    options = {"text_dataset": TEXT, "block": BLOCK} | {key: changes.pop(key) for key in keys if key in changes}
    trainer = PretrainingTrainer(*pair, arguments(folder, **changes), **options)
    stop_after(trainer, stop)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: PretrainingTrainer) -> dict[str, torch.Tensor]:
    model: Any = trainer.model
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def write_store(folder: Path, teacher: str, tokens: int, temperature: float = 1.0, draws: int = 1) -> StoreFacts:
    tokenizer, sampler = tiny_tokenizer(), SamplerConfig(tokens=tokens)
    text = TextBlocks(TEXT, tokenizer, BLOCK, 4, 42, updates=4, several=True)
    facts = StoreFacts("t", digest_of_weights(teacher), "x", BLOCK, 32, temperature, sampler.model_dump(), 0, draws)
    model = LocalTeacher(load_model(teacher, torch.float32))
    for draw in range(draws):
        write_missing(
            StoreWriter(folder, facts), model, text, range(len(text)), draw, Drawing(sampler, temperature, 32, 0)
        )
    return facts


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_an_update_is_that_of_float64(pair: tuple[str, str], tmp_path: Path, temperature: float) -> None:
    alpha = AlphaConfig(value=0.6)
    trainer = pretrain(pair, tmp_path, alpha=alpha, temperature=temperature, max_steps=1, **SGD)
    student, teacher = (load_model(folder, torch.float32).double() for folder in pair)  # pyright: ignore
    nll, kl = [], []
    for piece in (piece for block in trainer.text.of_update(0) for piece in trainer.text.pieces(block)):
        ids = torch.tensor([list(piece)])
        s, z = (model(ids).logits[0, :-1] for model in (student, teacher))
        nll.append(-torch.log_softmax(s, -1).gather(1, ids[0, 1:, None])[:, 0])
        logq, logp = torch.log_softmax(s / temperature, -1), torch.log_softmax(z / temperature, -1).detach()
        kl.append((logp.exp() * (logp - logq)).sum(-1))
    (0.4 * torch.cat(nll).mean() + 0.6 * torch.cat(kl).mean()).backward()
    logged = trainer.state.log_history[0]
    assert logged["cross_entropy"] == pytest.approx(float(torch.cat(nll).mean()), rel=1e-5)
    assert logged["forward_kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-5)
    assert logged["alpha"] == 0.6
    after = weights(trainer)
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        step = 0.5 * parameter.grad
        off = (after[name].double() - (parameter.detach() - step)).norm()
        assert float(off) < 1e-4 * float(step.norm()) + 1e-6, name


def test_a_store_of_all_tokens_trains_as_the_live_teacher(pair: tuple[str, str], tmp_path: Path) -> None:
    facts = write_store(tmp_path / "store", pair[1], 32, temperature=2.0)
    common: Any = {"alpha": AlphaConfig(value=0.8, schedule="wsd", warmup=0.5), "temperature": 2.0, **SGD}
    live = pretrain(pair, tmp_path / "a", **common)
    store = TargetStore(tmp_path / "store", facts)
    stored = pretrain((pair[0], "no-such-teacher"), tmp_path / "b", store=store, **common)
    for one, other in zip(live.state.log_history[:4], stored.state.log_history[:4], strict=True):
        for name in ("cross_entropy", "forward_kl"):
            if name in one or name in other:
                assert other[name] == pytest.approx(one[name], rel=3e-3, abs=2e-3)
    before = load_model(pair[0], torch.float32).state_dict()  # pyright: ignore
    moved, off = 0.0, 0.0
    for name, value in weights(live).items():
        moved += float((value - before[name]).norm() ** 2)
        off += float((value - weights(stored)[name]).norm() ** 2)
    assert off < 1e-4 * moved


def test_what_is_written_does_not_depend_on_where_it_was_interrupted(pair: tuple[str, str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_store(tmp_path / name, pair[1], 6, draws=2)
    torn = tmp_path / "b" / "draw-1-shard-000000.safetensors"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-7])
    write_store(tmp_path / "b", pair[1], 6, draws=2)
    assert torn.read_bytes() == whole == (tmp_path / "a" / torn.name).read_bytes()
    assert whole != (tmp_path / "a" / "draw-0-shard-000000.safetensors").read_bytes()


def test_a_resume_changes_nothing(pair: tuple[str, str], tmp_path: Path) -> None:
    facts = write_store(tmp_path / "store", pair[1], 6, draws=2)
    steps = 12  # more than a pass over the text, so that both draws are read
    common: Any = {"alpha": AlphaConfig(schedule="wsd", warmup=0.3, decay=0.3), "max_steps": steps}
    common |= {"store": TargetStore(tmp_path / "store", facts), "lr_scheduler_type": "cosine"}
    whole = pretrain(pair, tmp_path / "a", **common)
    assert steps * 4 > len(whole.text) + 4
    assert {number for step in range(steps) for number in whole.text.passes_of_update(step)} >= {0, 1}
    pretrain(pair, tmp_path / "b", stop=5, **common)
    resumed = pretrain(pair, tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-5"), **common)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_after_the_switch_knowledge_inheritance_is_plain_training(pair: tuple[str, str], tmp_path: Path) -> None:
    inherits = AlphaConfig(value=0.8, schedule="linear_to_zero", until=0.5)
    whole = pretrain(pair, tmp_path / "a", alpha=inherits)
    pretrain(pair, tmp_path / "b", alpha=inherits, stop=2)
    checkpoint = str(tmp_path / "b" / "checkpoint-2")
    plain = pretrain((pair[0], "no-such-teacher"), tmp_path / "b", alpha=AlphaConfig(value=0.0), resume=checkpoint)
    assert [entry["alpha"] for entry in whole.state.log_history if "alpha" in entry] == [0.8, 0.4, 0.0, 0.0]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(plain)[name]), name


def test_schedules_have_closed_forms() -> None:
    def values(**settings: Any) -> list[float]:
        return [AlphaConfig(value=0.8, **settings).at(update, 100) for update in (0, 10, 50, 90, 100)]

    assert values() == [0.8] * 5
    assert values(schedule="linear_up") == pytest.approx([0, 0.08, 0.4, 0.72, 0.8])
    assert values(schedule="linear_down") == pytest.approx([0.8, 0.72, 0.4, 0.08, 0])
    assert values(schedule="cosine") == pytest.approx([0.8, 0.78042, 0.4, 0.01958, 0], abs=1e-5)
    assert values(schedule="wsd", warmup=0.1, decay=0.1) == pytest.approx([0, 0.8, 0.8, 0.8, 0])
    assert values(schedule="wsd", warmup=0.2, decay=0.2, floor=0.5) == pytest.approx([0, 0.4, 0.8, 0.6, 0.4])
    assert values(schedule="linear_to_zero", until=0.5) == pytest.approx([0.8, 0.64, 0, 0, 0])


def test_settings_that_cannot_be_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    for wrong in (
        {"schedule": "wsd", "warmup": 0.6, "decay": 0.5},
        {"schedule": "linear_to_zero", "until": 1.5},
        {"schedule": "cosine", "until": 0.5},
        {"value": 1.1},
    ):
        with pytest.raises((ValidationError, InputError)):
            AlphaConfig.model_validate(wrong)
    facts = write_store(tmp_path / "store", pair[1], 4)
    store = TargetStore(tmp_path / "store", facts)
    with pytest.raises(InputError, match=r"reverse_kl with a store: .*linear in p"):
        pretrain(pair, tmp_path, store=store, divergence=DivergenceConfig(name="reverse_kl"))
    with pytest.raises(InputError, match="fewer than the 4 of one update"):
        pretrain(pair, tmp_path, text_dataset=TEXT[:1])


def test_validation_measures_held_out_text_and_the_teacher(pair: tuple[str, str], tmp_path: Path) -> None:
    heldout = [{"text": " ".join(f"w{(3 * i + j) % 28}" for j in range(12))} for i in range(6)]
    options: Any = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": heldout}
    trainer = pretrain(pair, tmp_path, alpha=AlphaConfig(value=0.5), **options)
    entries = [entry for entry in trainer.state.log_history if "eval_text_loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    blocks = heldout_blocks(heldout, tiny_tokenizer(), BLOCK, 64)
    student: Any = trainer.model
    rows = score_blocks(student, blocks, tiny_tokenizer(), 32, share_rows=True, teacher=trainer.states_teacher)
    for name, value in text_scores(rows).items():
        assert entries[-1][f"eval_{name}"] == pytest.approx(value, rel=1e-6), name
    alone = pretrain(pair, tmp_path, alpha=AlphaConfig(value=0.0), **options)
    logged = next(entry for entry in alone.state.log_history if "eval_text_loss" in entry)
    assert {"eval_bits_per_byte", "eval_text_ece"} <= logged.keys()
    assert not {"eval_text_forward_kl", "eval_teacher_text_loss"} & logged.keys()


@pytest.mark.parametrize("stored", [False, True])
def test_the_teacher_stops_once_it_is_passed(pair: tuple[str, str], tmp_path: Path, stored: bool) -> None:
    """The random teacher is worse than a student after a few updates; the stop survives a resume."""
    alpha = AlphaConfig(value=0.5, until_passed=True)
    common: Any = {"alpha": alpha, "max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": TEXT}
    common |= {"eval_blocks": 4, "learning_rate": 3e-3, "save_strategy": "no"}
    if stored:
        facts = write_store(tmp_path / "store", pair[1], 6)
        rows = score_blocks(
            bind_scoring(load_model(pair[1], torch.float32)),
            heldout_blocks(TEXT, tiny_tokenizer(), BLOCK, 4),
            tiny_tokenizer(),
            32,
            share_rows=True,
        )
        common |= {"store": TargetStore(tmp_path / "store", facts), "teacher_loss": text_scores(rows)["text_loss"]}
    whole = pretrain(pair, tmp_path / "a", **common)
    shares = [entry["alpha"] for entry in whole.state.log_history if "alpha" in entry]
    found = [entry for entry in whole.state.log_history if "eval_text_loss" in entry]
    passed: Any = next(e["step"] for e in found if e["eval_text_loss"] < e["eval_teacher_text_loss"])
    assert 1 <= passed < 8
    assert shares == [0.5] * passed + [0.0] * (8 - passed)
    pretrain(pair, tmp_path / "b", stop=passed, **common)
    resumed = pretrain(pair, tmp_path / "b", resume=str(tmp_path / "b" / f"checkpoint-{passed}"), **common)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_a_stop_that_nothing_can_tell_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    alpha = AlphaConfig(until_passed=True)
    with pytest.raises(
        InputError, match=r"until_passed: validation tells when the teacher is passed: set eval_strategy"
    ):
        pretrain(pair, tmp_path, alpha=alpha, eval_dataset=TEXT)
    store = TargetStore(tmp_path / "store", write_store(tmp_path / "store", pair[1], 4))
    with pytest.raises(InputError, match="with a store teacher_loss"):
        pretrain(pair, tmp_path, alpha=alpha, eval_dataset=TEXT, eval_strategy="steps", eval_steps=1, store=store)
