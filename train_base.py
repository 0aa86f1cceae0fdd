"""Pretraining: text -> a tokenizer and a base model.

    python train_base.py --depth=4                              # on text that the task makes
    python train_base.py --vocab_size=8192 --data='books/*.txt,web.jsonl.gz,more/*.parquet'
    python train_base.py --vocab_size=8192 --data=hf:HuggingFaceFW/fineweb-edu:sample-10BT
    torchrun --nproc_per_node=8 train_base.py --depth=20 --batch_tokens=524288      # on a node

Plain text is taken apart at lines of <|endoftext|>, else at a blank line after every 8 KB; longer
documents are cut at 64 KB. One document in 50 validates. A data set by name is streamed as far as
the run goes, and one in 50 of its first 100 MB validates. Text is tokenized once, in shards; a
start after a kill goes on with the shard it was at.

Left out: learning-rate sweeps by size, fp8, sharded optimizer states, document masking.
"""

import math
import os
from functools import partial

import numpy as np
import torch

from nanorl import compilers, learner
from nanorl.data.corpus import Corpus
from nanorl.data.preview import preview
from nanorl.data.stream import Stream, is_stream
from nanorl.data.task_text import TaskText
from nanorl.data.tokens import (
    Windows,
    check_same_content,
    content_of_shards,
    describe,
    read_index,
    tokenize,
)
from nanorl.engine import Engine
from nanorl.gpt import GPT, GPTConfig
from nanorl.hf import load_model, model_writer
from nanorl.optim import load_states, lr_scale, make_optimizers, update
from nanorl.report import forecast, memory, plan, sizes, terminal
from nanorl.report.cost import Meter
from nanorl.report.rates import device_rates
from nanorl.report.trial import layers_to_try, try_step
from nanorl.runtime import dist
from nanorl.runtime.config import at_least, configure
from nanorl.runtime.run import Run
from nanorl.tasks import get_task, parse_settings
from nanorl.tokenizer import Tokenizer

# ---- run
run_name = ""  # folder under out/; empty: d<depth>
resume = "auto"  # auto: go on if the constants are the same; never; must
seed = 0  # fixes the initial weights and the order of the data
device = "auto"  # auto, cpu, cuda
dtype = "auto"  # activations: auto, fp32 (TF32 on a GPU), bf16, fp64 (tests)
dry_run = False  # print what the run would do, and stop
note = ""  # what this run is to show; it stands in run.json and on the run's page
timestamps = False  # every line begins with the time
# ---- model and text
depth = 4  # layers; the width is 64 x depth
vocab_size = 512  # tokens of the BPE to train; for real text some 8192 or more
data = ""  # text: files and globs, or hf:<name>:<config>:<split> of data sets; commas between
text_field = "text"  # where rows have their text
data_tokens = 0  # tokens to make of --data; 0: all of files, of hf: as many as the steps take
task = "sum3"  # without --data: whose built-in documents to learn from
task_args = ""  # the task's settings, 'name=value; name=value'
documents = 20000  # how many of them, at most one a training problem
# ---- optimization
steps = 0  # optimizer steps; 0: 20 tokens per parameter
batch_tokens = 8192  # tokens of an optimizer step, over all ranks
seq_len = 256  # tokens of a row
device_tokens = 0  # tokens of one forward; 0: what fits a third of a GPU's memory, on a CPU 16384
compile = False  # torch.compile: 1.8 times as fast after half a minute; needs a C++ compiler
matrix_lr = 0.02  # Muon, the blocks' matrices
other_lr = 0.0  # AdamW, embeddings, norms and head; 0: 0.75 / width
warmup = 10  # steps of linear warm-up
cooldown = 0.4  # last share of the steps in which the rate falls to 0
max_grad_norm = 1.0  # 0: no clipping
max_bad_steps = 5  # stop after so many steps in a row whose gradient is not finite
# ---- log
log_every = 20  # steps between lines
eval_every = 200  # steps between validations; 0: only at the end
eval_tokens = 65536  # validation tokens
sample_tokens = 64  # how far to continue the first words of a text, after a validation; 0: none
save_every = 500  # steps between checkpoints, from which a killed run goes on; 0: only at the end
after_save = ""  # a command after every save, such as 'rclone copy {dir} gdrive:runs/{run}'
track = ""  # send the numbers to wandb, tensorboard, trackio; commas between

