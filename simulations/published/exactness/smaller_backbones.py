"""``python -m simulations.published.exactness.smaller_backbones FOLDER 2 4``: MiniLM's first 2 and first 4 layers.

Each becomes a folder of its own (``FOLDER/minilm-2``) for ``backbone=hf backbone.path=FOLDER/minilm-2``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModel, AutoTokenizer

from fedlora.packaged import minilm_folder


def main(folder: Path, counts: list[int]) -> None:
    """Write the packaged MiniLM with fewer layers, and its tokenizer, for each of ``counts``."""
    for count in counts:
        place = folder / f"minilm-{count}"
        AutoModel.from_pretrained(minilm_folder(), num_hidden_layers=count).save_pretrained(place)
        AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(count) for count in sys.argv[2:]])
