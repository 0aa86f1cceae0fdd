"""A decode step in fewer kernels, for a GPU. All of it has a plain form, and gives the same.

A step for 256 rows is a thousand small kernels, most of which take longer to start than to run.
What is here halves their number: projections of one input are one product, and attention over a
part of the keys is one kernel. The letters are gpt.py's.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanorl.cache import DecodeAttention

# ---- projections together ------------------------------------------------------------------------


class Together:
    """Linear layers that have one input as one product: x (..., in) -> their outputs.

    Each layer's weight becomes a part of the common one. So what is copied into it, as
    Engine.refresh does, is in both. The weights have no gradient any more.
    """

    def __init__(self, layers):
        self.sizes = [layer.weight.size(0) for layer in layers]
        self.weight = common([layer.weight for layer in layers])  # (sum of sizes, in)
        self.bias = None
        for layer, part in zip(layers, self.weight.split(self.sizes)):
            layer.weight = nn.Parameter(part, requires_grad=False)
        if layers[0].bias is not None:
            self.bias = common([layer.bias for layer in layers])  # (sum of sizes,)
            for layer, part in zip(layers, self.bias.split(self.sizes)):
                layer.bias = nn.Parameter(part, requires_grad=False)

    def __call__(self, x):
        return F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)


def common(parts):
    """One tensor of several weights, one after the other."""
    return torch.cat([part.detach() for part in parts])


def put_together(model):
    """Let q, k and v of a GPT be one product, and gate and up another.

    Of k's few columns alone most of a GPU would have nothing to do. It is for a copy that samples:
    the weights cannot be trained or moved any more.
    """
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        attention.project = Together([attention.q_proj, attention.k_proj, attention.v_proj])
        mlp.project = Together([mlp.gate_proj, mlp.up_proj])


# ---- attention -----------------------------------------------------------------------------------


def kernels_serve(device, dtype):
    """Whether KernelAttention can be used. In fp32 and fp64 the plain form is: it is more exact."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def attend_part_by_kernel(q, k, v, mask):
    """cache.attend_part as one kernel, the memory-efficient attention (Rabe and Staats 2021).

    q (n, K, m, D), k and v (n, K, t, D), mask (n, 1, 1, t) in q's precision. Returns outputs as the
    kernel writes them, (n, m, K, D), and lse (n, K, m or more), in fp32.
    """
    n, K, m, _ = q.shape
    bias = mask.expand(n, K, m, k.size(2))
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    y, lse, _, _ = attend(q, k, v, bias, compute_log_sumexp=True)
    return y.transpose(1, 2), lse


class KernelAttention(DecodeAttention):
    """DecodeAttention in 13 kernels a layer instead of 41.

    The kernels want and give other orders than the plain form has. So the queries are gathered
    head by head into the order of the prompt's kernel, and its outputs head by head from it:

        queries   q          (rows, K, r)            ->  grid  (prompts, K, width, r)
        outputs   its y      (prompts, width, r, K)  ->  rows  (rows, r, K)
        lse       its lse    (prompts, K, m)         ->  rows  (rows, r, K)

    r = H/K query heads share a kv head, and m is width * r or more: the kernel pads it. query_at
    and output_at are places in the left column, counted line by line; lse_line counts (prompts, K),
    and lse_column is the place in m.
    """

    def __init__(self, batch, shape, column):
        super().__init__(batch, shape, column, mask_dtype=batch.model.compute_dtype)
        config, device = batch.model.config, batch.device
        rows, _, prompts, _, width = shape
        K = config.n_kv_head
        r = config.n_head // K
        kv_head = torch.arange(K, device=device)
        query = torch.arange(r, device=device)  # of those that share a kv head

        # From cells to rows: the grid is a line a prompt, `width` cells long.
        row = self.row_at.view(prompts, 1, width, 1)
        self.query_at = (row * K + kv_head[:, None, None]) * r + query  # (prompts, K, width, r)
        self.query_at = self.query_at.flatten(2)  # (prompts, K, width * r)

        # From rows to cells.
        cell = self.cell.view(rows, 1, 1)
        self.output_at = (cell * r + query[:, None]) * K + kv_head  # (rows, r, K)
        prompt = torch.div(cell, width, rounding_mode="floor")
        nth = cell - prompt * width
        self.lse_line = prompt * K + kv_head  # (rows, 1, K): the line in the kernel's lse ...
        self.lse_column = nth * r + query[:, None]  # (rows, r, 1): ... and where in it

    def __call__(self, layer, q, k, v):
        """One new token a row: q (rows, 1, H, D), k and v (rows, 1, K, D) -> (rows, 1, H, D)."""
        self.own_cache.keys[layer][self.newest] = k[:, 0]
        self.own_cache.values[layer][self.newest] = v[:, 0]
        rows, columns, prompts, prompt_columns, _ = self.shape
        D, K = k.size(-1), k.size(-2)

        # Each row over its own tokens.
        keys = self.own_cache.keys[layer][:rows, :, :columns]
        values = self.own_cache.values[layer][:rows, :, :columns]
        own_q = q.view(rows, K, -1, D)  # (rows, K, r, D)
        own_y, own_lse = attend_part_by_kernel(own_q, keys, values, self.own_mask)
        own_lse = own_lse[:, :, : own_q.size(2)].transpose(1, 2)  # (rows, r, K)

        # Each prompt's rows over its tokens.
        keys = self.prompt_cache.keys[layer][:prompts, :, :prompt_columns]
        values = self.prompt_cache.values[layer][:prompts, :, :prompt_columns]
        prompt_q = q.view(-1, D)[self.query_at]  # (prompts, K, width * r, D)
        prompt_y, prompt_lse = attend_part_by_kernel(prompt_q, keys, values, self.prompt_mask)
        prompt_y = prompt_y.reshape(-1, D)[self.output_at]  # (rows, r, K, D)
        prompt_lse = prompt_lse.flatten(0, 1)[self.lse_line, self.lse_column]  # (rows, r, K)

        # cache.merge, in fp32.
        share = torch.sigmoid(prompt_lse - own_lse)[..., None]  # (rows, r, K, 1)
        y = torch.addcmul(own_y * (1 - share), prompt_y, share)  # (rows, r, K, D)
        y = y.transpose(1, 2)  # (rows, K, r, D), as o_proj has the heads
        return y.to(q.dtype, memory_format=torch.contiguous_format).reshape(rows, 1, -1, D)
