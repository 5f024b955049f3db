"""Every Triton operator and its gradients once on small shapes, for compute-sanitizer:

compute-sanitizer --tool memcheck python tests/gpu/small_shapes.py
compute-sanitizer --tool racecheck python tests/gpu/small_shapes.py
"""

import torch
from kernels_gpu import inputs

from deltarl.kernels import Pending, add_rms_norm_, causal_conv1d, gated_rms_norm, gdn_chunk, kda_chunk, kda_decode_

SHAPES = (
    # K, V, tokens, heads, options
    (128, 128, 130, 2, {}),
    (64, 64, 70, 1, {}),
    (32, 64, 70, 1, {}),
    (128, 128, 200, 1, {"cu_seqlens": torch.tensor([0, 3, 3, 70, 200])}),
    (128, 128, 20, 2, {"gate_lower_bound": -5.0}),
)


def main() -> None:
    for key, value, tokens, heads, options in SHAPES:
        x = {name: t.requires_grad_() for name, t in inputs(1, tokens, heads, key, value).items()}
        per_head = {**x, "g": x["g"][..., 0], "dt_bias": x["dt_bias"].view(heads, -1)[:, 0]}
        for operator, given in ((kda_chunk, x), (gdn_chunk, per_head)):
            o, state = operator(**given, output_final_state=True, **options)
            torch.autograd.grad(o.float().sum() + state.sum(), list(x.values()))

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").bfloat16().requires_grad_()

    rows, taps = leaf(1, 70, 256), leaf(256, 4)
    y, _ = causal_conv1d(rows, taps, cu_seqlens=torch.tensor([0, 3, 70]))
    torch.autograd.grad(y.float().sum(), [rows, taps])
    rows, gate, weight = leaf(1, 70, 2, 128), leaf(1, 70, 2, 128), leaf(128)
    torch.autograd.grad(gated_rms_norm(rows, gate, weight, eps=1e-5).float().sum(), [rows, gate, weight])
    with torch.no_grad():
        add_rms_norm_(rows[0, :, 0], weight, eps=1e-5, residual=torch.randn(70, 128, device="cuda"))
    token = {name: t[0] if t.ndim > 2 else t for name, t in inputs(1, 5, 2).items()}
    slots = torch.tensor([3, 1, 0, -1, 7], device="cuda")
    state = torch.randn(8, 2, 128, 128, device="cuda")
    kda_decode_(**token, state=state, slots=slots)
    tokens = torch.empty(5, 2, 2, 3 * 128, device="cuda")
    for count, stays in ((0, 1), (1, 1), (2, 0)):
        place = torch.tensor([count, stays], dtype=torch.int32, device="cuda")
        kda_decode_(**token, state=state, slots=slots, pending=Pending(tokens, place))
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
