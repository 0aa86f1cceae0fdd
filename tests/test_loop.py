"""The loops that join the parts. A slip in a script leaves each part right and the run wrong; here
every such line is held to what it must give, through the scripts themselves."""

import json
import shutil

import pytest
import torch

from nanorl import hf, optim, rollout
from nanorl.data.conversations import read_conversations
from nanorl.data.tokens import Windows
from nanorl.gpt import GPT, GPTConfig
from nanorl.tokenizer import Tokenizer
from nanorl.tools import selfcheck
from scripts import (
    APART,
    BASE,
    RL,
    SFT,
    SPLITS,
    TOY,
    assert_rows_agree,
    assert_same_run,
    call,
    call_on_ranks,
    movement,
    rows,
    step_records,
    trainer_state,
    weights,
)

FILE = TOY.removeprefix("--task=").removesuffix(":Toy")
EVAL = ["eval.py", "--device=cpu", "--examples=0"]


@pytest.fixture
def rl(out):
    """rl(run name, *constants): a short RL run from the SFT model -> its folder out/<run>/rl."""

    def run(name, *constants):
        model = f"--model={out / 'a' / 'sft'}"
        assert call("train_rl.py", *RL, model, f"--run_name={name}", *constants) is None
        return out / name / "rl"

    return run


@pytest.fixture
def sft(out):
    """sft(run name, *constants): a short SFT run from the base model -> its out/<run>/sft."""

    def run(name, *constants):
        model = f"--model={out / 'a' / 'base'}"
        assert call("train_sft.py", *SFT, model, f"--run_name={name}", *constants) is None
        return out / name / "sft"

    return run


def start_of(out, stage):
    """The weights that a run of this stage started from."""
    before, step = {"rl": ("sft", 30), "sft": ("base", 6)}[stage]
    return weights(out / "a" / before, step)


def evaluated(stage, *constants):
    """eval.py's summary and outcomes of a stage's newest checkpoint, on one task."""
    assert call(*EVAL, f"--model={stage}", *constants) is None
    folder = sorted(stage.glob("step_*"))[-1] / "eval"
    (summary,) = json.loads((folder / "summary.json").read_text()).values()
    (file,) = folder.glob("*.jsonl")
    return summary, [json.loads(line) for line in file.read_text().splitlines()]


# ---- the gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_norm", ["token", "sequence", "constant"])
def test_micro_batches_add_up_to_the_step(rl, loss_norm):
    """The denominator is the step's, however many micro-batches it takes."""
    options = ["--steps=2", f"--loss_norm={loss_norm}", "--kl_coef=0.1"]
    whole = rows(rl(f"whole-{loss_norm}", *options))
    parts = rows(rl(f"parts-{loss_norm}", *options, "--device_tokens=64"))
    # A group that is split over two micro-batches has its prompt in both.
    assert_rows_agree(whole, parts, APART | {"flops_causal_total"})
    assert whole[1]["grad_norm"] > 0


def test_sft_and_base_do_not_depend_on_the_micro_batch(sft, out):
    whole, parts = (
        rows(sft(f"whole{tokens}", "--steps=2", f"--device_tokens={tokens}", "--optimizer=adamw"))
        for tokens in (16384, 64)
    )
    assert_rows_agree(whole, parts)
    for tokens in (16384, 64):
        constants = ["--steps=2", "--matrix_lr=0", f"--device_tokens={tokens}", "--sample_tokens=0"]
        assert call("train_base.py", *BASE, f"--run_name=micro{tokens}", *constants) is None
    assert_rows_agree(rows(out / "micro16384" / "base"), rows(out / "micro64" / "base"))


