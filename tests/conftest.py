"""A toy model, a toy tokenizer and a toy task: small enough for fp64 and exact arithmetic."""

import os
import shutil
import sys

import pytest
import torch

from nanorl.gpt import GPT, GPTConfig
from nanorl.tokenizer import Tokenizer
from scripts import BASE, ROOT, SFT, call

REAL_DATA, REAL_MODEL = (
    os.environ.get("NANORL_DATA"),
    os.environ.get("NANORL_MODEL"),
)  # now: tests change them
sys.path.insert(0, ROOT)  # the scripts are modules there
# One thread, here and in the scripts that tests start: for models this small more are slower, and a
# sum's last bits depend on their number.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def toy_model(vocab=70, seed=0, dtype=torch.float64, **overrides):
    """A random model whose weights are large enough that probabilities are far from uniform."""
    values = dict(
        vocab_size=vocab,
        n_layer=2,
        n_embd=32,
        n_head=4,
        n_kv_head=2,
        head_dim=8,
        n_inner=48,
        context=256,
        qk_norm=True,
    )
    model = GPT(GPTConfig(**{**values, **overrides})).to(dtype)
    model.compute_dtype = dtype
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator).to(dtype) * 0.3 + (p.dim() == 1)
    model.tie()
    return model


@pytest.fixture(scope="session")
def tokenizer():
    text = [
        "Calculate: 12 + 34 = #46",
        "user\nassistant\n",
        "7+5=12 5+5+1=11 the cat sat on the mat",
    ] * 20
    return Tokenizer.train(text, 320)


@pytest.fixture(scope="session")
def real_data():
    """The folder that NANORL_DATA names, or a skip. The suite passes without real files."""
    if not REAL_DATA:
        pytest.skip("NANORL_DATA is not set")
    return REAL_DATA


@pytest.fixture(scope="session")
def real_model():
    """The directory of a published chat model that NANORL_MODEL names, or a skip."""
    if not REAL_MODEL:
        pytest.skip("NANORL_MODEL is not set")
    return REAL_MODEL


@pytest.fixture(scope="session")
def first_models(tmp_path_factory):
    """An out/ folder with a base and an SFT model, run a; to be copied, not changed.

    In fp64, so that what tests see of these models does not depend on the processor.
    """
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANORL_OUT", str(folder))
        assert call("train_base.py", *BASE, "--run_name=a", "--steps=6", "--save_every=2") is None
        assert call("train_sft.py", *SFT, "--run_name=a", "--steps=30", "--save_every=10") is None
    return folder


@pytest.fixture(scope="module")
def out(first_models, tmp_path_factory):
    """An out/ folder of the module's own with those models; NANORL_OUT names it."""
    folder = tmp_path_factory.mktemp("out")
    shutil.copytree(first_models, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANORL_OUT", str(folder))
        yield folder
