"""A run as a page, in the terminal and as a picture: what is said, in which unit, and safely."""

import base64
import gzip
import json
import os
import re
from types import SimpleNamespace

import pytest

from nanorl.report import charts, embed, gather, page, text, verdict
from nanorl.runtime.log import RunLog, write_records
from nanorl.tools import figure, report
from scripts import RL, call

# What a model may write: markup, an end of the script, characters that steer a line, half of a
# surrogate pair, a very long line.
NASTY = [
    "<script>document.title = 'taken'</script>",
    "</script><img src=x onerror=\"document.title='taken'\">{{data}}",
    "\u202eright to left\u2069 \x1b[31m red \x00 \u200b",
    "\ud83d half of a pair",
    "a" * 30_000,
]


def rows(accuracies, steps=20, **more):
    """Rows of an RL run whose held-out accuracies are these, evenly apart, of 400 problems."""
    found = []
    every = steps // (len(accuracies) - 1)
    for step in range(steps + 1):
        row = {"step": step}
        if step:
            row.update({"reward": -0.5, "solved": 0.25, "frac_reward_zero_std": 0.5})
            row.update({"tokens": 80, "tokens_with_signal": 0.75, "time/step": 2.0})
            row.update({"completions/mean_length": 10.0, "entropy": 0.3, "flops_total": 5e9 * step})
            row.update({"completions/clipped_ratio": 0.0, "grad_norm": 0.1, **more})
        if step % every == 0:
            accuracy = accuracies[step // every]
            row.update({"val/accuracy": accuracy, "val/n": 400, "val/length": 9.0 + step})
            row.update({"val/low": accuracy - 0.04, "val/high": accuracy + 0.04})
        found.append(row)
    return found


def write_run(folder, made=None, settings=(), texts=(), tokenizer=None, name="rl"):
    """A run's folder with one stage -> the stage's folder."""
    log = RunLog(str(folder / name))
    given = {"steps": 20, "samples_per_prompt": 4, "prompts_per_step": 2, "task": "toy"}
    card = {"settings": {**given, **dict(settings)}, "params": 1_400_000, "train_problems": 8}
    (folder / name / "run.json").write_text(json.dumps(card))
    for row in made or rows([0.2, 0.9]):
        log.row(**row)
    for step in (1, 2, 3) if texts else ():
        log.rollouts(step, samples(step, texts, tokenizer))
    if tokenizer:
        os.makedirs(folder / name / "step_000003")
        tokenizer.save(str(folder / name / "step_000003"))
        (folder / name / "step_000003" / "DONE").write_text("whole")
    return folder / name


def samples(step, texts, tokenizer=None):
    """A group of records of these texts and one of plain ones; with token values if it can be."""
    for group, words in enumerate([list(texts), ["a", "bb"]]):
        for sample, completion in enumerate(words):
            record = {
                "step": step,
                "group": group,
                "sample": sample,
                "prompt": f"Q{group} {texts[0]}",
            }
            record.update(answer="7", completion=completion, reward=float(sample), parts={})
            record.update(advantage=sample - 0.5, tokens=len(completion), finish="stop")
            if tokenizer and group:
                ids = tokenizer.encode("7+5=12")
                record.update(ids=ids, logprobs=[-0.5] * len(ids), entropies=[1.5] * len(ids))
            yield record


# ---- did it work ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "accuracies, tone, words",
    [
        ([0.2, 0.9], "better", "RL worked"),
        ([0.5, 0.52], "no clear change", "No clear change"),
        ([0.5, 0.3], "worse", "RL made the model worse"),
        ([0.5, 0.6, 0.1], "worse", "RL collapsed"),
        ([0.2, 0.9, 0.2], "worse", "RL collapsed"),
        ([0.2, 0.9, 0.5], "worse", "RL worked, then fell back"),
    ],
)
def test_the_verdict(tmp_path, accuracies, tone, words):
    write_run(tmp_path, rows(accuracies))
    found = verdict.verdict(gather.run(tmp_path)["about"])
    assert (found["tone"], found["words"]) == (tone, words)
    assert f"{accuracies[0]:.1%} to {accuracies[-1]:.1%}" in found["sentence"]


