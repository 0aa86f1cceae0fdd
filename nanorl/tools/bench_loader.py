"""The speed of pretraining's data: `python -m nanorl.tools.bench loader --data='text/*.txt'`.

Text -> token files, as train_base.py makes them, and token files -> batches of a step.
"""

import tempfile
import time
from statistics import median_high

from nanorl.data import tokens
from nanorl.data.corpus import Corpus
from nanorl.gpt import GPTConfig
from nanorl.tasks.cores import cpus

H100_RATE = 150_000  # tokens a second, about what one H100 trains a d20 on
TOKENS_A_PARAMETER = 20  # train_base.py's horizon
ROWS, T = 256, 2048  # of a batch: 524,288 tokens


def measure_loader(options):
    """Tokens/s at which batches come, what text costs before, and hours for the horizon of a d20.

    options: bench.py's constants. The text of `options.data` is tokenized in a folder of its own.
    Raises ValueError where none is named.
    """
    if not options.data:
        raise ValueError("bench loader needs text, some MB of it: --data='folder/*.txt'")
    source = Corpus(options.data)
    with tempfile.TemporaryDirectory() as directory:
        figures = tokenizing_figures(source, directory, options.vocab_size)
        figures.update(loading_figures(directory, options))
    return figures


def tokenizing_figures(source, directory, vocab_size):
    """Megabytes and tokens a second of text -> token files.

    ..._a_core: in CPU seconds of the process, so other work on the machine hardly matters. The
    survey and the tokenizer's training are not in it.
    """
    tokens.train_tokenizer(source, vocab_size, directory)
    wall, cpu = time.perf_counter(), time.process_time()
    index = tokens.tokenize(source, vocab_size, directory)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu

    megabytes = tokens.total(index, "bytes") / 1e6
    made = tokens.total(index, "tokens")
    horizon = TOKENS_A_PARAMETER * GPTConfig.from_depth(20, vocab_size).n_params()[0]
    return dict(
        bytes_a_token=round(1e6 * megabytes / made, 2),
        mb_s_a_core=round(megabytes / cpu, 2),
        tok_s_a_core=round(made / cpu),
        cores=cpus(),
        mb_s=round(megabytes / wall, 2),
        d20_horizon=horizon,
        d20_core_hours=round(horizon * cpu / made / 3600, 2),
    )


def loading_figures(directory, options):
    """Tokens a second of Windows.next(), the median of `options.repeats`, and in H100s."""
    windows = tokens.Windows(directory, "train", T, ROWS)
    rates = []
    for _ in range(options.repeats):
        batches = 0
        begun = time.perf_counter()
        while time.perf_counter() - begun < options.seconds:
            windows.next()
            batches += 1
        rates.append(batches * ROWS * T / (time.perf_counter() - begun))
    rate = median_high(rates)
    return dict(loader_tok_s=round(rate), loader_over_h100=round(rate / H100_RATE, 1))