# A sample continues so many tokens of a validation document, or its first half.
PROMPT_TOKENS = 16


def main():
    global device_tokens  # found where it is 0
    settings = configure(globals())
    check_settings(settings)
    device = dist.setup(settings["device"])
    if compile:
        compilers.check_compiler(device)
    run = Run(settings, "base", writes=not dry_run)
    weight_dtype, compute_dtype = run.dtypes(device)
    directory = os.path.join(run.directory, "tokens")
    if dry_run:
        return say_plan(run, settings, directory, device, compute_dtype)

    # Text -> tokenizer and token files, once.
    tokenizer = prepare(run, directory)
    rows, ranks = batch_tokens // seq_len, (dist.rank(), dist.world_size())
    content = content_of_shards(read_index(directory))
    train = Windows(directory, "train", seq_len, rows, seed, ranks)
    val = validation_windows(directory)

    # A new model, or that of the last checkpoint.
    if run.resumed:
        net = load_model(run.model, weight_dtype, device)
    else:
        net = new_model(tokenizer.n_tokens).to(weight_dtype).to(device)
    net.compute_dtype = compute_dtype
    params, config = list(net.parameters()), net.config
    total_steps = horizon(config)
    rates = matrix_lr, other_lr or 0.75 / config.n_embd
    optimizers = make_optimizers(net, *rates, ranks=dist)
    flop_rate, _ = device_rates(device, compute_dtype)
    device_tokens = memory.device_tokens(net, memory.bytes_of(params), settings)
    meter = Meter(net, None, run.state["flops"], flop_rate)
    if run.resumed:
        load_states(optimizers, run.state["optimizers"])
        train.load_state_dict(run.state["data"])
        check_same_content(run.state, content)

    def loss_of(inputs, targets):
        return learner.text_loss(net, inputs.to(device), targets.to(device))

    def state():
        """What only this script knows of the run and needs to go on from here."""
        return dict(
            flops=dict(meter.total),
            optimizers=[optimizer.state_dict() for optimizer in optimizers],
            data=train.state_dict(),
            content=content,
        )

    # What this run will do.
    run.card(net, steps=total_steps, tokens=train.n_tokens, flop_rate=flop_rate)
    passes = total_steps * rows / train.n
    work = tokenizer.n_tokens, total_steps, batch_tokens, passes, train.n_tokens
    terminal.base_heading(net, *work)
    sizes.say_tokens(device, settings)
    terminal.short_run(total_steps, warmup, cooldown)
    fast_loss_of = torch.compile(loss_of) if compile else loss_of
    run.begin()

    losses = []  # since the last line
    for step in range(run.first_step, total_steps):
        # Read: the next windows of the token files, and of them this rank's share.
        meter.start()
        inputs, targets = (part.to(device) for part in train.next())  # (rows, T) each

        # Learn: loss = - mean of log p of the next token, over the step's tokens on all ranks.
        loss = 0.0
        for some_inputs, some_targets in micro_batches(inputs, targets):
            part = fast_loss_of(some_inputs, some_targets) / batch_tokens
            part.backward()
            loss += part.detach().double()  # on the device, which is not waited for
        dist.sum_gradients(params)  # one all-reduce
        scale = lr_scale(step, total_steps, warmup, cooldown)
        norm = update(optimizers, params, scale, max_grad_norm)  # clip, Muon and AdamW

        # Record: a row, now and then a line, samples and a checkpoint.
        done = step + 1
        last = done == total_steps
        pairs, needed = batch_tokens * seq_len, batch_tokens * (seq_len + 1) // 2
        meter.rows((batch_tokens, pairs), (batch_tokens, needed), trained=batch_tokens)
        losses.append(dist.total(loss))
        row = {"loss": losses[-1], "grad_norm": norm, "bad_steps": run.count_bad_steps([norm])}
        row.update({"epoch": train.cursor / train.n, "tokens_total": done * batch_tokens})
        row.update({"tok_per_s/learner": batch_tokens / meter.seconds(), "mfu": meter.mfu()})
        validates = last or bool(eval_every and done % eval_every == 0)
        if validates:
            row["val/bits_per_byte"] = bits_per_byte(val, loss_of, meter)
        row.update(meter.end_of_step())
        run.log.row(done, **row)
        if validates or done % log_every == 0:
            terminal.base_line(
                done, total_steps, row, losses, meter.seconds_left(total_steps - done)
            )
            losses = []
        if validates and sample_tokens and dist.is_main():
            show_samples(net, tokenizer, val, 3 if last else 1)
        run.end_of_step(done, last, partial(model_writer, net, tokenizer), state)


