"""What this device can do now: the rates that a run's speed is a share of."""

import time

import torch

from nanorl.runtime import dist


def best(work, tries):
    """Shortest of some runs of work(), in seconds, after one to warm up."""
    times = []
    for _ in range(tries + 1):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def matrix_rate(dtype, device="cpu", n=2048, tries=5):
    """FLOP/s of n x n products."""
    a = torch.randn(n, n, device=device).to(dtype)

    def work():
        a @ a
        dist.synchronize(a.device)

    return 2 * n**3 / best(work, tries)


def copy_rate(device="cpu", n=2**26, tries=5):
    """Bytes read and written a second by copying n fp32 numbers."""
    source = torch.zeros(n, device=device)
    target = torch.zeros(n, device=device)

    def work():
        target.copy_(source)
        dist.synchronize(source.device)

    return 8 * n / best(work, tries)


def device_rates(device, dtype):
    """A quick look: (FLOP/s of matrix products in this precision, bytes/s of copying)."""
    if device.type == "cuda":
        found = matrix_rate(dtype, device, n=8192, tries=10), copy_rate(device, n=2**28)
        torch.cuda.reset_peak_memory_stats(device)  # these buffers are not the run's
        return found
    return matrix_rate(dtype, device, n=1024, tries=10), copy_rate(device, n=2**23)


def machine_rates(device="cpu"):
    """A longer look: large products in fp32 and bf16, and copying (256 MB, on a GPU 1 GB)."""
    on_gpu = torch.device(device).type == "cuda"
    n = 8192 if on_gpu else 2048
    copied = 2**28 if on_gpu else 2**26
    return dict(
        fp32_gflops=round(matrix_rate(torch.float32, device, n) / 1e9),
        bf16_gflops=round(matrix_rate(torch.bfloat16, device, n) / 1e9),
        copy_gb_s=round(copy_rate(device, copied) / 1e9, 1),
    )
