"""Every setting a recipe can hold, typed; imports nothing else of this package.

A section is a pydantic model that refuses unknown keys. The string under a field is its documentation.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

STAGES = ("teacher", "student", "responses", "warmup", "minillm", "evaluate", "report")
Stage = Literal["teacher", "finetune", "student", "responses", "warmup", "sft", "minillm", "evaluate", "report"]

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _at_home(given: Any) -> Any:
    """`~` and `~name` are read here, once: other libraries read it in some places and not in others."""
    return os.path.expanduser(given) if isinstance(given, str) else given.expanduser() if isinstance(given, Path) else given


LocalPath = Annotated[Path, BeforeValidator(_at_home)]
ModelSource = Annotated[str, BeforeValidator(_at_home)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


def _is_template(name: str) -> str:
    if name in ("chat", "alpaca", "plain") or name.endswith(".jinja") or "{{" in name or "{%" in name:
        return name
    raise ValueError("chat, alpaca, plain, a .jinja file or a Jinja text is needed")


Template = Annotated[str, AfterValidator(_is_template), BeforeValidator(_at_home)]


class Source(Section):
    """Where rows come from; the path of a JSONL file alone will do."""

    file: LocalPath | None = None
    """JSONL, one object a line."""
    dataset: ModelSource | None = None
    """Instead: anything that `datasets.load_dataset` takes, e.g. a hub id."""
    config: str | None = None
    """Its configuration."""
    revision: str | None = None
    """Its branch, tag or commit on the hub; `refs/convert/parquet` is the hub's own copy of one that is still a program."""
    split: str = "train"
    """Its split, slices included: `train[:1000]`."""
    columns: dict[str, str] = {}
    """Which of its columns is `instruction`, `input`, `output`, `messages` or `text`, where that is not known: the names of Dolly
    (`context`, `response`), Alpaca, `prompt`/`completion` and chats (`messages`) are."""

    @model_validator(mode="before")
    @classmethod
    def _just_a_file(cls, given: Any) -> Any:
        return {"file": given} if isinstance(given, str | Path) else given

    @model_validator(mode="after")
    def _one_source(self) -> Source:
        if (self.file is None) == (self.dataset is None):
            raise ValueError("either file or dataset is needed, and not both")
        return self

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.file or self.dataset)


class DataConfig(Section):
    train: Source
    """Training prompts: `instruction` with an optional `input`, `prompt`, or `messages`, a chat of which every answer of the
    assistant counts as one row."""
    heldout: Source
    """Prompts that no stage trains on."""
    validation: Source | None = None
    """Prompts with references, on which training stages are validated as often as their `training.eval_steps` say."""
    validation_limit: Positive | None = None
    """Use its first rows only."""
    text: Source | None = None
    """Rows of `text`, for the language-model term of the minillm stage; as many are read as its updates need."""
    template: Template = "chat"
    """`chat`: the tokenizer's chat template; `alpaca`: the MiniLLM paper's; `plain`: the text as it stands; or your own in Jinja, as
    a `.jinja` file or as text, of `instruction`, `input`, `system`, `messages`, `bos_token` and `eos_token`."""
    system: str | None = None
    """System message of the chat template; none leaves the template's own. A chat that brings one keeps it."""
    max_prompt_tokens: Positive = 256
    """A rendered prompt longer than this is left out, counted and reported; it is never cut."""
    limit: Positive | None = None
    """Use only the first rows of each file (to try a recipe)."""


