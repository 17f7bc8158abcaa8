"""Artifacts appear whole or not at all, and know what made them."""

import pytest

from sarm_lib import artifacts


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "metrics/a.json"
    artifacts.write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), artifacts.staged(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert artifacts.read_json(path) == {"a": 1} and list(path.parent.iterdir()) == [path]


def test_a_folder_is_replaced_in_one_move(tmp_path):
    for name in ("one", "two"):
        with artifacts.staged(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / name).touch()
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["two"]


def test_no_nan_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifacts.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("artifact", "module"),
    [("encoder", "dataset"), ("training", "encoder"), ("training", "stages"), ("training", "checkpoint"),
     ("progress", "encoder"), ("progress", "windows"), ("policy", "small_pi0"), ("policy", "schedule"), ("policy", "dataset")],
)  # fmt: skip
def test_a_change_of_a_module_outdates_what_it_made(artifact, module, tmp_path, monkeypatch):
    import shutil

    copy = shutil.copytree(artifacts.PACKAGE, tmp_path / "sarm_lib")
    monkeypatch.setattr(artifacts, "PACKAGE", copy)
    before = artifacts.code_digest(artifact)
    (copy / "charts.py").write_text("# another colour")
    assert artifacts.code_digest(artifact) == before
    with artifacts.module_path(module).open("a") as file:
        file.write("\n\n# another line\n")
        file.flush()
        assert artifacts.code_digest(artifact) == before
        file.write("ANOTHER = 1\n")
    assert artifacts.code_digest(artifact) != before


def test_what_is_said_of_code_is_no_code():
    code = 'def f(x):\n    """{}"""\n    return x + {}'
    assert artifacts._code(code.format("says", 1)) == artifacts._code(code.format("says more", 1) + "  # indeed")
    assert artifacts._code(code.format("says", 1)) != artifacts._code(code.format("says", 2))
    assert artifacts._code("f('a')") != artifacts._code("f('b')")  # a string that is no docstring counts


def test_the_policies_do_not_depend_on_the_reward_model():
    assert artifacts.import_closure({"policy"}) == {
        "policy",
        "artifacts",
        "dataset",
        "live",
        "losses",
        "processes",
        "schedule",
        "small_pi0",
    }
    assert artifacts.import_closure({"rabc"}) == {"rabc", "artifacts", "dataset"}


def test_imports_of_a_subpackage_and_within_functions_count(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "PACKAGE", tmp_path)
    (tmp_path / "package").mkdir()
    sources = {
        "package/__init__.py": "def make():\n    from sarm_lib.package import one\n    return one",
        "package/one.py": "from sarm_lib.package.two import value\nimport sarm_lib.leaf",
        "package/two.py": "value = 1",
        "leaf.py": "import json",
        "user.py": "def use():\n    from sarm_lib import package",
    }
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    assert artifacts.imported_modules("from sarm_lib import package, leaf") == {"package", "leaf"}
    assert artifacts.imported_modules("from sarm_lib.package import two, make") == {"package", "package.two"}
    assert artifacts.imported_modules("from sarm_lib.package.two import value") == {"package", "package.two"}
    assert artifacts.imported_modules("import sarm_lib.package.two\nimport numpy.linalg") == {"package", "package.two"}
    everything = {"user", "package", "package.one", "package.two", "leaf"}
    assert artifacts.import_closure({"user"}) == everything
    before = artifacts.code_digest("user")
    (tmp_path / "package/two.py").write_text("value = 2")
    assert artifacts.code_digest("user") != before
    with pytest.raises(AssertionError, match="absolute"):
        artifacts.imported_modules("from . import two")
