"""How well two annotations agree: with another annotator, with the same one and another seed, with a person's marks, or, for
scoring only, with a truth.

Boundaries are compared where one subtask hands over to another: a boundary of the reference is matched to one of the
other annotation that leads into the same subtask, in order, so that the sum of the distances is least; what has no
partner within `TOLERANCE` seconds counts as missed (or extra) and as an error of that tolerance. A *retry* is a boundary
that leads back to an earlier subtask.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sarm_lib.annotations import BY_HAND, ENOUGH, HEADS, SINGLE_STAGE, Annotation, Finding, Segment, unlikely
from sarm_lib.dataset import Dataset, DatasetError

TOLERANCE = 0.5  # seconds
WITHIN = 0.1  # seconds: a boundary is where an annotator says
SURE = (0.9, 0.99)  # confidences that part the rows of `reliability`
FLICKER = 0.15  # seconds; a truth that is read off thresholds flickers: shorter runs belong to the run before them
# What counts as a retry hangs on it, so figures of retries are given for all of these. Longer ones would take subtasks for
# flicker (the demo's lift lasts 0.175 s), and with them retries whatever the step back lasts: for that see `by_length`.
FLICKERS = (0.0, 0.1, 0.125, FLICKER)
LASTING = (0.0, 0.2, 0.25, 0.375, 0.5, 1.0)  # seconds that a step back lasts at least: rows of `by_length`

SCORED = {"val": ("val",), "test": ("test",), "val and test": ("val", "test")}  # splits that a truth is compared with

UNLIKELY = 2.0  # times the usual duration of a subtask: worth a look, see `annotations.unlikely`
NOTABLE = 0.05  # share of an episode's frames: less is a matter of boundaries
OTHERS = 0.1  # what another opinion or a doubt counts in `suspicion`, beside an annotator's own doubts
# Columns of `summary`; one table would be too wide.
ABOUT_FRAMES = ["episodes", "missing", "frame_agreement", "segment_iou"]
ABOUT_BOUNDARIES = ["boundary_error_frames", "boundary_error_seconds", "boundaries_missed", "boundaries_extra"]
ABOUT_BOUNDARIES += ["retries", "retry_recall", "retry_precision"]

Segments = tuple[Segment, ...]


@dataclass(frozen=True)
class Comparison:
    """One episode, one head: `frames` and `matched`, `missed`, `extra` boundaries, and the same of the retries.

    errors: (n,) frames between matched boundaries, the tolerance for a missed one.
    confusion: (K, K) frames, rows the reference.
    steps_back: the reference's retries: the subtask that was given up, the one gone back to, for how many frames, and whether it
    was found.
    """

    episode: int
    agreement: float  # of frames in [0, 1]
    iou: float  # mean over the reference's segments of the best overlap with one of the same subtask
    errors: tuple[float, ...]
    matched: int
    missed: int
    extra: int
    retries_matched: int
    retries_missed: int
    retries_extra: int
    confusion: np.ndarray
    steps_back: tuple[tuple[str, str, int, bool], ...]


def frame_labels(segments: Segments, names: list[str], length: int) -> np.ndarray:
    """Index of the subtask of every frame, (length,) int64; a gap belongs to the segment before it."""
    labels = np.full(length, names.index(segments[0].subtask), dtype=np.int64)
    for segment in segments:
        labels[segment.start :] = names.index(segment.subtask)
    return labels


def segments_of(labels: np.ndarray, names: list[str], shortest: int = 1) -> Segments:
    """Segments of a label a frame; runs shorter than `shortest` frames belong to the run before them, a first one to
    the run after it."""
    labels = np.asarray(labels).copy()
    for start, stop in _runs(labels)[1:]:
        if stop - start < shortest:
            labels[start:stop] = labels[start - 1]
    first = _runs(labels)[0][1]
    if first < min(shortest, len(labels)):
        labels[:first] = labels[first]
    return tuple(Segment(names[labels[start]], int(start), int(stop) - 1) for start, stop in _runs(labels))


def compare(
    reference: Segments, other: Segments, names: list[str], length: int, fps: float, episode: int = 0
) -> Comparison:
    """Compare two annotations of one episode and one head."""
    a, b = frame_labels(reference, names, length), frame_labels(other, names, length)
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (a, b), 1)
    limit = TOLERANCE * fps
    ours, theirs = _boundaries(reference, names), _boundaries(other, names)
    pairs = _match(ours, theirs, limit)
    retries = {x for x, _ in _match([x for x in ours if x[2]], [x for x in theirs if x[2]], limit)}
    steps_back = [
        (before.subtask, after.subtask, after.end - after.start + 1, x in retries)
        for (before, after), x in zip(itertools.pairwise(reference), ours, strict=True)
        if x[2]
    ]
    count, found = len(steps_back), len(retries)
    return Comparison(
        episode=episode,
        agreement=float((a == b).mean()),
        iou=float(np.mean([_best_overlap(s, other) for s in reference])),
        errors=tuple(float(abs(x[0] - y[0])) for x, y in pairs) + (limit,) * (len(ours) - len(pairs)),
        matched=len(pairs),
        missed=len(ours) - len(pairs),
        extra=len(theirs) - len(pairs),
        retries_matched=found,
        retries_missed=count - found,
        retries_extra=sum(x[2] for x in theirs) - found,
        confusion=confusion,
        steps_back=tuple(steps_back),
    )


def compare_all(
    references: Mapping[int, Segments], annotations: Iterable[Annotation], head: str, names: list[str], fps: float
) -> list[Comparison]:
    """Compare every annotation that has a reference (episode: segments), in the order of the episodes.

    References of episodes that have no annotation are not among them: `summary` counts these.
    """
    return [
        compare(references[a.episode], a.head(head), names, a.length, fps, a.episode)
        for a in annotations
        if a.episode in references and a.head(head)
    ]


def not_marked(annotations: Iterable[Annotation]) -> list[Annotation]:
    """Those that are no mark taken over as it is: a mark agrees with itself, which says nothing about an annotator."""
    return [annotation for annotation in annotations if annotation.annotator != "manual"]


def summary(comparisons: list[Comparison], fps: float, asked: int | None = None) -> dict[str, float | int | None]:
    """One row of figures over several episodes: frames pooled, boundaries pooled, retries pooled.

    asked: how many episodes have a reference; those that are not compared (rejected, never annotated) are `missing`.
    """
    missing = {} if asked is None else {"missing": asked - len(comparisons)}
    if not comparisons:
        return {"episodes": 0} | missing
    errors = np.concatenate([c.errors for c in comparisons])
    confusion = sum(c.confusion for c in comparisons)
    found = sum(c.retries_matched for c in comparisons)
    true = found + sum(c.retries_missed for c in comparisons)
    said = found + sum(c.retries_extra for c in comparisons)
    median = float(np.median(errors)) if len(errors) else 0.0
    return {
        "episodes": len(comparisons),
        **missing,
        "frame_agreement": round(float(np.trace(confusion) / confusion.sum()), 4),
        "segment_iou": round(float(np.mean([c.iou for c in comparisons])), 4),
        "boundary_error_frames": round(median, 2),
        "boundary_error_seconds": round(median / fps, 4),
        "boundary_error_p90_frames": round(float(np.quantile(errors, 0.9)) if len(errors) else 0.0, 2),
        "boundaries_missed": sum(c.missed for c in comparisons),
        "boundaries_extra": sum(c.extra for c in comparisons),
        "retries": true,
        "retry_recall": round(found / true, 4) if true else None,
        "retry_precision": round(found / said, 4) if said else None,
    }


def by_group(comparisons: list[Comparison], group_of: Mapping[int, str], fps: float) -> pd.DataFrame:
    """`summary` of every group of episodes, and of all."""
    groups = sorted({group_of[c.episode] for c in comparisons})
    rows = {g: summary([c for c in comparisons if group_of[c.episode] == g], fps) for g in groups}
    return pd.DataFrame(rows | {"all": summary(comparisons, fps)}).T


def by_step(comparisons: list[Comparison]) -> pd.DataFrame:
    """How many retries of each kind the reference has, `from` a subtask back `to` another, and how many were `found`."""
    steps = _steps_back(comparisons)
    counted = steps.astype({"found": bool}).groupby(["from", "to"], sort=False).found.agg(["size", "sum"])
    counted = counted.rename(columns={"size": "retries", "sum": "found"}).sort_values(
        "retries", ascending=False, kind="stable"
    )
    return counted.reset_index()


def by_length(comparisons: list[Comparison], fps: float) -> dict[str, dict[str, float | int | None]]:
    """How many retries the reference has whose step back lasts at least so long (`LASTING`, seconds), and the share that is found:
    a short one is easily missed, by an eye too."""
    steps, rows = _steps_back(comparisons), {}
    for least in LASTING:
        found = steps.found[steps.frames >= least * fps].astype(bool)
        rows[f"{least:g} s"] = {
            "retries": len(found),
            "retry_recall": round(float(found.mean()), 4) if len(found) else None,
        }
    return rows


def _steps_back(comparisons: list[Comparison]) -> pd.DataFrame:
    return pd.DataFrame([s for c in comparisons for s in c.steps_back], columns=["from", "to", "frames", "found"])


def truth(stage: np.ndarray, dataset: Dataset, names: list[str], flicker: float = FLICKER) -> dict[int, Segments]:
    """Segments of every episode from a simulator's stages (N,), indices into `names`. For scoring only.

    Raises DatasetError for another index.
    """
    values = stage.astype(np.int64)
    if values.min() < 0 or values.max() >= len(names):
        raise DatasetError(
            f"the simulator's stages go from {values.min()} to {values.max()}, the vocabulary has {len(names)} names: "
            "set base.truth_prefix to null, or name the simulator's stages"
        )
    shortest = max(1, round(flicker * dataset.fps))
    return {e.index: segments_of(values[e.rows], names, shortest) for e in dataset.episodes}


def by_flicker(
    stage: np.ndarray,
    dataset: Dataset,
    annotations: Iterable[Annotation],
    names: list[str],
    scored: Mapping[str, tuple[str, ...]] = SCORED,
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Retries found against a simulator's stages (N,), for every one of `FLICKERS`: by it, then by the splits `scored`."""
    figures, given = ("retries", "retry_recall", "retry_precision"), list(annotations)
    found: dict[str, dict] = {}
    for flicker in FLICKERS:
        segments = truth(stage, dataset, names, flicker)
        for name, splits in scored.items():
            reference = {e.index: segments[e.index] for e in dataset.episodes if e.split in splits}
            row = summary(compare_all(reference, given, "dense", names, dataset.fps), dataset.fps)
            found.setdefault(f"{flicker:g} s", {})[name] = {figure: row.get(figure) for figure in figures}
    return found


