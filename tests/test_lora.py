"""Adapters: their gradient against autograd through W + scale B A.

And that sampler, learner, reference and files agree about the merged weights.
"""

import pytest
import torch
import torch.nn.functional as F

from conftest import toy_model
from nanorl.engine import Engine
from nanorl.gpt import token_logprobs
from nanorl.hf import load_model, save_model
from nanorl.lora import TARGETS, LoRA, LowRank
from nanorl.optim import make_optimizers, update

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])


def adapted(seed=1, merge=True, rank=3, **overrides):
    """A toy model and its adapters, B no longer zero."""
    model = toy_model(**overrides)
    lora = LoRA(model, rank, 6.0)
    generator = torch.Generator().manual_seed(seed)
    for name, p in lora.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.2
    if merge:
        lora.merge()
    return model, lora


def loss_of(model):
    return -token_logprobs(model(IDS)[0, :-1], IDS[0, 1:]).sum()


def test_the_gradient_is_autograds_through_the_sum():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = randn(2, 5, 7).requires_grad_()
    w = randn(4, 7)
    a = randn(3, 7).requires_grad_()
    b = randn(4, 3).requires_grad_()
    g = randn(2, 5, 4)
    by_autograd = F.linear(x, w + 0.5 * b @ a)
    by_hand = LowRank.apply(x, (w + 0.5 * b @ a).detach(), a, b, 0.5)
    gradients = []
    for y in (by_autograd, by_hand):
        y.backward(g)
        gradients.append([t.grad for t in (x, a, b)])
        x.grad = a.grad = b.grad = None
    expected, found = gradients
    assert all((e - f).abs().max() < 1e-12 for e, f in zip(expected, found))


@pytest.mark.parametrize(
    "overrides", [dict(), dict(qkv_bias=True, qk_norm=False, tie_embeddings=True)]
)
def test_the_models_gradient_is_the_full_ones_by_the_chain_rule(overrides):
    model, lora = adapted(**overrides)
    loss_of(model).backward()
    full = toy_model(**overrides)
    full.load_state_dict(model.state_dict())
    loss_of(full).backward()
    grads = dict(full.named_parameters())
    assert len(lora.projections) == 2 * len(TARGETS)
    for name, (_, _, a, b) in lora.projections.items():
        g = lora.scale * grads[f"{name}.weight"].grad
        assert (a.grad - b.T @ g).abs().max() < 1e-10
        assert (b.grad - g @ a.T).abs().max() < 1e-10
    # The weights' own gradients are never formed.
    assert all(p.grad is None for p in model.parameters())


def test_a_fresh_adapter_changes_nothing_and_an_update_only_what_it_names():
    plain, model = toy_model(), toy_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    lora = LoRA(model, 2, 4.0, targets=("q", "down"))
    lora.merge()
    assert torch.equal(plain(IDS), model(IDS))
    optimizers = make_optimizers(lora, 0.1, 0.1, muon=False)
    loss_of(model).backward()
    update(optimizers, [p for _, p in lora.named_parameters()], 1.0, 1.0)
    lora.merge()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }


def test_sampler_learner_and_merged_weights_are_one_policy():
    model, lora = adapted()
    explicit = toy_model()
    parameters = dict(explicit.named_parameters())
    with torch.no_grad():
        for name, (_, own, a, b) in lora.projections.items():
            parameters[f"{name}.weight"].copy_(own + 6.0 / 3 * b @ a)
    assert (explicit(IDS) - model(IDS)).abs().max() < 1e-12
    assert (explicit(IDS) - toy_model()(IDS)).abs().max() > 0.1
    (c,) = Engine(model).generate([IDS[0].tolist()], 1, 12)[0]
    ids = torch.tensor([IDS[0].tolist() + c.ids])
    learner = token_logprobs(model(ids)[0, 9:-1], ids[0, 10:])
    assert (learner - torch.tensor(c.logprobs, dtype=torch.float64)).abs().max() < 1e-9


def test_in_bf16_the_sampler_has_no_weights_of_its_own():
    """What an adapter adds is rounded into the weights once: both halves multiply by the result."""
    model, lora = adapted(dtype=torch.bfloat16)
    merged = toy_model(dtype=torch.bfloat16)
    merged.load_state_dict(model.state_dict())
    plain = toy_model(dtype=torch.bfloat16)
    assert torch.equal(model(IDS), merged(IDS))
    assert not torch.equal(model(IDS), plain(IDS))
    assert Engine(model).model is model
    _, own, a, b = lora.projections["model.layers.0.mlp.up_proj"]
    assert a.dtype == b.dtype == torch.float32
    rounded = (own + lora.scale * (b @ a)).bfloat16()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, rounded)


def test_the_base_is_the_reference_and_costs_no_memory():
    model, lora = adapted()
    merged = model(IDS)
    lora.merge()
    # It merges into the weights as they were, not on top of what was merged before.
    assert torch.equal(model(IDS), merged)
    addresses = {p.data_ptr() for p in model.parameters()}
    addresses |= {own.data_ptr() for _, own, _, _ in lora.projections.values()}
    with lora.base(model) as base:
        assert torch.equal(base(IDS), toy_model()(IDS))
        assert {p.data_ptr() for p in base.parameters()} <= addresses
    assert torch.equal(model(IDS), merged)
    with pytest.raises(KeyError), lora.base(model):
        raise KeyError
    assert torch.equal(model(IDS), merged)  # also after trouble


def test_state_goes_out_and_in():
    model, lora = adapted()
    other = toy_model()
    again = LoRA(other, 3, 6.0, seed=5)
    assert not torch.equal(other(IDS), model(IDS))
    again.load_state_dict(lora.state_dict())
    assert torch.equal(other(IDS), model(IDS))


def test_saved_merged_it_is_a_plain_model(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    model, lora = adapted(vocab=tokenizer.n_tokens, dtype=torch.float32)
    save_model(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(IDS), model(IDS))
        assert (theirs(IDS).logits - model(IDS)).abs().max() <= 5e-4


@pytest.mark.parametrize(
    "rank, alpha, targets, words",
    [
        (0, 1.0, TARGETS, "lora_rank is 0"),
        (2, 0.0, TARGETS, "lora_alpha 0.0"),
        (2, 1.0, ("q", "x"), "lora_targets names x: it takes some of q, k"),
        (2, 1.0, (), "names nothing"),
    ],
)
def test_what_cannot_be(rank, alpha, targets, words):
    with pytest.raises(ValueError, match=words):
        LoRA(toy_model(), rank, alpha, targets)
