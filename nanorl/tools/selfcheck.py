"""`python train_rl.py --selfcheck` and your own settings: is what the trainer computes right?

It makes one step of the run and computes the step's gradient a second time, written out naively: in
fp64, a row at a time. `naive` shares nothing with what it checks but the weights and what was
sampled. Attention, mask, advantages and loss are written again, for reading and not for speed.
"""

import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from nanorl.runtime import dist

# ---- the model, one row at a time: T tokens, C channels, H heads of D channels ------------------


def normalise(x, weight, eps):
    """RMSNorm over the last dimension."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotary_angles(config, T):
    """-> cos and sin, (T, 1, D/2) each.

    The angles are in fp32, because the model's table is, whatever the precision of the rest.
    """
    pairs = torch.arange(0, config.head_dim, 2).float()
    frequency = 1 / config.rope_theta ** (pairs / config.head_dim)  # (D/2)
    if config.rope_scaling:
        # Llama 3.1: pairs that turn seldom within the old context turn `factor` times slower.
        factor, low, high, old_context = config.rope_scaling
        turns = (old_context * frequency / (2 * math.pi)).tolist()
        for i in range(len(turns)):
            keep = min(max((turns[i] - low) / (high - low), 0.0), 1.0)
            frequency[i] *= keep + (1 - keep) / factor
    angle = torch.arange(T).float()[:, None, None] * frequency  # (T, 1, D/2)
    return angle.cos().double(), angle.sin().double()


def rotate(x, cos, sin):
    """x: (T, heads, D). Pair i is the channels i and i + D/2."""
    half = x.size(-1) // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(w, config, at, h, cos, sin):
    """One layer's attention: w, weights by name; `at`, the layer's prefix; h: (T, C) -> (T, C)."""
    T, D = len(h), config.head_dim

    def project(n):
        projected = h @ w[f"{at}self_attn.{n}_proj.weight"].T
        bias = w.get(f"{at}self_attn.{n}_proj.bias", 0)
        return (projected + bias).view(T, -1, D)

    q, k, v = project("q"), project("k"), project("v")  # (T, H, D), then (T, K, D) twice
    if config.qk_norm:
        q = normalise(q, w[at + "self_attn.q_norm.weight"], config.norm_eps)
        k = normalise(k, w[at + "self_attn.k_norm.weight"], config.norm_eps)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)

    heads = []
    for head in range(config.n_head):
        kv_head = head * config.n_kv_head // config.n_head
        scores = q[:, head] @ k[:, kv_head].T / D**0.5  # (T, T)
        later = torch.ones_like(scores).triu(1).bool()
        attended = scores.masked_fill(later, -math.inf).softmax(-1)
        heads.append(attended @ v[:, kv_head])  # (T, D)
    return torch.cat(heads, -1) @ w[at + "self_attn.o_proj.weight"].T


def mlp(w, at, h):
    """One layer's SwiGLU, h: (T, C) -> (T, C)."""
    gate = F.silu(h @ w[at + "mlp.gate_proj.weight"].T)
    up = h @ w[at + "mlp.up_proj.weight"].T
    return (gate * up) @ w[at + "mlp.down_proj.weight"].T


def row_logprobs(w, config, ids, temperature):
    """w: weights by name. ids: (T,) -> log-prob of each id but the first, given those before it."""
    T, eps = len(ids), config.norm_eps
    cos, sin = (table.to(ids.device) for table in rotary_angles(config, T))
    x = w["model.embed_tokens.weight"][ids]  # (T, C)
    for layer in range(config.n_layer):
        at = f"model.layers.{layer}."
        h = normalise(x, w[at + "input_layernorm.weight"], eps)
        x = x + attention(w, config, at, h, cos, sin)
        h = normalise(x, w[at + "post_attention_layernorm.weight"], eps)
        x = x + mlp(w, at, h)
    x = normalise(x, w["model.norm.weight"], eps)

    # Rows beyond n_tokens pad the table to a round size, and are no tokens.
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])[: config.n_tokens]
    logits = x[:-1] @ head.T / temperature  # (T-1, n_tokens)
    return logits.log_softmax(-1)[range(T - 1), ids[1:]]


# ---- the objective, one group or completion at a time --------------------------------------------


