"""Ranks, device and precision.

Every collective is a no-op on one rank, so that no caller branches on the world size.
"""

import contextlib
import errno
import os
import re
import resource
import signal
import socket
import sys
import time
import traceback
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

from nanorl.runtime import background

# The number of the signal that has come, SIGTERM's or Ctrl-C's. False: none has.
_stop = False

# Where the ranks found each other: it serves them as a table of strings too. None: one rank.
_store = None

# Errors of files that are no defect: a full disk, a limit, a file that may not be written.
FILE_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)

# So long ranks wait for each other, at the start and in a collective.
TIMEOUT = timedelta(hours=1)

# For so many seconds a rank looks for a file of rank 0's: some file systems are late to show it.
PATIENCE = 5.0

# For the products of so many shapes a kernel is kept, on a CPU.
KERNELS_KEPT = 32


# ---- start ---------------------------------------------------------------------------------------


def setup(device="auto", exact=False):
    """Join the process group that torchrun describes, if any. Returns this rank's torch.device.

    device: auto, cpu, cuda or cuda:<number>. exact: fp32 products in full precision.

    Raises ValueError for a device that there is not.
    """
    device = _device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Products of fp32 are in TF32, 10 bits of mantissa, as PyTorch's users expect on a GPU.
        torch.set_float32_matmul_precision("high")
        # Sums of bf16 products stay in fp32, also where a kernel splits them.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        # cuDNN plans each new shape anew, for most of a second. RL has new shapes in every step.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        _bound_kernel_caches()
    if exact:
        torch.set_float32_matmul_precision("highest")
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        _join(device)
    return device


def _device(name):
    """--device -> this rank's torch.device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device={name}: it must be auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device={name}: this machine has no CUDA GPU that torch can use; "
            f"--device=cpu runs anywhere"
        )
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(name)


def _bound_kernel_caches():
    """Let oneDNN keep few of the kernels that it makes for each new shape of a bf16 product.

    A step of RL has new shapes, and a kernel takes about a megabyte. oneDNN would keep 1,024, and
    torch's layer above it as many again: 2 GB in a quickstart of bf16. 32 are as fast
    (docs/log.md). Both read these names when they first multiply, so it is not too late here.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(KERNELS_KEPT))


def _join(device):
    """Join the process group that the environment describes, on this rank's device."""
    global _store
    store, number, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    _store = dist.PrefixStore(_name_of_start(store, number, world), store)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        device_id=device if on_gpu else None,
        store=_store,
        rank=number,
        world_size=world,
        timeout=TIMEOUT,
    )


def _name_of_start(store, number, world):
    """-> a name that the ranks which start together have in common, and that no start had before.

    torchrun keeps its store over --max-restarts. Ranks that start again would find the addresses of
    the dead in it, so what they write has this name before it. No count is common to the agents of
    several nodes. So each process leaves a name of its own, and rank 0 gives its own in answer. It
    may answer the dead first, so it goes on until every rank has said that it has heard.

    Raises ValueError where one does not within TIMEOUT.
    """
    own = uuid.uuid4().hex
    if number > 0:
        store.set(f"rank {number} is", own)
        name = store.get(f"answer to {own}").decode()  # waits
        store.set(f"{name} is known to {number}", "")
        return name

    silent, answered = set(range(1, world)), set()
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while silent:
        if time.monotonic() > deadline:
            raise ValueError(
                f"rank {min(silent)} of {world} has not come within {TIMEOUT}: start all"
            )
        for other in sorted(silent):
            if store.check([f"{own} is known to {other}"]):
                silent.remove(other)
            elif store.check([f"rank {other} is"]):
                process = store.get(f"rank {other} is").decode()
                if process not in answered:
                    store.set(f"answer to {process}", own)
                    answered.add(process)
        time.sleep(0.02)
    return own


# ---- stop ----------------------------------------------------------------------------------------