class TeacherConfig(Section):
    source: ModelSource
    """A Hugging Face folder or hub id, a `.gguf` file, or `package:NAME` for a GGUF file inside an installed package."""
    adapter: ModelSource | None = None
    """A PEFT adapter's folder or hub id, which the teacher stage merges into `source`."""
    shard: bool = False
    """Deal its blocks out over all processes of the warm-up and minillm stages (FSDP2), for a teacher that one GPU does not hold.
    Not with teacher mixing, whose rounds differ between processes."""
    servers: list[str] = []
    """`http://host:port` of `vllm serve` processes that hold the teacher: in the minillm stage they score the rollouts, and
    only `source`'s tokenizer and config are read. See `minillm.teacher.served` for what that costs in exactness."""
    top_k: Annotated[int, Field(ge=1, le=19)] = 16
    """The student's likeliest tokens of which a served teacher tells log p, for the single-step term."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Hold it in 8 bits (LLM.int8) or 4 (NF4), by bitsandbytes, where it reads: in warm-up, minillm and evaluation. Its head and
    embeddings stay as they are, and so does the teacher that answers in the responses stage."""

    @model_validator(mode="after")
    def _quantized_here(self) -> TeacherConfig:
        if self.quantization and (self.shard or self.servers):
            what = "shard: bitsandbytes' layers are not dealt out" if self.shard else "servers: they hold the teacher as they were started"
            raise ValueError(f"quantization with {what}; set one of the two")
        return self


class AdapterConfig(Section):
    """A LoRA adapter. It has no dropout: the student that is scored is the one that sampled."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    """The adapter is scaled by alpha/rank, or alpha/√rank with `rslora`."""
    rslora: bool = False
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the layers that get one; `all-linear` is every linear layer but the head."""
    quantization: Literal["4bit"] | None = None
    """QLoRA: the frozen base in 4 bits (NF4), by bitsandbytes. What is sampled and saved is what it stands for, with the adapter merged."""

    @model_validator(mode="after")
    def _not_on_the_head(self) -> AdapterConfig:
        if heads := sorted({"lm_head", "embed_out"} & set(self.targets)):
            raise ValueError(f"targets: {', '.join(heads)}: an adapter on the output head is not scored; leave it out")
        return self


class StudentConfig(Section):
    source: ModelSource = "prune"
    """`prune`: the teacher with fewer layers; otherwise a folder or hub id."""
    keep_layers: Positive | None = None
    """Layers that stay when pruning."""
    probe_prompts: Positive = 64
    """Training prompts on which the similarity of each block's input and output is measured."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the student is saved in at the end; `auto` is what its teacher is saved in. Masters are float32 while it trains, and so are
    folders that a later stage goes on from."""
    lora: AdapterConfig | None = None
    """Every stage that trains the student trains an adapter of its own and leaves the student with it merged, the adapter itself
    beside it in `adapter`."""


class ResponsesConfig(Section):
    file: LocalPath | None = None
    """The `responses.jsonl` of another run with the same teacher and prompts, instead of answers of this run's own."""
    max_new_tokens: Positive = 128
    samples_per_prompt: Positive = 1
    temperature: Annotated[float, Field(gt=0)] = 1.0


