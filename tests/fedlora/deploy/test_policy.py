"""The policy: what it refuses and why, what it says of the client's data (nothing), and counters that survive."""

from __future__ import annotations

import math
import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import Config
from fedlora.deploy.allowance import Allowance, Used
from fedlora.deploy.policy import Policy
from fedlora.errors import InputError, PolicyError
from fedlora.privacy.accounting import Steps, epsilon_of
from fedlora.protocol import CLIP, NOISE
from tests.conftest import Compose

ROWS = 137
RECORD = ["privacy=record", "privacy.epsilon=null", "privacy.clip=0.5", "method=ffa"]
CLIENT = ["privacy=client", "privacy.epsilon=null", "privacy.clip=0.5", "privacy.noise_multiplier=4",
          "privacy.delta=1e-3", "method=ffa", "strategy.weighting=uniform", "rounds=3"]  # fmt: skip
OWN = [*CLIENT, "privacy.noise=clients"]


def check(policy: Policy, config: Config, **known: Any) -> None:
    """Everything that is checked when a client is asked to join."""
    policy.check_run(config, known.get("fingerprint", "f" * 16), known.get("code", "c" * 16))
    policy.check_rows(config, known.get("rows", ROWS), known.get("elsewhere", (0.0, 0.0)))


def test_without_a_policy_a_plain_run_is_joined(tiny: Compose) -> None:
    check(Policy(), tiny())


@pytest.mark.parametrize(
    ("values", "settings", "reason"),
    [
        ({"privacy": "record"}, [], r"privacy=none, and this client's policy.privacy = record asks for privacy=record"),
        ({"privacy": "client"}, [*RECORD, "privacy.epsilon=1"], r"privacy=record, .* asks for privacy=client"),
        ({"privacy": "client"}, CLIENT, r"policy.trust_server_noise is false: use privacy.noise=clients"),
        ({"max_epsilon": 2}, [], r"privacy=none, and this client's policy.max_epsilon .* asks for privacy=record"),
        ({"max_epsilon": 2}, [*RECORD, "privacy.epsilon=2.5"], r"privacy.epsilon = 2.5 .* policy.max_epsilon = 2"),
        ({"max_epsilon": 2}, [*RECORD, "privacy.noise_multiplier=0.3"], r"noise_multiplier = 0.3 may cost more"),
        ({"max_epsilon": 2}, [*RECORD, "privacy.noise_multiplier=0"], r"noise_multiplier = 0 protects nothing"),
        ({"privacy": "record"}, [*RECORD, "privacy.noise_multiplier=0"], r"noise_multiplier = 0 protects nothing"),
        ({"max_delta": 1e-3}, [*RECORD, "privacy.epsilon=1"], r"privacy.delta = null is more .*policy.max_delta"),
        ({"max_epsilon": 2}, [*RECORD, "privacy.epsilon=1", "privacy.delta=0.5"], r"delta = 0.5 cannot be kept"),
        ({}, [*RECORD, "privacy.epsilon=1", "privacy.delta=0.5"], r"privacy.delta = 0.5 cannot be kept"),
        ({}, [*RECORD, "privacy.epsilon=1e-4", "rounds=1000000"], r"privacy.epsilon = 0.0001 .* cannot be kept"),
        ({"max_epsilon": 1, "trust_server_noise": True}, CLIENT, r"noise_multiplier = 4.0 may cost more"),
        ({"max_epsilon": 9, "trust_server_noise": True}, [*CLIENT, "privacy.delta=null"], r"a number is needed here"),
        ({"metrics": []}, [*RECORD, "privacy.epsilon=1"], r"needs the metric 'epsilon', which .* policy.metrics"),
        ({"max_rounds": 2}, ["rounds=3"], r"rounds = 3 is more than this client's policy.max_rounds = 2"),
        ({"max_local_steps": 2}, ["client.local_steps=3"], r"local_steps = 3 is more than .*policy.max_local_steps"),
        ({"max_local_steps": 2}, ["client.local_steps=null"], r"client.local_epochs = 1 makes more local steps"),
        ({"min_rows": ROWS + 1}, [], r"fewer training rows than its policy.min_rows"),
        ({"runs": ["a" * 16]}, [], r"the terms of the run are 'ffffffffffffffff'.*policy.runs"),
        ({"code": ["a" * 16]}, [], r"the installed code is 'cccccccccccccccc'.*policy.code"),
        ({}, ["task.name=./mine.py:Mine"], r"task.name = './mine.py:Mine' is not among .* policy.plugins"),
        ({}, ["adapter=peft", "adapter.config._target_=os.system"], r"_target_ = 'os.system' is not among"),
        ({}, ["adapter=peft", "adapter.config._target_=peft.py:X"], r"_target_ = 'peft.py:X' is not among"),
        ({}, ["method=fed_sb", "adapter.basis=client_gradient"], r"policy.allow_client_gradients is false"),
    ],
)  # fmt: skip
def test_what_the_policy_does_not_allow_is_refused(
    tiny: Compose, values: dict[str, Any], settings: list[str], reason: str
) -> None:
    with pytest.raises(PolicyError, match=reason) as refused:
        check(Policy(**values), tiny(*settings))
    assert str(ROWS) not in str(refused.value).replace(f"min_rows = {ROWS + 1}", "")  # the reason goes to the server


