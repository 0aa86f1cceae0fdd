"""Rows packed together see what they would see alone."""

import pytest
import torch

from conftest import toy_model
from nanorl.attention import CausalAttention, SharedPrefixAttention, pick
from nanorl.batch import Row


def test_packed_documents_do_not_see_each_other():
    model = toy_model()
    a, b = [5, 6, 7, 8], [9, 10, 11]
    ids = torch.tensor([a + b + [0, 0]])
    document = torch.tensor([[1] * 4 + [2] * 3 + [0] * 2])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    packed = model(ids, positions, CausalAttention(document))
    assert (packed[0, :4] - model(torch.tensor([a]))[0]).abs().max() < 1e-12
    assert (packed[0, 4:7] - model(torch.tensor([b]))[0]).abs().max() < 1e-12


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_spelled_out_attention_equals_the_fused_kernel(packed, kv_heads):
    """On a CPU in bf16 short rows take another path.

    It gives the same numbers and the same gradients, up to bf16's rounding.
    """
    torch.manual_seed(0)
    document = torch.tensor([[1] * 9 + [2] * 11, [1] * 20]) if packed else None
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        q = torch.randn(2, 20, 4, 8).to(dtype).requires_grad_()
        k = torch.randn(2, 20, kv_heads, 8).to(dtype).requires_grad_()
        v = torch.randn(2, 20, kv_heads, 8).to(dtype).requires_grad_()
        y = CausalAttention(document)(0, q, k, v)
        y.float().square().sum().backward()
        results.append([t.float() for t in (y, q.grad, k.grad, v.grad)])
    for exact, rounded in zip(*results):
        assert (exact - rounded).abs().max() < 0.05 * exact.abs().max()


# Lengths of prompts, and of what follows each: ragged, of one token, with a sample that adds
# nothing, prompts of other length in one block.
GROUPS = [(7, [5, 1, 0, 9, 5]), (1, [5, 19]), (12, [0]), (4, [20, 19, 18, 2, 2, 2])]


def packed_groups(groups):
    """-> ids and positions (1, T), rows for SharedPrefixAttention, and each sample alone.

    Alone: a row of its own with its prompt, and the slots of its tokens in the packed row.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        return torch.randint(0, 70, (n,), generator=generator).tolist()

    ids, positions, rows, alone = [], [], [], []
    for n, samples in groups:
        start = len(ids)
        prompt = draw(n)
        rows.append(Row(start, n, start, 0))
        ids += prompt
        positions += range(n)
        for m in samples:
            first = len(ids)
            sample = draw(m)
            rows.append(Row(first, m, start, n))
            ids += sample
            positions += range(n, n + m)
            slots = [*range(start, start + n), *range(first, first + m)]
            alone.append((prompt + sample, slots))
    return torch.tensor([ids]), torch.tensor([positions]), rows, alone


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("groups", [GROUPS, GROUPS[:1], GROUPS[1:2], GROUPS[2:3]])
def test_prompts_computed_once_give_what_each_row_alone_gives(groups, kv_heads):
    """Activations and, in the shared prompt too, gradients: fp64."""
    model = toy_model(n_kv_head=kv_heads)
    ids, positions, rows, alone = packed_groups(groups)
    together = model.hidden(ids, positions, SharedPrefixAttention(rows, "cpu"))[0]  # (T, C)
    generator = torch.Generator().manual_seed(1)
    towards = torch.randn(len(alone), 64, 32, dtype=torch.float64, generator=generator)
    for row, slots in alone:
        h = model.hidden(torch.tensor([row]))[0]
        assert (h - together[slots]).abs().max() < 1e-12

    loss = 0.0
    for (_, slots), target in zip(alone, towards):
        loss = loss + (together[slots] * target[: len(slots)]).sum()
    loss.backward()
    shared = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.zero_grad()
    loss = 0.0
    for (row, _), target in zip(alone, towards):
        h = model.hidden(torch.tensor([row]))[0]
        loss = loss + (h * target[: len(row)]).sum()
    loss.backward()
    for a, b in zip(shared, (p.grad for p in model.parameters() if p.grad is not None)):
        assert (a - b).abs().max() <= 1e-10


def test_padding_is_a_small_part_also_of_a_skewed_mix():
    """Only attention sees padding, and a long row does not widen the short ones' block."""
    lengths = [4] * 60 + [5] * 30 + [60] * 2
    rows = [Row(0, 10, 0, 0)]
    for i, n in enumerate(lengths):
        rows.append(Row(10 + sum(lengths[:i]), n, 0, 10))
    attend = SharedPrefixAttention(rows, "cpu")
    assert attend.computed_slots <= 1.15 * (10 + sum(lengths))


def test_pick_is_indexing():
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    at = torch.tensor([[0, 4, 4], [2, 0, 0]])
    assert torch.equal(pick(x, at), x[at])
    assert torch.autograd.gradcheck(lambda x: pick(x, at), x)


def test_many_gradients_to_one_row_are_summed_in_fp32():
    x = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    pick(x, torch.tensor([0] * 1000 + [1])).sum().backward()
    assert x.grad[:, 0].tolist() == [1000.0, 1.0]  # in bf16 the sum would stop at 256


def test_all_layers_share_one_mask():
    """What autograd keeps of it does not grow with the layers."""
    rows = [Row(0, 40, 0, 0), Row(40, 60, 0, 40), Row(100, 60, 0, 40)]
    mask_sizes = {2 * 60 * 100, 2 * 60 * 104, 40 * 40}

    def bytes_kept(layers):
        seen = {}

        def note(t):
            memory = t.untyped_storage()
            if memory.nbytes() // t.element_size() in mask_sizes:
                seen[memory.data_ptr()] = memory.nbytes()
            return t

        model = toy_model(n_layer=layers, dtype=torch.float32)
        attend = SharedPrefixAttention(rows, "cpu")
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model.hidden(torch.zeros(1, 160, dtype=torch.long), torch.arange(160)[None], attend)
        return sum(seen.values())

    assert bytes_kept(1) == bytes_kept(4) > 0
