"""The stages `logits` and `pretrain` of a whole recipe on tiny models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minillm.data.files import read_json
from minillm.errors import InputError
from minillm.models import load
from minillm.run import runner
from minillm.run.plan import Machine, plan
from minillm.run.plan.pretraining import bytes_per_token
from minillm.run.recipe import Recipe
from minillm.run.recipe_file import load_recipe
from minillm.run.stages import stage_named
from minillm.run.stages.logits import facts_of, text_of
from minillm.teacher import store_writing
from minillm.teacher.store import TargetStore, summary
from tests.run.tiny_recipe import command

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


def test_a_store_with_a_seed_of_its_own_serves_several_trainings(pair: tuple[str, str], tmp_path: Path) -> None:
    store = tmp_path / "store"
    common = {"stages": "[student,logits,pretrain]", "logits.folder": store, "logits.seed": 3}
    for seed in (0, 1):
        runner.run_recipe(recipe(tmp_path, pair[1], **{"run_dir": tmp_path / str(seed), "seed": seed, **common}))
    assert read_json(store / "store.json")["facts"]["seed"] == 3
    one, two = (load_file(tmp_path / str(seed) / "pretrained" / "model.safetensors") for seed in (0, 1))
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_the_next_token_and_the_end_are_kept_as_they_are(pair: tuple[str, str], tmp_path: Path) -> None:
    given = recipe(tmp_path, pair[1], **{"logits.sampler.floor": 1e-6})
    run = runner.run_recipe(given, ["student", "logits"])
    store, text = TargetStore(tmp_path / "run" / "logits", facts_of(run)), text_of(run, several=True)
    model = load.load_model(pair[1], torch.float32)
    for block in range(len(text)):
        targets, start = store.targets([(block, 0, text.pieces(block))]), 0
        for ids in text.pieces(block):
            with torch.no_grad():
                p = torch.softmax(model(torch.tensor([list(ids)])).logits[0, :-1].double(), -1)  # pyright: ignore
            part = slice(start, start + len(ids) - 1)
            found = torch.zeros_like(p).scatter_add(1, targets.ids[part], targets.weights[part].double())
            for always in (torch.tensor(list(ids[1:]))[:, None], torch.ones(len(ids) - 1, 1, dtype=torch.long)):
                torch.testing.assert_close(found.gather(1, always), p.gather(1, always), rtol=3e-3, atol=1e-6)
            start = part.stop


def test_a_student_from_nothing_is_trained_and_scored_on_held_out_text(pair: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "heldout.jsonl").write_text('{"text": "w1 w2 w3 w4 w5"}\n{"text": "w3 w4 w5"}\n')
    given = recipe(
        tmp_path,
        pair[1],
        **{
            "stages": "[teacher,student,logits,pretrain,evaluate,report]",
            "student": "{source: config, shape: {num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2, "
            "num_key_value_heads: 2}}",
            "data.heldout_text": tmp_path / "heldout.jsonl",
            "pretrain.alpha": "{value: 0.9, until_passed: true}",
            "pretrain.training.eval_strategy": "steps",
            "pretrain.training.eval_steps": 2,
            "rollout.engine": "transformers",
            "evaluate": "{seeds: [1, 2], max_new_tokens: 4, bootstrap: 100}",
        },
    )
    runner.run_recipe(given)
    run = tmp_path / "run"
    for folder in ("initial", "pretrained"):
        assert json.loads((run / folder / "config.json").read_text())["hidden_size"] == 32
    assert (run / "initial" / "tokenizer_config.json").is_file()
    assert not (run / "pruned").exists()
    log = json.loads((run / "pretrained" / "trainer_state.json").read_text())["log_history"]
    validated = [entry for entry in log if "eval_text_loss" in entry]
    assert [entry["step"] for entry in validated] == [2, 4]
    results = read_json(run / "results.json")
    text = results["text"]
    assert text["models"].keys() == {"teacher", "student", "pretrained"}
    assert text["models"]["teacher"]["text_loss"]["mean"] == pytest.approx(
        validated[0]["eval_teacher_text_loss"], rel=2e-2
    )
    assert text["models"]["pretrained"]["text_loss"]["mean"] == pytest.approx(validated[-1]["eval_text_loss"], rel=2e-2)
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "Held-out text" in report
    assert "bits a byte" in report
    before = (run / "evaluate" / "teacher.jsonl").stat().st_mtime_ns
    with pytest.raises(Exception, match=r"made with other settings.*data.heldout_blocks"):
        runner.run_recipe(given.model_copy(update={"data": given.data.model_copy(update={"heldout_blocks": 1})}))
    assert (run / "evaluate" / "teacher.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.shape": "{hidden_size: 32}"}, "like and shape describe a student with random weights"),
        ({"student": "{source: config, shape: {hiden_size: 32}}"}, "LlamaConfig has no hiden_size; did you mean"),
        ({"student": "{source: config, lora: {rank: 4}}"}, "an adapter on random weights learns little"),
        ({"pretrain.alpha": "{value: 0.9, until_passed: true}"}, "set data.heldout_text, and"),
        ({"pretrain.training.eval_strategy": "steps"}, "no rows to validate on: set data.heldout_text"),
        ({"pretrain.block": "200"}, "blocks, fewer than the 2 of one update"),
    ],
)
def test_settings_that_cannot_be_name_the_remedy(
    pair: tuple[str, str], tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(Exception, match=re.escape(message)):
        runner.run_recipe(recipe(tmp_path, pair[1], **changes))


@pytest.mark.full
def test_two_processes_write_one_store(pair: tuple[str, str], tmp_path: Path) -> None:
    """As bytes, it is the store of one process. Each process writes shards of its own."""
    given = recipe(tmp_path, pair[1])
    long = "".join(json.dumps({"text": " ".join(f"w{i * j % 28}" for j in range(14))}) + "\n" for i in range(150))
    (tmp_path / "text.jsonl").write_text(long)
    words = [str(tmp_path / "recipe.yaml"), "stages=[student,logits]"]
    assert command("run", *words, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="").returncode == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launch += ["-m", "minillm", "run", *words, f"run_dir={tmp_path / 'two'}"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # sums have one order
    done = subprocess.run(launch, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = given.run_dir / "logits", tmp_path / "two" / "logits"
    shards = sorted(path.name for path in one.glob("draw-*"))
    assert len(shards) >= 4
    assert shards == sorted(path.name for path in two.glob("draw-*"))
    for name in [*shards, "store.json"]:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


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
    heldout = {"stages": "[pretrain]", "data.heldout_text": tmp_path / "text.jsonl"}
    heldout |= {"pretrain.training.eval_strategy": "steps", "pretrain.training.eval_steps": 2}
    [validated] = plan(recipe(tmp_path, pair[1], alpha="0", **heldout), machine).phases
    assert validated.flops > plain.flops
    runner.run_recipe(recipe(tmp_path, pair[1], **{"logits.draws": 1}), ["student", "logits"])
    real = summary(tmp_path / "run" / "logits")
    assert bytes_per_token(stored) == pytest.approx(real["bytes_per_token"], rel=0.6)  # tiny: the headers count
