"""The model: against an independent implementation written with loops, and against itself.

Against transformers: test_hf.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import toy_model
from nanorl.gpt import GPT, GPTConfig, token_logprobs
from nanorl.report.cost import forward_flops


def slow_logits(model, ids):
    """One row of ids, position by position and head by head.

    It shares only the weights with nanorl.gpt.
    """
    c, w = model.config, model.state_dict()
    D = c.head_dim

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[name]

    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))

    def turn(x):
        y = torch.empty_like(x)
        for t in range(len(x)):
            for i in range(D // 2):
                angle = t / c.rope_theta ** (2 * i / D)
                cos, sin = math.cos(angle), math.sin(angle)
                first, second = x[t, i], x[t, i + D // 2]
                y[t, i] = first * cos - second * sin
                y[t, i + D // 2] = first * sin + second * cos
        return y

    x = w["model.embed_tokens.weight"][torch.tensor(ids)]  # (T, C)
    for layer in range(c.n_layer):
        block = f"model.layers.{layer}."
        attention, mlp = block + "self_attn.", block + "mlp."
        h = norm(x, block + "input_layernorm.weight")
        outputs = []
        for head in range(c.n_head):
            kv_head = head // (c.n_head // c.n_kv_head)
            own, shared = slice(head * D, (head + 1) * D), slice(kv_head * D, (kv_head + 1) * D)
            q = linear(h, attention + "q_proj")[:, own]  # (T, D)
            k = linear(h, attention + "k_proj")[:, shared]
            v = linear(h, attention + "v_proj")[:, shared]
            if c.qk_norm:
                q = norm(q, attention + "q_norm.weight")
                k = norm(k, attention + "k_norm.weight")
            q, k = turn(q), turn(k)

            # Position t attends to itself and to those before it.
            y = []
            for t in range(len(ids)):
                scores = q[t] @ k[: t + 1].T / math.sqrt(D)  # (t + 1)
                y.append(scores.softmax(-1) @ v[: t + 1])
            outputs.append(torch.stack(y))
        x = x + linear(torch.cat(outputs, -1), attention + "o_proj")

        h = norm(x, block + "post_attention_layernorm.weight")
        inner = F.silu(linear(h, mlp + "gate_proj")) * linear(h, mlp + "up_proj")
        x = x + linear(inner, mlp + "down_proj")
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
    matrices = []
    for name, p in model.named_parameters():
        if p.dim() == 2 and ("proj" in name or "lm_head" in name):
            matrices.append(p)
    tied = config.tie_embeddings * config.vocab_size * config.n_embd
    assert config.n_params()[1] == sum(p.numel() for p in matrices) + tied


def test_flops_equal_the_counter_of_torch():
    """With attention as explicit matrix products, full squares counted.

    FlopCounterMode sees nothing of the fused attention on a CPU.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = toy_model(dtype=torch.float32)

    def explicit(layer, q, k, v):
        q = q.transpose(1, 2)  # (B, H, T, D)
        k = k.repeat_interleave(2, 2).transpose(1, 2)
        v = v.repeat_interleave(2, 2).transpose(1, 2)
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return (weights @ v).transpose(1, 2)

    B, T = 3, 20
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(B, T, dtype=torch.long), attend=explicit)
    assert counter.get_total_flops() == forward_flops(model.config, B * T, B * T * T, B * T)


def test_right_padding_changes_nothing():
    model = toy_model()
    row = torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[5, 6, 7, 0, 0, 0, 0]])
    assert (model(padded)[:, :3] - model(row)).abs().max() < 1e-12


def test_logprobs_and_their_gradients_equal_autograds_whatever_the_chunk():
    model = toy_model()
    h0 = torch.randn(11, 32, dtype=torch.float64)
    ids = torch.randint(0, 70, (11,))
    results = []
    for chunk in (1, 70 * 3, 2**24, "autograd"):
        model.zero_grad()
        h = h0.clone().requires_grad_()
        if chunk == "autograd":
            logprobs = token_logprobs(model.head(h), ids, 0.7)
            entropy = results[0][1]
        else:
            logprobs, entropy = model.logprobs(h, ids, 0.7, with_entropy=True, chunk_elements=chunk)
        logprobs.square().sum().backward()
        results.append((logprobs.detach(), entropy, h.grad, model.lm_head.weight.grad.clone()))
    for other in results[:-1]:
        for a, b in zip(other, results[-1]):
            assert (a - b).abs().max() < 1e-12
    p = (model.head(h0) / 0.7).softmax(-1)
    # The entropy is the distribution's, not the sample's.
    logprobs, entropy = results[0][:2]
    assert (entropy - -(p * p.log()).sum(-1)).abs().max() < 1e-10
    assert (logprobs - p.log()[torch.arange(11), ids]).abs().max() < 1e-10


def test_the_heads_gradient_is_summed_in_the_master_weights_precision():
    """In bf16, over many chunks: each chunk's part is rounded, their sum is not."""
    model = toy_model(dtype=torch.float32)
    h = torch.randn(4096, 32)
    ids = torch.randint(0, 70, (4096,))
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
