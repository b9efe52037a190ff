"""A comparison of methods with tiny models: tuning on validation, tests at the end, and its continuation."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from minillm.errors import Interrupted, RecipeError
from minillm.run import runner
from minillm.run.experiments import compare as comparison
from minillm.run.experiments.compare import compare
from minillm.run.plan.machine import Machine
from minillm.run.plan.work import why_refused
from minillm.run.recipe_file import load_comparison, load_recipe, recipe_of
from minillm.run.stages import stage_named
from minillm.run.tree import merge
from tests.conftest import save, tiny_llama

TRAINING = """
    learning_rate: 3.0e-3
    max_steps: 4
    per_device_train_batch_size: 4
    use_cpu: true
    eval_strategy: steps
    eval_steps: 2
    save_strategy: steps
    save_steps: 2
    load_best_model_at_end: true
    metric_for_best_model: rouge_l
"""
TEXT = f"""
recipe:
  run_dir: RUN
  data:
    {{train: train.jsonl, heldout: dev.jsonl, validation: dev.jsonl, validation_limit: 6, template: plain,
      max_prompt_tokens: 8}}
  teacher: {{source: TEACHER}}
  student: {{source: STUDENT}}
  responses: {{max_new_tokens: 8}}
  finetune: &training {TRAINING}
  warmup: {{training: *training}}
  sft: *training
  training: *training
  rollout: {{engine: transformers, num_rollouts: 8, max_new_tokens: 8}}
start: [teacher, finetune, responses, warmup]
baseline: kd
methods:
  sft: {{stage: sft, tuning: [{{}}, {{sft: {{learning_rate: 1.0e-3}}}}]}}
  kd: {{stage: warmup, recipe: {{warmup: {{targets: references}}}}, tuning: [{{}}, {{warmup: {{cross_entropy: 0.1}}}}]}}
  minillm: {{stage: minillm, tuning: [{{}}, {{objective: {{clip: 0.1}}}}], seeds: [0, 1]}}
  distillm:
    stage: minillm
    recipe:
      objective: {{long_term: 0, divergence: skew_reverse_kl}}
      rollout: {{on_policy: 0.5, replay: 0.5, teacher_mix: 0}}
    tested: false
