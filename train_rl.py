"""Reinforcement learning with a checkable reward: GRPO, on-policy.

    python train_rl.py --depth=4                                    # from out/d4/sft
    torchrun --nproc_per_node=8 train_rl.py --depth=20 --task=gsm8k --prompts_per_step=64

One step: P problems, G samples of each, all decoded together by the current weights; rewards are
compared within each problem; one update. Read main() from `for step in` on: each arrow of the
algorithm is a named line there. By default the samples come from the very weights that are updated,
so there is no ratio to clip. A KL term, several updates per rollout and DAPO's resampling are one
constant away.
"""

import math
from functools import partial

import torch

from nanorl import compilers, grpo, learner, rollout
from nanorl import policy as policies
from nanorl.dynamics.online import Halves
from nanorl.engine import SAMPLERS
from nanorl.evaluate.outcomes import validate
from nanorl.hf import local_model, model_writer
from nanorl.optim import RULES, group_norms, load_states, lr_scale, make_optimizers, update
from nanorl.problems import Problems
from nanorl.report import forecast, memory, metrics, terminal
from nanorl.report.cost import Meter
from nanorl.report.page import LivePage
from nanorl.report.rates import device_rates
from nanorl.report.watch import Watch
from nanorl.runtime import checkpoint, dist
from nanorl.runtime.config import at_least, configure, one_of
from nanorl.runtime.run import Run
from nanorl.tasks import parse_weights
from nanorl.tokenizer import Tokenizer
from nanorl.tools import selfcheck as selfchecks

# ---- run
run_name = ""  # folder under out/; empty: d<depth>
stage = "rl"  # folder of this stage under it
depth = 4  # names the run's folder when --run_name is empty
model = ""  # a model directory or hub id to start from; empty: the run's SFT model
resume = "auto"  # auto: go on if the constants are the same; never; must
seed = 0  # fixes the problems of each step and every sampled token
device = "auto"  # auto, cpu, cuda
dtype = "auto"  # activations: auto, fp32 (TF32 on a GPU), bf16, fp64 (tests)
note = ""  # what this run is to show; it stands in run.json and on the run's page
timestamps = False  # every line begins with the time
dry_run = False  # print what the run would do, and stop
selfcheck = False  # compare the first step's gradient with a naive fp64 implementation, and stop
# ---- task and rollouts
task = "sum3"  # a name, path.py:Class, mixture 'sum3=50,counting=50', stages '0-20 until 20; sum3'
task_args = ""  # the task's settings, 'name=value; name=value'
reward_weights = ""  # 'correct=1; format=0.2': its parts' weights in the reward; empty: its total
problems = 0  # train on so many fixed problems, the first of the split; 0: on all of them
prompts_per_step = 16  # P, problems of a step, over all ranks
samples_per_prompt = 16  # G, samples of each problem
max_new_tokens = 64  # a completion is cut off here, and has then failed
temperature = 1.0  # of sampling; the learner divides its logits by it too
resample = 0  # at most so many times a step, groups without signal are replaced by others (DAPO)
overlong = "zero"  # a completion that is cut off has failed (zero), or is not in the loss (mask)
sampler = "engine"  # engine: the fast one; plain: nanorl/sampler.py, the one to read and to change
device_rows = 0  # most rows decoded at once on one device; 0: what half the free memory holds
# ---- objective and optimization
advantage = "mean"  # baseline: mean, loo (leave one out), zscore (GRPO's division by the deviation)
loss_norm = "token"  # divide by: token (the step's), sequence (completions alike), constant
kl_coef = 0.0  # of a KL term to the weights that the run starts from; 0: those are not in memory
kl_estimator = "k3"  # k1-in-reward, k2, k3 (GRPO's): docs/algorithm.md
updates_per_rollout = 1  # 1: on-policy. More: each on all of the step's samples, clipped as in PPO
clip_low = 0.2  # the ratio is clipped to 1 - clip_low ...
clip_high = 0.2  # ... and 1 + clip_high (DAPO: 0.28); both without effect on-policy
steps = 40  # one step is one batch of rollouts and its update
optimizer = "adamw"  # adamw; without momentum: rmsprop, or sgd, which needs an --lr of its own
beta1 = 0.9  # of AdamW's first moment
beta2 = 0.95  # of AdamW's second moment, and of RMSprop's
lr = 0.0  # AdamW's; 0: 0.04 / width, for a published model 5e-6; with LoRA ten times that
warmup = 0  # steps of linear warm-up
lr_schedule = "constant"  # after the warm-up: constant, or down to 0 at the end: linear, cosine
weight_decay = 0.0  # on the blocks' matrices
max_grad_norm = 1.0  # 0: no clipping
device_tokens = 0  # tokens of one forward; 0: what fits a third of a GPU's memory, on a CPU 16384
recompute = False  # activations are computed again in backward: a third more work, little memory
compile = False  # the learner's blocks by torch.compile: 1.3 times as fast on a CPU; needs g++
lora_rank = 0  # train low-rank adapters of the weights alone, of this rank; 0: train the weights
lora_alpha = 32.0  # what an adapter learns is scaled by lora_alpha / lora_rank
lora_targets = "q,k,v,o,gate,up,down"  # the projections that get one
max_bad_steps = 5  # stop after so many steps in a row whose gradient is not finite
# ---- log
log_every = 1  # steps between lines
noise_scale = False  # the gradient's noise too, noise/trace and noise/signal: docs/dynamics.md
probe_prompts = 32  # problems tried before the first step, for the forecast
eval_every = 10  # steps between held-out evaluations; 0: only before and after
eval_problems = 400  # of the val split, greedy
rollout_tokens = True  # ids, log-probs and entropies of every sampled token too, in rollouts/
rollouts_gb = 2.0  # most that rollouts/ takes: beyond it token by token values go, then whole steps
save_every = 20  # steps between checkpoints, from which a killed run goes on; 0: only at the end
keep = ""  # all: no checkpoint is removed; 40: nor one of a step that 40 divides; empty: README.md
save_reward_above = 1.0  # also save at a new best reward above this
after_save = ""  # a command after every save, such as 'rclone copy {dir} gdrive:runs/{run}'
track = ""  # send the numbers to wandb, tensorboard, trackio; commas between


