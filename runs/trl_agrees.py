"""Does nanorl compute what TRL's GRPOTrainer computes?

    pip install trl accelerate
    NANORL_DATA=... python runs/trl_agrees.py --model=<a Llama or Qwen directory>

TRL takes one step. Its own completions are then given to nanorl, and advantages, loss and gradient
are compared, for several settings of both. All is in fp32. The loss compared is PPO's clipped one,
whose value TRL reports. nanorl's default form, -A log pi, has another value and the same gradient,
which is compared too. A line of JSON a setting.

transformers does not train the embedding of the pad token as an input (nn.Embedding's padding_idx),
not even where that token ends every turn of the prompt, as in SmolLM2. nanorl has no pad token, and
trains all. `gradient_off` leaves that one row out, and `gradient_off_with_pad_row` does not.
"""

import os
import sys
import tempfile

import datasets
import torch
import transformers
import trl

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanorl import grpo
from nanorl.batch import pack
from nanorl.hf import load_model, local_model
from nanorl.learner import forward
from nanorl.rollout import Rollout, length_table
from nanorl.runtime.config import configure
from nanorl.runtime.log import to_json
from nanorl.sampling import Completion
from nanorl.tasks import get_task

model = ""  # a model directory or hub id with a chat template
prompts = 4  # GSM8K training problems
samples = 4  # of each
new_tokens = 48  # most tokens of a completion
# ours: advantage, loss_norm, temperature -> TRL's names for them
SETTINGS = {
    ("mean", "token", 1.0): dict(scale_rewards="none", loss_type="dapo"),
    ("zscore", "sequence", 1.0): dict(scale_rewards="group", loss_type="grpo"),
    ("mean", "constant", 0.8): dict(scale_rewards="none", loss_type="dr_grpo"),
}
EMBEDDING = "model.embed_tokens.weight"


def main():
    configure(globals())
    path = local_model(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    task = get_task("gsm8k", split="train")
    problems = [dict(prompt=task.problem(i).prompt) for i in range(prompts)]
    data = datasets.Dataset.from_list(problems)
    pad_row = transformers.AutoConfig.from_pretrained(path).pad_token_id
    for ours, theirs in SETTINGS.items():
        step = step_of_trl(path, tokenizer, data, ours, theirs)
        row = compare(path, tokenizer, pad_row, ours, step)
        print(to_json(row), flush=True)


def reward(text):
    """Something to compare samples by: the share of digits, coarsely, so that some are equal."""
    return round(sum(c.isdigit() for c in text) / max(len(text), 1), 1)


# ---- TRL's step ----------------------------------------------------------------------------------


class Watched(trl.GRPOTrainer):
    """Keeps what its loss is computed from, and the loss."""

    def compute_loss(self, net, inputs, *args, **kwargs):
        loss = super().compute_loss(net, inputs, *args, **kwargs)
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
        self.seen = {name: inputs[name].clone() for name in names}
        self.seen_loss = float(loss)
        return loss


class Gradients(transformers.TrainerCallback):
    """Keeps the gradient."""

    def on_pre_optimizer_step(self, *_args, **kwargs):
        self.seen = {name: p.grad.clone() for name, p in kwargs["model"].named_parameters()}


def step_of_trl(path, tokenizer, data, ours, theirs):
    """One step by TRL -> (inputs of its loss, its loss, its gradient)."""
    _, _, temperature = ours
    net = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    gradients = Gradients()
    with tempfile.TemporaryDirectory() as out:
        trainer = Watched(
            net,
            reward_funcs=lambda completions, **_: [reward(c[0]["content"]) for c in completions],
            args=trl_config(out, temperature, theirs),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[gradients],
        )
        trainer.train()
    return trainer.seen, trainer.seen_loss, gradients.seen


def trl_config(directory, temperature, theirs):
    """TRL's settings for one step, with some of SETTINGS."""
    return trl.GRPOConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=prompts * samples,
        num_generations=samples,
        max_completion_length=new_tokens,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        beta=0.0,
        num_iterations=1,
        learning_rate=1e-6,
        max_steps=1,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **theirs,
    )


# ---- the same by nanorl --------------------------------------------------------------------------


