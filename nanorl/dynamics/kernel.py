"""What learning one completion does to another: the Fisher kernel between completions.

    K(t, t') = sum over alpha of  M_alpha  d log pi(t) / d theta_alpha  d log pi(t') / d theta_alpha

with M = 1, or the optimizer's diagonal preconditioner at this step, which has the rate in it. The
part of the update that the step's own gradient makes is then, to first order,

    v = sum_t' a(t') M grad log pi(t')             a(t') = c weight(t') A(t') / N
    delta log pi(t) = grad log pi(t) . v = sum_t' K(t, t') a(t')

with c the clipping's factor. Older gradients act through the momentum, apart from this.

The entropy's gradient is E_t h(t) grad log pi(t), with h(t) = b - log pi(t) for any b that does not
depend on t. So what this gradient does to the entropy is a sum over pairs,

    delta H = E_t sum_t' h(t) K(t, t') a(t')

in parts: a completion acts on itself (t = t'), on others of its own prompt, on those of other
prompts. Where t runs over the very batch that is learnt from, the mean over all pairs (a
V-statistic) is biased: of the completions that there are, t' itself is a share of 1 / B in it, and
a far smaller one in truth. The mean over pairs of different groups alone (a U-statistic) is
unbiased for prompts that are not in the batch. Whole groups are left out, because A(t') is made
from all rewards of its group.
"""

import torch
from torch.func import grad, vmap

from nanorl.dynamics.measured import Sequences

ROWS = 16  # completions whose gradients are taken at once
NUMBERS = 2**27  # numbers of gradients that are kept at a time


def scores(measured, sequences, names, rows=ROWS):
    """grad log pi(t) by the parameters `names`, exactly, for each completion -> (B, their n)."""
    part = {name: measured.theta[name] for name in names}
    rest = {name: p for name, p in measured.theta.items() if name not in part}

    def logprob(part, *row):
        """log pi(t) of one completion, whose Sequences have no batch dimension here."""
        one = Sequences(*(x[None] for x in row))
        logprobs, _ = measured.tokens({**rest, **part}, one)
        return logprobs.sum()

    # The parameters are the same for all rows: none is copied B times.
    of_each = vmap(grad(logprob), in_dims=(None, 0, 0, 0, 0, 0))
    found = []
    for some in sequences.parts(rows):
        fields = some.ids, some.predicted_at, some.targets, some.sampled, some.group
        grads = of_each(part, *fields)  # {name: (rows, *shape)}
        found.append(torch.cat([x.flatten(1) for x in grads.values()], dim=1))
    return torch.cat(found)


def blocks_of_names(theta, most):
    """The names of theta in lists of at most `most` numbers, or of one name."""
    blocks, numbers = [], 0
    for name, p in theta.items():
        if not blocks or numbers + p.numel() > most:
            blocks.append([])
            numbers = 0
        blocks[-1].append(name)
        numbers += p.numel()
    return blocks


def kernel(measured, sequences, M=None, rows=ROWS, numbers=NUMBERS):
    """-> K(t, t') of all pairs, (B, B) in fp64. M: a vector over theta, or None for 1.

    The parameters are taken block by block, so that B gradients of a part of them exist at a time.
    """
    B = len(sequences)
    K = torch.zeros(B, B, dtype=torch.float64)
    for names in blocks_of_names(measured.theta, numbers // B):
        J = scores(measured, sequences, names, rows).double()  # (B, their n)
        MJ = J
        if M is not None:
            MJ = J * torch.cat([M[name].double().flatten() for name in names])
        K += MJ @ J.T
    return K


def centred(logprobs, group):
    """log pi(t) (B,) -> h(t) = b - log pi(t), (B,), with b their mean over the other groups."""
    h = torch.empty_like(logprobs)
    for number in group.unique():
        own = group == number
        h[own] = logprobs[~own].mean() - logprobs[own]
    return h


def copies(sequences):
    """-> (B, B) bool: the same completion of the same prompt group, drawn twice or once."""
    tokens = sequences.targets.masked_fill(~sequences.sampled, -1)  # (B, K)
    same = (tokens[:, None] == tokens[None]).all(-1)
    return same & (sequences.group[:, None] == sequences.group[None])


def entropy_split(K, h, a, sequences):
    """delta H by pairs -> {part: float}, of a batch with its K (B, B), h and a (B,).

    The V-statistic's parts, and `V` their sum: t' acts on
    itself         the very draw: what biases V
    its copies     the same completion, drawn again for the same prompt
    its prompt     other completions of its prompt
    other prompts
    """
    pairs = h[:, None] * K * a[None] / len(K)  # (B, B), t by t'
    itself = torch.eye(len(K), dtype=torch.bool)
    same = copies(sequences)
    own_group = sequences.group[:, None] == sequences.group[None]
    parts = {
        "itself": float(pairs[itself].sum()),
        "its copies": float(pairs[same & ~itself].sum()),
        "its prompt": float(pairs[own_group & ~same].sum()),
        "other prompts": float(pairs[~own_group].sum()),
    }
    parts["V"] = sum(parts.values())
    return parts


def between_groups(K, h, a, group):
    """The U-statistic: unbiased delta H, from pairs of different groups -> (value, error).

    With W[p, p'] what group p' does to the mean completion of group p, it is

        P times the mean of W[p, p'] over p != p'

    The error is the jackknife's, each group left out once; NaN for fewer than three groups.
    """
    pairs = h[:, None] * K * a[None]  # (B, B), t by t'
    numbers = group.unique()
    P = len(numbers)
    W = torch.zeros(P, P, dtype=torch.float64)
    for i, p in enumerate(numbers):
        rows = pairs[group == p].mean(0)  # (B,)
        for j, other in enumerate(numbers):
            W[i, j] = rows[group == other].sum()
    off = W - W.diagonal().diag()
    total = float(off.sum())
    value = total / (P - 1)
    if P < 3:
        return value, float("nan")
    without = (total - off.sum(0) - off.sum(1)) * P / ((P - 1) * (P - 2))  # (P,)
    spread = float((without - without.mean()).square().sum())
    return value, ((P - 1) / P * spread) ** 0.5
