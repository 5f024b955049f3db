"""The kernels on one GPU: every case of the test table against fp64, then times beside a copy and the torch code.

Run by hand:  python tests/gpu/kernels_gpu.py        (about a minute and a half)
Prints one line per case, then one per timing; exit code 1 if a case fails.

An error is RMS(out - reference) / RMS(reference), both on the same bf16 inputs.
"""

import multiprocessing
import statistics
import sys
import traceback
from collections.abc import Callable

import torch
import triton

from deltarl.kernels import kda_chunk, kda_decode_, kda_reference
from deltarl.kernels.chunk import kda_chunk as kda_chunk_torch
from deltarl.kernels.recurrent import kda_decode_ as kda_decode_torch

LIMITS = {"o": 3e-3, "state": 3e-3, "q": 6e-3, "k": 6e-3, "v": 6e-3, "g": 12e-3, "beta": 12e-3}
LIMITS |= {"A_log": 6e-3, "dt_bias": 6e-3, "initial_state": 6e-3}
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 2047)


def inputs(batch: int, tokens: int, heads: int = 2, key: int = 128, value: int = 128, gate: str = "softplus") -> dict:
    """Raw bf16 projections for the gates "softplus" and "bounded"; for other names g is the log-decay."""
    generator = torch.Generator("cuda").manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    x = {name: draw(batch, tokens, heads, key) for name in "qk"}
    x |= {"v": draw(batch, tokens, heads, value), "g": draw(batch, tokens, heads, key)}
    x["beta"] = draw(batch, tokens, heads)
    if gate in ("softplus", "bounded"):
        return {**x, "A_log": 0.5 * draw(heads).float(), "dt_bias": draw(heads * key).float()}
    x["g"] = -x["g"].abs() * (1e-4 if gate == "near zero" else 1.0)
    x["beta"] = {"writes nothing": torch.zeros_like, "writes all": torch.ones_like}.get(gate, torch.sigmoid)(x["beta"])
    if gate == "down to -300":
        x["g"][:, ::7] = -300.0
    if gate == "identical keys":
        x["k"] = x["k"][:, :1].expand_as(x["k"]).contiguous()
    return x


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def against_fp64(x: dict, bounds: list[int] | None = None, state: bool = True, limits: dict = LIMITS, **options) -> str:
    """Values and gradients; the same again, bit for bit, with freed memory full of NaN."""
    (batch, _, heads), key = x["v"].shape[:3], x["q"].shape[-1]
    if bounds is not None:
        options["cu_seqlens"] = torch.tensor(bounds, device="cuda", dtype=torch.int32)
    sequences = batch if bounds is None else len(bounds) - 1
    if state:
        x = {**x, "initial_state": 0.1 * torch.randn(sequences, heads, key, x["v"].shape[-1], device="cuda")}
    ours = {name: t.clone().requires_grad_() for name, t in x.items()}
    exact = {name: t.double().requires_grad_() for name, t in x.items()}

    def run(operator: Callable, values: dict, seed: int = 3) -> dict:
        o, final = operator(**values, output_final_state=True, **options)
        generator = torch.Generator("cuda").manual_seed(seed)
        do, dfinal = (torch.randn(t.shape, generator=generator, device="cuda").bfloat16() for t in (o, final))
        gradients = torch.autograd.grad((o, final), list(values.values()), (do.to(o.dtype), dfinal.to(final.dtype)))
        return {"o": o.detach(), "state": final.detach(), **dict(zip(values, gradients, strict=True))}

    expected, got = run(kda_reference, exact), run(kda_chunk, ours)
    poison = [torch.full_like(t, torch.nan) for t in (*got.values(), *got.values())]
    del poison
    again = run(kda_chunk, ours)
    different = [name for name in got if not torch.equal(got[name], again[name])]
    # What decays to nothing within the sequence is 0 beside everything else, and a ratio to it says nothing.
    errors = {name: distance(got[name], expected[name]) for name in got if expected[name].norm() > 1e-20}
    over = [name for name, error in errors.items() if not error <= limits[name]]
    assert not different, f"not the same twice: {different}"
    assert not over, " ".join(f"{name} {errors[name]:.1e}" for name in over) + " over the limit"
    return " ".join(f"{name} {error:.1e}" for name, error in errors.items())


