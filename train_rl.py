"""Reinforcement learning with a checkable reward: GRPO, on-policy.

    python train_rl.py --depth=4                                    # from out/d4/sft
    torchrun --nproc_per_node=8 train_rl.py --depth=20 --task=gsm8k

One step: P problems, G samples of each, all decoded together from the current weights; rewards compared within each
problem; one update. Follow main() from "the loop" on: each step of the algorithm is one named line.
Left out, because on-policy training does not need them: the ratio, its clip, a KL term, a value function."""
import math
import time
from functools import lru_cache

import numpy as np
import torch
from tqdm import tqdm

from nanorl import evaluate, grpo, rollout
from nanorl.engine import Engine
from nanorl.hf import load_model, save_model
from nanorl.optim import load_states, lr_scale, make_optimizers, update
from nanorl.runtime import checkpoint, dist
from nanorl.runtime.config import at_least, configure
from nanorl.runtime.log import RunLog, duration
from nanorl.tasks import get_stages, parse_settings
from nanorl.tokenizer import Tokenizer

# ---- run
run = ""  # folder under out/; empty: d<depth>
stage = "rl"  # folder of this stage under it
depth = 4  # names the run's folder when --run is empty
model = ""  # a model directory to start from; empty: the run's SFT model
resume = "auto"  # auto: go on if the constants are the same; never; must
seed = 0  # fixes the problems of each step and every sampled token
device = "auto"  # auto, cpu, cuda
dtype = "auto"  # activations: auto, fp32, bf16, fp64 (tests)
dry_run = False  # print what the run would do, and stop
# ---- task and rollouts
task = "sum3"  # one of nanorl/tasks, path.py:Class, a mixture 'sum3=50,counting=50', or a curriculum '0-20 until 20; sum3'
task_args = ""  # the task's settings, 'name=value; name=value'
problems = 0  # train on so many fixed problems, the first of the split; 0: on all of them
prompts_per_step = 16  # P, problems of a step, over all ranks
samples_per_prompt = 16  # G, samples of each problem
max_new_tokens = 64  # a completion is cut off here, and has then failed
temperature = 1.0  # of sampling; the learner divides its logits by it too
device_rows = 0  # most rows decoded at once on one device; 0: what half the free memory holds
# ---- objective and optimization
advantage = "mean"  # baseline: mean, loo (leave one out), zscore (GRPO's division by the deviation)
loss_norm = "token"  # divide by: token (all tokens of the step), sequence (each completion alike), constant (max_new_tokens)
steps = 40  # optimizer steps; one step is one batch of rollouts and one update
lr = 0.0  # AdamW; 0: 0.04 / width (measured at depths 1 to 4 only; published models want some 1e-6)
warmup = 0  # steps of linear warm-up
weight_decay = 0.0  # on the blocks' matrices
max_grad_norm = 1.0  # 0: no clipping
device_tokens = 16384  # padded tokens of one forward on one device: lower it when memory runs out
max_bad_steps = 5  # stop after this many updates in a row were skipped for a gradient that is not finite
# ---- log
probe_prompts = 32  # problems tried before the first step, for the forecast
eval_every = 10  # steps between held-out evaluations; 0: only before and after
eval_problems = 400  # of the val split, greedy
save_every = 20  # steps between checkpoints, from which a killed run goes on; 0: only at the end
save_reward_above = 1.0  # also save at a new best reward above this


