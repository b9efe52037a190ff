"""Nothing that a stranger hands us runs code, gets out of its folder, or takes the machine's memory or time."""

from __future__ import annotations

import contextlib
import logging
import pickle
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from minillm.config import folder_name
from minillm.data import time_limit
from minillm.data.encoding import encoder_of
from minillm.data.examples import Example
from minillm.data.templates import render
from minillm.errors import DataError, InputError, RecipeError
from minillm.evaluation.config import Suite, named_models
from minillm.models.load import load_model
from minillm.models.sources import check_source
from minillm.redaction import HIDDEN, Redacting
from minillm.rollout.engines.base import EngineSizing
from minillm.rollout.engines.local_server import _command, _free_port
from minillm.rollout.engines.server_checks import check_addresses
from minillm.run import recipe_file
from minillm.run.plain_yaml import MAX_CHARACTERS, MAX_DEPTH
from minillm.run.recipe_file import load_recipe
from minillm.train.journal import Journal
from minillm.train.rollout_checkpoint import RolloutCheckpoint
from tests.conftest import save, tiny_llama, tiny_tokenizer
from tests.train.common import train

MINIMAL = "run_dir: r\ndata: {train: t.jsonl, heldout: t.jsonl}\nteacher: {source: t}\nstudent: {keep_layers: 1}\n"


def refused(folder: Path, text: str, *overrides: str) -> str:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(RecipeError) as error:
        load_recipe(file, overrides)
    assert time.monotonic() - started < 20
    assert len(str(error.value)) < 2200
    return str(error.value)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
