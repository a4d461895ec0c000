"""DP-SGD for a whole cohort: the gradients of single records are the client axis, one axis finer.

Every record becomes a client of its own: the tensors of its client are repeated for it, so that their gradients are the
record's. They are clipped, summed over the client's records, and get the client's noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters import State
from fedlora.client_axis import ClientAxis
from fedlora.cohort_gradients import cohort_gradients
from fedlora.encoded import EncodedRows
from fedlora.model import AdaptedModel
from fedlora.privacy.mechanism import Mechanism
from fedlora.privacy.randomness import Randomness
from fedlora.tasks import Task


def private_gradients(
    model: AdaptedModel,
    axis: ClientAxis,
    task: Task,
    encoded: EncodedRows,
    leaves: State,
    batches: Sequence[np.ndarray],
    size: int,
    mechanisms: Sequence[Mechanism],
    draws: Sequence[Randomness],
) -> tuple[State, Tensor]:
    """Each client's clipped and noised gradient, as Opacus would give it (Abadi et al. 2016, algorithm 1).

    Args:
        model: gives what is frozen.
        axis: of the model.
        task: gives the losses.
        encoded: all rows of the data set.
        leaves: each client's tensors ``{key: [clients, ...]}``; those that require gradients are trained.
        batches: the row numbers of each client, Poisson drawn; some or all may be empty.
        size: rows that a client has in one forward pass, about and on average.
        mechanisms: of each client.
        draws: the noise of each client.

    Returns:
        The gradients ``{key: [clients, ...]}``, and the mean losses ``[clients]``, not a number for an empty batch.
    """
    device = model.device
    trained = [key for key, leaf in leaves.items() if leaf.requires_grad]
    sums = {key: torch.zeros_like(leaves[key], requires_grad=False) for key in trained}
    losses = torch.zeros(len(batches), device=device)
    clips = torch.tensor([m.clip for m in mechanisms], device=device)
    rows, owners = np.concatenate(batches), np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    pieces = max(1, round(len(rows) / (size * len(batches))))  # a batch is larger or smaller than expected
    for places in np.array_split(np.arange(len(rows)), pieces) if len(rows) else ():
        owner = torch.from_numpy(owners[places]).to(device)
        each = {key: leaf.detach()[owner].requires_grad_(key in sums) for key, leaf in leaves.items()}
        gradients, found = cohort_gradients(model, axis, task, encoded, each, np.split(rows[places], len(places)), 1)
        losses.index_add_(0, owner, found)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
        scale = shrinkage(norms, clips[owner])
        for key, gradient in gradients.items():
            sums[key].index_add_(0, owner, gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1))))
    for total in sums.values():
        for client, (mechanism, draw) in enumerate(zip(mechanisms, draws, strict=True)):
            noise = draw.normal(total.shape[1:], mechanism.noise_multiplier * mechanism.clip)
            total[client].add_(noise.to(device)).div_(mechanism.batch)
    return sums, losses / torch.tensor([len(batch) for batch in batches], device=device)


def shrinkage(norms: Tensor, clips: Tensor) -> Tensor:
    """The factors ``[records]`` that bring gradients of these norms to the clip of their client, or leave them."""
    return (clips / (norms + 1e-6)).clamp(max=1.0)
