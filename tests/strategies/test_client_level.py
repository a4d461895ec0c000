"""Promise: what the strategy sees changes with one client by clip / n at most, plus noise of the stated deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

import strategies
from fedlora import wire
from fedlora.config import PrivacyConfig
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.grid import error_reply
from fedlora.privacy.client_level import split_noise
from simulations.compose import choices_of, options
from simulations.engines.loop import LoopGrid
from simulations.plan import plan_run
from strategies.build import build_strategy
from strategies.client_level import REASONS, STRATEGIES, Budget, ClientLevel
from tests.conftest import Compose

CLIENTS, NUMBERS = 4, 12
SENT = {"a": torch.arange(6.0).view(2, 3) / 10, "b": torch.linspace(-1, 1, 6)}
Updates = Mapping[str, Tensor | None]


def mechanism(clip: float = 1.0, sigma: float = 0.0, seed: int = 0, **more: object) -> ClientLevel:
    privacy = PrivacyConfig.model_validate({"name": "client", "clip": clip, "noise_multiplier": sigma, **more})
    return ClientLevel(privacy, Budget(sigma, 1e-3, CLIENTS, None, (0, 1)), seed)


def exchange(strategy: Strategy, updates: Updates) -> tuple[list[Message], list[Message]]:
    """Requests of a round and its replies; a client whose update is ``None`` fails. Rows and losses are all unequal."""

    def client(message: Message, _: object) -> Message:
        name = grid.client_of(message.metadata.dst_node_id)
        update = updates[name]
        if update is None:
            return error_reply(message, "out of memory")
        changes = wire.views(update, {key: tuple(value.shape) for key, value in SENT.items()})
        state = {key: value + changes[key] for key, value in SENT.items()}
        rows = 1 + 7 * len(name)
        metrics = MetricRecord({"num-examples": rows, "train_loss": 1.0 / rows})
        return Message(RecordDict({"arrays": wire.to_record(state), "metrics": metrics}), reply_to=message)

    grid = LoopGrid(client)  # type: ignore[arg-type]
    grid.begin_round(1, list(updates))
    messages = list(strategy.configure_train(1, wire.to_record(SENT), ConfigRecord(), grid))
    for number, message in enumerate(messages):
        message.metadata.__dict__["_message_id"] = f"{number:064x}"
    return messages, grid.send_and_receive(messages)


def released(private: ClientLevel, updates: Updates, server_round: int = 1) -> Tensor:
    """The mean update that the strategy is given, ``[numbers]``."""
    requests, replies = exchange(strategies.Average("uniform"), updates)
    mean = private.release(server_round, SENT, requests, replies, whole=True)
    record = mean[0].content.array_records["arrays"]
    return torch.cat([(wire.from_record(record)[key].double() - SENT[key]).flatten() for key in SENT])


def random_updates(names: Sequence[str], seed: int, scale: float = 2.0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(NUMBERS, generator=draw) * scale for name in names}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), clip=st.floats(0.01, 20), count=st.integers(1, 7), fails=st.booleans())
def test_one_client_changes_what_is_released_by_clip_over_n_at_most(seed, clip, count, fails) -> None:
    names = ["x" * (number + 1) for number in range(count)]  # as many, fewer or more than n
    updates: dict[str, Tensor | None] = {**random_updates(names, seed)}
    absent: dict[str, Tensor | None] = {name: update for name, update in updates.items() if name != names[-1]}
    if fails or not absent:
        absent[names[-1]] = None
    one, two = (released(mechanism(clip), each) for each in (updates, absent))
    assert float((one - two).norm()) <= clip / CLIENTS + 1e-6  # fp32 states


def test_the_bound_is_reached_and_does_not_depend_on_who_answers() -> None:
    far = torch.full((NUMBERS,), 100.0)
    for others in ({}, {"b": far}, {"b": None, "cc": far, "ddd": None}):
        one, two = released(mechanism(0.5), {"a": far, **others}), released(mechanism(0.5), {"a": None, **others})
        assert float((one - two).norm()) == pytest.approx(0.5 / CLIENTS, rel=1e-5)


def test_every_client_counts_the_same_whatever_its_rows() -> None:
    update = random_updates(["u"], 1, 0.1)["u"]
    few, many = released(mechanism(), {"a": update}), released(mechanism(), {"a" * 40: update})
    assert torch.equal(few, many)
    torch.testing.assert_close(few, update.double() / CLIENTS, rtol=0, atol=1e-6)


def built(tiny: Compose, strategy: type[Strategy]) -> Strategy:
    method = {"FedSB": "fed_sb"}.get(strategy.__name__, "ffa")
    overrides = [f"method={method}", f"strategy._target_={strategy.__module__}.{strategy.__name__}"]
    config = tiny(*overrides)
    return build_strategy(config.strategy, Federation(config).build_meta_model())


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda each: each.__name__)
def test_the_next_state_depends_on_the_mean_alone(tiny: Compose, strategy: type[Strategy]) -> None:
    if strategy.__name__ == "FedSVD":
        pytest.skip("its factors have names; see the test of whole runs")
    u, v = random_updates("uv", 3, 0.05).values()
    states = []
    for updates in ({"a": u, "bbbb": v}, {"a": v, "bbbb": u}, {"a": u, "bb": v, "ccc": None}, {"a": None, "b": u + v}):
        one = built(tiny, strategy)
        requests, replies = exchange(one, updates)
        ours = isinstance(one, strategies.FederatedStrategy)
        arrays, metrics = one.aggregate_train(1, mechanism(10.0).release(1, SENT, requests, replies, whole=ours))
        assert arrays is not None
        assert metrics is not None
        states.append(wire.from_record(arrays))
    for state in states[1:]:
        for key, expected in states[0].items():
            torch.testing.assert_close(state[key].float(), expected.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", ["Average", "FedAvg", "FedAvgM"])
def test_means_are_taken_over_to_the_last_bit(tiny: Compose, strategy: str) -> None:
    one = built(tiny, next(each for each in STRATEGIES if each.__name__ == strategy))
    requests, replies = exchange(one, random_updates(["a", "bb", "ccc"], 5))
    mean = mechanism(1.0, 1.0).release(1, SENT, requests, replies, whole=strategy == "Average")
    expected = wire.from_record(mean[0].content.array_records["arrays"])
    arrays, _ = one.aggregate_train(1, mean)
    assert arrays is not None
    assert all(torch.equal(wire.from_record(arrays)[key].float(), expected[key]) for key in expected)


def noise_of(answering: int, draws: int = 400, **more: object) -> Tensor:
    """Noise in what is released, ``[draws, numbers]``, when ``answering`` of n clients answer with no update."""
    updates = {"x" * (i + 1): torch.zeros(NUMBERS) if i < answering else None for i in range(CLIENTS)}
    return torch.stack([released(mechanism(2.0, 1.5, seed, **more), updates) for seed in range(draws)])


def deviation_is(noise: Tensor, expected: float) -> bool:
    """Whether the variance of ``noise`` lies within the 1e-6 bounds of a chi-square distribution for ``expected``."""
    statistic, freedom = float(noise.double().square().sum()) / expected**2, noise.numel()
    return bool(chi2.ppf(1e-6, freedom) < statistic < chi2.ppf(1 - 1e-6, freedom))


@pytest.mark.parametrize("answering", [0, 1, CLIENTS])
def test_noise_has_the_stated_deviation_whoever_answers(answering: int) -> None:
    noise = noise_of(answering)
    assert deviation_is(noise, 1.5 * 2.0 / CLIENTS)
    assert not deviation_is(noise, 1.1 * 1.5 * 2.0 / CLIENTS)
    assert float(noise.mean(0).abs().max()) < 5 * 1.5 * 2.0 / CLIENTS / math.sqrt(len(noise))
    assert float(torch.corrcoef(noise.T).fill_diagonal_(0).abs().max()) < 0.3


def test_an_adaptive_clip_adds_the_noise_of_its_split() -> None:
    update, _ = split_noise(1.5, CLIENTS)
    assert deviation_is(noise_of(2, clipping="adaptive", quantile=0.5), update * 2.0 / CLIENTS)


@pytest.mark.parametrize("answering", [0, 1, CLIENTS])
def test_the_server_adds_the_shares_of_noise_that_are_missing(answering: int) -> None:
    if answering < CLIENTS:
        missing = math.sqrt((CLIENTS - answering) / CLIENTS)
        assert deviation_is(noise_of(answering, noise="clients"), 1.5 * 2.0 / CLIENTS * missing)
    else:
        assert not noise_of(answering, 3, noise="clients").any()


def test_clients_are_told_to_clip_and_to_add_their_share() -> None:
    told = mechanism(2.0, 1.5, noise="clients").instructions()
    assert told == {"clip-update": 2.0, "noise-update": 1.5 * 2.0 / math.sqrt(CLIENTS)}
    assert mechanism(2.0, 1.5).instructions() == {}


def distinguishability(private: ClientLevel, draws: int = 300) -> float:
    """How far one client moves what is released, in standard deviations of the noise: 1 / noise multiplier at most."""
    target = torch.zeros(NUMBERS)
    target[3] = 50.0
    runs = []
    for present in (target, None):
        values = []
        for draw in range(draws):
            private.seed = 2 * draw + (present is None)
            values.append(released(private, {"a": present, "bb": torch.ones(NUMBERS)})[3])
        runs.append(torch.stack(values))
    shift, deviation = abs(float(runs[0].mean() - runs[1].mean())), float(torch.cat([r - r.mean() for r in runs]).std())
    return shift / max(deviation, 1e-12)


def test_an_audit_finds_what_is_promised_and_sees_noise_or_clipping_that_is_missing() -> None:
    promised = 1 / 1.5
    assert distinguishability(mechanism(1.0, 1.5)) == pytest.approx(promised, rel=0.25)
    assert distinguishability(mechanism(1.0, 0.0)) > 100 * promised
    unclipped = mechanism(1.0, 1.5, noise="clients")  # no client has clipped or added anything: the server cannot know
    assert distinguishability(unclipped) > 10 * promised


def test_the_adaptive_norm_moves_towards_the_updates() -> None:
    up, down = (mechanism(clip, clipping="adaptive", quantile=0.5) for clip in (0.1, 100.0))
    for one in (up, down):
        released(one, random_updates(["a", "bb", "ccc", "dddd"], 2))
    assert up.clip == pytest.approx(0.1 * math.exp(0.1))
    assert down.clip == pytest.approx(100 * math.exp(-0.1))
    again = mechanism(5.0, clipping="adaptive", quantile=0.5)
    again.load_state_dict(up.state_dict())
    assert again.clip == up.clip


ALLOWED = {"ffa", "fed_sb", "fedsvd", "orthogonal"}


@pytest.mark.parametrize("method", options("method"))
def test_every_method_is_private_or_refused_with_a_reason(tiny: Compose, method: str) -> None:
    if "backbone" in choices_of(method):
        pytest.skip("for clients with models of their own, whose strategies are in REASONS")
    weighted = method not in ("central", "local", "zero_shot")
    private = ["privacy=client", "privacy.clip=1", "privacy.epsilon=8"]
    config = tiny(f"method={method}", *private, *(["strategy.weighting=uniform"] if weighted else []))
    if method in ALLOWED:
        assert plan_run(config)["privacy"]["epsilon"] <= 8
        return
    name = str(config.strategy["_target_"]).rpartition(".")[2]
    with pytest.raises(InputError, match=r"privacy=client") as caught:
        plan_run(config)
    assert REASONS[name] in str(caught.value)


def test_every_strategy_of_ours_is_named_or_has_a_reason() -> None:
    known = {each.__name__ for each in STRATEGIES} | set(REASONS)
    base = {"FederatedStrategy", "Outgoing", "Reply", "weighted_mean"}
    assert set(strategies.__all__) - base <= known
    assert set(REASONS) <= set(strategies.__all__)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=ffa"], r"gives every client the same weight.*strategy\.weighting=uniform"),
        (["strategy._target_=flwr.serverapp.strategy.FedAvg"], r"adapter=lora, which is not affine"),
        (["method=ffa", "strategy._target_=flwr.serverapp.strategy.FedMedian"], r"FedMedian, which is not known to"),
        (["method=ffa", "strategy._target_=flwr.serverapp.strategy.FedProx"], r"FedProx, which is not known to"),
        (["method=ffa", "adapter.head=private", "strategy.weighting=uniform"], r"keeps 'classifier.* at each client"),
        (["method=ffa", "adapter.client_modules={all: 1}", "strategy.weighting=uniform"], r"adapter\.client_modules=n"),
        (["method=fed_sb", "adapter.basis=client_gradient", "strategy.weighting=uniform"], r"does not cover them"),
        (
            ["method=ffa", "strategy._target_=flwr.serverapp.strategy.FedAvg", "strategy.fraction_train=0.5"],
            r"strategy\.fraction_train=1\.0",
        ),
        (
            ["method=ffa", "strategy.weighting=uniform", "privacy.noise=clients", "wire.dtype=bf16"],
            r"wire\.dtype=bf16 rounds what a client sends after its noise",
        ),
        (["method=ffa", "privacy.quantile=0.5"], r"privacy\.quantile belongs to privacy\.clipping=adaptive"),
        (["method=ffa", "privacy.clipping=adaptive"], r"privacy\.quantile belongs to privacy\.clipping=adaptive"),
        (
            ["method=ffa", "privacy.clipping=adaptive", "privacy.quantile=0.5", "privacy.noise=clients"],
            r"use privacy\.noise=server or privacy\.clipping=fixed",
        ),
        (["method=ffa", "+privacy.rounds=3"], r"privacy\.rounds is a setting of privacy=record"),
        (["method=ffa", "privacy.epsilon=null"], r"set privacy\.epsilon"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_would_not_be_what_it_says_is_refused(tiny: Compose, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_run(tiny("privacy=client", "privacy.clip=1", "privacy.epsilon=8", *overrides))


def test_settings_of_clients_are_refused_elsewhere(tiny: Compose) -> None:
    for setting in ("+privacy.secret_cohort=true", "+privacy.noise=clients"):
        with pytest.raises(InputError, match=r"privacy\.(secret_cohort|noise) is a setting of privacy=client"):
            tiny("method=ffa", setting)
