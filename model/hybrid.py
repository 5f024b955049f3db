"""The hybrid model: transformers' Kimi Linear on our kernels, exact for padded and packed input.

A batch with padding is packed before the first layer and unpacked after the last, so every layer sees only real
tokens and one code path serves padded and packed input. Only generation with a cache runs on padded rows.
"""

import math
from collections.abc import Callable, Collection
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.kimi_linear import modeling_kimi_linear as kimi

from deltarl.kernels import causal_conv1d, gated_rms_norm, gdn_chunk, gdn_recurrent, kda_chunk, kda_recurrent
from deltarl.model.config import LINEAR, HybridConfig
from deltarl.model.packed import Packing

FP32_ALWAYS = ("A_log", "dt_bias")
RECOMPUTABLE = {"linear", "mla", "ffn"}


class ForgetGate(kimi.KimiLinearForgetGate):
    """Holds the gate's parameters and gives its raw projection; the gate itself is computed inside the kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.f_b_proj(self.f_a_proj(hidden_states))

    def _apply(self, fn, recurse: bool = True):
        exact = {name: getattr(self, name).data for name in FP32_ALWAYS}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            parameter = getattr(self, name)
            if parameter.dtype != torch.float32:
                parameter.data = value.to(parameter.device, torch.float32)
        return self


class HeadGate(ForgetGate):
    """The same with one decay a head."""

    def __init__(self, config: HybridConfig):
        nn.Module.__init__(self)
        self.a_proj = nn.Linear(config.hidden_size, config.linear_num_heads, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(config.linear_num_heads))
        self.A_log = nn.Parameter(torch.empty(1, 1, config.linear_num_heads, 1))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.a_proj(hidden_states)


class KimiDeltaAttention(kimi.KimiLinearDeltaAttention):
    """KDA (Kimi Linear, arXiv 2510.26692, section 3 and figure 3)."""

    gate_type = ForgetGate
    chunk, recurrent = staticmethod(kda_chunk), staticmethod(kda_recurrent)

    def __init__(self, config: HybridConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.forget_gate = self.gate_type(config)
        self.gate_lower_bound = config.gate_lower_bound

    def raw_decay(self, hidden_states: Tensor) -> Tensor:
        return self.forget_gate(hidden_states).unflatten(-1, (self.num_heads, self.head_dim))

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        packing: Packing | None = None,
        **kwargs,
    ) -> Tensor:
        """hidden_states [B, T, D] -> [B, T, D]; `attention_mask` [B, T] zeroes left padding, so the state stays 0."""
        cu_seqlens = None if packing is None else packing.cu_seqlens
        hidden_states = kimi.apply_mask_to_padding_states(hidden_states, attention_mask)
        mixed = torch.cat((self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)), -1)
        conv_state = state = None
        if cache_params is not None:
            if cache_params.has_previous_state(self.layer_idx):
                cached = cache_params.layers[self.layer_idx]
                conv_state = cached.conv_states[0][..., 1:].clone()
                state = cached.recurrent_states[0]
            cache_params.update_conv_state(
                mixed.transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv_kernel_size
            )
        mixed, _ = causal_conv1d(mixed, self.conv1d.weight.squeeze(1), cu_seqlens=cu_seqlens, initial_state=conv_state)
        q, k, v = mixed.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        attend = self.recurrent if state is not None and mixed.shape[1] == 1 else self.chunk
        o, state = attend(
            q,
            k,
            v,
            self.raw_decay(hidden_states),
            self.b_proj(hidden_states),
            A_log=self.forget_gate.A_log.flatten(),
            dt_bias=self.forget_gate.dt_bias,
            gate_lower_bound=self.gate_lower_bound,
            initial_state=state,
            output_final_state=cache_params is not None,
            cu_seqlens=cu_seqlens,
        )
        if cache_params is not None:
            cache_params.update_recurrent_state(state, self.layer_idx)
        gate = self.g_b_proj(self.g_a_proj(hidden_states)).view_as(o)
        o = gated_rms_norm(o, gate, self.o_norm.weight, eps=self.o_norm.variance_epsilon)
        return self.o_proj(o.flatten(-2))


class GatedDeltaNet(KimiDeltaAttention):
    """KDA's layer with one decay a head (Gated DeltaNet, arXiv 2412.06464, eq. 10) and everything else the same."""

    gate_type = HeadGate
    chunk, recurrent = staticmethod(gdn_chunk), staticmethod(gdn_recurrent)

    def raw_decay(self, hidden_states: Tensor) -> Tensor:
        return self.forget_gate(hidden_states)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary positions (RoFormer, arXiv 2104.09864, eq. 34): channels 2i and 2i + 1 of x [..., T, heads, D] turned by
    positions [T] times theta^(-2i/D), in fp32."""
    half = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=torch.float32)
    angle = (positions.unsqueeze(-1) * theta ** (-half / x.shape[-1])).unsqueeze(-2)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), -1)
    return turned.flatten(-2).to(x.dtype)


class LatentAttention(kimi.KimiLinearAttention):
    """MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1) without positions, or with rotary ones."""

    def __init__(self, config: HybridConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        for norm in (self.q_a_layernorm, self.kv_a_layernorm):
            if norm is not None:
                norm.variance_epsilon = config.rms_norm_eps

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        packing: Packing | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, D] -> ([B, T, D], weights or None); packed sequences attend within themselves only.

        Packed sequences are attended by `Packing.attend`, whatever attention implementation the configuration names for
        the rest.
        """
        project = self.q_proj if self.q_lora_rank is None else self._low_rank_query
        q = project(hidden_states).unflatten(-1, (-1, self.qk_head_dim))
        latent, shared_key = self.kv_a_proj_with_mqa(hidden_states).split(
            (self.kv_lora_rank, self.qk_rope_head_dim), -1
        )
        if not self.config.mla_use_nope:
            q, shared_key = self._rotated(q, shared_key, past_key_values, packing)
        latent, shared_key = self.kv_a_layernorm(latent).unsqueeze(1), shared_key.unsqueeze(1)
        if past_key_values is not None:
            latent, shared_key = past_key_values.update(latent, shared_key, self.layer_idx)
        k, v = self.expand_kv(latent, shared_key)
        dropout = self.attention_dropout if self.training else 0.0
        if packing is None:
            attend = kimi.ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, kimi.eager_attention_forward
            )
            o, weights = attend(
                self, q.transpose(1, 2), k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
            return self.o_proj(o.flatten(-2)), weights
        o = packing.attend(q[0], k[0].transpose(0, 1), v[0].transpose(0, 1), scale=self.scaling, dropout=dropout)
        return self.o_proj(o.flatten(-2).unsqueeze(0)), None

    def _rotated(
        self, q: Tensor, shared_key: Tensor, cache: Cache | None, packing: Packing | None
    ) -> tuple[Tensor, Tensor]:
        """q [B, T, H, D] and the shared key [B, T, R], their last R channels turned by their tokens' positions.

        Only differences of positions count: padding on the left, which moves them all, changes nothing.
        """
        if packing is not None:
            positions = packing.positions
        else:
            begun = 0 if cache is None else cache.get_seq_length(self.layer_idx)
            positions = torch.arange(begun, begun + q.shape[1], device=q.device)
        plain, turned = q.split((self.qk_nope_head_dim, self.qk_rope_head_dim), -1)
        theta = self.config.rope_theta
        shared_key = rotate(shared_key.unsqueeze(-2), positions, theta).squeeze(-2)
        return torch.cat((plain, rotate(turned, positions, theta)), -1), shared_key

    def _low_rank_query(self, hidden_states: Tensor) -> Tensor:
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))


