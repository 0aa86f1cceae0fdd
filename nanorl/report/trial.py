"""A step of base or SFT tried on a few layers of its model: how long it takes and what it holds.

Layers are alike, so what 1 and 3 of them take tells what all take: time and memory grow by as much
with each. A deep model need not be made for that, nor run as a whole. What is tried changes the
weights: it is for a dry run.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

from nanorl.optim import make_optimizers, update
from nanorl.report import memory
from nanorl.report.cost import learning_flops
from nanorl.runtime import dist

FEW, MORE = 1, 3  # layers that are tried, of a model that has more
SECONDS = 1.0  # about so long may one of the forwards and backwards take, on a CPU
LONG = 5.0  # seconds after which it is not done again
SHARE = 0.3  # of the device's FLOP/s, to choose how many rows that is


@dataclass
class Trial:
    """seconds: of a step on this rank. activations: bytes, of a micro-batch. how: in words."""

    seconds: float
    activations: float
    how: str


def layers_to_try(n_layer):
    """Numbers of layers, of a model of n_layer."""
    return (FEW, MORE) if n_layer > MORE + 1 else (n_layer,)


def try_step(model, trained, loss_of, settings, muon, flop_rate):
    """-> Trial of a step of the model. Of its layers the last of layers_to_try need be there.

    trained: whatever has the named_parameters() that are trained. loss_of(n): a forward over n rows
    of the kind to come. settings: seq_len, batch_tokens, device_tokens. Every rank takes part.
    """
    seq_len, n_layer = settings["seq_len"], model.config.n_layer
    mine = settings["batch_tokens"] / dist.world_size()  # tokens of a step on this rank
    at_once = min(settings["device_tokens"], mine)
    numbers = layers_to_try(n_layer)
    rows = rows_to_try(model, at_once / seq_len, seq_len, flop_rate)

    learning, activations = [], []
    for number in numbers:
        with first_layers(model, number):
            small, large = ((partial(loss_of, n), n * seq_len) for n in (1, 2))
            activations.append(memory.activation_bytes(model, small, large, at_once))
            learning.append(seconds_of(partial(loss_of, rows), model) / (rows * seq_len))
    updating = seconds_of_an_update(trained, muon)  # of one layer
    if muon:
        updating /= dist.world_size()

    seconds = extended(numbers, learning, n_layer) * mine + updating * n_layer
    tried = " and ".join(map(str, numbers))
    plural = "s" if rows > 1 else ""
    how = f"timed on {rows} row{plural} and {tried} of {n_layer} layers"
    return Trial(dist.total(seconds, "max"), extended(numbers, activations, n_layer), how)


@contextmanager
def first_layers(model, number):
    """A model that has only its first layers, for a while."""
    layers, config = model.model.layers, model.config
    model.model.layers, model.config = layers[:number], replace(config, n_layer=number)
    try:
        yield
    finally:
        model.model.layers, model.config = layers, config


def rows_to_try(model, most, seq_len, flop_rate):
    """As many as one micro-batch has, on a CPU no more than SECONDS allow."""
    if model.cos.device.type != "cpu":
        return max(1, int(most))
    config = replace(model.config, n_layer=min(model.config.n_layer, MORE))
    flops = sum(learning_flops(config, seq_len, seq_len**2, seq_len).values())
    return max(1, min(int(most), int(SECONDS * SHARE * flop_rate / flops)))


def seconds_of(forward, model):
    """Of a forward and backward: the shorter of two, since the first backward warms up."""
    seconds = []
    while len(seconds) < 2 and sum(seconds) < LONG:
        dist.synchronize(model.cos.device)
        begun = time.perf_counter()
        forward().backward()
        dist.synchronize(model.cos.device)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def seconds_of_an_update(trained, muon):
    """Of the first layer's weights, which have gradients; the second update, which is warm."""
    named = [(name, p) for name, p in trained.named_parameters() if ".layers.0." in name]
    params = [p for _, p in named]
    gradients = [p.grad for p in params]
    layer = SimpleNamespace(named_parameters=partial(list, named))
    optimizers = make_optimizers(layer, 0.0, 0.0, muon=muon)
    for _ in range(2):
        for p, gradient in zip(params, gradients):
            p.grad = gradient
        begun = time.perf_counter()
        update(optimizers, params, 1.0, 0.0)
        dist.synchronize(params[0].device)
        seconds = time.perf_counter() - begun
    for _, p in trained.named_parameters():
        p.grad = None
    return seconds


def extended(numbers, values, n_layer):
    """Along the line through what a few layers take, to n_layer of them."""
    if len(numbers) == 1:
        return values[0]
    (few, more), (low, high) = numbers, values
    each = max(0.0, high - low) / (more - few)
    return high + (n_layer - more) * each
