"""The benchmarks, and the ways in which a task can be answered."""

# {benchmark: tokens that an answer may take}
BENCHMARKS = {
    "gsm8k": 256,
    "mmlu": 16,
    "arc_easy": 16,
    "arc_challenge": 16,
    "humaneval": 384,
    "spelling": 64,
}

# By the likelihood of the labels (multiple choice alone), by the likeliest text, by samples.
WAYS = ("likelihood", "greedy", "sampled")
