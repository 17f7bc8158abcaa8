"""How artifacts come to be: written to a temporary name and renamed, and naming what made them.

A killed stage leaves nothing half-written. An artifact whose recorded provenance equals what would be made now is
reused, so that a change of κ re-scores no frame and opening a notebook after a run trains nothing again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROVENANCE = "provenance.json"


def digest(*parts: Any) -> str:
    """A short stable name for JSON-like values (dicts in any order)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def code_digest(*modules: str) -> str:
    """Names the code of these modules of `sarm_lib`: what made an artifact is also the program that made it."""
    return digest(*((Path(__file__).parent / f"{module}.py").read_text() for module in modules))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends well, remove it when not."""
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    try:
        yield partial
        if partial.is_dir():
            remove(path)
        os.replace(partial, path)
    except BaseException:
        remove(partial)
        raise


def write_json(path: Path, values: Any) -> None:
    """Write sorted, indented JSON in one move. NaN is an error: no artifact of ours carries one."""
    with staged(path) as partial:
        partial.write_text(json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def is_current(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether the artifact in `folder` was made from exactly these inputs."""
    path = folder / PROVENANCE
    return path.exists() and read_json(path) == json.loads(json.dumps(made_from))


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