def test_sfts_first_loss_is_that_of_each_conversation_alone(sft, out, tmp_path):
    """Nine conversations in one row: none sees another, and only what the assistant says counts."""
    chats = tmp_path / "chats.jsonl"
    turns = [
        [
            {"role": "user", "content": f"Say {i}"},
            {"role": "assistant", "content": "12" * (1 + i % 3)},
        ]
        for i in range(10)
    ]
    chats.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))
    row = ["--seq_len=256", "--batch_tokens=256", "--steps=1", "--examples=0"]
    run = sft("alone", f"--data={chats}", *row)
    assert rows(run)[-1]["packing"] > 0.5

    start = out / "a" / "base" / "step_000006"
    model = hf.load_model(start, torch.float64)
    model.compute_dtype = torch.float64
    conversations, held_out, _ = read_conversations(
        str(chats), Tokenizer.from_pretrained(start), 256
    )
    assert len(conversations) == 9 and len(held_out) == 1
    loss, said = 0.0, 0
    for example_ids, example_mask in conversations:
        ids, mask = torch.tensor(example_ids).long(), torch.tensor(example_mask)[1:]
        with torch.no_grad():
            logprobs = model(ids[None, :-1])[0].log_softmax(-1)
        loss -= float(logprobs.gather(-1, ids[1:, None])[mask].sum())
        said += int(mask.sum())
    assert rows(run)[-1]["tokens"] == said
    assert rows(run)[-1]["loss"] == pytest.approx(loss / said, rel=1e-10)


@pytest.mark.parametrize("clip", [(0.02, 10.0), (1.0, 0.02)])
def test_a_later_update_has_the_gradient_of_the_clipped_ratio(rl, out, monkeypatch, clip):
    """Before the second update of a step the gradient is that of the naive implementation at the
    weights that the first has made, with the sampler's log-probs as the old ones."""
    seen, gaps = {}, []
    load, generate, update = hf.load_model, rollout.generate, optim.update

    def loading(*arguments):
        seen["policy"] = load(*arguments)
        return seen["policy"]

    def generating(*arguments, **more):
        seen["rollouts"] = generate(*arguments, **more)
        return seen["rollouts"]

    def updating(*arguments):
        settings = json.loads((out / f"clip{clip[0]}" / "rl" / "run.json").read_text())["settings"]
        exact, _, _ = selfcheck.naive(seen["policy"], None, seen["rollouts"], settings)
        named = dict(seen["policy"].named_parameters())
        ours = torch.cat([p.grad.flatten() for p in named.values()])
        naive = torch.cat([exact[name].flatten() for name in named])
        gaps.append(float((ours - naive).norm() / naive.norm()))
        return update(*arguments)

    monkeypatch.setattr("nanorl.policy.load_model", loading)
    monkeypatch.setattr("nanorl.rollout.generate", generating)
    monkeypatch.setattr("nanorl.optim.update", updating)
    options = ["--updates_per_rollout=2", "--steps=1", "--lr=3e-3", "--eval_every=0"]
    row = rows(rl(f"clip{clip[0]}", *options, f"--clip_low={clip[0]}", f"--clip_high={clip[1]}"))[1]
    assert len(gaps) == 2 and max(gaps) < 1e-10
    low, high = row["clip_ratio/low_mean"], row["clip_ratio/high_mean"]
    assert (low > 0.05 and high == 0) if clip[0] < clip[1] else (high > 0.05 and low == 0)


def test_the_samples_come_from_the_weights_that_learn(rl):
    """In bf16 the sampler has a copy of the weights, which every update must renew: without that
    the difference of the log-probs goes from 0.02 to over 1 within three steps."""
    run = rl("renewed", "--dtype=bf16", "--steps=3", "--lr=3e-2", "--eval_every=1")
    assert all(row["logp_diff/mean"] < 0.05 for row in rows(run)[1:])
    assert {p.dtype for p in weights(run, 3).values()} == {torch.float32}  # the masters are not


# ---- the optimizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_goes_on_where_it_was(rl, out, schedule):
    """Resumed from a checkpoint in the middle, as if the process had died after it."""
    options = [f"--lr_schedule={schedule}", "--warmup=2", "--save_every=3"]
    whole = rl(f"whole-{schedule}", *options)
    assert len({row["lr"] for row in rows(whole)[1:]}) > 3  # the steps after the cut differ too
    shutil.copytree(whole, out / f"cut-{schedule}" / "rl")
    shutil.rmtree(out / f"cut-{schedule}" / "rl" / "step_000006")
    assert_same_run(whole, rl(f"cut-{schedule}", *options, "--resume=must"), "step_000006")


