"""The short convolution and the gated norm on one GPU: cases against fp64, then times beside a copy.

Run by hand:  python tests/gpu/conv_norm_gpu.py
Prints one line per case, then one per timing; exit code 1 if a case fails.

An error is RMS(out - reference) / RMS(reference), both on the same inputs; the reference is torch's code in fp64.
"""

import statistics
import sys
import traceback
from collections.abc import Callable

import torch
import triton

from deltarl.kernels import conv as conv_in_torch
from deltarl.kernels import gated_norm as norm_in_torch
from deltarl.kernels.fused.add_norm import add_rms_norm_
from deltarl.kernels.fused.conv import block_table, causal_conv1d
from deltarl.kernels.fused.conv_decode import causal_conv1d_decode_
from deltarl.kernels.fused.gated_norm import gated_rms_norm

# One rounding to 8 bits is at most 2^-7 / sqrt(12) of the RMS, to 11 bits an eighth of that; fp32 sums of up to 1e5
# products of an exp stay some tens of roundings of 6e-8 away.
LIMITS = {torch.bfloat16: 2.3e-3, torch.float16: 3e-4, torch.float32: 2e-6}
EPS = 1e-5


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def against_fp64(inputs: dict[str, torch.Tensor], ours: Callable, exact: Callable) -> str:
    """Values and gradients; the same again, bit for bit, with freed memory full of NaN."""

    def run(operator: Callable, double: bool) -> dict[str, torch.Tensor]:
        leaves = {name: (t.double() if double else t).detach().requires_grad_() for name, t in inputs.items()}
        outputs = operator(**leaves)
        generator = torch.Generator("cuda").manual_seed(3)
        given = {name: torch.randn(t.shape, generator=generator, device="cuda") for name, t in outputs.items()}
        rounded = [t.to(inputs["x"].dtype).to(outputs[name].dtype) for name, t in given.items()]
        gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), rounded)
        found = {name: t.detach() for name, t in outputs.items()}
        return found | {f"d{name}": t for name, t in zip(leaves, gradients, strict=True)}

    expected, got = run(exact, True), run(ours, False)
    poison = [torch.full_like(t, torch.nan) for t in (*got.values(), *got.values())]
    del poison
    again = run(ours, False)
    different = [name for name in got if not torch.equal(got[name], again[name])]
    errors = {name: distance(got[name], expected[name]) for name in got}
    over = [name for name, error in errors.items() if not error <= LIMITS[got[name].dtype]]
    assert not different, f"not the same twice: {different}"
    assert not over, " ".join(f"{name} {errors[name]:.1e}" for name in over) + " over the limit"
    return " ".join(f"{name} {error:.1e}" for name, error in errors.items())