RECIPES = {
    "a billion laughs": (LAUGHS, "stand for more than"),
    "laughs in sections": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}}}\n" for n in range(1, 17)),
        "stand for more than",
    ),
    "a list that holds itself": ("a: &a [*a]\n", "nested too deeply"),
    "a section that holds itself": ("a: &a {b: *a}\n", "nested too deeply"),
    "too long": ("# x\n" * MAX_CHARACTERS, "characters are too many"),
    "too deep": ("a: " + "[" * 40 + "]" * 40, f"at most {MAX_DEPTH} levels"),
    "far too deep": ("a: " + "[" * 100_000, "nested too deeply"),
    "too many": ("a: [" + "1, " * 60_000 + "1]", "stand for more than"),
    "an object": ("run_dir: !!python/object/apply:os.system ['touch owned']\n", "a value of the kind python/object"),
    "an object as a section": ("data: !!python/object/new:os.system {a: b}\n", "a value of the kind python/object"),
    "a module": ("x: !!python/name:os.system\n", "a value of the kind python/name"),
    "bytes": ("run_dir: !!binary aGVsbG8=\n", "a value of the kind binary"),
    "a date": ("run_dir: 2001-02-03\n", "put quotes around"),
    "no date": ("run_dir: 2001-99-99\n", "put quotes around"),
    "a number of 5,000 digits": (f"seed: {'1' * 5000}\n", "a value that cannot be read"),
    "no integer": ("seed: !!int x\n", "a value that cannot be read"),
    "a control character": ("run_dir: a\x00b\n", "not YAML"),
    "a path that is too long": (f"extends: {'x' * 5000}\n", "no such recipe"),
    "a data file that is too long": (MINIMAL.replace("t.jsonl", "x" * 5000), "no such file"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_plain_data_of_a_bounded_size(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, said = RECIPES[name]
    assert said in refused(tmp_path, text)
    assert not (tmp_path / "owned").exists()


def test_overrides_are_bounded_too(tmp_path: Path) -> None:
    for value, said in (
        ("[" * 5000, "nested too deeply"),
        ("!!python/name:os.system", "a value of the kind"),
        ("1" * 5000, "a value that cannot be read"),
        ("x" * (MAX_CHARACTERS + 1), "characters are too many"),
    ):
        assert said in refused(tmp_path, MINIMAL, f"seed={value}")


def test_a_piped_recipe_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless:
        def read(self, count: int = -1) -> str:
            assert count > 0, "all of it was asked for"
            return "#" * count

    monkeypatch.setattr(recipe_file.sys, "stdin", Endless())
    recipe_file._standard_input.cache_clear()
    with pytest.raises(RecipeError, match="characters are too many"):
        load_recipe("-")
    recipe_file._standard_input.cache_clear()


def test_an_inline_template_may_be_longer_than_a_file_name(tmp_path: Path) -> None:
    """`Path.exists` raises for such a text."""
    from minillm.run.directory import RunState

    (tmp_path / "t.jsonl").write_text('{"instruction": "w1"}\n')
    text = MINIMAL.replace("t.jsonl", str(tmp_path / "t.jsonl")).replace("run_dir: r", f"run_dir: {tmp_path / 'r'}")
    text = text.replace("heldout:", f'template: "{{{{ instruction }}}} {"x" * 400}", heldout:')
    (tmp_path / "recipe.yaml").write_text(text)
    assert RunState(load_recipe(tmp_path / "recipe.yaml")).settings("minillm")


def test_names_stay_in_their_folders() -> None:
    for name in ("..", ".", "", "a/b", "a\\b", "/etc", ".hidden", "a\nb", "a\x00", "x" * 101):
        with pytest.raises(InputError):
            folder_name(name)
        with pytest.raises(ValueError, match=r"folder|given"):
            Suite.model_validate({"sets": {name: {"file": "x.jsonl"}}})
    for text in ("model/..", "..", "../x:m"):
        with pytest.raises(InputError):
            named_models([text])
    assert named_models(["a b-1_é:m"]) == {"a b-1_é": "m"}


class Owned:
    """A pickle that makes a file where it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_pickled_weights_are_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(save(tiny_llama(0), tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Owned(tmp_path / "owned")))
    for read in (check_source, load_model):
        with pytest.raises(InputError, match=r"pytorch_model\.bin: these weights are a pickle.*allow_pickle: true"):
            read(str(folder))
    # Where it is asked for, PyTorch's restricted reader reads it.
    monkeypatch.setenv("MINILLM_ALLOW_PICKLE", "1")
    with contextlib.suppress(Exception):  # of whatever type: it is not run
        load_model(str(folder))
    assert not (tmp_path / "owned").exists()
    assert pickle.loads((folder / "pytorch_model.bin").read_bytes()) is None
    assert (tmp_path / "owned").exists(), "the pickle of this test does nothing"


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    folder = Path(save(tiny_llama(0), tmp_path / "model"))
    config = (folder / "config.json").read_text().replace('"llama"', '"mine"')
    config = config.replace("{", '{"auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}, ', 1)
    (folder / "config.json").write_text(config)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    with pytest.raises(InputError, match="models that bring code of their own are not run"):
        load_model(str(folder))
    assert not (tmp_path / "owned").exists()


def test_nothing_in_a_checkpoint_is_run(pair: tuple[str, str], tmp_path: Path) -> None:
    train(pair, tmp_path / "a", max_steps=2, save_strategy="steps", save_steps=1).close()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rollouts-0.pt", "training_args.bin"):
        checkpoint = tmp_path / name / "checkpoint-1"
        shutil.copytree(tmp_path / "a" / "checkpoint-1", checkpoint)
        assert (checkpoint / name).is_file()
        (checkpoint / name).write_bytes(pickle.dumps(Owned(tmp_path / "owned")))
        with contextlib.suppress(Exception):  # of whatever type: it is not run
            train(pair, tmp_path / name, max_steps=2, resume=str(checkpoint)).close()
        assert not (tmp_path / "owned").exists(), name


def test_a_checkpoint_of_rollouts_is_read_by_the_restricted_reader(tmp_path: Path) -> None:
    torch.save(Owned(tmp_path / "owned"), tmp_path / "rollouts-0.pt")
    with contextlib.suppress(Exception):
        RolloutCheckpoint.load(tmp_path, 0, 1)
    assert not (tmp_path / "owned").exists()


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}{{ instruction }}"
REACHING = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ instruction.__class__.__base__.__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ 9 ** 9999999 }}",
    "{{ 'x' * 999999999 }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ range(999999999) }}",
    "{% include '/etc/passwd' %}",
    "{{ 1 / 0 }}",
    "{{ undefined.attribute }}",
]


@pytest.mark.parametrize("template", REACHING)
def test_templates_reach_nothing(template: str) -> None:
    with pytest.raises(DataError) as error:
        render(Example(0, "w1"), "{{ instruction }}" + template, tiny_tokenizer())
    assert "\n" not in str(error.value)


def with_chat_template(text: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


@pytest.mark.parametrize("template", [t for t in REACHING if "*" not in t and "%9" not in t and "undefined" not in t])
def test_chat_templates_reach_nothing(template: str) -> None:
    tokenizer = with_chat_template(template.replace("instruction", "messages[0].content"))
    with pytest.raises(DataError):
        encoder_of(tokenizer).chat([{"role": "user", "content": "w1"}])


def test_templates_have_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"row 0: data\.template was not rendered within 0\.2 s"):
        render(Example(0, "w1"), ENDLESS, tiny_tokenizer())
    with pytest.raises(DataError, match="the chat template was not rendered"):
        encoder_of(with_chat_template(ENDLESS)).chat([{"role": "user", "content": "w1"}])
    assert time.monotonic() - started < 30
    # Nothing is left over for those who come after.
    assert render(Example(0, "w1"), "{{ instruction }}", tiny_tokenizer())
    time.sleep(0.5)
    assert not time_limit._running


def test_secrets_are_neither_logged_nor_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = "hf_abcdefghij0123456789"
    with caplog.at_level(logging.WARNING):
        caplog.handler.addFilter(Redacting())
        logging.getLogger("minillm.x").warning("no answer of %s", f"http://me:{secret}@host/?api_key=12345678")
    assert secret not in caplog.text
    assert "12345678" not in caplog.text
    assert HIDDEN in caplog.text
    journal = Journal(tmp_path / "journal.jsonl", "minillm")
    journal.write("alarm", what=f"no answer with {secret}", hub_token="x1y2z3")
    written = (tmp_path / "journal.jsonl").read_text()
    assert secret not in written
    assert "x1y2z3" not in written
    text = refused(
        tmp_path, MINIMAL + f"training: {{hub_token: {secret}, learning_rate: {{a: {secret}}}}}\nseed: {secret}\n"
    )
    assert secret not in text


def test_servers_that_a_run_starts_listen_on_the_loopback_interface(tmp_path: Path) -> None:
    folder = save(tiny_llama(0), tmp_path)
    command = _command(folder, _free_port(), EngineSizing(32, torch.float32))
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert not any("0.0.0.0" in word for word in command)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", _free_port()))


def test_public_addresses_of_servers_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_addresses(
            ["http://127.0.0.1:8000", "http://10.0.0.3:8000", "http://localhost:1", "http://node-3:8000/v1"]
        )
        assert caplog.text == ""
        check_addresses(["http://8.8.4.4:8000"])
    assert "http://8.8.4.4:8000: a public address" in caplog.text
    assert "VLLM_SERVER_DEV_MODE" in caplog.text
