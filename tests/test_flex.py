"""The packed row in one kernel gives what the rectangles give."""

import functools
import random

import pytest
import torch
from torch.nn.attention import flex_attention

from conftest import toy_model
from nanorl import flex, learner
from nanorl.attention import SharedPrefixAttention
from nanorl.batch import pack
from nanorl.flex import PackedFlexAttention
from nanorl.lora import LoRA
from nanorl.rollout import Rollout
from nanorl.sampling import Completion
from test_attention import packed_groups


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """The kernel's eager form, which on a CPU refuses gradients and has them. Short rows."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "compiled_flex", lambda: flex_attention.flex_attention)
    monkeypatch.setattr(flex, "SHORTEST", 128)


def random_groups(seed, longest):
    """A few prompts and the lengths of what follows each: also none, nothing, and one slot."""
    rng = random.Random(seed)

    def length(shortest):
        return rng.choice([shortest, rng.randint(1, 9), rng.randint(1, longest)])

    groups = []
    for _ in range(rng.randint(1, 5)):
        groups.append((length(1), [length(0) for _ in range(rng.randint(0, 6))]))
    return groups


def close_to(found, expected, bound=1e-11):
    return all((a - b).abs().max() <= bound for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("seed", range(9))
def test_one_kernel_gives_what_the_rectangles_give(seed, flex_on_cpu):
    """Outputs and gradients, fp64: whatever the rows, and however many heads share keys."""
    _, _, rows, _ = packed_groups(random_groups(seed, longest=60))
    T = sum(row.length for row in rows)
    torch.manual_seed(seed)
    kv_heads = (4, 2, 1)[seed % 3]
    q, k, v, towards = (
        torch.randn(1, T, heads, 16, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads, 4)
    )
    results = []
    for form in (SharedPrefixAttention, PackedFlexAttention):
        y = form(rows, "cpu")(0, q, k, v)
        assert y.shape == q.shape
        results.append([y, *torch.autograd.grad((y * towards).sum(), (q, k, v))])
    assert close_to(*results)


@pytest.mark.parametrize("seed", range(4))
def test_squares_are_those_of_the_mask(seed, monkeypatch):
    """Which are computed, which without a mask, and for the backward which queries see a key's."""
    monkeypatch.setattr(flex, "SHORTEST", 128)
    groups = random_groups(seed, longest=700)
    _, _, rows, _ = packed_groups([(300, [500, 200]), *groups])
    T = sum(row.length for row in rows)
    found = PackedFlexAttention(rows, "cpu")
    blocks = -(-T // 128)

    # By the mask itself, of all slots that are no padding.
    slots = torch.arange(found.padded)
    seen = found.mask.mask_mod(0, 0, slots[:, None], slots[None])
    seen[T:] = seen[:, T:] = False
    in_squares = seen.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).sum((1, 3))
    computed, unmasked = in_squares > 0, in_squares == 128 * 128
    assert seen.sum() == sum(
        row.length * row.prefix_length + row.length * (row.length + 1) // 2 for row in rows
    )
    assert 0 < unmasked.sum() < computed.sum()

    def table(count, where):
        """A list of squares -> (blocks, blocks)."""
        listed = torch.arange(where.size(-1)) < count[0, 0, :, None]
        return torch.zeros_like(listed).scatter(1, where[0, 0].long(), listed)

    mask = found.mask
    partial, full = computed & ~unmasked, unmasked
    assert torch.equal(table(mask.kv_num_blocks, mask.kv_indices), partial)
    assert torch.equal(table(mask.full_kv_num_blocks, mask.full_kv_indices), full)
    assert torch.equal(table(mask.q_num_blocks, mask.q_indices), partial.T)
    assert torch.equal(table(mask.full_q_num_blocks, mask.full_q_indices), full.T)
    assert found.computed_slots == blocks * 128 and found.padded >= T
    assert found.computed_pairs == computed.sum() * 128 * 128


