"""Reports and pictures, from run folders as training writes them (finished, interrupted, barely begun, damaged)."""

import base64
import csv
import json
import math
import re
from html.parser import HTMLParser

import matplotlib.image
import pytest
import yaml
from matplotlib.figure import Figure

from deltarl.rl.errors import UserError
from deltarl.rl.metrics import MetricsLog, load_run
from deltarl.rl.plots import PANELS, draw_comparison, draw_run, human_count, trailing_mean
from deltarl.rl.report import write_comparison, write_report

PHASES = {"generate": 1.5, "sync": 0.1, "verify": 0.1, "logprobs": 0.4, "update": 1.3, "other": 0.1}


def write_run(folder, *, steps=20, arm="kda", seed=0, parameters=2_047_360, before=0.3, after=0.6, gain=0.02, **row):
    """A run folder whose training accuracy climbs from `before` by `gain` a step; `after=None` leaves it unfinished."""
    (folder / "traces").mkdir(parents=True)
    job = {"name": folder.name, "seed": seed, "model": {"arm": arm, "dtype": "float32"}, "rl": {"steps": steps}}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    with MetricsLog(folder / "metrics.jsonl") as log:
        log.append({"kind": "run", "arm": arm, "parameters": parameters, "dtype": "float32", "device": "CPU, 2 cores",
                    "versions": {"torch": "2.13.0", "vllm": "0.32.0"}})  # fmt: skip
        for step in range(10, 101, 10):
            log.append({"kind": "sft", "step": step, "loss": 3 * math.exp(-step / 40), "seconds": 0.2})
        log.append(held_out(0, "before", before))
        for step in range(1, steps + 1):
            accuracy = before + gain * step
            log.append({
                "kind": "rl", "step": step, "accuracy": accuracy, "reward_mean": accuracy, "frac_zero_std": 0.2,
                "length_mean": 40 - step / 4, "length_max": 90, "truncated": 0.01, "entropy": 0.5 / step,
                "kl": 0.001 * step, "logp_gap_mean": 2e-6, "logp_gap_max": 5e-5, "loss": 0.1, "grad_norm": 0.5,
                "tokens_per_second": 1500.0, "time": PHASES,
                "verdicts": {"correct": 30, "incorrect": 65, "no_answer": 5, "error": 0}, **row,
            })  # fmt: skip
        if after is not None:
            log.append(held_out(steps, "after", after))
    return folder


def held_out(step, stage, accuracy):
    by_task = {"chain_sum": {"n": 200, "accuracy": accuracy}}
    return {"kind": "eval", "step": step, "stage": stage, "n": 200, "accuracy": accuracy, "stderr": 0.03,
            "samples_per_problem": 1, "temperature": 0.0, "by_task": by_task}  # fmt: skip


def write_traces(run, step, *traces):
    path = run / "traces" / f"step_{step:05d}.jsonl"
    path.write_text("".join(json.dumps({"step": step, "gold": "5", **trace}) + "\n" for trace in traces))


def visible_text(page):
    """What a reader sees: text nodes outside <style>, and the tags that were opened."""

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.text, self.tags, self.links, self.hidden = [], set(), [], False

        def handle_starttag(self, tag, attrs):
            self.tags.add(tag)
            self.hidden = tag == "style"
            self.links += [value for name, value in attrs if name in ("src", "href")]

        def handle_endtag(self, tag):
            self.hidden = False

        def handle_data(self, data):
            if not self.hidden:
                self.text.append(data)

    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return " ".join(" ".join(reader.text).split()), reader


def assert_drawn(path):
    pixels = matplotlib.image.imread(path)[..., :3]
    assert pixels.std() > 0.02, f"{path.name} is blank"
    assert min(pixels.shape[:2]) >= 500


@pytest.fixture
def begun(tmp_path):
    """A run folder in which nothing was measured yet."""
    (tmp_path / "begun" / "traces").mkdir(parents=True)
    (tmp_path / "begun" / "job.yaml").write_text("name: begun\nseed: 3\nrl: {steps: 60}\n")
    return tmp_path / "begun"


def test_every_panel_of_a_whole_run_is_drawn(tmp_path):
    paths = draw_run(write_run(tmp_path / "run"))
    assert [path.name for path in paths] == ["overview.png", *(f"{panel.name}.png" for panel in PANELS)]
    for path in paths:
        assert_drawn(path)


def test_one_slow_step_does_not_flatten_the_others(tmp_path):
    run = load_run(write_run(tmp_path / "run"))
    run.of("rl")[7]["time"]["generate"] = 100.0
    axes = Figure().add_subplot()
    next(panel for panel in PANELS if panel.name == "time_per_phase").draw(axes, run)
    assert 3.5 < axes.get_ylim()[1] < 20
    assert "longest step 10" in " ".join(text.get_text() for text in axes.texts)


