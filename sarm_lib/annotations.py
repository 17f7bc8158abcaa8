"""Which subtask an episode shows when: segments of an episode, the gate that every one passes, and LeRobot's columns.

An annotation is a list of segments in the order of time. Frames count from 0 within the episode and `end` is the last
frame of the segment, as in LeRobot's `{head}_subtask_end_frames`. One JSON file an episode lies in
`outputs/annotations/`; docs/annotations.md has its schema and an example. A subtask may occur again (a robot that drops
the nut reaches for it again), and an episode may end before the last subtask.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import TypeAdapter, ValidationError, WithJsonSchema

from sarm_lib.artifacts import staged, write_json
from sarm_lib.dataset import ANNOTATED, Dataset, Episode

HEADS = ("sparse", "dense")
SINGLE_STAGE = "task"  # the guide's name of the one stage of `single_stage`, and of the sparse head in `dense_only`
BY_HAND = ("manual", "corrected")  # annotators that are people
MIN_COVERAGE = 0.8  # of an episode's frames; a gap keeps the progress of the segment before it
USUAL = (0.05, 0.95)  # quantiles between which durations of a subtask are usual
ENOUGH = 20  # segments of a subtask, with fewer of which no duration is judged
# The gate refuses a negative number itself, with episode, subtask and rule; the published schema says so to others.
Index = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0})]
STRICT = {"strict": True, "extra": "forbid", "allow_inf_nan": False}  # how a file is read: no guesses


class AnnotationError(ValueError):
    """An annotation that must not be stored; the message names episode, subtask and rule."""


@dataclass(frozen=True)
class Segment:
    """A subtask from frame `start` to frame `end`, both inclusive."""

    __pydantic_config__: ClassVar = STRICT

    subtask: str
    start: Index
    end: Index


@dataclass(frozen=True)
class Annotation:
    """What one episode shows. `sparse` and `dense` are None where that head is not annotated.

    confidence: a head's probability, one value a segment, that its start lies within a few frames of where it is;
    None where the annotator has none. provenance: what made it (model, prompt, raw answer, seed), JSON values.
    doubt: likewise, the mean probability that a frame of the segment shows another subtask, each frame taken by itself.
    """

    __pydantic_config__: ClassVar = STRICT

    episode: Index
    length: Index
    annotator: str
    sparse: tuple[Segment, ...] | None
    dense: tuple[Segment, ...] | None
    confidence: dict[str, tuple[float, ...]] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    doubt: dict[str, tuple[float, ...]] | None = None

    def head(self, name: str) -> tuple[Segment, ...] | None:
        return self.sparse if name == "sparse" else self.dense


@dataclass(frozen=True)
class Finding:
    """A rule that an annotation breaks, or a doubt about it."""

    episode: int
    head: str
    subtask: str
    rule: str
    message: str

    def __str__(self) -> str:
        return f"episode {self.episode}, {self.head}, {self.rule}: {self.message}"


def whole_episode(episode: Episode) -> tuple[Segment, ...]:
    """The one segment of `single_stage`, and of the sparse head in `dense_only`."""
    return (Segment(SINGLE_STAGE, 0, episode.length - 1),)


def vocabulary(params) -> dict[str, list[str]]:
    """Subtask names of each head that the annotation mode uses. Raises AnnotationError where they are missing or repeat."""
    mode = params.base.annotation_mode
    sparse = params.annotate.sparse_subtasks if mode == "dual" else [SINGLE_STAGE]
    names = {"sparse": sparse, "dense": params.annotate.dense_subtasks}
    for head in params.heads:
        where = f"annotate.{head}_subtasks"
        if not names[head]:
            raise AnnotationError(f"{where}: annotation_mode {mode} needs the names of the {head} subtasks")
        for name in names[head]:
            if names[head].count(name) > 1 or not name.strip():
                raise AnnotationError(f"{where}: {name!r} is empty or stands there twice; names are classes")
    return {head: names[head] for head in params.heads}


def video_key(params, dataset: Dataset) -> str:
    """The camera that annotators and people look at: `annotate.video_key`, or the reward model's first."""
    key = params.annotate.video_key or dataset.image_keys[0]
    if key not in dataset.camera_keys:
        raise AnnotationError(
            f"annotate.video_key: no camera {key!r}; the dataset has {', '.join(dataset.camera_keys)}"
        )
    return key


# --- the gate -------------------------------------------------------------------------------------------------------