def test_a_run_without_momentum_that_keeps_checkpoints(rl, capsys):
    """RMSprop keeps one number a weight. Of the steps between, the even ones stay."""
    run = rl(
        "kept", "--optimizer=rmsprop", "--beta2=0.8", "--steps=7", "--keep=2", "--eval_every=0"
    )
    said = capsys.readouterr().out
    assert "RMSprop 0.001" in said and "--keep=2: beside them 3, " in said
    assert [int(path.name[5:]) for path in sorted(run.glob("step_*"))] == [1, 2, 4, 6, 7]
    (state,) = trainer_state(run, 7)["optimizers"]
    assert state["param_groups"][0]["alpha"] == 0.8
    assert set(state["state"][0]) == {"step", "square_avg"}
    before, after = (run / f"step_00000{step}" / "model.safetensors" for step in (6, 7))
    assert before.read_bytes() != after.read_bytes()


def test_sgd_and_betas_are_refused_where_they_mean_nothing():
    assert "give one too, such as --lr=0.1" in call("train_rl.py", "--optimizer=sgd")
    assert "at least 0 and below 1" in call("train_rl.py", "--beta2=1")
    assert "adamw, rmsprop, sgd" in call("train_rl.py", "--optimizer=muon")


def test_the_first_adamw_step_is_as_long_as_the_rate_says(rl, sft, out):
    """AdamW's first step moves a weight by the rate, whatever its gradient (but for eps, 1e-8): so
    its length shows the rate that was applied, with schedule and warm-up. A norm clipped to far
    below eps makes it short."""
    warm = ["--lr_schedule=linear", "--warmup=4", "--steps=5", "--save_every=1", "--eval_every=0"]
    run = rl("warm", *warm)
    moved = movement(start_of(out, "rl"), weights(run, 1))
    assert rows(run)[1]["lr"] == pytest.approx(1e-3 / 4)
    assert max(moved.values()) == pytest.approx(1e-3 / 4, rel=1e-3)
    moved = movement(start_of(out, "rl"), weights(rl("short", *warm, "--max_grad_norm=1e-10"), 1))
    assert 0 < max(moved.values()) < 0.05 * 1e-3 / 4

    options = ["--optimizer=adamw", "--matrix_lr=1e-3", "--warmup=4", "--steps=5", "--save_every=1"]
    moved = movement(start_of(out, "sft"), weights(sft("warm", *options), 1))
    assert max(moved.values()) == pytest.approx(1e-3 / 4, rel=1e-3)
    moved = movement(
        start_of(out, "sft"), weights(sft("short", *options, "--max_grad_norm=1e-10"), 1)
    )
    assert 0 < max(moved.values()) < 0.05 * 1e-3 / 4

    options = ["--other_lr=1e-3", "--warmup=4", "--steps=5", "--save_every=1", "--sample_tokens=0"]
    for name, more, length in (("warm", [], 1.0), ("short", ["--max_grad_norm=1e-10"], 0.0)):
        assert call("train_base.py", *BASE, f"--run_name={name}", *options, *more) is None
        after = weights(out / name / "base", 1)
        before = dict(initial_model(out / name, 0).named_parameters())
        moved = movement(before, after)["model.norm.weight"]
        assert (
            moved == pytest.approx(length * 1e-3 / 4, rel=1e-3, abs=0.05 * 1e-3 / 4) and moved > 0
        )


def test_the_default_rates_follow_from_the_width(sft, out):
    """The embedding's first step under AdamW: 0.4 / width in SFT, 0.75 / width in base."""
    embedding = "model.embed_tokens.weight"
    run = sft("default-rate", "--warmup=0", "--steps=1")
    moved = movement(start_of(out, "sft"), weights(run, 1))[embedding]
    assert moved == pytest.approx(0.4 / 64, rel=1e-3)
    arguments = ["--run_name=default-rate", "--warmup=0", "--steps=1", "--sample_tokens=0"]
    assert call("train_base.py", *BASE, *arguments) is None
    before = dict(initial_model(out / "default-rate", 0).named_parameters())
    moved = movement(before, weights(out / "default-rate" / "base", 1))
    assert moved[embedding] == pytest.approx(0.75 / 64, rel=1e-3)
    assert call("train_base.py", *BASE, *arguments, "--run_name=still", "--matrix_lr=0") is None
    still = movement(before, weights(out / "still" / "base", 1))
    matrices = [name for name, p in before.items() if p.dim() == 2 and ".layers." in name]
    assert max(moved[name] for name in matrices) > 0 == max(still[name] for name in matrices)
    assert still[embedding] > 0


