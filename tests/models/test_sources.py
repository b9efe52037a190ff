"""A model that is not there or not whole is refused in one line, at once, before anything of it is loaded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from minillm.models import sources
from minillm.models.configs import text_config
from minillm.models.load import load_model, load_tokenizer
from minillm.models.sources import check_adapter_source, check_source
from tests.conftest import save, tiny_llama


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    """In one line, soon."""
    started = time.perf_counter()
    with pytest.raises((OSError, ValueError)) as refused:
        call(*arguments)
    assert time.perf_counter() - started < 3
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An empty cache, and what is asked of a hub that cannot be reached."""
    asked: list[str] = []

    def unreachable(url: str, **_: Any) -> None:
        asked.append(url)
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(sources, "get_hf_file_metadata", unreachable)
    return asked


@pytest.mark.parametrize(
    "source", ["./nowhere", "../nowhere", "nowhere/", "runs/some/teacher", "/no/such/folder", "~/no such", "a--b", ""]
)
def test_a_path_that_leads_nowhere_is_never_asked_of_the_hub(source: str, online: list[str]) -> None:
    for call in (check_source, load_model, load_tokenizer, text_config, check_adapter_source):
        assert refusal(call, source).startswith(f"{source}: no such folder")
    assert not online


def test_a_hub_that_cannot_be_reached_is_asked_once(online: list[str]) -> None:
    assert "no-such/model: no such folder, and https://huggingface.co cannot be reached" in refusal(
        check_source, "no-such/model"
    )
    assert len(online) == 1
    assert online[0].endswith("no-such/model/resolve/main/config.json")
    refusal(check_adapter_source, "no-such/adapter")
    assert online[1].endswith("no-such/adapter/resolve/main/adapter_config.json")


@pytest.mark.parametrize(
    ("kind", "status", "says"),
    [
        (RepositoryNotFoundError, 401, "the hub has no such model, or has it as a private one (`hf auth login`)"),
        (GatedRepoError, 403, "accepted its terms (https://huggingface.co/some/model)"),
        (RemoteEntryNotFoundError, 404, "holds no config.json"),
        (HfHubHTTPError, 503, "answers 503"),
    ],
)
def test_what_the_hub_answers_is_told(
    kind: type[HfHubHTTPError], status: int, says: str, online: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    response = SimpleNamespace(status_code=status, headers={}, request=None)

    def answer(url: str, **_: Any) -> None:
        raise kind("a\nlong\nanswer", response=response)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(sources, "get_hf_file_metadata", answer)
    assert says in refusal(check_source, "some/model")


def test_offline_the_cache_is_all_there_is(online: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    assert "some/model: no such folder, and HF_HUB_OFFLINE is set" in refusal(check_source, "some/model")
    place = tmp_path / "cache" / "models--some--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    folder = place / "snapshots" / ("0" * 40)
    save(tiny_llama(0), folder)
    check_source("some/model")
    (folder / "model.safetensors").unlink()  # a download that was broken off
    assert "some/model: the folder holds no weights" in refusal(check_source, "some/model")
    assert not online


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def sharded(folder: Path) -> Path:
    """Weights in two shards, with their index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, some in halves.items():
        save_file({name: weights[name] for name in some}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, some in halves.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "the folder holds no config.json"),
    "half a config": (lambda folder: (folder / "config.json").write_text('{"model_type": '), "config.json is not JSON"),
    "no object": (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds no JSON object"),
    "no kind": (lambda folder: (folder / "config.json").write_text("{}"), "config.json names no model_type"),
    "an unknown kind": (lambda folder: (folder / "config.json").write_text('{"model_type": "lama"}'), "lama is not known"),
    "another kind": (lambda folder: (folder / "config.json").write_text('{"model_type": "clip"}'), "is not a causal language model"),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "the folder holds no tokenizer"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "the folder holds no weights"),
    "cut weights": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors: the weights cannot be read"),
    "a pointer": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "this is a pointer of git-lfs",
    ),
    "a missing shard": (
        lambda folder: (sharded(folder) / "two.safetensors").unlink(),
        "names 2 shards, and 1 of them are not in the folder: two.safetensors",
    ),
    "a cut shard": (lambda folder: cut(sharded(folder) / "two.safetensors"), "two.safetensors: the weights cannot be read"),
    "a wrong shard": (
        lambda folder: (sharded(folder) / "two.safetensors").write_bytes((folder / "one.safetensors").read_bytes()),
        "two.safetensors: the shard does not hold",
    ),
    "cut pickled weights": (
        lambda folder: [
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"),
            (folder / "model.safetensors").unlink(),
            cut(folder / "pytorch_model.bin"),
        ],
        "pytorch_model.bin: the weights are cut short",
    ),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "name the model that it belongs to"),
    "a GGUF file": (lambda folder: (folder / "config.json").rename(folder / "model.gguf"), "name its file, "),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_not_whole_is_refused(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILLM_ALLOW_PICKLE", "1")
    folder = save(tiny_llama(0), tmp_path)
    check_source(folder)
    do, says = DAMAGES[damage]
    do(tmp_path)
    message = refusal(check_source, folder)
    assert says in message
    assert str(tmp_path) in message
    assert refusal(load_tokenizer if damage == "no tokenizer" else load_model, folder) == message


def test_whole_folders_of_every_kind_are_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILLM_ALLOW_PICKLE", "1")
    for kind in ("one file", "shards", "pickled"):
        folder = Path(save(tiny_llama(0), tmp_path / kind))
        if kind == "shards":
            sharded(folder)
        elif kind == "pickled":
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        check_source(str(folder))
        assert torch.equal(load_model(folder, torch.float32).state_dict()["model.norm.weight"], torch.ones(64))
    (tmp_path / "one file" / "config.json").unlink()
    load_tokenizer(tmp_path / "one file")  # which needs none
    with pytest.raises(NotADirectoryError, match=r"name the folder that it is in"):
        check_source(str(tmp_path / "one file" / "model.safetensors"))


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = save(tiny_llama(0), tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "New"}}')
    assert refusal(load_tokenizer, folder).startswith(f"{folder}: its tokenizer cannot be read: ")


@pytest.mark.parametrize("change", ["deeper", "wider"])
def test_weights_that_are_not_the_models_are_refused_and_not_drawn_at_random(change: str, tmp_path: Path) -> None:
    folder = save(tiny_llama(0, layers=2), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "layer_types": None} if change == "deeper" else {"intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(config))
    says = {
        "deeper": r"the weights do not hold model\.layers\.2\.input_layernorm\.weight and 8 more",
        "wider": r"model\.layers\.0\.mlp\.down_proj\.weight has the shape \[64, 128\] in the weights, and \[64, 96\] by config\.json",
    }
    with pytest.raises(ValueError, match=says[change]):
        load_model(folder)
