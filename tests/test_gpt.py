"""The model: against an independent implementation written with loops, against transformers, and against itself."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import toy_model

from nanorl.gpt import GPT, GPTConfig, token_logprobs
from nanorl.report.cost import forward_flops


def slow_logits(model, ids):
    """One row of ids, position by position and head by head; shares only the weights with nanorl.gpt."""
    c, w = model.config, model.state_dict()
    norm = lambda x, name: x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[name]
    x = w["model.embed_tokens.weight"][torch.tensor(ids)]  # (T, C)
    for layer in range(c.n_layer):
        at = f"model.layers.{layer}."
        linear = lambda x, name: F.linear(x, w[at + name + ".weight"], w.get(at + name + ".bias"))
        h = norm(x, at + "input_layernorm.weight")
        out = []
        for head in range(c.n_head):
            kv = head // (c.n_head // c.n_kv_head)
            q = linear(h, "self_attn.q_proj")[:, head * c.head_dim : (head + 1) * c.head_dim]
            k = linear(h, "self_attn.k_proj")[:, kv * c.head_dim : (kv + 1) * c.head_dim]
            v = linear(h, "self_attn.v_proj")[:, kv * c.head_dim : (kv + 1) * c.head_dim]
            if c.qk_norm:
                q, k = (
                    norm(q, at + "self_attn.q_norm.weight"),
                    norm(k, at + "self_attn.k_norm.weight"),
                )

            def turn(x):
                y = torch.empty_like(x)
                for t in range(len(x)):
                    for i in range(c.head_dim // 2):
                        a = t / c.rope_theta ** (2 * i / c.head_dim)
                        u, z = x[t, i], x[t, i + c.head_dim // 2]
                        y[t, i], y[t, i + c.head_dim // 2] = (
                            u * math.cos(a) - z * math.sin(a),
                            u * math.sin(a) + z * math.cos(a),
                        )
                return y

            q, k = turn(q), turn(k)
            out.append(
                torch.stack(
                    [
                        ((q[t] @ k[: t + 1].T) / math.sqrt(c.head_dim)).softmax(-1) @ v[: t + 1]
                        for t in range(len(ids))
                    ]
                )
            )
        x = x + linear(torch.cat(out, -1), "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm.weight")
        x = x + linear(
            F.silu(linear(h, "mlp.gate_proj")) * linear(h, "mlp.up_proj"), "mlp.down_proj"
        )
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


@pytest.mark.parametrize(
    "flags",
    [
        dict(qk_norm=True),
        dict(qk_norm=False, qkv_bias=True),
        dict(tie_embeddings=True, n_kv_head=4),
    ],
)
def test_forward_equals_slow_reference(flags):
    model = toy_model(**flags)
    ids = [3, 14, 15, 9, 2, 6, 5]
    # The table of angles is fp32, as Hugging Face's: that is the only difference.
    assert (model(torch.tensor([ids]))[0] - slow_logits(model, ids)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "depth,vocab", [(1, 100), (2, 512), (4, 512), (8, 1000), (12, 2000), (13, 500)]
)
def test_parameter_count_is_exact(depth, vocab):
    config = GPTConfig.from_depth(depth, vocab)
    with torch.device("meta"):
        model = GPT(config)
    assert config.n_params()[0] == sum(p.numel() for p in model.parameters())
    matrices = [
        p for n, p in model.named_parameters() if p.dim() == 2 and ("proj" in n or "lm_head" in n)
    ]
    tied = config.tie_embeddings * config.vocab_size * config.n_embd
    assert config.n_params()[1] == sum(p.numel() for p in matrices) + tied


def test_flops_equal_the_counter_of_torch():
    """With attention as explicit matrix products, full squares counted: FlopCounterMode sees nothing of CPU SDPA."""
    from torch.utils.flop_counter import FlopCounterMode

    model = toy_model(dtype=torch.float32)

    def explicit(layer, q, k, v):
        q, k, v = (
            q.transpose(1, 2),
            k.repeat_interleave(2, 2).transpose(1, 2),
            v.repeat_interleave(2, 2).transpose(1, 2),
        )
        return (((q @ k.transpose(-1, -2)).softmax(-1)) @ v).transpose(1, 2)

    B, T = 3, 20
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(B, T, dtype=torch.long), attend=explicit)
    assert counter.get_total_flops() == forward_flops(model.config, B * T, B * T * T, B * T)


def test_right_padding_changes_nothing():
    model = toy_model()
    row = torch.tensor([[5, 6, 7]])
    assert (
        model(torch.cat([row, torch.zeros(1, 4, dtype=torch.long)], 1))[:, :3] - model(row)
    ).abs().max() < 1e-12


def test_logprobs_and_their_gradients_equal_autograds_whatever_the_chunk():
    model, h0 = toy_model(), torch.randn(11, 32, dtype=torch.float64)
    ids = torch.randint(0, 70, (11,))
    results = []
    for chunk in (1, 70 * 3, 2**24, "autograd"):
        model.zero_grad()
        h = h0.clone().requires_grad_()
        if chunk == "autograd":
            logprobs, entropy = token_logprobs(model.head(h), ids, 0.7), results[0][1]
        else:
            logprobs, entropy = model.logprobs(h, ids, 0.7, with_entropy=True, chunk_elements=chunk)
        logprobs.square().sum().backward()
        results.append((logprobs.detach(), entropy, h.grad, model.lm_head.weight.grad.clone()))
    for other in results[:-1]:
        for a, b in zip(other, results[-1]):
            assert (a - b).abs().max() < 1e-12
    p = (model.head(h0) / 0.7).softmax(-1)
    assert (
        results[0][1] - -(p * p.log()).sum(-1)
    ).abs().max() < 1e-10  # entropy is of the distribution, not of the sample
    assert (results[0][0] - p.log()[torch.arange(11), ids]).abs().max() < 1e-10


def test_the_heads_gradient_is_summed_in_the_master_weights_precision():
    """In bf16, over many chunks: each chunk's part is rounded, their sum is not."""
    model, (h, ids) = (
        toy_model(dtype=torch.float32),
        (torch.randn(4096, 32), torch.randint(0, 70, (4096,))),
    )
    grads = []
    for kind in (torch.float32, torch.bfloat16):
        model.zero_grad()
        model.logprobs(h.to(kind), ids, chunk_elements=70 * 8)[0].sum().backward()
        grads.append(model.lm_head.weight.grad.clone())
    assert grads[1].dtype == torch.float32
    assert (grads[0] - grads[1]).norm() < 0.004 * grads[0].norm()