def prepare(run, directory):
    """Make the token files, if they are not there -> the tokenizer."""
    # A resumed run goes on with the text that it began with.
    goes_on = run.resumed and read_index(directory).get("whole")
    if dist.is_main() and not goes_on:
        source = text_source()
        enough = tokens_wanted(source)
        tokenize(source, vocab_size, directory, enough)
    dist.wait_for_main()  # for hours, where there is much text
    tokenizer = Tokenizer.from_pretrained(directory)
    if run.resumed and tokenizer.spec != Tokenizer.from_pretrained(run.resumed).spec:
        raise ValueError(
            f"the text of --data has changed: it gives another tokenizer than {run.resumed} has; "
            "put it back, or start another --run_name"
        )
    dist.say(f"corpus  {describe(read_index(directory))}")
    return tokenizer


def text_source():
    """Whose documents to learn from: the files or data sets of --data, or the task."""
    if is_stream(data):
        return Stream(data, text_field)
    if data:
        return Corpus(data, text_field)
    source = get_task(task, split="train", **parse_settings(task_args))
    made_from = dict(task=task, task_args=task_args, documents=documents)
    return TaskText(source, task, documents, made_from)


def tokens_wanted(source):
    """How many training tokens to make of the text; 0: all."""
    if data_tokens or not isinstance(source, Stream):
        return data_tokens
    # A data set may have no end, so it is read as far as the run goes. The tokenizer, which is not
    # there yet, has at most vocab_size tokens.
    wanted = horizon(GPTConfig.from_depth(depth, vocab_size)) * batch_tokens
    dist.say(f"corpus  {data}: reading until the run's {wanted:,} tokens are made, in shards")
    return wanted


def horizon(config):
    """Optimizer steps of the run."""
    return steps or plan.base_steps(config, batch_tokens)


def new_model(n_tokens, **overrides):
    config = GPTConfig.from_depth(depth, n_tokens, **overrides)
    return GPT(config).init_weights(torch.Generator().manual_seed(seed))


