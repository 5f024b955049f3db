"""Gated DeltaNet's kernels on one GPU: every case of the test table against fp64, then times beside KDA's kernels.

Run by hand:  python tests/gpu/gdn_gpu.py        (about a minute and a half, half of it compiling)
Prints one line per case, then one per timing; exit code 1 if a case fails.

An error is RMS(out - reference) / RMS(reference), both on the same inputs.
"""

import multiprocessing
import sys
import traceback
from collections.abc import Callable

import torch
import triton
from kernels_gpu import LENGTHS, LIMITS, copy_rate, distance, many_short, peak, seconds

from deltarl.kernels import kda_reference
from deltarl.kernels.fused.chunk import kda_chunk
from deltarl.kernels.fused.gdn import gdn_chunk
from deltarl.kernels.fused.operators import gdn_chunk as gdn_chunk_chosen
from deltarl.kernels.gdn import gdn_chunk as gdn_chunk_torch

FP32_LIMITS = dict.fromkeys(LIMITS, 1e-5)
TOKEN_WISE = ("q", "k", "v", "g", "beta")


def inputs(
    batch: int,
    tokens: int,
    key_heads: int = 2,
    heads: int = 4,
    key: int = 128,
    value: int = 128,
    gate: str = "softplus",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """Raw projections for the gates "softplus" and "bounded"; for other names g is the log-decay."""
    generator = torch.Generator("cuda").manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    x = {name: draw(batch, tokens, key_heads, key) for name in "qk"}
    x |= {"v": draw(batch, tokens, heads, value), "g": draw(batch, tokens, heads), "beta": draw(batch, tokens, heads)}
    if gate in ("softplus", "bounded"):
        return {**x, "A_log": 0.5 * draw(heads).float(), "dt_bias": draw(heads).float()}
    x["g"] = -x["g"].abs() * (1e-4 if gate == "near zero" else 1.0)
    x["beta"] = {"writes nothing": torch.zeros_like, "writes all": torch.ones_like}.get(gate, torch.sigmoid)(x["beta"])
    if gate == "down to -300":
        x["g"][:, ::7] = -300.0
    if gate == "identical keys":
        x["k"] = x["k"][:, :1].expand_as(x["k"]).contiguous()
    return x


def reference(**x) -> tuple[torch.Tensor, torch.Tensor | None]:
    return kda_reference(**x | {"g": x["g"].unsqueeze(-1)})


def against_fp64(
    x: dict,
    bounds: list[int] | None = None,
    state: bool = True,
    limits: dict = LIMITS,
    operator: Callable = gdn_chunk,
    do_scale: float = 1.0,
    **options,
) -> str:
    """Values and gradients; the same again, bit for bit, with freed memory full of NaN."""
    batch, key = x["q"].shape[0], x["q"].shape[-1]
    if bounds is not None:
        options["cu_seqlens"] = torch.tensor(bounds, device="cuda", dtype=torch.int32)
    sequences = batch if bounds is None else len(bounds) - 1
    if state:
        shape = (sequences, x["v"].shape[2], key, x["v"].shape[3])
        x = {**x, "initial_state": 0.1 * torch.randn(shape, device="cuda")}
    ours = {name: t.clone().requires_grad_() for name, t in x.items()}
    exact = {name: t.double().requires_grad_() for name, t in x.items()}

    def run(operator: Callable, values: dict) -> dict:
        o, final = operator(**values, output_final_state=True, **options)
        generator = torch.Generator("cuda").manual_seed(3)
        do, dfinal = (torch.randn(t.shape, generator=generator, device="cuda") * do_scale for t in (o, final))
        do = do.to(x["v"].dtype).to(o.dtype)
        gradients = torch.autograd.grad((o, final), list(values.values()), (do, dfinal.to(final.dtype)))
        return {"o": o.detach(), "state": final.detach(), **dict(zip(values, gradients, strict=True))}

    expected, got = run(reference, exact), run(operator, ours)
    poison = [torch.full_like(t, torch.nan) for t in (*got.values(), *got.values())]
    del poison
    again = run(operator, ours)
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
    for name in TOKEN_WISE:
        second[name][:, 90:] = torch.randn_like(second[name][:, 90:]) * 3
    found = []
    for x in (first, second):
        leaves = {name: t.requires_grad_() for name, t in x.items()}
        o = gdn_chunk(**leaves)[0][:, :90]
        found.append([o, *torch.autograd.grad(o.float().square().sum(), [leaves[name] for name in TOKEN_WISE])])
    assert all(torch.equal(a[:, :90], b[:, :90]) for a, b in zip(*found, strict=True)), "the past changed"
    assert not any(t[:, 90:].any() for t in found[1][1:]), "a gradient reached the future"
    return "bit for bit"


def alone_or_packed() -> str:
    """A sequence beside one whose values and gradients are 1e6 times as large, and alone."""
    x = inputs(1, 300)
    big = {name: t.clone() for name, t in x.items()}
    big["v"][:, 130:] *= 1e3
    do = torch.randn_like(x["v"])
    do[:, 130:] *= 1e6
    found = []
    for values, tokens, bounds in ((x, 130, [0, 130]), (big, 300, [0, 130, 300])):
        leaves = [values[name][:, :tokens].requires_grad_() for name in TOKEN_WISE]
        gates = {name: values[name] for name in ("A_log", "dt_bias")}
        o, _ = gdn_chunk(*leaves, **gates, cu_seqlens=torch.tensor(bounds, device="cuda"))
        found.append([o, *torch.autograd.grad(o, leaves, do[:, :tokens])])
    assert all(torch.equal(a, b[:, :130]) for a, b in zip(*found, strict=True)), "a neighbour shows"
    return "bit for bit"


def nan_stays() -> str:
    x = {name: t.requires_grad_() for name, t in inputs(1, 90).items()}
    with torch.no_grad():
        x["v"][:, 35], x["k"][:, 40], x["g"][:, 45] = torch.nan, torch.nan, torch.nan
    bounds = torch.tensor([0, 33, 50, 90], device="cuda")
    o, state = gdn_chunk(**x, output_final_state=True, cu_seqlens=bounds)
    do = torch.ones_like(o)
    do[:, 47] = torch.nan
    token_wise = torch.autograd.grad(o, [x[name] for name in TOKEN_WISE], do)
    assert o[:, 33:50].isnan().any() and state[[0, 2]].isfinite().all(), "state"
    assert all(t[:, :33].isfinite().all() and t[:, 50:].isfinite().all() for t in (o, *token_wise)), "leak"
    return "stays"


def long() -> str:
    """131072 tokens in one pass and in two, and gradients near zero decay that stay in range."""
    x = inputs(1, 131072)
    gate = {name: x.pop(name) for name in ("A_log", "dt_bias")}
    whole, final = gdn_chunk(**x, **gate, output_final_state=True)
    cut, pieces, state = 70000, [], None
    for part in (slice(cut), slice(cut, None)):
        piece = {name: t[:, part] for name, t in x.items()}
        o, state = gdn_chunk(**piece, **gate, initial_state=state, output_final_state=True)
        pieces.append(o)
    errors = distance(torch.cat(pieces, 1), whole.double()), distance(state, final.double())
    assert max(errors) <= LIMITS["o"], errors
    leaves = [t.requires_grad_() for t in inputs(1, 131072, gate="near zero").values()]
    gradients = torch.autograd.grad(gdn_chunk(*leaves)[0].float().sum(), leaves)
    assert all(t.isfinite().all() for t in gradients), "out of range"
    return f"o {errors[0]:.1e} state {errors[1]:.1e}"


def softplus_cases() -> dict[str, Callable]:
    cases = {f"T={t}": lambda t=t: against_fp64(inputs(1, t)) for t in LENGTHS}
    return cases | {
        "batch of 3": lambda: against_fp64(inputs(3, 130), state=False),
        "300 sequences of 1 to 5": lambda: against_fp64(inputs(1, many_short()[-1]), many_short()),
        "packed": lambda: against_fp64(inputs(1, 500), [0, 3, 3, 70, 360, 361, 500]),
        "do of 1e-12": lambda: against_fp64(inputs(1, 300), do_scale=1e-12),
        "do of 1e12": lambda: against_fp64(inputs(1, 300), do_scale=1e12),
        "lengths kept": lambda: against_fp64(inputs_of_length_one(), use_qk_l2norm=False, scale=0.3),
        "fp16": lambda: against_fp64(inputs(1, 300, dtype=torch.float16)),
        "fp32, as dispatched": lambda: against_fp64(
            inputs(1, 300, dtype=torch.float32), limits=FP32_LIMITS, operator=gdn_chunk_chosen
        ),
    }


def inputs_of_length_one() -> dict[str, torch.Tensor]:
    x = inputs(1, 300)
    return x | {name: torch.nn.functional.normalize(x[name], dim=-1) for name in "qk"}


def log_decay_cases() -> dict[str, Callable]:
    gates = ("near zero", "down to -300", "writes all", "identical keys")
    cases = {gate: lambda gate=gate: against_fp64(inputs(1, 300, gate=gate)) for gate in gates}
    no_write = {"q": 1.0, "k": 1.0, "v": 1.0}  # their gradients are 0 or come through the initial state alone
    return cases | {
        "writes nothing": lambda: against_fp64(inputs(1, 300, gate="writes nothing"), limits=LIMITS | no_write),
        "bounded gate": lambda: against_fp64(inputs(1, 300, gate="bounded"), gate_lower_bound=-5.0),
    }


def other_cases() -> dict[str, Callable]:
    return {
        "causality": causal,
        "alone or packed": alone_or_packed,
        "NaN in one sequence": nan_stays,
        "131072 tokens": long,
    }


def width_cases() -> dict[str, Callable]:
    widths = [(64, 64, 1, 1), (64, 32, 1, 3), (32, 64, 5, 5), (128, 64, 1, 2), (64, 128, 2, 2), (16, 48, 1, 1)]
    return {
        f"K={key} V={value}, {few} and {heads} heads": lambda key=key, value=value, few=few, heads=heads: against_fp64(
            inputs(2, 130, few, heads, key, value)
        )
        for key, value, few, heads in widths
    }


def run_cases(group: str) -> list[tuple[str, str, bool]]:
    rows = []
    for name, case in globals()[group]().items():
        try:
            rows.append((name, case(), True))
        except Exception as error:  # noqa: BLE001 - a case that raises is a row of the table
            rows.append((name, "".join(traceback.format_exception_only(error)).strip().splitlines()[-1][:300], False))
    return rows


def time_chunk(x: dict[str, torch.Tensor], operator: Callable, repeats: int = 20) -> str:
    x = {name: t.requires_grad_() for name, t in x.items()}
    do = torch.randn_like(x["v"])

    def both() -> None:
        torch.autograd.grad(operator(**x)[0], list(x.values()), do)

    def forward() -> None:
        with torch.no_grad():
            operator(**x)

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    one, two = seconds(forward, repeats), seconds(both, repeats)
    return f"forward {1e3 * one:.3f} ms, with backward {1e3 * two:.3f} ms, peak {peak():.2f} GiB"


def kernel_times(x: dict[str, torch.Tensor]) -> str:
    """Mean time of each kernel of a forward and backward pass."""
    leaves = {name: t.requires_grad_() for name, t in x.items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            o, _ = gdn_chunk(**leaves)
            torch.autograd.grad(o, list(leaves.values()), torch.ones_like(o))
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    return "\n".join(f"    {e.key[:60]}: {e.device_time_total / 1e4:.3f} ms in {e.count // 10}" for e in events[:14])


def timings() -> None:
    print(f"copy: {copy_rate():.2f} TB/s", flush=True)
    shapes = {"B1 T32768 H16": (1, 32768, 16, 16), "B1 T32768, 16 and 32 heads": (1, 32768, 16, 32)}
    shapes |= {"B1 T8192 H16": (1, 8192, 16, 16), "B1 T131072 H16": (1, 131072, 16, 16)}
    for name, shape in shapes.items():
        print(f"{name} K=V=128: {time_chunk(inputs(*shape), gdn_chunk)}", flush=True)
    x = inputs(1, 32768, 16, 16)
    print(kernel_times(x), flush=True)
    wide = x | {"g": torch.randn_like(x["k"]), "dt_bias": x["dt_bias"].detach().repeat_interleave(128)}
    wide = {name: t.detach() for name, t in wide.items()}
    print(f"KDA, B1 T32768 H16 K=V=128: {time_chunk(wide, kda_chunk)}", flush=True)
    print(f"torch, B1 T8192 H16: {time_chunk(inputs(1, 8192, 16, 16), gdn_chunk_torch, 3)}", flush=True)


def main() -> int:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    groups = ["softplus_cases", "log_decay_cases", "other_cases", "width_cases"]
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
