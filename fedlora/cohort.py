"""Train many clients at once on one model: the same steps as one after the other, with a client axis.

A cohort holds clients that share everything frozen. In local step s every client that still has a step s puts its batch
into one large batch; its loss, gradient norm, optimiser moments and step count are its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters import State
from fedlora.adapters.base import Phase
from fedlora.client_axis import ClientAxis
from fedlora.cohort_gradients import cohort_gradients
from fedlora.config import ClientConfig
from fedlora.encoded import EncodedRows
from fedlora.errors import FedloraError
from fedlora.model import AdaptedModel
from fedlora.privacy.mechanism import Mechanism
from fedlora.privacy.records import private_gradients
from fedlora.tasks import Task
from fedlora.training import batch_order, poisson_batches, steps_for, train_steps, training_mode

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of torch.optim.AdamW


@dataclass(frozen=True)
class Member:
    """One client of a cohort: all that its training needs beside what is frozen.

    Attributes:
        client: its id; of a pool, the first one's.
        state: every trained tensor to start from, on the CPU.
        rows: the numbers of its training rows.
        rng: makes the generator that draws the order of its rows, the same at every call.
        dropout_seed: draws the adapter's dropout.
        learning_rate: of a step, by its number from 0 and the number of steps.
        moments: the optimiser state to continue from, or empty.
        keys: the tensors of ``state`` that are trained; the same for all members of a cohort.
        privacy: how its records are protected; of all members of a cohort, or of none.
    """

    client: str
    state: State
    rows: np.ndarray
    rng: Callable[[], np.random.Generator]
    dropout_seed: int
    learning_rate: Callable[[int, int], float]
    moments: Mapping[str, Tensor]
    keys: tuple[str, ...]
    privacy: Mechanism | None = None


@dataclass(frozen=True)
class Trained:
    """What a member has become: its state, its moments if they are kept, and why it failed if it did.

    ``loss`` is the mean over the steps of its first phase.
    """

    state: State
    loss: float
    moments: State
    failure: str | None = None


def member_steps(member: Member, settings: ClientConfig) -> int:
    """Local steps that a member takes."""
    if member.privacy is not None:
        return member.privacy.steps
    whole = settings.batch_size * settings.grad_accumulation
    return steps_for(len(member.rows), whole, settings.local_epochs, settings.local_steps)


def train_alone(
    model: AdaptedModel, task: Task, encoded: EncodedRows, settings: ClientConfig, member: Member
) -> Trained:
    """Train one member with the model's own layers and a stock optimiser: the oracle of :func:`train_cohort`."""
    model.load(member.state)
    losses: list[float] = []
    moments: State = {}
    try:
        for phase, keys in _phases(model, member.keys):
            loss, kept = train_steps(
                model,
                task,
                encoded,
                member.rows,
                settings,
                member.rng(),
                member.learning_rate,
                member.dropout_seed,
                member.moments,
                keys,
                phase.objective(task),
                lambda state: _penalty_alone(model, state, member.client),
                member.privacy,
            )
            losses.append(loss)
            moments |= kept
    except FedloraError as error:
        return Trained({}, math.nan, {}, str(error))
    return Trained(model.read(key for key in model.trainable if key in member.state), losses[0], moments)


def _phases(model: AdaptedModel, keys: tuple[str, ...]) -> list[tuple[Phase, tuple[str, ...]]]:
    """The phases of a round, each with those of ``keys`` that it trains; without those that train none."""
    phases = [(phase, model.in_phase(phase, keys)) for phase in model.phases]
    return [(phase, trained) for phase, trained in phases if trained]


def _penalty_alone(model: AdaptedModel, state: State, client: str) -> State:
    """The gradients of the adapter's penalty for one client."""
    stacked = model.penalty_gradient({key: value.unsqueeze(0) for key, value in state.items()}, [client])
    return {key: value.squeeze(0) for key, value in stacked.items()}


