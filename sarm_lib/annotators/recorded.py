"""Labels that the dataset already carries, in any of the forms in which LeRobot's tools and others leave them:

    meta/episodes   {head}_subtask_names, _start_frames, _end_frames (or _start_times, _end_times in seconds)
    data            language_persistent: rows of style "subtask", each from its timestamp until the next
    data            subtask_index, an index into meta/subtasks.parquet a frame

Episode columns say which head they are of; labels of frames go to every head that has no such columns.
LeRobot's own tool answers in whole seconds: a segment ends at the frame where the next one starts, the last one perhaps
after the video. These ends are taken for the first frame after the segment; what overlaps beyond that is for the gate.
An episode whose labels cannot be read is a Failure of its own, and says where the dataset has to be mended.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from sarm_lib.agreement import segments_of
from sarm_lib.annotations import SINGLE_STAGE, Annotation, AnnotationError, Segment, whole_episode
from sarm_lib.annotators import Failure
from sarm_lib.artifacts import code_digest, digest
from sarm_lib.dataset import Dataset, Episode

LANGUAGE, INDEX = "language_persistent", "subtask_index"
Labels = dict[int, tuple[Segment, ...] | Failure]  # by episode


class RecordedAnnotator:
    """Reads the labels once. Raises AnnotationError with the names that the dataset has, where none fit a head."""

    def __init__(self, dataset: Dataset, vocabulary: dict[str, list[str]]) -> None:
        self.vocabulary = vocabulary
        columns = {head: _episode_columns(dataset, head) for head in vocabulary}
        frames = _language(dataset) or _subtask_index(dataset)
        self.labels = {head: columns[head] or frames for head in vocabulary}
        for head, names in vocabulary.items():
            if names == [SINGLE_STAGE]:
                self.labels[head] = {e.index: whole_episode(e) for e in dataset.episodes}
                continue
            read = [label for label in self.labels[head].values() if not isinstance(label, Failure)]
            found = {s.subtask for segments in read for s in segments}
            if not self.labels[head]:
                raise AnnotationError(
                    f"annotate.annotator dataset: it carries no {head} labels (looked for {head}_subtask_names in meta/episodes with "
                    f"{head}_subtask_start_frames and _end_frames, or _start_times and _end_times, beside them; for {LANGUAGE} and "
                    f"{INDEX} in the data)"
                )
            if found and not found & set(names):
                raise AnnotationError(
                    f"annotate.{head}_subtasks: none of these names is in the dataset; its labels are "
                    f"{', '.join(sorted(found))}. Where they are of the other head alone, base.annotation_mode: dense_only asks "
                    "for one"
                )
        self.identity = {
            "annotator": "dataset",
            "code": code_digest("annotators.recorded"),
            "labels": digest({h: sorted(map(str, v.items())) for h, v in self.labels.items()}),
        }

    def annotate(self, episodes: Sequence[Episode]) -> Iterator[Annotation | Failure]:
        for episode in episodes:
            segments = {head: self.labels[head].get(episode.index) for head in self.vocabulary}
            missing = [head for head, value in segments.items() if not value]
            unread = [value for value in segments.values() if isinstance(value, Failure)]
            if unread:
                yield unread[0]
            elif missing:
                yield Failure(episode.index, f"the dataset has no {missing[0]} labels for it")
            else:
                yield Annotation(
                    episode.index, episode.length, "dataset", segments.get("sparse"), segments.get("dense")
                )


def _episode_columns(dataset: Dataset, head: str) -> Labels:
    """Segments from the columns of meta/episodes; the sparse ones also under their older names without prefix."""
    table = dataset.table
    for prefix in (f"{head}_", "") if head == "sparse" else (f"{head}_",):
        names, starts, ends = (f"{prefix}subtask_{x}" for x in ("names", "start_frames", "end_frames"))
        start_times, end_times = f"{prefix}subtask_start_times", f"{prefix}subtask_end_times"
        if names not in table or not ({starts, ends} <= set(table) or {start_times, end_times} <= set(table)):
            continue
        in_frames = starts in table and ends in table
        bounds, per_frame = ((starts, ends), 1) if in_frames else ((start_times, end_times), dataset.fps)
        labels: Labels = {}
        for row in table.to_dict("records"):
            if not isinstance(row[names], np.ndarray | list) or not len(row[names]):
                continue
            index = int(row["episode_index"])
            try:
                labels[index] = _closed(_segments(row, names, bounds, per_frame), int(row["length"]))
            except AnnotationError as error:
                labels[index] = _unread(index, error)
        if labels:
            return labels
    return {}


def _segments(row: dict, names: str, bounds: tuple[str, str], per_frame: float) -> list[Segment]:
    """Segments from a row's columns of names, starts and ends; `per_frame` times a bound is a frame.

    Raises AnnotationError with the column where a name or a bound is missing or is none.
    """
    frames = []
    for column in bounds:
        values = row[column] if isinstance(row[column], np.ndarray | list) else []
        if len(values) != len(row[names]):
            raise AnnotationError(f"{column} has {len(values)} values, and {names} {len(row[names])}")
        frames.append([_frame(value, column, per_frame) for value in values])
    for name in row[names]:
        if not isinstance(name, str):
            raise AnnotationError(f"{names} has {name!r}, which is no name")
    return [Segment(n, start, end) for n, start, end in zip(row[names], *frames, strict=True)]


def _frame(value: object, column: str, per_frame: float) -> int:
    """The frame that a number of `column` stands for. Raises AnnotationError where it is no finite number."""
    if not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise AnnotationError(f"{column} has {value}, which is no finite number")
    return round(float(value) * per_frame)  # a float, as round leaves a numpy integer one


def _unread(episode: int, why: object) -> Failure:
    return Failure(
        episode, f"episode {episode}, {why}: correct it in the dataset, or mark the episode (annotate.marks)"
    )


def _closed(segments: list[Segment], length: int) -> tuple[Segment, ...]:
    """Segments whose `end` is their last frame, also where it was the next one's first or lay behind the episode."""
    closed = [
        replace(this, end=this.end - 1) if this.end == after.start else this
        for this, after in itertools.pairwise(segments)
    ]
    return (*closed, replace(segments[-1], end=min(segments[-1].end, length - 1)))


