"""Supervised fine-tuning: a base model and worked answers -> a model that answers.

    python train_sft.py --depth=4                                   # from out/d4/base, on a task
    python train_sft.py --depth=4 --data='chats/*.jsonl'            # on conversations from files
    python train_sft.py --data='gsm8k=2, chats.jsonl=1'             # on a mixture, two to one
    python train_sft.py --match_flops=out/d4/rl                     # more SFT for that run's FLOPs
    torchrun --nproc_per_node=8 train_sft.py --depth=20 --task=gsm8k --batch_tokens=32768

The loss is on what the assistant says, the token that ends its turn included, and on nothing else.
Conversations are packed whole into rows and do not see each other.
"""

import copy
import math
from functools import partial

import torch

from nanorl import compilers, learner
from nanorl import policy as policies
from nanorl.data.conversations import read_conversations
from nanorl.data.demonstrations import Demonstrations
from nanorl.data.packing import OrderedRows, PackedRows, collate, content_of, pack_rows
from nanorl.data.parts import Mixture, is_weighted, read_parts
from nanorl.data.tokens import check_same_content
from nanorl.engine import Engine
from nanorl.evaluate.outcomes import held_out, records
from nanorl.hf import local_model, model_writer
from nanorl.optim import load_states, lr_scale, make_optimizers, update
from nanorl.report import forecast, memory, plan, sizes, terminal
from nanorl.report.cost import Meter, learning_flops
from nanorl.report.rates import device_rates
from nanorl.report.trial import try_step
from nanorl.runtime import checkpoint, dist, equal_flops
from nanorl.runtime.config import at_least, configure, given, one_of
from nanorl.runtime.run import Run
from nanorl.tasks import get_task, parse_settings
from nanorl.tokenizer import Tokenizer

# ---- run
run_name = ""  # folder under out/; empty: d<depth>
stage = "sft"  # folder of this stage under it
depth = 4  # names the run's folder when --run_name is empty
model = ""  # a model directory or hub id to start from; empty: the run's base model
resume = "auto"  # auto: go on if the constants are the same; never; must
seed = 0  # fixes the order of the examples
device = "auto"  # auto, cpu, cuda
dtype = "auto"  # activations: auto, fp32 (TF32 on a GPU), bf16, fp64 (tests)
dry_run = False  # print what the run would do, and stop
note = ""  # what this run is to show; it stands in run.json and on the run's page
timestamps = False  # every line begins with the time
# ---- demonstrations
data = ""  # conversations: files and globs, hf:<name>; or a mixture with tasks, gsm8k=2, a.jsonl=1
task = "sum3"  # without --data: one of nanorl/tasks, or path.py:Class
task_args = ""  # the task's settings, such as 'demonstrations=worked'; of a mixture name.setting
examples = 0  # how many training problems or conversations, of a mixture's each part; 0: all
# ---- optimization
steps = 0  # optimizer steps; 0: one pass over the examples, or a mixture's weightiest part
match_flops = ""  # an RL run, out/d4/rl: SFT in its place, for as many FLOPs; into sft_more
batch_tokens = 8192  # tokens of an optimizer step, over all ranks, padding included
seq_len = 256  # tokens of a row; longer conversations of --data are left out
device_tokens = 0  # tokens of one forward; 0: what fits a third of a GPU's memory, on a CPU 16384
optimizer = "auto"  # muon (with AdamW beside the blocks' matrices), adamw; auto: muon from scratch
matrix_lr = 0.0  # the blocks' matrices; 0: 0.01 for Muon, 2e-5 for AdamW, 2e-4 for LoRA
other_lr = 0.0  # embeddings, norms and head; 0: beside Muon 0.4 / width, else matrix_lr
lora_rank = 0  # train low-rank adapters of the weights alone, of this rank; 0: train the weights
lora_alpha = 32.0  # what an adapter learns is scaled by lora_alpha / lora_rank
lora_targets = "q,k,v,o,gate,up,down"  # the projections that get one
recompute = False  # activations are computed again in backward: a third more work, little memory
compile = False  # the blocks by torch.compile: 1.25 to 1.6 times as fast on a CPU; needs g++
warmup = 10  # steps of linear warm-up
cooldown = 0.4  # last share of the steps in which the rate falls to 0
max_grad_norm = 1.0  # 0: no clipping
max_bad_steps = 5  # stop after so many steps in a row whose gradient is not finite
# ---- log
log_every = 20  # steps between lines
eval_every = 0  # steps between validations; 0: only before and after
eval_problems = 0  # of each task's val split, answered greedily at each validation; 0: none
eval_new_tokens = 64  # an answer is cut off here
save_every = 500  # steps between checkpoints, from which a killed run goes on; 0: only at the end
after_save = ""  # a command after every save, such as 'rclone copy {dir} gdrive:runs/{run}'
track = ""  # send the numbers to wandb, tensorboard, trackio; commas between


