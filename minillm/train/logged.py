"""What each number in a training log means, what its curve should look like, and what to do when it does not.

The documents' page of logged metrics is made from this table, and `minillm watch` takes its advice from it. It imports
no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Logged:
    """A number in the log of a training.

    Attributes:
        unit: Its unit.
        meaning: What it is, in sentences.
        expected: What its curve looks like in a healthy run.
        otherwise: What to do when it does not.
    """

    unit: str
    meaning: str
    expected: str
    otherwise: str


_KL_RISES = (
    "Lower the learning rate to a quarter; look at `watched_reverse_kl`, which is on fixed rows; read the samples. "
    "With a weak start, warm up longer."
)
_NOTHING = "Nothing: read it beside the others."

LOGGED: dict[str, Logged] = {
    "loss": Logged(
        "nats a token, as the objective weighs its terms",
        "The sum of all terms.",
        "In supervised stages it falls. In the minillm stage it is no measure of progress: the long-term term is a "
        "policy gradient, whose value says little.",
        "In the minillm stage look at `reverse_kl` instead. If it is not finite, the run stops by itself and names the "
        "rows.",
    ),
    "grad_norm": Logged(
        "none",
        "The norm of the gradient before it is clipped by `max_grad_norm`.",
        "Steady, after a few updates that are larger. Single peaks are harmless, because they are clipped.",
        "If it grows from update to update, lower the learning rate. If every update is far above `max_grad_norm`, the "
        "learning rate in effect is the clipping's, so change the two together.",
    ),
    "learning_rate": Logged("none", "The learning rate of the update.", "As the schedule says.", _NOTHING),
    "epoch": Logged("passes", "Passes over the rows, or over the prompts.", "A straight line.", _NOTHING),
    "reverse_kl": Logged(
        "nats a token",
        "KL(q‖p) over whole distributions, of the student as it trains, on the tokens that are trained on. In the "
        "minillm stage their prefixes are sampled from the mixture with the teacher.",
        "Falls fast in the first tenth and then slowly. With several inner epochs it has small teeth: it falls within "
        "a batch, whose responses are trained on again, and rises at the next batch.",
        _KL_RISES,
    ),
    "sampled_reverse_kl": Logged(
        "nats a token",
        "An estimate of KL(q‖p) of the student that sampled, from the sampled tokens alone, each weighted by ρ = q/p̃.",
        "Around `reverse_kl`, and noisier.",
        "If it stays far from `reverse_kl` where a batch is first trained on, the engine samples from another "
        "distribution than the trainer thinks: look at `engine_mismatch`.",
    ),
    "forward_kl": Logged(
        "nats a token",
        "KL(p‖q) on the tokens that are trained on. With the `logits` stage it is an estimate, which may be negative.",
        "Falls in the warm-up. In the minillm stage it may rise while `reverse_kl` falls: the student gives up answers "
        "of the teacher that it cannot give well.",
        "If both rise, treat it like a rising `reverse_kl`.",
    ),
    "divergence": Logged(
        "nats a token",
        "The divergence of the loss, where it is neither of the two KLs.",
        "Falls.",
        _KL_RISES,
    ),
    "target_cross_entropy": Logged(
        "nats a token",
        "In the pretrain stage with a store: the cross-entropy of the student against the stored teacher.",
        "Falls towards the teacher's entropy, which it cannot pass.",
        "If it stops high, compare with `cross_entropy`: a store of few tokens, or a high temperature, bounds it.",
    ),
    "cross_entropy": Logged(
        "nats a token",
        "−log q of the given answers or of the text.",
        "Falls.",
        "If it falls far below `eval_` numbers that get worse, the rows are learnt by heart: fewer epochs.",
    ),
    "entropy": Logged(
        "nats a token",
        "The entropy of the student's distributions.",
        "Falls slowly towards that of the teacher.",
        "If it collapses (below a third of its start) while answers repeat, lower the learning rate, or raise the "
        "weight of the single step. SeqKD on few answers sharpens the student by design.",
    ),
    "policy_loss": Logged(
        "nats a token, as the objective weighs it",
        "The long-term term of the loss.",
        "Around 0 with a centred baseline, and noisy.",
        "If it drifts to one side with `baseline: centre`, responses get shorter or longer: look at `response_length`.",
    ),
    "single_step_loss": Logged(
        "nats a token, as the objective weighs it",
        "The single-step term of the loss: the divergence of each token, with its weight.",
        "Falls as `reverse_kl` does.",
        _KL_RISES,
    ),
    "language_model_loss": Logged(
        "nats a token, as the objective weighs it",
        "The language-model term, where there is text.",
        "Flat, or falling slowly.",
        "If it rises, the student forgets: raise `objective.language_model`.",
    ),
    "text_nll": Logged(
        "nats a token",
        "−log q of the text's tokens, without weight.",
        "Flat: the text keeps the student from forgetting, and is not what it is trained for.",
        "If it rises, raise `objective.language_model`, or lower the learning rate.",
    ),
    "advantage": Logged(
        "nats",
        "The mean advantage of the sampled tokens.",
        "Around 0 with a centred baseline.",
        "If every value is of one sign, all tokens are pushed the same way, and length answers for it: set "
        "`objective.baseline: centre`.",
    ),
    "advantage_std": Logged(
        "nats",
        "The standard deviation of the advantages.",
        "Steady, or falling with KL.",
        "If it grows, a few tokens decide: look at the samples, set `objective.reward_clip` with sampled rewards.",
    ),
    "importance_weight": Logged(
        "none",
        "The mean of ρ = q/p̃, student over mixture, of the sampled tokens.",
        "Near 1: its expectation is 1 whatever the mix. Exactly 1 without teacher mixing.",
        "If it is far from 1 in many updates, the log-probabilities of engine and trainer differ: look at "
        "`engine_mismatch`.",
    ),
    "clipped": Logged(
        "share of tokens",
        "Tokens whose gradient the clip removes.",
        "A few per cent. Near 0 in the first pass over a batch, more in later ones.",
        "Above a half the batch is used up: fewer `rollout.inner_epochs`, smaller batches of rollouts, or a lower "
        "learning rate.",
    ),
    "response_length": Logged(
        "tokens",
        "The mean length of the responses of the batch, sampled from the mixture.",
        "Settles near the teacher's length.",
        "If it falls from update to update, the sum of KL rewards early ends: keep `objective.length_norm`, or take "
        "the preset `rate` or `words`. If it grows to `rollout.max_new_tokens`, the student does not end: warm up "
        "longer.",
    ),
    "finished": Logged(
        "share of responses",
        "Responses that end by themselves, of the batch in training.",
        "Rises towards that of the teacher.",
        "If it stays low, raise `rollout.max_new_tokens`, or warm up longer on the teacher's answers.",
    ),
    "responses_ended_at_once": Logged(
        "share of responses",
        "Responses whose first token ends them, of the batch in training.",
        "About the teacher's own share: mostly 0.",
        "If it rises, the student learns to say nothing: keep `objective.length_norm`, or take the preset `rate` or "
        "`words`.",
    ),
    "responses_looping": Logged(
        "share of responses",
        "Responses whose last 32 tokens or more repeat a phrase of at most 8.",
        "Falls to 0.",
        "If it rises, the student collapses: lower the learning rate, and keep `rollout.teacher_mix` above 0.",
    ),
    "responses_repeated": Logged(
        "share of responses",
        "Responses that another of the batch has as well, token by token; all but the first count.",
        "Near 0 at temperature 1, unless answers are very short.",
        "Near 1 the engine does not sample: look at its log.",
    ),
    "mean_token_accuracy": Logged(
        "share of tokens",
        "Tokens of the rows that the student predicts best, in fine-tuning; TRL logs it.",
        "Rises.",
        "If it stays, the learning rate is too low, or the rows are too varied for the student.",
    ),
    "num_tokens": Logged(
        "tokens",
        "Tokens that fine-tuning has read so far; TRL logs it.",
        "Grows evenly.",
        "It follows from the settings.",
    ),
    "version_lag": Logged(
        "updates",
        "Updates between the weights that sampled a batch and those that begin to train on it.",
        "0, and the updates of one batch with `rollout.overlap`.",
        "It follows from the settings.",
    ),
    "engine_mismatch": Logged(
        "nats a token",
        "The mean |difference| of log q between the engine and the trainer, with the first update on a batch, where "
        "both have the same weights.",
        "Below 0.05: 1e-6 in float32, some hundredths in bfloat16.",
        "Above 0.3 a warning is logged. Have both compute in one dtype, or set `objective.old_logprobs: trainer`. "
        "`clip` with `dual_clip`, or `importance_truncation` without `clip`, bounds its effect.",
    ),
    "alpha": Logged(
        "share",
        "The teacher's share of the loss on text, in the pretrain stage.",
        "As `pretrain.alpha` says.",
        "It follows from the settings.",
    ),
    "long_term_share": Logged(
        "multiple",
        "With `objective.signal_every`: the squared norm of the expected gradient of the long-term term, as a multiple "
        "of the single step's. Of the head's weight only; an estimate, which can be below 0.",
        "No healthy value is known. It grows with the length of responses.",
        "If it is far below 1, the long-term term decides nothing here.",
    ),
    "long_term_signal": Logged(
        "share",
        "With `objective.signal_every`: the part of the long-term term's squared gradient that different responses "
        "agree on; the rest is noise.",
        "A few per cent in small batches.",
        "If it is about 0, use larger batches, `objective.discount: 0.9`, or a lower `objective.long_term`.",
    ),
    "single_step_signal": Logged(
        "share",
        "The same of the single-step term.",
        "Well above `long_term_signal`: its gradient is exact, given the prefixes.",
        "If it is about 0, the batch is too small for any term.",
    ),
    "model_flops_utilization": Logged(
        "0 to 1",
        "Operations of the updates' matrix products / (their seconds × the peak of the process's device). Operations "
        "are counted by formula: no padding, no masked pairs, nothing that is computed twice. Sampling and the teacher "
        "count in the first update on a batch. What servers compute, validation and checkpoints are outside. The first "
        "update starts the engine. Left out where the peak is not known.",
        "Steady. Small models reach little on a large GPU.",
        "If it is low, the seconds of the phases below say where the time goes. Larger micro-batches help most.",
    ),
    "watched_reverse_kl": Logged(
        "nats a token",
        "KL(q‖p) on a few fixed training rows, before the first update, after updates 1, 4, 16, 64 …, and after the "
        "last.",
        "Falls. It is on the same rows each time, so it shows progress that changing samples hide.",
        "If it doubles, a warning says which learning rate to try. Do not go on.",
    ),
    "watched_forward_kl": Logged("nats a token", "KL(p‖q) on the same rows.", "Falls in supervised stages.", _NOTHING),
    "eval_rouge_l": Logged(
        "0 to 100",
        "Rouge-L of samples of the pure student against the references of `data.validation`.",
        "Rises, with noise of a point or two where there are a few hundred rows.",
        "If it falls while `eval_reverse_kl` falls too, temperature 1 punishes variety: compare at a lower one before "
        "changing anything. `load_best_model_at_end` keeps the best checkpoint.",
    ),
    "eval_reverse_kl": Logged(
        "nats a token",
        "KL(q‖p) on samples of the pure student for `data.validation`.",
        "Falls.",
        "A student that babbles has a deceptively low value, because on nonsense the teacher is as unsure as the "
        "student. Read the answers.",
    ),
    "eval_finished": Logged("%", "Validation answers that end by themselves.", "Rises.", "See `finished`."),
    "eval_length": Logged("tokens", "Mean length of validation answers.", "Settles.", "See `response_length`."),
}
"""Every number that trainers log, in the order of the documents. Seconds are in `PHASES`."""

PHASES: dict[str, str] = {
    "rollout": "sampling; with teacher mixing it includes the teacher",
    "waiting": "waiting for a batch that is sampled ahead (`rollout.overlap`)",
    "teacher": "the teacher's forward pass over what is left to score",
    "rescoring": "one more forward pass of the student over a new batch, where baselines need its KL(q‖p) beforehand",
    "update": "forward and backward passes of the student",
    "sync": "new weights to the engine",
    "engine_start": "the start of the engine, once",
    "validation": "validation, and the fixed rows",
}
"""What each phase of an update is, whose seconds and tokens per second are logged."""