def trust(
    opinion: Iterable[Annotation], marks: Iterable[Annotation], vocabulary: dict[str, list[str]], fps: float
) -> dict[str, float]:
    """How much another opinion's word counts in `suspicion`, by head: max(0, 2a - 1) where it gives the share a of the
    frames of marked episodes the label that a person gave them; a half where nothing is marked.

    marks: of episodes that no annotator has learned from.
    """
    found, given = {}, not_marked(opinion)
    for head, names in vocabulary.items():
        references = {mark.episode: mark.head(head) for mark in marks if mark.head(head)}
        agreed = summary(compare_all(references, given, head, names, fps), fps).get("frame_agreement")
        found[head] = 0.5 if agreed is None else round(max(0.0, 2 * agreed - 1), 4)
    return found


def doubts(annotations: list[Annotation], vocabulary: dict[str, list[str]]) -> list[Finding]:
    """What is allowed and yet worth a look: durations of more than `UNLIKELY` times the usual (`annotations.unlikely`), gaps,
    subtasks that are passed over, and heads that contradict each other.

    Heads contradict each other where dense subtasks lie outside of the sparse one in which they lie in most frames of all
    annotations.
    """
    found = unlikely(annotations, vocabulary, UNLIKELY) + _disagreeing_heads(annotations, vocabulary)
    for head, names in vocabulary.items():
        for annotation in annotations:
            segments = annotation.head(head) or ()
            for before, after in itertools.pairwise((None, *segments)):
                if before and after.start > before.end + 1:
                    gap = f"{after.start - before.end - 1} frames after {before.subtask!r} belong to no segment"
                    found.append(Finding(annotation.episode, head, after.subtask, "gap", gap))
                first = names.index(before.subtask) + 1 if before else 0
                if missing := names[first : names.index(after.subtask)]:
                    where = f"right after {before.subtask!r}" if before else "at the beginning"
                    text = f"it stands {where}, without {', '.join(map(repr, missing))}"
                    found.append(Finding(annotation.episode, head, after.subtask, "skipped", text))
    return found


