"""Annotators: how annotations come to be. `params.annotate.annotator` names one; all answer the same question.

    keyframes   boundaries from the robot's own signals, no model
    propagate   a person's marks of a few episodes, carried to all others
    vlm         a local vision-language model
    server      the same question to any OpenAI-compatible server
    dataset     labels that the dataset already carries
    manual      the marked episodes, nothing else

`run` saves each episode as soon as it is finished, so that a killed run goes on where it was. Its folder has

    000003.json          an episode's annotation
    failed/000003.json   why it could not be annotated, with what was asked and answered; it is asked again
    again/000003.json    of a run with `skip_existing: false` that is not finished; in the end they replace the older ones
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

from sarm_lib import annotations, corrections
from sarm_lib.agreement import not_marked
from sarm_lib.annotations import Annotation, AnnotationError
from sarm_lib.artifacts import digest, remove, staged, write_json
from sarm_lib.dataset import SPLITS, Dataset, Episode
from sarm_lib.live import bar

log = logging.getLogger("sarm")
AGAIN = "again"  # the folder of a run that asks everything anew


@dataclass(frozen=True)
class Failure:
    """An episode that could not be annotated, and why. provenance: what was asked and answered, JSON values."""

    episode: int
    reason: str
    provenance: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


class Annotator(Protocol):
    """identity: JSON values that, with dataset and vocabulary, decide the answers; they name the folder of unfinished work.

    One whose answers depend on nothing of the dataset but the episode also has `fits(annotation, episode)`, which says whether
    an answer that was given of another dataset is about that episode: then the answers outlive the dataset's growth.
    """

    identity: dict[str, Any]

    def annotate(self, episodes: Sequence[Episode]) -> Iterator[Annotation | Failure]:
        """Yield one result an episode, each as soon as it is there, in any order."""
        ...


def from_params(params, dataset: Dataset, *, name: str | None = None, seed: int | None = None) -> Annotator:
    """The annotator that `params.annotate` names (or `name`). Raises AnnotationError for what it needs and does not have."""
    annotations.video_key(params, dataset)  # people look at it too: a wrong name is told here, not in the next chapter
    name = name or params.annotate.annotator
    make = partial(_from_params, params, dataset, name, seed)
    if not params.annotate.visualize_only or params.base.annotation_mode == "single_stage":
        return make()
    return Existing(Opinion(name, make), _last(params, "annotations"))


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
    local = params.paths.resolve(options.model)  # a folder, else a Hub id or the name that a server knows
    model = str(local) if name == "vlm" and local.is_dir() else options.model
    asked = {
        "video_key": annotations.video_key(params, dataset),
        "model": model,
        "seed": seed,
        "frames_per_second": options.frames_per_second,
        "max_frames": options.max_frames,
        "resolution": options.time_resolution,
        "temperature": options.temperature,
        "max_attempts": options.max_attempts,
    }
    if name == "server":
        from sarm_lib.annotators.server import ServerAnnotator

        return ServerAnnotator(
            dataset,
            names,
            url=options.server_url,
            in_flight=options.requests_in_flight,
            timeout=options.server_timeout,
            use_grammar=options.server_grammar,
            **asked,
        )
    from sarm_lib.annotators.vlm import VlmAnnotator
    from sarm_lib.dataset import pick_device

    device = pick_device(params.base.device)
    parallel = {"batch_size": options.batch_size, "num_workers": options.num_workers, "device": device}
    return VlmAnnotator(dataset, names, **parallel, **asked)


def opinions_from_params(params, dataset: Dataset) -> dict[str, Annotator]:
    """Who annotates beside `from_params`, by name: `annotate.second_opinion` (`keyframes`), and the annotator itself
    with `annotate.repeats` other seeds (`propagate-seed-1`) where another seed gives other answers.

    Where one lacks what it needs, every episode is its failure: the pipeline can do without it.
    """
    options = params.annotate
    if params.base.annotation_mode == "single_stage":
        return {}
    asked = {options.second_opinion: (options.second_opinion, None)} if options.second_opinion else {}
    for i in range(options.repeats if options.seed_matters else 0):
        seed = params.base.seed + 1 + i
        asked[f"{options.annotator}-seed-{seed}"] = options.annotator, seed
    made = {
        name: Opinion(who, partial(_from_params, params, dataset, who, seed)) for name, (who, seed) in asked.items()
    }
    if not options.visualize_only:
        return made
    folder = _last(params, "opinions")
    return {name: Existing(other, folder / name) for name, other in made.items()}


def _last(params, name: str) -> Path:
    """What the stage left last; a folder that is not there where it has not run yet."""
    try:
        return params.paths.read(name, "01_annotate")
    except FileNotFoundError:
        return params.paths.write(name)


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

    def estimate(self, episodes: Sequence[Episode]) -> str:
        """Of how many of them there is a mark."""
        return (
            f"{sum(e.index in self.marks for e in episodes)} of these are marked, the others stay without an annotation"
        )

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
    marks: Sequence[Annotation] = (),
    allow_failed: bool = False,
) -> tuple[list[Annotation], list[Failure]]:
    """Annotate `episodes` (all, by default); each result is saved in `work` at once, under the hash of what decides it.

    With `skip_existing` episodes that an earlier, perhaps killed, run finished are not asked again; without, only those
    that a killed run of this kind finished. An annotation that breaks a rule of the gate is a failure, never stored.
    marks: where an episode fails, its mark is its annotation; the file of the failure stays. allow_failed: a run with failures
    has come to its end too.
    """
    episodes = list(dataset.episodes if episodes is None else episodes)
    folder = _folder(annotator, dataset, vocabulary, work)
    answers = _answers(annotator, folder, skip_existing)
    done, unreadable = _stored(answers, vocabulary, dataset)
    if isinstance(annotator, Existing):
        return annotator.show(episodes, done, vocabulary, dataset)
    for reason in unreadable:
        log.warning("%s\nThe annotator is asked about it again.", reason)
    known = _elsewhere(annotator, answers, vocabulary, [e for e in episodes if e.index not in done])
    for annotation in known.values():
        annotations.save_one(answers, annotation, vocabulary)
    done |= known
    todo = [episode for episode in episodes if episode.index not in done]
    lengths = {episode.index: episode.length for episode in dataset.episodes}
    failures: dict[int, Failure] = {}
    asked = bar(total=len(todo), desc=annotator.identity["annotator"], unit="episode")
    for number, result in enumerate(annotator.annotate(todo) if todo else ()):
        if number == 0:
            asked.unpause()  # who has to load or learn something first is not slow for the rest
        result = _through_the_gate(result, vocabulary, lengths[result.episode])
        failed = folder / "failed" / annotations.file_name(result.episode)
        if isinstance(result, Annotation):
            annotations.save_one(answers, result, vocabulary)
            remove(failed)
            done[result.episode] = result
        else:
            if result.reason not in {failure.reason for failure in failures.values()}:  # the same is said once
                log.warning("episode %d is not annotated: %s", result.episode, result.reason)
            write_json(failed, asdict(result))
            failures[result.episode] = result
        asked.update()
    asked.close()
    if answers != folder:
        for path in answers.glob("*.json"):
            with staged(folder / path.name) as copy:
                shutil.copyfile(path, copy)
    for mark in marks:
        if failures.pop(mark.episode, None):
            done[mark.episode] = mark
    if answers != folder and (allow_failed or not failures):  # else the next run asks about the failed ones alone
        remove(answers)
    wanted = {episode.index for episode in episodes}
    return [done[i] for i in sorted(done) if i in wanted], [failures[i] for i in sorted(failures)]


def waiting(
    annotator: Annotator,
    dataset: Dataset,
    vocabulary: dict[str, list[str]],
    work: Path,
    *,
    episodes: Sequence[Episode] | None = None,
    skip_existing: bool = True,
) -> list[Episode]:
    """Episodes about which `run` would ask the annotator."""
    if isinstance(annotator, Existing):
        return []
    answers = _answers(annotator, _folder(annotator, dataset, vocabulary, work), skip_existing)
    done, _ = _stored(answers, vocabulary, dataset)
    left = [e for e in (dataset.episodes if episodes is None else episodes) if e.index not in done]
    known = _elsewhere(annotator, answers, vocabulary, left)
    return [episode for episode in left if episode.index not in known]


def _folder(annotator: Annotator, dataset: Dataset, vocabulary: dict[str, list[str]], work: Path) -> Path:
    return work / f"{digest(annotator.identity, vocabulary)}-{dataset.fingerprint}"


def _elsewhere(
    annotator: Annotator, answers: Path, vocabulary: dict[str, list[str]], episodes: Sequence[Episode]
) -> dict[int, Annotation]:
    """Answers to these questions about `episodes` in the folders of other datasets, such as this one before it has grown."""
    fits = getattr(annotator.annotator if isinstance(annotator, Opinion) else annotator, "fits", None)
    found: dict[int, Annotation] = {}
    if fits is None or answers.name == AGAIN:
        return found
    for folder in sorted(answers.parent.glob(f"{answers.name.partition('-')[0]}-*")):
        for episode in episodes:
            path = folder / annotations.file_name(episode.index)
            with suppress(AnnotationError):  # of an episode of another length, say
                if episode.index not in found and path.exists():
                    annotation = annotations.load_one(path, vocabulary, episode.length)
                    if fits(annotation, episode):
                        found[episode.index] = annotation
    return found


def _answers(annotator: Annotator, folder: Path, skip_existing: bool) -> Path:
    """Where the answers of a run are, and those of a killed one that it continues."""
    return folder if skip_existing or isinstance(annotator, Existing) else folder / AGAIN


def _stored(
    folder: Path, vocabulary: dict[str, list[str]], dataset: Dataset
) -> tuple[dict[int, Annotation], list[AnnotationError]]:
    """Answers of earlier runs, by episode, and what is wrong with those that cannot be read (any more)."""
    found, unreadable = {}, []
    for episode in dataset.episodes:
        path = folder / annotations.file_name(episode.index)
        try:
            if path.exists():
                found[episode.index] = annotations.load_one(path, vocabulary, episode.length)
        except AnnotationError as error:
            unreadable.append(error)
    return found, unreadable


def _through_the_gate(
    result: Annotation | Failure, vocabulary: dict[str, list[str]], length: int
) -> Annotation | Failure:
    if isinstance(result, Annotation):
        try:
            annotations.validate(result, vocabulary, length)
        except AnnotationError as error:
            return Failure(result.episode, str(error), result.provenance)
    return result


def estimate(annotator: Annotator, episodes: Sequence[Episode]) -> str:
    """What annotating `episodes` will need, where the annotator can tell before it starts."""
    if isinstance(annotator, Existing):
        return "nothing is asked: annotate.visualize_only is set"
    if not episodes:
        return "nothing is left to annotate"
    return str(annotator.estimate(episodes)) if hasattr(annotator, "estimate") else "seconds, no GPU"


def annotated_splits(annotated: Sequence[Annotation], dataset: Dataset) -> str:
    """How many episodes of each split are annotated, and what one without any stops."""
    there, said = {annotation.episode for annotation in annotated}, []
    for name in SPLITS:
        episodes = {e.index for e in dataset.split(name)}
        lacking = (
            {"test": " (04 judges by these)"}.get(name, " (03 needs one)") if episodes and not there & episodes else ""
        )
        said.append(f"{len(there & episodes)} of {len(episodes)} {name}{lacking}")
    return f"annotated: {', '.join(said)}"


def require(failures: list[Failure], allowed: bool) -> None:
    """Raise AnnotationError with every failure and its reason, unless the parameters allow them."""
    if not failures or allowed:
        return
    by_reason: dict[str, list[int]] = {}
    for failure in failures:
        by_reason.setdefault(failure.reason, []).append(failure.episode)
    reasons = "\n".join(
        f"  episode{'s' * (len(which) > 1)} {', '.join(map(str, which))}: {reason}"
        for reason, which in by_reason.items()
    )
    raise AnnotationError(
        f"{len(failures)} episodes are not annotated:\n{reasons}\n"
        "What is annotated is kept. Mend the cause and run again; or mark these episodes in notebook 01: a mark stands in "
        "for an annotation that failed. A model that gave no valid answer is asked with further seeds where "
        "annotate.max_attempts is larger. To go on without them: annotate.allow_failed: true."
    )


def select(dataset: Dataset, wanted: list[int] | None) -> list[Episode]:
    """The guide's `episodes`: these, or all for None. Raises AnnotationError for one that is not there, and for none."""
    if wanted is None:
        return list(dataset.episodes)
    if not wanted:
        raise AnnotationError("annotate.episodes: names no episode; null means all")
    by_index = {episode.index: episode for episode in dataset.episodes}
    for index in wanted:
        if index not in by_index:
            raise AnnotationError(f"annotate.episodes: the dataset, as it is used here, has no episode {index}")
    return [by_index[index] for index in dict.fromkeys(wanted)]