def train_cohort(
    model: AdaptedModel,
    axis: ClientAxis,
    task: Task,
    encoded: EncodedRows,
    settings: ClientConfig,
    members: Sequence[Member],
) -> list[Trained]:
    """Train ``members`` on the model's frozen part; equal to training each alone up to the order of sums."""
    steps = [member_steps(member, settings) for member in members]
    longest_first = sorted(range(len(members)), key=lambda i: -steps[i])  # who has a step left is a prefix
    members, steps = [members[i] for i in longest_first], [steps[i] for i in longest_first]
    stacked = {key: torch.stack([m.state[key] for m in members]).to(model.device) for key in model.per_client}
    losses: list[list[np.ndarray]] = []
    moments: list[State] = [{} for _ in members]
    for _, keys in _phases(model, members[0].keys):
        found, optimizer = _train_phase(model, axis, task, encoded, settings, members, steps, stacked, keys)
        losses.append(found)
        for i, kept in enumerate(moments):
            kept |= optimizer.moments(i)
    stacked = {key: stacked[key].cpu() for key in model.trainable}
    trained = [
        _trained({key: value[i] for key, value in stacked.items()}, [each[i] for each in losses], moments[i])
        for i in range(len(members))
    ]
    return [trained[place] for place in np.argsort(longest_first)]


def _train_phase(
    model: AdaptedModel,
    axis: ClientAxis,
    task: Task,
    encoded: EncodedRows,
    settings: ClientConfig,
    members: Sequence[Member],
    steps: Sequence[int],
    stacked: State,
    keys: tuple[str, ...],
) -> tuple[list[np.ndarray], _Optimizer]:
    """Train the tensors ``keys`` of ``stacked`` in place, the longest first.

    Returns:
        The losses of each client's steps that had rows, and the optimiser with what it remembers.
    """
    whole = settings.batch_size * settings.grad_accumulation
    mechanisms = [member.privacy for member in members if member.privacy is not None]
    draws = [mechanism.randomness() for mechanism in mechanisms]
    if mechanisms:
        settings = settings.model_copy(update={"max_grad_norm": None})
        drawn = zip(members, mechanisms, draws, strict=True)
        orders = [poisson_batches(m.rows, mechanism, draw) for m, mechanism, draw in drawn]
    else:
        orders = [batch_order(m.rows, whole, settings.local_epochs, settings.local_steps, m.rng()) for m in members]
    clients = [member.client for member in members]
    optimizer = _Optimizer({key: stacked[key] for key in keys}, members, settings)
    losses = torch.full((len(members), max(steps)), math.nan, device=model.device)
    known = np.zeros(losses.shape, dtype=bool)
    model.own_trainables(keys)
    with training_mode(model.module, 0):
        for step in range(max(steps)):
            active = sum(step < count for count in steps)
            batches = [next(order) for order in orders[:active]]
            known[:active, step] = [len(batch) > 0 for batch in batches]
            rates = [m.learning_rate(step, n) for m, n in zip(members[:active], steps, strict=False)]
            trained = model.in_step(step, keys)
            leaves = {key: value[:active].detach().requires_grad_(key in trained) for key, value in stacked.items()}
            given = model, axis, task, encoded, leaves, batches, settings.batch_size
            if mechanisms:
                gradients, losses[:active, step] = private_gradients(*given, mechanisms[:active], draws[:active])
            else:
                gradients, losses[:active, step] = cohort_gradients(*given)
            penalty = model.penalty_gradient({key: stacked[key][:active] for key in trained}, clients[:active])
            optimizer.step(gradients, penalty, rates)
    found = losses.double().cpu().numpy()
    return [each[steps_known] for each, steps_known in zip(found, known, strict=True)], optimizer


def _trained(state: State, losses: Sequence[np.ndarray], moments: State) -> Trained:
    """What a member has become, from the losses of each phase."""
    for phase in losses:
        odd = np.flatnonzero(~np.isfinite(phase))
        if len(odd):
            return Trained({}, math.nan, {}, f"the loss is {phase[odd[0]]} at local step {odd[0] + 1}")
    return Trained(state, float(losses[0].mean()) if len(losses[0]) else 0.0, moments)