def initial_model(run, seed):
    """The base model of out/<run> before its first step."""
    tokenizer = Tokenizer.from_pretrained(run / "base" / "tokens")
    config = GPTConfig.from_depth(1, tokenizer.n_tokens)
    model = GPT(config).init_weights(torch.Generator().manual_seed(seed)).double()
    model.compute_dtype = torch.float64
    return model


def test_decay_shrinks_the_blocks_matrices_and_nothing_else(rl, out):
    """By lr * decay of themselves, on top of the same step without it."""
    options = ["--steps=1", "--eval_every=0"]
    plain = weights(rl("undecayed", *options), 1)
    decayed = weights(rl("decayed", *options, "--weight_decay=0.1"), 1)
    for name, before in start_of(out, "rl").items():
        shrinks = before.dim() == 2 and ".layers." in name
        expected = -1e-3 * 0.1 * before.double() if shrinks else torch.zeros_like(before.double())
        assert (decayed[name] - plain[name] - expected).abs().max() < 1e-12, name
        assert not shrinks or expected.abs().max() > 1e-6


def test_a_group_without_signal_brings_no_decay_either(rl, out):
    """A model that solves nothing gets no gradient, and nothing at all changes: no momentum, no
    decay (which acts where there is signal: the test above)."""
    run = rl("hard", "--task=chain4", "--steps=2", "--weight_decay=0.1")
    assert [row["updated"] for row in rows(run)[1:]] == [0.0, 0.0]
    assert max(movement(start_of(out, "rl"), weights(run, 2)).values()) == 0


def test_loras_default_rate_is_ten_times_the_weights(rl, sft, out, capsys):
    """As printed, and as applied: B starts at zero, so after AdamW's first step it is the rate."""
    lora = ["--lora_rank=2", "--steps=1", "--eval_every=0"]
    run = rl("lora-rate", *lora, "--lr=0")
    assert "AdamW 0.00625; 1 steps" in capsys.readouterr().out  # 10 * 0.04 / 64
    b = [p for name, p in trainer_state(run, 1)["lora"].items() if "lora_B" in name]
    assert max(float(p.abs().max()) for p in b) == pytest.approx(0.00625, rel=1e-3)
    run = sft("lora-rate", *lora, "--warmup=0")
    assert "AdamW 0.0002 on adapters of rank 2" in capsys.readouterr().out  # 10 * 2e-5
    b = [p for name, p in trainer_state(run, 1)["lora"].items() if "lora_B" in name]
    assert max(float(p.abs().max()) for p in b) == pytest.approx(2e-4, rel=1e-3)


# ---- seeds ---------------------------------------------------------------------------------------


def completions(run, step):
    return [r["completion"] for r in step_records(run.parent, step)]


def prompts(run, step):
    """The step's problems in their order, one a group."""
    return [r["prompt"] for r in step_records(run.parent, step) if r["sample"] == 0]


def test_the_seed_fixes_the_problems_and_the_samples(rl):
    """One problem leaves nothing to order, so only the samples can differ; many, the order too."""
    options = ["--steps=1", "--eval_every=0", "--probe_prompts=1"]
    one = ["--problems=1", "--prompts_per_step=1"]
    a, b = (rl(f"one-{seed}", *options, *one, f"--seed={seed}") for seed in (0, 1))
    assert prompts(a, 1) == prompts(b, 1) and completions(a, 1) != completions(b, 1)
    a, b = (rl(f"many-{seed}", *options, f"--seed={seed}") for seed in (0, 1))
    assert prompts(a, 1) != prompts(b, 1)


def test_each_problem_and_each_step_has_random_numbers_of_its_own(rl):
    options = [TOY.replace("Toy", "Same"), "--steps=2", "--eval_every=0", "--lr=1e-9"]
    run = rl("same", *options)
    groups = [tuple(completions(run, step)[i : i + 4]) for step in (1, 2) for i in range(0, 16, 4)]
    assert len(set(prompts(run, 1))) == 1 and len(set(groups)) == 8


