"""eval.py as a person runs it: one model, two compared, all tasks, two ranks."""

import io
import json
import os
import shutil
import sys

import pytest

from nanorl.evaluate import words
from nanorl.runtime import checkpoint, results
from nanorl.tasks import TASKS, Problem
from scripts import BASE, ROOT, SFT, TOY, call, finish_ranks, ranks
from toy_task import Toy

# What the toy task is called in file names.
TOY_FILE = TOY.removeprefix("--task=").replace("/", "_").replace(":", "_")
EVAL = ["--device=cpu", "--max_new_tokens=12", "--dtype=fp64"]
FEW = ["--problems=30", "--samples=4", "--sample_problems=8"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(base, SFT): stage directories of two small models that answer differently."""
    folder = tmp_path_factory.mktemp("out")
    patch = pytest.MonkeyPatch()
    patch.setenv("NANORL_OUT", str(folder))
    assert call("train_base.py", *BASE, "--run_name=e", "--documents=200", "--steps=3") is None
    assert call("train_sft.py", *SFT, "--run_name=e", "--steps=20", "--examples=200") is None
    yield folder / "e" / "base", folder / "e" / "sft"
    patch.undo()


def written(stage, name):
    """What eval.py has written for the stage's one or newest checkpoint."""
    text = (sorted(stage.glob("step_*"))[-1] / "eval" / name).read_text()
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def test_a_terminal_of_another_encoding_loses_no_results(models, monkeypatch):
    """What it cannot show becomes "?". A UnicodeEncodeError would be a ValueError."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr("nanorl.evaluate.words.example", "→ {}".format)
    options = ["--problems=2", "--samples=0", "--task=counting", "--max_new_tokens=2"]
    assert call("eval.py", *EVAL, *options, f"--model={models[1]}") is None
    screen.flush()
    assert b"? {" in screen.buffer.getvalue()


def test_results_are_on_disk_before_they_are_printed(models, monkeypatch):
    def no_words(*_):
        raise RuntimeError("no words")

    written_to = []
    monkeypatch.setattr(results, "write", lambda path, name, text: written_to.append(name))
    monkeypatch.setattr(words, "summary_block", no_words)
    options = ["--problems=2", "--samples=0", "--task=counting", "--max_new_tokens=2"]
    with pytest.raises(RuntimeError, match="no words"):
        call("eval.py", *EVAL, *options, f"--model={models[1]}")
    assert written_to == ["counting.jsonl", "summary.json"]


def test_commas_and_a_tilde_in_paths(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(models[0], tmp_path / "ba,se")
    shutil.copytree(models[1], tmp_path / "s,f,t")
    task = tmp_path / "toy,task.py"
    shutil.copy(TOY.removeprefix("--task=").removesuffix(":Toy"), task)
    assert (
        call("eval.py", *EVAL, *FEW, "--compare=~/ba,se,~/s,f,t", "--task=~/toy,task.py:Toy")
        is None
    )
    (found,) = (tmp_path / "s,f,t").glob("step_*/eval/compare*")
    assert json.loads(found.read_text())["a"].startswith(str(tmp_path / "ba,se"))


def test_one_model(models, capsys):
    assert (
        call("eval.py", *EVAL, *FEW, f"--model={models[1]}", "--task=0-20", "--examples=2") is None
    )
    said = capsys.readouterr().out
    assert said.startswith(
        "with 30 problems a greedy accuracy is known to about 16.8 points\n"
    )  # before anything else
    assert (
        "30 problems, " in said
        and "8 problems x 4 at temperature 1, " in said
        and "pass@4" in said
        and said.count("(answer ") == 2
    )
    result, outcomes = written(models[1], "summary.json")["0-20"], written(models[1], "0-20.jsonl")
    assert [len(o["texts"]) for o in outcomes] == [1] * 30 + [4] * 8 and [
        o["temperature"] for o in outcomes
    ] == [0.0] * 30 + [1.0] * 8
    parts = [p for o in outcomes[:30] for p in o["parts"]]
    greedy = result["greedy"]
    assert (
        greedy["format"] == sum(p["format"] for p in parts) / 30 > 0
        and result["sampled"]["format"] < 1
    )
    answered = greedy["answered_given_format"]
    assert f"format {greedy['format']:.1%}, answered given format {answered:.1%}" in said


@pytest.mark.parametrize("tokens, says", [(1, True), (64, False)])
def test_an_evaluation_that_is_mostly_cut_off_says_so(models, capsys, tokens, says):
    few = ["--problems=8", "--samples=0", "--examples=0", f"--max_new_tokens={tokens}"]
    assert call("eval.py", "--device=cpu", *few, f"--model={models[1]}", "--task=0-20") is None
    said = capsys.readouterr().out
    line = "greedy: 100% of the completions are cut off at 1 tokens, so the accuracy says little: "
    assert (line + "give room, --max_new_tokens=4\n" in said) == says
    assert ("the accuracy says little" in said) == says


def test_compare(models, capsys):
    base, sft = models
    assert call("eval.py", *EVAL, *FEW, TOY, f"--compare={base},{sft}", "--examples=0") is None
    said = capsys.readouterr().out
    assert said.startswith(
        "with 30 problems a greedy difference below 26.2 points (if 10% of the answers change) "
        "to 36.2 points (if 50%) will likely not show\n"
    )
    results = [written(stage, "summary.json")[TOY.removeprefix("--task=")] for stage in models]
    both = written(sft, f"compare.{TOY_FILE}.json")
    assert (
        [both["a"], both["b"]] == [r["model"] for r in results]
        and both["a"].startswith(str(base))
        and both["settings"]["samples"] == 4
    )
    greedy, sampled = both["greedy"], both["sampled"]
    assert [greedy["accuracy_a"], greedy["accuracy_b"]] == [
        r["greedy"]["accuracy"] for r in results
    ]
    assert [sampled["accuracy_a"], sampled["accuracy_b"]] == [
        r["sampled"]["accuracy"] for r in results
    ]
    solved = [
        [o["solved"][0] for o in written(stage, f"{TOY_FILE}.jsonl")[:30]] for stage in models
    ]
    assert greedy["only_b"] == sum(b and not a for a, b in zip(*solved)) > 0
    assert (
        greedy["both"] + greedy["only_a"] + greedy["only_b"] + greedy["neither"]
        == greedy["n"]
        == 30
        and sampled["n"] == 8
    )
    assert (
        said.index(both["a"]) < said.index(both["b"]) < said.index(f"only B {greedy['only_b']}")
    )  # each block, then the comparison
    assert greedy["verdict"] in said and sampled["verdict"] in said
    assert not list(base.glob("step_*/eval/compare*"))


def test_a_model_is_no_better_than_itself(models, capsys):
    """With the same keys it gives the same samples, too. The task has 50 problems, not 60."""
    assert (
        call("eval.py", *EVAL, *FEW, TOY, "--problems=60", f"--compare={models[1]},{models[1]}")
        is None
    )
    both = written(models[1], f"compare.{TOY_FILE}.json")
    for kind in ("greedy", "sampled"):
        c = both[kind]
        assert (c["difference"], c["low"], c["high"], c["p"]) == (0, 0, 0, 1)
        assert c["verdict"].startswith("no difference: all ")
    assert 0 < both["sampled"]["accuracy_a"] < 1
    said = capsys.readouterr().out
    assert said.startswith("with 50 problems") and said.count("the same, word for word") == 2


def test_failed_rewards_are_counted_said_and_kept_with_a_reason(models, capsys):
    broken = TOY.replace("Toy", "Broken")
    options = [broken, "--task_args=fails=even", f"--model={models[1]}", "--examples=0"]
    assert call("eval.py", *EVAL, *FEW, *options) is None
    name = TOY_FILE.replace("Toy", "Broken")
    reason = "RuntimeError: no verifier"
    said, outcomes = capsys.readouterr().out, written(models[1], f"{name}.jsonl")
    for way, summary in written(models[1], "summary.json")[broken[7:]].items():
        if way not in ("greedy", "sampled"):
            continue
        of_way = [o for o in outcomes if o["how"] == way]
        errors = [e for o in of_way for e in o.get("errors", []) if e]
        assert [o["index"] for o in of_way if "errors" in o] == list(range(0, len(of_way), 2))
        assert len(errors) == summary["failed"] == {"greedy": 15, "sampled": 16}[way]
        assert set(errors) == {reason} == {summary["failure"]}
        assert f"the task's reward failed on {len(errors)} samples, which count as not" in said
    assert said.count(reason) == 2


def test_an_evaluation_in_which_all_rewards_failed_is_an_error(models, capsys):
    broken = [*EVAL, *FEW, TOY.replace("Toy", "Broken")]
    of_both = f"--compare={models[0]},{models[1]}"
    train = ["--prompts_per_step=2", "--samples_per_prompt=2", "--run_name=broken", "--steps=1"]
    for script, options in [
        ("eval.py", [*broken, f"--model={models[1]}"]),
        ("eval.py", [*broken, of_both]),
        ("train_rl.py", [*EVAL, broken[-1], f"--model={models[1]}", *train]),
    ]:
        end = call(script, *options)
        assert end.startswith("error: ") and "the task's reward failed on all " in end
        assert "no accuracy" in end
        assert end.endswith("reward() (RuntimeError: no verifier)")
    assert "0.0%" not in capsys.readouterr().out


class Long(Toy):
    """Prompts beyond any small model's context."""

    def problem(self, index):
        return Problem([{"role": "user", "content": "word " * 5000}], "even")


class Code(Toy):
    """Like humaneval: it wants allow_code, and has a test split alone."""

    def __init__(self, split="test", allow_code=False):
        if split != "test" or not allow_code:
            raise ValueError(f"split {split}, allow_code {allow_code}")
        super().__init__()


def missing(split):
    raise ValueError("its files are not at hand")


QUICK = {
    name: TASKS[name] for name in ("arithmetic", "0-20", "2-digit", "binary", "spelling")
}  # others take seconds to make


def test_all_tasks(models, capsys, monkeypatch):
    monkeypatch.setattr("nanorl.tasks.TASKS", {"gsm8k": missing, **QUICK, "toy": Toy, "long": Long})
    assert (
        call(
            "eval.py",
            *EVAL,
            f"--model={models[1]}",
            "--task=all",
            "--samples=4",
            "--sample_problems=6",
        )
        is None
    )
    said = capsys.readouterr().out
    result = written(models[1], "all.json")
    assert set(result["tasks"]) == set(QUICK) - {"arithmetic"} | {"toy"}  # arithmetic is sum3
    assert (
        result["skipped"]["gsm8k"] == "its files are not at hand"
        and "do not fit the model's context" in result["skipped"]["long"]
    )
    assert "gsm8k  skipped: its files are not at hand\n" in said
    monkeypatch.setattr("nanorl.tasks.TASKS", {"humaneval": Code, "toy": Toy})
    for allow, skipped in (([], ["humaneval"]), (["--allow_code"], [])):
        assert (
            call(
                "eval.py",
                *EVAL,
                f"--model={models[1]}",
                "--task=all",
                "--samples=4",
                "--sample_problems=6",
                *allow,
            )
            is None
        )
        assert list(written(models[1], "all.json")["skipped"]) == skipped
    fewer = ["--task=all", "--samples=4", "--sample_problems=2", "--allow_code"]
    assert call("eval.py", *EVAL, f"--model={models[1]}", *fewer) is None
    assert written(models[1], "all.json")["tasks"]["toy"]["n"] == 6
    assert written(models[1], "all.sampled2x4.json")["tasks"]["toy"]["n"] == 2
    lines = said.splitlines()
    table = [line for line in lines if line.split()[0] in result["tasks"]]
    assert [line.split()[0] for line in table] == list(result["tasks"])  # every task, once
    dead = [row["dead"] for row in result["tasks"].values()]
    assert dead == sorted(dead) and dead[-1] > 0  # what RL could teach comes first
    assert all(len(line) <= 110 for line in table)
    assert all(
        row["n"] == 6 and row["samples"] == 4 and row["verdict"] in line
        for row, line in zip(result["tasks"].values(), table)
    )


# What a rank runs: eval.py with each list of arguments, on quick tasks, one of which rank 1 lacks.
RANK = """
import json, os, runpy, sys
from nanorl import tasks
from test_eval import QUICK, missing
tasks.TASKS = QUICK | ({"binary": missing} if os.environ["RANK"] == "1" else {})
sys.argv = ["eval.py", *json.loads(sys.argv[1])]
runpy.run_path("eval.py", run_name="__main__")
"""


def test_two_ranks_give_the_results_of_one(models, monkeypatch):
    """With one problem for two ranks, the idle rank takes part in what they do together.

    A task that one rank cannot load is skipped by both.
    """
    for folder in (folder for stage in models for folder in stage.glob("step_*/eval")):
        shutil.rmtree(folder)  # larger evaluations would stay
    few = [*EVAL, "--examples=0", "--samples=2", "--sample_problems=1"]
    runs = [
        [*few, TOY, "--problems=3", f"--compare={models[0]},{models[1]}"],
        [*few, "--task=all", f"--model={models[1]}"],
    ]
    path = os.pathsep.join([ROOT, os.path.join(ROOT, "tests")])
    for arguments in runs:
        with ranks(["-c", RANK, json.dumps(arguments)], PYTHONPATH=path) as processes:
            said = finish_ranks(processes)
        assert said[1] == ""  # the first rank speaks
    names = [f"compare.{TOY_FILE}.json", "all.json"]
    two = [written(models[1], name) for name in names]
    assert list(two[1]["skipped"]) == ["binary"] and "0-20" in two[1]["tasks"]
    monkeypatch.setattr("nanorl.tasks.TASKS", {**QUICK, "binary": missing})
    assert [call("eval.py", *arguments) for arguments in runs] == [None, None]
    assert [written(models[1], name) for name in names] == two


@pytest.mark.parametrize(
    "mistake, words",
    [
        (["--compare=one"], "--compare=one: it takes two model directories, --compare=A,B"),
        (["--compare=one,"], "--compare=one,: it takes two"),
        (["--compare=one,two,three"], "--compare=one,two,three: it takes two"),
        (["--compare=one,two", "--model=three"], "--compare=one,two with --model=three"),
        (["--compare=one,two", "--task=all"], "--compare=one,two with --task=all"),
        (["--compare={sft},nowhere"], "no model in nowhere"),
        (["--task=all", "--samples=1"], "--samples=1"),
        (["--task=all", "--samples=0"], "--samples=0"),
        (["--how=guess"], "--how=guess: it takes some of likelihood, greedy and sampled"),
        (
            ["--task=0-20", "--model={sft}", "--how=likelihood"],
            "in none of these ways 0-20 can be answered",
        ),
        (
            ["--task=benchmarks", "--task_args=a=b"],
            "--task_args=a=b: settings are one task's, --task=benchmarks",
        ),
        (["--task=0-20", "--model={sft}", "--shots=-1"], "--shots=-1"),
        (["--task=0-20", "--model={sft}", "--split=tset"], "split is 'tset'"),
        (["--task=all", "--model={sft}", "--shots=3"], "--task=all with --shots=3"),
        (["--task=all", "--model={sft}", "--how=greedy"], "--task=all with --how=greedy"),
        (["--task=sum3=1,0-20=1", "--model={sft}", "--how=likelihood"], "in none of these ways"),
        (["--task=all", "--temperature=0"], "--temperature=0"),
        (["--task=all", "--task_args=demonstrations=worked"], "--task_args=demonstrations=worked"),
        (["--task=all", "--model={sft}", "--split=tset"], "split is 'tset'"),
        (["--model={sft}", "--task=all", "--device_rows=-1"], "--device_rows=-1"),
    ],
)
def test_a_mistake_gets_one_line(models, capsys, mistake, words):
    message = call("eval.py", *(m.replace("{sft}", str(models[1])) for m in mistake))
    assert isinstance(message, str) and words in message and "\n" not in message
    assert capsys.readouterr().out == ""  # before any work


SIZED = [*EVAL, "--task=binary", "--examples=0", "--sample_problems=3"]


def test_a_smaller_evaluation_replaces_no_larger_one(models, capsys):
    both = f"--compare={models[0]},{models[1]}"
    larger = ["--problems=6", "--samples=2"]
    assert call("eval.py", *SIZED, *larger, both) is None
    names = ("summary.json", "binary.jsonl", "compare.binary.json")
    first = {name: written(models[1], name) for name in names}

    # Fewer problems, and none sampled: it is filed beside, and the person is told.
    capsys.readouterr()
    assert call("eval.py", *SIZED, "--problems=4", "--samples=0", both) is None
    said = capsys.readouterr().out
    assert "binary is on disk from a larger evaluation, which stays; this one is binary.g" in said
    second = {name: written(models[1], name) for name in names}
    beside = second["summary.json"].pop("binary.greedy4x1")
    assert second == first and first["summary.json"]["binary"]["sampled"]["n"] == 3
    assert beside["greedy"]["n"] == 4 == len(written(models[1], "binary.greedy4x1.jsonl"))
    assert written(models[1], "compare.binary.greedy4x1.json")["greedy"]["n"] == 4

    # One that is not smaller takes the name.
    assert call("eval.py", *SIZED, "--problems=7", "--samples=2", both) is None
    assert written(models[1], "summary.json")["binary"]["greedy"]["n"] == 7
    assert written(models[1], "compare.binary.json")["greedy"]["n"] == 7


@pytest.mark.parametrize(
    "new, label",
    [
        ({"greedy": {"n": 9}}, "t.greedy9x1"),
        ({"greedy": {"n": 10}}, "t.greedy10x1"),  # nothing is sampled
        ({"greedy": {"n": 9}, "sampled": {"n": 5, "samples": 4}}, "t.greedy9x1-sampled5x4"),
        ({"greedy": {"n": 10}, "sampled": {"n": 5, "samples": 2}}, "t.greedy10x1-sampled5x2"),
        ({"greedy": {"n": 10}, "sampled": {"n": 5, "samples": 4}}, "t"),
        ({"greedy": {"n": 12}, "sampled": {"n": 6, "samples": 8}, "likelihood": {"n": 1}}, "t"),
    ],
)
def test_which_evaluation_is_smaller(new, label):
    stored = {"greedy": {"n": 10}, "sampled": {"n": 5, "samples": 4}, "settings": {"samples": 8}}
    assert results.label_beside(stored, "t", new) == label
    assert results.label_beside({}, "t", new) == "t"


@pytest.fixture
def read_only(models, monkeypatch):
    """The SFT model, in a folder that cannot be written, as os.access says of such a disk."""
    ask, path = os.access, checkpoint.latest(str(models[1]))
    monkeypatch.setattr(os, "access", lambda p, *a: not str(p).startswith(path) and ask(p, *a))
    return path


def test_a_read_only_models_results_are_kept_in_out(read_only, capsys, tmp_path, monkeypatch):
    os.makedirs(os.path.join(read_only, "eval"), exist_ok=True)
    with open(os.path.join(read_only, "eval", "owners.json"), "w") as f:
        f.write('{"n": 1}')
    before = sorted(os.listdir(os.path.join(read_only, "eval")))
    monkeypatch.setenv("NANORL_OUT", str(tmp_path))
    few = [*EVAL, "--task=0-20", "--problems=2", "--samples=0", f"--model={read_only}"]
    told = f"--after_save=echo {{dir}} > {tmp_path / 'told'}"
    assert call("eval.py", *few, told) is None
    folder = tmp_path / read_only.strip("/").replace("/", "--")
    assert f"the results of {read_only} go to {folder}/eval" in capsys.readouterr().out
    assert "0-20" in json.loads((folder / "eval" / "summary.json").read_text())
    assert (tmp_path / "told").read_text().strip() == str(folder)
    assert sorted(os.listdir(os.path.join(read_only, "eval"))) == before
    # What its owner has left is still found.
    assert results.read(read_only, "owners.json") == {"n": 1}


def test_results_that_cannot_be_written_are_told_before_the_work(read_only, capsys, monkeypatch):
    monkeypatch.setenv("NANORL_OUT", os.path.join(read_only, "out"))
    message = call("eval.py", *EVAL, "--task=0-20", "--problems=2", f"--model={read_only}")
    assert "no results can be written for" in message and "NANORL_OUT=<folder>" in message
    assert capsys.readouterr().out == ""


def test_file_names_are_safe(models):
    assert (
        call(
            "eval.py",
            *EVAL,
            f"--model={models[1]}",
            "--task=sum3=2,0-20=1",
            "--problems=3",
            "--samples=0",
            "--examples=0",
        )
        is None
    )
    assert written(models[1], "summary.json")["sum3=2,0-20=1"]["task"] == "sum3=2,0-20=1"
    assert (
        len(written(models[1], "sum3=2,0-20=1.jsonl"))
        == written(models[1], "summary.json")["sum3=2,0-20=1"]["greedy"]["n"]
    )


@pytest.fixture
def few_files(tmp_path, monkeypatch):
    """NANORL_DATA with a few problems of arc_easy and mmlu.

    It has nothing of the other benchmarks. Spelling needs nothing: it has words of its own.
    """
    from test_choice import write_files

    write_files(tmp_path)
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)  # no hub