class DivergenceConfig(Section):
    """A divergence between the student's q and the teacher's p at each token; see `minillm.loss.divergences`."""

    name: Literal[
        "forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl", "total_variation", "adaptive_kl", "alpha_beta"
    ]
    alpha: float | None = None
    """Of `alpha_beta`."""
    beta: float | None = None
    """Of `jensen_shannon` (GKD's β: towards 0 the forward, towards 1 the reverse KL) and of `alpha_beta`."""
    skew: float | None = None
    """λ of the skew divergences (DistiLLM: 0.1)."""
    head_mass: float | None = None
    """Of `adaptive_kl`: mass of p that counts as its head."""

    @model_validator(mode="before")
    @classmethod
    def _just_a_name(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _parameters(self) -> DivergenceConfig:
        takes = {
            "jensen_shannon": {"beta"}, "skew_forward_kl": {"skew"}, "skew_reverse_kl": {"skew"}, "adaptive_kl": {"head_mass"},
            "alpha_beta": {"alpha", "beta"},
        }.get(self.name, set())  # fmt: skip
        if spare := set(self.parameters) - takes:
            raise ValueError(f"{self.name} takes {' and '.join(sorted(takes)) or 'no parameter'}, not {', '.join(sorted(spare))}")
        return self

    @property
    def parameters(self) -> dict[str, float]:
        """Those that were given."""
        named = {"alpha": self.alpha, "beta": self.beta, "skew": self.skew, "head_mass": self.head_mass}
        return {name: value for name, value in named.items() if value is not None}


class WarmupConfig(Section):
    cross_entropy: Share = 0.5
    """λ in λ·CE + (1−λ)·D on given answers (the paper's word-level KD uses 0.5; 1 is fine-tuning)."""
    divergence: DivergenceConfig = DivergenceConfig(name="forward_kl")
    """D; its name alone, or with its parameters."""
    targets: Literal["teacher", "references"] = "teacher"
    """Answers of the teacher (SeqKD), or those in the data (SFT, word-level KD)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits of student and teacher in D."""
    cross_entropy_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the student's logits in the cross-entropy: at 1 it is the student as it samples that is fitted to the answers."""
    training: dict[str, Any] = {}
    """`transformers.TrainingArguments` of this stage."""


# Arguments of vllm.LLM that are not the user's.
_OURS = {
    "model", "tokenizer", "skip_tokenizer_init", "dtype", "seed", "max_model_len", "logprobs_mode", "enable_prefix_caching", "enable_lora",
    "max_loras", "max_lora_rank", "kv_cache_memory_bytes", "gpu_memory_utilization", "distributed_executor_backend", "enable_sleep_mode",
    "block_size", "enable_chunked_prefill",
}  # fmt: skip


class RolloutConfig(Section):
    """How the student's responses are drawn."""

    engine: Literal["auto", "vllm", "transformers", "server"] = "auto"
    """`auto`: vLLM where it is installed, else transformers, saying so; `vllm` and `transformers` insist; `server`: the
    `servers`, for the student's rollouts."""
    servers: list[str] | Literal["auto"] = []
    """`http://host:port` of running `vllm serve` processes; see `minillm.rollout.vllm_server` for how to start them. `auto`:
    process 0 starts one on this machine, which all training processes share (with `engine: vllm` each has its own)."""
    server_patience: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for which a server that is gone is tried again, before the run stops with a checkpoint."""
    server_timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that one answer of a server may take: longer where responses are long and the server slow."""
    overlap: bool = False
    """Draw the next batch of rollouts while this one trains, with the weights before it: one batch off policy."""
    num_rollouts: Positive = 32
    """Responses drawn, over all processes, between two weight updates of the engine."""
    samples_per_prompt: Positive = 1
    """Responses of each prompt in a batch; `num_rollouts` counts responses."""
    inner_epochs: Positive = 2
    """Passes over each batch of rollouts (`ppo_epochs` in the authors' code)."""
    on_policy: Share = 1.0
    """Share of each batch that is drawn from the student; the rest are the given responses (GKD's λ). Below 1 only without a
    long-term term, which counts on the student's own samples."""
    replay: Share = 0.0
    """Of what is drawn from the student, the share that comes from earlier batches again (DistiLLM)."""
    replay_size: Positive = 1000
    """Responses that are kept for that, over all processes; the oldest go first."""
    teacher_mix: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    """α: tokens are drawn from (1−α)·q + α·p (paper section 2.2)."""
    max_new_tokens: Positive = 128
    max_prompt_tokens: Positive = 256
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits of student and teacher, in sampling and in the loss alike."""
    draft_tokens: Positive | Literal["auto"] = "auto"
    """Student tokens drafted before the teacher checks them (teacher-mixed sampling); `auto`: for each batch of rollouts what
    the acceptance of the batch before makes best."""
    stop: list[str] = []
    """Strings of which the first to appear in a response's text ends it; the token that completes it belongs to it."""
    lora: Literal["merged", "adapter"] = "merged"
    """How a LoRA student reaches the engine: merged into its base, whole; or `adapter`: alone, to vLLM in this process, which keeps
    the base. That sends little, and rounds as the trainer does."""
    engine_memory: Annotated[float, Field(gt=0)] | None = None
    """vLLM's key-value cache in GiB; by default what the rollouts of a batch need at full length, as far as there is room."""
    engine_options: dict[str, Any] = {}
    """Further arguments of `vllm.LLM` in this process, as {enforce_eager: true} to start sooner and draw more slowly."""

    @model_validator(mode="before")
    @classmethod
    def _filters(cls, given: Any) -> Any:
        for key in ("top_p", "top_k", "min_p", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size"):
            if isinstance(given, dict) and key in given:
                raise ValueError(
                    f"{key}: importance weights need every token that the student can draw, and the loss the very distribution "
                    "that draws; a filter takes tokens away from one and not from the other. Use temperature"
                )
        return given

    @model_validator(mode="after")
    def _servers(self) -> RolloutConfig:
        if self.num_rollouts % self.samples_per_prompt:
            raise ValueError(f"num_rollouts ({self.num_rollouts}) must be a multiple of samples_per_prompt ({self.samples_per_prompt})")
        if (self.engine == "server") != bool(self.servers):
            raise ValueError("engine: server needs servers (http://host:port, one or several), and servers need engine: server")
        if "tensor_parallel_size" in self.engine_options or "pipeline_parallel_size" in self.engine_options:
            raise ValueError(
                "engine_options: an engine in the training process has one GPU; start vllm serve --tensor-parallel-size N and set "
                "engine: server"
            )
        if taken := sorted(set(self.engine_options) & _OURS):
            raise ValueError(f"engine_options: {', '.join(taken)} follows from the recipe; exactness and memory depend on it")
        if self.engine_options and self.engine in ("server", "transformers"):
            raise ValueError(f"engine_options are of vLLM in the training process, not of engine: {self.engine}")
        if self.lora == "adapter" and self.engine == "server":
            raise ValueError("lora: adapter is for vLLM in the training process; servers take merged weights: set lora: merged")
        return self


def check_off_policy(rollout: RolloutConfig, objective: Objective) -> None:
    """Responses that the student did not draw, or not as it is, carry no long-term term.

    Raises:
        ValueError: naming the setting to change.
    """
    for name, value in (("on_policy", rollout.on_policy < 1), ("replay", rollout.replay > 0)):
        if value and (objective.long_term or objective.single_step_weight != "none"):
            raise ValueError(
                f"rollout.{name} trains on responses that the student did not draw as it is, which the long-term term and its "
                "weights cannot take: set objective.long_term: 0 and objective.single_step_weight: none"
            )


def check_served_teacher(rollout: RolloutConfig, objective: Objective) -> None:
    """What a teacher that is only asked for log-probabilities cannot do.

    Raises:
        ValueError: naming the setting to change.
    """
    if rollout.temperature != 1.0:
        raise ValueError(
            f"rollout.temperature: {rollout.temperature:g} with a served teacher: its log-probabilities are of temperature 1, and "
            "those of another need every logit for their sum; set 1"
        )
    if rollout.on_policy < 1:
        raise ValueError("rollout.on_policy with a served teacher: of given responses the student's likeliest tokens are not known; set 1")
    if rollout.teacher_mix:
        raise ValueError("rollout.teacher_mix with a served teacher: mixing draws from the teacher's whole rows; set 0")
    if objective.language_model and objective.language_model_distill:
        raise ValueError("objective.language_model_distill with a served teacher: text is not scored by it; set 0")


def check_sharded_teacher(rollout: RolloutConfig, objective: Objective, text: bool) -> None:
    """What a teacher in shards cannot do, whose every reading is done by all processes together.

    Raises:
        ValueError: naming the setting to change.
    """
    if rollout.teacher_mix:
        raise ValueError("teacher.shard: teacher mixing reads in rounds that differ between processes: set rollout.teacher_mix: 0")
    if text and objective.language_model and objective.language_model_distill:
        raise ValueError(
            "teacher.shard: processes read text in different numbers of pieces and would wait for each other for ever: set "
            "objective.language_model_distill: 0"
        )


class Objective(Section):
    """What is minimised; see `minillm.loss.credit` for the equations. Start from a preset and change what differs."""

    preset: Literal["paper", "reference", "recommended", "exact"] = "recommended"
    """Which preset the other fields start from."""
    reward: Literal["sampled", "expected"] = "expected"
    """r_k = log p(y_k) − log q_old(y_k), or its expectation −KL_k, as it was when the response was first trained on."""
    reward_scale: Annotated[float, Field(gt=0)] = 1.0
    """Sampled rewards are divided by this (the authors' code: 0.5). It scales the long-term term alone, against the single step."""
    reward_clip: Annotated[float, Field(gt=0)] | None = None
    """Then clipped to ± this: one token that the teacher all but excludes must not outweigh the rest."""
    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    """γ: R_t = Σ_k γ^{k−s} r_k. 1, as in the paper, is the gradient of KL; less trades bias for variance."""
    return_from: Literal["next", "current"] = "next"
    """R_{t+1} (the paper; the single step holds the immediate reward) or R_t."""
    length_norm: bool = True
    """Divide a return by its number of summands (equation 6 of the paper): sums favour short responses."""
    baseline: Literal["none", "centre", "whiten", "whiten_padded"] = "centre"
    """`centre`: subtract the mean return of a token of the batch's other responses (leave-one-out); for expected rewards the student
    reads the rollouts once more, before it trains on them. `whiten`: mean and spread of the micro-batch; `whiten_padded`: its padding
    counted as zeros, as the authors' code does."""
    importance: Literal["none", "token", "prefix"] = "token"
    """Long-term weight: none, ρ_t, or the per-decision product ρ_1…ρ_k (equation B of `minillm.loss.credit`)."""
    old_logprobs: Literal["engine", "trainer"] = "engine"
    """Whose log q_old: the engine's, which drew the tokens, or those of one more forward of the student (the authors'
    code), from which ρ is then taken too."""
    importance_truncation: Annotated[float, Field(ge=1)] | None = None
    """Upper bound of an importance weight and, without `clip`, of the ratio q_θ/q_old, in which the numbers of the engine
    that drew and of the trainer may differ."""
    clip: Annotated[float, Field(gt=0, lt=1)] | None = 0.2
    """ε of min(ρ̂·A, clip(ρ̂, 1±ε)·A), ρ̂ = q_θ/q_old (the paper after PPO); none: the plain ratio. It bounds the ratio where A > 0."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """With `clip`, upper bound of the ratio where A < 0 (after arXiv 1912.09729; a token beyond it still counts, as much as the
    bound), where an engine that gives a token e^5 times less than the trainer would weigh it e^5 times. None in the paper and in the
    authors' code, nor in their presets."""
    weight_in_clip: bool = False
    """Clip w·ρ̂ (the authors' code) rather than ρ̂ (the paper)."""
    divergence: DivergenceConfig = DivergenceConfig(name="reverse_kl")
    """What the single step takes the exact gradient of; the long-term term knows the reverse KL alone."""
    single_step: Annotated[float, Field(ge=0)] = 1.0
    """Coefficient of the exact KL_t, the first part of (B) and of the paper's equation 7."""
    single_step_weight: Literal["none", "token", "prefix"] = "none"
    """Weight of KL_t: none, ρ_t (the paper), or ρ_1…ρ_{t−1}."""
    long_term: Annotated[float, Field(ge=0)] = 1.0
    """Coefficient of the policy-gradient term, the second part of (B) and of the paper's equation 7."""
    language_model: Annotated[float, Field(ge=0)] = 1.0
    """Coefficient of −log q on text (L_PT of algorithm 1), which keeps what pre-training taught; only where text is given."""
    language_model_distill: Share = 0.0
    """Share of that term which is forward KL to the teacher (0.5 in the authors' code)."""
    language_model_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits in that term, whatever `rollout.temperature` divides them by in the others."""
    language_model_block: Annotated[int, Field(ge=2)] = 512
    """Tokens in a block of text; documents that share a block do not see each other."""
    normalise: Literal["update_tokens", "micro_batch_tokens"] = "update_tokens"
    """Divide sums over tokens by the token count of the whole update over all processes, or of the micro-batch."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        if isinstance(given, dict):
            preset = given.get("preset", "recommended")
            if isinstance(preset, str) and preset in PRESETS:
                return {**PRESETS[preset], **given}
        return given

    @model_validator(mode="after")
    def _combinations(self) -> Objective:
        if self.weight_in_clip and self.clip is None:
            raise ValueError("weight_in_clip needs clip (a number between 0 and 1)")
        if self.clip and self.dual_clip and self.dual_clip <= 1 + self.clip:
            raise ValueError(f"dual_clip ({self.dual_clip:g}) bounds what clip does not: it must be above 1 + clip ({1 + self.clip:g})")
        if self.reward == "expected" and (self.reward_scale != 1.0 or self.reward_clip is not None):
            raise ValueError("reward_scale and reward_clip apply to reward: sampled; the expected reward is -KL as it is")
        if self.reward == "expected" and self.baseline.startswith("whiten"):
            raise ValueError("whitening needs every return beforehand: use reward: sampled, or baseline: centre")
        if self.importance == "none" and self.weight_in_clip:
            raise ValueError("weight_in_clip has no weight to clip: set importance: token")
        if self.importance_truncation is not None and self.clip and self.importance == "none" and self.single_step_weight == "none":
            raise ValueError("importance_truncation has no weight to truncate: set importance or single_step_weight, or clip: null")
        if self.importance == "prefix" and self.weight_in_clip:
            raise ValueError("weight_in_clip holds for importance: token")
        if self.importance == "prefix" and self.baseline != "none":
            raise ValueError("importance: prefix weighs rewards, not the score; a baseline would bias it: set baseline: none")
        if self.divergence.name != "reverse_kl" and self.long_term:
            raise ValueError(f"divergence: {self.divergence.name} has no long-term term; set long_term: 0")
        if self.importance == "prefix" and self.length_norm:
            raise ValueError("importance: prefix weighs each future reward; it has no length-normalised form")
        return self

    @classmethod
    def paper(cls, **changes: Any) -> Objective:
        """Equations 5 to 8 of arXiv 2306.08543."""
        return cls(preset="paper", **changes)

    @classmethod
    def reference(cls, **changes: Any) -> Objective:
        """What the authors' released code computes."""
        return cls(preset="reference", **changes)

    @classmethod
    def recommended(cls, **changes: Any) -> Objective:
        """Expected future rewards, token weights outside the clip, centred, one token count per update."""
        return cls(preset="recommended", **changes)

    @classmethod
    def exact(cls, **changes: Any) -> Objective:
        """The unbiased gradient of KL(q‖p), equation (B), at the first update on a batch; its variance grows with length.

        Later updates on the same batch have moved away from q_old, which W does not follow: for an exact gradient at every
        update, one rollout batch an update and one inner epoch.
        """
        return cls(preset="exact", **changes)


PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "paper": {"reward": "sampled", "baseline": "none", "single_step_weight": "token", "dual_clip": None},
    "reference": {
        "reward": "sampled", "reward_scale": 0.5, "reward_clip": 100.0, "discount": 0.95, "return_from": "current",
        "baseline": "whiten_padded", "dual_clip": None, "weight_in_clip": True, "language_model_distill": 0.5,
        "old_logprobs": "trainer", "normalise": "micro_batch_tokens",
    },
    "exact": {
        "length_norm": False, "baseline": "none", "importance": "prefix", "single_step_weight": "prefix", "clip": None,
    },
}  # fmt: skip


def different(values: list[Any]) -> list[Any]:
    """Refuse a value that is there twice: what it stands for, as a seed's answers, would be made twice and counted as two."""
    if again := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"{', '.join(map(str, again))} is there more than once; name each once")
    return values


