"""Reinforcement learning with a checkable reward: GRPO, on-policy.

    python train_rl.py --depth=4                                    # from out/d4/sft
    torchrun --nproc_per_node=8 train_rl.py --depth=20 --task=gsm8k

One step: P problems, G samples of each, all decoded together from the current weights; rewards compared within each
problem; one update. Follow main() from "the loop" on: each step of the algorithm is one named line. The default is on-policy, so there
is no ratio to clip; a KL term, several updates per rollout and DAPO's resampling are one constant away."""
import math
import os
import time
from collections import Counter
from contextlib import nullcontext
from functools import lru_cache, partial

import numpy as np
import torch
from tqdm import tqdm

from nanorl import evaluate, grpo, memory, rollout
from nanorl.attention import SharedPrefixAttention, pick
from nanorl.engine import Engine
from nanorl.hf import load_model, local_model, save_model
from nanorl.lora import adapted_model
from nanorl.optim import group_norms, load_states, lr_scale, make_optimizers, update
from nanorl.runtime import checkpoint, dist
from nanorl.runtime.after import AfterSave
from nanorl.runtime.config import at_least, configure
from nanorl.runtime.log import RunLog, Watch, duration, flops_so_far, size, size_of
from nanorl.tasks import Reward, get_stages, parse_settings, parse_weights
from nanorl.tokenizer import Tokenizer
from nanorl.tools import bench, selfcheck as selfchecks

# ---- run
run = ""  # folder under out/; empty: d<depth>
stage = "rl"  # folder of this stage under it
depth = 4  # names the run's folder when --run is empty
model = ""  # a model directory or hub id (Qwen/Qwen2.5-0.5B-Instruct) to start from; empty: the run's SFT model
resume = "auto"  # auto: go on if the constants are the same; never; must
seed = 0  # fixes the problems of each step and every sampled token
device = "auto"  # auto, cpu, cuda
dtype = "auto"  # activations: auto, fp32, bf16, fp64 (tests)
dry_run = False  # print what the run would do, and stop
selfcheck = False  # compare the first step's gradient with a naive fp64 implementation, and stop
# ---- task and rollouts
task = "sum3"  # one of nanorl/tasks, path.py:Class, a mixture 'sum3=50,counting=50', or a curriculum '0-20 until 20; sum3'
task_args = ""  # the task's settings, 'name=value; name=value'
reward_weights = ""  # 'correct=1; format=0.2': the reward is this sum of the task's parts; empty: the task's own total
problems = 0  # train on so many fixed problems, the first of the split; 0: on all of them
prompts_per_step = 16  # P, problems of a step, over all ranks
samples_per_prompt = 16  # G, samples of each problem
max_new_tokens = 64  # a completion is cut off here, and has then failed
temperature = 1.0  # of sampling; the learner divides its logits by it too
resample = 0  # dynamic sampling: groups without signal give their place to other problems, up to so many times a step
overlong = "zero"  # a completion that is cut off has failed and is trained on as such (zero), or is left out of the loss (mask)
device_rows = 0  # most rows decoded at once on one device; 0: what half the free memory holds
# ---- objective and optimization
advantage = "mean"  # baseline: mean, loo (leave one out), zscore (GRPO's division by the deviation)
loss_norm = "token"  # divide by: token (all tokens of the step), sequence (each completion alike), constant (max_new_tokens)
kl_coef = 0.0  # of a KL term that holds the policy near the weights it starts from; 0: those are not kept in memory
kl_estimator = "k3"  # k1-in-reward, k2, k3 (GRPO's): docs/algorithm.md
updates_per_rollout = 1  # 1: on-policy. More: each uses all of the step's samples, with PPO's clipped ratio
clip_low = 0.2  # the ratio is clipped to 1 - clip_low ...
clip_high = 0.2  # ... and 1 + clip_high (DAPO: 0.28); both without effect on-policy
steps = 40  # one step is one batch of rollouts and its update
lr = 0.0  # AdamW; 0: 0.04 / width (measured at depths 1 to 4 only), for a published model 5e-6; with LoRA ten times that
warmup = 0  # steps of linear warm-up
lr_schedule = "constant"  # after the warm-up: constant, or down to 0 at the end: linear, cosine
weight_decay = 0.0  # on the blocks' matrices
max_grad_norm = 1.0  # 0: no clipping
device_tokens = 16384  # tokens of one forward on one device: lower it when memory runs out
recompute = False  # keep no activations inside the blocks and compute them again in backward: a third more work, a fraction of the memory
lora_rank = 0  # train low-rank adapters of the weights alone, of this rank; 0: train the weights
lora_alpha = 32.0  # what an adapter learns is scaled by lora_alpha / lora_rank
lora_targets = "q,k,v,o,gate,up,down"  # the projections that get one
max_bad_steps = 5  # stop after so many steps in a row with an update skipped, for a gradient that is not finite
# ---- log
probe_prompts = 32  # problems tried before the first step, for the forecast
eval_every = 10  # steps between held-out evaluations; 0: only before and after
eval_problems = 400  # of the val split, greedy
save_every = 20  # steps between checkpoints, from which a killed run goes on; 0: only at the end
save_reward_above = 1.0  # also save at a new best reward above this
after_save = ""  # a command to run after every save, in the background, such as 'rclone copy {dir} gdrive:runs/{run}' ({dir}: out/<run>)


