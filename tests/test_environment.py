"""Lock, conda environment and Makefile say the same."""

import os
import re
import shutil
import subprocess
import tomllib

import yaml

from tests.conftest import ROOT

HOUSE = "jupyterlab papermill torch transformers lerobot pandas pyarrow altair vl-convert-python ipywidgets dvc nbval pydantic"


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked() -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9._-]+)==([^ \\;]+)", (ROOT / "requirements.lock").read_text(), re.M))


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower()


def test_every_package_of_the_house_is_declared_and_locked():
    declared = {name_of(r) for r in project()["dependencies"]}
    assert set(HOUSE.split()) <= declared
    everything = declared | {name_of(r) for extra in project()["optional-dependencies"].values() for r in extra}
    assert everything <= set(locked())
    assert locked()["lerobot"] == "0.6.1" and locked()["metaworld"] == "3.0.0" and locked()["mujoco"] == "3.16.0"


def test_the_lock_pins_by_hash_and_names_no_index():
    text = (ROOT / "requirements.lock").read_text()
    blocks = re.split(r"\n(?=[a-z])", text.split("\n", 2)[2])
    assert len(blocks) > 100 and all("--hash=sha256:" in block for block in blocks)
    assert "://" not in text and "--index" not in text


def test_conda_installs_the_same_python_and_the_same_lock():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert "python=3.12" in conda and project()["requires-python"] == ">=3.12,<3.13"
    assert "-r requirements.lock" in next(d for d in conda if isinstance(d, dict))["pip"]
    makefile = (ROOT / "Makefile").read_text()
    assert "--require-hashes requirements.lock" in makefile and "--python-version 3.12" in makefile
    assert "sys.version_info[:2] != (3, 12)" in (ROOT / ".ci/find-python").read_text()


DVC = """#!/bin/bash
echo "$@" >> pulled.txt
test -e offline && exit 1
mkdir -p data/demo/assembly/meta && echo {} > data/demo/assembly/meta/info.json
"""


def test_data_is_pulled_when_it_is_missing_or_changed_and_else_not(tmp_path):
    folder = tmp_path / "a folder with spaces"
    (folder / ".venv/bin").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    (folder / ".ci").mkdir()
    for name in ("data.dvc", "requirements.lock", "pyproject.toml", ".ci/find-python", ".venv/.installed"):
        (folder / name).touch()
    (folder / ".venv/bin/dvc").write_text(DVC)
    (folder / ".venv/bin/dvc").chmod(0o755)

    def pulls() -> int:
        """Runs `make data` and says how often it pulled."""
        (folder / "pulled.txt").write_text("")
        subprocess.run(["make", "data"], cwd=folder, capture_output=True)
        lines = (folder / "pulled.txt").read_text().splitlines()
        assert set(lines) <= {"pull -q data.dvc"}
        return len(lines)

    assert [pulls(), pulls()] == [1, 0]
    os.utime(folder / ".venv/.pulled", (0, 0))  # a new data.dvc, by git
    (folder / "offline").touch()
    assert [pulls(), pulls()] == [1, 1], "an interrupted pull is repeated"
    (folder / "offline").unlink()
    assert [pulls(), pulls()] == [1, 0]
    shutil.rmtree(folder / "data/demo")
    assert [pulls(), pulls()] == [1, 0]


def test_everything_the_library_imports_is_declared():
    import ast
    import sys

    declared = {name_of(r).replace("-", "_") for r in project()["dependencies"]} | {"pillow", "pyyaml"}
    as_imported = {
        "PIL": "pillow",
        "IPython": "ipython",
        "yaml": "pyyaml",
        "vl_convert": "vl_convert_python",
        "ruamel": "ruamel_yaml",
    }
    for path in (ROOT / "sarm_lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for module in modules:
                top = module.split(".")[0]
                if top not in sys.stdlib_module_names and top not in ("sarm_lib", ""):
                    assert as_imported.get(top, top) in declared | {"torchcodec"}, f"{path.name} imports {top}"


def test_nothing_of_the_library_knows_the_demo():
    for path in (ROOT / "sarm_lib").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) demo\b", text, re.M), path.name
        assert text.count("sim.") == (path.name == "dataset.py"), path.name  # the prefix of truth columns, once
