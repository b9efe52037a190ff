"""Breaks the shipped source, one defect at a time, and names the test that notices: `make mutations`.

A test suite is worth what it would catch. Each defect below has been made by somebody, here or in a peer's code. The
suite runs on a copy, so the working tree is never touched; a defect that no test notices fails the whole.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Quick ones first: most defects are found within seconds.
SUITE = [
    "tests/loss/test_credit.py",
    "tests/data",
    "tests/loss/test_reference.py",
    "tests/models",
    "tests/teacher",
    "tests/loss/test_objective.py",
    "tests/loss/test_long_term.py",
    "tests/loss/test_words.py",
    "tests/loss/test_sparse.py",
    "tests/loss/test_value.py",
    "tests/loss/test_signal.py",
    "tests/loss/test_objective_limits.py",
    "tests/loss/test_token_scores.py",
    "tests/loss/test_token_scores_precision.py",
    "tests/loss/test_several_teachers.py",
    "tests/rollout/test_mixture.py",
    "tests/rollout/test_choose.py",
    "tests/rollout/test_vllm_server.py",
    "tests/rollout/test_engines.py",
    "tests/rollout/test_vllm_lora.py",
    "tests/train",
    "tests/evaluation/test_language_model.py",
    "tests/evaluation/test_store.py",
    "tests/evaluation/test_report.py",
    "tests/evaluation/test_suite.py",
    "tests/run/test_shipped.py",
    "tests/run/test_schema.py",
    "tests/run/test_new_recipe.py",
    "tests/run/test_gguf_teacher.py",
    "tests/run/test_responses_file.py",
    "tests/run/test_jobs.py",
    "tests/run/test_run_state.py",
    "tests/run/test_longer.py",
    "tests/test_terminal.py",
    "tests/run/test_plan.py",
    "tests/run/test_plan_calibration.py",
    "tests/run/test_plan_fit.py",
    "tests/run/test_plan_work.py",
    "tests/run/test_plan_network.py",
    "tests/run/test_meeting.py",
    "tests/run/test_watch.py",
    "tests/run/test_talk.py",
    "tests/faults/test_bad_numbers.py",
    "tests/faults/test_hostile_input.py",
    "tests/faults/test_certificate.py",
    "tests/loss/test_distributed.py",
]


@dataclass(frozen=True)
class Mutation:
    """`before`, which occurs once in `file`, becomes `after`."""

    name: str
    file: str
    before: str
    after: str


MUTATIONS = [
    Mutation(
        "an update on two processes trains on twice the responses",
        "train/update_size.py",
        "    share, rest = divmod(responses, processes)\n",
        "    share, rest = responses, 0\n",
    ),
    Mutation(
        "the size of an update and an accumulation that contradicts it are taken both",
        "train/update_size.py",
        "    if ACCUMULATION in given:\n",
        "    if False:\n",
    ),
    Mutation(
        "the plan takes the accumulation as it is written, not as it follows",
        "run/training_arguments.py",
        "    return sizes_of_update(responses, processes, given.get(MICRO_BATCH))\n",
        "    return sizes_of_update(responses, 1, given.get(MICRO_BATCH))\n",
    ),
    Mutation(
        "a finished stage is not trained for longer: its checkpoint is taken for the end",
        "train/resume.py",
        '    if state["global_step"] >= updates_of(trainer):\n',
        '    if state["global_step"] >= state["max_steps"]:\n',
    ),
    Mutation(
        "a training that is continued logs as often as it did",
        "train/resume.py",
        "        state.compute_steps(args, state.max_steps)\n",
        "        return\n",
    ),
    Mutation(
        "a longer training leaves the answers of the shorter one",
        "run/directory.py",
        "            self._reopened.add(stage)\n",
        "            self._reopened.update([stage] if trained is own else [])\n",
    ),
    Mutation(
        "a warm-up of the learning rate begins again in silence",
        "train/lengthened.py",
        "    if args.get_warmup_steps(before) <= done < args.get_warmup_steps(after):\n",
        "    if False:\n",
    ),
    Mutation(
        "an unknown warning is kept from the terminal",
        "noise.py",
        "    return any(pattern.search(text) for pattern in _PATTERNS)\n",
        '    return any(pattern.search(text) for pattern in _PATTERNS) or "UserWarning" in text\n',
    ),
    Mutation(
        "what a child process prints goes to the terminal",
        "capture.py",
        "            os.dup2(self._log.fileno(), number)\n",
        "            pass\n",
    ),
    Mutation(
        "progress that stays is a line for every update",
        "terminal.py",
        "        if now - self._shown < wait:\n",
        "        if False:\n",
    ),
    Mutation(
        "an update that is skipped is made",
        "train/finite.py",
        "        model.zero_grad(set_to_none=True)  # no optimiser moves a weight that has no gradient\n",
        "",
    ),
    Mutation(
        "states of the teacher that are no numbers are trained on",
        "train/rollout_faults.py",
        "    if teacher.hidden is not None and not are_finite([teacher.hidden]):",
        "    if False:",
    ),
    Mutation(
        "one text from a dead engine is trained on",
        "train/rollout_faults.py",
        "        if sum(against[:-1]) > _IMPOSSIBLE:",
        "        if False:",
    ),
    Mutation(
        "a collapsed student is taken for a dead engine",
        "train/rollout_faults.py",
        "        if sum(against[:-1]) > _IMPOSSIBLE:",
        "        if against[:-1]:",
    ),
    Mutation(
        "an engine with other weights is trained with",
        "train/mismatch.py",
        "        if total > self._limit * tokens:",
        "        if False:",
    ),
    Mutation(
        "a skipped batch is trained on",
        "train/on_policy.py",
        "        self._skipping = self._skipping or self._guard.refuses(rollouts)",
        "        self._skipping = self._skipping or (self._guard.refuses(rollouts) and False)",
    ),
    Mutation("aliases are not counted", "run/plain_yaml.py", "    if count > MAX_VALUES:", "    if False:"),
    Mutation(
        "pickled weights are read",
        "models/pickles.py",
        '    if ".bin" in file.suffixes and not pickle_is_allowed(source):',
        "    if False:",
    ),
    Mutation(
        "columns of weights may be exchanged",
        "models/fingerprint.py",
        "torch.arange(1, 2 * bits.shape[1], 2, device=bits.device) * _ODD",
        "torch.full((bits.shape[1],), _ODD, device=bits.device)",
    ),
    Mutation(
        "verify does not compare weights",
        "run/verification.py",
        "        if then.get(name) != now.get(name)",
        "        if (name in then) != (name in now)",
    ),
    Mutation("a name may leave its folder", "config.py", 'given.startswith(".")', "False"),
    Mutation(
        "a shipped recipe hides a file of the user's",
        "run/shipped.py",
        "    if given.is_file():\n        return given\n",
        "",
    ),
    Mutation(
        "a fault of an override is blamed on the recipe's line",
        "run/recipe_file.py",
        "COMMAND_LINE if before is not None and fault not in before else",
        "",
    ),
    Mutation(
        "what an override replaces keeps its source",
        "run/recipe_file.py",
        "        del where[key]\n",
        "        pass\n",
    ),
    Mutation(
        "a schema asks for keys that the extended recipe has",
        "run/schema.py",
        '("required", "title",',
        '("title",',
    ),
    Mutation(
        "a check does not look at finished stages",
        "run/dry_run.py",
        "        run.state.needs(stage, recipe.stages[:number])\n",
        "",
    ),
    Mutation(
        "the first answer of a chat is trained on, and not the last",
        "data/examples.py",
        "*_, example = [None, *_examples_of(fields, place, Remarks())]",
        "example, *_ = [*_examples_of(fields, place, Remarks()), None]",
    ),
    Mutation(
        "a chat forgets its own answers",
        "run/talk.py",
        "self.messages = [*asked, {",
        "self.messages = [*self.messages, {",
    ),
    Mutation(
        "tokens are said to be drawn by the student that the teacher drew",
        "train/samples.py",
        "share = 1 - (1 - alpha)",
        "share = (1 - alpha)",
    ),
    Mutation(
        "a training that starts anew keeps the log of the last one",
        "run/live.py",
        "state.global_step if state.global_step else -1",
        "state.max_steps",
    ),
    Mutation(
        "reports show text as HTML",
        "evaluation/report/html.py",
        "autoescape=True",
        "autoescape=False",
    ),
    Mutation(
        "the weights of a sparse teacher are not taken from its tokens' gradients",
        "loss/sparse.py",
        "own = torch.cat([a[:, None], -by_target[:, None] * weights], 1)",
        "own = torch.cat([a[:, None], 0 * weights], 1)",
    ),
    Mutation(
        "drawn tokens are weighted as the most likely ones",
        "teacher/sampling.py",
        "weights = torch.where(is_head, top[:, :slots], each)",
        "weights = p.gather(1, ids)",
    ),
    Mutation(
        "what is always kept is drawn all the same",
        "teacher/sampling.py",
        "        below &= ~certain.gather(1, top_ids[:, :slots])\n",
        "",
    ),
    Mutation(
        "MSE to weights is taken to the student itself",
        "loss/token_scores.py",
        "theirs = None if self._sparse is None else self._sparse.logits(part, logits.shape[1])",
        "theirs = None",
    ),
    Mutation(
        "a teacher that the student has passed is asked on",
        "train/pretraining.py",
        "alpha = 0.0 if self._teacher_is_passed() else self._alpha.at(",
        "alpha = self._alpha.at(",
    ),
    Mutation(
        "the calibration of each block is averaged",
        "evaluation/language_model_metrics.py",
        "np.abs(summed).sum(-1) /",
        "np.stack([np.abs(gaps[some]).sum((0, 1)) for some in index]) /",
    ),
    Mutation(
        "random students of all seeds are the same",
        "models/initialise.py",
        "torch.manual_seed(seed)",
        "torch.manual_seed(0)",
    ),
    Mutation(
        "each process waits for no other's shards",
        "teacher/store.py",
        "while missing := [path for path in paths if not path.is_file()]:",
        "while missing := []:",
    ),
    Mutation(
        "a torn shard of a store is read",
        "teacher/store.py",
        'whole = not check or facts["checksum"] == _checksum(arrays)',
        "whole = True",
    ),
    Mutation(
        "every pass over the text reads the first draw",
        "teacher/store.py",
        "self._shard(number_of_pass % self._draws, number)",
        "self._shard(0, number)",
    ),
    Mutation(
        "Knowledge Inheritance keeps its teacher to the end",
        "train/alpha.py",
        "return max(1 - u / self.until, 0.0)",
        "return 1 - u",
    ),
    Mutation(
        "every pass over the data has the order of the first",
        "data/seeding.py",
        "_order(self._n, *self._seed, number)",
        "_order(self._n, *self._seed, 0)",
    ),
    Mutation(
        "a line is read again from the line before it",
        "data/json_lines.py",
        "start = self._starts[number]",
        "start = self._starts[number - 1]",
    ),
    Mutation(
        "a file that has changed is read on",
        "data/json_lines.py",
        "if self._current_version() != self._version:",
        "if False:",
    ),
    Mutation(
        "every answer of a chat is read again as its first",
        "data/examples.py",
        "number - bisect_left(self._rows, row)",
        "0",
    ),
    Mutation(
        "a prompt that is too long is trained on in a large data set",
        "data/prompts.py",
        "if len(ids) <= self._rendering.max_prompt_tokens else None",
        "if ids else None",
    ),
    Mutation(
        "one row stands in for all that are left out",
        "data/prompts.py",
        'seed_of("stand-in", place, attempt)',
        'seed_of("stand-in", attempt)',
    ),
    Mutation(
        "large text is packed in the order of its file",
        "data/text.py",
        "dataset[order[position]] for position",
        "dataset[position] for position",
    ),
    Mutation(
        "a second pass over large text has the order of the first",
        "data/text.py",
        "        return self._passes[turn]",
        "        return turn % len(self._blocks)",
    ),
    Mutation(
        "responses are sampled again that were written before",
        "run/responses_file.py",
        "        self.row = row\n",
        "        self.row = -1\n",
    ),
    Mutation(
        "mask dropped: a return runs on into the next response",
        "loss/credit.py",
        "(same & (ahead >= self._shift))",
        "(ahead >= self._shift)",
    ),
    Mutation(
        "mask dropped: carried over from the next response",
        "loss/credit.py",
        "joined = segments == self._segments[start]",
        "joined = segments >= 0",
    ),
    Mutation(
        "price of tokens left out",
        "loss/on_policy.py",
        "rewards = rewards + self._tokens.offset[part]",
        "pass",
    ),
    Mutation(
        "price of tokens left out of known rewards",
        "loss/on_policy.py",
        "rewards = rewards + self._tokens.offset\n",
        "pass\n",
    ),
    Mutation(
        "a response in its own price of tokens",
        "loss/leave_one_out.py",
        "others = total[:, None] - own",
        "others = total[:, None].expand_as(own)",
    ),
    Mutation(
        "a response in its own baseline by position",
        "loss/leave_one_out.py",
        "_mean(at_position[:, position] - own, mean)",
        "_mean(at_position[:, position], mean)",
    ),
    Mutation(
        "a response in its own baseline by prompt",
        "loss/leave_one_out.py",
        "_mean(table[:, mine * size + position] - own, mean)",
        "_mean(table[:, mine * size + position], mean)",
    ),
    Mutation(
        "a baseline with the price of another response",
        "loss/leave_one_out.py",
        "mean[0] + tokens.offset.double() * mean[1]",
        "mean[0] + tokens.offset.double().mean() * mean[1]",
    ),
    Mutation(
        "value fitted to the batch that it is a baseline for",
        "train/batch_credit.py",
        "self._objective, phi, self._before.value)",
        "self._objective, phi, fit(phi, baselines_by_value(tokens, self._objective, phi, [])[1]))",
    ),
    Mutation(
        "value of the next response",
        "loss/value.py",
        "goes_on = tokens.remaining > 0",
        "goes_on = tokens.remaining >= 0",
    ),
    Mutation(
        "signal with the noise of single responses",
        "loss/signal.py",
        "(norms - self.squares)",
        "norms",
    ),
    Mutation(
        "a sketch of the whole gradient as that of the long-term term",
        "loss/token_scores.py",
        "value if name in _POLICY else torch.zeros_like(value)",
        "value",
    ),
    Mutation(
        "credit for ending beside the words",
        "loss/on_policy.py",
        "advantages.masked_fill(self._tokens.is_end[part], 0.0)",
        "advantages",
    ),
    Mutation(
        "end tokens take part in the score of words",
        "loss/words.py",
        "torch.isin(index, self._ids), a + g, a - g * odds",
        "torch.isin(index, self._ids), a - g * odds, a - g * odds",
    ),
    Mutation(
        "sums of prices not saved with an unfinished batch",
        "train/batch_credit.py",
        "state = self._after if finished else self._before",
        "state = self._after",
    ),
    Mutation("return shifted by one", "loss/credit.py", "1 if return_from ==", "2 if return_from =="),
    Mutation(
        "immediate reward counted twice",
        "loss/credit.py",
        'self._shift = 1 if return_from == "next" else 0',
        "self._shift = 0",
    ),
    Mutation(
        "discount left out", "loss/credit.py", "steps.clamp(min=0) * self._log_discount", "steps.clamp(min=0) * 0.0"
    ),
    Mutation(
        "reward not detached",
        "loss/on_policy.py",
        "by_logq = -long * weights * gain * active",
        "by_logq = -long * weights * (gain - ratio) * active",
    ),
    Mutation(
        "expected reward not detached",
        "loss/on_policy.py",
        "**{field: single})",
        "**{field: single + long * weights * ratio})",
    ),
    Mutation(
        "weight inside the clip", "loss/on_policy.py", "if objective.weight_in_clip:", "if objective.clip is not None:"
    ),
    Mutation("clipped tokens keep their gradient", "loss/on_policy.py", "gain * active\n", "gain\n"),
    Mutation(
        "mean per response instead of per token",
        "loss/on_policy.py",
        "long = objective.long_term / self._count",
        "n = self._tokens.lengths; long = objective.long_term / self._count * n.double().mean() / n[self._tokens.segments][part]",
    ),
    Mutation(
        "mean per micro-batch instead of per update",
        "train/schedule.py",
        "counts = [(count, text_count)] * len(groups)",
        "counts = [(len(groups) * sum(tokens[i] for i in g), text_count) for g in groups]",
    ),
    Mutation(
        "importance weight left out",
        "loss/on_policy.py",
        'kinds = {"none": ones, "token": token}',
        'kinds = {"none": ones, "token": ones}',
    ),
    Mutation(
        "prefix weight one token late",
        "loss/credit.py",
        "for sums in (total - logs - base, total - base)",
        "for sums in (total - base, total - base)",
    ),
    Mutation(
        "baseline of unweighted rewards",
        "loss/credit.py",
        "rewards = sampled * token_weights(tokens)",
        "rewards = sampled",
    ),
    Mutation(
        "rewards taken anew each inner epoch", "train/assembly.py", "rollout.reverse_kl = reverse_kl.clone()", "pass"
    ),
    Mutation(
        "whitened without the padding",
        "loss/on_policy.py",
        'slots if objective.baseline == "whiten_padded" else None',
        "None",
    ),
    Mutation(
        "whitened per process",
        "loss/credit.py",
        "mean = total(values.double().sum()) / count",
        "mean = float(values.double().sum()) / slots",
    ),
    Mutation(
        "end token left out",
        "data/sampling.py",
        "ends = next((position + 1 for position, token",
        "ends = next((max(position, 1) for position, token",
    ),
    Mutation(
        "padded vocabulary rows scored",
        "models/head.py",
        "if width == self.weight.shape[0]:",
        "if width <= self.weight.shape[0]:",
    ),
    Mutation(
        "padded vocabulary rows drawn by vLLM",
        "rollout/engines/base.py",
        "dict.fromkeys(range(vocab_size, width), _EXCLUDING_BIAS) or None",
        "None",
    ),
    Mutation(
        "vLLM planned as if it read a prompt again for every response",
        "run/plan/memory.py",
        "for cached in (0.0, known)",
        "for cached in (0.0, 0.0)",
    ),
    Mutation(
        "a known length of responses planned as half as long",
        "run/plan/work.py",
        "recipe.rollout.max_new_tokens / 2 if self.response is None else self.response",
        "recipe.rollout.max_new_tokens / 2",
    ),
    Mutation(
        "small models planned as fast as large ones",
        "run/plan/machine.py",
        "layers * _LAYER_SECONDS if self.gpu else 0.0",
        "0.0",
    ),
    Mutation(
        "operations: a frozen weight has a gradient",
        "models/flops.py",
        "4 * self.trained + 2 * self.frozen",
        "4 * self.trained + 4 * self.frozen",
    ),
    Mutation(
        "operations: masked pairs of tokens count",
        "models/flops.py",
        "return start * (start + 1) / 2 + (length - start) * start",
        "return length * start",
    ),
    Mutation(
        "operations: a frozen head has a gradient",
        "models/flops.py",
        "(3 if self.head_trained else 2) * self.head(tokens, width)",
        "3 * self.head(tokens, width)",
    ),
    Mutation(
        "operations: the prompt of several responses is read for each",
        "train/utilisation.py",
        "len(prompt) - 1 if prompt in seen else 0",
        "0",
    ),
    Mutation(
        "a calibration of another machine is used",
        "run/plan/calibration.py",
        "if owner == asdict(of) else",
        "if owner else",
    ),
    Mutation("padded vocabulary rows drawn", "data/logprobs.py", "logits[..., : sampling.vocab_size]", "logits"),
    Mutation("targets off by one", "data/batches.py", "torch.arange(first - 1, end - 1)", "torch.arange(first, end)"),
    Mutation(
        "packed documents see each other",
        "data/batches.py",
        "position_ids[row, start:] = torch.arange(width - start)",
        "pass",
    ),
    Mutation(
        "temperature missing in the gradient",
        "models/head.py",
        "            return self.scale / self.temperature\n",
        "            return self.scale\n",
    ),
    Mutation(
        "soft cap missing in the gradient",
        "models/head.py",
        "(1 - (logits * (self.temperature / self.softcap)) ** 2) * ",
        "1.0 * ",
    ),
    Mutation(
        "reverse KL's gradient without its mean",
        "loss/elementwise.py",
        "(logq - logp - measures.reverse_kl[:, None])",
        "(logq - logp)",
    ),
    Mutation(
        "every response scored by the first teacher",
        "teacher/routed.py",
        "return self.by_name[name].hidden(",
        "return next(iter(self.by_name.values())).hidden(",
    ),
    Mutation(
        "a chunk goes on into the tokens of the next teacher",
        "loss/teacher_spans.py",
        "yield slice(first, min(first + size, self.stop))",
        "yield slice(first, first + size)",
    ),
    Mutation(
        "every span transformed by the first teacher's bias and scale",
        "loss/teacher_spans.py",
        "LogitTransform.of(head, settings",
        "LogitTransform.of(parts[0].head.narrow(settings.width), settings",
    ),
    Mutation(
        "a rollout's teacher not saved in checkpoints",
        "data/rollouts.py",
        'if name != "teacher"}',
        'if name not in ("teacher", "teacher_name")}',
    ),
    Mutation("upstream gradient ignored", "loss/token_scores.py", "grad.mul_(upstream).to(dtype)", "grad.to(dtype)"),
    Mutation(
        "tied or trained head forgotten by the adapter check",
        "models/head.py",
        'hasattr(module, "base_layer") or hasattr(module, "modules_to_save")',
        "False",
    ),
    Mutation(
        "a coin that takes the student for the teacher",
        "rollout/mixture.py",
        "from_teacher = uniform[:, 0] < alpha",
        "from_teacher = uniform[:, 0] >= alpha",
    ),
    Mutation(
        "coin and draw of one number",
        "rollout/mixture.py",
        "block, rest = _look_up(sums.cumsum(-1), uniform[:, 1])",
        "block, rest = _look_up(sums.cumsum(-1), uniform[:, 0])",
    ),
    Mutation(
        "the same random numbers at every position",
        "rollout/engines/transformers.py",
        "positions = [len(step.ids[i]) for i in rows]",
        "positions = [0 for _ in rows]",
    ),
    Mutation(
        "padded vocabulary rows sampled from the mixture",
        "rollout/mixture.py",
        "logits = logits[:, :vocab_size].float()",
        "logits, vocab_size = logits.float(), logits.shape[1]",
    ),
    Mutation(
        "behaviour log-probs of the student alone",
        "data/rollouts.py",
        "mixture_logprobs(values, targets.token_logprobs, sampling.teacher_mix)",
        "values",
    ),
    Mutation(
        "a step repeated after a preemption counted twice",
        "rollout/mixture.py",
        "index = {key: i for i, key in enumerate(self._keys)}",
        "index = {key: i for i, key in reversed(list(enumerate(self._keys)))}",
    ),
    Mutation(
        "log p of the drawn tokens computed twice",
        "train/on_policy.py",
        "if self._logp_first and",
        "if",
    ),
    Mutation(
        "KL(q‖p) of the mixture with the models exchanged",
        "rollout/mixture.py",
        "q.divergence_from(p)",
        "p.divergence_from(q)",
    ),
    Mutation(
        "the engine's KL(q‖p) taken for the trainer's",
        "train/on_policy.py",
        "return sampled if self._scores_first else sampled.without_reverse_kl()",
        "return sampled",
    ),
    Mutation(
        "patience counted from before the first restart",
        "models/servers.py",
        "deadline = math.inf  #",
        "deadline = time.monotonic() + self._patience  #",
    ),
    Mutation(
        "a sum over the vocabulary in float32",
        "loss/elementwise.py",
        "values.sum(-1, dtype=torch.float64)",
        "values.sum(-1)",
    ),
    Mutation(
        "log p of another mixture after rescoring",
        "train/on_policy.py",
        "needs_sampled_rewards_first(self.objective) or trainers_mixture",
        "needs_sampled_rewards_first(self.objective)",
    ),
    Mutation(
        "teacher read anew in every epoch",
        "train/on_policy.py",
        "        states = None\n",
        "        states = None\n        self.states_teacher.score(rollouts, self.sampling)\n",
    ),
    Mutation(
        "padding of the vocabulary trained on",
        "models/conventions.py",
        "min([token_count(tokenizer), *(config.vocab_size for config in configs)])",
        "min(config.vocab_size for config in configs)",
    ),
    Mutation("the teacher's end tokens left out", "models/conventions.py", "eos = configured | {end", "eos = {end"),
    Mutation(
        "weight of the single step left out",
        "loss/on_policy.py",
        '{**kinds, "prefix": before}[objective.single_step_weight]',
        "ones",
    ),
    Mutation(
        "token weights not truncated", "loss/on_policy.py", "token_weights(tokens, truncation)", "token_weights(tokens)"
    ),
    Mutation(
        "ratio not truncated",
        "loss/on_policy.py",
        "objective.importance_truncation if objective.clip is None else None",
        "None",
    ),
    Mutation(
        "ratio bounded on one side",
        "loss/on_policy.py",
        "ratio = torch.where(advantages < 0, ratio.clamp(max=objective.dual_clip), ratio)",
        "pass",
    ),
    Mutation(
        "ratio that overflows",
        "loss/credit.py",
        "weights = logs.clamp(max=_MAX_LOG_WEIGHT).exp()",
        "weights = logs.exp()",
    ),
    Mutation(
        "a response in its own baseline",
        "loss/credit.py",
        "(total(sums.sum()) - sums) / others",
        "total(sums.sum()) / total(counts.sum())",
    ),
    Mutation(
        "no floor under what a model excludes",
        "loss/elementwise.py",
        "torch.maximum(z, (log_p + LOG_ZERO)[:, None])",
        "z",
    ),
    Mutation(
        "text fitted at the rollouts' temperature",
        "loss/token_scores.py",
        "self._measure(student, teacher, targets, span.text_transforms, wide)",
        "self._measure(student, teacher, targets, span.transforms, wide)",
    ),
    Mutation(
        "a gradient norm that is none trained on",
        "train/finite.py",
        "excused = math.isfinite(size) or self._scales_down()",
        "excused = True",
    ),
    Mutation("a state that is none saved", "train/finite.py", "self._trainer.check_state()", "pass"),
    Mutation(
        "entropy and forward KL swapped",
        "loss/on_policy.py",
        "forward_kl=scores.forward_kl,\n            entropy=scores.entropy,",
        "forward_kl=scores.entropy,\n            entropy=scores.forward_kl,",
    ),
    Mutation(
        "language model counted twice",
        "loss/on_policy.py",
        "(objective.language_model / self._text_count)",
        "(2 * objective.language_model / self._text_count)",
    ),
    Mutation(
        "micro-batches of reference chosen by length",
        "train/schedule.py",
        "return [list(range(start, start + size)) for start in range(0, len(lengths), size)]",
        "return bucket(lengths, size)",
    ),
    Mutation(
        "micro-batches of reference added up",
        "train/schedule.py",
        "share = len(groups) * self._worker.processes",
        "share = 1",
    ),
    Mutation("whitened in each process by itself", "train/on_policy.py", "total=self.global_sum,", "total=float,"),
    Mutation(
        "served states of the next token",
        "teacher/served_states.py",
        "[[*p, *r][:-1] for p, r",
        "[[*p, *r] for p, r",
    ),
    Mutation(
        "a restarted teacher's weights not compared",
        "teacher/served_states.py",
        "if before is not None and difference > repeated:",
        "if False and difference > repeated:",
    ),
    Mutation(
        "others of a served teacher's row as likely as the student's",
        "loss/elementwise.py",
        "(logq + (others_p - others_q)[:, None])",
        "logq",
    ),
    Mutation(
        "no floor where one logit alone is below it",
        "loss/elementwise.py",
        "if float(least.min()) >",
        "if float(least.max()) >",
    ),
    Mutation(
        "a chunk's gradient of the head in place of the sum",
        "loss/gradients.py",
        "grad.t(), states, out=self._used_weight)",
        "grad.t(), states, out=self._used_weight, beta=0)",
    ),
    Mutation(
        "the last block of a head is left out",
        "models/head.py",
        "for start in range(0, len(weight), rows):\n        part = weight[start : start + rows]\n        torch.mm",
        "for start in range(0, len(weight) - rows + 1, rows):\n        part = weight[start : start + rows]\n        torch.mm",
    ),
    Mutation(
        "another divergence without the head's slope",
        "loss/token_scores.py",
        "(by_logits * transforms.student.slope(logits.detach()))",
        "by_logits",
    ),
    Mutation(
        "replayed rollouts taken for fresh ones",
        "train/on_policy.py",
        "self.source.others.keep([] if self._skipping else sampled.rollouts)",
        "self.source.others.keep([])",
    ),
    Mutation(
        "answers of a process that was swapped meanwhile believed",
        "models/servers.py",
        " and started_at == server.started_at\n",
        "\n",
    ),
    Mutation(
        "a restart that fails no request unnoticed",
        "models/servers.py",
        "server.started_at is None or server.process_start_time() == server.started_at",
        "True",
    ),
    Mutation(
        "scaling of an adapter left out",
        "models/lora.py",
        "full_tensor(module.lora_B[adapter].weight) * module.scaling[adapter]",
        "full_tensor(module.lora_B[adapter].weight)",
    ),
    Mutation(
        "a base that teaches with its adapter on",
        "teacher/local.py",
        "with self._student.disable_adapter():",
        "with nullcontext():",
    ),
    Mutation(
        "shards saved as such",
        "train/student.py",
        'if fsdp is not None and "FULL_STATE_DICT" not in',
        'if False and "FULL_STATE_DICT" not in',
    ),
    Mutation(
        "the head copied once a row",
        "rollout/engines/transformers.py",
        "return torch.tensor([-1], device=device)",
        "return 1  # type: ignore",
    ),
    Mutation(
        "every seed of an evaluation the first one",
        "evaluation/answers.py",
        'seed_of("evaluate", seed, ',
        'seed_of("evaluate", seeds[0], ',
    ),
    Mutation(
        "answers kept with other end tokens",
        "evaluation/dependencies.py",
        '"*.bin", "generation_config.json")',
        '"*.bin")',
    ),
    Mutation(
        "notes of earlier suites not read",
        "evaluation/store.py",
        '(".json", ".made_from")',
        '(".json",)',
    ),
    Mutation(
        "all processes of a comparison on the same cores",
        "run/experiments/jobs.py",
        "cores[slot * each : (slot + 1) * each]",
        "cores[:each]",
    ),
    Mutation(
        "the trainers' process group gone with an engine",
        "rollout/engines/vllm.py",
        "with _process_group_kept() if self._in_process_group else nullcontext():",
        "with nullcontext():",
    ),
    Mutation(
        "the loss as FSDP2 rounds it",
        "loss/in_forward.py",
        "return through + (call.loss - through).detach(), call.scores",
        "return through, call.scores",
    ),
    Mutation(
        "reference without its own scoring",
        "train/on_policy.py",
        'self.credit.scores_first, self.objective.old_logprobs == "trainer"\n',
        "self.credit.scores_first, False\n",
    ),
    Mutation(
        "shards gathered as wide as they are trained",
        "models/shards.py",
        "cast = value.detach().to(wanted)\n    return cast.full_tensor() if isinstance(cast, DTensor) else cast",
        "cast = value.detach()\n    return (cast.full_tensor() if isinstance(cast, DTensor) else cast).to(wanted)",
    ),
    Mutation("a tied head gathered twice", "models/weights.py", "whole = tied.get(id(value))", "whole = None"),
    Mutation(
        "a weight taken for the one whose place it got",
        "rollout/engines/server.py",
        "if earlier is None or earlier() is not value:",
        "if earlier is None:",
    ),
    Mutation(
        "a second machine's process goes on with an earlier launch",
        "run/processes.py",
        'while not (launch.is_file() and number in launch.read_text(encoding="utf-8").split()):',
        "while not launch.is_file():",
    ),
    Mutation(
        "a server on every machine's own loopback",
        "rollout/engines/server_checks.py",
        "if own := [url for url in servers if is_loopback(url)]:",
        "if own := []:",
    ),
    Mutation(
        "files of one machine counted as processes",
        "train/rollout_checkpoint.py",
        'writers = saved.get("processes", len(files))',
        "writers = len(files)",
    ),
    Mutation(
        "an all-reduce counted as one pass around the ring",
        "run/plan/network.py",
        '_ring("gradients, all-reduce", 2 * _FLOAT32 * trained, machine)',
        '_ring("gradients, all-reduce", _FLOAT32 * trained, machine)',
    ),
    Mutation(
        "weights counted for one of several servers",
        "run/plan/network.py",
        "read = share * weights * len(_elsewhere(_rollout_servers(training)))",
        "read = share * weights * bool(_elsewhere(_rollout_servers(training)))",
    ),
    Mutation(
        "BOS of a GGUF file is lost",
        "models/gguf.py",
        "        add_bos_token=facts.adds_bos,\n",
        "        add_bos_token=False,\n",
    ),
    Mutation(
        "a chat template of a GGUF file goes without BOS",
        "models/gguf.py",
        "    if not rendered.startswith(tokenizer.bos_token):",
        "    if False:",
    ),
    Mutation(
        "a space before every text of a GGUF file",
        "models/gguf.py",
        "    if _puts_space(backend) == wanted:\n",
        "    if True:\n",
    ),
    Mutation(
        "one end token of several in a GGUF file",
        "models/gguf.py",
        'for name in ("eos", "eot", "eom")]',
        'for name in ("eos",)]',
    ),
    Mutation(
        "a stage that has made nothing counts as made with its settings",
        "run/directory.py",
        'if entry is None or not (entry["finished"] or stage_named(stage).has_made_something(self._recipe.run_dir)):',
        "if entry is None:",
    ),
    Mutation(
        "redo throws away what nobody named",
        "run/runner.py",
        "    if not lost or (not named and len(lost) == 1):\n",
        "    if True:\n",
    ),
    Mutation(
        "a GGUF teacher is spared the check of the student's adapter",
        "run/checks.py",
        "    if recipe.student.lora is not None:\n        check_student(",
        "    if recipe.student.lora is not None and not find_gguf(teacher):\n        check_student(",
    ),
    Mutation(
        "nobody says that a stage ended worse than it began",
        "run/stages/shared.py",
        "    if found is not None:\n        logger.warning(",
        "    if False:\n        logger.warning(",
    ),
    Mutation(
        "the student is watched from after the first update on",
        "train/watch.py",
        "        if state.global_step == 0:\n",
        "        if False:\n",
    ),
    Mutation(
        "half the rows that are watched count",
        "train/validation.py",
        "        tokens = self.global_sum(sum(map(len, answers)))\n",
        "        tokens = self.global_sum(sum(map(len, answers[::2])))\n",
    ),
    Mutation(
        "an alarm without what to do",
        "run/watch.py",
        """        alarms.append(f"{rise}. {LOGGED['reverse_kl'].otherwise}")\n""",
        "        alarms.append(rise)\n",
    ),
]


def survivors(mutations: list[Mutation]) -> list[str]:
    """Names of the defects that no test noticed; prints the first failing test of each of the others."""
    alive = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("minillm", "tests", "recipes", "pyproject.toml"):
            source = ROOT / name
            shutil.copytree(source, copy / name) if source.is_dir() else shutil.copy(source, copy / name)
        if _suite(copy).returncode:
            raise SystemExit("the suite fails on the source as it is: nothing can be learnt from it")
        for mutation in mutations:
            path = copy / "minillm" / mutation.file
            source = path.read_text()
            if source.count(mutation.before) != 1:
                raise SystemExit(
                    f"{mutation.name}: {mutation.file} holds its text {source.count(mutation.before)} times, not once"
                )
            path.write_text(source.replace(mutation.before, mutation.after))
            done = _suite(copy, mutation.file)
            path.write_text(source)
            failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
            if done.returncode == 0 or not failed:
                alive.append(mutation.name)
            verdict = failed[0].split(" - ")[0].removeprefix("FAILED ") if failed else "SURVIVES"
            print(f"{mutation.name:55} {verdict}", flush=True)
    return alive


def _suite(copy: Path, file: str = "") -> subprocess.CompletedProcess[str]:
    """The tests that mirror a broken file come first."""
    suite = sorted(SUITE, key=lambda path: not path.startswith(f"tests/{file.split('/')[0]}"))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-m",
        "not full and not vllm",
        *suite,
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment)


if __name__ == "__main__":
    chosen = [m for m in MUTATIONS if all(word in m.name for word in sys.argv[1:])]
    left = survivors(chosen)
    print(f"{len(chosen) - len(left)} of {len(chosen)} defects noticed")
    sys.exit(1 if left else 0)
