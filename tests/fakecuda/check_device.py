"""python tests/fakecuda/check_device.py

The simulated GPU itself: what it refuses, what it counts, what a replay shows. A line a check; it
ends with status 1 where one fails.
"""

import copy
import os
import sys
import threading
import traceback

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import fakecuda
import torch
import torch.nn as nn
import torch.nn.functional as F

aten = torch.ops.aten
log = fakecuda.log


def cuda(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).to("cuda")


def raises(work, words):
    """Whether work() raises RuntimeError (or a kind of it) that says these words."""
    try:
        work()
    except RuntimeError as error:
        assert words in str(error), error
        return True
    return False


def syncs_of(work):
    log.syncs.clear()
    work()
    return sum(log.syncs.values())


def captured(work, **settings):
    """-> (the graph of work(), what it returned)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **settings):
        result = work()
    return graph, result


# ---- devices -------------------------------------------------------------------------------------


def check_a_tensor_says_where_it_is():
    x = cuda(2, 3)
    assert str(x.device) == "cuda:0" and x.is_cuda and (x + 1).device == x.device
    assert torch.zeros(2, device="cuda").is_cuda and torch.zeros_like(x).is_cuda
    assert not x.cpu().is_cuda and not x.to("cpu", torch.float64).is_cuda
    assert x.new_zeros(2).is_cuda and x[0].is_cuda and x.T.is_cuda
    assert torch.equal(x.cpu() * 2, (x * 2).cpu())


def check_mixed_devices_raise():
    x, y = cuda(2, 3), torch.randn(2, 3)
    assert raises(lambda: x + y, "tensors on cuda and cpu")
    assert raises(lambda: y @ x.T, "tensors on cuda and cpu")
    assert raises(lambda: torch.cat([x, y]), "tensors on cuda and cpu")
    assert raises(lambda: F.embedding(torch.tensor([1]), x), "tensors on cuda and cpu")
    assert raises(lambda: y[torch.tensor([0], device="cuda")], "a CPU tensor indexed")
    with torch.inference_mode():
        assert raises(lambda: F.linear(x, y), "tensors on cuda and cpu")

    def put():
        x[torch.tensor([0], device="cuda")] = y[:1]

    assert raises(put, "tensors on cuda and cpu")
    assert raises(lambda: torch.empty(2, device="cuda").normal_(generator=torch.Generator()), "cpu")
    x + torch.tensor(1.0)  # a CPU scalar may be there
    x[torch.tensor([0])]  # and CPU indices


def check_new_memory_holds_poison():
    for t in (torch.empty(3, device="cuda"), cuda(3).new_empty(3), torch.empty_like(cuda(3))):
        assert t.isnan().all().item()
    assert torch.empty(3, dtype=torch.long, device="cuda").tolist() == [-1] * 3


def check_what_has_no_kernel_on_a_cpu_says_so():
    q = cuda(1, 2, 4, 8)
    op = aten._scaled_dot_product_flash_attention
    assert raises(lambda: op(q, q, q), "_scaled_dot_product_flash_attention.default has no CPU")


def check_modules():
    """Tied weights stay tied, and a copy is a copy."""
    model = nn.Module()
    model.one, model.two = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
    model.two.weight = model.one.weight
    for moved in (model.to("cuda"), copy.deepcopy(model.to("cuda"))):
        assert moved.one.weight is moved.two.weight and moved.one.weight.is_cuda
        assert len(list(moved.parameters())) == 1
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.one.weight.mul_(2)
    assert torch.equal(twin.two.weight.cpu(), 2 * model.one.weight.cpu())


def check_gradients():
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    twin = copy.deepcopy(model).to("cuda")
    model(x).square().sum().backward()
    twin(x.to("cuda")).square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters()):
        assert b.grad.is_cuda and torch.equal(a.grad, b.grad.cpu())


# ---- syncs ---------------------------------------------------------------------------------------

# In a file of its own, so that there is a line to name.
ELSEWHERE = """
def look(x):
    y = x * 2
    return y.sum().item()
