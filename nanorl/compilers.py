"""What torch.compile and its kernels need of the machine."""

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig

HEADER = os.path.join(sysconfig.get_path("include"), "Python.h")


@functools.cache
def can_compile():
    """Whether Triton is installed, and what it builds its kernels' launchers with."""
    compilers = (os.environ.get("CC"), "gcc", "clang")
    has_compiler = any(shutil.which(name) for name in compilers if name)
    has_triton = importlib.util.find_spec("triton") is not None
    return has_triton and has_compiler and os.path.exists(HEADER)


def check_compiler(device):
    """Raises ValueError where torch.compile has nothing to build its kernels with."""
    # This is what PyTorch looks for.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cuda" and not can_compile():
        raise ValueError(
            "--compile: on a GPU it takes Triton, a C compiler and Python's headers, and one of "
            "these is not installed: pip install triton, apt install gcc python3-dev, or leave "
            "--compile out"
        )
    if device.type == "cpu" and not (shutil.which(compiler) and os.path.exists(HEADER)):
        raise ValueError(
            f"--compile: it takes a C++ compiler and Python's headers, and {compiler} or {HEADER} "
            "is missing: apt install g++ python3-dev, name another compiler in CXX, or leave "
            "--compile out"
        )
