"""The same seed gives the same bytes, and the simulator's truth is in nothing but the figures that show it."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sarm_lib.dataset import fingerprint
from tests.conftest import make_project, run_chapters


def digests(project: Path, *skip: str) -> dict[str, str]:
    """SHA-256 of every file under outputs/, links not followed."""
    found = {}
    for path in sorted((project / "outputs").rglob("*")):
        name = path.relative_to(project / "outputs").as_posix()
        if path.is_file() and "dataset/data" not in name and "dataset/videos" not in name and not name.startswith(skip):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def test_a_second_run_gives_the_same_bytes(project, tmp_path):
    copy = run_chapters(make_project(tmp_path / "p", project / "data/tiny", project / "data/encoder"))
    first, second = digests(project), digests(copy)
    assert set(first) == set(second) and len(first) > 30
    assert [name for name in first if first[name] != second[name]] == []


def test_running_a_notebook_again_changes_nothing_and_trains_nothing(project, tmp_path, monkeypatch):
    from sarm_lib import encoder, policy, training

    copy = shutil.copytree(project, tmp_path / "p", symlinks=True)
    for module, name in ((training, "train"), (policy.WeightedLoss, "forward"), (encoder.Encoder, "images")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("made again"))
    run_chapters(copy)
    assert digests(project) == digests(copy)


def rewrite_truth(dataset: Path, permute: bool) -> None:
    """Write the data files anew, uncompressed (so that their sizes stay), with `sim.*` permuted or as it was."""
    rng = np.random.default_rng(0)
    for path in dataset.glob("data/**/*.parquet"):
        table = pq.read_table(path)
        for i, name in enumerate(table.column_names):
            if permute and name.startswith("sim."):
                values = table[name].combine_chunks()
                values = values.take(pa.array(rng.permutation(len(values))))
                table = table.set_column(i, table.schema.field(name), values)
        pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)


def test_permuting_the_simulator_s_truth_changes_no_artifact(project, tmp_path):
    found = []
    for permute in (False, True):
        folder = make_project(tmp_path / str(permute), project / "data/tiny", project / "data/encoder")
        rewrite_truth(folder / "data/tiny", permute)
        run_chapters(folder)
        found.append((fingerprint(folder / "data/tiny"), digests(folder, "metrics", "figures")))
    truths = [
        pq.read_table(next((tmp_path / p).glob("data/tiny/data/**/*.parquet")))["sim.progress"]
        for p in ("False", "True")
    ]
    assert truths[0] != truths[1] and found[0] == found[1]