class Router(kimi.KimiLinearTopkRouter):
    def forward(self, hidden_states: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [..., D] -> logits [tokens, experts], and weights and indices [tokens, top_k] of the experts.

        chosen [tokens, top_k]: experts to take in place of the router's own choice, negative for its own. Their weights
        are this router's, and carry its gradient (rollout routing replay: Ma et al. 2025, arXiv 2510.11370).
        """
        logits, weights, indices = super().forward(hidden_states)
        if chosen is None:
            return logits, weights, indices
        indices = torch.where(chosen < 0, indices, chosen)
        weights = logits.sigmoid().gather(1, indices)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * self.routed_scaling_factor, indices


class MixtureOfExperts(kimi.KimiLinearMoE):
    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.gate = Router(config)

    def forward(self, hidden_states: Tensor, routing: Tensor | None = None) -> Tensor:
        """hidden_states [B, T, D] -> [B, T, D]; routing [B T, top_k]: see `Router`."""
        rows = hidden_states.flatten(0, 1)
        _, weights, indices = self.gate(rows, routing)
        return self.experts(rows, indices, weights).view_as(hidden_states) + self.shared_experts(hidden_states)


class RMSNorm(kimi.KimiLinearRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        """In fp32, rounded once: to the input's dtype, or under autocast to that for all projections that follow."""
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        normed = F.rms_norm(hidden_states.float(), self.weight.shape, self.weight.float(), self.variance_epsilon)
        return normed.to(dtype)


class HybridDecoderLayer(kimi.KimiLinearDecoderLayer):
    def __init__(self, config: HybridConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.sparse_index = None
        if config.mlp_layer_types[layer_idx] == "sparse":
            self.sparse_index = config.mlp_layer_types[:layer_idx].count("sparse")
            self.mlp = MixtureOfExperts(config)
        linear = KimiDeltaAttention if config.linear_attn_kind == "kda" else GatedDeltaNet
        attention = linear if config.layer_types[layer_idx] == LINEAR else LatentAttention
        self.self_attn = attention(config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recomputed: frozenset[str] = frozenset()
        self.draws = bool(config.attention_dropout)

    def forward(self, hidden_states: Tensor, routing: Tensor | None = None, **kwargs) -> Tensor:
        """hidden_states [B, T, D] -> [B, T, D]; kwargs are the attention's. See `HybridForCausalLM.recompute`."""
        kind = "linear" if self.block_type == LINEAR else "mla"
        hidden_states = hidden_states + self._run(kind, self._attend, hidden_states, **kwargs)
        chosen = {} if routing is None or self.sparse_index is None else {"routing": routing[:, self.sparse_index]}
        return hidden_states + self._run("ffn", self._transform, hidden_states, **chosen)

    def _attend(self, hidden_states: Tensor, past_key_values: Cache | None = None, **kwargs) -> Tensor:
        x = self.input_layernorm(hidden_states)
        if self.block_type == LINEAR:
            return self.self_attn(x, cache_params=past_key_values, **kwargs)
        return self.self_attn(x, past_key_values=past_key_values, **kwargs)[0]

    def _transform(self, hidden_states: Tensor, **routing: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(hidden_states), **routing)

    def _run(self, kind: str, part: Callable[..., Tensor], hidden_states: Tensor, **kwargs) -> Tensor:
        if kind not in self.recomputed or not torch.is_grad_enabled():
            return part(hidden_states, **kwargs)
        again = partial(part, **kwargs)
        return checkpoint(again, hidden_states, use_reentrant=False, preserve_rng_state=self.draws)


class HybridPreTrainedModel(kimi.KimiLinearPreTrainedModel):
    config: HybridConfig
    config_class = HybridConfig
    _no_split_modules = ("HybridDecoderLayer",)
    _keep_in_fp32_modules_strict = FP32_ALWAYS

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """transformers' own, with convolutions as wide as torch makes them and residual branches scaled by depth.

        At the default 0.02 a short convolution shrinks q, k, v until the epsilons of their norms dominate them.
        """
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            bound = module.kernel_size[0] ** -0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, HybridDecoderLayer):
            depth = math.sqrt(2 * self.config.num_hidden_layers)
            residual = [module.self_attn.o_proj.weight]
            residual += [p for name, p in module.mlp.named_parameters() if "down_proj" in name]
            for weight in residual:
                init.normal_(weight, std=self.config.initializer_range / depth)


class HybridModel(HybridPreTrainedModel, kimi.KimiLinearModel):
    def __init__(self, config: HybridConfig):
        HybridPreTrainedModel.__init__(self, config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(HybridDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = kimi.KimiLinearRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """Hidden states [B, T, D]; those of padding are zero.

        input_ids [B, T] with `attention_mask` [B, T] (1 = token), padded on either side; or packed, B = 1, with
        `cu_seqlens` [N + 1] or with `position_ids` [1, T] that start again at every sequence. A cache is made only for
        `use_cache=True`, and takes left-padded input. Raises ValueError for a cache with packed or right-padded input.

        routing [T, sparse layers, top_k]: the experts that the tokens of packed input go to, negative for the model's
        own choice; a keyword like the rest of kwargs.
        """
        inputs_embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, tokens, device = *inputs_embeds.shape[:2], inputs_embeds.device
        if use_cache or past_key_values is not None:
            if cu_seqlens is not None or (
                tokens > 1 and attention_mask is not None and not attention_mask[:, -1].all()
            ):
                raise ValueError("generation with a cache needs rows padded on the left: set padding_side='left'")
            return super().forward(
                None, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=True, **kwargs
            )

        real = None
        if attention_mask is not None and not attention_mask.all():
            real = attention_mask.flatten().nonzero().squeeze(1)
            lengths = attention_mask.count_nonzero(1).tolist()
            inputs_embeds = inputs_embeds.flatten(0, 1)[real].unsqueeze(0)
        elif cu_seqlens is not None:
            lengths = cu_seqlens.diff().tolist()
        elif position_ids is not None and batch == 1 and attention_mask is None:
            starts = (position_ids[0].diff() != 1).nonzero().squeeze(1).add(1).tolist()
            lengths = [end - start for start, end in pairwise([0, *starts, tokens])]
        else:
            lengths = [tokens]
        packed = real is not None or len(lengths) > 1
        masks = {"full_attention": None, "linear_attention": None} if packed else None
        packing = Packing(lengths, device) if packed else None
        out = super().forward(None, masks, None, None, inputs_embeds, use_cache=False, packing=packing, **kwargs)
        if real is not None:
            out.last_hidden_state = _unpack(out.last_hidden_state, real, batch, tokens)
            if out.hidden_states is not None:
                out.hidden_states = tuple(_unpack(h, real, batch, tokens) for h in out.hidden_states)
        return out


def _unpack(packed: Tensor, real: Tensor, batch: int, tokens: int) -> Tensor:
    rows = packed.new_zeros(batch * tokens, packed.shape[-1])
    return rows.index_copy(0, real, packed[0]).unflatten(0, (batch, tokens))


class HybridForCausalLM(HybridPreTrainedModel, kimi.KimiLinearForCausalLM):
    """Linear attention and MLA as a language model; `forward` takes what `HybridModel.forward` takes, and labels."""

    def __init__(self, config: HybridConfig):
        HybridPreTrainedModel.__init__(self, config)
        self.model = HybridModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def recompute(self, kinds: Collection[str]) -> None:
        """In training, keep only the input of these parts of every layer and compute them again in the backward pass.

        kinds: of "linear" (KDA or GDN), "mla" and "ffn"; each with the norm before it. Raises ValueError for others.
        """
        if unknown := set(kinds) - RECOMPUTABLE:
            raise ValueError(
                f"cannot recompute {', '.join(sorted(unknown))}: known are {', '.join(sorted(RECOMPUTABLE))}"
            )
        for layer in self.model.layers:
            layer.recomputed = frozenset(kinds)