def group_advantages(rewards, kind):
    """The rewards of one group, a list -> advantages, a list."""
    G = len(rewards)
    if max(rewards) == min(rewards):
        return [0.0] * G
    mean = sum(rewards) / G
    if kind == "mean":
        return [r - mean for r in rewards]
    if kind == "loo":  # against the mean of the others
        return [r - (sum(rewards) - r) / (G - 1) for r in rewards]
    variance = sum((r - mean) ** 2 for r in rewards) / (G - 1)
    return [(r - mean) / (math.sqrt(variance) + 1e-4) for r in rewards]


def row_loss(logprobs, old, ref, advantage, s):
    """One completion's part of the loss, before the division by the batch's denominator.

    logprobs, old and ref: (T,) each, of the model, the sampler and the reference. s: the settings.
    """
    log_ratio = logprobs - ref
    if s["kl_estimator"] == "k1-in-reward":
        # The penalty of this token and of all later ones.
        to_come = (old - ref).flip(0).cumsum(0).flip(0)
        advantage = advantage - s["kl_coef"] * to_come
        penalty = torch.zeros_like(log_ratio)
    elif s["kl_estimator"] == "k2":
        penalty = log_ratio**2 / 2
    else:
        penalty = (-log_ratio).exp() - 1 + log_ratio

    gain, weight = advantage * logprobs, 1.0
    if s["updates_per_rollout"] > 1:
        ratio = (logprobs - old).exp()
        clipped = ratio.clamp(1 - s["clip_low"], 1 + s["clip_high"])
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        weight = ratio.detach()

    loss = -(gain - s["kl_coef"] * weight * penalty).sum()
    if s["loss_norm"] == "sequence":
        return loss / len(logprobs)
    if s["loss_norm"] == "constant":
        return loss / s["max_new_tokens"]
    return loss


def denominator(completions, loss_norm):
    """What the sum over the completions in the loss is divided by: their tokens, or how many."""
    if loss_norm == "token":
        return max(1, sum(len(c.ids) for c in completions))
    return max(1, len(completions))


def weights_of(model):
    """Every weight in fp64, by name."""
    return {name: p.detach().double() for name, p in model.named_parameters()}


def naive(model, reference, rollouts, s):
    """One step's gradient. s: the settings. reference: gives a context of the reference, or None.

    -> the gradient by name; the log-probs of each completion, a list of (T,); the advantages of
    each group, a list of lists.
    """
    w, w_ref = weights_of(model), None
    if reference is not None:
        with reference() as reference_model:
            w_ref = weights_of(reference_model)
    for weight in w.values():
        weight.requires_grad_()

    groups, rows = [], []
    for r in rollouts:
        advantages = group_advantages([reward.total for reward in r.rewards], s["advantage"])
        groups.append(advantages)
        for completion, advantage in zip(r.completions, advantages):
            rows.append((r.prompt_ids, completion, advantage))
    # --overlong=mask leaves out what was cut off.
    in_loss = [c for _, c, _ in rows if c.finished or s["overlong"] == "zero"]
    N = denominator(in_loss, s["loss_norm"])

    found = []
    for prompt_ids, completion, advantage in tqdm(rows, "naive", disable=None, leave=False):
        ids = torch.tensor(prompt_ids + completion.ids, device=model.cos.device)
        # Entry i speaks of token i + 1, so the completion's first is at len(prompt_ids) - 1.
        sampled = slice(len(prompt_ids) - 1, None)
        logprobs = row_logprobs(w, model.config, ids, s["temperature"])[sampled]
        found.append(logprobs.detach())
        if not (completion.finished or s["overlong"] == "zero"):
            continue
        ref = logprobs.detach()
        if w_ref:
            with torch.no_grad():
                ref = row_logprobs(w_ref, model.config, ids, s["temperature"])[sampled]
        old = torch.tensor(completion.logprobs, dtype=torch.float64, device=ids.device)
        loss = row_loss(logprobs, old, ref, advantage, s) / N
        loss.backward()
    return {name: p.grad for name, p in w.items()}, found, groups


# ---- the comparison ------------------------------------------------------------------------------

# Largest differences that rounding explains: of a log-prob, and of the gradient over its norm.
BOUNDS = {torch.float64: (1e-9, 1e-10), torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.5, 0.2)}


def add_adapters(gradient, adapters):
    """Put the adapters' gradients beside their weights': W + scale B A, by the chain rule."""
    for name, projection in adapters.projections.items():
        g = adapters.scale * gradient[f"{name}.weight"]  # (out, in)
        gradient[f"{name}.lora_A.weight"] = projection.b.detach().double().T @ g
        gradient[f"{name}.lora_B.weight"] = g @ projection.a.detach().double().T


