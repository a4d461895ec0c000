"""Owners of disjoint subspaces: their updates are summed, and the server can tell every owner's part of the sum.

An owner is a client, or a group of clients (``adapter.groups``). With orthonormal rows A_g of its own
(adapter=orthogonal, adapter.subspace=disjoint), A_i A_j^T = 0 for i != j, owner g has one block s B_g A_g of
dW = sum_g s B_g A_g: ||dW||^2 = sum_g ||s B_g A_g||^2, and dW A_g^T A_g is its block alone. A mean over owners would
shrink every block, and no other owner could make up for it; so this is a sum. The clients of one group train in the
same rows, so there a mean is exact: B_g = sum_k p_k B_k over those of the group that replied, their p_k summing to 1.

``open``: every client's base holds the sum of all blocks, so it learns on top of the others. It trains a fresh B from
zero in its rows; the mean of its group is added to the block and to the base. ``strict``: a client's model holds its
owner's block only, so no block ever depends on the data of another owner; the global model is the sum of what was
learned apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from strategies.means import weights

FILE = "blocks"


class Disjoint(CorrectedStrategy):
    """Exact for the sum of the owners' means. The head is averaged as usual.

    Attributes:
        owners: who owns the rows of each training client: itself, or its group.
        blocks: what is trained of every module (B), for each owner of which a client has trained.
    """

    own_subspaces: ClassVar[bool] = True

    def __init__(
        self,
        weighting: Literal["examples", "uniform"] = "examples",
        isolation: Literal["open", "strict"] = "open",
    ) -> None:
        """``weighting`` is that of the head and inside a group; ``isolation`` says what a client's base holds."""
        super().__init__(weighting)
        if isolation not in ("open", "strict"):
            raise InputError(f"strategy.isolation = {isolation!r} is not valid: use 'open' or 'strict'.")
        self.isolation = isolation
        self.restarts = isolation == "open"
        self.blocks: dict[str, State] = {}
        self._total: dict[str, Tensor] | None = None
        self.owners: Mapping[str, str] = {}
        self._members: dict[str, str] = {}
        self._head: tuple[str, ...] = ()
        self._factors: tuple[str, ...] = ()

    def prepare(self, model: AdaptedModel) -> None:
        """Needs rows of its own for every client or group."""
        adapter = cast(OrthogonalLora, model.adapter)
        if not (isinstance(model.adapter, OrthogonalLora) and adapter.disjoint):
            raise InputError(
                f"strategy=disjoint sums updates of clients in subspaces of their own, and adapter="
                f"{adapter.label} has one for all. Use adapter=orthogonal adapter.subspace=disjoint."
            )
        if self.exact and not adapter.affine:
            raise InputError(
                f"strategy=disjoint is exact where only B is trained, and adapter={adapter.label} trains A too. Use "
                "strategy=o_lora, or adapter=orthogonal adapter.subspace=disjoint."
            )
        if self.isolation == "strict" and adapter.settings.groups and adapter.config.client_modules is not None:
            raise InputError(
                "adapter.client_modules lets the clients of a group train different modules, and with "
                "strategy.isolation=strict a group's block is the mean of what all of them trained. Use "
                "adapter.groups=null, adapter.client_modules=null or strategy.isolation=open."
            )
        self._model, self.owners = model, adapter.owners
        self._members = {owner: client for client, owner in self.owners.items()}
        self._head = tuple(key for key in model.shared if key in model.head)
        self._factors = tuple(key for key in model.shared if key not in model.head)

    def send(self, client: str, server_round: int, state: State) -> Outgoing:
        """The head, and ``open``: the blocks that the client's base lacks, to start afresh; ``strict``: its owner's."""
        if self.isolation == "strict":
            return Outgoing({**state, **self.blocks.get(self.owners[client], {})})
        head = {key: state[key] for key in self._head}
        return Outgoing(head, self.update_for(client), {"restart": True})

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """Put every owner's update into its block. The B of the global state stays zero: the sum is in the base."""
        trained = self._means(replies)
        self._total = None
        if self.isolation == "strict":
            self.blocks |= trained
            self._last = self.update_of(trained)
        else:
            for owner, block in trained.items():
                held = self.blocks.get(owner)
                self.blocks[owner] = block if held is None else {key: held[key] + block[key] for key in block}
            self.add_residual(self.update_of(trained), replies)
        return {**state, **weighted_mean(replies, self._head)}

    def shares(self, clients: Sequence[str], examples: Sequence[int]) -> list[float]:
        """A sum over owners of means over their clients: the shares of each owner sum to 1."""
        places: dict[str, list[int]] = {}
        for place, client in enumerate(clients):
            places.setdefault(self.owners[client], []).append(place)
        found = [0.0] * len(clients)
        for own in places.values():
            for place, share in zip(own, weights([examples[i] for i in own], self.weighting), strict=True):
                found[place] = share
        return found

    def _means(self, replies: Sequence[Reply]) -> dict[str, State]:
        """The mean of what each owner's clients trained."""
        shares = self.shares([reply.client for reply in replies], [reply.examples for reply in replies])
        members: dict[str, list[Reply]] = {}
        for reply, share in zip(replies, shares, strict=True):
            members.setdefault(self.owners[reply.client], []).append(replace(reply, weight=share))
        return {owner: weighted_mean(own, self._factors) for owner, own in members.items()}

    def update_of(self, blocks: Mapping[str, State]) -> dict[str, LowRank]:
        """sum_g s B_g A_g of every module over some owners' ``{owner: B}``."""
        scale = cast(OrthogonalLora, self._model.adapter).scale
        owned = [{**self._model.own_of(self._members[owner]), **block} for owner, block in blocks.items()]
        return {
            module: LowRank(
                torch.cat([block[f"{module}.lora_B.weight"] for block in owned], 1) * scale,
                torch.cat([block[f"{module}.lora_A.weight"] for block in owned], 0),
            )
            for module in self._model.layers
        }

    def squared_norms(self) -> dict[str, float]:
        """||s B_g A_g||^2 over all modules, for each owner; of orthogonal rows they sum to that of dW."""
        return {
            owner: sum(update.norm() ** 2 for update in self.update_of({owner: block}).values())
            for owner, block in self.blocks.items()
        }

    def forget(self, owner: str) -> None:
        """Remove the block of ``owner``; all others stay as they are."""
        del self.blocks[owner]
        self._total = None

    def total(self) -> dict[str, Tensor]:
        """The sum of all blocks, dense ``{module: [m, n]}``: in fp64 in the order of owners, then fp32."""
        ordered = {owner: self.blocks[owner] for owner in sorted(self.blocks)}
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
        """All blocks, so that one can be taken out of the sum later: ``{"<owner>/<key>": B}``."""
        return {FILE: {f"{owner}/{key}": b for owner, block in self.blocks.items() for key, b in block.items()}}

    def keep_blocks(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over :meth:`keepsakes` of a finished run."""
        self.blocks, self._total = {}, None
        for name, b in tensors.items():
            owner, _, key = name.rpartition("/")
            self.blocks.setdefault(owner, {})[key] = b

    def state_dict(self) -> dict[str, Any]:
        """The blocks, the correction log and which base each client holds."""
        return {**super().state_dict(), "blocks": {owner: dict(block) for owner, block in self.blocks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self.blocks, self._total = {owner: dict(block) for owner, block in state["blocks"].items()}, None
