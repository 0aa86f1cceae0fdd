"""A decode step in fewer kernels: on a CPU nanorl/gpu.py gives what the plain form gives.

The kernel itself is stood in for. tests/fakecuda runs all of it as on a GPU.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from conftest import toy_model
from nanorl import cache, gpu
from nanorl.engine import Engine

BIASED = dict(vocab=50, n_layer=2, n_embd=32, n_head=4, n_kv_head=2, head_dim=8, qkv_bias=True)


def by_matrix_products(q, k, v, mask):
    """attend_part_by_kernel with what it promises of shapes, and nothing that may be relied on."""
    assert mask.dtype == q.dtype and mask.stride(0) % 8 == 0
    y, lse = cache.attend_part(q, k, v, mask)
    padding = -lse.size(2) % 32
    lse = F.pad(lse, (0, padding), value=float("nan"))
    return y.transpose(1, 2).contiguous(), lse


def prompts_of(lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(50, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_by_kernels_gives_the_plain_forms_completions(monkeypatch, kv_heads):
    """In fp64: the same ids, log-probs to 1e-12. Rows leave, and others wait for their slots."""
    monkeypatch.setattr(gpu, "attend_part_by_kernel", by_matrix_products)
    model = toy_model(**{**BIASED, "n_kv_head": kv_heads})
    plain, kernels = Engine(model, 12), Engine(model, 12)
    kernels.fixed_shapes, kernels.attention = True, gpu.KernelAttention
    for prompts, G in ((prompts_of([5, 1, 9, 14, 3, 20]), 4), (prompts_of([7] * 5), 1)):
        expected = plain.generate(prompts, G, 33, stop_ids=[3, 7])
        found = kernels.generate(prompts, G, 33, stop_ids=[3, 7])
        for group, other in zip(expected, found, strict=True):
            assert [c.ids for c in group] == [c.ids for c in other]
            for a, b in zip(group, other):
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_projections_together_are_the_single_ones(bias):
    """Bit for bit, also after new weights were copied in, as Engine.refresh does."""
    model = toy_model(**{**BIASED, "qkv_bias": bias})
    together = copy.deepcopy(model)
    gpu.put_together(together)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in together.named_parameters()]

    ids = torch.tensor(prompts_of([12]))
    for factor in (1.0, 1.5):
        with torch.no_grad():
            for p, q in zip(model.parameters(), together.parameters()):
                p.mul_(factor)
                q.copy_(p)
            torch.testing.assert_close(together(ids), model(ids), rtol=1e-13, atol=1e-13)
