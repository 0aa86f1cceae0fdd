"""Pretraining: text -> a tokenizer and a base model.

    python train_base.py --depth=4                                  # on a laptop
    torchrun --nproc_per_node=8 train_base.py --depth=20            # on a node

Left out: learning-rate sweeps by size, fp8, sharded optimizers, document masking."""
import math
import os
import time

import torch
from tqdm import tqdm

from nanorl.data import Windows, tokenize, tokenized_from
from nanorl.gpt import GPT, GPTConfig
from nanorl.hf import load_model, save_model
from nanorl.optim import load_states, lr_scale, make_optimizers, update
from nanorl.runtime import checkpoint, dist
from nanorl.runtime.config import at_least, configure
from nanorl.runtime.log import RunLog, duration
from nanorl.tasks import get_task, parse_settings
from nanorl.tokenizer import Tokenizer

# ---- run
run = ""  # folder under out/; empty: d<depth>
resume = "auto"  # auto: go on if the constants are the same; never; must
seed = 0  # fixes the initial weights and the order of the data
device = "auto"  # auto, cpu, cuda
dtype = "auto"  # activations: auto, fp32, bf16, fp64 (tests)
# ---- model and text
depth = 4  # layers; the width is 64 x depth
vocab_size = 512  # tokens of the BPE to train
task = "sum3"  # whose built-in documents to learn from
task_args = ""  # the task's settings, 'name=value; name=value'
documents = 20000  # how many of them, at most one a training problem
# ---- optimization
steps = 0  # optimizer steps; 0: 20 tokens per parameter
batch_tokens = 8192  # tokens of an optimizer step, over all ranks
seq_len = 256  # tokens of a row
device_tokens = 16384  # tokens of one forward on one device: lower it when memory runs out
compile = False  # torch.compile the forward: about 1.8 times faster after half a minute; needs a C++ compiler
matrix_lr = 0.02  # Muon, the blocks' matrices
other_lr = 0.0  # AdamW, embeddings, norms and head; 0: 0.75 / width (measured at depths 1 to 4 only)
warmup = 10  # steps of linear warm-up
cooldown = 0.4  # last share of the steps in which the rate falls to 0
max_grad_norm = 1.0  # 0: no clipping
max_bad_steps = 5  # stop after this many updates in a row were skipped for a gradient that is not finite
# ---- log
log_every = 20  # steps between lines
eval_every = 200  # steps between validations; 0: only at the end
eval_tokens = 65536  # validation tokens
save_every = 0  # steps between checkpoints; 0: only at the end


def document_stream(train_task, n):
    """(split, text) of the built-in corpus; every 50th document validates."""
    for i in tqdm(range(n), desc="documents", disable=None):
        yield "val" if i % 50 == 49 else "train", train_task.document(i)