def test_only_what_was_measured_is_drawn(tmp_path):
    run = write_run(tmp_path / "run", kl=None, entropy=float("nan"), logp_gap_mean=0.0, logp_gap_max=0.0, verdicts={})
    drawn = {path.stem for path in draw_run(run)}
    assert drawn.isdisjoint({"kl", "entropy", "verdicts"})
    assert {"training_accuracy", "logprob_gap", "overview"} <= drawn


def test_a_run_without_measurements_has_no_pictures_but_a_report(begun):
    assert draw_run(begun) == []
    text, _ = visible_text(write_report(begun))
    assert "seed 3" in text and "0 of 60 RL steps" in text and "not finished" in text


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "quick", before=0.305, after=0.62))


def test_report_states_the_result_and_how_it_was_measured(report):
    text, _ = visible_text(report)
    for expected in (
        "quick", "kda", "2.05 M parameters", "20 of 20 RL steps", "finished",
        "30.5 ± 3.0 %", "62.0 ± 3.0 %", "+31.5 ± 4.2", "n = 200 held-out problems, 1 sample each, greedy",
        "2,047,360", "CPU, 2 cores", "torch 2.13.0", "vllm 0.32.0",
        "generate 30.0 42.9%", "20 steps of 3.50 s on average; 1,500 tokens/s",
        "correct 600 30.0%", "no_answer 100 5.0%", "dtype: float32",
    ):  # fmt: skip
        assert expected in text, expected
    assert "Worth a look" not in text


def test_report_needs_nothing_but_itself(report):
    _, reader = visible_text(report)
    assert reader.links and all(link.startswith("data:image/png;base64,") for link in reader.links)
    assert base64.b64decode(reader.links[0].partition(",")[2]) == report.with_name("overview.png").read_bytes()
    assert not reader.tags & {"script", "link", "iframe"}
    assert not re.search(r"https?://|url\(|@import", report.read_text())
    assert not list(report.parent.glob("*.tmp"))


def test_traces_are_shown_by_status_early_and_late_and_cannot_inject(begun):
    attack = "<script>alert('x')</script><img src=x onerror=alert(1)> & </pre>"
    right, second = ({"status": "correct", "response": text} for text in ("EARLY-RIGHT", "EARLY-SECOND"))
    write_traces(begun, 1, {**right, "prompt": attack}, second, {"status": "no_answer", "response": attack})
    for step in range(2, 20):
        write_traces(begun, step, {"status": "correct", "response": f"MIDDLE-{step}-"})
    write_traces(begun, 20, {"status": "incorrect", "response": "LATE-WRONG", "extracted": "<b>7</b>", "task": "<i>"})
    text, reader = visible_text(write_report(begun))
    assert text.index("EARLY-RIGHT") < text.index("LATE-WRONG")
    assert "EARLY-SECOND" not in text and "MIDDLE-9-" not in text
    assert text.count(attack) == 2 and "<b>7</b>" in text
    assert not reader.tags & {"script", "b", "i"} and "x" not in reader.links


def test_long_responses_are_cut_and_say_so(begun):
    write_traces(begun, 1, {"status": "incorrect", "response": "y" * 10_000})
    text, _ = visible_text(write_report(begun))
    assert "6,000 more characters" in text and "y" * 4001 not in text


def test_an_interrupted_run_is_reported_as_far_as_it_got(tmp_path):
    run = write_run(tmp_path / "run", after=None)
    with MetricsLog(run / "metrics.jsonl") as log:
        log.append(held_out(10, "during", 0.45))
        log.append({"kind": "event", "step": 20, "what": "interrupted", "detail": "by Ctrl-C"})
    write_traces(run, 1, {"status": "correct", "response": "WHOLE"})
    for file in (run / "metrics.jsonl", run / "traces" / "step_00001.jsonl"):
        file.write_bytes(file.read_bytes() + b'{"kind": "rl", "st')
    text, _ = visible_text(write_report(run))
    assert "held-out accuracy at RL step 10 45.0 ± 3.0 %" in text
    assert "not finished" in text and "--resume" in text
    assert "interrupted by Ctrl-C" in text and "torn_line" in text and "WHOLE" in text


def test_what_is_wrong_with_a_run_is_said(tmp_path):
    text, _ = visible_text(write_report(write_run(
        tmp_path / "run", after=0.35, verdicts={"correct": 90, "error": 6, "timeout": 3, "gold_error": 1},
        logp_gap_mean=0.004, truncated=0.4, frac_zero_std=0.95, loss=float("nan"),
    )))  # fmt: skip
    for warning in (
        "failed on 9.0% of the samples",
        "20 samples had a gold answer",
        "disagree by 0.004 nats",
        "40% of the latest responses hit the length limit",
        "95% of the latest groups have equal rewards",
        "not finite in 20 steps, first in step 1",
        "less than two standard errors",
    ):
        assert warning in text, warning


