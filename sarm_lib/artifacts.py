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
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
PROVENANCE = "provenance.json"  # beside the files of a folder
PARQUET_KEY = b"sarm_lib"  # within a Parquet file
REWARD_MODEL = ("model.safetensors", "config.json", "sarm_lib.json")  # files of its checkpoint; LeRobot's lack the last


def digest(*parts: Any) -> str:
    """A short stable name for JSON-like values (dicts in any order)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def code_digest(module: str) -> str:
    """Names the code of a module of `sarm_lib` and of all that it imports from there: an artifact is also made by the
    program that made it. What is said in comments and docstrings makes no other one."""
    return digest(*((name, _code(module_path(name).read_text())) for name in sorted(import_closure({module}))))


@cache
def _code(source: str) -> str:
    """What a module does, without its comments, docstrings and line breaks."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node
        ):
            node.body[0].value.value = ""
    return ast.dump(tree)


def import_closure(modules: set[str]) -> set[str]:
    """These modules of `sarm_lib` and every one that they import, directly or not, also within a function."""
    todo, seen = set(modules), set()
    while todo:
        module = todo.pop()
        seen.add(module)
        todo |= imported_modules(module_path(module).read_text()) - seen
    return seen


def imported_modules(source: str) -> set[str]:
    """Modules of `sarm_lib` that a source text imports; `annotators.vlm` brings its package `annotators` along."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports of sarm_lib are absolute: a relative one would not be seen here"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    ours = [name.split(".")[1:] for name in names if name.startswith("sarm_lib.")]
    modules = {".".join(parts[:depth]) for parts in ours for depth in range(1, len(parts) + 1)}
    return {module for module in modules if module_path(module).exists()}  # the others are names within a module


def module_path(module: str) -> Path:
    """The file of a module of `sarm_lib`, which for a package is its `__init__.py`."""
    path = PACKAGE.joinpath(*module.split("."))
    package = path / "__init__.py"
    return package if package.exists() else path.with_name(f"{path.name}.py")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_identity(folder: Path) -> list[list[str | int]] | None:
    """Names, sizes and modification times of a folder's files, or None for what is no folder (a Hub id): tells that a
    model was replaced, without reading gigabytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        [path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in files
    ] or None


def folder_digest(folder: str | Path) -> str | None:
    """Names the contents of the files right in a folder; None where there are none (a Hub id)."""
    files = sorted(p for p in Path(folder).glob("*") if p.is_file() and not p.name.startswith("."))
    return digest(*((p.name, file_digest(p)) for p in files)) if files else None


def checkpoint_digest(folder: Path) -> str:
    """Names a reward model by its weights and what surrounds them: with another ᾱ or window the same weights say something
    else. Here, so that what depends on its files alone does not depend on the modules that run it."""
    return digest(*(file_digest(folder / name) for name in REWARD_MODEL if (folder / name).exists()))


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


def readable(text: str) -> str:
    """What somebody said, as text that can be written and read again: half an emoji, "\\ud83d" in JSON, cannot."""
    return text.encode("utf-8", "replace").decode()


def write_json(path: Path, values: Any) -> None:
    """Write sorted, indented JSON in one move. NaN is an error: no artifact of ours carries one."""
    with staged(path) as partial:
        partial.write_text(json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_json_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, in one move."""
    with staged(path) as partial:
        partial.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_current(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether the artifact in `folder` was made from exactly these inputs."""
    path = folder / PROVENANCE
    return path.exists() and read_json(path) == json.loads(json.dumps(made_from))


def read_provenance(path: Path) -> dict[str, Any] | None:
    """What made a Parquet file of ours, or None for a file that does not say (LeRobot's own)."""
    import pyarrow.parquet as pq  # only stages that read such a file need it

    metadata = pq.read_schema(path).metadata or {}
    return json.loads(metadata[PARQUET_KEY]) if PARQUET_KEY in metadata else None


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
