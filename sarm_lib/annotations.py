"""Which subtask an episode shows when: segments of an episode, their validation, and LeRobot's columns for them.

An annotation is a list of segments in the order of time. Frames count from 0 within the episode and `end` is the last
frame of the segment, as in LeRobot's `{head}_subtask_end_frames`. One JSON file an episode lies in
`outputs/annotations/`:

    {"episode": 3, "annotator": "single_stage", "length": 52,
     "sparse": [{"subtask": "task", "start": 0, "end": 51}], "dense": null}
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from sarm_lib.artifacts import read_json, staged, write_json
from sarm_lib.dataset import Dataset, Episode

SINGLE_STAGE = "task"  # the guide's name of the one stage of `single_stage`, and of the sparse head in `dense_only`


class AnnotationError(ValueError):
    """An annotation that must not be stored; the message names episode, subtask and rule."""


@dataclass(frozen=True)
class Segment:
    """A subtask from frame `start` to frame `end`, both inclusive."""

    subtask: str
    start: int
    end: int


@dataclass(frozen=True)
class Annotation:
    """What one episode shows. `sparse` and `dense` are None where that head is not annotated."""

    episode: int
    length: int
    annotator: str
    sparse: tuple[Segment, ...] | None
    dense: tuple[Segment, ...] | None

    def head(self, name: str) -> tuple[Segment, ...] | None:
        return self.sparse if name == "sparse" else self.dense


def single_stage(episode: Episode) -> Annotation:
    """The whole episode is one stage, "task", and progress is linear."""
    return Annotation(
        episode.index, episode.length, "single_stage", (Segment(SINGLE_STAGE, 0, episode.length - 1),), None
    )


def annotate(dataset: Dataset, mode: str) -> list[Annotation]:
    """Annotate every episode as `mode` asks. Raises AnnotationError for a mode that needs more than the dataset."""
    if mode != "single_stage":
        raise AnnotationError(
            f"annotation_mode {mode} needs subtask annotations, and no annotator makes them yet: use single_stage"
        )
    return [single_stage(episode) for episode in dataset.episodes]


def validate(annotation: Annotation, vocabulary: dict[str, list[str]]) -> None:
    """Check one annotation against the vocabulary of each head. Raises AnnotationError at the first broken rule."""
    for head, names in vocabulary.items():
        segments = annotation.head(head)
        if segments is None:
            continue
        where = f"episode {annotation.episode}, {head}"
        if not segments:
            raise AnnotationError(f"{where}: no segment (leave the head out where it is not annotated)")
        previous = -1
        for segment in segments:
            if segment.subtask not in names:
                raise AnnotationError(f"{where}: unknown subtask {segment.subtask!r}; known are {', '.join(names)}")
            if segment.start < 0 or segment.end >= annotation.length:
                raise AnnotationError(
                    f"{where}: {segment.subtask!r} ({segment.start} to {segment.end}) leaves the episode's "
                    f"{annotation.length} frames"
                )
            if segment.end < segment.start:
                raise AnnotationError(
                    f"{where}: {segment.subtask!r} ends at {segment.end}, before it starts at {segment.start}"
                )
            if segment.start <= previous:
                raise AnnotationError(
                    f"{where}: {segment.subtask!r} starts at {segment.start}, inside the segment before it"
                )
            previous = segment.end


def vocabulary(params) -> dict[str, list[str]]:
    """Subtask names of each head that the annotation mode uses."""
    mode = params.base.annotation_mode
    sparse = params.annotate.sparse_subtasks if mode == "dual" else [SINGLE_STAGE]
    names = {"sparse": sparse, "dense": params.annotate.dense_subtasks}
    for head in params.heads:
        if not names[head]:
            raise AnnotationError(
                f"annotate.{head}_subtasks: annotation_mode {mode} needs the names of the {head} subtasks"
            )
    return {head: names[head] for head in params.heads}


def save(folder: Path, annotations: list[Annotation], names: dict[str, list[str]]) -> None:
    """Write one validated file an episode; the folder appears whole or not at all."""
    with staged(folder) as partial:
        partial.mkdir()
        for annotation in annotations:
            validate(annotation, names)
            write_json(partial / f"{annotation.episode:06d}.json", asdict(annotation))


def load(folder: Path, names: dict[str, list[str]]) -> list[Annotation]:
    """Read and validate every annotation of `folder`, in the order of the episodes."""
    annotations = []
    for path in sorted(folder.glob("*.json")):
        values = read_json(path)
        for head in ("sparse", "dense"):
            values[head] = None if values[head] is None else tuple(Segment(**segment) for segment in values[head])
        annotations.append(Annotation(**values))
        validate(annotations[-1], names)
    return annotations


def columns(annotations: list[Annotation], dataset: Dataset, heads: tuple[str, ...]) -> dict[str, list]:
    """LeRobot's episode columns, one value an episode of the whole dataset (None where it is not annotated)."""
    by_episode = {annotation.episode: annotation for annotation in annotations}
    table: dict[str, list] = {}
    for head in heads:
        # Readers of older datasets look for the sparse columns without prefix.
        for prefix in (f"{head}_", "") if head == "sparse" else (f"{head}_",):
            for name in ("names", "start_times", "end_times", "start_frames", "end_frames"):
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