suite:
  template: plain
  engine: transformers
  max_new_tokens: 8
  max_prompt_tokens: 8
  seeds: [1, 2]
  bootstrap: 200
  sets: {{test: {{file: test.jsonl}}}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    draw = random.Random(0)
    words = lambda n: " ".join(f"w{draw.randrange(28)}" for _ in range(n))  # noqa: E731
    (tmp_path / "data").mkdir()
    for name, rows in (("train", 24), ("dev", 8), ("test", 5)):
        text = "\n".join(json.dumps({"instruction": words(3), "output": words(4)}) for _ in range(rows))
        (tmp_path / "data" / f"{name}.jsonl").write_text(text)
    student, teacher = save(tiny_llama(1), tmp_path / "student"), save(tiny_llama(2, layers=3), tmp_path / "teacher")
    path = tmp_path / "compare.yaml"
    path.write_text(TEXT.replace("RUN", str(tmp_path / "run")).replace("TEACHER", teacher).replace("STUDENT", student))
    return path


def load(file: Path) -> Any:
    return load_comparison(file, [f"data_dir={file.parent / 'data'}"])


def test_methods_are_tuned_alike_and_tested_once_and_an_interrupted_comparison_goes_on(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    original = runner.run_recipe

    def counted(recipe: Any, *rest: Any) -> Any:
        name = str(recipe.run_dir.relative_to(file.parent / "run"))
        if name == "kd/tuning-1" and name not in done:
            done.append(name)
            raise Interrupted("stopped here")
        done.append(name)
        return original(recipe, *rest)

    monkeypatch.setattr(comparison, "run_recipe", counted)
    with pytest.raises(Interrupted):
        compare(load(file))
    assert done == ["start", "sft/tuning-0", "sft/tuning-1", "kd/tuning-0", "kd/tuning-1"]
    partial = json.loads((file.parent / "run" / "compare.json").read_text())
    assert list(partial["tuning"]) == ["sft"]
    assert len(partial["tuning"]["sft"]["tried"]) == 2
    started = {path: path.stat().st_mtime_ns for path in (file.parent / "run").rglob("*.safetensors")}
    results = compare(load(file))
    assert all(path.stat().st_mtime_ns == before for path, before in started.items())  # nothing is trained twice
    assert results == json.loads((file.parent / "run" / "compare.json").read_text())
    for name, method in results["tuning"].items():
        scores = [tried["rouge_l"] for tried in method["tried"]]
        assert method["chosen"] == scores.index(max(scores))
        for tried in method["tried"]:
            curve = [entry["eval_rouge_l"] for entry in tried["curve"]]
            assert len(curve) == 2, name
            assert max(curve) == tried["rouge_l"]
            assert "entropy" in tried["while_training"]
            assert ("response_length" in tried["while_training"]) == (name in ("minillm", "distillm"))
    assert len(results["start"]["curve"]) == 2
    report = (file.parent / "run" / "report.html").read_text()
    # The legends of the curves stay text in the SVG.
    assert all(f">{name}<" in report for name in ("sft", "kd", "minillm", "distillm"))
    titles = ("Validation while training", "KL(q‖p), nats a token", "training seed 1", "<h2>average", "<th>− kd")
    assert all(title in report for title in titles)
    # The baseline comes first, then every tested method with its seeds, and then the student that all start from.
    assert list(results["tests"]["models"]) == ["kd-0", "sft-0", "minillm-0", "minillm-1", "start", "teacher"]
    seeds = [results["tests"]["models"][f"minillm-{seed}"]["average"]["rouge_l"]["mean"] for seed in (0, 1)]
    assert results["methods"]["minillm"]["by_training_seed"] == seeds
    assert results["methods"]["minillm"]["mean"] == pytest.approx(sum(seeds) / 2)
    assert "distillm" not in results["methods"]
    # The differences of each pair of methods, in both directions, pool the seeds of a method.
    pairs = results["differences"]
    assert list(pairs) == ["kd", "sft", "minillm"]
    average = [results["tests"]["models"][f"{name}-0"]["average"]["rouge_l"]["mean"] for name in ("kd", "sft")]
    assert pairs["minillm"]["kd"]["mean"] == pytest.approx(sum(seeds) / 2 - average[0])
    assert pairs["kd"]["sft"]["mean"] == pytest.approx(average[0] - average[1])
    assert pairs["kd"]["sft"]["low"] <= pairs["kd"]["sft"]["mean"] <= pairs["kd"]["sft"]["high"]
    assert pairs["sft"]["kd"]["low"] == pytest.approx(-pairs["kd"]["sft"]["high"], abs=0.2)
    assert (file.parent / "run" / "distillm" / "tuning-0" / "student" / "model.safetensors").is_file()


@pytest.mark.full
def test_runs_side_by_side_find_what_runs_one_after_another_find(file: Path) -> None:
    alone = compare(load(file))
    text = file.read_text()
    file.write_text(text.replace(f"{file.parent}/run", f"{file.parent}/beside"))
    beside = compare(load_comparison(file, [f"data_dir={file.parent / 'data'}", "jobs=2"]))
    root = file.parent / "beside"
    assert len(list(root.glob("*/*.log"))) == 7 + 1 + 6  # tuning runs, another seed, tests
    for name, method in alone["tuning"].items():
        pairs = zip(method["tried"], beside["tuning"][name]["tried"], strict=True)
        assert all(one["rouge_l"] == pytest.approx(other["rouge_l"], abs=0.5) for one, other in pairs)
    assert list(alone["tests"]["models"]) == list(beside["tests"]["models"])


def test_wrong_settings_are_found_before_anything_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "run_recipe", lambda *_: pytest.fail("something ran"))
    text = file.read_text()
    for before, after, message in (
        ("clip: 0.1", "clip: 7", "methods.minillm: objective.clip: Input should be less than 1"),
        ("baseline: kd", "baseline: kt", "baseline: kt is none of the methods"),
        ("cross_entropy: 0.1}}]", "cross_entropy: 0.1}}, {}]", "every tested method gets as many tuning runs"),
        (
            "stage: sft",
            "stage: sftt",
            "methods.sft.stage: a stage that trains the student is needed: pretrain, warmup, sft, minillm",
        ),
        (
            "seeds: [0, 1]}",
            "seeds: [1, 1]}",
            "methods.minillm.seeds: every value must be given once only; remove the repeated 1",
        ),
        ("seeds: [0, 1]}", "seeds: [0, -1]}", "methods.minillm.seeds.1: Input should be greater than or equal to 0"),
        ("seeds: [1, 2]", "seeds: [2, 2]", "suite.seeds: every value must be given once only; remove the repeated 2"),
        ("bootstrap: 200", "bootstrp: 200", "suite.bootstrp: unknown key; did you mean bootstrap?"),
        (
            "  run_dir: RUN".replace("RUN", str(file.parent / "run")),
            "  seed: 0",
            "recipe.run_dir: needed, and not given",
        ),
        ("baseline: kd", "baseline: distillm", "baseline: distillm is not tested"),
        (
            ", validation: dev.jsonl, validation_limit: 6",
            "",
            "finetune.eval_strategy: there are no rows to validate on",
        ),
        (
            TRAINING.partition("    eval_strategy")[2],
            ': "no"\n',
            "methods.sft: the best of 2 tuning runs is chosen on validation",
        ),
    ):
        file.write_text(text.replace(before, after))
        with pytest.raises(RecipeError) as caught:
            compare(load(file))
        assert message in str(caught.value)


def test_tests_that_cannot_be_made_are_found_before_anything_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "run_recipe", lambda *_: pytest.fail("something ran"))
    text = file.read_text()
    other = Path(save(tiny_llama(3), file.parent / "other")) / "tokenizer.json"
    other.write_text(other.read_text().replace('"w8"', '"w99"'))
    (file.parent / "data" / "bare.jsonl").write_text('{"instruction": "w1"}\n')
    for before, after, message in (
        (
            "bootstrap: 200",
            f"bootstrap: 200\n  teacher: {other.parent}",
            "have different tokenizers: id 12 is 'w8' for the model and 'w99'",
        ),
        ("file: test.jsonl", "file: none.jsonl", "none.jsonl: no such file"),
        ("file: test.jsonl", "file: bare.jsonl", "no row of test has a reference to score answers by"),
        ("file: test.jsonl", "file: test.jsonl, choices: [w1, w2]", "sets.test.choices: none is the reference"),
    ):
        file.write_text(text.replace(before, after))
        with pytest.raises(ValueError, match=message):
            compare(load(file))