"""


def check_a_sync_is_counted_at_its_site():
    names = {}
    exec(compile(ELSEWHERE, "/somewhere/elsewhere.py", "exec"), names)
    x = cuda(4)
    assert syncs_of(lambda: [names["look"](x) for _ in range(3)]) == 3
    ((sync, n),) = log.syncs.items()
    assert (sync.site, n) == ("elsewhere.py:4 look", 3)
    assert sync.op == "aten._local_scalar_dense.default"
    assert fakecuda.syncs_within("elsewhere.py look") == 3
    assert fakecuda.syncs_within("check_device.py main") == 3
    assert fakecuda.syncs_as_rows()[0]["count"] == 3


def check_what_is_a_sync():
    x, index = cuda(4, 3), torch.tensor([1, 2], device="cuda")
    waits = {
        "item": lambda: x[0, 0].item(),
        "float": lambda: float(x.sum()),
        "if": lambda: bool((x > 0).any()),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "to cuda": lambda: torch.zeros(3).to("cuda"),
        "tensor": lambda: torch.tensor([1.0, 2.0], device="cuda"),
        "copy_": lambda: x.copy_(torch.zeros(4, 3)),
        "nonzero": lambda: x.nonzero(),
        "mask": lambda: x[x > 0],
        "CPU index": lambda: x[torch.tensor([0])],
        "equal": lambda: torch.equal(x, x),
        "unique": lambda: torch.unique(index),
        "repeats": lambda: torch.repeat_interleave(index),
        "synchronize": lambda: torch.cuda.synchronize(),
    }
    for name, work in waits.items():
        assert syncs_of(work) == 1, (name, log.syncs)
    free = {
        "index": lambda: x[index],
        "slice": lambda: x[1:3].clone(),
        "where": lambda: torch.where(x > 0, x, 0.0),
        "zeros": lambda: torch.zeros(3, device="cuda"),
        "arange": lambda: torch.arange(3, device="cuda"),
        "masked_fill": lambda: x.masked_fill(x > 0, 1.0),
        "repeat": lambda: index.repeat_interleave(3),
        "repeats, told": lambda: torch.repeat_interleave(index, output_size=3),
        "searchsorted": lambda: torch.searchsorted(x[0].sort().values, x[1]),
    }
    for mode in (torch.no_grad, torch.inference_mode):
        for name, work in free.items():
            with mode():
                assert syncs_of(work) == 0, (name, log.syncs)


def check_views_are_no_kernels():
    x = cuda(4, 3)
    log.kernels.clear()
    x.T.unflatten(0, (3, 1))[:, 0, 1:].expand(2, 3, 3)
    assert sum(log.kernels.values()) == 0
    x.add_(1)
    assert log.kernels == {"aten.add_.Tensor": 1}


# ---- graphs --------------------------------------------------------------------------------------


def check_a_replay_computes_anew():
    x, y = cuda(3), torch.zeros(3, device="cuda")
    before = x.cpu()
    graph, _ = captured(lambda: y.copy_(x * 2 + 1))
    assert not y.any().item(), "a capture executes nothing"
    for _ in range(3):
        x.add_(1)
        graph.replay()
        assert torch.equal(y.cpu(), x.cpu() * 2 + 1)
    assert graph.replays == 3 and not torch.equal(before, x.cpu())


def check_a_frozen_host_value_is_seen():
    """A number that Python computed at capture stays what it was then."""
    step = [1]
    y = torch.zeros(1, device="cuda")
    graph, _ = captured(lambda: y.fill_(step[0]))
    step[0] = 2
    graph.replay()
    assert y.item() == 1


def check_a_reassigned_buffer_is_seen():
    """The graph goes on with the memory that it was captured on."""
    holder = nn.Module()
    holder.x = torch.ones(2, device="cuda")
    y = torch.zeros(2, device="cuda")
    graph, _ = captured(lambda: y.copy_(holder.x))
    holder.x = holder.x * 5
    graph.replay()
    assert y.tolist() == [1, 1]

    p = nn.Parameter(torch.ones(2)).to("cuda")
    graph, _ = captured(lambda: y.copy_(p.detach()))
    p.data = p.data * 7  # weights at a new address
    graph.replay()
    assert y.tolist() == [1, 1] and p.tolist() == [7, 7]


def check_what_a_capture_allocated_is_poisoned():
    """A tensor that was made in the capture does not keep what eager code put there later."""
    y = torch.zeros(2, device="cuda")

    def work():
        own = torch.empty(2, device="cuda")
        y.add_(own)
        return own

    graph, own = captured(work)
    own.fill_(1)
    graph.replay()
    assert y.isnan().all().item()


def check_a_sync_in_a_capture_raises():
    x = cuda(3)
    words = "operation not permitted when stream is capturing"
    for mode in ("global", "thread_local", "relaxed"):
        for work in (lambda: x.sum().item(), lambda: x.cpu(), torch.cuda.synchronize):
            assert raises(lambda: captured(work, capture_error_mode=mode), words)  # noqa: B023
    assert raises(lambda: captured(x.clone, capture_error_mode="local"), "capture_error_mode")
    assert raises(lambda: captured(lambda: captured(x.clone)), "inside")
    assert raises(torch.cuda.CUDAGraph().replay, "not captured")
    assert log.capturing is None and x.sum().item() == x.cpu().sum()


def check_capture_error_mode():
    """What another thread does is not captured. That it waits breaks a capture in mode global."""
    x, y = cuda(3), torch.zeros(3, device="cuda")
    errors = []

    def other():
        try:
            x.add_(1)
            x.sum().item()
        except RuntimeError as error:
            errors.append(str(error))

    def work():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        y.copy_(x)

    assert raises(lambda: captured(work), "invalidated")
    assert "another thread captures" in errors.pop()
    for mode in ("thread_local", "relaxed"):
        graph, _ = captured(work, capture_error_mode=mode)
        expected = x.cpu()
        graph.replay()
        assert not errors and torch.equal(y.cpu(), expected) and torch.equal(x.cpu(), expected)


# ---- emulated operators --------------------------------------------------------------------------


def plain_attention(q, k, v, bias=None):
    """-> (outputs, log-sum-exps), in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5
    if bias is not None:
        scores = scores + bias.double()
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def check_efficient_attention():
    op = aten._scaled_dot_product_efficient_attention
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    wide = torch.zeros(2, 3, 5, 8)
    wide[:, :, 1::2, 3:] = float("-inf")
    bias = wide[..., :7]
    on_gpu = [t.to("cuda") for t in (q, k, v)]
    for some_bias in (None, bias):
        gpu_bias = None if some_bias is None else wide.to("cuda")[..., :7]
        y, lse, seed, offset = op(*on_gpu, gpu_bias, True)
        expected, expected_lse = plain_attention(q, k, v, some_bias)
        assert (y.cpu() - expected).abs().max() < 1e-6
        assert y.transpose(1, 2).is_contiguous()
        assert lse.shape == (2, 3, 32) and lse.dtype == torch.float32 and lse.is_cuda
        assert (lse.cpu()[..., :5] - expected_lse).abs().max() < 1e-6
        assert lse[..., 5:].isinf().all().item()
        assert seed.is_cuda and offset.dtype == torch.long and seed.dim() == 0

    # Of 33 queries: 64 rows. In bf16 the log-sum-exps are in fp32 all the same.
    long = cuda(1, 2, 33, 8).bfloat16()
    y, lse, *_ = op(long, long, long, None, True, is_causal=True)
    assert lse.shape == (1, 2, 64) and lse.dtype == torch.float32 and y.dtype == torch.bfloat16
    assert torch.equal(y[:, :, 0].cpu(), long[:, :, 0].cpu())  # it sees itself alone
    assert op(long, long, long, None, False)[1].shape == (1, 2, 0)

    # It is taken by graphs, too.
    result = torch.zeros(2, 3, 5, 8, device="cuda")
    graph, _ = captured(lambda: result.copy_(op(*on_gpu, None, False)[0]))
    graph.replay()
    assert (result.cpu() - plain_attention(q, k, v)[0]).abs().max() < 1e-6


