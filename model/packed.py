"""Sequences laid end to end in one row, and causal attention of each within itself.

Other causal LMs than hybrids get it as an attention implementation of transformers: see `enable_packing`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "packed"
WIDEST_FLASH = 256


class Packing:
    """Which tokens of a packed row [1, T, ...] belong together: sequences of the given lengths, one after another."""

    def __init__(self, lengths: list[int], device: torch.device):
        self.lengths = lengths
        self.cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.bounds = self.cu_seqlens.to(device)
        self.positions = torch.cat([torch.arange(n) for n in lengths]).to(device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout: float = 0.0) -> Tensor:
        """Causal attention within every sequence: q, k [T, H, K], v [T, H, V] -> [T, H, V].

        On a GPU one call of torch's fused attention: FlashAttention-2 in 16 bit, to which autocast rounds 32-bit inputs
        as for `scaled_dot_product_attention`, and that of jagged tensors otherwise. Elsewhere one call a sequence. No
        sequence is padded.
        """
        if q.is_cuda:
            dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
            flash = dtype != torch.float32 and max(q.shape[-1], v.shape[-1]) <= WIDEST_FLASH
            attend = self._attend_flash if flash else self._attend_jagged
            return attend(*(x.to(dtype) for x in (q, k, v)), scale, dropout)
        rows = zip(*(x.transpose(0, 1).split(self.lengths, 1) for x in (q, k, v)), strict=True)
        how = {"scale": scale, "dropout_p": dropout, "is_causal": True}
        return torch.cat([F.scaled_dot_product_attention(*row, **how) for row in rows], 1).transpose(0, 1)

    def _attend_flash(self, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
        """The kernel has one width for q, k and v, a multiple of 8: zeros are put behind the channels of each."""
        width, longest = -(-max(q.shape[-1], v.shape[-1]) // 8) * 8, max(self.lengths)
        wide = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        around = (self.bounds, self.bounds, longest, longest)
        o = torch.ops.aten._flash_attention_forward(*wide, *around, dropout, True, False, scale=scale)[0]
        return o[..., : v.shape[-1]]

    def _attend_jagged(self, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
        how = {"offsets": self.bounds.long(), "min_seqlen": min(self.lengths), "max_seqlen": max(self.lengths)}
        rows = (torch.nested.nested_tensor_from_jagged(x.contiguous(), **how).transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(*rows, scale=scale, dropout_p=dropout, is_causal=True)
        return o.transpose(1, 2).values()


def enable_packing(model: PreTrainedModel) -> bool:
    """Let a transformers model take `packing=Packing(...)` and `position_ids` with a packed row [1, T].

    True if it then computes for two packed sequences what it computes for each alone, which is tried. A model that does
    not (state that runs on, attention in a window, a way of its own to attend) is left as it was.
    """
    before = model.config._attn_implementation
    if not model._supports_attention_backend or getattr(model.config, "sliding_window", None) is not None:
        return False
    model.set_attn_implementation(IMPLEMENTATION)
    if _exact(model):
        return True
    model.set_attn_implementation(before)
    return False


@torch.no_grad()
def _exact(model: PreTrainedModel) -> bool:
    lengths, device = [5, 7], model.device
    ids = torch.arange(sum(lengths), device=device).add(3).remainder(model.config.vocab_size).unsqueeze(0)
    training = model.training
    model.eval()
    alone = [model(part, use_cache=False).logits for part in ids.split(lengths, 1)]
    packing = Packing(lengths, device)
    packed = model(ids, position_ids=packing.positions.unsqueeze(0), packing=packing, use_cache=False).logits
    model.train(training)
    expected = torch.cat(alone, 1)
    # A token that sees the sequence before its own is off by far more than rounding.
    return bool((packed - expected).abs().max() <= 0.02 * expected.abs().max())


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, T, K], key and value [B, H or fewer, T, ...] -> [B, T, H, V]."""
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    shared = query.shape[1] // key.shape[1]
    rows = (x[0].transpose(0, 1) for x in (query, repeat_kv(key, shared), repeat_kv(value, shared)))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packing.attend(*rows, scale=scale, dropout=dropout).unsqueeze(0), None


def _mask(*arguments: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """sdpa's mask where there is padding; none for whole rows, which are causal, nor for packed ones."""
    return None if attention_mask is None else sdpa_mask(*arguments, attention_mask=attention_mask, **options)


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