def test_a_run_without_validation_has_no_best_score(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, "loss": 1.0, "reverse_kl": float("nan")}]})
    )
    found = comparison.validation_summary(tmp_path)
    assert (found["rouge_l"], found["update"]) == (None, None)
    assert comparison.best_outcome([{"rouge_l": None}, {"rouge_l": 0.0}]) == 1


def test_several_processes_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a comparison runs in one process"):
        compare(load(file))


def test_the_shipped_comparison_is_valid(tmp_path: Path) -> None:
    shipped = load_comparison(Path(__file__).parents[2] / "eval" / "compare.yaml", [f"data_dir={tmp_path}"])
    assert {len(method.tuning) for method in shipped.methods.values() if method.tested} == {2}
    assert shipped.methods["distillm"].recipe["rollout"]["replay"] == 0.5
    assert shipped.recipe["data"]["train"] == str(tmp_path / "train.jsonl")


def test_the_comparison_for_24_gb_compares_runs_of_its_recipe_that_are_alike() -> None:
    root = Path(__file__).parents[2]
    shipped, recipe = (
        load_comparison(root / "eval" / "compare-24gb.yaml"),
        load_recipe(root / "recipes" / "qwen2.5" / "0.5b-24gb.yaml"),
    )
    budgets = set()
    for method in shipped.methods.values():
        for tuning in method.tuning:
            own = recipe_of(merge(merge(shipped.recipe, method.recipe), tuning), "the comparison")
            training = stage_named(method.stage).arguments(own)
            budgets.add(
                (training["max_steps"], training["responses_per_update"], len(method.tuning), len(method.seeds))
            )
            assert own.teacher == recipe.teacher
            assert (own.student, own.rollout.num_rollouts) == (recipe.student, recipe.rollout.num_rollouts)
            assert own.rollout.max_new_tokens == recipe.rollout.max_new_tokens
            assert why_refused(own.model_copy(update={"stages": [method.stage]}), Machine(1)) is None
            assert own.data.validation != shipped.suite.sets["dolly"]
    assert len(budgets) == 1
    assert shipped.methods["on_policy_kl"].recipe["objective"]["long_term"] == 0
