"""The kernel benchmark compares like with like, and prints what its readers parse."""

import json
from functools import partial

import pytest
import torch

from deltarl.rl.bench import kernels
from deltarl.rl.errors import UserError


def test_every_cpu_case_computes_what_its_peer_computes():
    cases = [case for case, *_ in kernels.cpu_cases()]  # each is checked against its peer before it is yielded
    assert cases[0] == "cpu-4L-d64-8x1024" and len(cases) == 3


def test_a_difference_stops_the_comparison():
    x = torch.ones(8)
    kernels.same(x, x * (1 + 1e-6))
    with pytest.raises(RuntimeError, match="differ"):
        kernels.same(x, x * 1.01)


def test_one_json_object_with_rows(monkeypatch, capsys):
    small, large = torch.randn(64, 64), torch.randn(1500, 1500)
    work = [("small", "matrix product", partial(torch.mm, small, small), partial(torch.mm, large, large))]
    monkeypatch.setattr(kernels, "cpu_cases", lambda: work)
    kernels.bench("cpu", as_json=True)
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["case"] == "small" and row["ratio"] == row["peer_seconds"] / row["seconds"] > 1


def test_an_unknown_device_is_refused():
    with pytest.raises(UserError, match="use cpu"):
        kernels.bench("tpu", as_json=False)