def test_a_gap_that_is_large_in_fp32_is_usual_in_bf16(tmp_path):
    run = write_run(tmp_path / "run", logp_gap_mean=0.004)
    with MetricsLog(run / "metrics.jsonl") as log:
        log.append({"kind": "run", "arm": "kda", "dtype": "bfloat16"})
    assert "disagree" not in visible_text(write_report(run))[0]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)


@pytest.fixture
def arms(tmp_path):
    """kda gains 2 points a step, mla 1; both start at 30 %."""
    mla = {"arm": "mla", "gain": 0.01, "after": 0.5, "parameters": 2_031_104}
    return {
        "kda": [write_run(tmp_path / f"kda-{seed}", seed=seed, after=0.7 + 0.02 * seed) for seed in (0, 1)],
        "mla": [write_run(tmp_path / f"mla-{seed}", seed=seed, **mla) for seed in (0, 1)],
    }


def test_comparison_numbers(tmp_path, arms):
    page = write_comparison(tmp_path / "out", arms)
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    kda, mla = numbers["arms"]["kda"], numbers["arms"]["mla"]
    assert (kda["parameters"], kda["seeds"], mla["parameters"]) == (2_047_360, 2, 2_031_104)
    assert kda["held_out_before"] == pytest.approx({"mean": 0.3, "min": 0.3, "max": 0.3})
    assert kda["held_out_after"] == pytest.approx({"mean": 0.71, "min": 0.7, "max": 0.72})
    assert kda["change"] == pytest.approx({"mean": 0.41, "min": 0.4, "max": 0.42})
    assert kda["final_training_accuracy"]["mean"] == pytest.approx(0.3 + 0.02 * 18)  # steps 16 to 20
    # With 20 steps nothing is smoothed. mla ends at 50 %, which kda has from step 10 on.
    assert numbers["target"] == pytest.approx(0.5)
    assert (kda["steps_to_target"]["mean"], mla["steps_to_target"]["mean"]) == (10, 20)

    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").read_text().splitlines()))
    assert [(row["arm"], row["seed"], float(row["held_out_after"])) for row in rows] == [
        ("kda", "0", 0.7), ("kda", "1", 0.72), ("mla", "0", 0.5), ("mla", "1", 0.5),
    ]  # fmt: skip
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert "| kda | 2.05 M | 2 | 30.0 % | 71.0 % (70.0 to 72.0) | +41.0 (+40.0 to +42.0) | 66.0 % | 10 |" in table
    text, reader = visible_text(page)
    assert "71.0 % (70.0 to 72.0)" in text and "Worth a look" not in text
    assert [link[:22] for link in reader.links] == ["data:image/png;base64,"]
    assert_drawn(tmp_path / "out" / "comparison.png")


def test_comparison_says_where_it_is_not_fair(tmp_path, arms):
    arms["mla"][1] = write_run(tmp_path / "odd", seed=7, arm="mla", steps=10, parameters=2_200_000, after=None)
    table_file = write_comparison(tmp_path / "out", arms).with_suffix(".md")
    table = table_file.read_text()
    assert "differ in more than arm and seed: rl.steps" in table
    assert "different seeds: kda 0, 1; mla 0, 7" in table
    assert "parameter counts differ by" in table
    assert "Not finished: odd (step 10)" in table


def test_comparison_of_untrained_runs_is_refused(tmp_path):
    run = write_run(tmp_path / "run", steps=0)
    with pytest.raises(UserError, match="no run has a training step"):
        draw_comparison({"kda": [run]}, tmp_path / "picture.png")


def test_the_two_arms_differ_in_the_picture(tmp_path, arms):
    """With the arms' runs exchanged the picture is another one: curves come from the runs that are given."""
    one = matplotlib.image.imread(draw_comparison(arms, tmp_path / "one.png"))
    exchanged = {"kda": arms["mla"], "mla": arms["kda"]}
    other = matplotlib.image.imread(draw_comparison(exchanged, tmp_path / "other.png"))
    assert one.shape == other.shape and (one != other).any(axis=-1).mean() > 0.005


def test_trailing_mean_averages_the_last_values():
    assert trailing_mean([1.0, 2.0, 3.0, 6.0], 3) == pytest.approx([1.0, 1.5, 2.0, 11 / 3])
    assert trailing_mean([], 3) == []


@pytest.mark.parametrize(("count", "text"), [(2_047_360, "2.05 M"), (48e9, "48 B"), (999, "999"), (31_400, "31.4 k")])
def test_human_count(count, text):
    assert human_count(count) == text