def main():
    global device_tokens  # found where it is 0
    settings = configure(globals())
    target = None
    if match_flops:
        # SFT in the place of an RL run: on its problems, for its FLOPs.
        target = equal_flops.follow(settings, given())
        settings = target.settings
        globals().update(settings)
    check_settings(settings)
    device = dist.setup(settings["device"])
    if compile:
        compilers.check_compiler(device)

    # The run: a new one from the base model, or one that goes on from its last checkpoint.
    base = checkpoint.stage_directory(run_name or f"d{depth}", "base")
    start = local_model(checkpoint.resolve(model or base))
    make = f"make one with `python train_base.py --depth={depth}`, or name one with --model="
    no_start = f"no base model in {start}: {make}"
    run = Run(settings, stage, start, no_start, writes=not dry_run)
    weight_dtype, compute_dtype = run.dtypes(device)

    # What is trained: the weights or LoRA's adapters, and by which rule.
    policy = policies.load(run, settings, weight_dtype, compute_dtype, device)
    muon, rate, other_rate = rates(policy, run.origin["published"])
    optimizers = make_optimizers(policy.trained, rate, other_rate, muon=muon, ranks=dist)
    tokenizer = Tokenizer.from_pretrained(run.model)
    meter = Meter(policy.model, policy.adapters, run.state["flops"])
    trained = memory.bytes_of(policy.params)
    device_tokens = memory.device_tokens(policy.model, trained, settings)

    # What it is trained on: conversations from files, a task's own solutions, or a mixture.
    chats, held_out_chats, remark = read_data(tokenizer)
    mixture = chats if isinstance(chats, Mixture) else None
    n = len(chats) if mixture else min(examples or len(chats), len(chats))
    rows = batch_tokens // seq_len
    ranks = dist.rank(), dist.world_size()
    pack = OrderedRows if mixture else PackedRows
    train = pack(chats.__getitem__, n, seq_len, rows, seed, ranks, pad=tokenizer.document_end)
    some = [chats[i] for i in range(min(n, 500))]
    mean_length = sum(len(ids) for ids, _ in some) / len(some)
    if mixture:
        mean_length = mixture.mean_length()
    # A resumed run must find what it began with. A task's problems are its own: some of them tell.
    every = mixture.every() if mixture else chats
    content = content_of([*every, *held_out_chats] if data else some)
    total_steps = steps or math.ceil(n * mean_length / batch_tokens)
    if target:
        train.load_state_dict(target.cursor or train.state_dict())
        row_flops = flops_of_a_row(policy, train, target)
        total_steps = max(1, math.ceil(target.flops / row_flops / rows - 0.5 / rows))
    if run.resumed:
        load_states(optimizers, run.state["optimizers"])
        policy.load_adapters(run.state["lora"])
        train.load_state_dict(run.state["data"])
        check_same_content(run.state, content)

    def state():
        """What only this script knows of the run and needs to go on from here."""
        return dict(
            flops=dict(meter.total),
            optimizers=[optimizer.state_dict() for optimizer in optimizers],
            data=train.state_dict(),
            content=content,
            lora=policy.adapter_state(),
        )

    # What this run will do, and how good the model is before it.
    run.card(policy.model, steps=total_steps)
    rule = terminal.rule(policy, muon, rate, other_rate)
    terminal.sft_heading(run, rule, total_steps, n, mean_length, len(held_out_chats), remark)
    if mixture:
        terminal.sft_parts(mixture.parts, mixture.epochs(total_steps * batch_tokens / mean_length))
    sizes.say_tokens(device, settings)
    terminal.short_run(total_steps, warmup, cooldown)
    if target:
        terminal.matched_flops(settings, target, total_steps)
    if dry_run:
        return say_plan(run, policy, rows_of(policy, chats, n, tokenizer), total_steps, muon)
    validate = validation(policy.model, tokenizer, mixture, held_out_chats, meter, run.log)
    if validate and not run.resumed:
        before = validate(0)
        run.log.row(0, **before, **meter.flops_so_far())
        terminal.sft_held_out_before(before)
    if not run.resumed:
        say_memory(policy, chats, n, tokenizer)
    run.begin()

    losses = []  # since the last line
    for step in range(run.first_step, total_steps):
        # Read: the next rows, and of them this rank's share.
        meter.start()
        batch = train.next()  # inputs, targets, mask, document: (rows, T) each
        last = step + 1 == total_steps
        if target and last:
            batch = batch.first(rows_that_are_left(target, meter, row_flops, rows))

        # Learn: loss = - sum of log p / N, over what the assistant says. N counts it on all ranks.
        N = max(1, int(dist.total(batch.mask.sum())))
        loss = 0.0
        for part in batch.split(device_tokens // seq_len, device):
            part_loss = learner.chat_loss(policy.model, *part) / N
            part_loss.backward()
            loss += part_loss.detach().double()  # on the device, which is not waited for
        dist.sum_gradients(policy.params)  # one all-reduce
        scale = lr_scale(step, total_steps, warmup, cooldown)
        norm = update(optimizers, policy.params, scale, max_grad_norm)  # clip, Muon and AdamW
        policy.merge()  # LoRA's adapters into the weights that everything multiplies by

        # Record: a row, now and then a line and a checkpoint.
        done = step + 1
        computed, needed = batch.work(dist.totals)
        meter.rows(computed, needed, trained=N)
        losses.append(dist.total(loss))
        row = {"loss": losses[-1], "grad_norm": norm, "bad_steps": run.count_bad_steps([norm])}
        row.update({"tokens": N, "packing": needed[0] / computed[0]})
        row["tok_per_s/learner"] = computed[0] / meter.seconds()
        if validate and (last or (eval_every and done % eval_every == 0)):
            row.update(validate(done))
        row.update(meter.end_of_step())
        run.log.row(done, **row)
        if last or done % log_every == 0 or terminal.in_words(row):
            terminal.sft_line(
                done, total_steps, row, losses, meter.seconds_left(total_steps - done)
            )
            losses = []
        run.end_of_step(done, last, partial(model_writer, policy.model, tokenizer), state)
    if target:
        spent = meter.total["train"]
        dist.say(f"      {spent:.4g} FLOPs, {spent / target.flops:.2%} of the RL run's")


def rates(policy, published):
    """-> (whether Muon trains the blocks' matrices, their rate, the rate of the rest)."""
    muon = optimizer == "muon"
    if optimizer == "auto":
        muon = not policy.adapters and not published
    if muon:
        return muon, matrix_lr or 0.01, other_lr or 0.4 / policy.model.config.n_embd
    rate = matrix_lr or (2e-4 if policy.adapters else 2e-5)
    return muon, rate, other_lr or rate


def read_data(tokenizer):
    """-> (conversations to train on, by index; conversations held out; a remark for the user)."""
    if is_weighted(data):
        parts = read_parts(data, task_args, tokenizer, seq_len, examples)
        if eval_problems and not any(part.val_task for part in parts.values()):
            raise ValueError(
                f"--eval_problems={eval_problems}: no part of --data is a task: leave it out"
            )
        mixture = Mixture(parts, seed)
        remark = f"a pass is {len(mixture):,} conversations, the weightiest part once:"
        return mixture, mixture.held_out(), remark
    if data:
        return read_conversations(data, tokenizer, seq_len, examples)
    source = get_task(task, split="train", **parse_settings(task_args))
    return Demonstrations(source, tokenizer, task), [], ""


# ---- validation ----------------------------------------------------------------------------------


def validation(net, tokenizer, mixture, held_out_chats, meter, log):
    """-> a function of the step that gives the val/ metrics, over all ranks, and writes the answers
    to disk; None: nothing validates."""
    pad = tokenizer.document_end
    if mixture:
        batches = {name: batch_of(part.held_out, pad) for name, part in mixture.parts.items()}
        engine = Engine(net) if eval_problems else None
        return partial(held_out_parts, net, engine, tokenizer, mixture.parts, batches, meter, log)
    if data:
        return partial(held_out_loss, net, batch_of(held_out_chats, pad), meter)
    if eval_problems:
        source = get_task(task, split="val", **parse_settings(task_args))
        return partial(held_out_task, Engine(net), tokenizer, source, meter, log)
    return None


def batch_of(examples, pad):
    """This rank's share of the rows that hold the examples."""
    packed = pack_rows(examples, seq_len + 1)[dist.rank() :: dist.world_size()]
    return collate(packed, seq_len, pad)


def held_out_loss(net, batch, meter, _step):
    """Nats a token that the assistant says, in the conversations that are held out."""
    nats, said = held_out_nats(net, batch, meter)
    return {"val/loss": nats / said}


@torch.no_grad()
def held_out_nats(net, batch, meter):
    """-> (nats, number) of the tokens that the assistant says, over all ranks."""
    nats = 0.0
    for part in batch.split(device_tokens // seq_len, net.cos.device):
        nats += learner.chat_loss(net, *part).double()
    said = int(dist.total(batch.mask.sum()))
    slots = int(dist.total(batch.mask.numel()))
    meter.forward_only(slots, slots * seq_len, said)
    return dist.total(nats), said


def held_out_parts(net, engine, tokenizer, parts, batches, meter, log, step):
    """The loss of every part, of all as the mixture weighs them, and its tasks' accuracies."""
    row = {"val/loss": 0.0}  # its sum comes last
    nats_of_a_turn, said_in_a_turn = 0.0, 0.0
    for name, part in parts.items():
        nats, said = held_out_nats(net, batches[name], meter)
        row[f"val/loss/{name}"] = nats / said
        share = part.weight / len(part.held_out)
        nats_of_a_turn += share * nats
        said_in_a_turn += share * said
    row["val/loss"] = nats_of_a_turn / said_in_a_turn

    if not engine:
        return row
    written = []
    for name, part in parts.items():
        if part.val_task:
            found, answers = held_out_answers(engine, tokenizer, part.val_task, meter)
            row.update({f"{metric}/{name}": value for metric, value in found.items()})
            named = [{**answer, "task": name} for answer in answers]
            written += records(named, "val", tokenizer, step)
    log.evaluation(step, written)
    return row


def held_out_task(engine, tokenizer, source, meter, log, step):
    """The accuracy on a task; its answers go to disk."""
    row, answers = held_out_answers(engine, tokenizer, source, meter)
    log.evaluation(step, records(answers, "val", tokenizer, step))
    return row


def held_out_answers(engine, tokenizer, source, meter):
    """Greedy accuracy on the first `eval_problems` problems of the task's val split.

    -> (metrics, outcomes, on the first rank).
    """
    engine.refresh()
    row, answers = held_out(engine, tokenizer, source, eval_problems, eval_new_tokens, dist)
    meter.evaluation(engine)
    return row, answers


# ---- as many FLOPs as an RL run ------------------------------------------------------------------


def flops_of_a_row(policy, train, target):
    """FLOPs of a row of seq_len tokens, from the next 20 steps' batches."""
    ahead = copy.copy(train)
    flops = 0
    for _ in range(20):
        batch = ahead.next()
        computed, _ = batch.work(dist.totals)
        trained = int(dist.total(batch.mask.sum()))
        shapes = *computed, trained, recompute, policy.adapters
        flops += sum(learning_flops(policy.model.config, *shapes).values())
    row_flops = flops / 20 / train.rows
    share = row_flops / target.flops
    if share > 0.02:  # the last step takes whole rows, so that half of one may be missing
        raise ValueError(
            f"--match_flops={match_flops}: a row of --seq_len={seq_len} is {share:.0%} of that "
            f"run's {target.flops:.3g} FLOPs, too much to match them within 1%: lower --seq_len, "
            "or compare with a longer run"
        )
    return row_flops


def rows_that_are_left(target, meter, row_flops, rows):
    """How many rows this rank takes in the last step, to make up what is left of the FLOPs."""
    left = round((target.flops - meter.total["train"]) / row_flops)
    left = min(rows, max(1, left))
    return len(range(dist.rank(), left, dist.world_size()))


# ---- before the first step -----------------------------------------------------------------------


def rows_of(policy, chats, n, tokenizer):
    """-> a function that gives the loss over so many rows of the first conversations."""
    packed = pack_rows([chats[i] for i in range(min(n, 8))], seq_len + 1)[:1]
    (row,) = collate(packed, seq_len, tokenizer.document_end).split(1, policy.device)

    def loss_of(rows):
        return learner.chat_loss(policy.model, *(part.expand(rows, -1) for part in row))

    return loss_of


def say_memory(policy, chats, n, tokenizer):
    """What the run will need at its peak."""
    tokens = min(device_tokens, batch_tokens / dist.world_size())
    loss_of = rows_of(policy, chats, n, tokenizer)
    forecast.say_memory_of_rows(policy, loss_of, seq_len, tokens)


def say_plan(run, policy, loss_of, total_steps, muon):
    """What a dry run says after the heading."""
    device, dtype = policy.device, policy.model.compute_dtype
    used = dist.used_memory(device)
    flop_rate, _ = device_rates(device, dtype)
    trial = try_step(policy.model, policy.trained, loss_of, run.settings, muon, flop_rate)
    parts = memory.estimate(policy.model, [], policy.params, used, trial.activations)
    saved = plan.saved_bytes(policy, muon)
    forecast.say_plan(run, trial, total_steps - run.first_step, (parts, used, device), saved)


def check_settings(settings):
    """Refuse what cannot work, with the value and the remedy."""
    at_least(
        settings,
        1,
        "batch_tokens seq_len log_every max_bad_steps eval_new_tokens",
    )
    at_least(
        settings,
        0,
        "seed examples steps device_tokens matrix_lr other_lr lora_rank lora_alpha warmup cooldown "
        "max_grad_norm eval_every eval_problems save_every",
    )
    one_of(settings, "optimizer", ("auto", "muon", "adamw"))
    if optimizer == "muon" and lora_rank:
        raise ValueError(f"--optimizer=muon --lora_rank={lora_rank}: with LoRA it must be adamw")
    if batch_tokens % seq_len:
        raise ValueError(f"batch_tokens = {batch_tokens} is not a multiple of seq_len = {seq_len}")


if __name__ == "__main__":
    dist.run(main)