def main():
    settings = configure(globals())
    at_least(globals(), 1, "depth vocab_size documents batch_tokens seq_len device_tokens log_every eval_tokens max_bad_steps")
    at_least(globals(), 0, "steps warmup eval_every save_every max_grad_norm")
    place = dist.setup(device)
    weight_dtype, compute_dtype = dist.dtypes(dtype, place)
    directory = checkpoint.stage_directory(run or f"d{depth}", "base")
    settings["run"] = run or f"d{depth}"
    log = RunLog(directory, dist.is_main())
    point = checkpoint.resume_point(directory, resume, settings)

    # ---- text -> tokenizer and token files, once
    made_from = dict(task=task, task_args=task_args, documents=documents, vocab_size=vocab_size)
    if dist.is_main() and tokenized_from(os.path.join(directory, "tokens")) != made_from:
        source = get_task(task, split="train", **parse_settings(task_args))
        if not hasattr(source, "document"):
            raise ValueError(f"task {task} has no document(): it cannot make text for pretraining")
        n = min(documents, len(source))
        sample = [source.document(i) for i in range(min(n, 5000))]
        turns = [f"user\n{p.prompt[-1]['content']}assistant\n" for p in map(source.problem, range(min(n, 500)))]
        os.makedirs(os.path.join(directory, "tokens"), exist_ok=True)
        tokenizer = Tokenizer.train(sample + turns, vocab_size)
        tokenizer.save(os.path.join(directory, "tokens"))
        tokenize(document_stream(source, n), tokenizer, os.path.join(directory, "tokens"), made_from)
    dist.barrier()
    tokenizer = Tokenizer.from_pretrained(os.path.join(directory, "tokens"))

    # ---- model and optimizer
    config = GPTConfig.from_depth(depth, tokenizer.n_tokens)
    total_steps = steps or math.ceil(20 * config.n_params()[0] / batch_tokens)
    rows = batch_tokens // seq_len
    if rows * seq_len != batch_tokens:
        raise ValueError(f"batch_tokens = {batch_tokens} is not a multiple of seq_len = {seq_len}")
    if point:
        model = load_model(point, weight_dtype, place)
    else:
        model = GPT(config).init_weights(torch.Generator().manual_seed(seed)).to(weight_dtype).to(place)
    model.compute_dtype = compute_dtype
    params = list(model.parameters())
    optimizers = make_optimizers(model, matrix_lr, other_lr or 0.75 / config.n_embd)
    spread = dict(rank=dist.rank(), world_size=dist.world_size())
    train = Windows(os.path.join(directory, "tokens"), "train", seq_len, rows, seed, **spread)
    first_step, bad = 0, 0
    if point:
        state = checkpoint.load_state(point)
        first_step, bad = state["step"], state["bad"]
        load_states(optimizers, state["optimizers"])
        train.load_state_dict(state["data"])
        dist.say(f"resumed {point}")
    log.cut(first_step if point else -1)  # rows and rollouts beyond the checkpoint, about to be made again
    log.card(stage="base", settings=settings, steps=total_steps, params=config.n_params()[0], tokens=len(train.tokens),
             world_size=dist.world_size(), dtype=str(compute_dtype), device=str(place))
    dist.say(f"base  {config.n_params()[0]:,} parameters, depth {depth}, vocabulary {tokenizer.n_tokens}, {compute_dtype} on {place}; "
             f"{total_steps} steps of {batch_tokens:,} tokens = {total_steps * rows / train.n:.1f} passes over {len(train.tokens):,}")

    def loss_sum(inputs, targets):
        """Sum of the negative log-probs of a micro-batch, both (rows, T)."""
        h = model.hidden(inputs.to(place))  # (rows, T, C)
        return -model.logprobs(h.flatten(0, 1), targets.to(place).flatten())[0].sum()

    fast_loss_sum = torch.compile(loss_sum) if compile else loss_sum

    @torch.no_grad()
    def bits_per_byte():
        """Validation loss; every rank takes its share of the windows."""
        n = len(Windows(os.path.join(directory, "tokens"), "val", seq_len, 1).tokens) // seq_len
        val = Windows(os.path.join(directory, "tokens"), "val", seq_len, max(1, min(n - 1, eval_tokens // seq_len)), 0, **spread)
        inputs, targets = val.next()
        micro = max(1, device_tokens // seq_len)
        nats = sum(float(loss_sum(i, t)) for i, t in zip(inputs.split(micro), targets.split(micro)))
        return dist.total(nats) / dist.total(targets.numel()) / math.log(2) / val.bytes_per_token

    # ---- the loop
    dist.catch_signals()
    started, losses = time.time(), []
    for step in range(first_step, total_steps):
        begun = time.time()
        inputs, targets = train.next()  # (rows of this rank, T)
        micro = max(1, device_tokens // seq_len)
        loss = 0.0
        for i, t in zip(inputs.split(micro), targets.split(micro)):
            part = fast_loss_sum(i, t) / batch_tokens  # batch_tokens is the whole step's count, over ranks
            part.backward()
            loss += float(part.detach())
        dist.sum_gradients(params)
        norm = update(optimizers, params, lr_scale(step, total_steps, warmup, cooldown), max_grad_norm)
        bad = 0 if math.isfinite(norm) else bad + 1
        loss = dist.total(loss)
        row = {"loss": loss, "grad_norm": norm, "bad_steps": bad, "epoch": train.cursor / train.n, "tokens_total": (step + 1) * batch_tokens,
               "tok_per_s/learner": batch_tokens / (time.time() - begun)}
        last = step + 1 == total_steps
        if last or (eval_every and (step + 1) % eval_every == 0):
            row["val/bits_per_byte"] = bits_per_byte()
        row.update({"time/step": time.time() - begun, "memory/peak_gb": dist.peak_memory(place) / 1e9})
        log.row(step + 1, **row)
        losses.append(loss)
        if last or (step + 1) % log_every == 0:
            done = step + 1 - first_step
            eta = (time.time() - started) / done * (total_steps - step - 1)
            val = f"  val {row['val/bits_per_byte']:.3f} bits/byte" if "val/bits_per_byte" in row else ""
            dist.say(f"base  {step + 1:5d}/{total_steps}  loss {sum(losses) / len(losses):.3f}{val}  grad {norm:.2f}  "
                     f"{row['tok_per_s/learner']:,.0f} tok/s  ETA {duration(eta)}")
            losses = []
        stop = dist.stop_requested()
        if last or stop or bad >= max_bad_steps or (save_every and (step + 1) % save_every == 0):
            if dist.is_main():
                state = dict(step=step + 1, bad=bad, optimizers=[o.state_dict() for o in optimizers], data=train.state_dict(), settings=settings)
                print(checkpoint.save(directory, step + 1, lambda path: save_model(model, tokenizer, path), state), flush=True)
            dist.barrier()
        if bad >= max_bad_steps:
            raise ValueError(f"{bad} updates in a row were skipped because the gradient was not finite; the state is saved: "
                             f"start again with a lower --matrix_lr or --other_lr and another --run")
        if stop:
            raise SystemExit(0 if stop == 15 else 130)


if __name__ == "__main__":
    dist.run(main)
