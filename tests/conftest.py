"""A toy model, a toy tokenizer and a toy task: small enough for fp64 and exact arithmetic."""
import os
import sys

import pytest
import torch

from nanorl.gpt import GPT, GPTConfig
from nanorl.tokenizer import Tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REAL_DATA, REAL_MODEL = os.environ.get("NANORL_DATA"), os.environ.get("NANORL_MODEL")  # now: tests change them
sys.path.insert(0, ROOT)  # the scripts are modules there
# One thread, here and in the scripts that tests start: for models this small more are slower, and a sum's last bits depend on their number.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def toy_model(vocab=70, seed=0, dtype=torch.float64, **overrides):
    """A random model whose weights are large enough that probabilities are far from uniform."""
    values = dict(vocab_size=vocab, n_layer=2, n_embd=32, n_head=4, n_kv_head=2, head_dim=8, n_inner=48, context=256, qk_norm=True)
    model = GPT(GPTConfig(**{**values, **overrides})).to(dtype)
    model.compute_dtype = dtype
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator).to(dtype) * 0.3 + (p.dim() == 1)
    model.tie()
    return model


@pytest.fixture(scope="session")
def tokenizer():
    text = ["Calculate: 12 + 34 = #46", "user\nassistant\n", "7+5=12 5+5+1=11 the cat sat on the mat"] * 20
    return Tokenizer.train(text, 320)


@pytest.fixture(scope="session")
def real_data():
    """The folder NANORL_DATA names, or a skip: the suite passes without real files and tests more with them."""
    if not REAL_DATA:
        pytest.skip("NANORL_DATA is not set")
    return REAL_DATA


@pytest.fixture(scope="session")
def real_model():
    """The directory of a published chat model that NANORL_MODEL names, or a skip."""
    if not REAL_MODEL:
        pytest.skip("NANORL_MODEL is not set")
    return REAL_MODEL
