"""torch.compile of the blocks: the same gradients, few compilations, and what is needed for it."""

import functools
import shutil
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from conftest import toy_model
from nanorl import compilers, gpt, learner
from nanorl.engine import Engine
from nanorl.lora import LoRA
from scripts import BASE, RL, SFT, call, rows
from test_flex import micro_batch

needs_compiler = pytest.mark.skipif(
    not shutil.which("clang++" if sys.platform == "darwin" else "g++"), reason="no C++ compiler"
)


@pytest.fixture
def compilations():
    """A function: how many graphs have been compiled since the test began."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without its compiler: the graphs run as they are traced. It takes no g++."""
    compile_by = functools.partial(torch.compile, backend="eager")
    gpt.compiled_halves.cache_clear()
    monkeypatch.setattr(torch, "compile", compile_by)
    yield
    gpt.compiled_halves.cache_clear()


def packed_text():
    """inputs, targets, mask, document, positions of two rows with three conversations."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(70, (2, 40), generator=generator)
    document = torch.tensor([[0] * 25 + [1] * 15, [2] * 40])
    positions = torch.tensor([[*range(25), *range(15)], [*range(40)]])
    mask = (torch.rand(2, 40, generator=generator) < 0.5).long()
    return inputs, inputs.roll(-1, 1), mask, document, positions


def results_of_steps(adapted, dtype, recompute=False):
    """The losses and gradients of a step of RL and one of SFT, plain -> and compiled."""
    both = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = toy_model(dtype=dtype)
        model.compiled, model.recompute = compiled, recompute
        trained = LoRA(model, 2, 4.0) if adapted else model
        params = [p for _, p in trained.named_parameters()]
        if adapted:
            # B starts at zero, and then A has no gradient.
            for p in params:
                p.data.normal_(0, 0.1)
            trained.merge()
        batch = micro_batch()
        outputs = learner.forward(model, batch)
        losses = (outputs.logprobs.sum() / 50, learner.chat_loss(model, *packed_text()) / 40)
        found = []
        for loss in losses:
            found += [loss.detach(), *torch.autograd.grad(loss, params)]
        both.append(found)
    return both


def assert_close(plain, compiled, bound):
    for a, b in zip(plain, compiled, strict=True):
        assert (a - b).abs().max() <= bound * max(1, a.abs().max())


@pytest.mark.parametrize(
    "adapted, recompute", [(False, True), pytest.param(True, False, marks=pytest.mark.slow)]
)
def test_traced_blocks_give_the_plain_gradients(adapted, recompute, traced, compilations):
    """RL and SFT, fp64; in one process graphs for one layer serve the others."""
    assert_close(*results_of_steps(adapted, torch.float64, recompute), 1e-12)
    # Two halves, for RL's one row and SFT's two; LoRA's first layer has an input without gradient.
    assert compilations() == (8 if adapted else 4)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("adapted", [False, True])
def test_compiled_blocks_give_the_plain_gradients(dtype, bound, adapted, compilations):
    assert_close(*results_of_steps(adapted, dtype), bound)


def test_the_sampler_runs_plain_blocks(traced, compilations):
    """Also where it reads the very modules that the learner compiles."""
    model = toy_model()
    plain = Engine(model).generate([[1, 2, 3]], 2, 5)
    model.compiled = True
    assert Engine(model).generate([[1, 2, 3]], 2, 5) == plain
    assert compilations() == 0


@pytest.mark.slow
def test_a_run_compiles_once(out, traced, compilations, monkeypatch):
    """Five steps of RL with rows of other lengths, a KL term and the forecast; and SFT's."""
    monkeypatch.setattr(compilers, "check_compiler", lambda device: None)
    run = [*RL, "--run_name=a", "--steps=5", "--kl_coef=0.1"]
    assert call("train_rl.py", *run, "--stage=plain") is None
    assert compilations() == 0
    assert call("train_rl.py", *run, "--stage=compiled", "--compile") is None
    # Two halves, with gradients and for the reference without.
    assert compilations() == 4
    plain, compiled = (rows(out / "a" / stage) for stage in ("plain", "compiled"))
    for one, two in zip(plain[1:], compiled[1:], strict=True):
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-9)
        assert two["reward"] == one["reward"]
    assert (
        call("train_sft.py", *SFT, "--run_name=a", "--stage=more", "--steps=3", "--compile") is None
    )
    # SFT's forecast takes one row, its steps several.
    assert compilations() <= 8


@pytest.mark.parametrize("script, constants", [("base", BASE), ("sft", SFT), ("rl", RL)])
def test_no_compiler(script, constants, out, monkeypatch):
    """One line with the remedies, and before anything is made."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = call(f"train_{script}.py", *constants, "--run_name=none", "--compile")
    assert said.startswith("error: --compile: it takes a C++ compiler") and "\n" not in said
    assert "no-such-compiler" in said and not (out / "none").exists()


def test_what_a_compiler_is(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(compilers.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compilers.os.path, "exists", lambda path: True)
    compilers.check_compiler(cpu)
    monkeypatch.setattr(compilers, "can_compile", lambda: False)
    with pytest.raises(ValueError, match="Triton"):
        compilers.check_compiler(cuda)
    monkeypatch.setattr(compilers, "can_compile", lambda: True)
    compilers.check_compiler(cuda)
    monkeypatch.setattr(compilers.os.path, "exists", lambda path: False)
    with pytest.raises(ValueError, match="Python.h"):
        compilers.check_compiler(cpu)