def compare_gradients(trained, exact):
    """trained: a module whose .grad is to be checked. exact: the gradient by name.

    -> difference / norm, cosine, norm, and the parameter in which most of the difference is. Of an
    exact gradient of 0, the difference itself.
    """
    difference, dot, ours_squared, exact_squared = {}, 0.0, 0.0, 0.0
    for name, p in trained.named_parameters():
        if exact[name] is None:
            continue
        ours = torch.zeros_like(exact[name]) if p.grad is None else p.grad.double()
        difference[name] = float((ours - exact[name]).norm())
        dot += float((ours * exact[name]).sum())
        ours_squared += float(ours.square().sum())
        exact_squared += float(exact[name].square().sum())
    off = math.sqrt(sum(d**2 for d in difference.values()))
    norms = math.sqrt(ours_squared) * math.sqrt(exact_squared)
    norm = math.sqrt(exact_squared)
    worst = max(difference, key=difference.get)
    return off / norm if norm else off, dot / norms if norms else 1.0, norm, worst


def largest_difference(ours, theirs):
    """Lists of lists -> the largest absolute difference of two entries."""
    pairs = [pair for a, b in zip(ours, theirs) for pair in zip(a, b)]
    return max(abs(a - b) for a, b in pairs)


def compare(policy, rollouts, advantages, s):
    """The step that the trainer has just made against the naive one -> (lines, within bounds).

    Compared are the model's .grad, the sampler's log-probs and `advantages`, a list for each group.
    """
    model, adapters = policy.model, policy.adapters
    exact, logprobs, groups = naive(model, policy.reference, rollouts, s)
    if adapters:
        add_adapters(exact, adapters)
    off, cosine, norm, worst = compare_gradients(adapters or model, exact)

    sampled = [c.logprobs for r in rollouts for c in r.completions]
    gaps = []
    for found, recorded in zip(logprobs, sampled):
        gaps.append((found.cpu() - torch.tensor(recorded, dtype=torch.float64)).abs())
    gap = torch.cat(gaps)
    wrong = largest_difference(advantages, groups)

    bound, gradient_bound = BOUNDS[model.compute_dtype]
    good = float(gap.max()) <= bound and wrong <= 1e-9 and off <= gradient_bound
    if not good:
        verdict = "OUT OF BOUNDS: the trainer does not compute what the settings say"
    elif norm:
        verdict = "within the bounds"
    else:
        verdict = (
            "no sample was better than another, so the gradient is 0 and its check shows nothing: "
            "more --prompts_per_step, or another --seed"
        )

    kl = f", KL {s['kl_coef']:g} ({s['kl_estimator']})" if s["kl_coef"] else ""
    size = f"{len(rollouts)} problems, {len(logprobs)} completions, {len(gap)} tokens"
    objective = f"advantage {s['advantage']}, loss_norm {s['loss_norm']}{kl}"
    against = f"{model.compute_dtype}, against a naive fp64 implementation"
    gap_max, gap_mean = float(gap.max()), float(gap.mean())
    without_signal = sum(not any(group) for group in groups)
    lines = [f"selfcheck: {size}; {objective}, {against}"]
    lines.append(
        f"  sampler's log-probs  largest difference {gap_max:.1e} (bound {bound:g}), "
        f"mean {gap_mean:.1e}"
    )
    lines.append(
        f"  advantages           largest difference {wrong:.1e} (bound 1e-09); "
        f"{without_signal} groups without signal"
    )
    lines.append(
        f"  gradient             difference / norm {off:.1e} (bound {gradient_bound:g}), "
        f"cosine {cosine:.9f}, norm {norm:.3e}; most of it in {worst}"
    )
    lines.append(f"  {verdict}")
    return lines, good


def report(policy, rollouts, advantages, s):
    """Compare all ranks' rollouts and advantages (P, G) and the summed gradient, on the first rank.

    Raises SystemExit(1), on every rank, when something is out of bounds.
    """
    rollouts, advantages, good = dist.gather(rollouts), dist.gather(advantages.tolist()), True
    if dist.is_main():
        lines, good = compare(policy, rollouts, advantages, s)
        print(*lines, sep="\n", flush=True)
    dist.wait_for_main()
    if not good:
        raise SystemExit(1)
