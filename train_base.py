"""Pretraining: text -> a tokenizer and a base model.

    python train_base.py --depth=4                                  # on a laptop, on text that the task makes
    python train_base.py --depth=4 --vocab_size=8192 --data='books/*.txt,web.jsonl.gz,more/*.parquet'
    torchrun --nproc_per_node=8 train_base.py --depth=20            # on a node

Plain text is taken apart at lines of <|endoftext|>, else at a blank line after every 8 KB; longer documents are cut at 64 KB.
One document in 50 validates. Text is tokenized once, in shards; a start after a kill goes on with the shard it was at.

Left out: learning-rate sweeps by size, fp8, sharded optimizers, document masking."""
import math
import os
import sys
import time
from collections import Counter

import numpy as np
import torch

from nanorl.corpus import Corpus
from nanorl.data import Windows, describe, read_index, tokenize
from nanorl.engine import Engine
from nanorl.gpt import GPT, GPTConfig
from nanorl.hf import load_model, save_model
from nanorl.optim import load_states, lr_scale, make_optimizers, update
from nanorl.runtime import checkpoint, dist
from nanorl.runtime.after import AfterSave
from nanorl.runtime.config import at_least, configure
from nanorl.runtime.log import RunLog, duration, flops_so_far
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
vocab_size = 512  # tokens of the BPE to train; for real text some 8192 or more
data = ""  # text to learn from: files and globs, with commas between; .jsonl, .parquet and .csv are rows, all else plain text
text_field = "text"  # where rows have their text
task = "sum3"  # without --data: whose built-in documents to learn from
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
sample_tokens = 64  # after a validation, how far to continue the first words of validation documents; 0: none
save_every = 500  # steps between checkpoints, from which a killed run goes on; 0: only at the end
after_save = ""  # a command to run after every save, in the background, such as 'rclone copy {dir} gdrive:runs/{run}' ({dir}: out/<run>)


class TaskText:
    """A task's own documents, as a source for tokenize(); every 50th validates."""

    def __init__(self):
        self.task = get_task(task, split="train", **parse_settings(task_args))
        if not hasattr(self.task, "document"):
            raise ValueError(f"task {task} has no document(): it cannot make text for pretraining; give it text with --data=")
        self.n = min(documents, len(self.task))
        self.made_from = dict(task=task, task_args=task_args, documents=documents)

    def survey(self):
        turns = [f"user\n{p.prompt[-1]['content']}assistant\n" for p in map(self.task.problem, range(min(self.n, 500)))]
        return [self.task.document(i) for i in range(min(self.n, 5000))] + turns, {"name": task, "notes": []}

    def documents(self, facts):
        for i in range(self.n):
            yield "val" if i % 50 == 49 else "train", self.task.document(i)


