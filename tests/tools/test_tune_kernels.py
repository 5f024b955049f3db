"""What the tuner concludes from its measurements; the measurements themselves need a GPU."""

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "tools" / "tune_kernels.py"


@pytest.fixture(scope="module")
def tuner():
    spec = importlib.util.spec_from_file_location("tune_kernels", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(**seconds):
    """seconds: shape to {block: seconds}."""
    return [
        {"entry": "scan", "shape": shape, "config": {"block": block}, "seconds": s}
        for shape, by_block in seconds.items()
        for block, s in by_block.items()
    ]


def test_the_best_is_weighed_over_shapes_by_ratio_not_by_length(tuner):
    # 16 loses 1 % of the long shape, 32 loses half of the short one.
    found = tuner.best(rows(long={16: 1.01, 32: 1.00}, short={16: 2e-6, 32: 3e-6}))
    assert found == {"scan": {"block": 16}}


def test_a_configuration_that_failed_on_one_shape_is_out(tuner):
    assert tuner.best(rows(a={16: 1.0, 32: 2.0}, b={32: 2.0, 64: 1.0})) == {"scan": {"block": 32}}
    assert tuner.best(rows(a={16: 1.0}, b={32: 1.0})) == {}


def test_the_grid_begins_with_what_is_in_use_and_repeats_nothing(tuner):
    args = Namespace(blocks=[16, 32], warps=[4, 8], stages=[1], registers=[0, 168])
    present = {"block": 32, "num_warps": 4, "num_stages": 1, "registers": 168}
    found = tuner.grid(present, args)
    assert found[0] == present and len(found) == len({tuple(c.values()) for c in found}) == 8
    assert {c["block"] for c in tuner.grid(present | {"block": 0}, args)} == {0}


def test_every_shape_is_a_case_of_the_benchmark(tuner):
    from deltarl.rl.bench.kernels.cases import CASES

    assert set(tuner.SHAPES) <= {case.name for case in CASES}
