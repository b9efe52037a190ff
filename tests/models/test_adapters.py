"""An adapter is merged whole, or refused: PEFT takes what fits and warns of the rest."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from minillm.models import load
from minillm.models.adapters import check_adapter_files, merge_adapter
from minillm.models.load import load_model
from tests.conftest import save, tiny_llama

LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def adapt(model: Any, config: Any, folder: Path, *, trained: bool = True, **saving: Any) -> Any:
    """A random adapter in a folder; the adapted model."""
    torch.manual_seed(3)
    adapted: Any = get_peft_model(model, config)
    if trained:
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder, **saving)
    set_in(folder, base_model_name_or_path="some/base")  # which PEFT has named after the model
    return adapted.eval()


KINDS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: LoraConfig(**LORA),
    "rank-stabilised, of several ranks": lambda: LoraConfig(**LORA, use_rslora=True, rank_pattern={"q_proj": 3}),
    "some layers": lambda: LoraConfig(**LORA, layers_to_transform=[1]),
    "DoRA": lambda: LoraConfig(**LORA, use_dora=True),
    "embedding": lambda: LoraConfig(**dict(LORA, target_modules=["q_proj", "embed_tokens"])),
    "modules to save": lambda: LoraConfig(**LORA, modules_to_save=["lm_head", "norm"]),
    "tokens": lambda: LoraConfig(**LORA, trainable_token_indices=[3, 4]),
    "IA3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": lambda: LoHaConfig(r=2, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_fits_is_merged_whole(kind: str, tmp_path: Path) -> None:
    base = save(tiny_llama(0, tied=False), tmp_path / "base")
    adapted = adapt(load_model(base, torch.float32), KINDS[kind](), tmp_path / "adapter")
    check_adapter_files(base, str(tmp_path / "adapter"))
    merged: Any = merge_adapter(load_model(base, torch.float32), str(tmp_path / "adapter"))
    merged.save_pretrained(tmp_path / "merged")
    plain: Any = load_model(tmp_path / "merged", torch.float32)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plain(ids).logits, load_model(base, torch.float32)(ids).logits, atol=1e-3)


def renamed(folder: Path, change: Callable[[str], str | None]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({new: value for name, value in load_file(file).items() if (new := change(name)) is not None}, file)


def grown() -> Any:
    model = tiny_llama(0, tied=False)
    model.resize_token_embeddings(36)
    return model


def set_in(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


# A model that is adapted, what is done to its adapter's folder, and what is said.
MISFITS: dict[str, tuple[Callable[[], Any], Callable[[Path], Any], str]] = {
    "of a deeper base": (
        lambda: tiny_llama(0, layers=4, tied=False), lambda _: None,
        r"belongs to some/base, does not fit .*base: 8 of its tensors have no place in the model \(base_model\.model\.model\.layers\.2\.",
    ),
    "of a shallower base": (
        lambda: tiny_llama(0, layers=1, tied=False), lambda _: None, r"4 that the model would need are not in it \(.*layers\.1\.",
    ),
    "of a wider base": (lambda: tiny_llama(0, width=96, tied=False), lambda _: None, "size mismatch"),
    "of another prefix": (
        lambda: tiny_llama(0, tied=False),
        lambda folder: renamed(folder, lambda name: name.replace("model.layers", "model.language_model.layers")),
        r"8 of its tensors have no place in the model \(.*language_model.*, and 8 that the model would need are not in it",
    ),
    "without a prefix": (
        lambda: tiny_llama(0, tied=False),
        lambda folder: renamed(folder, lambda name: name.removeprefix("base_model.model.")),
        "8 of its tensors have no place in the model",
    ),
    "in part": (
        lambda: tiny_llama(0, tied=False),
        lambda folder: renamed(folder, lambda name: None if "layers.0" in name and "lora_B" in name else name),
        "2 that the model would need are not in it",
    ),
    "of other modules": (
        lambda: tiny_llama(0, tied=False), lambda folder: set_in(folder, target_modules=["c_attn"]), "c_attn.* not found",
    ),
    "of more tokens": (grown, lambda _: None, r"embed_tokens.*\[36, 64\]"),
    "of no kind": (
        lambda: tiny_llama(0, tied=False),
        lambda folder: set_in(folder, peft_type="LOTA"),
        "adapter_config.json cannot be read",
    ),
    "cut short": (
        lambda: tiny_llama(0, tied=False),
        lambda folder: (file := folder / "adapter_model.safetensors").write_bytes(file.read_bytes()[:-10]),
        "the weights cannot be read",
    ),
    "without tensors": (
        lambda: tiny_llama(0, tied=False), lambda folder: (folder / "adapter_model.safetensors").unlink(), "neither adapter_model",
    ),
    "without a config": (
        lambda: tiny_llama(0, tied=False), lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter_config.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_refused_before_weights_load_and_when_it_is_merged(
    misfit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = save(tiny_llama(0, tied=False), tmp_path / "base"), tmp_path / "adapter"
    make, damage, says = MISFITS[misfit]
    more = {"save_embedding_layers": True} if misfit == "of more tokens" else {}
    adapt(make(), LoraConfig(**LORA), adapter, **more)
    damage(adapter)
    model = load_model(base)
    monkeypatch.setattr(load, "load_model", lambda *_: pytest.fail("weights were loaded"))
    for call, what in ((check_adapter_files, base), (merge_adapter, model)):
        with pytest.raises((ValueError, OSError), match=says) as refused:
            call(what, str(adapter))  # pyright: ignore[reportArgumentType]
        assert str(adapter) in str(refused.value)
        assert "\n" not in str(refused.value)


def test_kinds_without_weights_to_merge_are_refused(tmp_path: Path) -> None:
    base = save(tiny_llama(0), tmp_path / "base")
    adapt(
        tiny_llama(0),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        tmp_path / "adapter",
        trained=False,
    )
    with pytest.raises(ValueError, match="an adapter of kind PROMPT_TUNING cannot be merged"):
        check_adapter_files(base, str(tmp_path / "adapter"))
    with pytest.raises(FileNotFoundError, match=r"it is a whole model: name it as teacher\.source"):
        check_adapter_files(base, base)


def test_pickled_adapters_are_taken_if_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(tiny_llama(0), tmp_path / "base")
    adapt(tiny_llama(0), LoraConfig(**LORA), tmp_path / "adapter", safe_serialization=False)
    assert (tmp_path / "adapter" / "adapter_model.bin").is_file()
    with pytest.raises(ValueError, match=r"adapter_model\.bin: these weights are a pickle"):
        check_adapter_files(base, str(tmp_path / "adapter"))
    monkeypatch.setenv("MINILLM_ALLOW_PICKLE", "1")
    check_adapter_files(base, str(tmp_path / "adapter"))
    merged = merge_adapter(load_model(base), str(tmp_path / "adapter")).state_dict()
    assert not torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"],
        load_model(base).state_dict()["model.layers.0.self_attn.q_proj.weight"],
    )


def test_an_adapter_that_changes_nothing_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, adapter = save(tiny_llama(0), tmp_path / "base"), tmp_path / "adapter"
    adapt(tiny_llama(0), LoraConfig(**LORA), adapter, trained=False)  # whose B is zero
    with caplog.at_level(logging.WARNING, "minillm"):
        merge_adapter(load_model(base), str(adapter))
    assert "the adapter changes nothing: was it trained?" in caplog.text
    adapt(tiny_llama(0), LoraConfig(**LORA), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value * 1e-6 for name, value in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"too small to change a weight in torch\.bfloat16"):
        merge_adapter(load_model(base), str(adapter))
