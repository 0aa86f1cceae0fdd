"""Ranks, device and precision. Every collective is a no-op on one rank, so no caller branches on the world size."""

import contextlib
import errno
import os
import re
import resource
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

_stop = False  # SIGTERM or Ctrl-C has come


def setup(device="auto", exact=False):
    """Join the process group that torchrun describes, if any. Returns this rank's torch.device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device={device}: it must be auto, cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device={device}: this machine has no CUDA GPU that torch can use; --device=cpu runs anywhere"
        )
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if exact:
        torch.set_float32_matmul_precision("highest")
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        timeout = timedelta(hours=1)
        store, number, world = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            # torchrun keeps its store over --max-restarts, and ranks that start again would find the addresses of the dead in it. (The agents
            # of several nodes count their restarts apart, so there the count is no common name.)
            store = dist.PrefixStore(
                f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
            )
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=number,
            world_size=world,
            timeout=timeout,
        )
    return device


def catch_signals():
    """From here on SIGTERM and Ctrl-C only set what stop_requested() tells; a second one ends the process at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)


def _on_signal(number, frame):
    global _stop
    if _stop:  # the second time: now
        sys.exit(128 + number)
    _stop = number
    print(
        "stopping after this step, with the state saved; again to stop now",
        file=sys.stderr,
        flush=True,
    )


def run(main):
    """Run a script's main(). A user's mistake (ValueError), too little memory and a full disk end it with one line;
    with NANORL_DEBUG=1 the traceback is shown too."""
    try:
        main()
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        line = _one_line(error)
        if line is None or os.environ.get("NANORL_DEBUG"):
            raise
        sys.exit(f"error: {line}")
    finally:
        if dist.is_initialized():
            _leave(sys.exc_info()[1])


def _leave(end):
    """End one of several ranks. Where main() has returned or said how to end, the process ends here and now: torch's threads are sometimes still there
    when the interpreter takes its library down, and a run that had saved everything then died with SIGABRT (once in some thirty)."""
    if end is not None and not isinstance(end, SystemExit):
        dist.destroy_process_group()  # a defect, whose traceback is wanted
        return
    code = getattr(end, "code", 0)
    with contextlib.suppress(RuntimeError):  # a rank that is gone already is not waited for
        if end is None:
            barrier()  # nobody leaves while another still waits for it
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(1 if isinstance(code, str) else code or 0)


def _one_line(error):
    """What to tell the user, or None: then it is a defect, and its traceback is wanted."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(
        error
    ):  # the last: torch on a CPU
        return "out of memory: lower --device_tokens (training) or --device_rows (sampling)"
    if (
        isinstance(error, RuntimeError)
        and world_size() > 1
        and re.search("(?i)gloo|nccl|connection (closed|reset)|timed? ?out", str(error))
    ):
        return f"rank {rank()} has lost another rank ({str(error).splitlines()[0][:120]}): its own message says why; started again, the run goes on from its last checkpoint"
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
    ):
        return f"{error}: what has been saved stays as it is, and a run goes on from its last checkpoint"
    return None


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def say(*args):
    """print, on the first rank only."""
    if is_main():
        print(*args, flush=True)


def share(n):
    """This rank's slice of n items: contiguous, sizes that differ by at most one."""
    start, stop = (n * r // world_size() for r in (rank(), rank() + 1))
    return slice(start, stop)


def total(value, op="sum"):
    """A number summed over ranks (op: sum, max or min)."""
    return totals({"": value}, op)[""]


def totals(values, op="sum"):
    """{name: number} -> each summed over ranks, by one collective. All ranks must have the same names."""
    if world_size() == 1:
        return {name: float(value) for name, value in values.items()}
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    t = torch.tensor(
        [float(value) for value in values.values()], dtype=torch.float64, device=device
    )
    dist.all_reduce(
        t, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op]
    )
    return dict(zip(values, t.tolist()))


def gather(items):
    """Each rank's list -> on rank 0 all of them in rank order, elsewhere an empty list."""
    if world_size() == 1:
        return items
    lists = [None] * world_size() if is_main() else None
    dist.gather_object(items, lists)
    return [x for part in lists for x in part] if is_main() else []


def broadcast(value):
    """Rank 0's object, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def synchronize(device):
    """Wait for the GPU, so that a clock that is read next is right."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def barrier():
    if world_size() > 1:
        dist.barrier()


def sum_gradients(params):
    """Sum every parameter's gradient over ranks by one flat all-reduce. A rank without any contributes zeros."""
    if world_size() == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for p, g in zip(params, flat.split([g.numel() for g in grads])):
        p.grad = g.view_as(p)


def stop_requested():
    """The number of the signal that any rank got, or 0: asked once a step, so that all ranks leave together."""
    return int(total(_stop, "max"))


def dtypes(name, device):
    """--dtype -> (precision of the weights, precision of the activations). auto: bf16 on CUDA and on a CPU that multiplies in
    bf16, which both halves of a step run 1.4 to 1.8 times as fast on (docs/results.md), else fp32."""
    if name == "auto":
        can = lambda what: getattr(torch.cpu, f"_is_{what}_supported", lambda: False)()
        fast = device.type == "cuda" or can("amx_tile") or can("avx512_bf16")
        name = "bf16" if fast else "fp32"
    table = {
        "fp32": (torch.float32, torch.float32),
        "bf16": (torch.float32, torch.bfloat16),
        "fp64": (torch.float64, torch.float64),
    }
    if name not in table:
        raise ValueError(f"--dtype={name}: it must be auto, fp32, bf16 or fp64")
    return table[name]


def free_memory(device):
    """Bytes that can still be taken, of the GPU or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as f:
            return (
                next(int(line.split()[1]) for line in f if line.startswith("MemAvailable")) * 1024
            )
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def used_memory(device):
    """Bytes in use now: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory(device)


def peak_memory(device):
    """Most bytes in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
