"""GGUF files: what a header says, and the config and tokenizer that do what it says.

transformers builds the tokenizer of a GGUF file from its vocabulary, and leaves out what the file says beside it: that
every text begins with BOS, that no space stands before it, and that there are several end tokens. A model that never
saw a text without BOS then reads every text without one. Here the header decides. Where it says nothing, the defaults
of llama.cpp do, for which the file was written (`llama_vocab::impl::load` in its `src/llama-vocab.cpp`).

The header is read in milliseconds, without the weights, so everything that depends on it is known before they load.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer
from transformers.integrations.gguf.reader import read_gguf_metadata

from minillm.errors import InputError

_SPACE = "▁"  # how SentencePiece writes a space
# Kinds of byte-level vocabularies whose texts begin with BOS if the file says nothing.
_PRE_WITH_BOS = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"}
    | {"tekken", "chameleon"}
)
_FIRST_TURN = [{"role": "user", "content": "a"}]


@dataclass(frozen=True)
class TokenizerFacts:
    """What a header says of the tokenizer, with llama.cpp's defaults where it says nothing.

    Attributes:
        adds_bos: Whether every text begins with BOS.
        adds_eos: Whether every text ends with EOS.
        adds_space: Whether a space is put before every text.
        bos: Id of BOS; None if there is none.
        ends: Every token that ends an answer, EOS first: EOS, end of turn, end of message.
        pad: Id of the token for padding; None if there is none.
        chat_template: The chat template; None if there is none.
    """

    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    bos: int | None
    ends: tuple[int, ...]
    pad: int | None
    chat_template: str | None


def gguf_header(file: str | Path) -> Mapping[str, Any]:
    """Read the metadata of a GGUF file; arrays of text are replaced by their lengths.

    Raises:
        InputError: The file is cut short, or is no GGUF file.
    """
    path = Path(file)
    return _header(str(path), path.stat().st_mtime_ns)


@cache
def _header(file: str, _modified: int) -> Mapping[str, Any]:
    try:
        return read_gguf_metadata(file)[0]
    except Exception as error:  # a file that is cut short fails in the parser wherever it ends
        raise InputError(f"{file}: its header cannot be read as that of a GGUF file ({error})") from error


def tokenizer_facts(header: Mapping[str, Any]) -> TokenizerFacts:
    """Read what a header says of the tokenizer.

    Args:
        header: Metadata of a GGUF file.
    """

    def said(key: str, default: Any = None) -> Any:
        return header.get(f"tokenizer.ggml.{key}", default)

    kind, pre = said("model"), said("pre")
    sentencepiece = kind == "llama"
    ends = [said(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    bos = said("bos_token_id")
    return TokenizerFacts(
        adds_bos=bos is not None and bool(said("add_bos_token", sentencepiece or pre in _PRE_WITH_BOS)),
        adds_eos=ends[0] is not None and bool(said("add_eos_token", kind == "t5")),
        adds_space=bool(said("add_space_prefix", sentencepiece)),
        bos=bos,
        ends=tuple(dict.fromkeys(end for end in ends if end is not None)),
        pad=said("padding_token_id"),
        chat_template=header.get("tokenizer.chat_template"),
    )


def gguf_config(file: str | Path) -> Any:
    """Read the config of the model in a GGUF file, with the special tokens that its header names.

    Raises:
        InputError: The header cannot be read, or describes a model that transformers does not read from GGUF files.
    """
    path = Path(file)
    return copy.deepcopy(_config(str(path), path.stat().st_mtime_ns))


@cache
def _config(file: str, _modified: int) -> Any:
    """Read the config once per version of a file."""
    header = gguf_header(file)
    facts = tokenizer_facts(header)
    with tempfile.TemporaryDirectory() as folder:
        _write_outline(file, header, Path(folder) / "outline.gguf")
        try:
            config: Any = AutoConfig.from_pretrained(folder, gguf_file="outline.gguf")
        except (ValueError, KeyError) as error:
            raise InputError(f"{file}: transformers reads no such model from a GGUF file: {error}") from error
    tokens = header.get("tokenizer.ggml.tokens", config.vocab_size)
    config.name_or_path, config.vocab_size = file, header.get(f"{header['general.architecture']}.vocab_size", tokens)
    config.bos_token_id, config.pad_token_id = facts.bos, facts.pad
    config.eos_token_id = list(facts.ends) if len(facts.ends) > 1 else next(iter(facts.ends), None)
    return config


def _write_outline(file: str, header: Mapping[str, Any], outline: Path) -> None:
    """Write a GGUF file of what a config is made of: the settings of the model, and the names of its tensors.

    transformers reads the vocabulary too wherever it reads a config, string by string: a quarter of a minute for
    262,144 tokens.
    """
    architecture = header["general.architecture"]
    writer = GGUFWriter(outline, architecture)
    if "general.name" in header:
        writer.add_name(header["general.name"])
    writer.add_token_list(["of which only the length counts"])
    for key, value in header.items():
        if not key.startswith(f"{architecture}.") and not key.endswith("_token_id"):
            continue
        kinds = {bool: writer.add_bool, int: writer.add_int64, float: writer.add_float64, str: writer.add_string}
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds[type(value)](key, value)
    for name in read_gguf_metadata(file)[1]:
        writer.add_tensor(name, np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_gguf_tokenizer(file: str | Path) -> Any:
    """Build the tokenizer of a GGUF file as its header says.

    Raises:
        InputError: The header cannot be read, or the tokenizer cannot be made to do what it says.
    """
    facts = tokenizer_facts(gguf_header(file))
    architecture, vocabulary, named = get_gguf_tokenizer(str(file))
    backend, more = convert_gguf_tokenizer(architecture, vocabulary)
    _set_space(backend, facts.adds_space, str(file))
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=str(file),
        add_bos_token=facts.adds_bos,
        add_eos_token=facts.adds_eos,
        clean_up_tokenization_spaces=False,
        **{key: value for key, value in (named | more).items() if value is not None},
    )
    _write_bos_in_template(tokenizer, facts)
    found = tokenizer("a")["input_ids"]
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    wanted = [facts.bos] * facts.adds_bos + inner + list(facts.ends[:1]) * facts.adds_eos
    if found != wanted or tokenizer.bos_token_id != facts.bos:
        raise InputError(
            f"{file}: its header says that a text is {wanted}, and its tokenizer makes {found} of it: name a folder of "
            "this model instead"
        )
    return tokenizer


def _set_space(backend: Tokenizer, wanted: bool, file: str) -> None:
    """Make a tokenizer put a space before every text, or not; the tokens of everything else stay as they are."""
    if _puts_space(backend) == wanted:
        return
    parts: Any = backend
    if isinstance(parts.pre_tokenizer, pre_tokenizers.ByteLevel):
        parts.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=wanted)
    elif wanted:
        parts.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    else:
        parts.normalizer, parts.pre_tokenizer = normalizers.Replace(" ", _SPACE), None
    if not isinstance(parts.decoder, decoders.ByteLevel):
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        parts.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if wanted else [])])
    if _puts_space(backend) != wanted:
        said = "a" if wanted else "no"
        raise InputError(
            f"{file}: its header asks for {said} space before a text (tokenizer.ggml.add_space_prefix), which cannot "
            "be set for this tokenizer: name a folder of this model instead"
        )


def _puts_space(backend: Tokenizer) -> bool:
    """Whether a tokenizer puts a space before a text that has none."""
    [(start, _), *_] = backend.encode("a", add_special_tokens=False).offsets or [(0, 0)]
    first, *_ = backend.encode("a", add_special_tokens=False).tokens or [""]
    return start == 0 and first.startswith((_SPACE, "Ġ"))


def _write_bos_in_template(tokenizer: Any, facts: TokenizerFacts) -> None:
    """Let the chat template write BOS where the file asks for it and the template does not.

    llama.cpp puts BOS before what the template renders, unless the template has written it. transformers, and the
    servers that render with the saved template, put nothing before it.
    """
    if not facts.adds_bos or not tokenizer.chat_template:
        return
    try:
        rendered = tokenizer.apply_chat_template(_FIRST_TURN, tokenize=False)
    except Exception:  # a template that takes no such conversation is met, and named, when a prompt is rendered
        return
    if not rendered.startswith(tokenizer.bos_token):
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