def test_token_logprobs_scales_by_temperature_and_works_in_fp32_for_bf16():
    z = torch.tensor([[1.0, 2.0, 3.0]])
    expected = math.log(math.exp(2 / 0.5) / sum(math.exp(x / 0.5) for x in (1, 2, 3)))
    assert abs(float(token_logprobs(z, torch.tensor([1]), 0.5)) - expected) < 1e-6
    assert token_logprobs(z.bfloat16(), torch.tensor([1])).dtype == torch.float32


def test_padded_embedding_rows_get_no_probability():
    model = toy_model(n_tokens=50)
    assert model(torch.tensor([[1, 2]])).shape[-1] == 50


def test_bad_sizes_are_refused_with_the_value():
    for broken, word in [
        (dict(n_kv_head=3), "3"),
        (dict(head_dim=7), "7"),
        (dict(n_layer=0), "0"),
        (dict(n_tokens=71), "71"),
    ]:
        with pytest.raises(ValueError, match=word):
            toy_model(**broken)
    with pytest.raises(ValueError, match="context"):
        toy_model()(torch.zeros(1, 257, dtype=torch.long))


def test_precisions():
    """fp32 master weights stay fp32 and get fp32 gradients while the activations are bf16."""
    model = toy_model(dtype=torch.float32)
    model.compute_dtype = torch.bfloat16
    logits = model(torch.tensor([[1, 2, 3]]))
    assert logits.dtype == torch.bfloat16
    logits.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