def too_few_to_judge(annotations: Iterable[Annotation], vocabulary: dict[str, list[str]]) -> list[str]:
    """Subtasks of which no duration is unlikely, as there are fewer than `ENOUGH` segments, and how many there are."""
    given, few = list(annotations), []
    for head, names in vocabulary.items():
        counts = Counter(s.subtask for annotation in given for s in annotation.head(head) or ())
        few += [
            f"{head} {name!r} ({counts[name]})" for name in names if names != [SINGLE_STAGE] and counts[name] < ENOUGH
        ]
    return few


def _disagreeing_heads(annotations: list[Annotation], vocabulary: dict[str, list[str]]) -> list[Finding]:
    if not set(HEADS) <= set(vocabulary):
        return []
    labels = {
        a.episode: [frame_labels(a.head(head), vocabulary[head], a.length) for head in HEADS]
        for a in annotations
        if a.sparse and a.dense
    }
    together = np.zeros([len(vocabulary[head]) for head in HEADS], dtype=np.int64)
    for sparse, dense in labels.values():
        np.add.at(together, (sparse, dense), 1)
    parent, found = together.argmax(0), []
    for episode, (sparse, dense) in labels.items():
        outside = parent[dense] != sparse
        if outside.mean() > NOTABLE:
            k = np.bincount(dense[outside]).argmax()
            text = f"{outside.sum()} frames lie outside of {vocabulary['sparse'][parent[k]]!r}, where it usually is"
            found.append(Finding(episode, "dense", vocabulary["dense"][k], "heads disagree", text))
    return found