def suggest(params, dataset: Dataset, count: int) -> list[int]:
    """Training episodes worth marking, the first one first; none in `single_stage`."""
    if params.base.annotation_mode == "single_stage":
        return []
    from sarm_lib.annotators import propagate
    from sarm_lib.encoder import open_embeddings

    return propagate.suggest(dataset, open_embeddings(params.paths.read("embeddings", "00_prepare"), dataset), count)


class Existing:
    """Stands for an annotator that must not be asked. It shows what that has annotated with these settings, if that is all of
    what is wanted; else what the stage left last in `folder`, whoever made that."""

    def __init__(self, annotator: Annotator, folder: Path) -> None:
        self.identity, self.folder = annotator.identity, folder

    def show(
        self,
        episodes: Sequence[Episode],
        done: dict[int, Annotation],
        vocabulary: dict[str, list[str]],
        dataset: Dataset,
    ) -> tuple[list[Annotation], list[Failure]]:
        """What there is of `episodes`, and which are missing. done: made with these settings."""
        unfit: set[int] = set()
        if any(episode.index not in done for episode in episodes):
            done, unreadable = _stored(self.folder, vocabulary, dataset)
            unfit = {e.index for e in episodes if e.index not in done and self._path(e).exists()}
            if unreadable:
                log.warning("%s", str(unreadable[0]).splitlines()[0])
        said = "annotate.visualize_only is set, and the last result "
        reasons = {True: f"{said}cannot be read with these subtasks in this mode", False: f"{said}does not have it"}
        failures = [Failure(e.index, reasons[e.index in unfit]) for e in episodes if e.index not in done]
        return [done[i] for i in sorted(e.index for e in episodes if e.index in done)], failures

    def _path(self, episode: Episode) -> Path:
        return self.folder / annotations.file_name(episode.index)