class _Optimizer:
    """AdamW or SGD over stacked tensors: elementwise the optimiser of each client, with its own count of steps."""

    def __init__(self, stacked: State, members: Sequence[Member], settings: ClientConfig) -> None:
        self.stacked, self.settings = stacked, settings
        self.counts = {key: _counts(members, key) for key in stacked}
        self.first: State = {}
        self.second: State = {}
        if settings.optimizer == "adamw":
            self.first = {key: _stacked(members, key, "exp_avg", value) for key, value in stacked.items()}
            self.second = {key: _stacked(members, key, "exp_avg_sq", value) for key, value in stacked.items()}

    def step(self, gradients: State, penalty: State, rates: Sequence[float]) -> None:
        """One step of the first ``len(rates)`` clients, each at its own rate, with what has a gradient.

        ``penalty`` is added after clipping.
        """
        settings, active = self.settings, len(rates)
        device = next(iter(self.stacked.values())).device
        if settings.max_grad_norm is not None:
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
            scale = (settings.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
            gradients = {key: g * _wide(scale, g) for key, g in gradients.items()}
        gradients = gradients | {key: gradients[key] + value for key, value in penalty.items()}
        lr = torch.tensor(rates, dtype=torch.float64)
        known: dict[tuple[float, ...], tuple[Tensor, Tensor]] = {}
        shrink = (1 - lr * settings.weight_decay).float().to(device)
        for key, g in gradients.items():
            theta = self.stacked[key][:active]
            if settings.optimizer == "sgd":
                theta.sub_(_wide(lr.float().to(device), g) * (g + settings.weight_decay * theta))
                continue
            self.counts[key][:active] += 1
            sizes, roots = _corrections(self.counts[key][:active], lr, device, known)
            m, v = self.first[key][:active], self.second[key][:active]
            m.lerp_(g, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            if settings.weight_decay:
                theta.mul_(_wide(shrink, g))
            corrected = v.sqrt().div_(_wide(roots, g)).add_(EPSILON)
            theta.sub_(torch.div(m, corrected, out=corrected).mul_(_wide(sizes, g)))

    def moments(self, client: int) -> State:
        """What the client keeps, in the form of :func:`fedlora.training.train_steps`."""
        if not self.settings.keep_optimizer:
            return {}
        kept: State = {}
        for key in (key for key, counts in self.counts.items() if counts[client]):
            kept[f"{key}/step"] = self.counts[key][client].clone()
            kept[f"{key}/exp_avg"] = self.first[key][client].cpu().clone()
            kept[f"{key}/exp_avg_sq"] = self.second[key][client].cpu().clone()
        return kept


def _counts(members: Sequence[Member], key: str) -> Tensor:
    """Steps that AdamW has taken with a tensor, at each client."""
    return torch.tensor([float(m.moments.get(f"{key}/step", torch.zeros(()))) for m in members])


def _corrections(
    counts: Tensor, lr: Tensor, device: torch.device, known: dict[tuple[float, ...], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """AdamW's step size and root of the second moment's correction for each client; mostly alike for all tensors."""
    key = tuple(counts.tolist())
    if key not in known:
        count = counts.double()
        sizes = (lr / (1 - BETAS[0] ** count)).float().to(device)
        known[key] = sizes, (1 - BETAS[1] ** count).sqrt().float().to(device)
    return known[key]


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """One value for each client ``[clients]``, to be multiplied with ``[clients, ...]``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _stacked(members: Sequence[Member], key: str, name: str, like: Tensor) -> Tensor:
    if not any(m.moments for m in members):
        return torch.zeros_like(like)
    zero = torch.zeros(like.shape[1:])
    return torch.stack([m.moments.get(f"{key}/{name}", zero) for m in members]).to(like.device)
