"""Decoding on one GPU: the Triton kernel against fp64 in every shape, dtype and gate that the dispatcher sends to it.

Run by hand:  python tests/gpu/decode_gpu.py        (a minute, most of it compiling)
Prints one line per case; exit code 1 if a case fails. An error is RMS(out - reference) / RMS(reference), both on the
same inputs.
"""

import itertools
import multiprocessing
import sys
import traceback
from functools import partial

import torch
import triton

from deltarl.kernels import Pending, kda_reference
from deltarl.kernels.fused import operators

# o is rounded to its dtype: a half of 2^-8, 2^-11, 2^-24. The states are fp32, whatever the inputs are.
LIMITS = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-5}
STATE_LIMIT = 1e-5
SIZES = (32, 64, 128, 256)
WORKERS = 8


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def inputs(
    count: int, heads: int, key: int, value: int, *, dtype=torch.bfloat16, shared: int = 1, gate: str = "softplus",
    width: int | None = None,
) -> dict:  # fmt: skip
    """Rows of q, k, v and g as views of one projection, as in a model."""
    width = width or key
    sizes = (heads // shared * key, heads // shared * key, heads * value, heads * width, heads)
    parts = draw(count, count, sum(sizes), dtype=dtype).split(sizes, 1)
    x = dict(zip(("q", "k", "v", "g", "beta"), parts, strict=True))
    x |= {name: x[name].unflatten(1, (-1, key)) for name in "qk"}
    x |= {"v": x["v"].unflatten(1, (heads, value)), "g": x["g"].unflatten(1, (heads, width))}
    if gate == "log-decay":
        return x | {"g": -x["g"].abs() * draw(5, heads, 1, dtype=dtype).exp(), "beta": x["beta"].sigmoid()}
    x |= {"A_log": 0.5 * draw(1, heads), "dt_bias": draw(2, heads * width)}
    return x | ({"gate_lower_bound": -5.0} if gate == "bounded" else {})


def norm_of(x: dict) -> dict:
    return {"norm_weight": draw(3, x["v"].shape[-1]), "norm_gate": draw(4, *x["v"].shape, dtype=x["v"].dtype)}


def expected(x: dict, states: torch.Tensor, norm: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """o and the states of the fp64 reference, one token after `states`."""
    exact = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in x.items()}
    exact |= {name: exact[name].unsqueeze(1) for name in ("q", "k", "v", "g", "beta")}
    o, final = kda_reference(**exact, **options, initial_state=states.double(), output_final_state=True)
    o = o.squeeze(1)
    if norm:
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm["norm_weight"].double()
        o = o * norm["norm_gate"].double().sigmoid()
    return o, final


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def against_fp64(x: dict, norm: bool = False, **options) -> str:
    """Values; the same again, bit for bit, with freed memory full of NaN; slots not named hold NaN and keep it."""
    (count, heads, value), key = x["v"].shape, x["q"].shape[-1]
    extra = norm_of(x) if norm else {}
    layers = torch.full((2 * count + 1, 3 * heads, key, value), torch.nan, device="cuda")
    pool, slots = layers[:, heads : 2 * heads], torch.randperm(2 * count, device="cuda")[:count]
    pool[slots] = draw(6, count, heads, key, value)
    wanted, final = expected(x, pool[slots], extra, **options)
    before, found = layers.clone(), []
    for _ in range(2):
        layers.copy_(before)
        poison = torch.full_like(x["v"], torch.nan)
        del poison
        o = operators.kda_decode_(**x, **extra, **options, state=pool, slots=slots)
        found.append((o, pool[slots]))
    untouched = torch.ones(len(pool), dtype=torch.bool, device="cuda")
    untouched[slots] = False
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "not the same twice"
    assert pool[untouched].isnan().all() and layers[:, :heads].isnan().all(), "another slot or layer changed"
    errors = distance(o, wanted), distance(pool[slots], final)
    line = f"o {errors[0]:.1e} state {errors[1]:.1e}"
    assert errors[0] <= LIMITS[o.dtype] and errors[1] <= STATE_LIMIT, line
    return line


def burst(key: int, value: int, norm: bool, width: int | None = None) -> str:
    """Eight tokens in a row, the states written with the last: against fp64, and the same twice."""
    length, count, heads = 8, 40, 4
    steps = [inputs(count + i, heads, key, value, width=width) for i in range(length)]
    steps = [{name: t[:count] if t.ndim > 1 else t for name, t in step.items()} for step in steps]
    extra = norm_of(steps[0]) if norm else {}
    pool, slots = draw(6, 2 * count, heads, key, value), torch.randperm(2 * count, device="cuda")[:count].int()
    slots[7], real = -1, torch.arange(count, device="cuda") != 7
    before, final, found = pool.clone(), pool[slots.long()], []
    for _ in range(2):
        pool.copy_(before)
        tokens = torch.full((count, heads, length - 1, key + (width or key) + value), torch.nan, device="cuda")
        outputs = []
        for i, step in enumerate(steps):
            assert torch.equal(pool, before), "states were written before the last token"
            place = torch.tensor([i, i < length - 1], dtype=torch.int32, device="cuda")
            pending = Pending(tokens, place)
            outputs.append(operators.kda_decode_(**step, **extra, state=pool, slots=slots, pending=pending))
        found.append((torch.stack(outputs), pool.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "not the same twice"
    errors = []
    for step, o in zip(steps, outputs, strict=True):
        wanted, final = expected(step, final, extra)
        errors.append(distance(o[real], wanted[real]))
        assert not o[7].any(), "padding has an output"
    line = f"o {max(errors):.1e} state {distance(pool[slots.long()][real], final[real]):.1e}"
    assert max(errors) <= LIMITS[torch.bfloat16] and distance(pool[slots.long()][real], final[real]) <= STATE_LIMIT, (
        line
    )
    return line


def graph() -> str:
    """Five replays with other inputs and slots each, some of them padding, beside calls without a graph."""
    x, heads = inputs(40, 32, 128, 128), 32
    steps = [
        {name: draw(10 + i, *x[name].shape, dtype=torch.bfloat16) for name in ("q", "k", "v", "g", "beta")}
        for i in range(5)
    ]
    static = {name: torch.empty_like(t) for name, t in steps[0].items()}
    slots, norm = torch.zeros(40, dtype=torch.int32, device="cuda"), norm_of(x)
    gate = {name: x[name] for name in ("A_log", "dt_bias")}
    pool = draw(7, 60, heads, 128, 128)
    twin = pool.clone()
    operators.kda_decode_(**static, **gate, **norm, state=twin.clone(), slots=slots)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = operators.kda_decode_(**static, **gate, **norm, state=pool, slots=slots)
    for i, step in enumerate(steps):
        for name, t in step.items():
            static[name].copy_(t)
        slots.copy_(torch.randperm(60, device="cuda")[:40])
        slots[40 - i :] = -1
        captured.replay()
        o = operators.kda_decode_(**step, **gate, **norm, state=twin, slots=slots)
        assert torch.equal(out, o) and torch.equal(pool, twin), f"replay {i} differs"
        assert not out[40 - i :].any(), "padding has an output"
    return "bit for bit"


def far() -> str:
    """States beyond 2^31 elements of the pool."""
    x, pool = inputs(3, 32, 128, 128), torch.zeros(4200, 32, 128, 128, device="cuda")
    slots = torch.tensor([4199, 1, 4150], device="cuda")
    pool[slots] = draw(8, 3, 32, 128, 128)
    wanted, final = expected(x, pool[slots], {})
    o = operators.kda_decode_(**x, state=pool, slots=slots)
    errors = distance(o, wanted), distance(pool[slots], final)
    assert errors[0] <= LIMITS[o.dtype] and errors[1] <= STATE_LIMIT, errors
    assert not pool[0].any() and not pool[2:4150].any(), "another slot changed"
    return f"o {errors[0]:.1e} state {errors[1]:.1e}"


def cases() -> dict:
    """By name: what `against_fp64` is given, or a function of its own."""
    table: dict = {"CUDA graph, padding": graph, "pool of 8.8 GB": far}
    for key, value in itertools.product(SIZES, SIZES):
        for heads, count in ((2, 3), (128, 9)):
            table[f"K={key} V={value}, {count} of {heads} heads"] = ((count, heads, key, value), {}, {})
        table[f"K={key} V={value}, norm"] = ((5, 2, key, value), {}, {"norm": True})
    for gate in ("bounded", "log-decay"):
        table[gate] = ((300, 4, 128, 128), {"gate": gate}, {})
    for dtype in (torch.float16, torch.float32):
        for key, value in ((64, 32), (128, 128)):
            shape = (300, 4, key, value)
            table[f"{dtype}, K={key} V={value}"] = (shape, {"dtype": dtype}, {})
            table[f"{dtype}, K={key} V={value}, norm"] = (shape, {"dtype": dtype, "shared": 2}, {"norm": True})
    for width, shared in ((1, 1), (1, 4), (None, 2)):
        kind = {"width": width, "shared": shared}
        table[f"{width or 'K'} decays a head, {shared} heads of v to one of q"] = ((300, 4, 128, 128), kind, {})
        table[f"the same, 3 sequences, K=V=64, norm: {width}, {shared}"] = ((3, 4, 64, 64), kind, {"norm": True})
    table["no l2-norm, scale 0.3"] = ((3, 4, 128, 128), {}, {"use_qk_l2norm": False, "scale": 0.3})
    for key, value in ((128, 128), (64, 32), (256, 256)):
        for norm, width in ((False, None), (True, None), (True, 1)):
            name = f"8 tokens in a row, K={key} V={value}{', norm' if norm else ''}, {width or 'K'} decays a head"
            table[name] = partial(burst, key, value, norm, width)
    table["1 sequence of 1 head"] = ((1, 1, 128, 128), {}, {})
    table["no sequence"] = lambda: str(tuple(operators.kda_decode_(
        **{n: t[:0] if t.ndim > 1 else t for n, t in inputs(1, 2, 64, 64).items()},
        state=draw(9, 1, 2, 64, 64), slots=torch.empty(0, dtype=torch.int64, device="cuda")).shape))  # fmt: skip
    return table


def run_cases(worker: int) -> list[tuple[str, str, bool]]:
    rows = []
    for name, case in itertools.islice(cases().items(), worker, None, WORKERS):
        try:
            if callable(case):
                rows.append((name, case(), True))
            else:
                shape, kind, options = case
                rows.append((name, against_fp64(inputs(*shape, **kind), **options), True))
        except Exception as error:  # noqa: BLE001 - a case that raises is a row of the table
            rows.append((name, "".join(traceback.format_exception_only(error)).strip().splitlines()[-1][:300], False))
    return rows


def main() -> int:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        rows = [row for some in pool.imap(run_cases, range(WORKERS)) for row in some]
    for name, line, passed in rows:
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {line}")
    failed = sum(not passed for *_, passed in rows)
    print(f"{len(rows) - failed} of {len(rows)} cases passed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
