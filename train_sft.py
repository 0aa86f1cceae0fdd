"""Supervised fine-tuning: a base model and worked answers -> a model that answers.

    python train_sft.py --depth=4                                   # from out/d4/base, on a task's demonstrations
    python train_sft.py --depth=4 --data='chats/*.jsonl'            # on conversations from files
    python train_sft.py --match_flops=out/d4/rl                     # what would more SFT have made of that RL run's FLOPs?
    torchrun --nproc_per_node=8 train_sft.py --depth=20 --task=gsm8k

The loss is on what the assistant says, the token that ends its turn included, and on nothing else. Conversations
are packed whole into rows and do not see each other."""
import copy
import math
import os
import time
from collections import Counter

import torch

from nanorl import evaluate, memory
from nanorl.corpus import read_conversations
from nanorl.data import PackedRows, collate, pack
from nanorl.attention import CausalAttention
from nanorl.engine import Engine
from nanorl.hf import load_model, local_model, save_model
from nanorl.lora import adapted_model
from nanorl.optim import load_states, lr_scale, make_optimizers, update
from nanorl.runtime import checkpoint, dist
from nanorl.runtime.after import AfterSave
from nanorl.runtime.config import at_least, configure, given
from nanorl.runtime.log import RunLog, duration, flops_so_far
from nanorl.tasks import get_task, parse_settings
from nanorl.tokenizer import Tokenizer

# ---- run
run = ""  # folder under out/; empty: d<depth>
stage = "sft"  # folder of this stage under it
depth = 4  # names the run's folder when --run is empty
model = ""  # a model directory or hub id (Qwen/Qwen2.5-0.5B-Instruct) to start from; empty: the run's base model
resume = "auto"  # auto: go on if the constants are the same; never; must
seed = 0  # fixes the order of the examples
device = "auto"  # auto, cpu, cuda
dtype = "auto"  # activations: auto, fp32, bf16, fp64 (tests)
# ---- demonstrations
data = ""  # conversations: files and globs with commas between, .jsonl, .parquet or .csv, of messages, conversations, instruction or prompt
task = "sum3"  # without --data: one of nanorl/tasks, or path.py:Class
task_args = ""  # the task's settings, such as 'demonstrations=worked'
examples = 0  # how many training problems or conversations; 0: all of them
# ---- optimization
steps = 0  # optimizer steps; 0: one pass over the examples
match_flops = ""  # an RL run, out/d4/rl: go on with SFT from where it started, on the problems it had, until as many FLOPs are spent; into sft_more
batch_tokens = 8192  # tokens of an optimizer step, over all ranks, padding included
seq_len = 256  # tokens of a row; longer conversations of --data are left out
device_tokens = 16384  # tokens of one forward on one device: lower it when memory runs out
optimizer = "auto"  # muon: Muon for the blocks' matrices, AdamW for the rest; adamw: AdamW for all; auto: muon, and adamw for a published model or LoRA
matrix_lr = 0.0  # the blocks' matrices; 0: 0.01 for Muon, 2e-5 for AdamW, 2e-4 for LoRA
other_lr = 0.0  # embeddings, norms and head; 0: beside Muon 0.4 / width (measured at depths 1 to 4 only), else matrix_lr
lora_rank = 0  # train low-rank adapters of the weights alone, of this rank; 0: train the weights
lora_alpha = 32.0  # what an adapter learns is scaled by lora_alpha / lora_rank
lora_targets = "q,k,v,o,gate,up,down"  # the projections that get one
recompute = False  # keep no activations inside the blocks and compute them again in backward: a third more work, a fraction of the memory
warmup = 10  # steps of linear warm-up
cooldown = 0.4  # last share of the steps in which the rate falls to 0
max_grad_norm = 1.0  # 0: no clipping
max_bad_steps = 5  # stop after this many updates in a row were skipped for a gradient that is not finite
# ---- log
log_every = 20  # steps between lines
eval_every = 0  # steps between validations, of --data's held-out conversations or of a task's problems; 0: only before and after
eval_problems = 0  # of a task's val split, answered greedily at each validation; 0: none
eval_new_tokens = 64  # an answer is cut off here
save_every = 500  # steps between checkpoints, from which a killed run goes on; 0: only at the end
after_save = ""  # a command to run after every save, in the background, such as 'rclone copy {dir} gdrive:runs/{run}' ({dir}: out/<run>)