def violations(annotation: Annotation, vocabulary: dict[str, list[str]]) -> list[Finding]:
    """Every rule that an annotation breaks: what has one must not be stored."""
    found = []
    if annotation.episode < 0:
        found.append(Finding(annotation.episode, "both heads", "", "bounds", "episodes are numbered from 0"))
    for head in HEADS:
        if head not in vocabulary and annotation.head(head) is not None:
            text = f"has segments, and the annotation mode only {' and '.join(vocabulary)}"
            found.append(Finding(annotation.episode, head, "", "vocabulary", text))
    for head, names in vocabulary.items():

        def broken(rule: str, message: str, subtask: str = "", head: str = head) -> None:
            found.append(Finding(annotation.episode, head, subtask, rule, message))

        segments = annotation.head(head)
        if not segments:
            broken("coverage", "no segment")
            continue
        length, previous = annotation.length, None
        for segment in segments:
            span = f"{segment.subtask!r} ({segment.start} to {segment.end})"
            if segment.subtask not in names:
                broken("vocabulary", f"unknown subtask {span}; known are {', '.join(names)}", segment.subtask)
            if segment.start < 0 or segment.end >= length:
                broken("bounds", f"{span} leaves the episode's {length} frames", segment.subtask)
            # An episode of a single frame has room for nothing longer.
            if segment.end < segment.start or (segment.end == segment.start and length > 1):
                broken("zero length", f"{span} has fewer than two frames: both are part of it", segment.subtask)
            if previous and segment.start < previous.start:
                broken("order", f"{span} stands after {previous.subtask!r}, which starts later", segment.subtask)
            elif previous and segment.start <= previous.end:
                broken(
                    "overlap",
                    f"{span} starts inside {previous.subtask!r}, which ends at {previous.end}",
                    segment.subtask,
                )
            previous = segment
        covered = sum(max(0, min(s.end, length - 1) - max(s.start, 0) + 1) for s in segments)
        if length > 0 and covered / length < MIN_COVERAGE:  # a quotient, as a length may be too large for a float
            broken(
                "coverage", f"only {covered} of {length} frames lie in a segment, at least {MIN_COVERAGE:.0%} have to"
            )
    for rule, of_heads in (("confidence", annotation.confidence), ("doubt", annotation.doubt)):
        for head, values in (of_heads or {}).items():
            if head not in vocabulary:
                text = f"is of no head; the annotation mode has {' and '.join(vocabulary)}"
                found.append(Finding(annotation.episode, head, "", rule, text))
            elif len(values) != len(annotation.head(head) or ()) or not all(0 <= value <= 1 for value in values):
                found.append(Finding(annotation.episode, head, "", rule, "needs one value in [0, 1] a segment"))
    return found


def validate(annotation: Annotation, vocabulary: dict[str, list[str]], length: int | None = None) -> None:
    """Raise AnnotationError with every rule that is broken; `length` is the episode's, where it is known."""
    found = violations(annotation, vocabulary)
    if length is not None and annotation.length != length:
        text = f"made for {annotation.length} frames, the episode has {length}"
        found.insert(0, Finding(annotation.episode, "both heads", "", "bounds", text))
    if found:
        raise AnnotationError("\n".join(map(str, found)))


def unlikely(annotations: Sequence[Annotation], vocabulary: dict[str, list[str]], factor: float) -> list[Finding]:
    """The rule that takes all annotations to judge one: segments that last more than `factor` times as long as 95 % of their
    subtask's do, or less than 1 / `factor` of what 95 % last at least.

    The tails are the dataset's own, so that where many robots hesitate a hesitation is usual. A subtask with fewer than
    `ENOUGH` segments is not judged, nor is how short the last segment of an episode is, which may end early.
    """
    found = []
    for head, names in vocabulary.items():
        if names == [SINGLE_STAGE]:
            continue
        durations: dict[str, list[int]] = {}
        for annotation in annotations:
            for s in annotation.head(head) or ():
                durations.setdefault(s.subtask, []).append(s.end - s.start + 1)
        usual = {name: np.quantile(of, USUAL) for name, of in durations.items() if len(of) >= ENOUGH}
        for annotation in annotations:
            segments = annotation.head(head) or ()
            for s in segments:
                if s.subtask in usual:
                    frames, (least, most) = s.end - s.start + 1, usual[s.subtask]
                    if frames > factor * most or (frames < least / factor and s is not segments[-1]):
                        text = f"{s.subtask!r} ({s.start} to {s.end}) lasts {frames} frames; usual are {least:.0f} to {most:.0f}"
                        found.append(Finding(annotation.episode, head, s.subtask, "unlikely duration", text))
    return found


# --- files ----------------------------------------------------------------------------------------------------------


@cache
def _schema() -> TypeAdapter:
    return TypeAdapter(Annotation)


def json_schema() -> dict:
    """JSON schema of an annotation file."""
    return _schema().json_schema()


