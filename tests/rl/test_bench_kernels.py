"""The kernel benchmark compares like with like, and prints what its readers parse."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch

from deltarl.rl import cli
from deltarl.rl.bench.kernels import cases, cpu
from deltarl.rl.bench.kernels.command import bench, selected
from deltarl.rl.bench.kernels.cuda import difference
from deltarl.rl.bench.kernels.rows import Row

WITHOUT = """
import runpy, sys
sys.modules |= dict.fromkeys(sys.argv[1].split(","))  # None: as if it were not installed
sys.argv = sys.argv[1:]
runpy.run_module("deltarl.rl.bench.kernels", run_name="__main__", alter_sys=True)
"""
LEARNER = ["accelerate", "datasets", "peft", "trl", "vllm"]
BESIDE_TORCH = [*LEARNER, "huggingface_hub", "jinja2", "matplotlib", "pydantic", "safetensors", "tokenizers", "tqdm",
                "transformers", "yaml"]  # fmt: skip
SMALL = {"tokens": 70, "heads": 2, "width": 32}
GIB = 2**30


def small(work, large):
    return cpu.Case("small", "matrix product", lambda: (work, large))


@pytest.fixture
def one_small_case(monkeypatch):
    few, many = torch.randn(64, 64), torch.randn(1500, 1500)
    case = small(partial(torch.mm, few, few), partial(torch.mm, many, many))
    monkeypatch.setattr(cpu, "CASES", (case,))


def test_every_cpu_case_computes_what_its_peer_computes():
    for case in cpu.CASES:
        case.build()  # raises where the two differ
    assert cpu.CASES[0].name == "cpu-4L-d64-8x1024"


def test_a_difference_stops_the_comparison():
    x = torch.ones(8)
    cpu.same(x, x * (1 + 1e-6))
    with pytest.raises(RuntimeError, match="differ"):
        cpu.same(x, x * 1.01)


def test_one_json_object_with_rows(one_small_case, capsys):
    assert bench("cpu", as_json=True) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["case"] == "small" and row["ratio"] == row["peer_seconds"] / row["seconds"] > 1


def test_rows_reach_the_file_as_they_come(one_small_case, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    assert bench("cpu", as_json=False, out=str(file)) == 0
    about, row = map(json.loads, file.read_text().splitlines())
    assert about["device"] == "cpu" and row["case"] == "small"
    assert "small" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "tpu"], "use cpu or cuda"),
        (["--case", "kda/no-such"], "--case kda/no-such fits none of: cpu-4L"),
        (["--peer", "torch"], "on a CPU the peer is transformers"),
        (["--out", "/no/such/folder/x.jsonl"], "--out /no/such/folder/x.jsonl: No such file"),
    ],
)
def test_bad_options_end_in_one_line(arguments, said, capsys):
    assert cli.main(["bench", "kernels", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("modules", "arguments", "code", "said"),
    [
        ([*BESIDE_TORCH, "torch", "triton", "numpy", "sympy", "psutil"], ["--help"], 0, "usage: python -m deltarl.rl"),
        (BESIDE_TORCH, ["--device", "cuda", "--case", "no-such"], 2, "error: --"),
        (LEARNER, ["--case", "cpu-decode-64-h4-k32"], 0, "cpu-decode-64-h4-k32 "),
    ],
)
def test_it_runs_where_these_modules_are_not_installed(modules, arguments, code, said):
    command = [sys.executable, "-P", "-c", WITHOUT, ",".join(modules), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert said in done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(capsys):
    assert cli.main(["bench", "kernels", "--device", "cuda"]) == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_names_are_patterns():
    found = [case.name for case in selected(cases.CASES, ["kda/b1-t32768-h16/*", "decode/n256-*/graph"])]
    assert found == ["kda/b1-t32768-h16/forward", "kda/b1-t32768-h16/backward", "decode/n256-h32/graph"]
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)


@pytest.mark.parametrize(
    "build",
    [
        partial(cases.attention, "kda_chunk", cases.Shape(**SMALL)),
        partial(cases.attention, "kda_chunk", cases.Shape(**SMALL, bound=-5.0)),
        partial(cases.attention, "kda_chunk", cases.Shape(heads=2, width=32, lengths=(5, 40, 3))),
        partial(cases.attention, "gdn_chunk", cases.Shape(**SMALL)),
        partial(cases.convolution, 33, 16),
        partial(cases.gated_norm, 9, 2),
    ],
)
def test_two_implementations_get_the_same_inputs(build):
    for backward in (False, True):
        ours, other = build(backward, "ours", "cpu"), build(backward, "torch", "cpu")
        assert difference(other.work(), ours.work()) == 0.0 and other.moved == ours.moved


@pytest.mark.parametrize("bound", [None, -5.0])
def test_transformers_computes_what_ours_computes(bound):
    """Both in fp32 from the same bf16 inputs: results rounded to bf16 differ where one of few falls the other way."""
    build = partial(cases.attention, "kda_chunk", cases.Shape(**SMALL, bound=bound))
    for backward in (False, True):
        ours, peer = build(backward, "ours", "cpu"), build(backward, "transformers", "cpu")
        assert difference(peer.work(), ours.work()) < 5e-4 and peer.moved == ours.moved


def test_transformers_takes_no_packed_sequences():
    packed = cases.Shape(heads=2, width=32, lengths=(5, 40, 3))
    assert cases.attention("kda_chunk", packed, False, "transformers", "cpu") is None
    assert cases.attention("gdn_chunk", cases.Shape(**SMALL), False, "transformers", "cpu") is None


def test_what_must_move():
    """B1 T32768 H16: 0.22 ms forward, 0.63 with backward at 3 TB/s, but for beta and the parameters."""
    rows, width = 4 * 2, 32
    built = [
        cases.attention("kda_chunk", cases.Shape(tokens=4, heads=2, width=width), b, "ours", "cpu") for b in (0, 1)
    ]
    row, beta, parameters = 2 * rows * width, 2 * rows, 4 * 2 + 4 * 2 * width
    assert built[0].moved == 5 * row + beta + parameters  # q, k, v, g read, o written
    assert built[1].moved == 14 * row + 3 * (beta + parameters)  # those, the inputs and do again, four gradients


def test_near_zero_decay_keeps_what_was_written():
    inputs = cases.raw_inputs(cases.Shape(tokens=64, heads=2, width=32, A_log=-9.0), "cpu", decays=32)
    raw = inputs["g"].float() + inputs["dt_bias"].view(2, 32)
    decay = -inputs["A_log"].exp().view(2, 1) * torch.nn.functional.softplus(raw)
    assert decay.sum(1).exp().min() > 0.9  # over all 64 tokens


def test_decode_reads_the_states_in_the_order_of_the_sequences():
    """A peer that takes no slots must find state n for sequence n."""
    state, slots = cases.states(20, 2, "cpu", scattered=True)
    ordered, in_order = cases.states(20, 2, "cpu", scattered=False)
    assert not torch.equal(slots, in_order)
    assert torch.equal(state[slots], ordered[in_order])
    assert (
        difference(cases.decode(5, 2, False, "torch", "cpu").work(), cases.decode(5, 2, False, "ours", "cpu").work())
        == 0
    )


def test_a_row_compares_only_what_is_the_same():
    row = Row("x", "y", seconds=2e-3, peak_bytes=GIB, moved=10**9, kernels={})
    row.peers = {"torch": {"seconds": 4e-3, "difference": 1e-3}, "fla": {"seconds": 1e-3, "difference": 0.5}}
    found = row.as_json(copy_rate=2e12)
    assert (found["peer"], found["peer_seconds"], found["ratio"]) == ("torch", 4e-3, 2.0)
    row.peers["fla"]["difference"] = 0.005
    assert row.as_json()["peer"] == "fla" and row.as_json()["ratio"] == 0.5
    row.peers["fla"]["difference"] = 0.5
    assert found["bytes_per_second"] == 5e11 and found["of_copy"] == 0.25
    line = row.line(copy_rate=2e12)
    assert "2.00 x" in line and "fla 1.00 ms  differs by 0.5" in line and "torch code" in line


def test_a_failure_is_said():
    row = Row("x", "y", failed="OutOfMemoryError: CUDA out of memory")
    row.peers = {"fla": {"seconds": 1e-3}, "torch": {"failed": "RuntimeError: no"}}
    assert row.as_json()["ratio"] is None and row.as_json()["failed"] in row.line() and "RuntimeError: no" in row.line()
