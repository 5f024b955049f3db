"""PPO's critic: a value for the state before each completion token, from a head or from a model of its own.

It is no part of the policy: its weights and its optimizer are its own, so that neither the engine nor the policy's
model files ever hold them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltarl.rl.algorithmsections import CriticConfig
from deltarl.rl.forward import packed_states
from deltarl.rl.packing import Pack
from deltarl.rl.sharding import summed


class Critic(nn.Module):
    """V(s_t) = w . h_t + b in float32, with h_t the last hidden state before completion token t; V = 0 at first.

    kind "head": h_t is the policy's own; the value loss reaches the policy's weights times `trunk_gradient`. "model":
    h_t is that of `trunk`, a causal LM that learns with the head, and whose own output layer goes.
    """

    def __init__(self, settings: CriticConfig, width: int, trunk: Any = None) -> None:
        super().__init__()
        self.settings, self.trunk = settings, trunk
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if trunk is not None:
            trunk.set_output_embeddings(nn.Identity())
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=settings.learning_rate, weight_decay=0.0)

    def forward(self, pack: Pack, states: Tensor) -> Tensor:
        """Values [S] of the completion tokens of a pack; states [S, D]: the policy's before each of them."""
        if self.trunk is not None:
            states = packed_states(self.trunk, pack)
        else:
            kept = states.detach()
            states = kept + self.settings.trunk_gradient * (states - kept)
        with torch.autocast(states.device.type, enabled=False):
            return self.head(states.float()).squeeze(-1)

    def update(self, max_grad_norm: float) -> float:
        """One optimizer step on the gradients gathered so far, of all processes together; their norm. Collective.

        Gradients that are not finite are dropped.
        """
        given = [parameter for parameter in self.parameters() if parameter.grad is not None]
        for parameter in given:
            parameter.grad = summed(parameter.grad)
        norm = nn.utils.clip_grad_norm_(given, max_grad_norm)
        if norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()

    def learned(self) -> dict[str, Any]:
        """Weights and optimizer's state, for a checkpoint."""
        return {"weights": self.state_dict(), "optimizer": self.optimizer.state_dict()}

    def go_on(self, state: dict[str, Any]) -> None:
        """Go on from what `learned` gave. Raises RuntimeError for a critic of another kind or width."""
        self.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