FULL = "training samples from the full distribution, the one that the loss models"


def main():
    global device_tokens  # found where it is 0
    settings = configure(globals(), refused={"top_k": FULL, "top_p": FULL})
    check_settings(settings)
    device = dist.setup(settings["device"], exact=selfcheck)
    if compile:
        compilers.check_compiler(device)
    P, G = prompts_per_step, samples_per_prompt

    # The run: a new one from the SFT model, or one that goes on from its last checkpoint.
    sft = checkpoint.stage_directory(run_name or f"d{depth}", "sft")
    start = local_model(checkpoint.resolve(model or sft))
    make = f"make one with `python train_sft.py --depth={depth}`, or name one with --model="
    no_start = f"no SFT model in {start}: {make}"
    run = Run(settings, stage, start, no_start, writes=not (dry_run or selfcheck))
    weight_dtype, compute_dtype = run.dtypes(device)

    # What is trained: the weights or LoRA's adapters, and by which rule.
    policy = policies.load(run, settings, weight_dtype, compute_dtype, device)
    full_lr = lr or default_lr(policy, run.origin["published"])
    optimizers = make_optimizers(
        policy.trained, full_lr, full_lr, weight_decay, False, rule=optimizer, betas=(beta1, beta2)
    )
    cooldown = 0.0 if lr_schedule == "constant" else 1 - warmup / steps
    objective = grpo.Objective(updates_per_rollout, clip_low, clip_high, kl_coef, kl_estimator)
    tokenizer = Tokenizer.from_pretrained(run.model)

    # What it is trained on, and the sampler that answers.
    longest = policy.model.config.context - max_new_tokens  # tokens of a prompt
    taken = run.state.get("drawn", 0)
    train = Problems(task, task_args, seed, problems, taken, tokenizer, longest)
    looks = train.check(P, resample, eval_problems)
    rollout.check_weights(train, parse_weights(reward_weights))
    engine = SAMPLERS[sampler](policy.model, device_rows or run.state.get("device_rows", 0))
    if run.resumed:
        load_states(optimizers, run.state["optimizers"])
        policy.load_adapters(run.state["lora"])
    if not engine.max_rows:
        engine.max_rows = memory.rows_that_fit(engine, policy.params, G, max_new_tokens)
    device_tokens = memory.device_tokens(policy.model, memory.bytes_of(policy.params), settings)
    rates = device_rates(device, compute_dtype)
    meter = Meter(policy.model, policy.adapters, run.state["flops"], *rates)
    halves = Halves(policy.params, noise_scale, P)
    watch = Watch(run.state.get("watch"), policy.model.config.vocab_size)

    def sample(step, asked):
        """asked: (number, problem) pairs -> Rollouts of this rank's share of them."""
        mine = asked[dist.share(len(asked))]
        rollouts = rollout.sample(engine, tokenizer, train.task_of(step), step, mine, settings)
        meter.rollout(engine)
        return rollouts

    def state():
        """What only this script knows of the run and needs to go on from here."""
        return dict(
            drawn=train.taken,
            flops=dict(meter.total),
            device_rows=engine.max_rows,
            watch=watch.state,
            optimizers=[each.state_dict() for each in optimizers],
            lora=policy.adapter_state(),
        )

    evaluate = partial(validate, engine, tokenizer, train, settings, dist, meter, run.log)
    writer = partial(model_writer, policy.model, tokenizer)
    page = LivePage(run)

    # What this run will do, and whether it can learn anything.
    measured = dict(flop_rate=rates[0], copy_rate=rates[1])
    run.card(policy.model, device_rows=engine.max_rows, train_problems=len(train), **measured)
    terminal.rl_heading(run, policy.model, train, looks, full_lr)
    terminal.short_run(steps, warmup, cooldown, lr_schedule)
    asked = train.peek(probe_prompts)
    a_step = sample, engine, policy, objective, meter, run, tokenizer
    if dry_run:
        return forecast.dry_run(asked, evaluate, *a_step)
    if not run.resumed and not selfcheck:
        val = evaluate(0)
        terminal.held_out_before(val)
        forecast.say(asked, *a_step)
        run.log.row(0, **val, **meter.flops_so_far())
    run.begin()

    for step in range(run.first_step, max(steps, run.first_step + selfcheck)):
        # Ask: P problems, the same for a seed on any number of ranks.
        meter.start()
        asked = train.take(step, P)

        # Answer: G samples of each, all decoded together by the current weights, and judged.
        rollouts, replaced = sample(step, asked), []
        if resample:
            rollouts, replaced = rollout.replace_dead(
                rollouts,
                times=resample,
                more=lambda count, step=step: sample(step, train.take(step, count)),
                total=dist.total,
            )
        meter.sampled()

        # Compare: a sample is as good as its reward is above the mean of its group.
        # From here to the loss P counts this rank's problems.
        rewards = rollout.reward_table(rollouts, G)  # (P, G)
        advantages = grpo.advantages(rewards, advantage)  # (P, G)

        # Learn: loss = - sum of A * log pi / N. N counts the tokens of the step, on all ranks.
        lengths = rollout.length_table(rollouts, G)  # (P, G)
        counted = rollout.finished_table(rollouts, G) if overlong == "mask" else None  # (P, G)
        token_weights = grpo.token_weights(lengths, loss_norm, max_new_tokens, counted)  # (P, G)
        N = max(1.0, dist.total(grpo.denominator(lengths, loss_norm, counted)))
        batches = halves.pack(rollouts, advantages, token_weights, device_tokens, device)
        if policy.reference:
            batches = learner.with_reference(batches, policy, objective, temperature, meter)

        # Update: once, on-policy, or several times from the same samples.
        scale = lr_scale(step, steps, warmup, cooldown, lr_schedule)
        sums, norms = [], []  # an entry an update
        for _ in range(updates_per_rollout):
            sums.append([])
            for batch in halves.watch(batches):
                outputs = learner.forward(policy.model, batch, temperature, with_entropy=True)
                gain = batch.advantages * outputs.logprobs  # (S,) A * log pi
                if not objective.is_default:  # instead: the clipped ratio, a KL term
                    gain = grpo.surrogate(outputs.logprobs, batch, objective)  # (S,)
                loss = -(batch.token_weights * gain).sum() / N
                loss.backward()
                meter.learner(batch, outputs)
                sums[-1].append(learner.token_sums(outputs, batch, objective))
            dist.sum_gradients(policy.params)  # one all-reduce
            if selfcheck:
                return selfchecks.report(policy, rollouts, advantages, settings)
            part_norms = group_norms(policy.trained)
            norms.append(update(optimizers, policy.params, scale, max_grad_norm))  # clip, step
            policy.merge()  # LoRA's adapters into the weights that everything multiplies by
        engine.refresh()  # the next samples come from the new weights
        meter.learnt()

        # Record: the rollouts, a row, a line, and now and then a checkpoint.
        done = step + 1
        metrics.add_entropies(rollouts, batches, sums[0])
        row = metrics.of_rollouts(rollouts, replaced, advantages, run, done, tokenizer.decode)
        row.update(metrics.of_updates(sums, norms, part_norms))
        row.update(lr=full_lr * scale, bad_steps=run.count_bad_steps(norms))
        row.update(left_out=len(train.left_out), epoch=train.passes(step))
        row.update(halves.row(norms[0]))
        row.update(meter.rollout_and_learner(row["tokens"], row.pop("learnt_tokens")))
        if done == steps or (eval_every and done % eval_every == 0):
            row.update(evaluate(done))
        row.update(meter.end_of_step())
        run.log.row(done, **row)
        terminal.rl_line(done, steps, row, meter.seconds_left(steps - done), log_every)
        terminal.warnings(done, watch.look(row) + train.newly_left_out(), run.log)
        run.end_of_step(done, done == steps, writer, state, row["reward"])
        page.update(row, last=done == steps)


