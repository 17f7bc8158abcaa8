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
    [("encoder", "dataset"), ("training", "encoder"), ("training", "stages"), ("training", "lerobot_io"),
     ("progress", "encoder"), ("progress", "windows"), ("policy", "small_pi0"), ("policy", "training"), ("policy", "dataset")],
)  # fmt: skip
def test_a_change_of_a_module_outdates_what_it_made(artifact, module, tmp_path, monkeypatch):
    import shutil

    copy = shutil.copytree(artifacts.PACKAGE, tmp_path / "sarm_lib")
    monkeypatch.setattr(artifacts, "PACKAGE", copy)
    before = artifacts.code_digest(artifact)
    (copy / "charts.py").write_text("# another colour")
    assert artifacts.code_digest(artifact) == before
    (copy / f"{module}.py").open("a").write("# another line")
    assert artifacts.code_digest(artifact) != before