def test_every_pass_has_an_order_of_its_own(rl):
    run = rl("passes", "--problems=8", "--steps=4", "--eval_every=0")
    first, second = (prompts(run, step) + prompts(run, step + 1) for step in (1, 3))
    assert sorted(first) == sorted(second) and len(set(first)) == 8 and first != second


def test_sfts_seed_fixes_the_order_of_the_examples_and_loras_first_weights(sft):
    """With B at zero the first loss is the base model's: it differs by the examples alone. And A
    has no gradient yet."""
    options = ["--lora_rank=2", "--steps=1"]
    runs = [sft(f"seed-{seed}", *options, f"--seed={seed}") for seed in (0, 1)]
    assert rows(runs[0])[-1]["loss"] != pytest.approx(rows(runs[1])[-1]["loss"], rel=1e-4)
    states = [trainer_state(run, 1)["lora"] for run in runs]
    assert not any(
        torch.equal(p, states[1][name]) for name, p in states[0].items() if "lora_A" in name
    )


def test_bases_seed_fixes_the_weights_and_the_data(out):
    """The first loss, from a model and windows that are made here for that seed."""
    arguments = [*BASE, "--run_name=seeded", "--seed=3", "--steps=1", "--sample_tokens=0"]
    assert call("train_base.py", *arguments) is None
    model = initial_model(out / "seeded", seed=3)
    inputs, targets = Windows(out / "seeded" / "base" / "tokens", "train", 64, 8, seed=3).next()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert rows(out / "seeded" / "base")[0]["loss"] == pytest.approx(float(loss), rel=1e-10)


def test_evals_seed_fixes_the_samples_and_each_problem_has_its_own(rl):
    run = rl("seeded", "--steps=1", "--eval_every=0")
    options = [TOY.replace("Toy", "Same"), "--dtype=fp64", "--problems=2", "--sample_problems=2"]
    said = {}
    for seed in (0, 1):
        _, outcomes = evaluated(run, *options, "--max_new_tokens=12", f"--seed={seed}")
        said[seed] = [tuple(o["texts"]) for o in outcomes if o["how"] == "sampled"]
    assert len({*said[0], *said[1]}) == 4  # of two problems with one prompt, under two seeds


def test_evals_temperature_is_the_one_asked_for(rl):
    """Near 0 each sample is the greedy answer."""
    run = rl("cold", "--steps=1", "--eval_every=0")
    options = [TOY, "--dtype=fp64", "--problems=3", "--sample_problems=3", "--max_new_tokens=12"]
    _, outcomes = evaluated(run, *options, "--temperature=0.001")
    greedy, sampled = (
        [o["texts"] for o in outcomes if o["how"] == way] for way in ("greedy", "sampled")
    )
    assert sampled == [texts * 8 for texts in greedy]


# ---- splits --------------------------------------------------------------------------------------


def test_training_validates_on_val(rl, sft):
    """Where everything said in val earns -0.5 and in train -1."""
    run = rl("splits", SPLITS, "--steps=2")
    assert [row["reward"] for row in rows(run)[1:]] == [-1, -1]
    assert [row["val/reward"] for row in (rows(run)[0], rows(run)[2])] == [-0.5, -0.5]
    run = sft("splits", SPLITS, "--steps=1", "--eval_problems=5")
    assert [row["val/reward"] for row in rows(run)] == [-0.5, -0.5]


@pytest.mark.parametrize("split, others", [("val", "train"), ("test", "train")])
def test_eval_takes_the_split_that_it_is_asked_for_and_shows_problems_of_train(
    rl, out, split, others
):
    run = rl(f"shown-{split}", "--steps=1", "--eval_every=0")
    options = [SPLITS, f"--split={split}", "--problems=3", "--samples=0", "--shots=2"]
    summary, outcomes = evaluated(run, *options, "--max_new_tokens=2")
    assert (
        summary["split"] == split
        and summary["greedy"]["reward"] == {"val": -0.5, "test": -0.25}[split]
    )
    for outcome in outcomes:
        asked = [turn["content"].split()[0] for turn in outcome["prompt"] if turn["role"] == "user"]
        assert asked == [others, others, split]