def compare(path, tokenizer, pad_row, ours, step):
    """What nanorl computes from the completions of TRL's step, and how far off it is."""
    advantage, loss_norm, temperature = ours
    inputs, their_loss, their_gradient = step
    rollouts, their_advantages = rollouts_of(inputs)
    rewards = rewards_of(rollouts, tokenizer)  # (P, G)
    advantages = grpo.advantages(rewards, advantage)  # (P, G)
    lengths = length_table(rollouts, samples)  # (P, G)
    token_weights = grpo.token_weights(lengths, loss_norm, new_tokens)  # (P, G)
    N = grpo.denominator(lengths, loss_norm)
    batches = pack(rollouts, advantages, token_weights, 16384, "cpu")

    row = dict(
        advantage=advantage,
        loss_norm=loss_norm,
        temperature=temperature,
        trl=trl.__version__,
        tokens=int(lengths.sum()),
    )
    net = load_model(path)
    # TRL gives a probability to the rows that only pad the embedding. So do we here.
    net.config.n_tokens = net.config.vocab_size
    for form in ("clipped", "reinforce"):
        loss = backward(net, batches, form, temperature, N)
        gradient = {name: p.grad for name, p in net.named_parameters()}
        row[form] = dict(loss=loss)
        row[form]["gradient_off_with_pad_row"] = off(gradient, their_gradient)
        expected = dict(their_gradient)
        if pad_row is not None:
            pad_gradient = gradient[EMBEDDING][[pad_row]]  # (1, C)
            index = torch.tensor([pad_row])
            expected[EMBEDDING] = expected[EMBEDDING].index_copy(0, index, pad_gradient)
        row[form]["gradient_off"] = off(gradient, expected)
        for p in net.parameters():
            p.grad = None
    row.update(
        loss_of_trl=their_loss,
        advantages_off=float((advantages - their_advantages).abs().max()),
        groups_without_signal=int(grpo.no_signal(rewards).sum()),
    )
    return row


def rollouts_of(inputs):
    """The inputs of TRL's loss -> Rollouts, and TRL's advantages (P, G), float64.

    TRL's rows are shuffled. So they are put together by their prompt.
    """
    prompt_ids = kept(inputs["prompt_ids"], inputs["prompt_mask"])
    completion_ids = kept(inputs["completion_ids"], inputs["completion_mask"])
    completions, advantages = {}, {}  # by prompt
    for prompt, ids, a in zip(prompt_ids, completion_ids, inputs["advantages"].tolist()):
        completion = Completion(ids, [0.0] * len(ids), True)
        completions.setdefault(tuple(prompt), []).append(completion)
        advantages.setdefault(tuple(prompt), []).append(a)

    rollouts = []
    for prompt, group in completions.items():
        rollouts.append(Rollout(None, list(prompt), group, None, None, None))
    return rollouts, torch.tensor(list(advantages.values()), dtype=torch.float64)


def kept(ids, mask):
    """Padded ids and their mask, (rows, T) each -> a list of ids a row."""
    rows = []
    for row, row_mask in zip(ids.tolist(), mask.tolist()):
        rows.append([token for token, keep in zip(row, row_mask) if keep])
    return rows


def rewards_of(rollouts, tokenizer):
    """(P, G), float64."""
    rewards = []
    for rollout in rollouts:
        texts = []
        for completion in rollout.completions:
            texts.append(tokenizer.decode(completion.ids, skip_special_tokens=True))
        rewards.append([reward(text) for text in texts])
    return torch.tensor(rewards, dtype=torch.float64)


def backward(net, batches, form, temperature, N):
    """The loss in one of its two forms; its gradient is left in the net."""
    loss = 0.0
    for batch in batches:
        logprobs = forward(net, batch, temperature).logprobs  # (S,)
        if form == "clipped":
            gain = grpo.clipped(logprobs, logprobs.detach(), batch.advantages)  # (S,)
        else:
            gain = grpo.reinforce(logprobs, batch.advantages)  # (S,)
        part = grpo.policy_loss(gain, batch.token_weights, N)
        part.backward()
        loss += float(part.detach())
    return loss


def off(found, expected):
    """How far a gradient is off, in terms of the expected one's norm. Both: {name: tensor}."""
    square = sum((found[name] - expected[name]).double().square().sum() for name in expected)
    whole = sum(expected[name].double().square().sum() for name in expected)
    return float((square / whole).sqrt())


if __name__ == "__main__":
    main()
