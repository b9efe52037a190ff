"""Every entry of a registry is documented and tested: stages, engines, divergences, metrics, model families."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from pydantic import BaseModel

from minillm.data.config import DataConfig
from minillm.evaluation.config import EvaluateConfig, Suite, TestSet
from minillm.evaluation.metrics import METRICS, Metric
from minillm.loss.config import DIVERGENCE_PARAMETERS, DivergenceConfig, Objective
from minillm.loss.divergences import DIVERGENCES
from minillm.models.config import AdapterConfig, StudentConfig
from minillm.models.families import FAMILIES
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.choose import ENGINES
from minillm.run.experiments.config import Comparison, Method
from minillm.run.recipe import Recipe
from minillm.run.stages import NAMES, STAGES
from minillm.run.stages.logits import LogitsConfig
from minillm.run.stages.pretrain import PretrainConfig
from minillm.run.stages.responses import ResponsesConfig
from minillm.run.stages.stage import Stage
from minillm.run.stages.warmup import WarmupConfig
from minillm.teacher.config import SamplerConfig, TeacherConfig, TeachersConfig
from minillm.train.alpha import AlphaConfig
from tests.documents import page

ROOT = Path(__file__).parents[1]
SECTIONS = [
    AdapterConfig,
    AlphaConfig,
    Comparison,
    DataConfig,
    DivergenceConfig,
    EvaluateConfig,
    LogitsConfig,
    Method,
    Objective,
    PretrainConfig,
    Recipe,
    ResponsesConfig,
    RolloutConfig,
    SamplerConfig,
    StudentConfig,
    Suite,
    TeacherConfig,
    TeachersConfig,
    TestSet,
    WarmupConfig,
]


def text_of(files: Iterable[Path]) -> str:
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted(files))


def text_of_tests(room: str) -> str:
    return text_of((ROOT / "tests" / room).glob("*.py"))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_of_a_recipe_is_documented(section: type[BaseModel]) -> None:
    bare = [name for name, field in section.model_fields.items() if not (field.description or "").strip()]
    assert not bare


def is_listed_as_stage(name: str, text: str) -> bool:
    """Whether a list of stages, as Python or as YAML writes it, holds this one."""
    lists = [re.findall(r"\w+", found) for found in re.findall(r"\[[\w\s\",]+\]", text)]
    return any(name in names and set(names) <= set(NAMES) for names in lists)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_is_documented_and_tested(stage: Stage) -> None:
    module = type(stage).__module__
    assert module == f"minillm.run.stages.{stage.name}", "a stage is the file of its name"
    assert (sys.modules[module].__doc__ or "").startswith(f"Stage `{stage.name}`")
    assert f"| `{stage.name}` |" in page("reference/stages.md")
    assert is_listed_as_stage(stage.name, text_of_tests("run"))


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_is_documented_and_tested(name: str) -> None:
    assert inspect.getdoc(ENGINES[name])
    assert f"`{name}`" in page("guides/sampling.md")
    assert f'"{name}"' in text_of([ROOT / "tests" / "rollout" / "test_engines.py"])


@pytest.mark.parametrize("name", DIVERGENCE_PARAMETERS)
def test_every_divergence_is_documented_and_tested(name: str) -> None:
    assert re.search("[=Σ‖]", inspect.getdoc(DIVERGENCES[name]) or ""), "its docstring has the equation"
    assert re.search(rf"\b{name}\b", text_of([ROOT / "tests" / "loss" / "test_divergences.py"]))


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
def test_every_metric_is_documented_and_tested(metric: Metric) -> None:
    assert len(metric.about.split()) > 5
    assert metric.title in page("reference/metrics.md")
    assert metric.label.lower() in page("guides/evaluation.md").lower()
    assert re.search(rf'"{metric.key}"|\b{metric.key}\(', text_of_tests("evaluation"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_recipe_and_a_test(name: str) -> None:
    recipes = text_of((ROOT / "recipes").rglob("*.yaml"))
    assert any(published in recipes for published in FAMILIES[name].published)
    assert f'"{name}"' in text_of([ROOT / "tests" / "run" / "test_families.py"])