def suspicion(
    annotations: list[Annotation],
    doubts: list[Finding],
    opinions: Mapping[str, list[Annotation]],
    vocabulary: dict[str, list[str]],
    trusted: Mapping[str, Mapping[str, float]],
    accepted: Collection[int] = (),
) -> pd.DataFrame:
    """Episodes by how much they need a look, worst first: `score` and `why`, indexed by episode.

    The score adds what speaks against an annotation. What its annotator itself is unsure of comes first: doubt about its
    least certain boundary, and the share of its frames that look like another subtask. What others say counts a tenth: the
    share of frames that one of the `opinions` (by name) labels otherwise times how far that is `trusted` (by name and
    head: `trust`), and half for each finding of `doubts`. What a person marked, corrected or `accepted` scores 0.
    """
    others = [(name, {a.episode: a for a in given}) for name, given in opinions.items()]
    rows: list[tuple[int, float, str]] = []
    for annotation in annotations:
        if annotation.annotator in BY_HAND or annotation.episode in accepted:
            rows.append((annotation.episode, 0.0, ""))
            continue
        why: list[tuple[float, str]] = []
        for head, values in (annotation.confidence or {}).items():
            if values and min(values) < 0.95:
                segment = annotation.head(head)[int(np.argmin(values))]
                why.append(
                    (
                        1 - min(values),
                        f"{head} {segment.subtask!r} from frame {segment.start}: confidence {min(values):.2f}",
                    )
                )
        for head, values in (annotation.doubt or {}).items():
            segments = annotation.head(head)
            frames = np.array(values) * [s.end - s.start + 1 for s in segments]
            share = float(frames.sum() / annotation.length)
            if share > NOTABLE:
                worst = segments[int(frames.argmax())]
                text = f"{head}: {share:.0%} of the frames look like another subtask, most of them in {worst.subtask!r}"
                why.append((share, f"{text} from frame {worst.start}"))
        for (name, given), (head, names) in itertools.product(others, vocabulary.items()):
            other = given.get(annotation.episode)
            if other and other.head(head) and annotation.head(head):
                labels = [frame_labels(a.head(head), names, annotation.length) for a in (annotation, other)]
                share = float((labels[0] != labels[1]).mean())
                if share > NOTABLE and trusted[name][head]:
                    text = f"{head}: {name} sees {share:.0%} of the frames otherwise"
                    why.append((OTHERS * trusted[name][head] * share, text))
        why += [
            (OTHERS / 2, f"{d.head} {d.subtask!r}, {d.rule}: {d.message}")
            for d in doubts
            if d.episode == annotation.episode
        ]
        score = sum(value for value, _ in why)
        rows.append((annotation.episode, round(score, 3), "; ".join(text for _, text in sorted(why, reverse=True))))
    table = pd.DataFrame(rows, columns=["episode", "score", "why"]).set_index("episode")
    return table.sort_values("score", ascending=False, kind="stable")