def catch_signals():
    """From now on SIGTERM and Ctrl-C only ask to stop: see stop_requested.

    A second one ends the process at once.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)


def _on_signal(number, _frame):
    global _stop
    if _stop:
        raise KeyboardInterrupt  # a SystemExit would be taken for one of a task's reward
    _stop = number
    print(
        "stopping after this step, with the state saved; again to stop now",
        file=sys.stderr,
        flush=True,
    )


def stop_requested():
    """The number of the signal that any rank got, or 0.

    It is asked once a step, so that all ranks leave together.
    """
    return int(total(_stop, "max"))


def run(main):
    """Run a script's main().

    What is no defect ends it with one line: a user's mistake (ValueError), too little memory, a
    full disk, a rank that is gone. With NANORL_DEBUG=1 the traceback is shown instead.
    """
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal of another encoding shows "?" for what it lacks. It used to end the run.
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except BrokenPipeError:
        # The reader of the output, such as head, has gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(128 + (_stop or signal.SIGINT))
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        line = _one_line(error)
        if line is None or os.environ.get("NANORL_DEBUG"):
            raise
        sys.exit(f"error: {line}")
    finally:
        if dist.is_initialized():
            _leave(sys.exc_info()[1])


def _leave(end):
    """End one of several ranks.

    end: the exception that main() ended with, or None where it has returned.

    The process ends in this function. torch's threads are sometimes still there when the
    interpreter takes its library down. A run that had saved everything then died with SIGABRT (once
    in some thirty). Nor is the process group taken down: that may wait for ranks that sit in a
    collective, up to its timeout, and they for this one.
    """
    # A checkpoint that is being written becomes whole.
    background.wait()

    # Nobody leaves while another rank still waits for it. One that is gone is not waited for.
    if end is None:
        with contextlib.suppress(RuntimeError):
            barrier()

    # As the interpreter does: a defect's traceback and an exit's message go to stderr, and the
    # status is then 1.
    status = getattr(end, "code", 0)
    if end is not None and not isinstance(end, SystemExit):
        traceback.print_exception(end)
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def _one_line(error):
    """What to tell the user, or None: then it is a defect, and its traceback is wanted."""
    if isinstance(error, ValueError):
        return str(error) or None
    if _is_out_of_memory(error):
        return (
            "out of memory: give --device_tokens (training) or --device_rows (sampling) a lower "
            "value than run.json has"
        )
    if _is_lost_rank(error):
        reason = str(error).splitlines()[0][:120]
        return (
            f"rank {rank()} has lost another rank ({reason}): its own message says why; "
            f"started again, the run goes on from its last checkpoint"
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{error}: choose a shorter name, such as another --run_name"
    if isinstance(error, OSError) and error.errno in FILE_TROUBLE:
        return (
            f"{error}: what has been saved stays as it is, and a run goes on from its last "
            f"checkpoint"
        )
    return None


def _is_out_of_memory(error):
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error)  # torch on a CPU


def _is_lost_rank(error):
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    words = "(?i)gloo|nccl|connection (closed|reset)|timed? ?out"
    return re.search(words, str(error)) is not None


# ---- ranks ---------------------------------------------------------------------------------------


def rank():
    """This process's number among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """Whether this is the first rank, which writes and prints."""
    return rank() == 0


def say(*args):
    """print, on the first rank only."""
    if is_main():
        print(*args, flush=True)


def share(n):
    """This rank's slice of n items: contiguous, sizes that differ by at most one."""
    start = n * rank() // world_size()
    stop = n * (rank() + 1) // world_size()
    return slice(start, stop)


# ---- collectives ---------------------------------------------------------------------------------


def total(value, op="sum"):
    """A number summed over ranks. op: sum, max or min."""
    return totals({"": value}, op)[""]


def totals(values, op="sum"):
    """{name: number} -> each summed over ranks, by one collective. op: sum, max or min.

    All ranks must have the same names.
    """
    numbers = [float(value) for value in values.values()]
    if world_size() > 1:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(numbers, dtype=torch.float64, device=device)  # (names,)
        operations = {
            "sum": dist.ReduceOp.SUM,
            "max": dist.ReduceOp.MAX,
            "min": dist.ReduceOp.MIN,
        }
        dist.all_reduce(tensor, operations[op])
        numbers = tensor.tolist()
    return dict(zip(values, numbers))


def gather(items):
    """Each rank's list -> on rank 0 all of them in rank order, elsewhere an empty list."""
    if world_size() == 1:
        return items
    lists = [None] * world_size() if is_main() else None
    dist.gather_object(items, lists)
    if not is_main():
        return []
    return [item for part in lists for item in part]


def gather_numbers(own):
    """Each rank's tensor, of one shape on all -> a list of those of all ranks, on every rank."""
    if world_size() == 1:
        return [own]
    every = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(every, own)
    return every