def main():
    settings = configure(globals())
    at_least(globals(), 1, "depth vocab_size documents batch_tokens seq_len device_tokens log_every eval_tokens max_bad_steps")
    at_least(globals(), 0, "seed steps matrix_lr other_lr warmup cooldown max_grad_norm eval_every sample_tokens save_every")
    rows = batch_tokens // seq_len
    if rows * seq_len != batch_tokens:
        raise ValueError(f"batch_tokens = {batch_tokens} is not a multiple of seq_len = {seq_len}")
    if sample_tokens > GPTConfig.context - 17:
        raise ValueError(f"--sample_tokens={sample_tokens}: at most {GPTConfig.context - 17} fit the context beside the prompt")
    place = dist.setup(device)
    weight_dtype, compute_dtype = dist.dtypes(dtype, place)
    directory = checkpoint.stage_directory(run or f"d{depth}", "base")
    settings["run"] = run or f"d{depth}"
    log, sent = RunLog(directory, dist.is_main()), AfterSave(after_save, os.path.dirname(directory), dist.is_main())
    point = checkpoint.resume_point(directory, resume, settings)

    # ---- text -> tokenizer and token files, once
    tokens = os.path.join(directory, "tokens")
    if dist.is_main() and not (point and read_index(tokens).get("whole")):  # a resumed run goes on with the text it began with
        tokenize(Corpus(data, text_field) if data else TaskText(), vocab_size, tokens)
    dist.barrier()
    tokenizer = Tokenizer.from_pretrained(tokens)
    if point and tokenizer.spec != Tokenizer.from_pretrained(point).spec:
        raise ValueError(f"the text of --data has changed: it gives another tokenizer than {point} has; put it back, or start another --run")
    dist.say(f"corpus  {describe(read_index(tokens))}")

    # ---- model and optimizer
    config = GPTConfig.from_depth(depth, tokenizer.n_tokens)
    total_steps = steps or math.ceil(20 * config.n_params()[0] / batch_tokens)
    if point:
        model = load_model(point, weight_dtype, place)
    else:
        model = GPT(config).init_weights(torch.Generator().manual_seed(seed)).to(weight_dtype).to(place)
    model.compute_dtype = compute_dtype
    params = list(model.parameters())
    optimizers = make_optimizers(model, matrix_lr, other_lr or 0.75 / config.n_embd)
    spread = dict(rank=dist.rank(), world_size=dist.world_size())
    train = Windows(tokens, "train", seq_len, rows, seed, **spread)
    val = Windows(tokens, "val", seq_len, 1)
    first_step, bad, flops = 0, 0, Counter()  # FLOPs: of training as they ran, the part that causal attention needs, of evaluation
    if point:
        state = checkpoint.load_state(point)
        first_step, bad, flops = state["step"], state["bad"], Counter(state["flops"])
        load_states(optimizers, state["optimizers"])
        train.load_state_dict(state["data"])
        dist.say(f"resumed {point}")
    log.cut(first_step if point else -1)  # rows and rollouts beyond the checkpoint, about to be made again
    log.card(stage="base", settings=settings, steps=total_steps, params=config.n_params()[0], tokens=train.n_tokens,
             world_size=dist.world_size(), dtype=str(compute_dtype), device=str(place))
    dist.say(f"base  {config.n_params()[0]:,} parameters, depth {depth}, vocabulary {tokenizer.n_tokens}, {compute_dtype} on {place}; "
             f"{total_steps} steps of {batch_tokens:,} tokens = {total_steps * rows / train.n:.1f} passes over {train.n_tokens:,} tokens")

    def loss_sum(inputs, targets):
        """Sum of the negative log-probs of a micro-batch, both (rows, T)."""
        h = model.hidden(inputs.to(place))  # (rows, T, C)
        return -model.logprobs(h.flatten(0, 1), targets.to(place).flatten())[0].sum()

    fast_loss_sum = torch.compile(loss_sum) if compile else loss_sum

    @torch.no_grad()
    def bits_per_byte():
        """Validation loss; every rank takes its share of the windows."""
        windows = max(1, min(val.n, eval_tokens // seq_len))
        inputs, targets = Windows(tokens, "val", seq_len, windows, **spread).next()
        flops["eval"] += config.flops(windows * seq_len, windows * seq_len ** 2, windows * seq_len)
        micro = max(1, device_tokens // seq_len)
        nats = sum(float(loss_sum(i, t)) for i, t in zip(inputs.split(micro), targets.split(micro)))
        return dist.total(nats) / dist.total(targets.numel()) / math.log(2) / val.bytes_per_token

    def show_samples(n):
        """Print how the model goes on from the first words of `n` validation documents."""
        ids = next(shard for shard in val.shards if shard is not None)[:2 ** 16]
        texts = np.split(ids, 1 + np.flatnonzero(ids == tokenizer.document_end))[:n]
        prompts = [[tokenizer.document_end] + text[:min(16, len(text) // 2)].tolist() for text in texts]  # a text starts after a boundary
        completions = Engine(model).generate(prompts, max_new_tokens=sample_tokens, temperature=0.8, stop_ids=tokenizer.stop_ids)
        for prompt, [said] in zip(prompts, completions):
            print(f"        {one_line(tokenizer.decode(prompt[1:]))} ▸{one_line(tokenizer.decode(said.ids))}", flush=True)

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
        flops.update(train=sum(config.learning_flops(batch_tokens, batch_tokens * seq_len, batch_tokens).values()),
                     causal=3 * config.flops(batch_tokens, batch_tokens * (seq_len + 1) // 2, batch_tokens))
        loss = dist.total(loss)
        row = {"loss": loss, "grad_norm": norm, "bad_steps": bad, "epoch": train.cursor / train.n, "tokens_total": (step + 1) * batch_tokens,
               "tok_per_s/learner": batch_tokens / (time.time() - begun)}
        last = step + 1 == total_steps
        validates = last or (eval_every and (step + 1) % eval_every == 0)
        if validates:
            row["val/bits_per_byte"] = bits_per_byte()
        row.update({**flops_so_far(flops), "time/step": time.time() - begun, "memory/peak_gb": dist.peak_memory(place) / 1e9})
        log.row(step + 1, **row)
        losses.append(loss)
        if validates or (step + 1) % log_every == 0:
            done = step + 1 - first_step
            eta = (time.time() - started) / done * (total_steps - step - 1)
            bits = f"  val {row['val/bits_per_byte']:.3f} bits/byte" if validates else ""
            dist.say(f"base  {step + 1:5d}/{total_steps}  loss {sum(losses) / len(losses):.3f}{bits}  grad {norm:.2f}  "
                     f"{row['tok_per_s/learner']:,.0f} tok/s  ETA {duration(eta)}")
            losses = []
        stop = dist.stop_requested()
        if last or stop or bad >= max_bad_steps or (save_every and (step + 1) % save_every == 0):
            if dist.is_main():
                state = dict(step=step + 1, bad=bad, flops=dict(flops), optimizers=[o.state_dict() for o in optimizers], data=train.state_dict(), settings=settings)
                print(checkpoint.save(directory, step + 1, lambda path: save_model(model, tokenizer, path), state), flush=True)
                sent()
            dist.barrier()
        if validates and sample_tokens and dist.is_main():
            show_samples(3 if last else 1)
        if stop or bad >= max_bad_steps:
            sent.finish()
        if bad >= max_bad_steps:
            raise ValueError(f"{bad} updates in a row were skipped because the gradient was not finite; the state is saved: "
                             f"start again with a lower --matrix_lr or --other_lr and another --run")
        if stop:
            raise SystemExit(0 if stop == 15 else 130)
    sent.finish()


def one_line(text):
    """For the terminal: line breaks as ⏎, what cannot be printed as ·"""
    text = "".join("⏎" if c == "\n" else c if c.isprintable() else "·" for c in text)
    return text.encode(sys.stdout.encoding or "utf-8", "replace").decode(sys.stdout.encoding or "utf-8")


if __name__ == "__main__":
    dist.run(main)