def conv_case(
    tokens: int,
    channels: int = 768,
    width: int = 4,
    batch: int = 1,
    bounds: list[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    activation: str | None = "silu",
    state: bool = True,
    padding: int = 0,
) -> str:
    """x is the first `channels` of a projection that is wider by `padding`."""
    sequences = batch if bounds is None else len(bounds) - 1
    inputs = {
        "x": draw(batch, tokens, channels + padding, dtype=dtype)[..., :channels],
        "weight": draw(channels, width, dtype=torch.float32),
    }
    if state:
        inputs["initial_state"] = draw(sequences, channels, width - 1, dtype=dtype)
    options = {"activation": activation, "cu_seqlens": None if bounds is None else torch.tensor(bounds)}

    def of(operator: Callable) -> Callable:
        def outputs(**leaves: torch.Tensor) -> dict[str, torch.Tensor]:
            y, final = operator(**leaves, **options, output_final_state=state)
            return {"y": y, "final": final} if state else {"y": y}

        return outputs

    return against_fp64(inputs, of(causal_conv1d), of(conv_in_torch.causal_conv1d))


def norm_case(
    *shape: int, dtype: torch.dtype = torch.bfloat16, activation: str = "sigmoid", weight: torch.dtype = torch.float32
) -> str:
    """The gate is a part of a wider projection."""
    gate = draw(*shape[:-2], shape[-2] * shape[-1] + 48, dtype=dtype)[..., : shape[-2] * shape[-1]]
    inputs = {"x": draw(*shape, dtype=dtype), "gate": gate.unflatten(-1, shape[-2:])}
    inputs["weight"] = draw(shape[-1], dtype=weight)

    def of(operator: Callable) -> Callable:
        return lambda **leaves: {"y": operator(**leaves, eps=EPS, activation=activation)}

    return against_fp64(inputs, of(gated_rms_norm), of(norm_in_torch.gated_rms_norm))


def conv_nan_stays() -> str:
    x, weight = draw(1, 300, 512), draw(512, 4, dtype=torch.float32)
    x[:, 120] = torch.nan
    x.requires_grad_()
    y, final = causal_conv1d(x, weight, cu_seqlens=torch.tensor([0, 100, 200, 300]), output_final_state=True)
    (dx,) = torch.autograd.grad(y.sum(), x)
    for t in (y, dx):
        assert t[:, 120].isnan().all() and t[:, :100].isfinite().all() and t[:, 200:].isfinite().all(), "leak"
    assert final.isfinite().all(), "state"
    return "stays"


def conv_causal() -> str:
    first, weight = draw(1, 300, 512), draw(512, 4, dtype=torch.float32)
    second = first.clone()
    second[:, 170:] = 3 * draw(1, 130, 512)
    found = []
    for x in (first.requires_grad_(), second.requires_grad_()):
        y = causal_conv1d(x, weight)[0][:, :170]
        found.append((y, torch.autograd.grad(y.float().square().sum(), x)[0]))
    assert torch.equal(found[0][0], found[1][0]), "the past changed"
    assert torch.equal(found[0][1][:, :170], found[1][1][:, :170]), "a gradient of the past changed"
    assert not found[1][1][:, 170:].any(), "a gradient reached the future"
    return "bit for bit"


def conv_without_synchronising() -> str:
    x, weight, bounds = draw(1, 700, 512), draw(512, 4, dtype=torch.float32), torch.tensor([0, 300, 700])
    causal_conv1d(x, weight, cu_seqlens=bounds)
    block_table.cache_clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        causal_conv1d(x, weight, cu_seqlens=bounds)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def decoding(channels_last: bool) -> str:
    """Ten tokens in a CUDA graph against one pass, only the named slots, and one place of the batch for padding."""
    x, weight = draw(3, 80, 1536), draw(1536, 4, dtype=torch.float32)
    expected, final = conv_in_torch.causal_conv1d(x.double(), weight.double(), output_final_state=True)
    _, state = causal_conv1d(x[:, :70], weight, output_final_state=True)
    pool = draw(6, 3, 1536).transpose(1, 2) if channels_last else draw(6, 1536, 3)
    slots = torch.tensor([4, -1, 0], device="cuda", dtype=torch.int32)
    pool[[4, 0]] = state[[0, 2]]
    others, outputs, token = pool[[1, 2, 3, 5]].clone(), [], x[:, 70].clone()
    causal_conv1d_decode_(token, weight, pool.clone(), slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = causal_conv1d_decode_(token, weight, pool, slots)
    for t in range(70, 80):
        token.copy_(x[:, t])
        graph.replay()
        outputs.append(y.clone())
    y = torch.stack(outputs, 1)
    error = distance(y[[0, 2]], expected[[0, 2], 70:])
    assert error <= LIMITS[torch.bfloat16], error
    assert torch.equal(pool[[4, 0]].double(), final[[0, 2]]) and torch.equal(pool[[1, 2, 3, 5]], others), "states"
    assert not y[1].any(), "padding"
    return f"y {error:.1e}"


def stream_case(rows: int, width: int, dtype: torch.dtype = torch.bfloat16, padding: int = 0) -> str:
    """The norm of the residual stream, with and without one."""
    x, weight = draw(rows, width + padding, dtype=dtype)[:, padding:], draw(width, dtype=torch.float32)
    stream = draw(rows + 1, width, dtype=torch.float32)[1:].clone()
    total = stream + x
    errors = {"alone": distance(add_rms_norm_(x, weight, eps=EPS), rms_norm(x.double(), weight))}
    errors["added"] = distance(add_rms_norm_(x, weight, eps=EPS, residual=stream), rms_norm(total.double(), weight))
    assert torch.equal(stream, total), "the residual is not the sum"
    over = [name for name, error in errors.items() if not error <= LIMITS[dtype]]
    assert not over, " ".join(f"{name} {errors[name]:.1e}" for name in over) + " over the limit"
    return " ".join(f"{name} {error:.1e}" for name, error in errors.items())


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight.double() * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def cases() -> dict[str, Callable]:
    short = torch.tensor([0, *(i % 6 for i in range(300))]).cumsum(0).tolist()
    rows = {f"conv T={t}": lambda t=t: conv_case(t) for t in (1, 2, 3, 4, 15, 16, 17, 63, 64, 65, 127, 129, 2047)}
    rows |= {f"conv W={w}": lambda w=w: conv_case(333, width=w, bounds=[0, 1, 130, 333]) for w in (2, 3)}
    rows |= {f"conv {d}": lambda d=d: conv_case(500, dtype=d) for d in (torch.float16, torch.float32)}
    rows |= {
        "conv batch of 5": lambda: conv_case(130, batch=5),
        "conv packed, empty and short": lambda: conv_case(400, bounds=[0, 0, 1, 3, 6, 6, 200, 328, 400]),
        "conv 300 sequences of 0 to 5": lambda: conv_case(short[-1], bounds=short),
        "conv no activation": lambda: conv_case(100, activation=None),
        "conv no state": lambda: conv_case(300, state=False, batch=2),
        "conv of a view": lambda: conv_case(300, padding=80),
        "conv of a view, rows at odd distances": lambda: conv_case(300, padding=3),
        "conv 100 channels": lambda: conv_case(300, channels=100),
        "conv 7 channels": lambda: conv_case(300, channels=7),
        "conv 131072 tokens": lambda: conv_case(131072, channels=256),
        "conv NaN in one sequence": conv_nan_stays,
        "conv causality": conv_causal,
        "conv synchronisations": conv_without_synchronising,
        "conv decode, channels first": lambda: decoding(False),
        "conv decode, channels last": lambda: decoding(True),
    }
    rows |= {f"norm V={v}": lambda v=v: norm_case(2, 333, 3, v) for v in (32, 48, 64, 128, 256)}
    rows |= {f"norm {d}": lambda d=d: norm_case(1, 500, 2, 128, dtype=d) for d in (torch.float16, torch.float32)}
    rows |= {f"stream norm D={d}": lambda d=d: stream_case(300, d) for d in (96, 512, 1024, 2304, 7168)}
    rows |= {f"stream norm {d}": lambda d=d: stream_case(300, 576, dtype=d) for d in (torch.float16, torch.float32)}
    return rows | {
        "stream norm of a view": lambda: stream_case(300, 512, padding=64),
        "norm SiLU": lambda: norm_case(1, 500, 2, 128, activation="silu"),
        "norm one row": lambda: norm_case(1, 1, 1, 128),
        "norm weight in bf16": lambda: norm_case(1, 500, 2, 128, weight=torch.bfloat16),
        "norm 131072 tokens": lambda: norm_case(1, 131072, 4, 128),
    }


def seconds(work: Callable, repeats: int = 20) -> float:
    """Median time between two events around one call, the L2 cache overwritten before each."""
    flush, times = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda"), []
    for i in range(repeats + 3):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def in_graph(work: Callable) -> Callable:
    """`work` without the time that Python takes to launch it."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def line(name: str, work: Callable, moved: int, copy: float, torchs: Callable | None = None) -> None:
    """`moved` is the least number of bytes to read and write, `copy` the bytes a second of a copy."""
    time = seconds(work)
    text = f"{name}: {1e6 * time:.0f} us, {moved / time / 1e12:.2f} TB/s, {100 * moved / time / copy:.0f} % of the copy"
    print(text if torchs is None else f"{text}, torch {1e6 * seconds(torchs, 5):.0f} us", flush=True)


def backward_of(output: torch.Tensor, leaves: list[torch.Tensor]) -> Callable:
    gradient = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True)


def time_conv(tokens: int, channels: int, copy: float, bounds: torch.Tensor | None = None, padding: int = 0) -> None:
    x = draw(1, tokens, channels + padding)[..., :channels].detach().requires_grad_()
    weight = draw(channels, 4, dtype=torch.float32).requires_grad_()
    options, packed = {"cu_seqlens": bounds}, "" if bounds is None else f", {len(bounds) - 1} sequences"
    name = f"conv T{tokens} D{channels}{packed}" + (", a view" if padding else "")
    operators = causal_conv1d, conv_in_torch.causal_conv1d
    with torch.no_grad():
        ours, torchs = (lambda operator=operator: operator(x, weight, **options) for operator in operators)
        line(f"{name}, forward", ours, 2 * x.numel() * 2, copy, torchs)
    ours, torchs = (backward_of(operator(x, weight, **options)[0], [x, weight]) for operator in operators)
    line(f"{name}, backward", ours, 3 * x.numel() * 2, copy, torchs)


def time_norm(tokens: int, heads: int, width: int, copy: float) -> None:
    x, gate = (draw(1, tokens + i, heads, width)[:, :tokens].requires_grad_() for i in (0, 1))
    weight = draw(width, dtype=torch.float32).requires_grad_()
    name, operators = f"norm T{tokens} H{heads} V{width}", (gated_rms_norm, norm_in_torch.gated_rms_norm)
    with torch.no_grad():
        ours, torchs = (lambda operator=operator: operator(x, gate, weight, eps=EPS) for operator in operators)
        line(f"{name}, forward", ours, 3 * x.numel() * 2, copy, torchs)
    ours, torchs = (backward_of(operator(x, gate, weight, eps=EPS), [x, gate, weight]) for operator in operators)
    line(f"{name}, backward", ours, 5 * x.numel() * 2, copy, torchs)


def time_decode(count: int, channels: int, copy: float) -> None:
    x, weight = draw(count, channels), draw(channels, 4, dtype=torch.float32)
    pool, slots = draw(count, 3, channels).transpose(1, 2), torch.randperm(count, device="cuda")
    work = in_graph(lambda: causal_conv1d_decode_(x, weight, pool, slots))
    line(f"conv decode N={count} D{channels}", work, 2 * (x.numel() + pool.numel()) * 2, copy)


def time_stream(count: int, width: int, copy: float) -> None:
    x, weight, stream = (draw(count, width, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float32))
    work = in_graph(lambda: add_rms_norm_(x, weight[0], eps=EPS, residual=stream))
    line(f"stream norm N={count} D{width}", work, count * width * (2 + 2 + 4 + 4), copy)


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source = torch.empty(2**28, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / seconds(lambda: target.copy_(source))


def timings() -> None:
    copy = copy_rate()
    print(f"copy: {copy / 1e12:.2f} TB/s", flush=True)
    time_conv(32768, 6144, copy)
    time_conv(32768, 6144, copy, padding=272)
    time_conv(8192, 1536, copy)
    bounds = torch.tensor([0, *torch.linspace(256, 4096, 32).long().tolist()]).cumsum(0)
    time_conv(int(bounds[-1]), 6144, copy, bounds)
    for shape in ((32768, 16, 128), (8192, 16, 128), (32768, 8, 64), (32768, 16, 256)):
        time_norm(*shape, copy)
    for count in (1, 64, 256, 1024):
        time_decode(count, 12288, copy)
        time_stream(count, 2304, copy)


def main() -> int:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    failed, table = 0, cases()
    for name, case in table.items():
        try:
            print(f"ok   {name}: {case()}", flush=True)
        except Exception as error:  # noqa: BLE001 - a case that raises is a line of the table
            failed += 1
            text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1][:300]
            print(f"FAIL {name}: {text}", flush=True)
    timings()
    print(f"{len(table) - failed} of {len(table)} cases passed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
