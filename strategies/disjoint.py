"""Clients in disjoint subspaces: their updates are summed, and the server can tell every client's part of the sum.

With orthonormal rows A_k of its own (adapter=orthogonal, adapter.subspace=disjoint), A_i A_j^T = 0 for i != j, client k
owns one block s B_k A_k of dW = sum_k s B_k A_k: ||dW||^2 = sum_k ||s B_k A_k||^2, and dW A_k^T A_k is its block alone.
A mean with weights p_k would shrink every block by p_k, and no other client could make up for it; so this is a sum.

``open``: every client's base holds the sum of all blocks, so it learns on top of the others. It trains a fresh B from
zero in its rows; that is added to its block and to the base. ``strict``: a client's model holds its own block only, so
no block ever depends on another client's data; the global model is the sum of what was learned apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from fedlora.adapters import State
from fedlora.adapters.orthogonal import OrthogonalLora
from fedlora.errors import InputError
from fedlora.lowrank import LowRank
from fedlora.model import AdaptedModel
from strategies.base import Outgoing, Reply, weighted_mean
from strategies.corrected import CorrectedStrategy

FILE = "blocks"


class Disjoint(CorrectedStrategy):
    """Exact for the sum. The head is averaged as usual.

    Attributes:
        blocks: B of every module, for each client that has trained.
    """

    sums: ClassVar[bool] = True
    own_subspaces: ClassVar[bool] = True

    def __init__(
        self,
        weighting: Literal["examples", "uniform"] = "examples",
        isolation: Literal["open", "strict"] = "open",
    ) -> None:
        """``weighting`` is that of the head; ``isolation`` says what a client's base holds."""
        super().__init__(weighting)
        if isolation not in ("open", "strict"):
            raise InputError(f"strategy.isolation = {isolation!r} is not valid: use 'open' or 'strict'.")
        self.isolation = isolation
        self.restarts = isolation == "open"
        self.blocks: dict[str, State] = {}
        self._total: dict[str, Tensor] | None = None
        self._head: tuple[str, ...] = ()
        self._factors: tuple[str, ...] = ()

    def prepare(self, model: AdaptedModel) -> None:
        """Needs rows of its own for every client."""
        if not (isinstance(model.adapter, OrthogonalLora) and model.own):
            raise InputError(
                f"strategy=disjoint sums updates of clients in subspaces of their own, and adapter="
                f"{model.adapter.label} has one for all. Use adapter=orthogonal adapter.subspace=disjoint."
            )
        self._model = model
        self._head = tuple(key for key in model.shared if key in model.head)
        self._factors = tuple(key for key in model.shared if key not in model.head)

    def send(self, client: str, server_round: int, state: State) -> Outgoing:
        """The head, and ``open``: the blocks that the client's base lacks, to start afresh; ``strict``: its own."""
        if self.isolation == "strict":
            return Outgoing({**state, **self.blocks.get(client, {})})
        head = {key: state[key] for key in self._head}
        return Outgoing(head, self.update_for(client), {"restart": True})

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """Put every client's update into its block. The B of the global state stays zero: the sum is in the base."""
        trained = {reply.client: {key: reply.state[key].clone() for key in self._factors} for reply in replies}
        self._total = None
        if self.isolation == "strict":
            self.blocks |= trained
            self._last = self.update_of(trained)
        else:
            for client, block in trained.items():
                held = self.blocks.get(client)
                self.blocks[client] = block if held is None else {key: held[key] + block[key] for key in block}
            self.add_residual(self.update_of(trained), replies)
        return {**state, **weighted_mean(replies, self._head)}

    def update_of(self, blocks: Mapping[str, State]) -> dict[str, LowRank]:
        """sum_k s B_k A_k of every module over some clients' ``{client: B}``."""
        scale = cast(OrthogonalLora, self._model.adapter).scale
        owned = {client: self._model.own_of(client) for client in blocks}
        return {
            module: LowRank(
                torch.cat([block[f"{module}.lora_B.weight"] for block in blocks.values()], 1) * scale,
                torch.cat([owned[client][f"{module}.lora_A.weight"] for client in blocks], 0),
            )
            for module in self._model.layers
        }

    def squared_norms(self) -> dict[str, float]:
        """||s B_k A_k||^2 over all modules, for each client; they sum to that of the whole."""
        return {
            client: sum(update.norm() ** 2 for update in self.update_of({client: block}).values())
            for client, block in self.blocks.items()
        }

    def forget(self, client: str) -> None:
        """Remove the block of ``client``; all others stay as they are."""
        del self.blocks[client]
        self._total = None

    def total(self) -> dict[str, Tensor]:
        """The sum of all blocks, dense ``{module: [m, n]}``: in fp64 in the order of clients, then fp32."""
        ordered = {client: self.blocks[client] for client in sorted(self.blocks)}
        if not ordered:
            return {}
        return {module: update.double().dense().float() for module, update in self.update_of(ordered).items()}

    def base_correction(self) -> dict[str, Tensor]:
        """The sum of all blocks; where clients hold it, as they have added it up round by round."""
        if self.log.version:
            return super().base_correction()
        if self._total is None:
            self._total = self.total()
        return self._total

    def keepsakes(self) -> dict[str, State]:
        """All blocks, so that one can be taken out of the sum later: ``{"<client>/<key>": B}``."""
        return {FILE: {f"{client}/{key}": b for client, block in self.blocks.items() for key, b in block.items()}}

    def keep_blocks(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over :meth:`keepsakes` of a finished run."""
        self.blocks, self._total = {}, None
        for name, b in tensors.items():
            client, _, key = name.rpartition("/")
            self.blocks.setdefault(client, {})[key] = b

    def state_dict(self) -> dict[str, Any]:
        """The blocks, the correction log and which base each client holds."""
        return {**super().state_dict(), "blocks": {client: dict(block) for client, block in self.blocks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self.blocks, self._total = {client: dict(block) for client, block in state["blocks"].items()}, None
