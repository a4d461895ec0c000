"""The API reference: a page for every module, made from its docstrings while the site is built."""

from pathlib import Path

import mkdocs_gen_files

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fedlora", "strategies", "simulations")


def pages(folder: Path) -> list[dict[str, str | list]]:
    """The navigation of a package: itself, its modules, its packages; writes their pages."""
    found = [page(folder)]
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").exists():
            found.append({path.name: pages(path)})
        elif path.suffix == ".py" and not path.name.startswith("__"):
            found.append({path.stem: page(path)})
    return found


def page(path: Path) -> str:
    """Write the page of a module, and return where it is."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    place = f"api/{name}.md"
    with mkdocs_gen_files.open(place, "w") as file:
        file.write(f"---\ntitle: {name}\n---\n\n::: {name}\n")
    return place


mkdocs_gen_files.config["nav"].append({"API reference": [{name: pages(ROOT / name)} for name in PACKAGES]})
