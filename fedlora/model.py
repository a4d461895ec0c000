"""A backbone with an adapter in it: which tensors are shared, private and frozen, and how they are read and set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.adapters.base import Adapter, Affinity, Phase, State
from fedlora.adapters.factored import LowRankAdapter
from fedlora.adapters.injection import inject, named_tensors
from fedlora.adapters.probe import measured_delta
from fedlora.capability import WHOLE, Capability
from fedlora.errors import FedloraError, InputError
from fedlora.lowrank import LowRank
from fedlora.packing import Packer
from fedlora.ranks import crop, cut_shapes, pad

Value = TypeVar("Value")


class AdaptedModel:
    """A transformers model with injected adapter layers and an owned list of trainables.

    Keys of a state are PEFT's names without the adapter name (``<module>.lora_A.weight``, ``<module>.miss_block``) for
    the adapter and plain parameter names for the head.

    Attributes:
        module: the model; call it like any transformers model.
        layers: the adapted layers by module name.
        shared: keys that travel, in wire order.
        private: trained keys that never leave the client.
        rounds: keys that are trained anew in every round and folded into what travels.
        own: keys that are not trained and differ from client to client.
        frozen: floating-point keys of the adapter that are not trained and identical on every client.
        head: keys of the task head, wherever it belongs.
        packer: packs padded batches, once it is told to.
        seed: of the run.
    """

    def __init__(self, module: nn.Module, adapter: Adapter, head_modules: Iterable[str], seed: int = 0) -> None:
        """Inject ``adapter`` into ``module`` in place; what PEFT draws comes from ``seed``.

        Raises:
            InputError: the target modules match nothing, the rank exceeds a layer, or PEFT refuses the adapter.
            WeightsNeededError: the module is on the meta device and the adapter's shapes depend on the weights.
        """
        self.adapter = adapter
        self.seed = seed
        heads = tuple(head_modules)
        injected = inject(module, adapter, heads, seed)
        for tensor in injected.tensors.values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()  # PEFT makes them in the format of the backbone
        adapter.check(injected.layers, injected.tensors)
        self.module: nn.Module = injected.tuner.model.eval()
        self.layers = injected.layers
        self.packer = Packer(self.module)
        places = {key: adapter.place(key, tensor) for key, tensor in injected.tensors.items()}
        floating = {key: tensor for key, tensor in injected.tensors.items() if tensor.is_floating_point()}
        if strange := [key for key, place in places.items() if place != "frozen" and key not in floating]:
            raise InputError(f"adapter {adapter.label}: '{strange[0]}' is trained but does not hold real numbers.")
        shared, private, self.rounds, self.own, self.frozen = (
            tuple(key for key in floating if places[key] == place)
            for place in ("shared", "private", "round", "client", "frozen")
        )
        ours = {id(tensor) for tensor in injected.tensors.values()}
        head = {key: p for key, p in self.module.named_parameters() if key.split(".")[0] in heads and id(p) not in ours}
        self._tensors: dict[str, Tensor] = {**floating, **head}
        self.head = tuple(head)
        place = adapter.config.head
        self.shared = shared + (tuple(head) if place == "shared" else ())
        self.private = private + (tuple(head) if place == "private" else ())
        self._corrections: dict[str, Tensor] = {}
        for name, layer in self.layers.items() if isinstance(adapter, LowRankAdapter) else ():
            layer.get_base_layer().register_forward_hook(self._correction_hook(name))
        self.own_trainables()

    @property
    def trainable(self) -> tuple[str, ...]:
        """Every trained key: shared, private, then those of a round."""
        return self.shared + self.private + self.rounds

    @property
    def per_client(self) -> tuple[str, ...]:
        """Every key whose tensor may differ from client to client while they train."""
        return self.trainable + self.own

    def trains(self, parts: Iterable[str] = (), capability: Capability = WHOLE) -> tuple[str, ...]:
        """The trained keys of some factors of a client's modules, and of the head.

        Args:
            parts: names of factors such as ``lora_A``; none: all that the client is able to train.
            capability: gives the modules, such as ``query`` or ``attention.output.dense``.

        Raises:
            FedloraError: the adapter has no trained factor of that name.
            InputError: it adapts no module of that name.
        """
        wanted, suffixes = set(parts) or set(self.adapter.parts(capability)), capability.modules
        keys = [key for key in self.trainable if key not in self.head]
        known = {part_of(key) for key in keys}
        if not wanted <= known:
            raise FedloraError(f"{sorted(wanted - known)} is no trained factor; there are {sorted(known)}")
        for suffix in suffixes:
            if not any(f".{name}".endswith(f".{suffix}") for name in self.layers):
                there = sorted({name.split(".")[-1] for name in self.layers})
                raise InputError(
                    f"adapter.client_modules, or what a client announces, names '{suffix}', and the adapter is in no "
                    f"module of that name. It is in modules that end in: {', '.join(there)}."
                )
        named = [name for name in self.layers if not suffixes or f".{name}".endswith(tuple(f".{s}" for s in suffixes))]
        inside = tuple(f"{name}." for name in named)
        rests = {key for key in keys if (wanted and part_of(key) not in wanted) or not key.startswith(inside)}
        return tuple(key for key in self.trainable if key not in rests)

    def held(self, values: dict[str, Value], capability: Capability) -> dict[str, Value]:
        """What of ``values``, one for each trained key, a client holds: all of them."""
        return values

    @property
    def phases(self) -> tuple[Phase, ...]:
        """How a client trains in a round, in order."""
        return self.adapter.phases()

    def in_phase(self, phase: Phase, keys: Iterable[str]) -> tuple[str, ...]:
        """Those of a client's ``keys`` that it trains in ``phase``."""
        if phase.trains == "all":
            return tuple(keys)
        return tuple(key for key in keys if (key in self.private) == (phase.trains == "private"))

    def in_step(self, step: int, keys: Iterable[str]) -> tuple[str, ...]:
        """Those of a client's ``keys`` that its local step ``step`` trains, the head always; all if it were none."""
        return tuple(key for key in keys if key in self.head or self.adapter.has_turn(key, step)) or tuple(keys)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the backbone's blocks; what is trained is fp32 in any case."""
        return self.packer.dtype if self.packer.blocks is not None else torch.float32

    def loadable(self) -> list[Tensor]:
        """What :meth:`load` may write to: the adapter's tensors and the head; all else stays as it was loaded."""
        return list(self._tensors.values())

    def to(self, device: str) -> None:
        """Move the model to ``device``."""
        names = {id(tensor): name for name, tensor in named_tensors(self.module).items()}
        places = {key: names[id(tensor)] for key, tensor in self._tensors.items()}
        self.module.to(device)
        moved = named_tensors(self.module)
        self._tensors = {key: moved[name] for key, name in places.items()}

    def to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch where the model is."""
        return {name: values.to(self.device) for name, values in batch.items()}

    def backbone_tensors(self) -> dict[str, Tensor]:
        """Every tensor that is neither the adapter's nor the head's, by the module's own names."""
        ours = {id(tensor) for tensor in self._tensors.values()}
        return {name: tensor for name, tensor in named_tensors(self.module).items() if id(tensor) not in ours}

    def parameters(self, keys: Iterable[str] | None = None) -> list[nn.Parameter]:
        """The parameters of ``keys`` (``None``: all trained ones) in their order."""
        return [cast(nn.Parameter, self._tensors[key]) for key in (self.trainable if keys is None else keys)]

    def own_trainables(self, keys: Iterable[str] | None = None) -> None:
        """Train exactly ``keys`` (``None``: all trained ones), whatever PEFT has switched on or off."""
        self.module.requires_grad_(False)
        for parameter in self.parameters(keys):
            parameter.requires_grad_(True)

    def assert_trainables(self, keys: Iterable[str] | None = None) -> None:
        """Check that exactly ``keys`` (``None``: all trained ones) require gradients.

        Raises:
            FedloraError: something else would be trained, or something trained has been frozen.
        """
        owned = {id(parameter) for parameter in self.parameters(keys)}
        wrong = [name for name, p in self.module.named_parameters() if p.requires_grad != (id(p) in owned)]
        if wrong:
            raise FedloraError(f"Trainable tensors changed behind adapter '{self.adapter.label}': {', '.join(wrong)}.")

    def read(self, keys: Iterable[str]) -> State:
        """Copy the tensors of ``keys`` out of the model, to the CPU."""
        copies = {key: self._tensors[key].detach().clone() for key in keys}
        return {key: copy if copy.is_meta else copy.cpu() for key, copy in copies.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy ``state`` into the model in place.

        Raises:
            FedloraError: a key is unknown or a shape differs.
        """
        with torch.no_grad():
            for key, value in state.items():
                parameter = self._tensors.get(key)
                if parameter is None or parameter.shape != value.shape:
                    expected = "no such tensor" if parameter is None else f"expected {list(parameter.shape)}"
                    raise FedloraError(f"Cannot load tensor '{key}' of shape {list(value.shape)}: {expected}.")
                parameter.copy_(value)

    def initialise(self, seed: int, gradients: State | None = None) -> None:
        """Start the adapter's tensors; see :meth:`Adapter.initialise`."""
        self.adapter.initialise(self.layers, seed, gradients)

    def own_of(self, client: str) -> State:
        """What a training client starts from that is its own; see :meth:`Adapter.own_tensors`."""
        return self.adapter.own_tensors(self.layers, self.seed, client)

    def penalty_gradient(self, state: Mapping[str, Tensor], clients: Sequence[str]) -> State:
        """Gradients ``{key: [clients, ...]}`` of the adapter's penalty; see :meth:`Adapter.penalty_gradient`."""
        return self.adapter.penalty_gradient(self.layers, self.seed, state, clients)

    @cached_property
    def affinity(self) -> Affinity:
        """Whether dW is affine in what is trained, by formula or by measurement."""
        return self.adapter.affinity(self.layers)

    def delta(self, state: Mapping[str, Tensor], frozen: Mapping[str, Tensor] | None = None) -> dict[str, LowRank]:
        """dW of every adapted module for a (shared) state.

        By formula for low-rank adapters; otherwise what the layers do to seeded random inputs, in probe coordinates
        (:func:`fedlora.adapters.probe.measured_delta`).

        Args:
            state: the trained tensors; keys of the head do not matter.
            frozen: the frozen tensors; ``None``: the model's own.
        """
        full = {**self.read(self.own), **(self.read(self.frozen) if frozen is None else frozen), **state}
        known = self.adapter.delta(full)
        if known is not None:
            return known
        with self._holding({key: value for key, value in full.items() if key not in self.head}):
            return measured_delta(self.layers)

    @contextmanager
    def _holding(self, state: State) -> Iterator[None]:
        """Hold ``state`` for a while."""
        own = self.read(state)
        try:
            self.load(state)
            yield
        finally:
            self.load(own)

    @property
    def weight_shapes(self) -> dict[str, tuple[int, int]]:
        """``{module: (m, n)}`` of the adapted weights, outputs first."""
        return {name: (int(x.out_features), int(x.in_features)) for name, x in self.layers.items()}  # pyright: ignore

    def shapes(self, keys: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of ``keys``; works on the meta device."""
        return {key: tuple(self._tensors[key].shape) for key in keys}

    def layout(self, rank: int | None = None) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what travels to a client of ``rank`` (``None``: the rank of the model)."""
        return cut_shapes(self.shapes(self.shared), rank, self.adapter.ranked)

    def answer_layout(self, capability: Capability, parts: Iterable[str] = ()) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what a client sends that trained ``parts`` (none: all it can); see :meth:`trains`."""
        trained = set(self.trains(parts, capability))
        held = self.shapes(key for key in self.shared if key in trained)
        return cut_shapes(held, capability.rank, self.adapter.ranked)

    def narrowed(self, state: State, rank: int | None) -> State:
        """``state`` as a client of ``rank`` can hold it: all further components of its factors are zero."""
        if rank is None:
            return state
        shapes = self.shapes(key for key in self.per_client if key not in self.head)
        cut = cut_shapes(shapes, rank, self.adapter.ranked)
        return {**state, **pad(crop({key: state[key] for key in shapes}, cut), shapes)}

    def set_base_correction(self, corrections: Mapping[str, Tensor]) -> None:
        """Add a full-rank fp32 correction ``{module: [m, n]}`` beside the frozen weights (empty: none).

        The frozen weights themselves are never changed, so low-precision backbones lose nothing. Only the layers of
        low-rank adapters are sure to run their base layer, so only those can have a correction.
        """
        self._corrections = {name: value.to(self.device) for name, value in corrections.items()}

    def _correction_hook(self, name: str):
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            correction = self._corrections.get(name)
            if correction is None:
                return None
            return output + functional.linear(inputs[0].to(correction.dtype), correction).to(output.dtype)

        return add


def part_of(key: str) -> str:
    """The factor that a key of an adapter belongs to: ``lora_A`` of ``<module>.lora_A.weight``."""
    return key.split(".")[-2]