def test_models_of_a_client_are_code_too(tiny: Compose) -> None:
    config = tiny()
    models = {"models": ["cnn1", "minilm", "hf:./encoder", "./mine.py:Net"]}
    config = config.model_copy(update={"backbone": config.backbone.model_copy(update=models)})
    with pytest.raises(PolicyError, match=r"models\[3\] = './mine.py:Net' is not among"):
        check(Policy(), config)
    check(Policy(plugins=["./mine.py:Net"]), config)


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ({"privacy": "record", "max_epsilon": 2, "max_delta": 0.01}, [*RECORD, "privacy.epsilon=2"]),
        ({"max_epsilon": 2}, [*RECORD, "privacy.noise_multiplier=4"]),
        ({"privacy": "record", "trust_server_noise": True}, CLIENT),
        ({"privacy": "client", "max_epsilon": 3, "trust_server_noise": True}, CLIENT),
        ({"privacy": "client", "max_epsilon": 3}, OWN),
        ({"max_rounds": 3, "max_local_steps": 2}, ["rounds=3", "client.local_steps=2"]),
        ({"max_local_steps": 35}, ["client.local_steps=null", "client.batch_size=4"]),
        ({"min_rows": ROWS, "runs": ["f" * 16], "code": ["c" * 16]}, []),
        ({"plugins": ["./mine.py:Mine"]}, ["task.name=./mine.py:Mine"]),
        ({}, ["adapter=peft", "adapter.config._target_=peft.MissConfig"]),
        ({"allow_client_gradients": True}, ["method=fed_sb", "adapter.basis=client_gradient"]),
    ],
)
def test_what_the_policy_allows_is_joined(tiny: Compose, values: dict[str, Any], settings: list[str]) -> None:
    check(Policy(**values), tiny(*settings))


def test_runs_add_up(tiny: Compose, tmp_path: Path) -> None:
    policy, config = Policy(max_epsilon=3), tiny(*RECORD, "privacy.epsilon=2")
    allowance = Allowance(tmp_path)
    for _ in range(2):  # the second round of the same run costs no more than its bound
        with allowance.changing("one") as used:
            policy.check_training(config, ROWS, used, allowance.elsewhere("one"), {})
    assert allowance.used("one") == Used(trainings=2, epsilon=2.0, delta=pytest.approx(ROWS**-1.1))
    check(policy, config, elsewhere=allowance.elsewhere("one"))
    with pytest.raises(PolicyError, match="together with this client's other runs"):
        check(policy, config, elsewhere=allowance.elsewhere("another"))
    with pytest.raises(PolicyError, match="together"), allowance.changing("another") as used:
        policy.check_training(config, ROWS, used, allowance.elsewhere("another"), {})
    assert Allowance(tmp_path).used("another") == Used()