def made_by(annotator: Annotator, annotated: Sequence[Annotation]) -> str:
    """Whose annotations these are: the annotator's, but for `Existing`, which shows what anybody made."""
    makers = sorted({annotation.annotator for annotation in not_marked(annotated)})
    shows = isinstance(annotator, Existing) and makers
    return " and ".join(makers) if shows else annotator.identity["annotator"]


class Opinion:
    """Stands for an annotator that the pipeline can do without: where it raises whatever it may, what it has not annotated by
    then fails for that reason."""

    def __init__(self, name: str, make: Callable[[], Annotator]) -> None:
        self.identity, self.annotator, self.refusal = {"annotator": name}, None, None
        try:
            self.annotator = make()
            self.identity = self.annotator.identity
        except Exception as error:
            self.refusal = _reason(error)

    def annotate(self, episodes: Sequence[Episode]) -> Iterator[Annotation | Failure]:
        missing, reason = {episode.index for episode in episodes}, self.refusal
        try:
            for result in self.annotator.annotate(episodes) if self.annotator else ():
                missing.discard(result.episode)
                yield result
        except Exception as error:
            reason = _reason(error)
        if reason:
            yield from (Failure(index, reason) for index in sorted(missing))

    def estimate(self, episodes: Sequence[Episode]) -> str:
        try:
            return f"nothing: {self.refusal}" if self.refusal else estimate(self.annotator, episodes)
        except Exception as error:
            return f"nothing: {_reason(error)}"


def _reason(error: Exception) -> str:
    if not isinstance(error, AnnotationError):
        log.debug("an opinion failed", exc_info=error)
    return str(error) if isinstance(error, AnnotationError) else f"{type(error).__name__}: {error}"