def test_without_an_evaluation_after_it_there_is_no_verdict(tmp_path):
    write_run(tmp_path, rows([0.2, 0.9])[:10])
    found = verdict.verdict(gather.run(tmp_path)["about"])
    assert found["words"] == "Too early to say" and "9 of 20 steps" in found["sentence"]


def test_the_interval_of_a_difference_is_newcombes():
    # His example (b): 56/70 against 48/80, method 10: 0.0524 to 0.3339.
    one = {"accuracy": 48 / 80, "low": 0.4904, "high": 0.7004}  # Wilson's
    other = {"accuracy": 56 / 70, "low": 0.6919, "high": 0.8774}
    difference, low, high = verdict.change(one, other)
    assert difference == pytest.approx(0.2)
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=5e-4)


def test_training_is_shown_as_a_share_whatever_the_reward_is(tmp_path):
    """A mean reward of 0.875 between -1 and 1 is 93.75% right."""
    made = rows([0.2, 0.9], reward=0.875, solved=0.9375)
    stage = gather.stage(str(write_run(tmp_path, made)))
    derived = gather.with_derived(stage)
    assert derived[5]["right"] == 0.9375
    names = [chart.name for chart in charts.shown("rl", [derived])]
    assert names[:2] == ["right", "reward"]  # the reward apart, in its own unit
    # A run of before `solved` was logged, whose task names its parts.
    older = [
        {**row, "reward/correct": row.pop("solved")} if "solved" in row else row for row in made
    ]
    assert gather.with_derived({**stage, "rows": older})[5]["right"] == 0.9375


def test_the_axes(tmp_path):
    stage = gather.stage(str(write_run(tmp_path)))
    last = gather.with_derived(stage)[-1]
    # 20 steps of 80 tokens, 8 samples of 2 of 8 problems, 2 seconds.
    assert [last[f"x/{axis}"] for axis in charts.AXES] == [20, 5.0, 160, 1600, 1e11, 40.0]


def test_constants_that_differ(tmp_path, capsys):
    write_run(tmp_path / "a", settings={"lr": 1e-3, "note": "x"})
    write_run(tmp_path / "b", rows([0.2, 0.5]), settings={"lr": 1e-2, "run_name": "b"})
    runs = [gather.run(tmp_path / name) for name in "ab"]
    assert gather.differences(runs) == [("lr", [1e-3, 1e-2])]
    made = page.page(runs, 1000)
    assert '"differences":[["lr",[0.001,0.01]]]' in made and '"note":"x"' in made
    words = "b ends at 50.0%, a at 90.0%: −40.0 points, 95% interval −45.7 to −34.3."
    assert json.dumps(words) in made
    report.main([str(tmp_path / "a"), str(tmp_path / "b"), "--text"])
    assert words in capsys.readouterr().out


def test_a_long_run_keeps_its_evaluations(tmp_path, monkeypatch):
    monkeypatch.setattr(gather, "MOST_ROWS", 3)
    kept, every = gather.thinned(rows([0.1, 0.2, 0.3]))
    assert every == 7 and [row["step"] for row in kept] == [0, 7, 10, 14, 20]


def test_a_row_that_is_cut_short_is_left_out(tmp_path):
    folder = write_run(tmp_path)
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 21, "rew')
    assert gather.run(tmp_path)["about"]["rows"][-1]["step"] == 20


@pytest.mark.parametrize("kind", ["rl", "sft", "base"])
@pytest.mark.parametrize("kept", ["null", "absent"])
def test_rows_with_gaps_make_a_page(tmp_path, kind, kept):
    """NaN is null on disk, and older runs lack columns."""
    made = [
        {"step": step, **{"rl": {"reward": 0.5}, "sft": {"packing": 0.9}, "base": {}}[kind]}
        for step in range(4)
    ]
    if kept == "null":
        for chart in charts.CHARTS[kind]:
            for line in chart.lines:
                for row in made:
                    row.setdefault(line.column, None)
    folder = write_run(tmp_path, made)
    os.remove(folder / "run.json")
    report.main([str(tmp_path)])
    report.main([str(tmp_path), "--text"])
    assert gather.run(tmp_path)["about"]["kind"] == kind


