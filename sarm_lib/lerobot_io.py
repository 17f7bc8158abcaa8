"""The annotated dataset in LeRobot's format: columns beside its episodes, proportions beside its metadata, linked videos.

LeRobot's own tools read what is written here, and what they wrote is read back as targets.
"""

import itertools
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sarm_lib.annotations import Annotation, Segment, columns
from sarm_lib.artifacts import read_provenance, remove, staged
from sarm_lib.dataset import ANNOTATION_COLUMNS, Dataset, files_in, fingerprint, open_dataset
from sarm_lib.stages import Labels, given_up, targets

MEDIA = ("data", "videos", "images")


def write_annotated_dataset(
    dataset: Dataset, annotations: list[Annotation], proportions: dict[str, dict[str, float]], target: Path
) -> None:
    """Write `target`: a LeRobot dataset with annotation columns and proportions, whose videos are links.

    proportions: a head: {subtask: ᾱ} in stage order.
    """
    if target.resolve() == dataset.root.resolve():
        raise ValueError(f"base.dataset is {target}, which is what stage 02 writes: name the dataset it was made from")
    table_columns = columns(annotations, dataset, tuple(proportions))
    with staged(target / "meta") as partial:
        for folder, _, names in os.walk(dataset.root / "meta", followlinks=True):
            copy = partial / Path(folder).relative_to(dataset.root / "meta")
            copy.mkdir(parents=True)
            for name in names:
                shutil.copyfile(Path(folder) / name, copy / name)  # contents alone: the source may be write-protected
        for path in partial.glob("temporal_proportions_*.json"):
            path.unlink()  # of annotations that the source carried
        for path in sorted(partial.glob("episodes/**/*.parquet")):
            pq.write_table(_with_columns(pq.read_table(path), table_columns), path)
        for head, shares in proportions.items():
            # LeRobot reads the order of the stages from the order of the keys: not sorted.
            (partial / f"temporal_proportions_{head}.json").write_text(json.dumps(shares, indent=2) + "\n")
    link_media(dataset.root, target)


def link_media(source: Path, target: Path) -> None:
    """Link every file of data, videos and images of `source` into `target` (DVC keeps only `target/meta`).

    The folders are real ones: the Hub's upload and many tools do not look into a folder that is a link.
    """
    for name in MEDIA:
        remove(target / name)
    _make_missing_links(source, target)


def _make_missing_links(source: Path, target: Path) -> None:
    for file in itertools.chain.from_iterable(files_in(source / name) for name in MEDIA):
        link = target / file.relative_to(source)
        if not link.exists():
            link.unlink(missing_ok=True)  # one that leads nowhere
            link.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):  # another process was faster
                link.symlink_to(os.path.relpath(file.resolve(), link.parent.resolve()))


def _with_columns(table: pa.Table, added: dict[str, list]) -> pa.Table:
    """The rows of one episode file with their own annotations: rows are matched by episode index, not by position."""
    rows = table["episode_index"].to_pylist()
    table = table.drop_columns([name for name in table.column_names if name in ANNOTATION_COLUMNS])
    for name, values in added.items():
        assert name in ANNOTATION_COLUMNS
        item = pa.string() if name.endswith("names") else pa.float64() if "times" in name else pa.int64()
        column = pa.array([values[row] for row in rows], pa.list_(item))
        table = table.append_column(name, column)
    return table


def read_labels(folder: Path, dataset: Dataset, heads: tuple[str, ...]) -> Labels:
    """Targets of every frame of `dataset` from an annotated dataset's columns and proportions.

    Frames of an episode without annotation have stage 0 and τ 0 and are not in `annotated`. Links to data and videos that DVC
    did not bring along (`dvc checkout`, `dvc pull`) are made anew.
    Raises ValueError for the annotations of another dataset, and with the episode and the subtask where one is unknown.
    """
    _make_missing_links(dataset.root, folder)
    if fingerprint(folder) != dataset.fingerprint:
        raise ValueError(
            f"{folder} holds the annotations of another dataset (or of an older state of it): run 02_verify again"
        )
    files = sorted((folder / "meta").glob("episodes/**/*.parquet"))
    stage, tau, undone, names, shares = {}, {}, {}, {}, {}
    annotated = {episode.index for episode in dataset.episodes}
    for head in heads:
        proportions = json.loads((folder / f"meta/temporal_proportions_{head}.json").read_text())
        names[head], shares[head] = list(proportions), list(proportions.values())
        stage[head] = np.zeros(dataset.num_frames, dtype=np.int64)
        tau[head] = np.zeros(dataset.num_frames, dtype=np.float32)
        undone[head] = np.zeros(dataset.num_frames, dtype=bool)
        columns = [f"{head}_subtask_{name}" for name in ("names", "start_frames", "end_frames")]
        rows = {
            r["episode_index"]: r
            for f in files
            for r in pq.read_table(f, columns=["episode_index", *columns]).to_pylist()
        }
        for episode in dataset.episodes:
            subtasks, starts, ends = (rows[episode.index][column] for column in columns)
            if not subtasks:
                annotated.discard(episode.index)
                continue
            unknown = set(subtasks) - set(names[head])
            if unknown:
                raise ValueError(
                    f"episode {episode.index}: {head} subtask {sorted(unknown)[0]!r} is not one of {', '.join(names[head])}"
                )
            segments = tuple(map(Segment, subtasks, starts, ends))
            stage[head][episode.rows], tau[head][episode.rows] = targets(segments, names[head], episode.length)
            undone[head][episode.rows] = given_up(segments, names[head], episode.length)
    return Labels(stage, tau, names, shares, frozenset(annotated), undone)


def export_progress(progress: Path, root: Path, dataset_fingerprint: str) -> Path:
    """Put a progress file where LeRobot looks for it: into the folder of its dataset, as `sarm_progress.parquet`.

    Raises ValueError where it is the progress of another dataset: by the fingerprint that it names, or, where somebody else
    computed it and it names none, by its frames.
    """
    made = (read_provenance(progress) or {}).get("fingerprint")
    if made is None:
        keys = ["index", "episode_index"]
        theirs, ours = pq.read_table(progress, columns=keys).sort_by("index"), open_dataset(root).frames
        same = all(np.array_equal(theirs[key].to_numpy(), ours[key].to_numpy()) for key in keys)
        if not same:
            raise ValueError(f"{progress} is the progress of another dataset: its frames are not those of {root}")
    elif made != dataset_fingerprint:
        raise ValueError(f"{progress} is the progress of another dataset ({made}, {root} is {dataset_fingerprint})")
    target = root / progress.name
    with staged(target) as partial:
        shutil.copyfile(progress, partial)
    return target