def check_what_efficient_attention_refuses():
    op = aten._scaled_dot_product_efficient_attention
    q, k = cuda(2, 4, 5, 8), cuda(2, 2, 5, 8)
    assert raises(lambda: op(q, k, k, None, True), "no grouped queries")
    double = q.double()
    assert raises(lambda: op(double, double, double, None, True), "Only fp32, half & bf16")
    assert raises(lambda: op(q, q, q, cuda(2, 4, 5, 5), True), "not correctly aligned")
    assert raises(lambda: op(q, q, q, cuda(1, 1, 5, 8)[..., :5], True), "a bias")
    assert raises(lambda: op(q, q.mT.contiguous().mT, q, None, True), "not contiguous")


def check_which_attention_is_taken():
    """The emulated one in fp32 and bf16; matrix products for grouped queries and fp64."""
    name = "aten._scaled_dot_product_efficient_attention.default"

    def takes_it(q, k, **settings):
        log.kernels.clear()
        y = F.scaled_dot_product_attention(q, k, k, **settings)
        reference = F.scaled_dot_product_attention(
            q.detach().cpu(), k.detach().cpu(), k.detach().cpu(), **settings
        )
        bound = 0.05 if q.dtype == torch.bfloat16 else 1e-5
        assert (y.detach().cpu() - reference).abs().max() < bound
        return log.kernels[name] == 1

    q, k = cuda(2, 4, 5, 8), cuda(2, 4, 5, 8)
    assert takes_it(q, k) and takes_it(q, k, is_causal=True)
    assert takes_it(q.bfloat16(), k.bfloat16())
    assert not takes_it(q.double(), k.double())
    assert not takes_it(q, k[:, :2].contiguous(), enable_gqa=True)