def main():
    settings = configure(globals())
    place = dist.setup(device)
    weight_dtype, compute_dtype = dist.dtypes(dtype, place)
    settings["run"] = run or f"d{depth}"
    directory = checkpoint.stage_directory(settings["run"], stage)
    start = checkpoint.resolve(model or checkpoint.stage_directory(settings["run"], "sft"))
    point = checkpoint.resume_point(directory, resume, settings)
    check_settings(point or start)
    log = RunLog(directory, dist.is_main() and not dry_run)

    # ---- policy, sampler, optimizer, tasks
    policy = load_model(point or start, weight_dtype, place)  # fp32 master weights
    policy.compute_dtype = compute_dtype
    params = list(policy.parameters())
    rate = lr or 0.04 / policy.config.n_embd
    optimizers = make_optimizers(policy, rate, rate, weight_decay, muon=False)
    tokenizer = Tokenizer.from_pretrained(point or start)
    stages = get_stages(task, "train", **parse_settings(task_args))  # [(first step, task)]: one, unless it is a curriculum
    val_task = get_stages(task, "val", **parse_settings(task_args))[-1][1]  # a curriculum is judged by where it leads
    engine = Engine(policy, device_rows)
    P, G = prompts_per_step, samples_per_prompt
    check_problems(stages)
    first_step, best, bad, flops = 0, {"step": None, "reward": -math.inf}, 0, 0.0  # best: of the saved steps
    if point:
        state = checkpoint.load_state(point)
        first_step, best, bad, flops = state["step"], state["best"], state["bad"], state["flops"]
        load_states(optimizers, state["optimizers"])
        engine.max_rows = device_rows or state["device_rows"]
        dist.say(f"resumed {point}")
    log.cut(first_step if point else -1)  # rows and rollouts beyond the checkpoint, about to be made again
    if not engine.max_rows:  # resolved once, and again the same when the run is resumed
        engine.max_rows = max(G, int(dist.total(dist.free_memory(place) // 2 // engine.bytes_per_row(max_new_tokens), "min")))

    @lru_cache(maxsize=2)  # a mixture's can have millions of places
    def order(epoch, n):
        """The order in which pass `epoch` visits the n training problems, (n,)."""
        return np.random.default_rng([seed, epoch]).permutation(n)

    def problems_of(step):
        """The step's task, and P pairs (number, problem) of it: each pass visits every training problem once, in an order
        given by the seed. The number counts on over passes, so that a problem that comes again gets other random numbers."""
        first, source = [s for s in stages if s[0] <= step][-1]
        n = problems or len(source)
        places = [divmod((step - first) * P + i, n) for i in range(P)]
        return source, [(epoch * n + i, source.problem(int(order(epoch, n)[i]))) for epoch, i in places]

    def sample(step, source, pairs):
        """(number, problem) pairs -> Rollouts of G scored completions each, for this rank's share of the problems."""
        mine = pairs[dist.share(len(pairs))]
        keys = [rollout.prompt_key(seed, step, number) for number, _ in mine]
        return rollout.generate(engine, tokenizer, source, [p for _, p in mine], keys, G, max_new_tokens, temperature)

    def learn(batch, denominator):
        """One micro-batch: forward, loss, backward. Returns sums over its tokens, for the log."""
        h = policy.hidden(batch.ids)[batch.predicts]  # (N, C): the head runs only where a token was sampled
        logprobs, entropy = policy.logprobs(h, batch.targets, temperature, with_entropy=True)  # (N,), (N,)
        loss = grpo.policy_loss(logprobs, batch.advantages, batch.weights, denominator)
        loss.backward()
        gap = (logprobs.detach().double() - batch.logprobs).abs()  # (N,) learner against sampler
        return dict(entropy=float(entropy.double().sum()), gap=float(gap.sum()), gap_max=float(gap.max()), tokens=len(gap),
                    inputs=batch.inputs, padded=batch.ids.numel(), flops=3 * policy.config.flops(batch.inputs, batch.attended, len(gap)))

    def held_out():
        """Greedy accuracy on the first `eval_problems` problems of the val split, the same ones every time."""
        n = min(eval_problems, len(val_task))
        mine = range(n)[dist.share(n)]
        with tqdm(total=len(mine), desc="held-out", disable=None, leave=False) as bar:
            results = evaluate.outcomes(engine, tokenizer, val_task, mine, 1, max_new_tokens, 0.0, progress=bar.update)
        results = dist.gather(results)
        return dist.broadcast({f"val/{k}": v for k, v in evaluate.summary(results).items()} if dist.is_main() else None)

    # ---- before the first step: what this run will do, and whether it can learn anything
    log.card(stage="rl", settings=settings, start=start, device_rows=engine.max_rows, world_size=dist.world_size(),
             dtype=str(compute_dtype), device=str(place), params=policy.config.n_params()[0])
    dist.say(f"rl    from {point or start}: {policy.config.n_params()[0]:,} parameters, {compute_dtype} on {dist.world_size()} x {place.type}\n"
             f"      {task}: {problems or len(stages[-1][1]):,} training problems{' in its last stage' if len(stages) > 1 else ''}\n"
             f"      a step is {P} problems x {G} samples = {P * G} rows of at most {max_new_tokens} tokens, one update; {steps} steps")
    if not point:
        val = held_out()
        dist.say(f"      held-out before: {percent(val)}, {val['val/length']:.1f} tokens")
        forecast(sample, learn, problems_of, place)
        for p in params:
            p.grad = None  # the forecast only timed a backward pass
        log.row(0, **val)
    if dry_run:
        return

    # ---- the loop
    dist.catch_signals()
    started = time.time()
    for step in range(first_step, steps):
        t0 = time.time()
        source, pairs = problems_of(step)  # P problems for (seed, step)
        rollouts = sample(step, source, pairs)  # ids -> text -> rewards, of this rank's groups
        t1 = time.time()
        advantages = grpo.advantages(rollout.reward_table(rollouts, G), advantage)  # (P, G)
        lengths = rollout.length_table(rollouts, G)  # (P, G) sampled tokens
        weights = grpo.token_weights(lengths, loss_norm, max_new_tokens)  # (P, G)
        denominator = dist.total(grpo.denominator(lengths, loss_norm))  # of all ranks, before the first backward
        # Groups without signal go along, with A = 0: entropy and logp_diff are of all that was sampled.
        batches = rollout.micro_batches(rollouts, advantages, weights, device_tokens, place)
        learned = [learn(batch, denominator) for batch in batches]  # forward, loss, backward
        dist.sum_gradients(params)  # one all-reduce
        norm = update(optimizers, params, lr_scale(step, steps, warmup), max_grad_norm)  # clip, AdamW
        engine.refresh()  # the next samples come from the new weights
        dist.synchronize(place)
        t2 = time.time()

        # ---- the log
        row = rollout_row(dist.gather(rollouts), dist.gather(advantages.tolist()), log, step + 1, tokenizer)
        row = dist.broadcast(row)
        sums = {k: dist.total(sum(x[k] for x in learned)) for k in ("entropy", "gap", "tokens", "inputs", "padded", "flops")}
        stats = engine.stats
        sampled = dist.total(policy.config.flops(stats["prompt_tokens"] + stats["row_steps"], stats["attended"],
                                                 len(rollouts) + stats["row_steps"]))
        flops += sums["flops"] + sampled
        bad = 0 if math.isfinite(norm) else bad + 1
        rollout_time, step_time = dist.total(t1 - t0, "max"), dist.total(t2 - t0, "max")  # of the slowest rank
        row.update({
            "entropy": sums["entropy"] / sums["tokens"], "grad_norm": norm, "updated": float(0 < norm < math.inf), "bad_steps": bad,
            "lr": rate * lr_scale(step, steps, warmup), "logp_diff/mean": sums["gap"] / sums["tokens"],
            "logp_diff/max": dist.total(max([x["gap_max"] for x in learned], default=0.0), "max"),
            "padding": 1 - sums["inputs"] / sums["padded"], "flops_total": flops,
            "tok_per_s/rollout": row["tokens"] / rollout_time, "tok_per_s/learner": row["tokens"] / (step_time - rollout_time),
            "time/rollout": rollout_time, "time/learner": step_time - rollout_time})
        last = step + 1 == steps
        if last or (eval_every and (step + 1) % eval_every == 0):
            row.update(held_out())
        row.update({"time/step": time.time() - t0, "memory/peak_gb": dist.peak_memory(place) / 1e9})
        log.row(step + 1, **row)
        line(step + 1, row, (time.time() - started) / (step + 1 - first_step) * (steps - step - 1))

        # ---- the end of the step
        stop = dist.stop_requested()
        improved = row["reward"] > max(best["reward"], save_reward_above)
        if last or stop or improved or bad >= max_bad_steps or (save_every and (step + 1) % save_every == 0):
            if row["reward"] > best["reward"]:
                best = {"step": step + 1, "reward": row["reward"]}
            if dist.is_main():
                state = dict(step=step + 1, best=best, bad=bad, flops=flops, device_rows=engine.max_rows, settings=settings,
                             optimizers=[o.state_dict() for o in optimizers])
                report = checkpoint.save(directory, step + 1, lambda path: save_model(policy, tokenizer, path), state, best["step"])
                print(report + (f" (a new best reward, {row['reward']:.3f})" if improved else ""), flush=True)
            dist.barrier()
        if bad >= max_bad_steps:
            raise ValueError(f"{bad} updates in a row were skipped because the gradient was not finite; the state is saved in {directory}: "
                             f"go on from it with --model={checkpoint.latest(directory)} --run=<name> and a lower --lr, or --dtype=fp32")
        if stop:
            raise SystemExit(0 if stop == 15 else 130)


def check_settings(start):
    """Refuse what cannot work, with the value and the remedy."""
    if not checkpoint.is_model(start):
        raise ValueError(f"no SFT model in {start}: make one with `python train_sft.py --depth={depth}`, or name one with --model=")
    at_least(globals(), 1, "prompts_per_step max_new_tokens steps device_tokens eval_problems probe_prompts max_bad_steps")
    at_least(globals(), 0, "seed problems device_rows lr warmup weight_decay max_grad_norm eval_every save_every")
    if samples_per_prompt < 2:
        raise ValueError(f"--samples_per_prompt={samples_per_prompt}: at least 2, because rewards are compared within a group")
    if 0 < device_rows < samples_per_prompt:
        raise ValueError(f"--device_rows={device_rows}: it must hold one group, --samples_per_prompt={samples_per_prompt}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"--temperature={temperature}: it must be above 0, because training needs samples that differ")
    grpo.advantages(torch.zeros(1, 2), advantage)  # raises for an unknown name,
    grpo.token_weights(torch.ones(1, 1), loss_norm)  # and so does this


def check_problems(stages):
    """Refuse a step that asks for more different problems than there are, and a fixed set that is none."""
    for _, source in stages:
        if problems > len(source) or prompts_per_step > (problems or len(source)):
            raise ValueError(f"--prompts_per_step={prompts_per_step} --problems={problems}: task {task} has {len(source):,} training problems")
        different = len({str(source.problem(i).prompt) for i in range(problems)})
        if different < problems:
            raise ValueError(f"--problems={problems}: the first {problems} problems of {task} are only {different} different ones")


def forecast(sample, learn, problems_of, place):
    """Try a few problems, and say what share of the groups will teach something and how long the run will take."""
    P, G = prompts_per_step, samples_per_prompt
    source, pairs = problems_of(0)
    for step in range(1, -(-probe_prompts // P)):
        pairs += problems_of(step)[1] if problems_of(step)[0] is source else []
    pairs = pairs[:probe_prompts]
    begun = time.time()
    mine = sample("probe", source, pairs)
    sampling = time.time() - begun
    begun = time.time()
    ones = torch.ones(len(mine), G, dtype=torch.float64)
    for batch in rollout.micro_batches(mine, ones, ones, device_tokens, place):
        learn(batch, 1.0)
    seconds = dist.total((sampling + time.time() - begun) / len(pairs) * P, "max")
    rollouts = dist.gather(mine)
    if not dist.is_main():
        return
    m = rollout.metrics(rollouts)
    solved = sum(evaluate.is_correct(r) for group in rollouts for r in group.rewards)
    dead = m["frac_reward_zero_std"]
    print(f"      probe: {solved} of {len(rollouts) * G} samples solved ({solved / len(rollouts) / G:.1%}), {m['completions/mean_length']:.1f} tokens, "
          f"{m['completions/clipped_ratio']:.0%} cut off\n"
          f"      forecast: {dead:.0%} of the groups without signal (all {G} rewards equal), {m['tokens_with_signal']:.0%} of the tokens in groups "
          f"that teach; about {seconds:.1f} s a step, {duration(seconds * steps)} in all, without evaluations", flush=True)
    if solved == 0:
        print(f"      WARNING: no sample was solved, so this task is too hard for this model: most steps will change "
              f"nothing.\n      Train it further (SFT), take an easier task, or raise --samples_per_prompt.", flush=True)
    elif dead > 0.5:
        print(f"      WARNING: more than half of the groups teach nothing: the task is too {'hard' if m['reward'] < 0.5 else 'easy'} for this model, "
              f"or --samples_per_prompt={G} too few.", flush=True)


def rollout_row(rollouts, advantages, log, step, tokenizer):
    """On the first rank: write the step's rollouts to disk and compute their metrics."""
    if not dist.is_main():
        return None
    log.rollouts(step, rollout.records(rollouts, advantages, tokenizer.decode))
    a = torch.tensor(advantages)
    return {**rollout.metrics(rollouts), "advantage/std": float(a.std()), "advantage/max": float(a.abs().max())}


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