# ---- what is in the page -------------------------------------------------------------------------


def unpacked(made, name):
    """A chunk of a page."""
    packed = re.search(f'<script type="text/plain" id="{name}">([^<]*)</script>', made)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_text_of_a_model_is_never_markup(tmp_path):
    write_run(tmp_path, settings={"note": NASTY[1], "task": NASTY[0]}, texts=NASTY)
    RunLog(str(tmp_path / "rl")).event(3, "warning", NASTY[1])
    file = tmp_path / "report.html"
    page.write([tmp_path], str(file))
    made = file.read_text(encoding="utf-8")
    assert "onerror" in made and "<img" not in made and "<script>document" not in made
    # Each that opens is one of the page's own: data, chunks, three scripts.
    assert made.count("</script>") == made.count("<script") == 1 + (3 + 1) + 3
    group = unpacked(made, "r0-step-2")[0]
    assert [one["text"] for one in group["samples"]][:4] == NASTY[:4]
    assert group["samples"][4]["text"].endswith("[…10,000 more characters in the file]")


def test_older_files_without_token_values_work(tmp_path):
    write_run(tmp_path, texts=["x", "y"])
    found = embed.Embedded(gather.run(tmp_path)["about"], 10**6)
    assert (found.steps, found.by_token, found.answers) == ([1, 2, 3], False, [])
    (_, plain) = json.loads(gzip.decompress(base64.b64decode(found.chunks["step-1"])))
    # Of a task that names no part `correct` a reward of 1 says it.
    assert [one["right"] for one in plain["samples"]] == [False, True]


def test_token_values_and_the_texts_of_tokens(tmp_path, tokenizer):
    write_run(tmp_path, texts=["x", "y"], tokenizer=tokenizer)
    found = embed.Embedded(gather.run(tmp_path)["about"], 10**6)
    assert found.by_token
    one = json.loads(gzip.decompress(base64.b64decode(found.chunks["step-3"])))[1]["samples"][0]
    assert "".join(found.pieces[str(token)] for token in one["ids"]) == "7+5=12"
    assert one["logprobs"][0] == -50 and one["entropies"][0] == 150  # hundredths of a nat


def test_the_same_held_out_problems_across_steps(tmp_path):
    folder = write_run(tmp_path, texts=["x", "y"])
    os.makedirs(folder / "evals")
    for step, correct in ((0, False), (10, True)):
        record = dict(step=step, split="val", index=3, prompt="p", answer="7", completion="8")
        record.update(reward=1.0, parts={}, correct=correct, tokens=2, finish="stop")
        with open(folder / "evals" / f"step_{step:06d}.jsonl.gz", "wb") as f:
            write_records(f, [record, {**record, "split": "train"}])
    found = embed.Embedded(gather.run(tmp_path)["about"], 10**6)
    assert found.answers == [0, 10] and embed.files(str(folder)).keys() == {1, 2, 3}
    (one,) = json.loads(gzip.decompress(base64.b64decode(found.chunks["answers-10"])))
    assert one["right"] is True


def test_what_was_tried_before_the_first_step_is_of_step_0(tmp_path):
    folder = write_run(tmp_path, texts=["x", "y"])
    os.replace(folder / "rollouts" / "step_000001.jsonl.gz", folder / "probe.jsonl.gz")
    found = embed.Embedded(gather.run(tmp_path)["about"], 10**6)
    assert found.steps == [0, 2, 3] and "step-0" in found.chunks