def main():
    settings = configure(globals())
    target, cursor = follow(settings) if match_flops else (0, None)
    at_least(globals(), 1, "batch_tokens seq_len device_tokens log_every max_bad_steps")
    if optimizer not in ("auto", "muon", "adamw") or optimizer == "muon" and lora_rank:
        raise ValueError(f"--optimizer={optimizer}{f' --lora_rank={lora_rank}' if lora_rank else ''}: it must be auto, muon or adamw, and with LoRA adamw")
    at_least(globals(), 0, "seed examples steps matrix_lr other_lr lora_rank lora_alpha warmup cooldown max_grad_norm eval_every eval_problems save_every")
    at_least(globals(), 1, "eval_new_tokens")
    place = dist.setup(device)
    weight_dtype, compute_dtype = dist.dtypes(dtype, place)
    settings["run"] = run or f"d{depth}"
    directory = checkpoint.stage_directory(settings["run"], stage)
    start = local_model(checkpoint.resolve(model or checkpoint.stage_directory(settings["run"], "base")))
    log, sent = RunLog(directory, dist.is_main()), AfterSave(after_save, os.path.dirname(directory), dist.is_main())
    point = checkpoint.resume_point(directory, resume, settings)

    # ---- model, optimizer, data
    if not checkpoint.is_model(point or start):
        raise ValueError(f"no base model in {start}: make one with `python train_base.py --depth={depth}`, or name one with --model=")
    state = checkpoint.load_state(point) if point else dict(step=0, bad=0, flops={}, start=checkpoint.origin_of(start))
    origin = state["start"]
    if lora_rank:
        checkpoint.must_be(origin)
        net, adapters = adapted_model(origin["path"], compute_dtype, place, lora_rank, lora_alpha, lora_targets.split(","), seed)
    else:
        net, adapters = load_model(point or start, weight_dtype, place), None
    net.compute_dtype, net.recompute = compute_dtype, recompute
    trained = adapters or net
    tokenizer = Tokenizer.from_pretrained(point or start)
    params = [p for _, p in trained.named_parameters()]
    muon = optimizer == "muon" or optimizer == "auto" and not adapters and not origin["published"]
    rate = matrix_lr or (0.01 if muon else 2e-4 if adapters else 2e-5)
    other = other_lr or (0.4 / net.config.n_embd if muon else rate)
    optimizers = make_optimizers(trained, rate, other, muon=muon)
    rows = batch_tokens // seq_len
    if rows * seq_len != batch_tokens:
        raise ValueError(f"batch_tokens = {batch_tokens} is not a multiple of seq_len = {seq_len}")
    if data:
        conversations, held_out, note = read_conversations(data, tokenizer, seq_len)
        n_examples, example = len(conversations), conversations.__getitem__
    else:
        source, held_out, note = get_task(task, split="train", **parse_settings(task_args)), [], ""
        val_task = get_task(task, split="val", **parse_settings(task_args)) if eval_problems else None
        if not hasattr(source, "solution"):
            raise ValueError(f"task {task} has no solution(): it cannot make demonstrations; give it conversations with --data=")
        n_examples = len(source)

        def example(i):
            problem = source.problem(i)
            return tokenizer.render_chat(problem.prompt + [{"role": "assistant", "content": source.solution(problem)}])

    n_examples = min(examples or n_examples, n_examples)
    train = PackedRows(example, n_examples, seq_len, rows, seed, dist.rank(), dist.world_size(), pad=tokenizer.document_end)
    mean_length = sum(len(example(i)[0]) for i in range(min(n_examples, 500))) / min(n_examples, 500)

    def work(document, trainable):
        """A step's rows (rows of this rank, T), and the trainable targets of all ranks -> FLOPs of the step: train, as they run, and causal, those that are
        needed if no padding is computed and of attention only what a token may see."""
        places, real, pairs = (int(dist.total(n)) for n in (document.numel(), (document > 0).sum(), (positions_in(document) + 1)[document > 0].sum()))
        as_they_run = net.config.learning_flops(places, places * seq_len, trainable, recompute, adapters)
        return dict(train=sum(as_they_run.values()), causal=(2 if adapters else 3) * net.config.flops(real, pairs, trainable))

    if cursor:
        train.load_state_dict(cursor)
    total_steps = steps or math.ceil(n_examples * mean_length / batch_tokens)
    if target:
        ahead = copy.copy(train)
        some = [work(document, int(dist.total(mask.sum())))["train"] for _, _, mask, document in (ahead.next() for _ in range(20))]
        row_flops = sum(some) / len(some) / rows
        if row_flops > 0.02 * target:  # the last step takes whole rows, so it may miss by half of one
            raise ValueError(f"--match_flops={match_flops}: a row of --seq_len={seq_len} is {row_flops / target:.0%} of that run's {target:.3g} FLOPs, too much to match "
                             "them within 1%: lower --seq_len, or compare with a longer run")
        total_steps = max(1, math.ceil(target / row_flops / rows - 0.5 / rows))
    first_step, bad, flops = state["step"], state["bad"], Counter(state["flops"])
    if point:
        load_states(optimizers, state["optimizers"])
        if adapters:
            adapters.load_state_dict(state["lora"])
        train.load_state_dict(state["data"])
        dist.say(f"resumed {point}")
    log.cut(first_step if point else -1)  # rows and rollouts beyond the checkpoint, about to be made again
    log.card(stage="sft", settings=settings, start=origin, steps=total_steps, world_size=dist.world_size(),
             dtype=str(compute_dtype), device=str(place))
    if log.active and not point:
        checkpoint.mark_used(start, directory)
    how = (f"Muon {rate:g}, AdamW {other:g}" if muon else f"AdamW {rate:g}") + (f" on adapters of rank {lora_rank}, {sum(p.numel() for p in params):,} parameters" if adapters else "")
    dist.say(f"sft   from {point or start}; {how}; {n_examples:,} {'conversations' if data else 'demonstrations'} of {mean_length:.0f} tokens, {total_steps} steps of "
             f"{batch_tokens:,} tokens = {total_steps * batch_tokens / (n_examples * mean_length):.2f} passes"
             + (f"; {len(held_out):,} held out" if data else "") + (f"\n      {note}" if note else ""))
    if target:
        dist.say(f"      these are the {target:.3g} FLOPs of {match_flops}: {total_steps * batch_tokens:,} tokens, "
                 f"{'after what that SFT has seen' if cursor else 'from the first pass on'}; every pass in another order")

    def loss_sum(inputs, targets, mask, document):
        """Sum of the negative log-probs of what the assistant says, in a micro-batch: all (rows, T)."""
        h = net.hidden(inputs, positions_in(document), CausalAttention(document))  # (rows, T, C)
        said = mask.bool()
        return -net.logprobs(h[said], targets[said])[0].sum()

    def micro_batches(batch):
        return zip(*(t.to(place).split(max(1, device_tokens // seq_len)) for t in batch)) if len(batch[0]) else ()

    @torch.no_grad()
    def validate():
        """Of --data: nats per token that the assistant says, over the held-out conversations. Of a task: greedy accuracy on the first `eval_problems` problems of
        its val split. Every rank takes its share."""
        if not data:
            engine.refresh()
            n = min(eval_problems, len(val_task))
            results = evaluate.outcomes(engine, tokenizer, val_task, range(n)[dist.share(n)], 1, eval_new_tokens, 0.0)
            flops["eval"] += dist.total(sum(engine.flops().values()))
            results = dist.gather(results)
            return dist.broadcast({f"val/{name}": value for name, value in evaluate.summary(results).items()} if dist.is_main() else None)
        mine = pack(held_out, seq_len + 1)[dist.rank()::dist.world_size()]
        batch = collate(mine, seq_len, tokenizer.document_end)
        nats = sum(float(loss_sum(*part)) for part in micro_batches(batch)) if mine else 0.0
        said, places = int(dist.total(batch[2].sum())), int(dist.total(batch[2].numel()))
        flops["eval"] += net.config.flops(places, places * seq_len, said)
        return {"val/loss": dist.total(nats) / said}

    validates = held_out or eval_problems and not data
    engine = Engine(net) if validates and not data else None
    if validates and not point:
        before = validate()
        log.row(0, **before, **flops_so_far(flops))
        dist.say(f"      held-out before: {in_words(before)}")

    if not point and dist.is_main():
        used = dist.used_memory(place)  # before anything of this is alive
        row = [part.to(place) for part in collate(pack([example(i) for i in range(min(n_examples, 8))], seq_len + 1)[:1], seq_len, tokenizer.document_end)]
        forward_of = lambda n: (lambda: loss_sum(*(part.expand(n, -1) for part in row)), n * seq_len)
        activations = memory.activation_bytes(net, forward_of(1), forward_of(2), min(device_tokens, rows * seq_len / dist.world_size()))
        print(*("      " + text for text in memory.describe(memory.estimate(net, [], params, used, activations), dist.free_memory(place))), sep="\n", flush=True)

    # ---- the loop
    dist.catch_signals()
    started, losses = time.time(), []
    for step in range(first_step, total_steps):
        begun = time.time()
        batch = train.next()  # inputs, targets, mask, document, each (rows of this rank, T)
        if target and step + 1 == total_steps:  # as many rows as make up what is left
            left = min(rows, max(1, round((target - flops["train"]) / row_flops)))
            batch = [part[:len(range(dist.rank(), left, dist.world_size()))] for part in batch]
        trainable = dist.total(batch[2].sum())  # over ranks, before the first backward
        loss = 0.0
        for micro_batch in micro_batches(batch):
            part = loss_sum(*micro_batch) / max(1.0, trainable)
            part.backward()
            loss += float(part.detach())
        dist.sum_gradients(params)
        norm = update(optimizers, params, lr_scale(step, total_steps, warmup, cooldown), max_grad_norm)
        if adapters:
            adapters.merge()
        bad = 0 if math.isfinite(norm) else bad + 1
        flops.update(work(batch[3], int(trainable)))
        loss = dist.total(loss)
        row = {"loss": loss, "grad_norm": norm, "bad_steps": bad, "tokens": int(trainable), "packing": dist.total((batch[3] > 0).sum()) / dist.total(batch[3].numel()),
               "tok_per_s/learner": dist.total(batch[3].numel()) / (time.time() - begun)}
        last = step + 1 == total_steps
        if validates and (last or (eval_every and (step + 1) % eval_every == 0)):
            row.update(validate())
        row.update({**flops_so_far(flops), "time/step": time.time() - begun, "memory/peak_gb": dist.peak_memory(place) / 1e9})
        log.row(step + 1, **row)
        losses.append(loss)
        said = in_words(row)
        if last or said or (step + 1) % log_every == 0:
            eta = (time.time() - started) / (step + 1 - first_step) * (total_steps - step - 1)
            dist.say(f"sft   {step + 1:5d}/{total_steps}  loss {sum(losses) / len(losses):.3f}{said and '  val ' + said}  grad {norm:.2f}  "
                     f"packed {row['packing']:.0%}  {row['tok_per_s/learner']:,.0f} tok/s  ETA {duration(eta)}")
            losses = []
        stop = dist.stop_requested()
        if last or stop or bad >= max_bad_steps or (save_every and (step + 1) % save_every == 0):
            if dist.is_main():
                whole = dict(step=step + 1, bad=bad, flops=dict(flops), start=origin, optimizers=[o.state_dict() for o in optimizers], data=train.state_dict(), settings=settings,
                             lora=adapters and adapters.state_dict())
                print(checkpoint.save(directory, step + 1, lambda path: save_model(net, tokenizer, path), whole), flush=True)
                sent()
            dist.barrier()
        if stop or bad >= max_bad_steps:
            sent.finish()
        if bad >= max_bad_steps:
            raise ValueError(f"{bad} updates in a row were skipped because the gradient was not finite; the state is saved: "
                             f"start again with a lower --matrix_lr or --other_lr and another --run")
        if stop:
            raise SystemExit(0 if stop == 15 else 130)
    sent.finish()
    if target:
        dist.say(f"      {flops['train']:.4g} FLOPs, {flops['train'] / target:.2%} of the RL run's")


KEPT = ("batch_tokens", "seq_len", "optimizer", "matrix_lr", "other_lr", "warmup", "cooldown", "max_grad_norm")  # SFT goes on as it was


def follow(settings):
    """--match_flops: set the constants by that RL run and by the SFT that it started from; what the command line gives stays where it may differ.
    -> (the RL run's FLOPs, where in its data that SFT stopped, or None if it had other data)."""
    path = checkpoint.resolve(match_flops)
    if not checkpoint.is_model(path):
        raise ValueError(f"--match_flops={match_flops}: no checkpoint there; name an RL run's folder, such as out/d4/rl")
    rl = checkpoint.load_state(path)
    if "samples_per_prompt" not in rl["settings"]:
        raise ValueError(f"--match_flops={match_flops}: {path} is no checkpoint of RL")
    if rl["step"] < rl["settings"]["steps"]:
        raise ValueError(f"--match_flops={match_flops}: that run is at step {rl['step']} of {rl['settings']['steps']}: let it end first")
    if ";" in rl["settings"]["task"]:
        raise ValueError(f"--match_flops={match_flops}: its task is a curriculum, {rl['settings']['task']}, which SFT has none of")
    checkpoint.must_be(rl["start"])
    theirs, before = rl["settings"], rl["start"]["path"]
    settings["match_flops"] = os.path.normpath(match_flops)
    sft = checkpoint.load_state(before, mmap=True) if os.path.exists(os.path.join(before, "trainer.pt")) else dict(settings={})
    fixed = dict(model=before, data="", task=theirs["task"], task_args=theirs["task_args"], examples=theirs["problems"], steps=0)
    others = sorted(name for name in fixed.keys() & given() if globals()[name] != fixed[name])
    if others:
        raise ValueError(f"{' '.join(f'--{name}={globals()[name]}' for name in others)} with --match_flops={match_flops}: it goes on from that run's start, on its "
                         f"{fixed['examples'] or 'training'} problems of {fixed['task']}, for its FLOPs; leave these out")
    usual = dict(run=theirs["run"], stage="sft_more", **{name: theirs[name] for name in ("seed", "dtype", "lora_rank", "lora_alpha", "lora_targets")})
    kept = [name for name in KEPT if name in sft["settings"] and "examples" in sft["settings"]]
    as_before = sft["settings"].get("lora_rank", 0) == usual["lora_rank"]  # else other rates are right
    usual.update({name: sft["settings"][name] for name in kept if as_before or name not in ("optimizer", "matrix_lr", "other_lr")})
    for name, value in {**fixed, **{name: value for name, value in usual.items() if name not in given()}}.items():
        settings[name] = globals()[name] = value
    same = all(sft["settings"].get(name) == settings[name] for name in ("task", "task_args", "examples", "data", "seq_len", "seed"))
    return rl["flops"]["train"], sft["data"] if same else None


def in_words(row):
    if "val/loss" in row:
        return f"{row['val/loss']:.3f} nats a token"
    return f"{row['val/accuracy']:.1%} [{row['val/low']:.1%}, {row['val/high']:.1%}]" if "val/accuracy" in row else ""


def positions_in(document):
    """(B, T) document numbers -> (B, T) positions that start again at 0 with each document."""
    at = torch.arange(document.size(1), device=document.device).expand_as(document)
    new = torch.ones_like(document, dtype=torch.bool)
    new[:, 1:] = document[:, 1:] != document[:, :-1]
    return at - torch.where(new, at, 0).cummax(dim=1).values


if __name__ == "__main__":
    dist.run(main)