class EvaluateConfig(Section):
    seeds: Annotated[list[int], Field(min_length=2), AfterValidator(different)] = [10, 20, 30]
    """Sampling seeds; at least two, because the teacher is scored on another seed's answers."""
    max_new_tokens: Positive = 128
    temperature: Annotated[float, Field(gt=0)] = 1.0
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples of the prompts behind each 95 % interval."""
    min_reverse_kl_reduction: Annotated[float, Field(le=1)] | None = None
    """The fall of KL(q‖p) from warm-up to minillm that is expected of this recipe, as a share (0.15 is 15 %). Where it is given, the
    verdict at the end says whether it was reached, by the whole of the paired interval; the verdict itself does not depend on it."""
    max_rouge_l_loss: Annotated[float, Field(ge=0)] = 1.0
    """The verdict: Rouge-L points that may be lost. minillm is worse where the whole paired interval lies beyond them."""
    max_finished_loss: Annotated[float, Field(ge=0)] = 2.0
    """The verdict: percentage points of finished responses that may be lost, as for Rouge-L."""


class Recipe(Section):
    run_dir: LocalPath
    """Where everything the run makes is kept."""
    seed: int = 0
    stages: list[Stage] = list(STAGES)
    """What `minillm run` does, in this order. Besides those of the default: `finetune`, the teacher on the data's references;
    `sft`, the student on them."""
    data: DataConfig
    teacher: TeacherConfig
    student: StudentConfig = StudentConfig()
    responses: ResponsesConfig = ResponsesConfig()
    warmup: WarmupConfig = WarmupConfig()
    objective: Objective = Objective()
    rollout: RolloutConfig = RolloutConfig()
    training: dict[str, Any] = {}
    """`transformers.TrainingArguments` of the minillm stage."""
    finetune: dict[str, Any] = {}
    """`transformers.TrainingArguments` of the finetune stage."""
    sft: dict[str, Any] = {}
    """`transformers.TrainingArguments` of the sft stage."""
    evaluate: EvaluateConfig = EvaluateConfig()
    push_to_hub: str | None = None
    """A hub id to which the report stage uploads the student."""

    def trainings(self, *, idle: bool = False) -> list[tuple[Stage, str, dict[str, Any]]]:
        """(stage, section, training arguments) of every stage that trains; `idle`: of those too that are none of the recipe's."""
        known: list[tuple[Stage, str, dict[str, Any]]] = [
            ("finetune", "finetune", self.finetune), ("warmup", "warmup.training", self.warmup.training), ("sft", "sft", self.sft),
            ("minillm", "training", self.training),
        ]  # fmt: skip
        return [each for each in known if idle or each[0] in self.stages]

    @model_validator(mode="after")
    def _pruning(self) -> Recipe:
        if self.data.system is not None and self.data.template in ("alpaca", "plain"):
            raise ValueError(f"data.system: template {self.data.template} has no system message; use chat or a Jinja text, or leave it out")
        if "max_prompt_tokens" in self.rollout.model_fields_set and self.rollout.max_prompt_tokens != self.data.max_prompt_tokens:
            raise ValueError("rollout.max_prompt_tokens: in a recipe data.max_prompt_tokens says it for every stage")
        check_off_policy(self.rollout, self.objective)
        if self.teacher.shard:
            check_sharded_teacher(self.rollout, self.objective, self.data.text is not None)
        if self.teacher.servers:
            check_served_teacher(self.rollout, self.objective)
        if "student" in self.stages and self.student.source == "prune" and self.student.keep_layers is None:
            raise ValueError("student.keep_layers is needed when student.source is prune")
        return self