def test_steps_that_have_no_room_are_left_out_evenly(tmp_path):
    paths = {}
    for step in range(1, 101):
        paths[step] = tmp_path / str(step)
        paths[step].write_bytes(b"x" * 1000)
    assert embed.chosen_steps(paths, 100_000) == (list(range(1, 101)), 1.0)
    chosen, share = embed.chosen_steps(paths, 14_000)
    assert chosen == [1, *range(4, 101, 8)] and share == 1.0
    # Where not even two have, their first prompts.
    assert embed.chosen_steps(paths, 1000) == ([1, 100], 0.5)


# ---- what a run leaves, and writes on the way ----------------------------------------------------


def events(out):
    found = gather.read_lines(os.path.join(out, "w", "rl", "events.jsonl"))
    return [(event["step"], event["kind"]) for event in found]


def test_a_run_keeps_what_it_has_said_and_writes_its_page(out, monkeypatch, capsys):
    arguments = [*RL, f"--model={out / 'a' / 'sft'}", "--run_name=w", "--save_every=2"]
    assert call("train_rl.py", *arguments, "--steps=2") is None
    found = [event for event in events(out) if event[1] == "saved"]
    assert found == [(2, "saved")]
    said = capsys.readouterr().out
    kept = (out / "w" / "rl" / "events.jsonl").read_text()
    assert [kind for _, kind in events(out)].count("warning") == said.count("WARNING")
    assert json.loads(kept.splitlines()[-1])["text"] in said
    made = (out / "w" / "report.html").read_text(encoding="utf-8")
    assert unpacked(made, "r0-step-2")

    # A warning of a step that is made again goes, and no error of a page stops a run.
    RunLog(str(out / "w" / "rl")).event(3, "warning", "of a step that is made again")

    def fails(*_):
        raise RuntimeError("no page")

    monkeypatch.setattr(page, "write", fails)
    assert call("train_rl.py", *arguments, "--steps=4") is None
    assert "report.html could not be written (no page)" in capsys.readouterr().out
    assert "made again" not in (out / "w" / "rl" / "events.jsonl").read_text()
    assert [event for event in events(out) if event[1] != "warning"] == [
        (2, "saved"),
        (2, "resumed"),
        (4, "saved"),
    ]


def test_pages_on_the_way_take_a_hundredth_of_the_time(monkeypatch, tmp_path):
    clock = SimpleNamespace(now=0.0, written=[])
    monkeypatch.setattr(page.time, "monotonic", lambda: clock.now)

    def write(*_):
        clock.written.append(clock.now)
        clock.now += 2.0

    monkeypatch.setattr(page, "write", write)
    log = SimpleNamespace(active=True)
    live = page.LivePage(SimpleNamespace(log=log, directory=str(tmp_path / "rl")))
    for step in range(1000):
        clock.now += 1.0
        live.update({"val/accuracy": 0.5} if step % 10 == 9 else {}, last=False)
    assert len(clock.written) >= 4  # the first is thought to take a second
    assert 2.0 * len(clock.written) <= 0.01 * clock.now + 1.0
    live.update({"val/accuracy": 0.5}, last=True)
    assert clock.now - clock.written[-1] == 2.0


# ---- the command ---------------------------------------------------------------------------------


def test_the_terminal_shows_it_too_and_nothing_steers_it(tmp_path, capsys):
    folder = write_run(tmp_path, settings={"note": NASTY[2]})
    RunLog(str(folder)).event(7, "warning", "too hot \x1b[31m")
    report.main([str(tmp_path), "--text"])
    said = capsys.readouterr().out
    assert "RL worked" in said and "20.0% to 90.0%" in said
    assert "Share correct:  o held-out 90.0%   * training 25.0%" in said
    assert "step 7: too hot \\x1b[31m" in said and "\\u202e" in said
    assert "\x1b" not in said and "\u202e" not in said
    assert max(map(len, re.findall(r"^ .*\|.*$", said, re.M))) <= 80


def test_a_curve_in_characters():
    chart = charts.Chart("x", "X", "", [charts.Line("y", "y")])
    lines = text.block(chart, [{"step": step, "y": float(step)} for step in range(64)])
    assert lines[0] == "X:  o 63"
    drawn = [line[11:] for line in lines[1 : 1 + text.HEIGHT]]
    # It rises from the left below to the right above.
    assert drawn[-1].startswith("o") and drawn[0].endswith("o")
    assert [line.index("o") for line in drawn] == sorted((line.index("o") for line in drawn))[::-1]


