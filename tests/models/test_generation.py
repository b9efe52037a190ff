"""A generation config that transformers reads and would not save costs no trained student."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.models.generation import read_generation_config
from minillm.models.load import load_model
from minillm.models.pruning.apply import prune
from minillm.models.saving import save_plain
from tests.conftest import save, tiny_llama

# What is given, and what is kept of it.
GIVEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"temperature": 0.6, "top_p": 0.9},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    ),  # as models are published
    ({"do_sample": False, "temperature": 0.6, "top_k": 20}, {"do_sample": False}),
    ({"temperature": 0.0}, {}),
    ({"length_penalty": 0.5}, {}),
    ({"length_penalty": 0.5, "num_beams": 2}, {"length_penalty": 0.5, "num_beams": 2}),
    ({"output_scores": True}, {}),
    ({"pad_token_id": -1}, {}),
    ({"use_cache": False, "cache_implementation": "static"}, {"use_cache": False}),
    # Of these transformers reads none.
    ({"max_new_tokens": 0}, {}),
    ({"num_return_sequences": 3}, {}),
    ({"early_stopping": "perhaps"}, {}),
    ({"cache_implementation": "of tomorrow"}, {}),
    ({"streamer": 1}, {}),
]


@pytest.mark.parametrize(("given", "kept"), GIVEN)
def test_a_model_can_be_saved_whatever_came_with_it(
    given: dict[str, Any], kept: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tiny_llama(0, layers=3), tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]} | given))
    with caplog.at_level(logging.WARNING, "minillm"):
        model = load_model(folder)
    told = [record.message for record in caplog.records if record.name.startswith("minillm")]
    assert bool(told) == (given != kept)
    assert all(folder in message and "\n" not in message for message in told)
    for number, saved in enumerate(
        (model.save_pretrained, prune(model, [0, 2]).save_pretrained, lambda to: save_plain(model, str(to)))
    ):
        saved(tmp_path / str(number))
        found = json.loads((tmp_path / str(number) / "generation_config.json").read_text())
        found.pop("transformers_version")
        assert found == {"eos_token_id": [1, 3]} | kept


def test_a_model_made_elsewhere_is_saved_too(tmp_path: Path) -> None:
    model: Any = tiny_llama(0)
    model.generation_config.temperature = 0.6
    save_plain(model, tmp_path)
    assert load_model(tmp_path, torch.float32).generation_config.temperature == 0.6  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("file", [None, "{half", "[]"])
def test_without_a_generation_config_the_models_config_has_the_end(file: str | None, tmp_path: Path) -> None:
    folder = save(tiny_llama(0), tmp_path)
    (tmp_path / "generation_config.json").unlink()
    if file is not None:
        (tmp_path / "generation_config.json").write_text(file)
    model: Any = load_model(folder)
    assert model.generation_config.eos_token_id == 1
    assert read_generation_config(folder, model.config).eos_token_id == 1
