"""What is compared: each variant is a kind of program and the settings it runs with.

Every variant may use two CPU threads: one process with two, or two processes with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedlora.config import nearest
from fedlora.errors import InputError

THREADS = 2


@dataclass(frozen=True)
class Variant:
    """One competitor.

    Attributes:
        name: how the tables call it.
        kind: the program: a federated run of ours (``federated``), our strategy ``central`` at its best batch size
            (``own_central``), fine-tuning with PEFT and transformers alone (``plain_central``), or Flower's simulation
            (``flower``).
        about: what it is, in a few words.
        overrides: settings of ours, as ``fedlora simulate`` takes them.
        processes: training processes.
        packed: whether padding, and rows of the last layer that nobody reads, are dropped.
        precision: of the frozen products.
        rebuild: ``flower``: build the model in every call.
        same_loss_as: the variant whose mathematics it shares, so that its losses must be the same.
    """

    name: str
    kind: Literal["federated", "own_central", "plain_central", "flower"]
    about: str
    overrides: tuple[str, ...] = ()
    processes: int = 1
    packed: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    rebuild: bool = False
    same_loss_as: str = "loop"


PACKED, PADDED = "engine.packing=true", "engine.packing=false"
LOOP, LOOP_TWO, COHORT, COHORT_TWO = (
    (f"engine={name}", f"engine.workers={workers}", f"engine.threads={threads}")
    for name in ("loop", "cohort")
    for workers, threads in ((0, THREADS), (THREADS, 1))
)
CENTRAL = ("method=central", *LOOP, PACKED)
BF16 = "precision=bf16"
NOISE = ("privacy=record", "privacy.epsilon=null", "privacy.noise_multiplier=1", "privacy.clip=1")

VARIANTS = (
    Variant("central", "plain_central", "PEFT and transformers on the pooled rows, best batch", same_loss_as="central"),
    Variant("loop", "federated", "one client after the other, padded", (*LOOP, PADDED)),
    Variant("loop-packed", "federated", "one client after the other", (*LOOP, PACKED), packed=True),
    Variant("loop-x2", "federated", "padded, in two processes", (*LOOP_TWO, PADDED), 2),
    Variant("loop-x2-packed", "federated", "in two processes", (*LOOP_TWO, PACKED), 2, True),
    Variant("cohort-padded", "federated", "clients share a padded batch", (*COHORT, PADDED)),
    Variant("cohort", "federated", "clients share a batch", (*COHORT, PACKED), packed=True),
    Variant("cohort-x2-padded", "federated", "padded, in two processes", (*COHORT_TWO, PADDED), 2),
    Variant("cohort-x2", "federated", "clients share a batch, in two processes", (*COHORT_TWO, PACKED), 2, True),
    Variant("cohort-bf16", "federated", "clients share a batch, bf16", (*COHORT, PACKED, BF16), 1, True, "bf16"),
    Variant("own-central", "own_central", "our own code on the pooled rows, best batch", CENTRAL, 1, True,
            same_loss_as="central"),
    Variant("own-central-bf16", "own_central", "the same in bf16", (*CENTRAL, BF16), 1, True, "bf16",
            same_loss_as="central"),
    Variant("loop-private", "federated", "DP-SGD through the hooks of Opacus, padded", (*LOOP, PADDED, *NOISE),
            same_loss_as="loop-private"),
    Variant("cohort-private", "federated", "DP-SGD, clients share a batch", (*COHORT, PACKED, *NOISE), packed=True,
            same_loss_as="loop-private"),
    Variant("flower", "flower", "Flower simulation, two actors, model cached", processes=2),
    Variant("flower-rebuilt", "flower", "the same, model built in every call", processes=2, rebuild=True),
)  # fmt: skip


def chosen(names: Sequence[str]) -> tuple[Variant, ...]:
    """The variants of these names in the order of the table; all of them for no names.

    Raises:
        InputError: there is none of a name.
    """
    known = [variant.name for variant in VARIANTS]
    for name in names:
        if name not in known:
            raise InputError(f"There is no variant '{name}'.{nearest(name, known)} Known: {', '.join(known)}.")
    return tuple(variant for variant in VARIANTS if not names or variant.name in names)


def public_of(variant: Variant) -> str | None:
    """The same program without differential privacy."""
    public = variant.name.removesuffix("-private")
    return public if public != variant.name else None


def loop_of(variant: Variant) -> str:
    """The loop with as many processes, and as private."""
    if public_of(variant):
        return "loop-private"
    return "loop" if variant.processes == 1 else "loop-x2"


def own_central_of(variant: Variant) -> str | None:
    """Our central training with the same packing and precision, if it is measured."""
    how = (variant.packed, variant.precision)
    same = [v.name for v in VARIANTS if v.kind == "own_central" and (v.packed, v.precision) == how]
    return same[0] if same and variant.kind == "federated" and not public_of(variant) else None
