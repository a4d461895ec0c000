from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedlora.errors import InputError
from fedlora.plugins import is_plugin_path, load_object


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory that is not on Python's path, as for a console script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_registered_names_are_not_plugin_paths():
    assert not is_plugin_path("classification")
    assert is_plugin_path("package.module.Class")
    assert is_plugin_path("./file.py:Class")


def test_an_object_is_loaded_by_import_path(here: Path):
    from flwr.serverapp.strategy import FedAvg

    assert load_object("flwr.serverapp.strategy.FedAvg", "strategy._target_") is FedAvg


@pytest.mark.parametrize("path", ["./mine.py:Mine", "mine.py:Mine", "{here}/mine.py:Mine"])
def test_an_object_is_loaded_by_file_path(here: Path, path: str):
    write(here / "mine.py", "class Mine:\n    value = 3\n")
    assert load_object(path.format(here=here), "strategy._target_").value == 3


def test_a_module_of_the_working_directory_is_found(here: Path):
    write(here / "my_federation_plugin.py", "class Mine:\n    value = 4\n")
    try:
        assert load_object("my_federation_plugin.Mine", "task.name").value == 4
    finally:
        sys.modules.pop("my_federation_plugin", None)


def test_a_file_is_loaded_once(here: Path):
    write(here / "mine.py", "class Mine: pass\n")
    assert load_object("./mine.py:Mine", "task.name") is load_object(f"{here}/mine.py:Mine", "task.name")


def test_two_files_of_one_name_do_not_meet(here: Path):
    write(here / "one" / "mine.py", "NAME = 'one'\n")
    write(here / "two" / "mine.py", "NAME = 'two'\n")
    assert [load_object(f"./{folder}/mine.py:NAME", "task.name") for folder in ("one", "two")] == ["one", "two"]


def test_a_file_with_a_dataclass_loads(here: Path):
    imports = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    text = f"{imports}@dataclass\nclass Mine:\n    x: int = 5\n"
    write(here / "mine.py", text)
    assert load_object("./mine.py:Mine", "task.name")().x == 5


def test_a_missing_file_is_named(here: Path):
    with pytest.raises(
        InputError, match=rf"strategy\._target_ = './no\.py:Mine': the file {here}/no\.py does not exist"
    ):
        load_object("./no.py:Mine", "strategy._target_")


def test_a_folder_is_no_file(here: Path):
    with pytest.raises(InputError, match="does not exist"):
        load_object(":Mine", "strategy._target_")


@pytest.mark.parametrize("path", ["./mine.py:Other", "./mine.py:"])
def test_a_missing_attribute_names_what_is_there(here: Path, path: str):
    write(here / "mine.py", "class Mine: pass\n_hidden = 1\n")
    with pytest.raises(InputError, match=r"task\.name = '.*there is no .*It defines: Mine\.$"):
        load_object(path, "task.name")


def test_a_missing_module_is_named(here: Path):
    with pytest.raises(InputError, match=r"task\.name = 'no_such_package\.Mine' does not import.*no_such_package"):
        load_object("no_such_package.Mine", "task.name")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("1/0\n", "ZeroDivisionError"), ("class (:\n", "SyntaxError"), ("import nonsense_x\n", "nonsense_x")],
)
def test_an_error_inside_a_file_is_explained_and_can_be_mended(here: Path, text: str, reason: str):
    write(here / "mine.py", text)
    with pytest.raises(InputError, match=rf"'./mine\.py:Mine' does not import: .*{reason}"):
        load_object("./mine.py:Mine", "task.name")
    write(here / "mine.py", "class Mine: pass\n")
    assert load_object("./mine.py:Mine", "task.name").__name__ == "Mine"


@pytest.mark.parametrize(("text", "reason"), [("1/0\n", "ZeroDivisionError"), ("class (:\n", "SyntaxError")])
def test_an_error_inside_a_module_is_explained(here: Path, text: str, reason: str):
    write(here / f"broken_{reason}.py", text)
    with pytest.raises(InputError, match=rf"does not import: .*{reason}"):
        load_object(f"broken_{reason}.Mine", "task.name")


def test_a_name_without_a_module_is_explained(here: Path):
    with pytest.raises(InputError, match=r"strategy\._target_ = 'Mine' does not import"):
        load_object("Mine", "strategy._target_")


@pytest.mark.parametrize("package", ["strategies", "simulations", "fedlora"])
def test_a_folder_that_shadows_one_of_our_packages_is_refused_with_the_path_to_write(here: Path, package: str):
    write(here / package / "mine.py", "class Mine: pass\n")
    with pytest.raises(InputError, match=rf"'{package}' is one of fedlora's own packages.*=\./{package}/mine\.py:Mine"):
        load_object(f"{package}.mine.Mine", "strategy._target_")
    assert load_object(f"./{package}/mine.py:Mine", "strategy._target_").__name__ == "Mine"


def test_a_misspelt_name_in_a_large_module_is_answered_with_the_nearest_only():
    with pytest.raises(InputError, match=r"there is no 'MissConfg' in it\. Did you mean 'MissConfig'\?$"):
        load_object("peft.MissConfg", "adapter.config._target_")