def parse(text: str | bytes, vocabulary: dict[str, list[str]], length: int | None = None) -> Annotation:
    """The annotation in a file's text, validated. Raises AnnotationError, whatever the text is."""
    _refuse_what_readers_differ_on(text)
    try:
        annotation = _schema().validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise AnnotationError(f"{where}: {first['msg']}") from None
    validate(annotation, vocabulary, length)
    return annotation


def _refuse_what_readers_differ_on(text: str | bytes) -> None:
    """Raise AnnotationError for a key that stands there twice, and for numbers that JSON does not have (NaN, Infinity, 1e999)."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        key, count = Counter(key for key, _ in pairs).most_common(1)[0] if pairs else ("", 1)
        if count > 1:
            raise AnnotationError(f"{key!r} stands there twice in one object")
        return dict(pairs)

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise AnnotationError(f"{number} is no number that JSON has")
        return value

    try:
        json.loads(text, object_pairs_hook=once, parse_float=finite, parse_constant=finite)
    except AnnotationError:
        raise
    except (ValueError, RecursionError):  # no JSON: who reads it next says where
        pass


def file_name(episode: int) -> str:
    return f"{episode:06d}.json"


def save_one(folder: Path, annotation: Annotation, vocabulary: dict[str, list[str]]) -> None:
    """Write one validated annotation into `folder`."""
    validate(annotation, vocabulary)
    write_json(folder / file_name(annotation.episode), asdict(annotation))


def save(folder: Path, annotations: list[Annotation], names: dict[str, list[str]]) -> None:
    """Write one validated file an episode; the folder appears whole or not at all."""
    with staged(folder) as partial:
        partial.mkdir()
        for annotation in annotations:
            save_one(partial, annotation, names)


def save_opinions(folder: Path, opinions: Mapping[str, list[Annotation]], names: dict[str, list[str]]) -> None:
    """Write what several annotators say, a folder each; `folder` appears whole or not at all."""
    with staged(folder) as partial:
        partial.mkdir()
        for name, given in opinions.items():
            save(partial / name, given, names)


def load_opinions(folder: Path, names: dict[str, list[str]], dataset: Dataset) -> dict[str, list[Annotation]]:
    """Read and validate what `save_opinions` wrote, by name."""
    return {of.name: load(of, names, dataset) for of in sorted(folder.iterdir()) if of.is_dir()}


def load(folder: Path, names: dict[str, list[str]], dataset: Dataset | None = None) -> list[Annotation]:
    """Read and validate every annotation of `folder`, in the order of the episodes (with `dataset`, of its used ones)."""
    lengths = {e.index: e.length for e in dataset.episodes} if dataset else None
    found = []
    for path in sorted(folder.glob("[0-9]*.json")):
        if not path.stem.isdecimal() or path.name != file_name(int(path.stem)):
            raise AnnotationError(
                f"{path.name}: files in {folder.name} are named after their episode, such as {file_name(3)}: rename "
                "this one, or take it away"
            )
        if lengths is None or int(path.stem) in lengths:
            found.append(load_one(path, names, lengths and lengths[int(path.stem)]))
    return found


def load_one(path: Path, names: dict[str, list[str]], length: int | None = None) -> Annotation:
    """Read and validate one file. Raises AnnotationError that names it."""
    where = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    try:
        annotation = parse(path.read_bytes(), names, length)
    except AnnotationError as error:
        raise AnnotationError(f"{where}: {error}\nAnnotate it again (delete the file), or correct it.") from None
    if annotation.episode != int(path.stem):
        raise AnnotationError(f"{where}: says that it is of episode {annotation.episode}")
    return annotation


# --- LeRobot's columns ----------------------------------------------------------------------------------------------


def columns(annotations: list[Annotation], dataset: Dataset, heads: tuple[str, ...]) -> dict[str, list]:
    """LeRobot's episode columns, one value an episode of the whole dataset (None where it is not annotated)."""
    by_episode = {annotation.episode: annotation for annotation in annotations}
    table: dict[str, list] = {}
    for head in heads:
        # Readers of older datasets look for the sparse columns without prefix.
        for prefix in (f"{head}_", "") if head == "sparse" else (f"{head}_",):
            for name in ANNOTATED:
                table[f"{prefix}subtask_{name}"] = [
                    _values(by_episode.get(i), head, name, dataset.fps) for i in range(len(dataset.table))
                ]
    return table


def _values(annotation: Annotation | None, head: str, name: str, fps: int) -> list | None:
    segments = annotation.head(head) if annotation else None
    if segments is None:
        return None
    return {
        "names": [s.subtask for s in segments],
        "start_times": [s.start / fps for s in segments],
        "end_times": [s.end / fps for s in segments],
        "start_frames": [s.start for s in segments],
        "end_frames": [s.end for s in segments],
    }[name]
