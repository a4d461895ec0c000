"""What clients hold beyond their own tensors: a basis, a base correction. Equal content is stored once for all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fedlora import correction, wire
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
        references = dict(held)
        setup = content.array_records.get("setup")
        if setup is not None:
            key = _key("setup", setup)
            if not self.store.has_shared(key):
                self.store.put_shared(key, wire.unpack(setup, self.model.shapes(self.model.frozen)))
            references["setup"] = key
        drawn_after = content.config_records["config"].get("basis")
        if drawn_after is not None:
            references["setup"] = self._drawn(int(drawn_after))  # pyright: ignore
        if self.model.adapter.broadcast_frozen and "setup" not in references:
            raise FedloraError("the frozen basis never reached this client")
        header = content.config_records["config"].get("correction")
        if header is not None:
            references["correction"] = self._corrected(references, str(header), content.array_records["correction"])
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

    def _drawn(self, server_round: int) -> str:
        """Draw the basis that is new after ``server_round``, once for all clients."""
        key = f"basis-{server_round}"
        if not self.store.has_shared(key):
            self.store.put_shared(key, self.model.adapter.drawn(self.model.layers, self.model.seed, server_round))
        return key

    def _corrected(self, references: Mapping[str, str], header: str, record: ArrayRecord) -> str:
        """Bring the client's base correction up to date; content reached by the same way is computed once."""
        since, until = correction.versions(header)
        before = references.get("correction", "0-none")
        held_version = int(before.split("-")[0])
        if since is not None and since != held_version:
            raise FedloraError(f"base correction {since} expected, but this client holds {held_version}")
        digest = hashlib.blake2b(f"{before}|{header}|{_key('correction', record)}".encode(), digest_size=12).hexdigest()
        key = f"{until}-{digest}"
        if not self.store.has_shared(key):
            tensors = wire.unpack(record, correction.layout_of(header, self.model.weight_shapes))
            held = self.store.get_shared(before) if "correction" in references else {}
            self.store.put_shared(key, correction.apply_update(held, header, tensors))
        return key


def _key(kind: str, record: ArrayRecord) -> str:
    return f"{kind}-{hashlib.blake2b(record[wire.PACKED].data, digest_size=12).hexdigest()}"