def broadcast(value):
    """Rank 0's object, on every rank."""
    if world_size() == 1:
        return value
    objects = [value]
    dist.broadcast_object_list(objects)
    return objects[0]


def barrier():
    """Wait until every rank has come to this call."""
    if world_size() > 1:
        dist.barrier()


def wait_for_main():
    """A barrier that rank 0 may come to as late as it likes, for what it does alone.

    A collective would end the others after an hour, and have a GPU spin until then. They ask for a
    note of rank 0's instead. One that is gone is noticed, because the store goes with it, or
    because torchrun ends the others.

    Raises RuntimeError where the store is gone.
    """
    if world_size() == 1:
        return
    note = "rank 0 has come"
    if is_main():
        _store.set(note, "")
    try:
        while not _store.check([note]):
            time.sleep(0.02)
    except dist.DistNetworkError as error:
        raise RuntimeError("connection closed while rank 0 worked alone") from error

    # When all have read the note it goes, and is gone before anybody asks the next time.
    barrier()
    if is_main():
        _store.delete_key(note)
    barrier()


def check_shared(folder):
    """Check that all ranks see one folder: rank 0 makes a file in it, and all look for that.

    Raises ValueError on every rank where one does not see it.
    """
    if world_size() == 1:
        return
    path = os.path.join(folder, broadcast(f".seen_by_all_{uuid.uuid4().hex}"))
    if is_main():
        open(path, "x").close()
    barrier()
    deadline = time.monotonic() + PATIENCE
    while not os.path.exists(path) and time.monotonic() < deadline:
        time.sleep(0.1)

    hosts = [] if os.path.exists(path) else [socket.gethostname()]
    hosts = broadcast(gather(hosts))  # that do not see it
    if is_main():
        os.remove(path)
    if hosts:
        raise ValueError(
            f"{hosts[0]} does not see what rank 0 writes in {folder}, so not all nodes have the "
            "same folder: it must be on a file system that they share; NANORL_OUT=<folder> names "
            "another"
        )


def sum_gradients(params):
    """Sum every parameter's gradient over ranks by one flat all-reduce.

    A rank without a gradient for a parameter contributes zeros.
    """
    if world_size() == 1:
        return
    grads = []
    for p in params:
        grads.append(torch.zeros_like(p) if p.grad is None else p.grad)
    flat = torch.cat([grad.flatten() for grad in grads])  # (numbers of all parameters,)
    dist.all_reduce(flat)
    sizes = [grad.numel() for grad in grads]
    for p, summed in zip(params, flat.split(sizes)):
        p.grad = summed.view_as(p)


# ---- the device ----------------------------------------------------------------------------------


def synchronize(device):
    """Wait for the GPU, so that a clock that is read next is right."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def auto_dtype(device):
    """What --dtype=auto is: bf16 on CUDA and on a CPU that multiplies in bf16, else fp32.

    On such a CPU both halves of a step run 1.4 to 1.8 times as fast in bf16 (docs/results.md).
    """
    fast = device.type == "cuda" or _cpu_has("amx_tile") or _cpu_has("avx512_bf16")
    return "bf16" if fast else "fp32"


def dtypes(name, device):
    """--dtype -> (precision of the weights, precision of the activations).

    Raises ValueError for a name that there is not.
    """
    if name == "auto":
        name = auto_dtype(device)
    table = {
        "fp32": (torch.float32, torch.float32),
        "bf16": (torch.float32, torch.bfloat16),
        "fp64": (torch.float64, torch.float64),
    }
    if name not in table:
        raise ValueError(f"--dtype={name}: it must be auto, fp32, bf16 or fp64")
    return table[name]


def _cpu_has(feature):
    """Whether torch says that the CPU has a feature. It says so of some CPUs only."""
    ask = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return ask() if ask else False


def free_memory(device):
    """Bytes that can still be taken, of the GPU or of the machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    with contextlib.suppress(OSError), open("/proc/meminfo") as f:
        for line in f:
            if line.startswith("MemAvailable"):
                kilobytes = int(line.split()[1])
                return kilobytes * 1024
    # Not on Linux: half of the machine's memory.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def used_memory(device):
    """Bytes in use now: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as f:
            pages = int(f.read().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory(device)


def peak_memory(device):
    """Most bytes in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux also knows it by program: ru_maxrss begins at what the parent process had.
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        for line in f:
            if line.startswith("VmHWM"):
                kilobytes = int(line.split()[1])
                return kilobytes * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
