"""What clients hold beyond their own tensors: a basis, a base correction. Equal content is stored once for all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fedlora import correction, validation, wire
from fedlora.errors import FedloraError
from fedlora.model import AdaptedModel
from fedlora.store import ClientStore


class Held:
    """Shared content in a store, by names that follow from it; a client keeps references ``{kind: name}``."""

    def __init__(self, store: ClientStore, model: AdaptedModel) -> None:
        """``model`` says which shapes a basis and a correction have."""
        self.store, self.model = store, model
        self._content: dict[str, tuple[str, dict[str, Tensor]]] = {}

    def receive(self, held: Mapping[str, str], content: RecordDict) -> dict[str, str]:
        """Store what came with a message beyond the shared tensors; return the client's new references.

        Raises:
            FedloraError: it does not fit what the client holds, or what the client needs never reached it.
        """
        references, new = dict(held), {}
        setup = content.array_records.get("setup")
        if setup is not None:
            references["setup"] = self._received(setup, new)
        drawn_after = content.config_records["config"].get("basis")
        if drawn_after is not None:
            references["setup"] = self._drawn(int(drawn_after))  # pyright: ignore
        if self.model.adapter.broadcast_frozen and "setup" not in references:
            raise FedloraError("the frozen basis never reached this client")
        header = content.config_records["config"].get("correction")
        if header is not None:
            record = content.array_records["correction"]
            references["correction"] = self._corrected(references, str(header), record, new)
        for key, tensors in new.items():  # all of it is known to be good
            self.store.put_shared(key, tensors)
        return references

    def content(self, kind: str, references: Mapping[str, str]) -> dict[str, Tensor]:
        """Content of a client, ``setup`` or ``correction``, kept in memory while clients refer to the same."""
        key = references.get(kind)
        if key is None:
            return {}
        cached = self._content.get(kind)
        if cached is None or cached[0] != key:
            cached = self._content[kind] = (key, self.store.get_shared(key))
        return cached[1]

    def _received(self, record: ArrayRecord, new: dict[str, dict[str, Tensor]]) -> str:
        """The name of a basis; one that is not stored yet is added to ``new``."""
        layout = self.model.shapes(self.model.frozen)
        if not layout:
            raise FedloraError(f"adapter={self.model.adapter.label} has no frozen basis to receive")
        wire.require_layout(record, layout)
        key = _key("setup", record)
        if not self.store.has_shared(key):
            new[key] = validation.tensors(record, layout)
        return key

    def _drawn(self, server_round: int) -> str:
        """Draw the basis that is new after ``server_round``, once for all clients."""
        key = f"basis-{server_round}"
        if not self.store.has_shared(key):
            self.store.put_shared(key, self.model.adapter.drawn(self.model.layers, self.model.seed, server_round))
        return key

    def _corrected(
        self, references: Mapping[str, str], header: str, record: ArrayRecord, new: dict[str, dict[str, Tensor]]
    ) -> str:
        """Bring the client's base correction up to date; content reached by the same way is computed once."""
        layout = correction.layout_of(header, self.model.weight_shapes)
        wire.require_layout(record, layout)
        since, until = correction.versions(header)
        before = references.get("correction", "0-none")
        held_version = int(before.split("-")[0])
        if since is not None and since != held_version:
            raise FedloraError(f"base correction {since} expected, but this client holds {held_version}")
        digest = hashlib.blake2b(f"{before}|{header}|{_key('correction', record)}".encode(), digest_size=12).hexdigest()
        key = f"{until}-{digest}"
        if not self.store.has_shared(key):
            tensors = validation.tensors(record, layout)
            held = self.store.get_shared(before) if "correction" in references else {}
            new[key] = correction.apply_update(held, header, tensors)
            if not all(bool(value.isfinite().all()) for value in new[key].values()):
                raise FedloraError("the base correction adds up to numbers that are not finite")
        return key


def _key(kind: str, record: ArrayRecord) -> str:
    return f"{kind}-{hashlib.blake2b(record[wire.PACKED].data, digest_size=12).hexdigest()}"
