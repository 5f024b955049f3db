"""Buckets: every element travels once, in bounded memory, and lands where it belongs."""

import subprocess
import sys

import pytest
import torch

from deltarl.rollout.sync import Place, checksums_in, compare, layout_of, part_of
from deltarl.rollout.transfer import FileMemory, attach, pack, plan_buckets, unpack
from deltarl.rollout.types import WeightSyncError


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "scalar": (),
        "vector": (37,),
        "matrix": (19, 23),
        "conv": (12, 1, 4),
        "one": (1, 1, 5, 1),
        "wide": (2, 90),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("most", [1, 64, 100, 1000, 1 << 20])
def test_buckets_cover_every_row_once_within_their_size(most) -> None:
    held = tensors() | {f"half.{name}": tensor for name, tensor in tensors(torch.bfloat16).items()}
    layout = layout_of(held)
    plan = plan_buckets(layout, most)
    seen: dict[str, list[int]] = {name: [] for name in held}
    for bucket in plan.buckets:
        sizes = []
        for name, begin, end in bucket.pieces:
            assert layout[name].dtype == bucket.dtype
            seen[name] += range(begin, end)
            row = held[name].numel() // max(1, len(held[name]) if held[name].dim() else 1)
            sizes.append((end - begin) * row * bucket.dtype.itemsize)
        assert sum(sizes) <= most or [piece.end - piece.begin for piece in bucket.pieces] == [1]
        assert sum(sizes) <= plan.bytes
    assert seen == {name: list(range(len(tensor) if tensor.dim() else 1)) for name, tensor in held.items()}


@pytest.mark.parametrize("most", [64, 1 << 20])
def test_what_is_packed_arrives_in_the_engine_s_dtype_and_shape(most) -> None:
    offered = tensors()
    store = torch.zeros(40, 23)
    held = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in offered.items()}
    held["conv"] = torch.zeros(12, 4)
    held["matrix"] = store[1:39:2]  # not contiguous
    layout = layout_of(held)
    plan = plan_buckets(layout, most)
    memory = torch.zeros(plan.bytes, dtype=torch.uint8)
    for bucket in plan.buckets:
        pack(bucket, memory, layout, offered)
        unpack(bucket, memory, layout, held)
    for name, tensor in offered.items():
        torch.testing.assert_close(held[name], tensor.reshape(held[name].shape).to(held[name].dtype), rtol=0, atol=0)
    assert not store[::2].any()


@pytest.mark.parametrize("most", [64, 1 << 20])
def test_ranks_take_their_parts(most) -> None:
    offered = {name: tensor for name, tensor in tensors().items() if name not in ("scalar", "one", "vector")}
    cuts = {"matrix": 0, "conv": None, "wide": 1}
    offered["matrix"] = offered["matrix"][:18]
    layout = {
        name: Place(tensor.shape, tensor.dtype, cuts[name], 1 if cuts[name] is None else 3)
        for name, tensor in offered.items()
    }
    plan = plan_buckets(layout, most)
    memory = torch.zeros(plan.bytes, dtype=torch.uint8)
    expected = [{name: part_of(offered[name], layout[name], rank) for name in offered} for rank in range(3)]
    assert expected[2]["matrix"].shape == (6, 23) and expected[0]["wide"].shape == (2, 30)
    held = [{name: torch.zeros_like(part) for name, part in parts.items()} for parts in expected]
    for bucket in plan.buckets:
        pack(bucket, memory, layout, offered)
        for rank in range(3):
            unpack(bucket, memory, layout, held[rank], rank)
    torch.testing.assert_close(held, expected, rtol=0, atol=0)
    arrived = [checksums_in(parts) for parts in held]
    size, _ = compare(offered, layout, arrived)
    assert size == sum(tensor.nbytes for tensor in offered.values())
    with pytest.raises(WeightSyncError, match="wrong matrix, wide;"):
        compare(offered, layout, arrived[::-1])


def test_another_process_sees_the_memory() -> None:
    memory = FileMemory(None, 4096)
    code = (
        "import sys; from deltarl.rollout.transfer import attach; memory = attach(sys.argv[1], 4096); "
        "assert memory.tensor[:3].tolist() == [7, 8, 9]; memory.tensor[4095] = 5"
    )
    memory.tensor[:3] = torch.tensor([7, 8, 9])
    subprocess.run([sys.executable, "-P", "-c", code, memory.handle], check=True)
    assert memory.tensor[4095] == 5
    again = attach(memory.handle, 4096)
    memory.release()
    assert again.tensor[4095] == 5
    again.release()