def check_attention_has_gradients():
    shapes = (2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)
    on_cpu = [torch.randn(shape, requires_grad=True) for shape in shapes]
    on_gpu = [t.detach().to("cuda").requires_grad_() for t in on_cpu]
    allowed = torch.ones(5, 7, dtype=torch.bool).tril()
    target = torch.randn(2, 4, 5, 8)
    y = F.scaled_dot_product_attention(*on_cpu, attn_mask=allowed)
    (y * target).sum().backward()
    z = F.scaled_dot_product_attention(*on_gpu, attn_mask=allowed.to("cuda"))
    assert "Efficient" in type(z.grad_fn).__name__
    (z * target.to("cuda")).sum().backward()
    for a, b in zip(on_cpu, on_gpu):
        assert (a.grad - b.grad.cpu()).abs().max() < 1e-5


def check_rms_norm_is_one_kernel():
    x, weight = torch.randn(3, 8), torch.randn(8)
    on_gpu = x.to("cuda"), (8,), weight.to("cuda"), 1e-6
    with torch.inference_mode():
        log.kernels.clear()
        y = F.rms_norm(*on_gpu)
        assert log.kernels == {"aten._fused_rms_norm.default": 1}
    assert (y.cpu() - F.rms_norm(x, (8,), weight, 1e-6)).abs().max() < 1e-6


def main():
    checks = {name: work for name, work in globals().items() if name.startswith("check_")}
    failed = 0
    with fakecuda.device():
        for name, work in checks.items():
            try:
                work()
                print("ok    ", name)
            except Exception:
                failed += 1
                print("FAILED", name)
                traceback.print_exc(file=sys.stdout)
    sys.exit(failed > 0)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
