"""`python train_rl.py --selfcheck` and your own settings: one step's gradient against the same step written out naively, in fp64, a
row at a time. `naive` shares nothing with what it checks but the weights and what was sampled: attention, mask, advantage and loss
are written again, for reading, not for speed."""

import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from nanorl.runtime import dist

# ---- naive: 60 lines that may be compared with the papers ---------------------------------------------------


def row_logprobs(w, c, ids, temperature):
    """Weights by name, config, ids (T,) -> log-prob of each id but the first, given those before it, (T-1,)."""
    T, D = len(ids), c.head_dim
    norm = lambda x, name: x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[name]
    # The angles in fp32: the model's table is, whatever the precision of the rest.
    frequency = 1 / c.rope_theta ** (torch.arange(0, D, 2).float() / D)  # (D/2)
    if c.rope_scaling:
        factor, low, high, before = c.rope_scaling
        for i, turns in enumerate((before * frequency / (2 * math.pi)).tolist()):
            keep = min(max((turns - low) / (high - low), 0.0), 1.0)
            frequency[i] *= keep + (1 - keep) / factor
    angle = torch.arange(T).float()[:, None, None] * frequency  # (T, 1, D/2)
    cos, sin = angle.cos().double().to(ids.device), angle.sin().double().to(ids.device)

    def turn(x):
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["model.embed_tokens.weight"][ids]  # (T, C)
    for at in (f"model.layers.{i}." for i in range(c.n_layer)):
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            (
                h @ w[at + f"self_attn.{n}_proj.weight"].T
                + w.get(at + f"self_attn.{n}_proj.bias", 0)
            ).view(T, -1, D)
            for n in "qkv"
        )  # (T, H or K, D)
        if c.qk_norm:
            q, k = norm(q, at + "self_attn.q_norm.weight"), norm(k, at + "self_attn.k_norm.weight")
        q, k, heads = turn(q), turn(k), []
        for head in range(c.n_head):
            scores = q[:, head] @ k[:, head * c.n_kv_head // c.n_head].T / D**0.5  # (T, T)
            later = torch.ones_like(scores).triu(1).bool()
            heads.append(
                scores.masked_fill(later, -math.inf).softmax(-1)
                @ v[:, head * c.n_kv_head // c.n_head]
            )
        x = x + torch.cat(heads, -1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        x = (
            x
            + (F.silu(h @ w[at + "mlp.gate_proj.weight"].T) * (h @ w[at + "mlp.up_proj.weight"].T))
            @ w[at + "mlp.down_proj.weight"].T
        )
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])[: c.n_tokens]
    return (norm(x, "model.norm.weight")[:-1] @ head.T / temperature).log_softmax(-1)[
        range(T - 1), ids[1:]
    ]


def group_advantages(r, kind):
    """The rewards of one group, a list -> advantages, a list."""
    G, mean = len(r), sum(r) / len(r)
    if max(r) == min(r):
        return [0.0] * G
    std = math.sqrt(sum((x - mean) ** 2 for x in r) / (G - 1))
    return [
        {"mean": x - mean, "loo": x - (sum(r) - x) / (G - 1), "zscore": (x - mean) / (std + 1e-4)}[
            kind
        ]
        for x in r
    ]


def row_loss(l, old, ref, a, s):
    """One completion's part of the loss, times the denominator: its log-probs l, the sampler's old, the reference's ref, (T,) each."""
    d, rho = l - ref, (l - old).exp()
    if s["kl_estimator"] == "k1-in-reward":
        a = a - s["kl_coef"] * (old - ref).flip(0).cumsum(0).flip(
            0
        )  # of this token and all later ones
    gain, weight = a * l, 1.0
    if s["updates_per_rollout"] > 1:
        gain, weight = (
            torch.minimum(rho * a, rho.clamp(1 - s["clip_low"], 1 + s["clip_high"]) * a),
            rho.detach(),
        )
    penalty = {"k1-in-reward": 0 * d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[s["kl_estimator"]]
    loss = -(gain - s["kl_coef"] * weight * penalty).sum()
    return (
        loss
        * {"token": 1.0, "sequence": 1 / len(l), "constant": 1 / s["max_new_tokens"]}[
            s["loss_norm"]
        ]
    )


# ---- the comparison -----------------------------------------------------------------------------------------


def naive(model, reference, rollouts, s):
    """reference: a context that gives the reference model, or None. The step's rollouts and settings -> (gradient by name, log-probs of each completion, advantages of each group)."""
    weights = lambda m: {name: p.detach().double() for name, p in m.named_parameters()}
    w, w_ref = weights(model), None
    if reference is not None:
        with reference() as base:
            w_ref = weights(base)
    w = {name: p.requires_grad_() for name, p in w.items()}
    rows = [(r.prompt_ids, c) for r in rollouts for c in r.completions]
    in_loss = [c.finished or s["overlong"] == "zero" for _, c in rows]
    N = max(
        1,
        sum(
            (len(c.ids) if s["loss_norm"] == "token" else 1)
            for (_, c), is_in in zip(rows, in_loss)
            if is_in
        ),
    )
    groups = [group_advantages([x.total for x in r.rewards], s["advantage"]) for r in rollouts]
    found = []
    for (prompt, c), a, is_in in tqdm(
        list(zip(rows, sum(groups, []), in_loss)), desc="naive", disable=None, leave=False
    ):
        ids = torch.tensor(prompt + c.ids, device=model.cos.device)
        l = row_logprobs(w, model.config, ids, s["temperature"])[
            len(prompt) - 1 :
        ]  # one a sampled token, as ref
        with torch.no_grad():
            ref = (
                row_logprobs(w_ref, model.config, ids, s["temperature"])[len(prompt) - 1 :]
                if w_ref
                else l.detach()
            )
        found.append(l.detach())
        if is_in:
            (
                row_loss(
                    l, torch.tensor(c.logprobs, dtype=torch.float64, device=ids.device), ref, a, s
                )
                / N
            ).backward()
    return {name: p.grad for name, p in w.items()}, found, groups


# Largest difference of a log-prob, and of the gradient relative to its norm, that rounding explains.
BOUNDS = {torch.float64: (1e-9, 1e-10), torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.5, 0.2)}


def compare(policy, rollouts, advantages, s):
    """Differences of the step that the trainer has just made (model's .grad, rollouts, advantages) from the naive one -> (lines, within bounds)."""
    model, adapters = policy.model, policy.adapters
    exact, logprobs, groups = naive(model, policy.reference, rollouts, s)
    for name, (_, _, a, b) in (
        adapters.projections.items() if adapters else ()
    ):  # W + scale B A: the chain rule
        g = adapters.scale * exact[f"{name}.weight"]
        exact[f"{name}.lora_A.weight"], exact[f"{name}.lora_B.weight"] = (
            b.detach().double().T @ g,
            g @ a.detach().double().T,
        )
    ours = {
        name: torch.zeros_like(exact[name]) if p.grad is None else p.grad.double()
        for name, p in (adapters or model).named_parameters()
        if exact[name] is not None
    }
    gap = torch.cat(
        [
            l.cpu() - torch.tensor(c.logprobs, dtype=torch.float64)
            for l, c in zip(logprobs, (c for r in rollouts for c in r.completions))
        ]
    ).abs()
    wrong = max(
        abs(a - b) for ours_, theirs in zip(advantages, groups) for a, b in zip(ours_, theirs)
    )
    flat = lambda grads: torch.cat([grads[name].flatten() for name in ours])
    g, e = flat(ours), flat(exact)
    off = float((g - e).norm() / e.norm()) if e.norm() else float(g.norm())
    cosine = float(g @ e / g.norm() / e.norm()) if e.norm() and g.norm() else 1.0
    worst = max(ours, key=lambda name: float((ours[name] - exact[name]).norm()))
    bound, bound_g = BOUNDS[model.compute_dtype]
    kl = f", KL {s['kl_coef']:g} ({s['kl_estimator']})" if s["kl_coef"] else ""
    ok = float(gap.max()) <= bound and wrong <= 1e-9 and off <= bound_g
    verdict = (
        "within the bounds"
        if ok
        else "OUT OF BOUNDS: the trainer does not compute what the settings say"
    )
    if ok and not e.norm():
        verdict = "no sample was better than another, so the gradient is 0 and its check shows nothing: more --prompts_per_step, or another --seed"
    return [
        f"selfcheck: {len(rollouts)} problems, {len(logprobs)} completions, {len(gap)} tokens; advantage {s['advantage']}, loss_norm {s['loss_norm']}{kl}, "
        f"{model.compute_dtype}, against a naive fp64 implementation",
        f"  sampler's log-probs  largest difference {float(gap.max()):.1e} (bound {bound:g}), mean {float(gap.mean()):.1e}",
        f"  advantages           largest difference {wrong:.1e} (bound 1e-09); {sum(not any(group) for group in groups)} groups without signal",
        f"  gradient             difference / norm {off:.1e} (bound {bound_g:g}), cosine {cosine:.9f}, norm {float(e.norm()):.3e}; most of it in {worst}",
        "  " + verdict,
    ], ok


def report(policy, rollouts, advantages, s):
    """On the first rank, compare all ranks' rollouts and advantages (P, G) and the summed gradient; exit status 1 when something is out of bounds."""
    rollouts, advantages, good = dist.gather(rollouts), dist.gather(advantages.tolist()), True
    if dist.is_main():
        lines, good = compare(policy, rollouts, advantages, s)
        print(*lines, sep="\n", flush=True)
    dist.barrier()
    if not good:
        raise SystemExit(1)
