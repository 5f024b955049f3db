"""The learner's benchmark compares like with like."""

import json

import pytest
import torch

from deltarl.model import build_model
from deltarl.rl import cli
from deltarl.rl.bench.learner_step import build, draw, flops, lengths, padded, score_packed, score_padded
from deltarl.rl.forward import enable_scoring
from deltarl.rl.packing import make_packs
from deltarl.rollout import Trace

SMALL = ["--sizes", "2m", "--sequences", "5", "--longest", "40", "--prompt", "4", "--vocab", "320", "--repeats", "1"]


def run(capsys, *arguments):
    code = cli.main(["bench", "learner", *arguments])
    return code, capsys.readouterr()


@pytest.mark.parametrize("size", ["2m", "smollm2-135m"])
def test_packed_and_padded_score_the_same(size, monkeypatch):
    from deltarl.rl.bench import learner_step

    monkeypatch.setitem(learner_step.SMOLLM2_135M, "num_hidden_layers", 2)
    torch.manual_seed(0)
    model = build(size, 320)
    enable_scoring(model)
    generator = torch.Generator().manual_seed(0)
    traces = [Trace(draw(3, model, generator), draw(n, model, generator), [], [], "stop") for n in (4, 30, 9)]
    packs = make_packs(traces, range(3), 50)
    packed = {
        row: part for pack in packs for row, part in zip(pack.rows, pack.split(score_packed(model, pack)), strict=True)
    }
    rows = torch.cat([score_padded(model, part) for part in padded(traces, 70)]).split([4, 30, 9])
    for row in range(3):
        torch.testing.assert_close(packed[row], rows[row], rtol=1e-5, atol=1e-5)


def test_lengths_have_the_spread():
    found = lengths(64, 4000, 10)
    assert (min(found), max(found)) == (400, 4000)
    assert found != sorted(found)


def test_flops_of_a_single_token_are_six_a_weight():
    model = build_model("mla", "2m", vocab_size=320)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    attention = 3 * 4 * 4 * 2 * (16 + 16 + 32) / 2  # layers, heads, forward and backward of one pair, half of it
    assert flops(model, [1]) == pytest.approx(6 * weights + attention)


def test_rows_as_json(capsys):
    code, printed = run(capsys, *SMALL, "--budget", "100", "--json")
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert code == 0 and [row["way"] for row in rows] == ["packed", "padded"]
    packed, by_row = rows
    assert packed["computed"] == packed["tokens"] < by_row["computed"] == 5 * 44
    assert packed["passes"] < by_row["passes"]
    assert packed["seconds"] > 0 and packed["tokens_per_second"] > 0


def test_table(capsys):
    code, printed = run(capsys, *SMALL, "--budget", "100", "--recompute", "linear,ffn")
    assert code == 0
    assert printed.out.count("linear,ffn") == 2 and "of padded" in printed.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget", "43"], "--budget 43 is less than --prompt + --longest = 44"),
        (["--sizes", "7q"], "unknown size"),
        (["--recompute", "heads"], "known are ffn, linear, mla"),
    ],
)
def test_refused(capsys, arguments, says):
    code, printed = run(capsys, *SMALL, *arguments)
    assert code == 2 and says in printed.err
