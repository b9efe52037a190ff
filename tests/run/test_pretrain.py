"""The stages `logits` and `pretrain` of a whole recipe on tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minillm.errors import InputError
from minillm.models import load
from minillm.run import runner
from minillm.run.plan import Machine, plan
from minillm.run.plan.pretraining import bytes_per_token
from minillm.run.recipe import Recipe
from minillm.run.recipe_file import load_recipe
from minillm.run.stages import stage_named
from minillm.teacher import store_writing
from minillm.teacher.store import summary

RECIPE = """\
run_dir: {run}
stages: [student, logits, pretrain, sft]
data: {{train: {data}, heldout: {data}, text: {text}, max_prompt_tokens: 16}}
teacher: {{source: {teacher}}}
student: {{keep_layers: 2, probe_prompts: 4}}
logits: {{sampler: {{tokens: 6}}, draws: 2}}
pretrain:
  block: 16
  alpha: {alpha}
  training: {{max_steps: 4, per_device_train_batch_size: 2, use_cpu: true, learning_rate: 1e-3}}
responses: {{max_new_tokens: 8}}
sft: {{max_steps: 1, per_device_train_batch_size: 2, use_cpu: true}}
"""


def recipe(root: Path, teacher: str, alpha: Any = 0.9, **changes: Any) -> Recipe:
    data, text = root / "prompts.jsonl", root / "text.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"w{i}", "output": f"w{i + 3}"}) + "\n" for i in range(8)))
    text.write_text(
        "".join(json.dumps({"text": " ".join(f"w{i * j % 28}" for j in range(12))}) + "\n" for i in range(9))
    )
    file = root / "recipe.yaml"
    file.write_text(RECIPE.format(run=root / "run", data=data, text=text, teacher=teacher, alpha=alpha))
    return load_recipe(file, [f"{key}={value}" for key, value in changes.items()])


def test_the_chain_writes_a_store_and_trains_from_it_without_the_teacher(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(tmp_path, pair[1])
    runner.run_recipe(given, ["student", "logits"])
    size = summary(tmp_path / "run" / "logits")
    assert size["tokens"] > 0
    loaded: list[str] = []
    original = load.load_model
    for module in ("minillm.train.pair", "minillm.run.stages.shared"):
        monkeypatch.setattr(
            f"{module}.load_model", lambda source, *rest: loaded.append(str(source)) or original(source, *rest)
        )
    runner.run_recipe(given, "pretrain")
    assert loaded == [str(tmp_path / "run" / "pruned")]
    runner.run_recipe(given)
    state = json.loads((tmp_path / "run" / "pretrained" / "trainer_state.json").read_text())
    assert [entry["alpha"] for entry in state["log_history"] if "alpha" in entry] == [0.9] * 4
    assert (tmp_path / "run" / "sft" / "model.safetensors").is_file()


def test_an_interrupted_store_is_continued(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, written, original = recipe(tmp_path, pair[1]), [], store_writing.StoreWriter.write

    def fails_at_second(self: Any, draw: int, samples: Any) -> int:
        if written:
            raise KeyboardInterrupt
        written.append(draw)
        return original(self, draw, samples)

    with monkeypatch.context() as patched:
        patched.setattr(store_writing.StoreWriter, "write", fails_at_second)
        with pytest.raises(Exception, match="stage logits was interrupted; the same command continues it"):
            runner.run_recipe(given, ["student", "logits"])
    first = tmp_path / "run" / "logits" / "draw-0-shard-000000.safetensors"
    before = first.stat().st_mtime_ns
    runner.run_recipe(given, "logits")
    assert first.stat().st_mtime_ns == before
    assert (first.parent / "draw-1-shard-000000.safetensors").is_file()
    other = recipe(tmp_path, pair[1], **{"pretrain.temperature": 2.0})
    with pytest.raises(Exception, match=r"made with other settings.*pretrain.temperature"):
        runner.run_recipe(other, "logits")
    borrowed = recipe(tmp_path, pair[1], **{"run_dir": tmp_path / "b", "logits.folder": first.parent, "seed": 7})
    with pytest.raises(InputError, match="a store of another seed: 0, and 7 is needed"):
        runner.run_recipe(borrowed, ["student", "logits"])


def test_without_the_logits_stage_the_teacher_is_live(pair: tuple[str, str], tmp_path: Path) -> None:
    given = recipe(
        tmp_path,
        pair[1],
        alpha="{value: 0.8, schedule: linear_to_zero, until: 0.5}",
        **{"stages": "[student,pretrain]", "pretrain.divergence": "reverse_kl"},
    )
    runner.run_recipe(given)
    state = json.loads((tmp_path / "run" / "pretrained" / "trainer_state.json").read_text())
    assert [entry["alpha"] for entry in state["log_history"] if "alpha" in entry] == [0.8, 0.4, 0.0, 0.0]


def test_what_cannot_be_is_refused_before_anything_loads(pair: tuple[str, str], tmp_path: Path) -> None:
    given = recipe(tmp_path, pair[1])
    without = given.model_copy(update={"data": given.data.model_copy(update={"text": None})})
    for name in ("logits", "pretrain"):
        assert "needs data.text" in str(stage_named(name).refusal(without, 1))
    reverse = recipe(tmp_path, pair[1], **{"pretrain.divergence": "reverse_kl"})
    with pytest.raises(InputError, match="linear in p"):
        runner.run_recipe(reverse)
    with pytest.raises(InputError, match=r"pretrain.block: 512 exceeds.*context of 256"):
        runner.run_recipe(recipe(tmp_path, pair[1], **{"pretrain.block": 512}))


def test_the_plan_knows_the_store_and_whether_a_teacher_is_there(pair: tuple[str, str], tmp_path: Path) -> None:
    stored = recipe(tmp_path, pair[1], **{"stages": "[logits,pretrain]"})
    live = recipe(tmp_path, pair[1], **{"stages": "[pretrain]"})
    alone = recipe(tmp_path, pair[1], alpha="0", **{"stages": "[pretrain]"})
    machine = Machine(1)
    [logits, by_store] = plan(stored, machine).phases
    assert re.fullmatch(r"logits \(\d+ MB on disk\)", logits.name)
    [by_teacher], [plain] = plan(live, machine).phases, plan(alone, machine).phases
    assert "teacher" in by_teacher.parts
    assert by_store.parts == plain.parts
    assert "teacher" not in plain.parts
    assert by_teacher.flops > by_store.flops == plain.flops
    assert logits.flops > 0
    runner.run_recipe(recipe(tmp_path, pair[1], **{"logits.draws": 1}), ["student", "logits"])
    real = summary(tmp_path / "run" / "logits")
    assert bytes_per_token(stored) == pytest.approx(real["bytes_per_token"], rel=0.6)  # tiny: the headers count