BENCH = [
    "--device=cpu",
    "--dtype=fp64",
    "--task=benchmarks",
    "--problems=20",
    "--samples=2",
    "--sample_problems=3",
    "--max_new_tokens=4",
]


def test_benchmarks(models, few_files, capsys):
    assert call("eval.py", *BENCH, f"--model={models[0]}") is None
    said = capsys.readouterr().out
    assert (
        "gsm8k  skipped: data set 'gsm8k'" in said
        and "humaneval  skipped: humaneval runs code that the model writes: --allow_code" in said
    )
    table = said[said.index("benchmark ") :].splitlines()
    rows = [line.split() for line in table[1:-1]]
    assert [row[:2] for row in rows] == [
        [name, kind]
        for name in ("mmlu", "arc_easy")
        for kind in ("likelihood", "greedy", "sampled")
    ] + [["spelling", "greedy"], ["spelling", "sampled"]]
    assert [line for line in table if len(line) > 100] == []
    summary = written(models[0], "summary.json")
    new = ("mmlu", "arc_easy", "spelling")
    assert set(summary) >= set(new)
    arc = summary["arc_easy"]
    assert (
        arc["likelihood"]["n"] == arc["greedy"]["n"] == 4
        and arc["sampled"]["n"] == 3
        and arc["likelihood"]["chance"] == pytest.approx((1 / 3 + 1 / 4 + 1 / 5 + 1 / 4) / 4)
    )
    for name in new:
        outcomes = written(models[0], f"{name}.jsonl")
        for kind in ("likelihood", "greedy", "sampled"):
            some = [o for o in outcomes if o["how"] == kind]
            assert len(some) == summary[name].get(kind, {"n": 0})["n"]
            if some:
                s = summary[name][kind]
                assert s["accuracy"] == pytest.approx(
                    sum(map(sum, (o["solved"] for o in some))) / sum(len(o["solved"]) for o in some)
                )
                assert s["seconds"] > 0 and s["tok_per_s"] > 0 and s["flops"] > 0
    assert all(
        sum(o["logprobs"].values()) < 0
        and o["texts"][0] == max(o["logprobs"], key=o["logprobs"].get)
        for o in written(models[0], "mmlu.jsonl")
        if o["how"] == "likelihood"
    )
    assert (
        call(
            "eval.py",
            *BENCH[:2],
            "--task=0-20",
            "--problems=2",
            "--how=greedy",
            f"--model={models[0]}",
        )
        is None
    )
    assert set(written(models[0], "summary.json")) == {
        *summary,
        "0-20",
    }  # another task's results join those that are there
    assert (
        call(
            "eval.py",
            *BENCH[:2],
            "--task=arc_easy",
            "--shots=2",
            "--how=likelihood",
            f"--model={models[0]}",
        )
        is None
    )
    shown = written(models[0], "arc_easy.2shot.jsonl")
    assert len(shown) == 4 and all(
        len(o["prompt"]) == 5 and o["prompt"][-1] not in o["prompt"][:-1] for o in shown
    )
    after = written(models[0], "summary.json")
    assert (
        after["arc_easy"] == arc
        and after["arc_easy.2shot"]["settings"]["shots"] == 2
        and "greedy" not in after["arc_easy.2shot"]
    )


def test_benchmarks_of_two_models_on_two_ranks(models, few_files, monkeypatch):
    """The likelihoods and all else are those of one rank."""
    arguments = [*BENCH, f"--compare={models[0]},{models[1]}"]
    with ranks(["eval.py", *arguments], HF_HUB_OFFLINE="1") as processes:
        finish_ranks(processes)
    names = [
        "mmlu.jsonl",
        "arc_easy.jsonl",
        "spelling.jsonl",
        "compare.mmlu.json",
        "compare.spelling.json",
    ]
    two = [written(models[1], name) for name in names]
    assert {"likelihood", "greedy", "sampled"} <= set(two[3]) and two[3]["likelihood"]["n"] == 5
    assert call("eval.py", *arguments) is None
    for a, b in zip(two, (written(models[1], name) for name in names)):
        for x, y in zip(a, b) if isinstance(a, list) else [(a, b)]:
            if "logprobs" in x:
                assert list(x.pop("logprobs").values()) == pytest.approx(
                    list(y.pop("logprobs").values()), abs=1e-9
                )
            assert x == y