def test_a_kernel_a_length_and_not_a_micro_batch(monkeypatch):
    """Other rows, as many or more, run in the kernel that there is: to compile takes seconds."""
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    compile_by = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compile_by)
    monkeypatch.setattr(flex, "SHORTEST", 128)
    flex.compiled_flex.cache_clear()
    found = []
    for groups in ([(7, [5, 9])], [(30, [20, 0, 3]), (9, [2])], [(100, [90])], [(3, [99, 99])]):
        _, _, rows, _ = packed_groups(groups)
        T = sum(row.length for row in rows)
        for _layer in range(2):
            q, k, v = torch.ones(3, 1, T, 2, 16)
            PackedFlexAttention(rows, "cpu")(_layer, q, k, v)
        found.append(len(compiled))
    flex.compiled_flex.cache_clear()
    assert found == [1, 1, 2, 2]


def test_rows_have_few_lengths():
    lengths = {flex.padded_length(T) for T in range(1, 16385)}
    assert lengths == {1024, 2048, 4096, 8192, 16384}


def micro_batch():
    """Of completions of 1 to 30 tokens."""
    rng = random.Random(0)
    rollouts = []
    for n in (5, 1, 17):
        completions = []
        for length in (1, rng.randint(2, 30), rng.randint(2, 30)):
            ids = [rng.randrange(70) for _ in range(length)]
            completions.append(Completion(ids, [-1.0] * length, True))
        prompt = [rng.randrange(70) for _ in range(n)]
        rollouts.append(Rollout(None, prompt, completions, None, None, None))
    ones = torch.ones(3, 3, dtype=torch.float64)
    (batch,) = pack(rollouts, ones, ones, 10_000, "cpu")
    return batch


@pytest.mark.parametrize("adapted", [False, True])
def test_the_learner_with_one_kernel(adapted, flex_on_cpu, monkeypatch):
    """Log-probs and all gradients, also of adapters: fp64."""
    batch = micro_batch()
    results = []
    for serves in (False, True):
        monkeypatch.setattr(flex, "flex_serves", lambda *_, serves=serves: serves)
        torch.manual_seed(0)
        model = toy_model(n_kv_head=2)
        if adapted:
            LoRA(model, 2, 4.0)
        outputs = learner.forward(model, batch)
        outputs.logprobs.sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([outputs.logprobs, *gradients])
    assert outputs.computed_slots == outputs.computed_pairs // 128 == 128
    assert close_to(*results)


def test_when_one_kernel_serves(monkeypatch):
    """On a GPU in 16 bits, where heads are wide enough and a kernel can be compiled."""
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    _, _, rows, _ = packed_groups([(100, [200, 300]), (90, [250])])
    monkeypatch.setattr(flex, "can_compile", lambda: True)
    assert flex.flex_serves(rows, cuda, bf16, 64)
    assert not flex.flex_serves(rows, torch.device("cpu"), bf16, 64)
    assert not flex.flex_serves(rows, cuda, torch.float32, 64)
    assert not flex.flex_serves(rows, cuda, torch.float64, 64)
    assert not flex.flex_serves(rows, cuda, bf16, 8)
    monkeypatch.setenv("NANORL_FLEX", "0")
    assert not flex.flex_serves(rows, cuda, bf16, 64)
    monkeypatch.delenv("NANORL_FLEX")
    monkeypatch.setattr(flex, "can_compile", lambda: False)
    assert not flex.flex_serves(rows, cuda, bf16, 64)


def test_one_kernel_serves_no_short_rows(monkeypatch):
    """As a quickstart has them: most of a square would be hidden."""
    monkeypatch.setattr(flex, "can_compile", lambda: True)
    of = torch.device("cuda"), torch.bfloat16, 64
    _, _, short, _ = packed_groups([(20, [25] * 16)] * 16)
    _, _, long, _ = packed_groups([(128, [200] * 16)] * 4)
    assert not flex.flex_serves(short, *of) and flex.flex_serves(long, *of)