def confidences(
    references: Mapping[int, Segments], annotations: Iterable[Annotation], head: str, names: list[str], fps: float
) -> list[tuple[float, bool]]:
    """Of every boundary, the annotator's `confidence` in it and whether it is within `WITHIN` seconds of one of the reference
    that leads into the same subtask, of which it is the probability. Episodes without confidences are left out."""
    found: list[tuple[float, bool]] = []
    for annotation in annotations:
        if annotation.episode in references and (confidence := (annotation.confidence or {}).get(head)):
            true = _boundaries(references[annotation.episode], names)
            for segment, sure in zip(
                annotation.head(head)[1:], confidence[1:]
            ):  # the start of an episode is no boundary
                near = [b for b in true if b[1] == segment.subtask and abs(b[0] - segment.start) <= WITHIN * fps]
                found.append((sure, bool(near)))
    return found


def reliability(
    references: Mapping[int, Segments], annotations: Iterable[Annotation], head: str, names: list[str], fps: float
) -> dict[str, dict[str, float | int]]:
    """How often boundaries are right, by the annotator's confidence in them: see `confidences`."""
    found = confidences(references, annotations, head, names, fps)
    rows = {}
    limits = (0.0, *SURE, np.inf)
    for low, high in itertools.pairwise(limits):
        of = [(sure, near) for sure, near in found if low <= sure < high]
        if of:
            name = f"below {high:g}" if low == 0 else f"{low:g} or more" if high == np.inf else f"{low:g} to {high:g}"
            sure, near = np.mean(of, axis=0).round(4).tolist()
            rows[name] = {"boundaries": len(of), "mean_confidence": sure, "found": near}
    return rows


def found_early(score: pd.Series, wrong: pd.Series, share: float = 0.1) -> dict[str, float | int]:
    """Of the episodes of `wrong` (their wrong frames, by episode), that `share` which `score` finds most suspicious: how
    many `episodes` they are, of how many, and which share of all the wrong frames is theirs (`errors`)."""
    looked = max(1, round(share * len(wrong)))
    first = score.loc[wrong.index].sort_values(ascending=False, kind="stable").index[:looked]
    return {"episodes": looked, "of": len(wrong), "errors": round(float(wrong[first].sum() / max(wrong.sum(), 1)), 4)}


def confusion_table(comparisons: list[Comparison], names: list[str]) -> pd.DataFrame:
    """Share of the reference's frames (rows) that the other annotation gives to each subtask (columns)."""
    counts = sum((c.confusion for c in comparisons), np.zeros((len(names), len(names)), dtype=np.int64))
    return pd.DataFrame(counts / np.maximum(counts.sum(1, keepdims=True), 1), index=names, columns=names)


def _runs(labels: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(labels)) + 1
    return list(itertools.pairwise([0, *edges.tolist(), len(labels)]))


def _boundaries(segments: Segments, names: list[str]) -> list[tuple[int, str, bool]]:
    """(first frame, subtask that begins, whether that goes back) of every boundary but the episode's start."""
    order = {name: k for k, name in enumerate(names)}
    return [
        (after.start, after.subtask, order[after.subtask] <= order[before.subtask])
        for before, after in itertools.pairwise(segments)
    ]


def _match(ours: list, theirs: list, limit: float) -> list[tuple]:
    """Pairs in order that lead into the same subtask within `limit` frames: as many as possible, then the nearest."""
    n, m = len(ours), len(theirs)
    best = np.zeros((n + 1, m + 1))
    for i, j in itertools.product(range(n), range(m)):
        gap = abs(ours[i][0] - theirs[j][0])
        pair = best[i, j] + 1 - gap / (limit * (n + m + 1)) if ours[i][1] == theirs[j][1] and gap <= limit else -1.0
        best[i + 1, j + 1] = max(best[i, j + 1], best[i + 1, j], pair)
    pairs, i, j = [], n, m
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            pairs.append((ours[i - 1], theirs[j - 1]))
            i, j = i - 1, j - 1
    return pairs[::-1]


def _best_overlap(segment: Segment, others: Segments) -> float:
    """Intersection over union with the best segment of the same subtask, 0 where there is none."""
    best = 0.0
    for other in others:
        if other.subtask == segment.subtask:
            inside = min(segment.end, other.end) - max(segment.start, other.start) + 1
            outside = max(segment.end, other.end) - min(segment.start, other.start) + 1
            best = max(best, inside / outside)
    return max(best, 0.0)