def causal() -> str:
    first = inputs(1, 200)
    second = {name: t.clone() for name, t in first.items()}
    for name in ("q", "k", "v", "g", "beta"):
        second[name][:, 90:] = torch.randn_like(second[name][:, 90:]) * 3
    names, found = ("q", "k", "v", "g", "beta"), []
    for x in (first, second):
        leaves = {name: t.requires_grad_() for name, t in x.items()}
        o = kda_chunk(**leaves)[0][:, :90]
        found.append([o, *torch.autograd.grad(o.float().square().sum(), [leaves[name] for name in names])])
    assert all(torch.equal(a[:, :90], b[:, :90]) for a, b in zip(*found, strict=True)), "the past changed"
    assert not any(t[:, 90:].any() for t in found[1][1:]), "a gradient reached the future"
    return "bit for bit"


def nan_stays() -> str:
    x = {name: t.requires_grad_() for name, t in inputs(1, 90).items()}
    with torch.no_grad():
        x["v"][:, 35], x["k"][:, 40], x["g"][:, 45] = torch.nan, torch.nan, torch.nan
    bounds = torch.tensor([0, 33, 50, 90], device="cuda")
    o, state = kda_chunk(**x, output_final_state=True, cu_seqlens=bounds)
    token_wise = torch.autograd.grad(o.sum(), [x[name] for name in ("q", "k", "v", "g", "beta")])
    assert o[:, 33:50].isnan().any() and state[[0, 2]].isfinite().all(), "state"
    assert all(t[:, :33].isfinite().all() and t[:, 50:].isfinite().all() for t in (o, *token_wise)), "leak"
    return "stays"


def long() -> str:
    """131072 tokens in one pass and in two."""
    x = inputs(1, 131072)
    gate = {name: x.pop(name) for name in ("A_log", "dt_bias")}
    whole, final = kda_chunk(**x, **gate, output_final_state=True)
    cut, pieces, state = 70000, [], None
    for part in (slice(cut), slice(cut, None)):
        piece = {name: t[:, part] for name, t in x.items()}
        o, state = kda_chunk(**piece, **gate, initial_state=state, output_final_state=True)
        pieces.append(o)
    errors = distance(torch.cat(pieces, 1), whole.double()), distance(state, final.double())
    assert max(errors) <= LIMITS["o"], errors
    return f"o {errors[0]:.1e} state {errors[1]:.1e}"


def decoding(gate: str = "softplus") -> str:
    """Prefill and decode against one pass of fp64, in a CUDA graph, and only the named slots."""
    x = inputs(3, 80, gate=gate)
    options = {name: x.pop(name) for name in ("A_log", "dt_bias")}
    if gate == "bounded":
        options["gate_lower_bound"] = -5.0
    exact = {
        name: t.double() for name, t in (x | {k: v for k, v in options.items() if k in ("A_log", "dt_bias")}).items()
    }
    bound = {"gate_lower_bound": options["gate_lower_bound"]} if gate == "bounded" else {}
    expected, final = kda_reference(**exact, **bound, output_final_state=True)
    _, state = kda_chunk(**{name: t[:, :70] for name, t in x.items()}, **options, output_final_state=True)
    pool, slots = torch.randn(6, *state.shape[1:], device="cuda"), torch.tensor([4, 0, 2], device="cuda")
    pool[slots] = state
    others, outputs = pool[[1, 3, 5]].clone(), []
    static = {name: t[:, 70].clone() for name, t in x.items()}
    kda_decode_(**static, **options, state=pool.clone(), slots=slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kda_decode_(**static, **options, state=pool, slots=slots)
    for t in range(70, 80):
        for name, tensor in static.items():
            tensor.copy_(x[name][:, t])
        graph.replay()
        outputs.append(out.clone())
    errors = distance(torch.stack(outputs, 1), expected[:, 70:]), distance(pool[slots], final)
    assert torch.equal(pool[[1, 3, 5]], others), "another slot changed"
    assert max(errors) <= LIMITS["o"], errors
    return f"o {errors[0]:.1e} state {errors[1]:.1e}"


def many_short() -> list[int]:
    return torch.tensor([0, *(1 + i % 5 for i in range(300))]).cumsum(0).tolist()


def softplus_cases() -> dict[str, Callable]:
    cases = {f"T={t}": lambda t=t: against_fp64(inputs(1, t)) for t in LENGTHS}
    return cases | {
        "batch of 3": lambda: against_fp64(inputs(3, 130), state=False),
        "300 sequences of 1 to 5": lambda: against_fp64(inputs(1, many_short()[-1]), many_short()),
        "packed": lambda: against_fp64(inputs(1, 500), [0, 3, 3, 70, 360, 361, 500]),
        "causality": causal,
        "NaN in one sequence": nan_stays,
        "131072 tokens": long,
        "prefill, then decode": decoding,
    }


def bounded_cases() -> dict[str, Callable]:
    return {
        "bounded gate": lambda: against_fp64(inputs(1, 300, gate="bounded"), gate_lower_bound=-5.0),
        "bounded gate, decode": lambda: decoding("bounded"),
    }


def log_decay_cases() -> dict[str, Callable]:
    gates = ("near zero", "down to -300", "writes all", "identical keys")
    cases = {gate: lambda gate=gate: against_fp64(inputs(1, 300, gate=gate)) for gate in gates}
    no_write = {"q": 1.0, "k": 1.0, "v": 1.0}  # their gradients are 0 or come through the initial state alone
    return cases | {
        "writes nothing": lambda: against_fp64(inputs(1, 300, gate="writes nothing"), limits=LIMITS | no_write)
    }


def shared_heads() -> dict:
    x = inputs(2, 130, 6)
    return {**x, "q": x["q"][:, :, :3].contiguous(), "k": x["k"][:, :, :3].contiguous()}


def narrow_cases() -> dict[str, Callable]:
    return {
        "K=64 V=32, 1 head": lambda: against_fp64(inputs(2, 130, 1, 64, 32)),
        "K=32 V=64, 5 heads": lambda: against_fp64(inputs(1, 130, 5, 32, 64)),
        "6 heads of v, 3 of q and k": lambda: against_fp64(shared_heads()),
    }


def run_cases(group: str) -> list[tuple[str, str, bool]]:
    rows = []
    for name, case in globals()[group]().items():
        try:
            rows.append((name, case(), True))
        except Exception as error:  # noqa: BLE001 - a case that raises is a row of the table
            rows.append((name, "".join(traceback.format_exception_only(error)).strip().splitlines()[-1][:300], False))
    return rows


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


def time_chunk(tokens: int, heads: int, operator: Callable = kda_chunk, bounds: list[int] | None = None) -> str:
    x = {name: t.requires_grad_() for name, t in inputs(1, tokens, heads).items()}
    options = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds, device="cuda", dtype=torch.int32)}
    do = torch.randn_like(x["v"])

    def both() -> None:
        torch.autograd.grad(operator(**x, **options)[0], list(x.values()), do)

    def forward() -> None:
        with torch.no_grad():
            operator(**x, **options)

    repeats = 20 if operator is kda_chunk else 3
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    one, two = seconds(forward, repeats), seconds(both, repeats)
    return f"forward {1e3 * one:.3f} ms, with backward {1e3 * two:.3f} ms, peak {peak():.2f} GiB"