def _language(dataset: Dataset) -> Labels:
    """Segments from LeRobot's persistent language rows: a subtask holds from its timestamp until the next begins."""
    if LANGUAGE not in dataset.features:
        return {}
    starts: dict[int, dict[float, str]] = {}
    for path in sorted(dataset.root.glob("data/**/*.parquet")):
        for row in pq.read_table(path, columns=["episode_index", LANGUAGE]).to_pylist():
            for said in row[LANGUAGE] or ():
                if said["style"] == "subtask" and said["content"]:
                    starts.setdefault(row["episode_index"], {})[said["timestamp"]] = said["content"]
    labels: Labels = {}
    for episode in dataset.episodes:
        said = starts.get(episode.index, {})
        try:
            begun = sorted((_frame(t, f"{LANGUAGE}.timestamp", dataset.fps), n) for t, n in said.items())
        except AnnotationError as error:
            labels[episode.index] = _unread(episode.index, error)
            continue
        if begun:
            begun = [(min(start, episode.length - 1), n) for start, n in begun]
            ends = [start - 1 for start, _ in begun[1:]] + [episode.length - 1]
            labels[episode.index] = tuple(Segment(n, start, end) for (start, n), end in zip(begun, ends, strict=True))
    return labels


def _subtask_index(dataset: Dataset) -> Labels:
    """Segments from an index a frame into meta/subtasks.parquet."""
    path = dataset.root / "meta/subtasks.parquet"
    if INDEX not in dataset.features or not path.exists():
        return {}
    table = pd.read_parquet(path)
    named = (
        table.set_index("subtask_index")["subtask"]
        if "subtask" in table
        else table.reset_index().set_index("subtask_index").iloc[:, 0]
    )
    known = sorted(named.index)
    names = [str(named[k]) for k in known]
    values = dataset.vectors(INDEX)[:, 0].astype(np.int64)
    labels: Labels = {}
    for episode in dataset.episodes:
        own = values[episode.rows]
        if len(unknown := np.flatnonzero(~np.isin(own, known))):
            frame = unknown[0]
            text = f"{INDEX} is {own[frame]} at frame {frame}, which meta/subtasks.parquet does not name"
            labels[episode.index] = _unread(episode.index, text)
        else:
            labels[episode.index] = segments_of(np.searchsorted(known, own), names)
    return labels
