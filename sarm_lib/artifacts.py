"""How artifacts come to be: written to a temporary name and renamed, and naming what made them.

A killed stage leaves nothing half-written. An artifact whose recorded provenance equals what would be made now is
reused, so that a change of κ re-scores no frame and opening a notebook after a run trains nothing again.
"""

import ast
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
PROVENANCE = "provenance.json"


def digest(*parts: Any) -> str:
    """A short stable name for JSON-like values (dicts in any order)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def code_digest(module: str) -> str:
    """Names the code of a module of `sarm_lib` and of all that it imports from there: an artifact is also made by the
    program that made it."""
    return digest(*((name, (PACKAGE / f"{name}.py").read_text()) for name in sorted(import_closure({module}))))


def import_closure(modules: set[str]) -> set[str]:
    """These modules of `sarm_lib` and every one that they import, directly or not."""
    todo, seen = set(modules), set()
    while todo:
        module = todo.pop()
        seen.add(module)
        todo |= imported_modules((PACKAGE / f"{module}.py").read_text()) - seen
    return seen


def imported_modules(source: str) -> set[str]:
    """Modules of `sarm_lib` that a source text imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "sarm_lib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sarm_lib."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("sarm_lib.")}
    return found


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