def test_another_rl_stage_has_a_page_of_its_own(tmp_path):
    write_run(tmp_path)
    write_run(tmp_path, rows([0.9, 0.2]), name="rl-hot")
    for path in (tmp_path, tmp_path / "rl-hot"):
        report.main([str(path)])
    assert "RL worked" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "RL collapsed" in (tmp_path / "report_rl-hot.html").read_text(encoding="utf-8")
    report.main([str(tmp_path / "rl"), str(tmp_path / "rl-hot")])
    made = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "RL worked" in made and "RL collapsed" in made


def test_what_is_no_run_is_said_in_a_line(tmp_path):
    with pytest.raises(SystemExit, match="^error: .*no run there; name a run's folder"):
        report.main([str(tmp_path)])


def test_pictures_light_and_dark(tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path)
    report.main([str(tmp_path), "--svg"])
    light, dark = ((tmp_path / f"report-{theme}.svg").read_text() for theme in figure.THEMES)
    for made in (light, dark):
        assert "RL worked" in made and "held-out 90.0%" in made and "training 25.0%" in made
    assert figure.DARK["paper"] in dark and figure.DARK["paper"] not in light


# ---- in a browser --------------------------------------------------------------------------------


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra [browser]")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
        options += ["--disable-background-networking", "--disable-component-update"]
        system = "/usr/bin/chromium"
        given = {"executable_path": system} if os.path.exists(system) else {}
        try:
            started = playwright.chromium.launch(args=options, **given)
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield started
        started.close()


def test_a_browser_opens_it_and_finds_no_error(tmp_path, browser, tokenizer):
    made = rows([0.2, 0.9])
    made[-1]["val/accuracy"] = 0.9925  # of 400 problems; 99.2% on both sides
    write_run(tmp_path, made, texts=NASTY, tokenizer=tokenizer)
    report.main([str(tmp_path)])
    opened = browser.new_page(viewport={"width": 360, "height": 800})
    trouble, asked = [], []
    opened.on("console", lambda message: trouble.append(message.text))
    opened.on("pageerror", lambda error: trouble.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(f"file://{tmp_path}/report.html")
    opened.wait_for_selector(".sample")
    assert "RL worked" in opened.inner_text("h1")
    assert "to 99.2%" in opened.inner_text(".lead") and "99.2%" in opened.inner_text(".numbers")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360

    # The x-axis, by keyboard; then a value of a curve.
    last_tick = "[data-chart=rl-right] svg text >> text='1000'"
    assert not opened.locator(last_tick).count()
    opened.check("#axes input[value=tokens]")
    assert opened.locator(last_tick).count()
    opened.focus("[data-chart=rl-right]")
    opened.keyboard.press("ArrowLeft")
    assert "tokens 1600: held-out 99.2%" in opened.inner_text("[data-chart=rl-right] .note")

    # Nasty texts are there to be read, and have done nothing.
    shown = opened.text_content(".samples")
    assert NASTY[0] in shown and "U+202E" in shown and "U+D83D" in shown and "U+001B" in shown
    assert opened.title() == tmp_path.name

    # Sort, open another prompt, read the numbers of a token.
    opened.select_option("select[name=sort]", "worst")
    opened.wait_for_selector(".sample >> nth=0 >> text=reward 0")
    opened.focus(".prompts button >> nth=0")
    opened.keyboard.press("ArrowDown")
    opened.wait_for_selector(".prompts button:focus[aria-current=true]:has-text('Q1')")
    opened.select_option("select[name=shade]", "logprobs")
    opened.focus(".text[role=group] >> nth=0")
    opened.keyboard.press("ArrowRight")
    assert "log-prob -0.50 (60.7%) · entropy 1.50 nats" in opened.inner_text(".readout >> nth=0")
    assert not trouble and asked == [f"file://{tmp_path}/report.html"]