def micro_batches(inputs, targets):
    """Rows that fit one forward at a time."""
    rows_at_once = max(1, device_tokens // seq_len)
    return zip(inputs.split(rows_at_once), targets.split(rows_at_once))


def validation_windows(directory):
    """Up to eval_tokens of the val split, shared over ranks."""
    n = Windows(directory, "val", seq_len, 1).n
    windows = max(1, min(n, eval_tokens // seq_len))
    ranks = dist.rank(), dist.world_size()
    return Windows(directory, "val", seq_len, windows, 0, ranks)


@torch.no_grad()
def bits_per_byte(val, loss_of, meter):
    """Validation loss, on the same windows every time; every rank takes its share of them."""
    val.cursor = 0
    inputs, targets = val.next()
    nats = sum(loss_of(*some).double() for some in micro_batches(inputs, targets))
    tokens = val.rows * seq_len
    meter.forward_only(tokens, tokens * seq_len, tokens)
    nats_a_token = dist.total(nats) / dist.total(targets.numel())
    return nats_a_token / math.log(2) / val.bytes_per_token


def show_samples(net, tokenizer, val, n):
    """Print how the model goes on from the first words of n validation documents."""
    ids = next(shard for shard in val.shards if shard is not None)[: 2**16]
    ends = 1 + np.flatnonzero(ids == tokenizer.document_end)
    prompts = []
    for text in np.split(ids, ends)[:n]:
        words = text[: min(PROMPT_TOKENS, len(text) // 2)].tolist()
        prompts.append([tokenizer.document_end, *words])  # a text starts after a boundary
    completions = Engine(net).generate(
        prompts, max_new_tokens=sample_tokens, temperature=0.8, stop_ids=tokenizer.stop_ids
    )
    for prompt, [said] in zip(prompts, completions):
        before = terminal.one_line(tokenizer.decode(prompt[1:]))
        after = terminal.one_line(tokenizer.decode(said.ids))
        print(f"        {before} ▸{after}", flush=True)


# ---- before the first step -----------------------------------------------------------------------


def say_plan(run, settings, directory, device, compute_dtype):
    """Say what the run would do, from its beginning: of the text in memory, and of a few layers."""
    # The text. From a data set as many tokens are made as the run takes.
    source = text_source()
    seen = preview(source, vocab_size, directory) if dist.is_main() else None
    dist.wait_for_main()
    seen = dist.broadcast(seen)
    dist.say(f"corpus  {seen.in_words()}")
    config = GPTConfig.from_depth(depth, seen.vocabulary)
    total_steps = horizon(config)
    tokens = total_steps * batch_tokens
    enough = data_tokens or (tokens if isinstance(source, Stream) else 0)
    n_train, n_val = seen.made(enough)
    check_enough(n_train)

    # The model, with few of its layers.
    weight_dtype, _ = dist.dtypes(run.dtype, device)
    used = dist.used_memory(device)
    net = new_model(seen.vocabulary, n_layer=max(layers_to_try(depth)))
    net = net.to(weight_dtype).to(device)
    net.config, net.compute_dtype = config, compute_dtype
    passes = tokens / n_train if n_train else None
    run.card(net)  # it is not written: it says where a run goes on
    terminal.base_heading(net, seen.vocabulary, total_steps, batch_tokens, passes, n_train)
    sizes.say_tokens(device, settings)
    terminal.short_run(total_steps, warmup, cooldown)

    def loss_of(n):
        ids = torch.zeros(n, seq_len, dtype=torch.long, device=device)
        return learner.text_loss(net, ids, ids)

    flop_rate, _ = device_rates(device, compute_dtype)
    memory.device_tokens(net, weight_dtype.itemsize * config.n_params()[0], settings)
    trial = try_step(net, net, loss_of, settings, muon=True, flop_rate=flop_rate)

    # What it holds, in memory and on disk.
    itemsize, ranks = weight_dtype.itemsize, dist.world_size()
    parts = plan.training_bytes(config, True, ranks, trial.activations, itemsize)
    parts["program"] = used
    saved = plan.checkpoint_bytes(config, True, itemsize)
    written = plan.token_file_bytes(n_train + n_val, seen.vocabulary) if n_train else 0
    to_come = total_steps - run.first_step
    forecast.say_plan(run, trial, to_come, (parts, used, device), saved, written)


def check_enough(n_train):
    """Raise ValueError where the text is too short for a step. n_train: its tokens, or None."""
    windows = max(0, n_train - 1) // seq_len if n_train is not None else math.inf
    if windows < batch_tokens // seq_len:
        raise ValueError(
            f"the train split has {windows} windows of {seq_len} tokens, fewer than "
            f"the {batch_tokens // seq_len} of one batch: lower --batch_tokens or --seq_len, or "
            "give more text"
        )


def check_settings(settings):
    """Refuse what cannot work, with the value and the remedy."""
    at_least(
        settings,
        1,
        "depth vocab_size documents batch_tokens seq_len log_every eval_tokens max_bad_steps",
    )
    at_least(
        settings,
        0,
        "seed data_tokens steps device_tokens matrix_lr other_lr warmup cooldown max_grad_norm "
        "eval_every sample_tokens save_every",
    )
    if batch_tokens % seq_len:
        raise ValueError(f"batch_tokens = {batch_tokens} is not a multiple of seq_len = {seq_len}")
    most = GPTConfig.context - PROMPT_TOKENS - 1
    if sample_tokens > most:
        raise ValueError(
            f"--sample_tokens={sample_tokens}: at most {most} fit the context beside the prompt"
        )


if __name__ == "__main__":
    dist.run(main)
