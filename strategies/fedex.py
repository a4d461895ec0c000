"""FedEx-LoRA (Singhal et al., ACL 2025, arXiv 2410.09432): average the factors and put what is lost into the base.

The residual sum_k p_k B_k A_k - B A of the averaged factors equals sum_k p_k (B_k - B)(A_k - A), whose rank is at most
(K - 1) r because sum_k p_k (B_k - B) = 0. It is sent in that factored form or densely, whichever is smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from fedlora.adapters import State
from fedlora.adapters.lora import Lora
from fedlora.correction import CorrectionLog
from fedlora.errors import InputError
from fedlora.lowrank import LowRank
from fedlora.model import AdaptedModel
from strategies.base import FederatedStrategy, Outgoing, Reply, weighted_mean


class FedEx(FederatedStrategy):
    """Exact aggregation of LoRA. A client that was away receives the residuals it missed when it returns."""

    exact: ClassVar[bool | None] = True

    def __init__(self, weighting: Literal["examples", "uniform"] = "examples") -> None:
        super().__init__(weighting)
        self.log = CorrectionLog()
        self.held: dict[str, int | None] = {}
        self._addressed: dict[str, int] = {}
        self._scale = 1.0
        self._modules: tuple[str, ...] = ()

    def prepare(self, model: AdaptedModel) -> None:
        """Needs both LoRA factors."""
        adapter = model.adapter
        if type(adapter) is not Lora:  # FFA-LoRA is a Lora too, with one factor only
            raise InputError(
                f"strategy=fedex needs adapter=lora, not {adapter.label}: it corrects the product of two "
                "averaged factors. For an affine adapter strategy=average is already exact."
            )
        self._scale, self._modules = cast(Lora, adapter).scale, tuple(model.layers)

    def send(self, client: str, server_round: int, state: State) -> Outgoing:
        """The averaged factors, and what brings the client's base up to date."""
        self._addressed[client] = self.log.version
        return Outgoing(state, self.log.update_since(self.held.get(client, 0)))

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """Average the factors; log the residual of the product."""
        for reply in replies:
            self.held[reply.client] = self._addressed[reply.client]
        mean = weighted_mean(replies)
        self.log.append({module: self._residual(module, mean, replies) for module in self._modules})
        return mean

    def failed(self, client: str) -> None:
        """Its base is unknown now: next time it gets the whole sum."""
        self.held[client] = None

    def residual(self) -> dict[str, LowRank]:
        """The last round's residual."""
        return self.log.recent.get(self.log.version, {})

    def base_correction(self) -> dict[str, Tensor]:
        """The sum of all residuals."""
        return self.log.total

    def state_dict(self) -> dict[str, Any]:
        """The correction log and which base each client holds."""
        return {"log": self.log.state_dict(), "held": dict(self.held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.log.load_state_dict(state["log"])
        self.held = dict(state["held"])

    def _residual(self, module: str, mean: State, replies: Sequence[Reply]) -> LowRank:
        """s sum_{k<K} p_k (B_k - B)(A_k - A_K): the residual with its one dependent term eliminated."""
        key_b, key_a = f"{module}.lora_B.weight", f"{module}.lora_A.weight"
        *others, last = replies
        lefts = [self._scale * reply.weight * (reply.state[key_b] - mean[key_b]) for reply in others]
        rights = [reply.state[key_a] - last.state[key_a] for reply in others]
        if not others:
            return LowRank(mean[key_b][:, :0], mean[key_a][:0])
        return LowRank(torch.cat(lefts, 1), torch.cat(rights, 0))
