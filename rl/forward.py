"""Log-probabilities of the completions in a pack, without [T, vocabulary] logits in memory."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.kernels import ChunkedLogProbFunction

from deltarl.model import HybridForCausalLM
from deltarl.model.packed import IMPLEMENTATION, Packing, enable_packing
from deltarl.rl.errors import UserError
from deltarl.rl.packing import Pack

VOCABULARY_TILE = 32768


@dataclass(frozen=True)
class Scored:
    """Of every completion token of a pack: its logprob [S] and the entropy [S] of the distribution it is of, in nats.

    hidden: the states [S, D] that the distributions come from, those after the token before; None unless asked for.
    """

    logprobs: Tensor
    entropies: Tensor | None
    hidden: Tensor | None


def enable_scoring(model: nn.Module) -> None:
    """Give a causal LM's forward the argument `score`, for `packed_logprobs`.

    It goes through `forward` so that the wrappers of data-parallel and sharded training see the call. Says so where a
    model cannot be packed exactly: its sequences are then padded. Raises UserError for a model whose logits are not
    those of its output embeddings.
    """
    plain = model.forward

    def forward(self: Any, *args: Any, score: tuple[Tensor, Tensor, float, bool] | None = None, **inputs: Any) -> Any:
        return plain(*args, **inputs) if score is None else _score(self, score, inputs)

    model.forward = types.MethodType(forward, model)
    if isinstance(model, HybridForCausalLM):
        return
    if not enable_packing(model):
        print(f"{type(model).__name__} cannot be packed exactly: its sequences are padded", file=sys.stderr)
    _check_head(model)


@torch.no_grad()
def _check_head(model: nn.Module) -> None:
    """Compare the logprobs of a few tokens with those of the model's own logits."""
    ids = torch.arange(8, device=model.device).add(3).remainder(model.config.vocab_size)
    pack = Pack([0], ids, [8], [7], torch.arange(7, device=model.device))
    expected = model(ids.unsqueeze(0)).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
    if (packed_logprobs(model, pack).logprobs - expected).abs().max() > 0.02 * expected.abs().max():
        raise UserError(
            f"{type(model).__name__} computes its logits in a way of its own, which is not implemented; give another "
            "model.path"
        )


def checkpoint_activations(model: nn.Module, what: str | Sequence[str]) -> None:
    """Compute activations again in the backward pass: "none", "all" (whole layers), or parts of a hybrid's layers.

    Parts are "linear", "mla" and "ffn". Raises UserError for parts of another model.
    """
    if what == "all":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif what != "none" and not isinstance(model, HybridForCausalLM):
        raise UserError(
            f"rl.gradient_checkpointing: {', '.join(what)} are parts of a hybrid's layers; "
            f"a {type(model).__name__} takes all or none"
        )
    elif what != "none":
        model.recompute(what)


def packed_logprobs(
    model: nn.Module, pack: Pack, *, temperature: float = 1.0, entropy: bool = False, hidden: bool = False
) -> Scored:
    """What `model`, to which `enable_scoring` was applied, says about the completions of a pack.

    Logprobs and entropies are of softmax(logits / temperature). In the backward pass the logits are computed again,
    tile by tile.
    """
    inputs, before = _inputs(model, pack)
    logprobs, entropies, states = model(**inputs, score=(before, pack.targets, temperature, entropy))
    return Scored(logprobs, entropies, states if hidden else None)


def packed_states(model: nn.Module, pack: Pack) -> Tensor:
    """The last hidden states [S, D] of a causal LM after the token before each completion token of a pack."""
    inputs, before = _inputs(model, pack)
    return model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[before]


def _inputs(model: nn.Module, pack: Pack) -> tuple[dict[str, Any], Tensor]:
    """What a model reads of a pack, and where in its output the token before each completion token stands."""
    plain, ids = unwrapped(model), pack.ids.unsqueeze(0)
    if isinstance(plain, HybridForCausalLM):
        cu_seqlens = torch.tensor([0, *pack.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        routing = {} if pack.routing is None else {"routing": pack.routing}
        return {"input_ids": ids, "cu_seqlens": cu_seqlens, **routing}, pack.before
    if not pads(plain):
        packing = Packing(pack.lengths, ids.device)
        return {"input_ids": ids, "position_ids": packing.positions.unsqueeze(0), "packing": packing}, pack.before
    mask = torch.arange(max(pack.lengths)).lt(torch.tensor(pack.lengths).unsqueeze(1)).to(ids.device)
    place = mask.flatten().nonzero().squeeze(1)
    rows = torch.zeros_like(mask, dtype=torch.long).masked_scatter(mask, pack.ids)
    return {"input_ids": rows, "attention_mask": mask.long()}, place[pack.before]


def pads(model: nn.Module) -> bool:
    """Whether a model to which `enable_scoring` was applied runs the sequences of a pack as padded rows."""
    plain = unwrapped(model)
    return not isinstance(plain, HybridForCausalLM) and plain.config._attn_implementation != IMPLEMENTATION


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside data-parallel and adapter wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _score(
    model: Any, score: tuple[Tensor, Tensor, float, bool], inputs: dict[str, Any]
) -> tuple[Tensor, Tensor | None, Tensor]:
    before, targets, temperature, entropy = score
    states = model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[before]
    head = model.get_output_embeddings()
    logprobs, entropies, *_ = ChunkedLogProbFunction.apply(
        states,
        head.weight,
        head.bias,
        targets,
        temperature,
        min(VOCABULARY_TILE, len(head.weight)),
        getattr(model.config, "final_logit_softcapping", None),
        1.0,
        ("log_probs", "entropy") if entropy else ("log_probs",),
    )
    return logprobs, entropies, states
