"""What the parts of the check share: sizes, how a result is told, how a GPU is watched."""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from statistics import median_high
from types import SimpleNamespace

import torch

from nanorl.report.rates import device_rates
from nanorl.rollout import Rollout
from nanorl.runtime import dist
from nanorl.sampling import Completion
from nanorl.tools import bench

TINY = "--tiny" in sys.argv  # small sizes, for a CPU
ON_GPU = torch.cuda.is_available()

# The sizes that are measured, under the names that they have on a GPU.
D12, D20 = (1, 2) if TINY else (12, 20)
FEW_ROWS, MANY_ROWS = (8, 16) if TINY else (256, 1024)
SAMPLES = 4 if TINY else 16
PROMPT_TOKENS, NEW_TOKENS = (12, 24) if TINY else (128, 256)
VOCABULARY = 512 if TINY else 32768


# ---- results -------------------------------------------------------------------------------------


def folder():
    """Where the results go: gpu_check.py has made it and named it."""
    return os.environ.get("GPU_CHECK_FOLDER", tempfile.gettempdir())


def tell(part, **values):
    """One result: a line on the console, and one in the part's file."""
    line = json.dumps(values)
    print(f"{part}: {line}", flush=True)
    with open(os.path.join(folder(), f"{part}.jsonl"), "a", encoding="utf-8") as f:
        f.write(line + "\n")


# ---- what is measured ----------------------------------------------------------------------------


def options(depth, rows=FEW_ROWS, dtype="auto"):
    """What nanorl/tools/bench.py wants to know: its constants, of a random model."""
    return SimpleNamespace(
        model="",
        depth=depth,
        vocab_size=VOCABULARY,
        dtype=dtype,
        device="auto",
        prompts=rows // SAMPLES,
        samples=SAMPLES,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        stops=0.0,
        device_rows=0,
        device_tokens=16384,
        naive_rows=1,  # the obvious way is not measured
    )


@torch.no_grad()
def randomize(model):
    """Every matrix random. Some start at zero, which hides errors and saves a GPU power."""
    torch.manual_seed(0)
    for p in model.parameters():
        if p.dim() == 2:
            p.normal_(0, 0.02)


def exact_model(device):
    """A small model in fp32 with random matrices, for answers that a CPU and a GPU share."""
    chosen = options(1 if TINY else 4, dtype="fp32")
    chosen.vocab_size = 512
    model = bench.make_model(chosen, device)
    randomize(model)
    return model


def random_rollouts(P, G, prompt_tokens, new_tokens):
    """P Rollouts of G random completions. Prompts and completions have at most so many tokens."""
    rng = random.Random(0)
    rollouts = []
    for _ in range(P):
        prompt = random_ids(rng, rng.randint(prompt_tokens // 2, prompt_tokens))
        completions = []
        for _ in range(G):
            ids = random_ids(rng, rng.randint(new_tokens // 4, new_tokens))
            completions.append(Completion(ids, [-1.0] * len(ids), True))
        rollouts.append(Rollout(None, prompt, completions, None, None, None))
    return rollouts


def random_ids(rng, n):
    return [rng.randrange(100) for _ in range(n)]


# ---- time, rates, memory -------------------------------------------------------------------------


def start():
    """-> this part's device, set up as the training scripts set it up."""
    return dist.setup("auto")


def rates(device):
    """-> (FLOP/s of matrix products in the precision of the activations, bytes/s of copying)."""
    _, compute_dtype = dist.dtypes("auto", device)
    return device_rates(device, compute_dtype)


def median_seconds(work, device, tries):
    """The median of some runs of work()."""
    times = []
    for _ in range(tries):
        seconds, _ = bench.timed(work, device)
        times.append(seconds)
    return median_high(times)


def free_memory():
    """Give the memory of models that are no longer in use back, and count its peak anew."""
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks():
    """-> {allocated_gb, reserved_gb}: the most of the GPU's memory that this process had."""
    if not ON_GPU:
        return dict(allocated_gb=None, reserved_gb=None)
    return dict(
        allocated_gb=torch.cuda.max_memory_allocated() / 1e9,
        reserved_gb=torch.cuda.max_memory_reserved() / 1e9,
    )


# ---- kernels -------------------------------------------------------------------------------------


def kernels_of(work):
    """-> (name, microseconds) of each kernel that work() runs on the GPU.

    Copies count as kernels. Empty on a CPU, and where torch cannot see kernels (without CUPTI).
    """
    activities = {torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA}
    if not ON_GPU or not activities <= torch.profiler.supported_activities():
        work()
        return []
    with torch.profiler.profile(activities=activities) as found:
        work()
        torch.cuda.synchronize()
    return on_gpu(found.events())


def on_gpu(events):
    """Events of a profile -> (name, microseconds) of those that ran on the GPU."""
    kernels = []
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            kernels.append((event.name, event.time_range.elapsed_us()))
    return kernels


# ---- nvidia-smi ----------------------------------------------------------------------------------

WATCHED = "utilization.gpu,power.draw,memory.used"


class Watch:
    """`with Watch() as watch:` looks twice a second at what the GPU does; then watch.means()."""

    def __enter__(self):
        self.file = tempfile.TemporaryFile("w+")
        command = ["nvidia-smi", f"--query-gpu={WATCHED}", "--format=csv,noheader,nounits"]
        self.process = None
        with contextlib.suppress(OSError):
            self.process = subprocess.Popen([*command, "-lms", "500"], stdout=self.file)
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.terminate()
            self.process.wait()

    def means(self):
        """-> {utilisation, watts, used_gb}: two means and a maximum; None where nothing is told."""
        self.file.seek(0)
        looks = []
        for line in self.file:
            # A GPU that does not tell says [N/A], and the last line may be cut off.
            with contextlib.suppress(ValueError):
                utilisation, watts, mebibytes = map(float, line.split(","))
                looks.append((utilisation, watts, mebibytes))
        if not looks:
            return dict(utilisation=None, watts=None, used_gb=None)
        utilisation, watts, mebibytes = zip(*looks)
        return dict(
            utilisation=sum(utilisation) / len(looks) / 100,
            watts=sum(watts) / len(looks),
            used_gb=max(mebibytes) * 2**20 / 1e9,
        )