def assert_same_figures(row, greedy):
    """A row's val/* are the figures of eval.py."""
    for name in ("accuracy", "low", "high", "n", "reward", "length", "clipped"):
        assert row[f"val/{name}"] == greedy[name], name


def test_the_last_validation_is_evals_greedy_one(rl, sft, capsys):
    """Of RL in fp64, and of SFT in bf16, where the sampler has a copy of the weights to renew."""
    run = rl("held-out", "--steps=3")
    options = [TOY, "--problems=10", "--samples=0", "--max_new_tokens=12"]
    summary, _ = evaluated(run, *options, "--dtype=fp64")
    assert_same_figures(rows(run)[-1], summary["greedy"])
    assert rows(run)[-1]["completions/mean_length"] != rows(run)[-1]["val/length"]  # samples differ
    answers = ["--eval_problems=10", "--eval_new_tokens=12", f"--model={run}"]
    run = sft("held-out", TOY, "--dtype=bf16", "--steps=20", *answers)
    summary, _ = evaluated(run, *options, "--dtype=bf16")
    first, *_, last = rows(run)
    assert_same_figures(last, summary["greedy"])
    assert first["val/length"] != last["val/length"]  # the answers have changed


# ---- checkpoints ---------------------------------------------------------------------------------


def test_the_best_checkpoint_is_kept_and_known_also_after_a_resume(rl):
    """The third step's rewards are 5 higher than all others, by a curriculum."""
    better = TOY.removeprefix("--task=").replace("Toy", "Better")
    plain = TOY.removeprefix("--task=")
    task = f"--task={plain} until 2; {better} until 3; {plain}"
    rl("best", task, "--steps=5", "--eval_every=0")
    run = rl("best", task, "--steps=8", "--eval_every=0", "--resume=must")
    rewards = {row["step"]: row["reward"] for row in rows(run)[1:]}
    assert max(rewards, key=rewards.get) == 3
    kept = sorted(path.name for path in run.glob("step_*"))
    assert kept == [f"step_{step:06d}" for step in (1, 3, 7, 8)]
    assert trainer_state(run, 8)["best"] == {"step": 3, "reward": rewards[3]}


def test_how_many_rows_fit_is_found_once(rl, monkeypatch):
    """And kept when the run goes on, where there is more or less memory."""
    options = ["--device_rows=0", "--eval_every=0"]
    rl("fits", *options, "--steps=1")
    monkeypatch.setattr("nanorl.runtime.dist.free_memory", lambda _: 2**40)
    run = rl("fits", *options, "--steps=2", "--resume=must")
    kept = [trainer_state(run, step)["device_rows"] for step in (1, 2)]
    other = trainer_state(rl("terabyte", *options, "--steps=1"), 1)["device_rows"]
    assert kept[0] == kept[1] < other


@pytest.mark.parametrize("script", ["train_base.py", "train_sft.py", "train_rl.py"])
def test_how_many_tokens_fit_is_found_once(script, out, monkeypatch, capsys):
    """A run goes on with as many, also elsewhere, and learns in micro-batches of so many."""
    stage = script.removeprefix("train_").removesuffix(".py")
    start = {
        "base": [*BASE, "--sample_tokens=0"],
        "sft": [*SFT, f"--model={out / 'a' / 'base'}"],
        "rl": [*RL, f"--model={out / 'a' / 'sft'}"],
    }
    run = [script, *start[stage], "--run_name=tokens", "--device_tokens=0"]
    on_cpu = [*run, "--steps=1", "--run_name=tokens-cpu"]
    assert call(*on_cpu) is None
    assert trainer_state(out / "tokens-cpu" / stage, 1)["settings"]["device_tokens"] == 16384

    monkeypatch.setattr("nanorl.report.sizes.on_a_gpu", lambda device: True)
    monkeypatch.setattr("nanorl.report.memory.tokens_that_fit", lambda *_: 512)
    assert call(*run, "--steps=1") is None
    monkeypatch.setattr("nanorl.report.memory.tokens_that_fit", lambda *_: 1024)
    assert call(*run, "--steps=2", "--resume=must") is None
    assert "with other constants: steps: 1 -> 2\n" in capsys.readouterr().out
    for step in (1, 2):
        assert trainer_state(out / "tokens" / stage, step)["settings"]["device_tokens"] == 512


