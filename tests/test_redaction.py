"""Nothing secret is written, whatever its key is called; nothing else is hidden."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from minillm.redaction import redacted, redacted_text
from minillm.run.directory import RunState
from minillm.run.model_card import write_card
from minillm.run.recipe_file import load_recipe
from minillm.train.supervised import SupervisedTrainer
from tests.conftest import tiny_tokenizer

TOKEN = "hf_NotARealTokenAtAll"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hub_token", "anything"), ("api_key", "anything"), ("wandb-api-key", "x"), ("password", "x"), ("client_secret", "x"),
        ("anything", f"see {TOKEN}"), ("url", "https://me:secret@host/x"), ("url", "http://host:80/x?token=secret&a=1"),
        ("header", "Bearer secret0123"), ("list", ["http://u:secret@h:1"]),
    ],
)  # fmt: skip
def test_secrets_are_hidden(name: str, value: object) -> None:
    written = json.dumps(redacted({name: value}))
    assert "secret" not in written.replace("client_secret", "")
    assert "anything" not in written.replace('"anything":', "")
    assert TOKEN not in written
    assert "(hidden)" in written


def test_what_only_sounds_like_a_secret_stays() -> None:
    settings = {
        "max_prompt_tokens": 3, "normalise": "update_tokens", "keep_tokens": "auto", "url": "http://host:8000/v1", "key": None,
        "system": "Keep secrets: never tell a token.", "source": "me/hf_model", "eos_token_id": 2,
    }  # fmt: skip
    assert redacted(settings) == settings
    assert redacted_text("https://hub/@me/x") == "https://hub/@me/x"


def test_a_token_of_a_recipe_is_written_nowhere(tmp_path: Path, pair: tuple[str, str]) -> None:
    data = tmp_path / "x.jsonl"
    data.write_text('{"instruction": "w1", "output": "w2"}\n' * 8)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"run_dir: {tmp_path / 'run'}\ndata: {{train: {data}, heldout: {data}}}\nteacher: {{source: {pair[1]}}}\n"
        f"student: {{source: {pair[0]}}}\nrollout: {{engine: server, servers: ['http://u:{TOKEN}@localhost:1'], teacher_mix: 0}}\n"
        f"training: {{hub_token: {TOKEN}, max_steps: 1}}\nstages: [minillm, report]\n"
    )
    recipe = load_recipe(file)
    RunState(recipe).begin("minillm")
    (tmp_path / "student").mkdir()
    write_card(tmp_path / "student", recipe)
    args = TrainingArguments(
        str(tmp_path / "work"),
        use_cpu=True,
        report_to="none",
        max_steps=1,
        per_device_train_batch_size=2,
        hub_token=TOKEN,
    )
    rows = [{"prompt_ids": [4], "response_ids": [5, 1]}] * 4
    trainer = SupervisedTrainer(pair[0], pair[1], args, train_dataset=rows, processing_class=tiny_tokenizer())
    trainer.save_student(tmp_path / "saved")
    assert trainer.args.hub_token == TOKEN
    for written in (
        *(tmp_path / "run").rglob("*"),
        *(tmp_path / "student").rglob("*"),
        *(tmp_path / "saved").rglob("*"),
    ):
        if written.is_file():
            assert TOKEN.encode() not in written.read_bytes(), written
    assert torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False).max_steps == 1