def peak() -> float:
    """GiB at the peak, less the buffer that `seconds` empties the cache with."""
    return (torch.cuda.max_memory_allocated() - 256 * 2**20) / 2**30


def time_decode(count: int, heads: int = 32) -> str:
    x = {name: t[:, 0] if t.ndim > 2 else t for name, t in inputs(count, 1, heads).items()}
    state, slots = torch.randn(count, heads, 128, 128, device="cuda"), torch.randperm(count, device="cuda")
    ours = seconds(lambda: kda_decode_(**x, state=state, slots=slots))
    torchs = seconds(lambda: kda_decode_torch(**x, state=state, slots=slots))
    moved = 2 * state.numel() * 4 / ours / 1e12
    return f"{1e6 * ours:.0f} us, torch {1e6 * torchs:.0f} us, {moved:.2f} TB/s of state"


def copy_rate() -> float:
    """TB/s of a copy of 1 GiB, bytes read and written."""
    source = torch.empty(2**28, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / seconds(lambda: target.copy_(source)) / 1e12


def timings() -> None:
    print(f"copy: {copy_rate():.2f} TB/s", flush=True)
    for tokens, heads in ((8192, 16), (32768, 16), (131072, 16), (32768, 32)):
        print(f"B1 T{tokens} H{heads} K=V=128: {time_chunk(tokens, heads)}", flush=True)
    bounds = torch.tensor([0, *torch.linspace(256, 4096, 32).long().tolist()]).cumsum(0).tolist()
    print(f"32 packed sequences of 256 to 4096, H16: {time_chunk(bounds[-1], 16, bounds=bounds)}", flush=True)
    print(f"torch, B1 T8192 H16: {time_chunk(8192, 16, kda_chunk_torch)}", flush=True)
    for count in (1, 64, 256, 1024):
        print(f"decode N={count} H32: {time_decode(count)}", flush=True)


def main() -> int:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    groups = ["softplus_cases", "bounded_cases", "log_decay_cases", "narrow_cases"]
    with multiprocessing.get_context("spawn").Pool(len(groups)) as pool:
        rows = [row for group in pool.imap_unordered(run_cases, groups) for row in group]
    for name, line, passed in rows:
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {line}", flush=True)
    timings()
    failed = sum(not passed for *_, passed in rows)
    print(f"{len(rows) - failed} of {len(rows)} cases passed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
