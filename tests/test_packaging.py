"""An installed wheel works in a folder of the user's own, beside files and folders that bear our names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = """\
import torch

from strategies import FederatedStrategy


class TrimmedMean(FederatedStrategy):
    exact = False

    def __init__(self, trim=1):
        super().__init__(weighting="uniform")
        self.trim = trim

    def fold(self, server_round, state, replies):
        ordered = {key: torch.stack([r.state[key] for r in replies]).sort(0).values for key in state}
        return {key: value[self.trim : len(replies) - self.trim].mean(0) for key, value in ordered.items()}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs, and nothing of the working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    environment = {**os.environ, "PIP_NO_INDEX": "1"}
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True, env=environment, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    install = [*pip, "install", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, env=environment, capture_output=True)
    return target


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command from the wheel: site-packages of this environment, but not its editable install."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        f"sys.path[:] = [{str(installed)!r}] + [p for p in sys.path if p not in ('', {str(ROOT)!r})];"
        "from simulations.cli import main; import simulations;"
        f"assert simulations.__file__.startswith({str(installed)!r}), simulations.__file__;"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder with ``strategies/`` and ``conf/`` of its own."""
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "__init__.py").write_text(
        "raise RuntimeError('the user package must not be imported')\n"
    )
    (tmp_path / "strategies" / "mine.py").write_text(PLUGIN)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("this: is not ours\n")
    (tmp_path / "robust.py").write_text(PLUGIN)
    return tmp_path


@pytest.mark.parametrize(
    "target",
    [
        "./strategies/mine.py:TrimmedMean",
        pytest.param("./robust.py:TrimmedMean", marks=pytest.mark.slow),
        pytest.param("robust.TrimmedMean", marks=pytest.mark.slow),
    ],
)
def test_a_plugin_works_from_an_installed_wheel(
    installed: Path, project: Path, tiny_overrides: list[str], target: str
) -> None:
    settings = [*tiny_overrides, "adapter.rank=4", "rounds=1", f"strategy._target_={target}", "strategy.trim=1"]
    process = run(installed, project, "simulate", *settings, "run_dir=out")
    assert process.returncode == 0, process.stderr
    assert json.loads((project / "out" / "summary.json").read_text())["label"] == "TrimmedMean(lora)"


def test_a_plugin_that_shadows_our_package_is_refused_with_the_way_out(
    installed: Path, project: Path, tiny_overrides: list[str]
) -> None:
    target = "strategy._target_=strategies.mine.TrimmedMean"
    process = run(installed, project, "simulate", *tiny_overrides, "adapter.rank=4", target, "run_dir=out")
    assert process.returncode == 2
    assert "./strategies/mine.py:TrimmedMean" in process.stderr


def test_the_wheel_holds_the_page_of_reports(installed: Path) -> None:
    folder = Path("simulations", "report")
    for name in ("page.html.jinja", "page.css", "page.js"):
        assert (installed / folder / name).read_bytes() == (ROOT / folder / name).read_bytes()