@pytest.mark.parametrize("script", ["train_sft.py", "train_base.py"])
def test_sft_and_base_stop_when_no_gradient_is_finite(script, out):
    """After a step of a rate that leaves no number: two more are tried, as --max_bad_steps says."""
    name, more = "--run_name=ruined", ["--max_bad_steps=2", "--warmup=0", "--steps=50"]
    if script == "train_sft.py":
        start = [*SFT, f"--model={out / 'a' / 'base'}", "--optimizer=adamw", "--matrix_lr=1e300"]
    else:
        start = [*BASE, "--other_lr=1e300", "--sample_tokens=0"]
    message = call(script, *start, name, *more)
    assert "in 2 steps in a row updates were skipped" in message and "\n" not in message
    stage = "sft" if script == "train_sft.py" else "base"
    found = rows(out / "ruined" / stage)
    assert [row["bad_steps"] for row in found] == [0, 1, 2]
    assert trainer_state(out / "ruined" / stage, 3)["bad"] == 2


def test_weights_that_are_not_finite_are_not_saved(out):
    """AdamW at a rate that fp32 has no number for: the first step ruins the model."""
    start = [*SFT, f"--model={out / 'a' / 'base'}", "--dtype=fp32", "--warmup=0", "--steps=1"]
    message = call(
        "train_sft.py", *start, "--run_name=no-number", "--optimizer=adamw", "--matrix_lr=1e300"
    )
    assert "step 1 is not saved in" in message and "not finite" in message
    assert not list((out / "no-number" / "sft").glob("*step_*"))


def test_a_run_that_ends_in_skipped_updates_says_so(out, capsys):
    start = [*SFT, f"--model={out / 'a' / 'base'}", "--optimizer=adamw", "--matrix_lr=1e300"]
    assert call("train_sft.py", *start, "--run_name=skips", "--warmup=0", "--steps=3") is None
    said = capsys.readouterr().out
    assert "WARNING: the last 2 steps changed nothing, because the gradient was not finite" in said


# ---- ranks ---------------------------------------------------------------------------------------


def test_sft_and_base_on_three_ranks_are_those_of_one(out, tmp_path):
    """Loss, gradient, validation and weights: no rank sees another's rows, and all count.

    Eight rows a step divide neither by three ranks nor, on two of them, by micro-batches of two.
    """
    chats = tmp_path / "chats.jsonl"
    turns = [
        [
            {"role": "user", "content": f"Say {i}"},
            {"role": "assistant", "content": "1" * (1 + i % 9)},
        ]
        for i in range(300)
    ]
    chats.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))
    few = ["--steps=3", "--save_every=0", "--device_tokens=128"]
    base = [*BASE, *few, "--sample_tokens=0", "--eval_every=2"]
    start = [f"--model={out / 'a' / 'base'}", "--optimizer=adamw", "--eval_every=2"]
    runs = {
        "task": [
            "train_sft.py",
            *SFT,
            *few,
            *start,
            TOY,
            "--eval_problems=5",
            "--eval_new_tokens=6",
        ],
        "chats": ["train_sft.py", *SFT, *few, *start, f"--data={chats}", "--optimizer=muon"],
        "mixture": ["train_sft.py", *SFT, *few, *start, f"--data={chats}=2, 0-20=1"],
        "text": ["train_base.py", *base],
    }
    calls = ([*arguments, f"--run_name=three-{name}"] for name, arguments in runs.items())
    call_on_ranks(*calls, n=3)
    for name, arguments in runs.items():
        assert call(*arguments, f"--run_name=one-{name}") is None
        stage = arguments[0].removeprefix("train_").removesuffix(".py")
        one, three = (out / f"{ranks}-{name}" / stage for ranks in ("one", "three"))
        assert_rows_agree(rows(one), rows(three))
        assert any("val/" in key for key in rows(one)[-1])
        assert max(movement(weights(one, 3), weights(three, 3)).values()) < 1e-9
