"""Personal LoRA: beside a shared, affine part every client has a private one: dW_k = s (B A + B_k A_k).

This is the idea of pFedLoRA (Yi et al. 2023, arXiv 2310.13283: private models beside one shared adapter, trained in
turn) for clients with a common backbone; the form is ours. A has orthonormal rows from the seed and is frozen, so only
B travels and its mean is exact. In every round a client trains what is private with B at rest, then B with the private
part at rest, on the same batches. The private part is

- ``free``: LoRA of any rank, B_k and A_k trained; its rank may differ from client to client, and
- ``split``: only B_k is trained, on orthonormal rows A_k of the client's own, orthogonal to the shared ones and to
  those of all others. Then <B A, B_k A_k> = 0 and <B_i A_i, B_j A_j> = 0: what is common and what is a client's own
  are kept apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import Tensor, nn

from fedlora.adapters.base import AdapterConfig, Drawn, InTurn, Phase, Place, State, register
from fedlora.adapters.bases import OwnRows, orthonormal_rows
from fedlora.adapters.core import FactorsLinear
from fedlora.adapters.factored import LowRankAdapter, LowRankConfig, factor_weight, modules_of, seeded_uniform
from fedlora.errors import InputError
from fedlora.lowrank import LowRank

Rank = Annotated[int, Field(ge=1)]
PRIVATE_A, PRIVATE_B = "lora_private_A", "lora_private_B"


@dataclass
class PersonalLoraPeftConfig(LoraConfig):
    """PEFT's LoRA, and the rank of the private part."""

    private_rank: int = 1