def default_lr(policy, published):
    """AdamW's and RMSprop's, where --lr is 0."""
    rate = 5e-6 if published else 0.04 / policy.model.config.n_embd
    return rate * 10 if policy.adapters else rate


def check_settings(settings):
    """Refuse what cannot work, with the value and the remedy."""
    at_least(
        settings,
        1,
        "prompts_per_step max_new_tokens steps updates_per_rollout eval_problems "
        "probe_prompts max_bad_steps log_every",
    )
    at_least(
        settings,
        0,
        "seed problems device_rows resample lora_rank lora_alpha kl_coef clip_low clip_high lr "
        "warmup weight_decay max_grad_norm device_tokens eval_every save_every "
        "rollouts_gb",
    )
    one_of(settings, "sampler", SAMPLERS)
    one_of(settings, "optimizer", RULES)
    one_of(settings, "overlong", ("zero", "mask"))
    one_of(settings, "kl_estimator", grpo.ESTIMATORS)
    one_of(settings, "lr_schedule", ("constant", "linear", "cosine"))
    grpo.advantages(torch.zeros(1, 2), advantage)  # raises for an unknown name,
    grpo.token_weights(torch.ones(1, 1), loss_norm)  # and so does this
    checkpoint.check_keep(keep, save_every)
    if not 0 <= min(beta1, beta2) <= max(beta1, beta2) < 1:
        raise ValueError(f"--beta1={beta1} --beta2={beta2}: each must be at least 0 and below 1")
    if optimizer == "sgd" and not lr:
        raise ValueError(
            "--optimizer=sgd: its rate is no other rule's, so give one too, such as --lr=0.1"
        )
    if samples_per_prompt < 2:
        raise ValueError(
            f"--samples_per_prompt={samples_per_prompt}: at least 2, "
            "because rewards are compared within a group"
        )
    if 0 < device_rows < samples_per_prompt:
        raise ValueError(
            f"--device_rows={device_rows}: it must hold one group, "
            f"--samples_per_prompt={samples_per_prompt}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"--temperature={temperature}: it must be above 0, "
            "because training needs samples that differ"
        )
    if clip_low > 1:
        raise ValueError(
            f"--clip_low={clip_low}: it must be at most 1, since the ratio is never below 0"
        )


if __name__ == "__main__":
    dist.run(main)
