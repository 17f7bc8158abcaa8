"""Annotators: how annotations come to be. `params.annotate.annotator` names one; all answer the same question.

    keyframes   boundaries from the robot's own signals, no model
    propagate   a person's marks of a few episodes, carried to all others
    vlm         a local vision-language model
    server      the same question to any OpenAI-compatible server
    dataset     labels that the dataset already carries
    manual      the marked episodes, nothing else

`run` saves each episode as soon as it is finished, so that a killed run goes on where it was.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tqdm.auto import tqdm

from sarm_lib import annotations, corrections
from sarm_lib.annotations import Annotation, AnnotationError
from sarm_lib.artifacts import digest, remove
from sarm_lib.dataset import Dataset, Episode, fingerprint

log = logging.getLogger("sarm")


@dataclass(frozen=True)
class Failure:
    """An episode that could not be annotated, and why."""

    episode: int
    reason: str


class Annotator(Protocol):
    """identity: JSON values that, with dataset and vocabulary, decide the answers; they name the folder of unfinished work."""

    identity: dict[str, Any]

    def annotate(self, episodes: Sequence[Episode]) -> Iterator[Annotation | Failure]:
        """Yield one result an episode, each as soon as it is there, in any order."""
        ...


def from_params(params, dataset: Dataset, *, name: str | None = None, seed: int | None = None) -> Annotator:
    """The annotator that `params.annotate` names (or `name`). Raises AnnotationError for what it needs and does not have."""
    if params.annotate.visualize_only:
        return Existing(_from_params(params, dataset, name or params.annotate.annotator, seed))
    return _from_params(params, dataset, name or params.annotate.annotator, seed)


def _from_params(params, dataset: Dataset, name: str, seed: int | None) -> Annotator:
    options, names = params.annotate, annotations.vocabulary(params)
    seed = params.base.seed if seed is None else seed
    if params.base.annotation_mode == "single_stage":
        return SingleStage()
    if name == "keyframes":
        from sarm_lib.annotators.keyframes import KeyframeAnnotator

        return KeyframeAnnotator(dataset, names)
    if name == "dataset":
        from sarm_lib.annotators.recorded import RecordedAnnotator

        return RecordedAnnotator(dataset, names)
    if name in ("propagate", "manual"):
        marks = corrections.marks_from_params(params, dataset)
        if name == "manual":
            return Manual(marks)
        from sarm_lib.annotators.propagate import PropagateAnnotator
        from sarm_lib.encoder import open_embeddings

        embeddings = open_embeddings(params.paths.read("embeddings", "00_prepare"), dataset)
        return PropagateAnnotator(dataset, embeddings, marks, names, seed)
    asked = {
        "video_key": annotations.video_key(params, dataset),
        "model": options.model,
        "seed": seed,
        "frames_per_second": options.frames_per_second,
        "max_frames": options.max_frames,
        "resolution": options.time_resolution,
        "temperature": options.temperature,
        "max_attempts": options.max_attempts,
    }
    if name == "server":
        from sarm_lib.annotators.server import ServerAnnotator

        return ServerAnnotator(dataset, names, url=options.server_url, in_flight=options.requests_in_flight, **asked)
    from sarm_lib.annotators.vlm import VlmAnnotator
    from sarm_lib.dataset import pick_device

    device = pick_device(params.base.device)
    parallel = {"batch_size": options.batch_size, "num_workers": options.num_workers, "device": device}
    return VlmAnnotator(dataset, names, **parallel, **asked)


def second_from_params(params, dataset: Dataset) -> Annotator | None:
    """The annotator that `annotate.second_opinion` names, with another seed if it is the first one; None for none."""
    options = params.annotate
    if options.second_opinion is None or params.base.annotation_mode == "single_stage":
        return None
    other_seed = params.base.seed + 1 if options.second_opinion == options.annotator else None
    return from_params(params, dataset, name=options.second_opinion, seed=other_seed)


class SingleStage:
    """Each episode is one segment, "task": nothing is asked."""

    identity: ClassVar = {"annotator": "single_stage"}

    def annotate(self, episodes: Sequence[Episode]) -> Iterator[Annotation]:
        for episode in episodes:
            yield Annotation(episode.index, episode.length, "single_stage", annotations.whole_episode(episode), None)


class Manual:
    """The marked episodes and no others."""

    def __init__(self, marks: list[Annotation]) -> None:
        if not marks:
            raise AnnotationError("annotate.marks: no episode is marked yet; mark some in notebook 01, then run again")
        self.marks = {mark.episode: mark for mark in marks}
        self.identity = {"annotator": "manual", "marks": digest(list(map(str, marks)))}

    def annotate(self, episodes: Sequence[Episode]) -> Iterator[Annotation]:
        yield from (self.marks[e.index] for e in episodes if e.index in self.marks)


def run(
    annotator: Annotator,
    dataset: Dataset,
    vocabulary: dict[str, list[str]],
    work: Path,
    *,
    episodes: Sequence[Episode] | None = None,
    skip_existing: bool = True,
) -> tuple[list[Annotation], list[Failure]]:
    """Annotate `episodes` (all, by default); each result is saved in `work` at once, under the hash of what decides it.

    With `skip_existing` episodes that an earlier, perhaps killed, run finished are not asked again. An annotation that
    breaks a rule of the gate is a failure, never stored.
    """
    episodes = list(dataset.episodes if episodes is None else episodes)
    folder = work / digest(annotator.identity, vocabulary, fingerprint(dataset.root))
    if not skip_existing:
        remove(folder)
    lengths = {episode.index: episode.length for episode in dataset.episodes}
    done = {a.episode: a for a in annotations.load(folder, vocabulary, dataset)} if folder.exists() else {}
    failures: list[Failure] = []
    waiting = [episode for episode in episodes if episode.index not in done]
    bar = tqdm(total=len(waiting), desc=annotator.identity["annotator"], unit="episode", mininterval=5)
    for result in annotator.annotate(waiting) if waiting else ():
        if isinstance(result, Annotation):
            try:
                annotations.validate(result, vocabulary, lengths[result.episode])
            except AnnotationError as error:
                result = Failure(result.episode, str(error))
            else:
                annotations.save_one(folder, result, vocabulary)
                done[result.episode] = result
        if isinstance(result, Failure):
            log.warning("episode %d is not annotated: %s", result.episode, result.reason)
            failures.append(result)
        bar.update()
    bar.close()
    wanted = {episode.index for episode in episodes}
    return [done[i] for i in sorted(done) if i in wanted], failures


def estimate(annotator: Annotator, episodes: Sequence[Episode]) -> str:
    """What annotating will need, where the annotator can tell before it starts."""
    return str(annotator.estimate(episodes)) if hasattr(annotator, "estimate") else "seconds, no GPU"


def require(failures: list[Failure], allowed: bool) -> None:
    """Raise AnnotationError with every failure and its reason, unless the parameters allow them."""
    if failures and not allowed:
        reasons = "\n".join(f"  episode {f.episode}: {f.reason}" for f in failures)
        raise AnnotationError(
            f"{len(failures)} episodes are not annotated:\n{reasons}\n"
            "What is annotated is kept: run again, mark them by hand, or set annotate.allow_failed: true."
        )


def select(dataset: Dataset, wanted: list[int] | None) -> list[Episode]:
    """The guide's `episodes`: these, or all. Raises AnnotationError for one that is not there."""
    by_index = {episode.index: episode for episode in dataset.episodes}
    for index in wanted or ():
        if index not in by_index:
            raise AnnotationError(f"annotate.episodes: the dataset, as it is used here, has no episode {index}")
    return [by_index[i] for i in wanted] if wanted else list(dataset.episodes)


def suggest(params, dataset: Dataset, count: int) -> list[int]:
    """Training episodes worth marking, the first one first; none in `single_stage`."""
    if params.base.annotation_mode == "single_stage":
        return []
    from sarm_lib.annotators import propagate
    from sarm_lib.encoder import open_embeddings

    return propagate.suggest(dataset, open_embeddings(params.paths.read("embeddings", "00_prepare"), dataset), count)


class Existing:
    """Stands for an annotator that must not be asked: what it has not annotated yet is a failure."""

    def __init__(self, annotator: Annotator) -> None:
        self.identity = annotator.identity

    def annotate(self, episodes: Sequence[Episode]) -> Iterator[Failure]:
        for episode in episodes:
            yield Failure(episode.index, "not annotated yet, and annotate.visualize_only is set")