WORK = ("prefill", "decode", "reference", "forward", "backward", "recompute")  # what a step computes, in its order


def main():
    settings = configure(globals(), refused={name: "training samples from the full distribution, the one that the loss models" for name in ("top_k", "top_p")})
    place = dist.setup(device)
    if selfcheck:
        torch.set_float32_matmul_precision("highest")
    weight_dtype, compute_dtype = dist.dtypes(dtype, place)
    settings["run"] = run or f"d{depth}"
    directory = checkpoint.stage_directory(settings["run"], stage)
    start = local_model(checkpoint.resolve(model or checkpoint.stage_directory(settings["run"], "sft")))
    point = checkpoint.resume_point(directory, resume, settings)
    check_settings(point or start)
    log = RunLog(directory, dist.is_main() and not dry_run and not selfcheck)
    sent = AfterSave(after_save, os.path.dirname(directory), log.active)

    # ---- policy, sampler, optimizer, tasks
    # best: of the saved steps; drawn: problems taken so far; bad: updates skipped in a row
    state = checkpoint.load_state(point) if point else dict(step=0, best={"step": None, "reward": -math.inf}, bad=0, flops={}, drawn=0, watch=None,
                                                            start=checkpoint.origin_of(start))
    origin = state["start"]
    if kl_coef or lora_rank:
        checkpoint.must_be(origin)
    if lora_rank:
        policy, adapters = adapted_model(origin["path"], compute_dtype, place, lora_rank, lora_alpha, lora_targets.split(","), seed)
    else:
        policy, adapters = load_model(point or start, weight_dtype, place), None  # fp32 master weights
    policy.compute_dtype, policy.recompute = compute_dtype, recompute
    trained = adapters or policy
    params = [p for _, p in trained.named_parameters()]
    rate = lr or (5e-6 if origin["published"] else 0.04 / policy.config.n_embd) * (10 if adapters else 1)
    optimizers = make_optimizers(trained, rate, rate, weight_decay, muon=False)
    tokenizer = Tokenizer.from_pretrained(point or start)
    stages = get_stages(task, "train", **parse_settings(task_args))  # [(first step, task)]: one, unless it is a curriculum
    val_task = get_stages(task, "val", **parse_settings(task_args))[-1][1]  # a curriculum is judged by where it leads
    part_weights = parse_weights(reward_weights)
    engine = Engine(policy, device_rows)
    P, G = prompts_per_step, samples_per_prompt
    check_problems(stages, part_weights)
    if point:
        load_states(optimizers, state["optimizers"])
        if adapters:
            adapters.load_state_dict(state["lora"])
        engine.max_rows = device_rows or state["device_rows"]
        dist.say(f"resumed {point}")
    best, bad, flops, drawn, watch = state["best"], state["bad"], Counter(state["flops"]), state["drawn"], Watch(state["watch"])
    reference = None  # what the KL term measures from: a context that gives it; without one it does not exist in memory
    if kl_coef and adapters:
        reference = partial(adapters.base, policy)  # the policy without its adapters
    elif kl_coef:
        frozen = load_model(origin["path"], compute_dtype, place).requires_grad_(False)
        frozen.compute_dtype = compute_dtype
        reference = partial(nullcontext, frozen)
    log.cut(state["step"] if point else -1)  # rows and rollouts beyond the checkpoint, about to be made again
    if not engine.max_rows:  # resolved once, and again the same when the run is resumed
        to_come = 12 * sum(p.numel() for p in params)  # bytes: gradients and AdamW's moments
        engine.max_rows = max(G, int(dist.total((dist.free_memory(place) - to_come) // 2 // engine.bytes_per_row(max_new_tokens), "min")))
    flop_rate, copy_rate = bench.device_rates(place, compute_dtype)  # what mfu and mbu are shares of
    passes = 2 if adapters else 3  # forward and, in backward, of activations and of weights (LoRA's are next to nothing)
    # Of this rank in this step: FLOPs of each part (WORK) as they ran, and those that a perfect machine would have needed, of either half; bytes that
    # decoding had to read, places for rows and how many were in use.
    work = Counter()

    @lru_cache(maxsize=2)  # a mixture's can have millions of places
    def order(epoch, n):
        """The order in which pass `epoch` visits the n training problems, (n,)."""
        return np.random.default_rng([seed, epoch]).permutation(n)

    def problems_of(step, drawn, count):
        """The step's task, and `count` pairs (number, problem) of it, when `drawn` have been taken before: each pass visits every
        training problem once, in an order given by the seed. The number counts on over passes, so that a problem that comes again
        gets other random numbers."""
        source = [s for first, s in stages if first <= step][-1]
        n = problems or len(source)
        places = [divmod(drawn + i, n) for i in range(count)]
        return source, [(epoch * n + i, source.problem(int(order(epoch, n)[i]))) for epoch, i in places]

    def sample(step, source, pairs):
        """(number, problem) pairs -> Rollouts of G scored completions each, for this rank's share of the problems."""
        mine = pairs[dist.share(len(pairs))]
        keys = [rollout.prompt_key(seed, step, number) for number, _ in mine]
        rollouts = rollout.generate(engine, tokenizer, source, [p for _, p in mine], keys, G, max_new_tokens, temperature, part_weights=part_weights)
        work.update(engine.flops())
        work["causal/rollout"] += engine.causal_flops()
        work["bytes"] += engine.bytes_decoded()
        work["row_steps"] += engine.stats["row_steps"]
        work["place_steps"] += len(engine.stats["live"]) * engine.stats["places"]
        return rollouts

    def replace_dead(step, source, rollouts, drawn):
        """Dynamic sampling (DAPO): groups without signal give their place to the next problems, at most `resample` times. Returns this
        rank's part of the P groups to learn from, the groups that left, and how many problems have now been drawn."""
        left = []
        for _ in range(resample):
            dead = grpo.no_signal(rollout.reward_table(rollouts, G)).tolist()
            count = int(dist.total(sum(dead)))
            if not count:
                break
            left += [r for r, d in zip(rollouts, dead) if d]
            rollouts = [r for r, d in zip(rollouts, dead) if not d] + sample(step, *problems_of(step, drawn, count))
            drawn += count
        return rollouts, left, drawn

    def with_reference(batch):
        """A micro-batch with the reference's log-probs (N,) of its tokens; k1 goes into the advantages, before any update."""
        if reference is None:
            return batch
        with torch.no_grad(), reference() as base:
            attend = SharedPrefixAttention(batch.rows, place)
            h = base.hidden(batch.ids, batch.positions, attend)  # (1, tokens, C)
            logprobs, _ = base.logprobs(pick(h[0], batch.predictors), batch.targets, temperature)  # (N,)
        work["reference"] += policy.config.flops(batch.ids.numel(), attend.pairs, len(logprobs))
        work["causal/learner"] += policy.config.flops(batch.ids.numel(), batch.pairs, len(logprobs))
        lowered = kl_coef * grpo.kl_to_go(batch.logprobs, logprobs, batch.counts) if kl_estimator == "k1-in-reward" else 0.0
        return batch._replace(reference=logprobs.double(), advantages=batch.advantages - lowered)

    def learn(batch, denominator):
        """One micro-batch: forward, loss, backward. Returns sums over its tokens, for the log."""
        attend = SharedPrefixAttention(batch.rows, place)
        h = policy.hidden(batch.ids, batch.positions, attend)  # (1, tokens, C): each prompt's tokens are there once
        logprobs, entropy = policy.logprobs(pick(h[0], batch.predictors), batch.targets, temperature, with_entropy=True)  # (N,), (N,)
        old = batch.logprobs if updates_per_rollout > 1 else None  # (N,) the sampler's; None: on-policy, the ratio is 1
        if old is None:
            objective = grpo.reinforce(logprobs, batch.advantages)  # (N,)
        else:
            objective = grpo.clipped(logprobs, old, batch.advantages, clip_low, clip_high)  # (N,)
        if reference is not None and kl_estimator != "k1-in-reward":
            objective = objective - kl_coef * grpo.kl(logprobs, batch.reference, kl_estimator, old)
        grpo.policy_loss(objective, batch.weights, denominator).backward()
        work.update(policy.config.learning_flops(batch.ids.numel(), attend.pairs, len(logprobs), recompute, adapters))
        work["causal/learner"] += passes * policy.config.flops(batch.ids.numel(), batch.pairs, len(logprobs))
        return {**grpo.token_sums(logprobs, batch.logprobs, entropy, batch.advantages, batch.reference, clip_low, clip_high),
                "inputs": batch.ids.numel(), "padded": attend.padded}

    def memory_lines(rollouts):
        """What the run will need, from a few rollouts like those to come."""
        used, ranks, longest = dist.used_memory(place), dist.world_size(), max(len(r.prompt_ids) for r in rollouts)
        tokens = sum(len(r.prompt_ids) + sum(len(c.ids) for c in r.completions) for r in rollouts) / len(rollouts) * -(-P // ranks)  # of a step, on one rank
        activations = memory.activation_bytes(policy, *memory.passes(policy, rollouts), min(device_tokens, tokens), packed=True)
        places = [(-(-P // ranks), G), (-(-eval_problems // ranks), 1)]  # prompts and samples of each, in a step and in an evaluation
        cache = max(memory.cache_bytes(policy.config, compute_dtype.itemsize, min(engine.max_rows, p), longest, min(engine.max_rows, p * g), max_new_tokens) for p, g in places)
        copies = [engine.model] * (engine.model is not policy) + ([frozen] if kl_coef and not adapters else [])
        return memory.describe(memory.estimate(policy, copies, params, used, activations, cache), dist.free_memory(place))

    def held_out():
        """Greedy accuracy on the first `eval_problems` problems of the val split, the same ones every time."""
        n = min(eval_problems, len(val_task))
        mine = range(n)[dist.share(n)]
        with tqdm(total=len(mine), desc="held-out", disable=None, leave=False) as bar:
            results = evaluate.outcomes(engine, tokenizer, val_task, mine, 1, max_new_tokens, 0.0, progress=bar.update)
        flops["eval"] += dist.total(sum(engine.flops().values()))
        results = dist.gather(results)
        return dist.broadcast({f"val/{k}": v for k, v in evaluate.summary(results).items()} if dist.is_main() else None)

    # ---- before the first step: what this run will do, and whether it can learn anything
    log.card(stage="rl", settings=settings, start=origin, device_rows=engine.max_rows, flop_rate=flop_rate, copy_rate=copy_rate, world_size=dist.world_size(),
             dtype=str(compute_dtype), device=str(place), params=policy.config.n_params()[0])
    dist.say(f"rl    from {point or start}: {policy.config.n_params()[0]:,} parameters, {compute_dtype} on {dist.world_size()} x {place.type}\n"
             f"      {task}: {problems or len(stages[-1][1]):,} training problems{' in its last stage' if len(stages) > 1 else ''}\n"
             f"      a step is {P} problems x {G} samples = {P * G} rows of at most {max_new_tokens} tokens, {update_in_words()}, AdamW {rate:g}; {steps} steps")
    if not point and not selfcheck:
        val = held_out()
        dist.say(f"      held-out before: {percent(val)}, {val['val/length']:.1f} tokens")
        forecast(sample, lambda batch: learn(with_reference(batch), 1.0), problems_of, tokenizer, directory, memory_lines,
                 saved=sum(p.numel() * p.element_size() for p in policy.parameters()) + 2 * sum(p.numel() * p.element_size() for p in params), place=place)
        for p in params:
            p.grad = None  # the forecast only timed a backward pass
        log.row(0, **val, **flops_so_far(flops))
    if dry_run:
        return
    if log.active:
        checkpoint.mark_used(origin["path"], directory)

    # ---- the loop
    dist.catch_signals()
    started = time.time()
    for step in range(state["step"], max(steps, state["step"] + selfcheck)):
        t0 = time.time()
        work.clear()
        source, pairs = problems_of(step, drawn, P)  # P problems for (seed, step)
        rollouts = sample(step, source, pairs)  # ids -> text -> rewards, of this rank's groups
        rollouts, left, drawn = replace_dead(step, source, rollouts, drawn + P)  # nothing leaves unless --resample is set
        t1 = time.time()
        advantages = grpo.advantages(rollout.reward_table(rollouts, G), advantage)  # (P, G)
        lengths = rollout.length_table(rollouts, G)  # (P, G) sampled tokens
        counted = rollout.finished_table(rollouts, G) if overlong == "mask" else None  # (P, G) bool: completions in the loss
        weights = grpo.token_weights(lengths, loss_norm, max_new_tokens, counted)  # (P, G)
        denominator = dist.total(grpo.denominator(lengths, loss_norm, counted))  # of all ranks, before the first backward
        # Groups without signal go along, with A = 0: a KL term pulls on them too, and entropy and logp_diff are of all that was sampled.
        batches = [with_reference(b) for b in rollout.micro_batches(rollouts, advantages, weights, device_tokens, place)]
        scale = lr_scale(step, steps, warmup, 0.0 if lr_schedule == "constant" else 1 - warmup / steps, lr_schedule)
        learned, norms = [], []
        for _ in range(updates_per_rollout):
            learned.append([learn(batch, denominator) for batch in batches])  # forward, loss, backward
            dist.sum_gradients(params)  # one all-reduce
            if selfcheck:
                return selfchecks.report(policy, adapters, reference, rollouts, advantages, settings)
            part_norms = group_norms(trained)
            norms.append(update(optimizers, params, scale, max_grad_norm))  # clip, AdamW
            if adapters:
                adapters.merge()  # into the weights that everything multiplies by
        engine.refresh()  # the next samples come from the new weights
        dist.synchronize(place)
        t2 = time.time()

        # ---- the log
        row = rollout_row(dist.gather(rollouts), dist.gather(left), dist.gather(advantages.tolist()), log, step + 1, tokenizer)
        row = dist.broadcast(row)
        done = dist.totals({name: work[name] for name in (*WORK, "causal/rollout", "causal/learner", "bytes", "row_steps", "place_steps")})
        flops.update(train=sum(done[part] for part in WORK), causal=done["causal/rollout"] + done["causal/learner"])
        bad = 0 if all(map(math.isfinite, norms)) else bad + 1
        rollout_time, step_time = dist.total(t1 - t0, "max"), dist.total(t2 - t0, "max")  # of the slowest rank
        sums = [over_ranks(one) for one in learned]  # of each update
        row.update(grpo.token_metrics(sums[0], sums[-1]))
        row.update({
            "occupancy": done["row_steps"] / max(done["place_steps"], 1), "padding": 1 - sums[0]["inputs"] / sums[0]["padded"],
            "grad_norm": norms[-1], **{f"grad_norm/{part}": n for part, n in part_norms.items()}, "bad_steps": bad,
            "updated": sum(0 < n < math.inf for n in norms) / len(norms), "lr": rate * scale, **{f"flops/{part}": done[part] for part in WORK},
            "tok_per_s/rollout": row["tokens"] / rollout_time, "tok_per_s/learner": sums[0]["tokens"] / (step_time - rollout_time),
            "mbu": done["bytes"] / rollout_time / dist.world_size() / copy_rate, "mfu": done["causal/learner"] / (step_time - rollout_time) / dist.world_size() / flop_rate,
            "time/rollout": rollout_time, "time/learner": step_time - rollout_time, "time/outside": 1 - step_time / (time.time() - t0)})
        last = step + 1 == steps
        if last or (eval_every and (step + 1) % eval_every == 0):
            row.update(held_out())
        row.update({**flops_so_far(flops), "time/step": time.time() - t0, "memory/peak_gb": dist.peak_memory(place) / 1e9})
        log.row(step + 1, **row)
        line(step + 1, row, (time.time() - started) / (step + 1 - state["step"]) * (steps - step - 1))
        for sentence in watch.look(row):
            dist.say(f"      WARNING, step {step + 1}: {sentence}")

        # ---- the end of the step
        stop = dist.stop_requested()
        improved = row["reward"] > max(best["reward"], save_reward_above)
        if last or stop or improved or bad >= max_bad_steps or (save_every and (step + 1) % save_every == 0):
            if row["reward"] > best["reward"]:
                best = {"step": step + 1, "reward": row["reward"]}
            if dist.is_main():
                whole = dict(step=step + 1, best=best, bad=bad, flops=dict(flops), drawn=drawn, watch=watch.state, start=origin, device_rows=engine.max_rows,
                             settings=settings, optimizers=[o.state_dict() for o in optimizers], lora=adapters and adapters.state_dict())
                report = checkpoint.save(directory, step + 1, lambda path: save_model(policy, tokenizer, path), whole, best["step"])
                print(report + (f" (a new best reward, {row['reward']:.3f})" if improved else ""), flush=True)
                sent()
            dist.barrier()
        if stop or bad >= max_bad_steps:
            sent.finish()
        if bad >= max_bad_steps:
            raise ValueError(f"in {bad} steps in a row updates were skipped because the gradient was not finite; the state is saved in {directory}: "
                             f"go on from it with --model={checkpoint.latest(directory)} --run=<name> and a lower --lr, or --dtype=fp32")
        if stop:
            raise SystemExit(0 if stop == 15 else 130)
    sent.finish()


def check_settings(start):
    """Refuse what cannot work, with the value and the remedy."""
    if not checkpoint.is_model(start):
        raise ValueError(f"no SFT model in {start}: make one with `python train_sft.py --depth={depth}`, or name one with --model=")
    at_least(globals(), 1, "prompts_per_step max_new_tokens steps updates_per_rollout device_tokens eval_problems probe_prompts max_bad_steps")
    at_least(globals(), 0, "seed problems device_rows resample lora_rank lora_alpha kl_coef clip_low clip_high lr warmup weight_decay max_grad_norm eval_every save_every")
    if samples_per_prompt < 2:
        raise ValueError(f"--samples_per_prompt={samples_per_prompt}: at least 2, because rewards are compared within a group")
    if 0 < device_rows < samples_per_prompt:
        raise ValueError(f"--device_rows={device_rows}: it must hold one group, --samples_per_prompt={samples_per_prompt}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"--temperature={temperature}: it must be above 0, because training needs samples that differ")
    for name, choices in (("overlong", ("zero", "mask")), ("kl_estimator", grpo.ESTIMATORS), ("lr_schedule", ("constant", "linear", "cosine"))):
        if globals()[name] not in choices:
            raise ValueError(f"--{name}={globals()[name]}: it must be one of {', '.join(choices)}")
    if clip_low > 1:
        raise ValueError(f"--clip_low={clip_low}: it must be at most 1, since the ratio is never below 0")
    grpo.advantages(torch.zeros(1, 2), advantage)  # raises for an unknown name,
    grpo.token_weights(torch.ones(1, 1), loss_norm)  # and so does this


def check_problems(stages, part_weights):
    """Refuse a step that asks for more different problems than there are, and a fixed set that is none."""
    for _, source in stages:
        n, most = problems or len(source), prompts_per_step * (1 + resample)
        if problems > len(source):
            raise ValueError(f"--problems={problems}: task {task} has {len(source):,} training problems")
        if most > n:
            raise ValueError(f"--prompts_per_step={prompts_per_step}{f' --resample={resample}' if resample else ''}: a step may ask for {most:,} different "
                             f"problems, and the run has {n:,}: lower it, or raise --problems")
        for result in rollout.judge(source, [(source.problem(i), "") for i in range(min(n, 20))]) if part_weights else []:
            if isinstance(result, Reward):
                rollout.weighted(result, part_weights)  # raises for a part that the task does not give
        different = len({str(source.problem(i).prompt) for i in range(problems)})
        if different < problems:
            raise ValueError(f"--problems={problems}: the first {problems} problems of {task} are only {different} different ones")


def update_in_words():
    """What a step does with its samples, where it is not the default."""
    words = [f"LoRA of rank {lora_rank}"] if lora_rank else []
    words += ["one update" if updates_per_rollout == 1 else f"{updates_per_rollout} updates with the ratio in [{1 - clip_low:g}, {1 + clip_high:g}]"]
    words += [f"KL {kl_coef:g} ({kl_estimator})"] if kl_coef else []
    words += [f"dead groups replaced up to {resample} times"] if resample else []
    return ", ".join(words + (["cut-off completions left out"] if overlong == "mask" else []))


def over_ranks(learned):
    """One update's micro-batches -> their token sums over all ranks."""
    sums = {name: sum(part[name] for part in learned) for name in (*grpo.TOKEN_SUMS, "inputs", "padded")}
    return {**dist.totals(sums), "gap_max": dist.total(max([part["gap_max"] for part in learned], default=0.0), "max")}


def forecast(sample, learn, problems_of, tokenizer, directory, memory_lines, saved, place):
    """Try a few problems, and say what share of the groups will teach something, how long the run will take, what it will hold in memory and
    what it will write; saved: bytes of a checkpoint."""
    P, G = prompts_per_step, samples_per_prompt
    source, pairs = problems_of(0, 0, probe_prompts)
    begun = time.time()
    mine = sample("probe", source, pairs)
    sampling = time.time() - begun
    held = memory_lines(mine) if mine else []
    begun = time.time()
    ones = torch.ones(len(mine), G, dtype=torch.float64)  # (P, G) as advantages and weights
    for batch in rollout.micro_batches(mine, ones, ones, device_tokens, place):
        learn(batch)
    seconds = dist.total((sampling + (time.time() - begun) * updates_per_rollout) / len(pairs) * P, "max")
    rollouts = dist.gather(mine)
    if not dist.is_main():
        return
    written = size_of(rollout.records(rollouts, ones.new_zeros(len(rollouts), G), tokenizer.decode, step=0, time=time.time())) / len(rollouts) * P * steps
    lines = evaluate.describe_forecast(rollouts, duration(seconds * steps), seconds) + held
    lines.append(f"on disk: rollouts about {size(written)} in all, a checkpoint {size(saved)}, of which at most four are kept, and those that others start from")
    if checkpoint.free_disk(directory) < written + 5 * saved:
        lines.append(f"WARNING: only {size(checkpoint.free_disk(directory))} are free where {directory} is")
    print(*("      " + text for text in lines), sep="\n", flush=True)


def rollout_row(rollouts, left, advantages, log, step, tokenizer):
    """On the first rank: write all that the step sampled to disk and compute its metrics; `left` are groups that others replaced."""
    if not dist.is_main():
        return None
    a = torch.tensor(advantages)  # (P, G)
    sampled = rollouts + left
    log.rollouts(step, rollout.records(sampled, advantages + [[0.0] * a.size(1)] * len(left), tokenizer.decode, step=step, time=round(time.time(), 3)))
    dead = grpo.no_signal(rollout.reward_table(rollouts, a.size(1)))  # (P,)
    return {**rollout.metrics(sampled), "resampled": len(left), "frac_learned_zero_std": float(dead.double().mean()),
            "advantage/mean": float(a.mean()), "advantage/std": float(a.std()), "advantage/max": float(a.abs().max())}


def percent(row):
    return f"{row['val/accuracy']:.1%} [{row['val/low']:.1%}, {row['val/high']:.1%}]"


def line(step, row, eta):
    """One readable line a step."""
    val = f"  val {percent(row)} len {row['val/length']:.1f}" if "val/accuracy" in row else ""
    dist.say(f"rl    {step:4d}/{steps}  reward {row['reward']:.3f}  len {row['completions/mean_length']:5.1f}  dead {row['frac_reward_zero_std']:4.0%}  "
             f"cut {row['completions/clipped_ratio']:3.0%}  entropy {row['entropy']:.3f}  grad {row['grad_norm']:5.2f}  "
             f"{row['time/rollout']:.1f}+{row['time/learner']:.1f} s  ETA {duration(eta)}{val}")


if __name__ == "__main__":
    dist.run(main)
