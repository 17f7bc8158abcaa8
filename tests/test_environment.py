"""Lock, conda environment and Makefile say the same."""

import re
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


def test_everything_the_library_imports_is_declared():
    import ast
    import sys

    declared = {name_of(r).replace("-", "_") for r in project()["dependencies"]} | {"pillow", "pyyaml"}
    as_imported = {"PIL": "pillow", "yaml": "pyyaml", "vl_convert": "vl_convert_python"}
    for path in [*(ROOT / "sarm_lib").glob("*.py")]:
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
    for path in (ROOT / "sarm_lib").glob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) demo\b", text, re.M), path.name
        assert text.count("sim.") == (path.name == "dataset.py"), path.name  # the prefix of truth columns, once
