"""Muon against its plain form: torch's in the precision of training, a dozen lines in fp64."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch

from nanorl import muon
from nanorl.optim import make_optimizers
from nanorl.runtime import dist
from scripts import BASE, SFT, call

# Of every kind: square, wide, tall (the same stack as wide ones), one of its kind, a single row.
SHAPES = [(8, 8)] * 3 + [(8, 20)] * 2 + [(20, 8)] * 3 + [(4, 30), (1, 5), (64, 64)]
SETTINGS = dict(lr=0.02, weight_decay=0.1, momentum=0.95)


def weights_of(shapes, dtype):
    source = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes]
    return [torch.nn.Parameter(tensor.to(dtype)) for tensor in tensors]


def give_gradients(params, step):
    """From the third of four steps on to two of the matrices only."""
    source = torch.Generator().manual_seed(1 + step)
    for p in params:
        grad = torch.randn(p.shape, generator=source, dtype=torch.float64).to(p.dtype)
        p.grad = grad if step % 4 < 2 or p.shape == (8, 20) else None


def plain_orthogonalized(matrix):
    """Of one matrix, as torch.optim.Muon has it, but in the matrix's own precision."""
    X = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    X = X / max(float(X.square().sum()) ** 0.5, 1e-7)
    for _ in range(5):
        gram = X @ X.T
        X = 3.4445 * X + (-4.7750 * gram + 2.0315 * gram @ gram) @ X
    return X.T if matrix.shape[0] > matrix.shape[1] else X


@torch.no_grad()
def plain_step(params, momenta):
    lr, decay, momentum = SETTINGS.values()
    for p, m in zip(params, momenta):
        if p.grad is None:
            continue
        m.copy_(momentum * m + (1 - momentum) * p.grad)
        direction = plain_orthogonalized((1 - momentum) * p.grad + momentum * m)
        length = lr * math.sqrt(max(1, p.shape[0] / p.shape[1]))
        p.copy_((1 - lr * decay) * p - length * direction)


def distance(some, others):
    return max(float((a - b).detach().abs().max()) for a, b in zip(some, others))


@pytest.mark.parametrize("at_once", [1, 200, muon.STACK])
def test_it_is_the_plain_form_in_fp64(at_once, monkeypatch):
    monkeypatch.setattr(muon, "STACK", at_once)
    ours, plain = weights_of(SHAPES, torch.float64), weights_of(SHAPES, torch.float64)
    optimizer = muon.Muon(ours, **SETTINGS)
    momenta = [torch.zeros_like(p) for p in plain]
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(plain, step)
        optimizer.step()
        plain_step(plain, momenta)
    assert distance(ours, plain) < 1e-12
    assert distance([optimizer.state[p]["momentum_buffer"] for p in ours], momenta) < 1e-12


def test_it_is_torchs_and_goes_on_from_its_state():
    """As the weights of training are, in fp32; and back."""
    ours, theirs = weights_of(SHAPES, torch.float32), weights_of(SHAPES, torch.float32)
    one, two = torch.optim.Muon(ours, **SETTINGS), torch.optim.Muon(theirs, **SETTINGS)
    optimizers = [one, one, muon.Muon(ours, **SETTINGS), torch.optim.Muon(ours, **SETTINGS)]
    for step, optimizer in enumerate(optimizers):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        if step > 1:
            optimizer.load_state_dict(optimizers[step - 1].state_dict())
        optimizer.step()
        two.step()
        # Products in bf16 have 8 bits, and a step is 0.02 of matrices with singular values near 1.
        assert distance(ours, theirs) < 1e-3 * 0.02
    assert optimizers[2].state_dict().keys() == two.state_dict().keys()
    assert optimizers[2].state_dict()["param_groups"] == two.state_dict()["param_groups"]


def test_two_runs_are_bitwise_the_same():
    runs = [weights_of(SHAPES, torch.float32) for _ in range(2)]
    for params in runs:
        optimizer = muon.Muon(params, **SETTINGS)
        for step in range(3):
            give_gradients(params, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_a_matrix_without_a_gradient_stays():
    params = weights_of(SHAPES, torch.float64)
    before = params[1].detach().clone()
    optimizer = muon.Muon(params, **SETTINGS)
    give_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before) and not optimizer.state[params[1]]
    for p in params:
        p.grad = None
    optimizer.step()