def test_a_round_that_is_repeated_counts_again(tiny: Compose) -> None:
    config = tiny(*RECORD, "privacy.noise_multiplier=2", "rounds=1", "client.local_steps=4")
    policy, used = Policy(max_rounds=3, max_epsilon=50), Used()
    costs = []
    for _ in range(3):
        policy.check_training(config, ROWS, used, (0.0, 0.0), {})
        costs.append(used.epsilon)
    assert costs[0] < costs[1] < costs[2]
    with pytest.raises(PolicyError, match=r"trained as often as its policy.max_rounds = 3"):
        policy.check_training(config, ROWS, used, (0.0, 0.0), {})
    assert used.trainings == 3


def test_only_a_client_s_own_noise_counts_where_the_server_is_not_trusted(tiny: Compose) -> None:
    config, used, policy = tiny(*OWN), Used(), Policy(privacy="client", max_epsilon=3)
    asked = {CLIP: 0.5, NOISE: 4 * 0.5 / math.sqrt(4)}  # this client's share of the noise of four
    rounds = max(n for n in range(1, 9) if epsilon_of([Steps(2.0, 1.0, n)], 1e-3, "rdp") <= 3)
    for _ in range(rounds):
        policy.check_training(config, ROWS, used, (0.0, 0.0), asked)
    with pytest.raises(PolicyError, match=r"max_epsilon = 3"):
        policy.check_training(config, ROWS, used, (0.0, 0.0), asked)
    assert used.trainings == rounds
    assert used.epsilon == pytest.approx(epsilon_of([Steps(2.0, 1.0, rounds)], 1e-3, "rdp"))
    with pytest.raises(PolicyError, match="without this client's own noise"):
        policy.check_training(config, ROWS, used, (0.0, 0.0), {})


def test_bytes_are_bounded_over_the_run() -> None:
    policy = Policy(max_upload_bytes=100, max_download_bytes=50)
    policy.check_bytes(Used(upload=100, download=50))
    for used in (Used(upload=101), Used(download=51)):
        with pytest.raises(PolicyError, match=r"policy.max_(upload|download)_bytes"):
            policy.check_bytes(used)


def test_numbers_that_may_not_leave_stay() -> None:
    metrics = {"num-examples": 40, "train_loss": 0.5, "epsilon": 1.0}
    assert Policy().filtered(metrics) == metrics
    assert Policy(metrics=["epsilon"]).filtered(metrics) == {"num-examples": 1, "epsilon": 1.0}
    assert Policy(metrics=["num-examples"]).filtered(metrics) == {"num-examples": 40}
    assert Policy(metrics=[]).filtered({"train_loss": 0.5}) == {}


def test_a_policy_file_is_read_and_its_mistakes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("privacy: record\nmax_epsilon: 8\nmax_delta: 1e-5\nmetrics: [epsilon]\n")
    assert Policy.read(path) == Policy(privacy="record", max_epsilon=8, max_delta=1e-5, metrics=["epsilon"])
    path.write_text("# nothing yet\n")
    assert Policy.read(path) == Policy()
    for text, reason in {
        "max_epsilo: 8": r"Unknown setting 'policy.max_epsilo'. Did you mean 'max_epsilon'\?",
        "privacy: strong": r"'policy.privacy' = 'strong' is not valid",
        "max_epsilon: -1": r"'policy.max_epsilon' = -1",
        "max_epsilon: .inf": r"'policy.max_epsilon' = inf",
        "- a": "must have lines such as",
        "a: [": "is no YAML",
    }.items():
        path.write_text(text)
        with pytest.raises(InputError, match=reason):
            Policy.read(path)
    with pytest.raises(InputError, match="There is no policy"):
        Policy.read(tmp_path / "none.yaml")


def add(folder: Path, together: Barrier) -> None:
    together.wait(60)
    for _ in range(50):
        with Allowance(folder).changing("run") as used:
            used.upload += 1


def test_processes_of_one_client_count_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(2)
    processes = [context.Process(target=add, args=(tmp_path, together)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert Allowance(tmp_path).used("run").upload == 100


def test_an_error_leaves_the_counters_as_they_were(tmp_path: Path) -> None:
    with Allowance(tmp_path).changing("run") as used:
        used.download = 5
    with pytest.raises(PolicyError), Allowance(tmp_path).changing("run") as used:  # noqa: PT012
        used.download = 9
        raise PolicyError("no")
    assert Allowance(tmp_path).used("run") == Used(download=5)
