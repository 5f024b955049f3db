"""The cases of an NVIDIA GPU: the table, and how one of them becomes a call of ours or of a peer.

Names are operator/shape/pass; "backward" is forward and backward. Widths are K = V = 128 where none is named, numbers
bf16, the gate softplus where none is named, and gate, sigmoid and l2-norm inside of the operator.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from deltarl import kernels
from deltarl.kernels.dispatch import TORCH
from deltarl.rl.bench.kernels.gpu import in_a_graph

Tensors = dict[str, Tensor]
Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Built:
    """work: one call; its results, in an order that all implementations share. moved: bytes it must read and write.

    eager: the same call where `work` is the replay of a graph.
    """

    work: Call
    moved: int
    eager: Call | None = None


@dataclass(frozen=True)
class Case:
    """build(implementation, device), of "ours", "torch", "transformers", "fla": None where it has no such operator."""

    name: str
    what: str
    build: Callable[[str, str], Built | None]


@dataclass(frozen=True)
class Shape:
    """lengths: of packed sequences, in the place of batch and tokens. A_log: of every head; drawn where None."""

    batch: int = 1
    tokens: int = 1
    heads: int = 16
    width: int = 128
    lengths: tuple[int, ...] | None = None
    bound: float | None = None
    A_log: float | None = None


def operator(name: str, implementation: str) -> Callable | None:
    if implementation == "ours":
        return getattr(kernels, name, None)
    if implementation == "torch":
        return TORCH.get(name)
    if implementation == "transformers":
        from deltarl.rl.bench.kernels import hf

        return hf.OPERATORS.get(name)
    from deltarl.rl.bench.kernels.fla import OPERATORS

    return OPERATORS.get(name)


def draw(device: str, *shapes: tuple[int, ...]) -> Iterable[Tensor]:
    """Normal numbers in bf16, the same at each call."""
    generator = torch.Generator(device).manual_seed(0)
    for shape in shapes:
        yield torch.randn(shape, generator=generator, device=device).bfloat16()


def raw_inputs(shape: Shape, device: str, *, decays: int) -> Tensors:
    """q, k, v, g, beta as projections make them, A_log, dt_bias; g without its last dimension where `decays` is 1."""
    batch, tokens = (1, sum(shape.lengths)) if shape.lengths else (shape.batch, shape.tokens)
    rows = (batch, tokens, shape.heads)
    wide = (*rows, shape.width)
    gates = wide if decays > 1 else rows
    q, k, v, g, beta, rate, bias = draw(device, wide, wide, wide, gates, rows, gates[2:3], (shape.heads * decays,))
    A_log = torch.full_like(rate.float(), shape.A_log) if shape.A_log is not None else 0.5 * rate.float()
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": bias.float()}


def attention(name: str, shape: Shape, backward: bool, implementation: str, device: str) -> Built | None:
    attend = operator(name, implementation)
    if attend is None or (shape.lengths and implementation == "transformers"):  # which takes no packed sequences
        return None
    options: dict = {} if shape.bound is None else {"gate_lower_bound": shape.bound}
    if shape.lengths:
        options["cu_seqlens"] = torch.tensor([0, *accumulate(shape.lengths)], device=device)
    inputs = raw_inputs(shape, device, decays=shape.width if name == "kda_chunk" else 1)
    return called(partial(attend, **options), inputs, backward)


def called(function: Callable, inputs: Tensors, backward: bool) -> Built:
    """A call of function(**inputs), whose result, or first result, has the shape of the first 4-dimensional input `v`
    or of the first input; with `backward`, the gradients of all inputs as well."""
    like = inputs.get("v", next(iter(inputs.values())))
    read, written = sum(x.nbytes for x in inputs.values()), like.nbytes
    if not backward:
        return Built(partial(forward, function, inputs), read + written)
    (do,) = draw(str(like.device), tuple(like.shape))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    return Built(partial(both, function, leaves, do), 3 * read + 2 * written)


@torch.no_grad()
def forward(function: Callable, inputs: Tensors) -> tuple[Tensor, ...]:
    return (first(function(**inputs)),)


def both(function: Callable, leaves: Tensors, do: Tensor) -> tuple[Tensor, ...]:
    o = first(function(**leaves))
    return o.detach(), *torch.autograd.grad(o, list(leaves.values()), do)


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def decode(count: int, heads: int, graph: bool, implementation: str, device: str) -> Built:
    """One token for each of `count` sequences, the fp32 states in a pool that they fill."""
    call, state, moved = one_token(count, heads, implementation, device)
    eager = partial(as_tuple, call)
    if not graph:
        return Built(eager, moved)
    before = state.clone()
    replay = in_a_graph(call)
    state.copy_(before)
    return Built(partial(as_tuple, replay), moved, eager)


def one_token(count: int, heads: int, implementation: str, device: str) -> tuple[Callable[..., Tensor], Tensor, int]:
    """A step of decoding, the states that it is about, and the bytes that it reads and writes."""
    step = operator("kda_decode_", implementation)
    inputs = raw_inputs(Shape(batch=count, heads=heads), device, decays=128)
    inputs = {name: x[:, 0] if x.ndim > 2 else x for name, x in inputs.items()}
    state, slots = states(count, heads, device, scattered=implementation != "fla")
    moved = 2 * state.nbytes + inputs["v"].nbytes + sum(x.nbytes for x in inputs.values())
    return partial(step, **inputs, state=state, slots=slots), state, moved


def decode_burst(count: int, heads: int, length: int, implementation: str, device: str) -> Built:
    """`length` tokens in a row for each of `count` sequences in one graph; ours write the states with the last."""
    call, state, moved = one_token(count, heads, implementation, device)
    calls = [call] * length
    if implementation == "ours":
        tokens = torch.empty(count, heads, length - 1, 3 * 128, device=device)
        places = [[before, before < length - 1] for before in range(length)]
        places = torch.tensor(places, dtype=torch.int32, device=device)
        calls = [partial(call, pending=kernels.Pending(tokens, place)) for place in places]

    def in_a_row() -> Tensor:
        return [call() for call in calls][-1]

    before = state.clone()
    replay = in_a_graph(in_a_row)
    state.copy_(before)
    written = 1 if implementation == "ours" else length
    moved = length * (moved - state.nbytes) + written * state.nbytes
    return Built(partial(as_tuple, replay), moved, partial(as_tuple, in_a_row))


def states(count: int, heads: int, device: str, *, scattered: bool) -> tuple[Tensor, Tensor]:
    """A pool of states and the slots of the sequences, in order or not; sequence n has the same state either way."""
    generator = torch.Generator(device).manual_seed(1)
    state = torch.randn(count, heads, 128, 128, generator=generator, device=device)
    if not scattered:
        return state, torch.arange(count, device=device)
    slots = torch.randperm(count, generator=generator, device=device)
    return state[torch.argsort(slots)], slots


def as_tuple(call: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (call(),)


def dplr(shape: Shape, backward: bool, implementation: str, device: str) -> Built | None:
    """The recurrence of KDA, whose log-decay is given, beside the same as a case of fla-core's DPLR kernel.

    S_t = Diag(exp g) S - beta k (exp(g) k)^T S + beta k v^T
    """
    attend = operator("dplr_chunk" if implementation == "fla" else "kda_chunk", implementation)
    raw = raw_inputs(shape, device, decays=shape.width)
    q, k = (torch.nn.functional.normalize(raw[name].float(), dim=-1) for name in "qk")
    g, beta = shape.bound * raw["g"].float().sigmoid(), raw["beta"].float().sigmoid()
    written = beta.unsqueeze(-1) * k
    if implementation == "fla":
        inputs = {"q": q, "k": written, "v": raw["v"], "a": k * g.exp(), "b": -written, "g": g}
        attend = partial(attend, lower_bound=shape.bound)
    else:
        inputs = {"q": q, "k": k, "v": raw["v"], "g": g, "beta": beta}
    built = called(attend, {name: x.bfloat16() for name, x in inputs.items()}, backward)
    return Built(partial(only_output, built.work), built.moved)  # gradients are of other inputs


def only_output(work: Call) -> tuple[Tensor, ...]:
    return work()[:1]


def convolution(tokens: int, channels: int, backward: bool, implementation: str, device: str) -> Built | None:
    x, weight = draw(device, (1, tokens, channels), (channels, 4))
    convolve = operator("causal_conv1d", implementation)
    return convolve and called(convolve, {"x": x, "weight": 0.5 * weight}, backward)


def gated_norm(tokens: int, heads: int, backward: bool, implementation: str, device: str) -> Built | None:
    x, gate, weight = draw(device, (1, tokens, heads, 128), (1, tokens, heads, 128), (128,))
    norm = operator("gated_rms_norm", implementation)
    return norm and called(partial(norm, eps=1e-5), {"x": x, "gate": gate, "weight": weight.float()}, backward)


PACKED = tuple(256 + round(i * 3840 / 31) for i in range(32))
LONG = Shape(tokens=32768)
ATTENTION = {
    **{f"kda/b1-t{t}-h{h}": ("kda_chunk", Shape(tokens=t, heads=h)) for h in (16, 32) for t in (8192, 32768, 131072)},
    "kda/packed-32-of-256-to-4096-h16": ("kda_chunk", Shape(lengths=PACKED)),
    "kda/b32-t1024-h8-k64": ("kda_chunk", Shape(batch=32, tokens=1024, heads=8, width=64)),
    "kda/b1-t32768-h16-bounded": ("kda_chunk", Shape(tokens=32768, bound=-5.0)),
    "kda/b1-t32768-h16-near-zero": ("kda_chunk", Shape(tokens=32768, A_log=-9.0)),
    "gdn/b1-t32768-h16": ("gdn_chunk", LONG),
}
OTHERS = {
    "dplr/b1-t32768-h16": ("kda_chunk, fla: DPLR", partial(dplr, Shape(tokens=32768, bound=-5.0))),
    "conv/b1-t32768-d2048": ("causal_conv1d, width 4", partial(convolution, 32768, 2048)),
    "norm/b1-t32768-h16": ("gated_rms_norm", partial(gated_norm, 32768, 16)),
}
PASSES = {"forward": False, "backward": True}
CASES: tuple[Case, ...] = (
    *(
        Case(f"{name}/{which}", f"{op}, {which}", partial(attention, op, shape, backward))
        for name, (op, shape) in ATTENTION.items()
        for which, backward in PASSES.items()
    ),
    *(
        Case(f"{name}/{which}", f"{what}, {which}", partial(build, backward))
        for name, (what, build) in OTHERS.items()
        for which, backward in PASSES.items()
    ),
    *(
        Case(f"decode/n{count}-h32/{how}", f"kda_decode_, {how}", partial(decode, count, 32, graph))
        for count in (1, 64, 256, 1024)
        for how, graph in {"eager": False, "graph": True}.items()
    ),
    *(
        Case(f"decode/n{count}-h32/8-tokens", "kda_decode_, 8 in a row, graph", partial(decode_burst, count, 32, 8))
        for count in (64, 256, 1024)
    ),
)
