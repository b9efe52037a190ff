"""Pruning, vocabularies, the bound forward, and weights on their way out."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, Qwen2Config, Qwen2ForCausalLM

from minillm.data.batches import pad
from minillm.models.load import find_gguf
from minillm.models.prune import block_similarity, decoder_layers, layers_to_keep, prune
from minillm.models.scoring import Scoring, bind_scoring, head_of, score
from minillm.models.vocabulary import VocabularyError, check_same_tokens, token_count
from minillm.models.weights import plain_weights
from tests.conftest import tiny_llama, tiny_tokenizer


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=5, n_head=2, n_positions=64)).eval()


def opt() -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(vocab_size=32, hidden_size=32, num_hidden_layers=5, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=16)
    ).eval()


def qwen2() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


FAMILIES = {"gpt2": gpt2, "opt": opt, "qwen2": qwen2, "llama": lambda: tiny_llama(0, layers=5)}


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_blocks_is_skipping_them(family: str) -> None:
    model = FAMILIES[family]()
    kept = [0, 2, 4]
    pruned = prune(model, kept)
    ids = torch.tensor([[3, 5, 7, 2]])
    _, layers = decoder_layers(model)
    with torch.no_grad():
        for index in (1, 3):  # the whole model, with those blocks made to do nothing
            layers[index].forward = lambda hidden_states, *a, **k: hidden_states  # pyright: ignore
        want = model(ids, use_cache=False).logits
        torch.testing.assert_close(pruned(ids, use_cache=False).logits, want)
    assert pruned.config.num_hidden_layers == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_forward_scores_what_the_plain_one_predicts(family: str) -> None:
    student, teacher = FAMILIES[family](), FAMILIES[family]()
    prompts, responses = [[3, 1, 5], [4]], [[7, 1], [9, 8, 2, 1]]  # an EOS inside a prompt is a token like any other
    want = []
    with torch.no_grad():
        for prompt, response in zip(prompts, responses, strict=True):
            logits = student(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            want += torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0].tolist()
    keys = list(student.state_dict())
    bind_scoring(bind_scoring(student))
    with torch.no_grad():
        _, scores = score(student, Scoring(pad(prompts, responses), 32))
    assert scores.logq.tolist() == pytest.approx(want, abs=1e-4)
    assert list(student.state_dict()) == keys
    assert student(torch.tensor([[1, 2]])).logits.shape == (1, 2, 32)  # otherwise it is what it was
    assert head_of(teacher).weight.shape[0] == 32


def test_the_blocks_that_change_least_go() -> None:
    model = tiny_llama(0, layers=6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("model.layers.2.", "model.layers.3.")) and ("o_proj" in name or "down_proj" in name):
                parameter.mul_(1e-3)
    similarity = block_similarity(model, [[3, 4, 5], [6, 7]])
    assert similarity.shape == (6,)
    assert layers_to_keep(similarity, 4) == [0, 1, 4, 5]
    with pytest.raises(ValueError, match=r"between 2 and the teacher's 6 layers \(given: 7\)"):
        layers_to_keep(similarity, 7)


def test_vocabularies() -> None:
    ours, theirs = tiny_tokenizer(), tiny_tokenizer()
    check_same_tokens(ours, theirs)
    assert token_count(ours) == 32
    theirs.add_tokens(["more"])
    with pytest.raises(VocabularyError, match="id 32 is None for the student and 'more' for the teacher"):
        check_same_tokens(ours, theirs)


def test_an_adapter_is_merged_on_its_way_out_and_refused_on_the_head() -> None:
    base = tiny_llama(0)
    names = [name for name, _ in plain_weights(base, torch.float32)]
    student = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))  # pyright: ignore
    plain = tiny_llama(1)
    weights = dict(plain_weights(student, torch.float32))
    assert sorted(weights) == sorted(names)
    plain.load_state_dict(weights)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, student(ids).logits, rtol=1e-4, atol=1e-5)
    bind_scoring(student)  # pyright: ignore
    with torch.no_grad():
        _, scores = score(student, Scoring(pad([[3]], [[4, 5]]), 32))  # pyright: ignore
    want = torch.log_softmax(plain(ids).logits[0, :-1], -1).gather(1, torch.tensor([[4], [5]]))[:, 0]
    torch.testing.assert_close(scores.logq, want.detach(), rtol=1e-4, atol=1e-5)
    headed = get_peft_model(tiny_llama(2, tied=False), LoraConfig(r=4, target_modules=["lm_head"]))  # pyright: ignore
    with pytest.raises(ValueError, match="an adapter on the output head is not scored"):
        head_of(headed)  # pyright: ignore


def test_missing_sources_are_named(tmp_path: object) -> None:
    with pytest.raises(FileNotFoundError, match="no package no_such_package is installed"):
        find_gguf("package:no_such_package")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gguf: no such file"):
        find_gguf("nowhere.gguf")
    assert find_gguf("some/hub-id") is None
