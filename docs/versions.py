"""Put a built site beside those of other versions: ``python docs/versions.py build/docs SITE NAME``.

SITE has a folder for each version, ``versions.js``, from which every page makes its list of versions, and
``index.html``, which leads to the newest release. What a folder of that name had before is replaced.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

INDEX = """<!doctype html>
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url={name}/docs/index.html">
<title>lopt</title>
<a href="{name}/docs/index.html">lopt {name}</a>
"""


def order(name: str) -> tuple[bool, tuple[int, ...]]:
    """Releases by number, and below them what is none, such as "main".

    Example:
        >>> sorted(["0.10.0", "main", "0.9.1"], key=order, reverse=True)
        ['0.10.0', '0.9.1', 'main']
    """
    released = re.fullmatch(r"v?(\d+(?:\.\d+)*)", name)
    return released is not None, tuple(map(int, released[1].split("."))) if released else ()


def publish(built: Path, site: Path, name: str) -> list[str]:
    """Copy the site ``built`` to ``site / name``; the names of all versions there, the newest first.

    Raises:
        FileNotFoundError: there is no built site.
        ValueError: the name is no name of a folder.
    """
    if not (built / "docs/index.html").is_file():
        raise FileNotFoundError(f"{built}: expected a built site, with docs/index.html; run make docs")
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise ValueError(f"name: expected that of a version, such as 0.1.0 or main, got {name!r}")
    folder = site / name
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(built, folder)
    names = sorted((page.parents[1].name for page in site.glob("*/docs/index.html")), key=order, reverse=True)
    (site / "versions.js").write_text(f"window.LOPT_VERSIONS = {json.dumps(names)};\n", encoding="utf-8")
    (site / "index.html").write_text(INDEX.format(name=names[0]), encoding="utf-8")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("built", type=Path)
    parser.add_argument("site", type=Path)
    parser.add_argument("name")
    arguments = parser.parse_args()
    print("versions:", *publish(arguments.built, arguments.site, arguments.name))


if __name__ == "__main__":
    main()