class PersonalLinear(FactorsLinear):
    """A PEFT LoRA layer with a second pair of factors: y = W x + s (B A x + B_k A_k x)."""

    adapter_layer_names = (*FactorsLinear.adapter_layer_names, PRIVATE_A, PRIVATE_B)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Create A ``[r, n]``, B ``[m, r]`` as PEFT does, and the private ones of rank ``config.private_rank``."""
        rank = cast(PersonalLoraPeftConfig, config).private_rank
        n, m = cast(int, self.in_features), cast(int, self.out_features)
        for factor, inputs, outputs in ((PRIVATE_A, n, rank), (PRIVATE_B, rank, m)):
            if not hasattr(self, factor):
                setattr(self, factor, nn.ModuleDict())
            getattr(self, factor)[adapter_name] = nn.Linear(inputs, outputs, bias=False)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def mapped(self, x: Tensor, adapter: str) -> Tensor:
        """B A x + B_k A_k x."""
        private = getattr(self, PRIVATE_B)[adapter](getattr(self, PRIVATE_A)[adapter](x))
        return self.lora_B[adapter](self.lora_A[adapter](x)) + private


class PersonalLoraConfig(LowRankConfig):
    """Settings of personal LoRA; ``rank`` is that of the shared part, and the scale of both parts is that of ``rank``.

    Attributes:
        subspace: of the private part: ``free`` (A_k is trained) or ``split`` (A_k has rows of the client's own).
        private_rank: of the private part: one for all clients, several in the order of their sorted ids and from the
            start again after the last, or drawn with the given shares.
        alternate: what is private first, then what is shared; otherwise both at once.
    """

    subspace: Literal["free", "split"]
    private_rank: Rank | InTurn[Rank] | Drawn[Rank]
    alternate: bool


@register("personal_lora")
class PersonalLora(LowRankAdapter):
    """Of the four factors B travels, B_k (and a trained A_k) stays at its client, the others follow from the seed."""

    Config = PersonalLoraConfig
    needs_clients = True
    affine = True  # in what travels
    ranked = (PRIVATE_A, PRIVATE_B)

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self._rows = OwnRows(self.private_rank, common=self.sizes.rank)

    @property
    def settings(self) -> PersonalLoraConfig:
        """The settings with their own type."""
        return cast(PersonalLoraConfig, self.config)

    @property
    def split(self) -> bool:
        """Whether the private part has rows of its own."""
        return self.settings.subspace == "split"

    @property
    def client_ranks(self) -> list[int] | dict[int, float] | None:
        """Private ranks, where clients differ."""
        ranks = self.settings.private_rank
        return None if isinstance(ranks, int) else ranks

    @property
    def private_rank(self) -> int:
        """The largest one."""
        ranks = self.settings.private_rank
        return ranks if isinstance(ranks, int) else max(ranks)

    @property
    def label(self) -> str:
        """``personal_lora[free]`` or ``[split]``, and ``[r=2..8]`` and ``[at once]`` where it is so."""
        ranks = self.client_ranks
        differ = "" if ranks is None else f"[r={min(ranks)}..{max(ranks)}]"
        return f"{self.config.name}[{self.settings.subspace}]{differ}{'' if self.settings.alternate else '[at once]'}"

    def peft_config(self) -> LoraConfig:
        """PEFT's LoRA with our layer in place of its own."""
        return self.lora_config(PersonalLoraPeftConfig, PersonalLinear, private_rank=self.private_rank)

    def place(self, key: str, tensor: Tensor) -> Place:
        """B travels; A_k is trained, or the client's own rows."""
        places: dict[str, Place] = {
            "lora_A": "frozen",
            "lora_B": "shared",
            PRIVATE_A: "client" if self.split else "private",
            PRIVATE_B: "private",
        }
        return places[key.split(".")[-2]]

    def trains(self, key: str, tensor: Tensor) -> bool:
        """Whether it travels, or is private."""
        return self.place(key, tensor) in ("shared", "private")

    def phases(self) -> tuple[Phase, ...]:
        """What is private, then what travels."""
        return (Phase("private"), Phase("shared")) if self.settings.alternate else super().phases()

    def check(self, layers: Mapping[str, BaseTunerLayer], tensors: Mapping[str, Tensor]) -> None:
        """Refuse also layers that are too small for the private part, or for rows of every client's own."""
        super().check(layers, tensors)
        rank, private, clients = self.sizes.rank, self.private_rank, len(self.clients)
        for name, layer in layers.items():
            n, m = int(layer.in_features), int(layer.out_features)  # pyright: ignore
            if private > min(m, n):
                raise InputError(
                    f"adapter.private_rank = {private} is larger than layer '{name}' ({m} x {n}). Use "
                    f"adapter.private_rank <= {min(m, n)}."
                )
            if self.split and rank + clients * private > n:
                most = (n - rank) // clients if clients else private
                fewer = f"adapter.private_rank <= {most}, " if most else ""
                raise InputError(
                    f"adapter.subspace=split needs adapter.rank = {rank} shared rows and adapter.private_rank = "
                    f"{private} of its own for each of {clients} training clients, {rank + clients * private} in all, "
                    f"and layer '{name}' has n = {n} input features: enough for {(n - rank) // private} clients. Use "
                    f"{fewer}fewer clients (partition.min_rows, or a partition with partition.clients), or "
                    "adapter.subspace=free."
                )

    def initialise(self, layers: Mapping[str, LoraLayer], seed: int, gradients: State | None = None) -> None:
        """The model starts as the backbone: B and B_k are zero. A_k is seeded, or zero where clients have their own."""
        with torch.no_grad():
            for name, layer in layers.items():
                a, own = factor_weight(layer, "lora_A"), factor_weight(layer, PRIVATE_A)
                factor_weight(layer, "lora_B").zero_()
                factor_weight(layer, PRIVATE_B).zero_()
                if a.is_meta:
                    continue
                a.copy_(orthonormal_rows(a.shape[1], [a.shape[0]], seed, name))
                own.zero_() if self.split else own.copy_(seeded_uniform(*own.shape, seed, name, "private"))

    def own_tensors(self, layers: Mapping[str, Any], seed: int, client: str) -> State:
        """The rows of the client, in each layer."""
        if not self.split:
            return {}
        place = self.clients.index(client)
        held = {name: factor_weight(layer, PRIVATE_A) for name, layer in layers.items()}
        return {
            f"{name}.{PRIVATE_A}.weight": torch.zeros_like(a)
            if a.is_meta
            else self._rows.of(place, len(self.clients), a.shape[1], seed, name)
            for name, a in held.items()
        }

    def delta(self, state: Mapping[str, Tensor]) -> dict[str, LowRank]:
        """dW of the shared part, s B A; of both, ``s [B B_k] [A; A_k]``, where the state has private factors."""
        deltas = {}
        for module in modules_of(state):
            b, a = state[f"{module}.lora_B.weight"], state[f"{module}.lora_A.weight"]
            if f"{module}.{PRIVATE_B}.weight" in state:
                b = torch.cat([b, state[f"{module}.{PRIVATE_B}.weight"]], 1)
                a = torch.cat([a, state[f"{module}.{PRIVATE_A}.weight"]], 0)
            deltas[module] = LowRank(b * self.scale, a)
        return deltas