# ---- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_every_matrix_has_one_rank_and_the_work_is_about_equal(n):
    layer = [(1280, 1280)] * 2 + [(640, 1280)] * 2 + [(3456, 1280)] * 2 + [(1280, 3456)]
    params = [torch.empty(shape, device="meta") for shape in layer * 20]
    shares = muon.shares_of(params, n)
    assert sorted(id(p) for share in shares for p in share) == sorted(id(p) for p in params)
    work = [sum(muon.work_of(p) for p in share) for share in shares]
    assert max(work) <= 1.1 * sum(work) / n


class Gloo:
    """What Muon asks of runtime.dist, for one of several threads."""

    def __init__(self, group):
        self.group, self.rank, self.world_size = group, group.rank, group.size

    def gather_numbers(self, own):
        every = [torch.empty_like(own) for _ in range(self.group.size())]
        self.group.allgather([every], [own]).wait()
        return every


class Counting(muon.Muon):
    """Knows how many matrices it has orthogonalized in each step."""

    def _orthogonalize_share(self, share, group):
        self.counts = [*getattr(self, "counts", []), len(share)]
        return super()._orthogonalize_share(share, group)


def on_ranks(n, runs, first_step):
    """Four steps of each run on n ranks, the last two with two of the matrices.

    runs: (weights of a dtype, state of its optimizer or None). Returns what each rank has then:
    (weights, state, counts) of each run.
    """
    store = torch.distributed.HashStore()

    def one_rank(rank):
        found = []
        group = torch.distributed.ProcessGroupGloo(store, rank, n, timedelta(seconds=60))
        for weights, state in runs:
            params = [torch.nn.Parameter(p.detach().clone()) for p in weights]
            optimizer = Counting(params, ranks=Gloo(group), **SETTINGS)
            if state:
                optimizer.load_state_dict(copy.deepcopy(state))
            for step in range(4):
                give_gradients(params, first_step + step)
                optimizer.step()
            found.append((params, optimizer.state_dict(), optimizer.counts))
        return found

    with ThreadPoolExecutor(n) as threads:
        return list(threads.map(one_rank, range(n)))


def test_one_two_and_four_ranks_are_the_plain_form():
    """One after the other, each from the state of the ranks before."""
    exact, trained = (weights_of(SHAPES, dtype) for dtype in (torch.float64, torch.float32))
    momenta = [torch.zeros_like(p) for p in exact]
    torchs = torch.optim.Muon(trained, **SETTINGS)
    runs = [(weights_of(SHAPES, p[0].dtype), None) for p in (exact, trained)]
    for n in (1, 2, 4):
        ranks = on_ranks(n, runs, 4 * n)
        for step in range(4):
            for params in (exact, trained):
                give_gradients(params, 4 * n + step)
            plain_step(exact, momenta)
            torchs.step()
        # The plain form's numbers, in fp64 and as far as products in bf16 go; on every rank.
        (of_exact, _, _), (of_trained, _, _) = ranks[0]
        assert distance(of_exact, exact) < 1e-12
        assert distance(of_trained, trained) < 1e-3 * 0.02
        for other in ranks[1:]:
            assert all(torch.equal(a, b) for a, b in zip(of_exact, other[0][0]))
            assert all(torch.equal(a, b) for a, b in zip(of_trained, other[1][0]))

        # Each rank multiplies its share alone. Of two matrices, two of four ranks have none.
        for run in range(2):
            counts = [rank[run][2] for rank in ranks]
            assert [sum(step) for step in zip(*counts)] == [len(SHAPES), len(SHAPES), 2, 2]
            assert n == 1 or max(counts[0]) < len(SHAPES)
        runs = [(params, state) for params, state, _ in ranks[-1]]


def test_base_and_sft_share_it_over_their_ranks(tmp_path, monkeypatch):
    """Nothing in a run's numbers would tell."""
    given = []

    def spying(*arguments, **more):
        optimizers = make_optimizers(*arguments, **more)
        given.append(optimizers[0].ranks)
        return optimizers

    monkeypatch.setenv("NANORL_OUT", str(tmp_path))
    monkeypatch.setattr("nanorl.optim.make_optimizers", spying)
    assert call("train_base.py", *BASE, "--steps=1", "--sample_tokens=0") is None
    assert call("train_sft.py", *SFT, "--steps=1", "--eval_problems=0") is None
    assert given == [dist, dist]
