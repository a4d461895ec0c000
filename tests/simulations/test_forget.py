"""Promises of forgetting: what is left is bit for bit a run without the client, or it is said why it is not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from safetensors.torch import load_file
from torch import Tensor

from fedlora.errors import InputError
from simulations.cli import main
from simulations.forget import forget
from simulations.simulate import resume, start
from strategies import Disjoint
from tests.conftest import Compose
from tests.simulations.test_rounds import rounds_of

RUN = ["method=disjoint", "client.lr=2e-2", "rounds=4", "eval.every=4", "cohort.size=5"]
STRICT = ["strategy.isolation=strict", "adapter.head=frozen"]


class Without(Disjoint):
    """The same run, cohorts and seeds, in which one client, or group of clients, is never asked."""

    def __init__(self, without: str, isolation: str) -> None:
        super().__init__(isolation=isolation)  # type: ignore[arg-type]
        self.without = without

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = super().configure_train(server_round, arrays, config, grid)
        asked = {node: client for node, client in self._asked.items() if self.owners[client] != self.without}
        self._asked = asked
        return [m for m in messages if m.metadata.dst_node_id in asked]


def tensors(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / f"{name}.safetensors")


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    gap = sum(float((one[key] - two[key]).norm()) ** 2 for key in one)
    return (gap / sum(float(value.norm()) ** 2 for value in two.values())) ** 0.5


def busiest(folder: Path) -> str:
    """A client that trained in several rounds."""
    drawn = [client for record in rounds_of(folder) for client in record["cohort"]]
    client = max(sorted(set(drawn)), key=drawn.count)
    assert drawn.count(client) >= 2
    return client


def trained_and_retrained(tiny: Compose, folder: Path, settings: list[str]) -> tuple[Path, Path, str]:
    """A run, the same run without its busiest client, and that client."""
    start(tiny(*RUN, *settings), folder / "run")
    client = busiest(folder / "run")
    isolation = next((s.partition("=")[2] for s in settings if "isolation" in s), "open")
    target = f"strategy._target_={__name__}.Without"
    own = ["strategy=custom", target, f"strategy.without={client!r}", f"strategy.isolation={isolation}"]
    start(tiny(*RUN, *[s for s in settings if "isolation" not in s], *own), folder / "without")
    assert client not in {name.rpartition("/")[0] for name in tensors(folder / "without", "blocks")}
    return folder / "run", folder / "without", client


@pytest.mark.parametrize("head", ["frozen", "private"])
def test_forgetting_in_strict_isolation_is_the_run_without_the_client(tiny: Compose, tmp_path: Path, head: str) -> None:
    settings = ["strategy.isolation=strict", f"adapter.head={head}"]
    run, without, client = trained_and_retrained(tiny, tmp_path, settings)
    assert not same(tensors(run, "base_correction"), tensors(without, "base_correction"))
    record = forget(run, client)
    for name in ("blocks", "base_correction", "fedlora_state", "adapter_model"):
        assert same(tensors(run, name), tensors(without, name)), name
    assert record["kind"] == "exact unlearning"
    assert record["reasons"] == []
    assert "what is left is the model of the same run without this client" in record["text"]
    if head == "frozen":
        expected = rounds_of(without)[-1]["metrics"]
        assert record["metrics"] == pytest.approx(expected)


def test_forgetting_a_group_in_strict_isolation_is_the_run_without_it(tiny: Compose, tmp_path: Path) -> None:
    run, without, groups = tmp_path / "run", tmp_path / "without", ["adapter.groups=3", "cohort.size=null"]
    start(tiny(*RUN, *STRICT, *groups), run)
    target = f"strategy._target_={__name__}.Without"
    own = ["strategy=custom", target, "strategy.without=group-0001", "strategy.isolation=strict"]
    start(tiny(*RUN, "adapter.head=frozen", *groups, *own), without)
    record = forget(run, "group-0001")
    for name in ("blocks", "base_correction"):
        assert same(tensors(run, name), tensors(without, name)), name
    assert record["kind"] == "exact unlearning"
    assert len(record["clients"]) == 3
    assert "(3 clients: site" in record["text"]
    assert "the same run without this group" in record["text"]


def test_one_client_of_a_group_cannot_be_forgotten_alone(tiny: Compose, tmp_path: Path) -> None:
    start(tiny(*RUN, *STRICT, "adapter.groups=2", "cohort.size=null", "rounds=1"), tmp_path / "run")
    with pytest.raises(InputError, match=r"'site \d\d' trained in the rows of its group 'group-0000'.*whole group"):
        forget(tmp_path / "run", rounds_of(tmp_path / "run")[1]["cohort"][0])
    with pytest.raises(InputError, match=r"no group 'group-00'. Did you mean 'group-000\d'\? Groups with a block"):
        forget(tmp_path / "run", "group-00")


def test_forgetting_with_an_open_base_removes_the_block_only_and_says_so(tiny: Compose, tmp_path: Path) -> None:
    run, without, client = trained_and_retrained(tiny, tmp_path, ["adapter.head=frozen"])
    before = tensors(run, "blocks")
    record = forget(run, client)
    after = tensors(run, "blocks")
    assert same(after, {name: b for name, b in before.items() if name.rpartition("/")[0] != client})
    assert record["kind"] == "block removal"
    assert [reason.partition(":")[0] for reason in record["reasons"]] == ["strategy.isolation=open"]
    assert "not exact unlearning" in record["text"]
    assert distance(tensors(run, "base_correction"), tensors(without, "base_correction")) > 1e-3


def test_a_shared_head_is_named_as_what_stays(tiny: Compose, tmp_path: Path) -> None:
    run, without, client = trained_and_retrained(tiny, tmp_path, ["strategy.isolation=strict"])
    record = forget(run, client)
    assert record["kind"] == "block removal"
    assert [reason.partition(":")[0] for reason in record["reasons"]] == ["adapter.head=shared"]
    assert distance(tensors(run, "base_correction"), tensors(without, "base_correction")) > 1e-3


def test_the_share_of_all_clients_is_one_and_after_all_of_them_nothing_is_left(tiny: Compose, tmp_path: Path) -> None:
    start(tiny(*RUN, *STRICT, "rounds=1", "cohort.size=3"), tmp_path / "run")
    names = {name.rpartition("/")[0] for name in tensors(tmp_path / "run", "blocks")}
    left, parts = 1.0, []
    for client in sorted(names):
        share = forget(tmp_path / "run", client)["share"]
        parts.append(share * left)
        left *= 1 - share
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(1.0)
    assert tensors(tmp_path / "run", "blocks") == {}
    assert tensors(tmp_path / "run", "base_correction") == {}


def test_the_run_folder_says_what_was_forgotten_and_keeps_nothing_of_it(tiny: Compose, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(tiny(*RUN, "adapter.head=private", "strategy.isolation=strict"), run, merged=True)
    client, other = busiest(run), rounds_of(run)[1]["cohort"][0]
    merged = load_file(run / "merged" / "model.safetensors")
    assert (run / "clients" / client).exists()
    forget(run, client)
    assert not (run / "clients" / client).exists()
    assert not any(name.startswith(f"{client}/") for name in tensors(run, "blocks"))
    assert not same(load_file(run / "merged" / "model.safetensors"), merged)
    record = json.loads((run / "forgotten.json").read_text())
    assert list(record) == [client]
    assert record[client]["at"].endswith("+00:00")
    with pytest.raises(InputError, match=f"'{client}' was forgotten at"):
        forget(run, client)
    if other != client:
        forget(run, other)
        assert set(json.loads((run / "forgotten.json").read_text())) == {client, other}
    assert resume(run)["method"] == "disjoint"


def test_a_merged_model_after_forgetting_is_the_one_of_the_rest(tiny: Compose, tmp_path: Path) -> None:
    run, without, client = trained_and_retrained(tiny, tmp_path, STRICT)
    resume(run, merged=True)
    resume(without, merged=True)
    forget(run, client)
    assert same(*(load_file(folder / "merged" / "model.safetensors") for folder in (run, without)))


def test_an_interrupted_call_can_be_made_again(tiny: Compose, tmp_path: Path) -> None:
    run, without, client = trained_and_retrained(tiny, tmp_path, STRICT)
    blocks = (run / "adapter" / "blocks.safetensors").read_bytes()
    forget(run, client)
    (run / "adapter" / "blocks.safetensors").write_bytes(blocks)  # as before its last step
    forget(run, client)
    for name in ("blocks", "base_correction"):
        assert same(tensors(run, name), tensors(without, name)), name


def test_what_cannot_be_forgotten_is_refused_with_the_reason(
    tiny: Compose, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start(tiny(*RUN, "rounds=1", "cohort.size=2"), tmp_path / "run")
    cohort = rounds_of(tmp_path / "run")[-1]["cohort"]
    away = next(f"site {i:02d}" for i in range(12) if f"site {i:02d}" not in cohort)
    start(tiny("method=local", "rounds=1"), tmp_path / "personal")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.yaml").write_text((tmp_path / "run" / "config.yaml").read_text())
    assert main(["forget", "seite=00", str(tmp_path / "run")]) == 2
    assert "there is no client 'seite=00'. Did you mean 'site" in capfd.readouterr().err
    assert main(["forget", away, str(tmp_path / "run")]) == 2
    assert away in capfd.readouterr().err
    assert main(["forget", cohort[0], str(tmp_path / "personal")]) == 2
    assert "method local leaves no single model" in capfd.readouterr().err
    assert main(["forget", cohort[0], str(tmp_path / "cut")]) == 2
    assert "fedlora resume" in capfd.readouterr().err
    assert main(["forget", cohort[0], str(tmp_path)]) == 2
    assert "is not a run folder" in capfd.readouterr().err
    assert main(["forget", cohort[0], str(tmp_path / "run")]) == 0
    assert f"block removal of '{cohort[0]}'" in capfd.readouterr().out
