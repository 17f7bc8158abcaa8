"""The same seed gives the same bytes, and the simulator's truth is in nothing but the figures that show it."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
    for module, name in ((training, "train"), (policy.WeightedLoss, "forward"), (encoder.Encoder, "embed")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("made again"))
    run_chapters(copy)
    assert digests(project) == digests(copy)


def permute_truth(dataset: Path) -> None:
    """Permute every `sim.*` column of the frames and of the episodes, and scramble their statistics."""
    rng = np.random.default_rng(0)
    for path in [*dataset.glob("data/**/*.parquet"), *dataset.glob("meta/episodes/**/*.parquet")]:
        table = pq.read_table(path)
        for i, name in enumerate(table.column_names):
            if name.removeprefix("stats/").startswith("sim."):
                values = table[name].combine_chunks()
                values = values.take(pa.array(rng.permutation(len(values))))
                table = table.set_column(i, table.schema.field(name), values)
        pq.write_table(table, path)
    statistics = json.loads((dataset / "meta/stats.json").read_text())
    for name in statistics:
        if name.startswith("sim."):
            statistics[name] = {key: [123.0] for key in statistics[name]}
    (dataset / "meta/stats.json").write_text(json.dumps(statistics))


def test_permuting_the_simulator_s_truth_changes_no_artifact(tiny, tiny_encoder, tmp_path):
    found = []
    for permute in (False, True):
        source = shutil.copytree(tiny, tmp_path / f"source_{permute}")
        for path in source.glob("meta/episodes/**/*.parquet"):
            table = pq.read_table(path)
            kinds = pa.array([("clean", "sloppy", "failing")[i % 3] for i in range(len(table))])
            pq.write_table(table.append_column("sim.kind", kinds), path)
        if permute:
            permute_truth(source)
        seen = {"base.group_key": "sim.kind", "base.truth_prefix": "sim."}
        folder = make_project(tmp_path / str(permute), source, tiny_encoder, seen)
        found.append(digests(run_chapters(folder), "metrics", "figures", "dataset/meta"))
    truths = [
        pq.read_table(next((tmp_path / p).glob("data/tiny/data/**/*.parquet")))["sim.progress"]
        for p in ("False", "True")
    ]
    assert truths[0] != truths[1] and len(found[0]) > 30
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []
