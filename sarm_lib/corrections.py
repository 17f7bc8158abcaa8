"""What a person says about an episode, in files that belong into git: marks (`marks.yaml`) and corrections
(`corrections.yaml`). docs/annotations.md has their schemas and an example of each.

Marks are annotations made by hand, from which `propagate` and `manual` start. A correction is a verdict on an
annotation that an annotator made: *accept* it as it is, *fix* it (the segments as they should be), or *reject* the
episode, which takes it out of training. Raw annotations are never changed; `apply` puts the verdicts on top.

Both files name the dataset that they are about by its fingerprint; those of another dataset are refused. Written files
keep the comments that people made in them.
"""

import datetime
import getpass
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sarm_lib.annotations import SINGLE_STAGE, Annotation, AnnotationError, Segment, validate, vocabulary
from sarm_lib.artifacts import staged
from sarm_lib.dataset import Dataset, fingerprint

HEADS = ("sparse", "dense")
Verdict = Literal["accept", "fix", "reject"]
Segments = tuple[Segment, ...]


@dataclass(frozen=True)
class Correction:
    """A person's verdict on one episode.

    segments: what a *fix* says, by head; heads that it does not name stay as they were annotated.
    was: the annotation that the person saw, by head. who, when (ISO 8601), why: for those who read the file later.
    """

    episode: int
    verdict: Verdict
    segments: dict[str, Segments]
    was: dict[str, Segments]
    who: str = ""
    when: str = ""
    why: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a correction: `accepted`, `fixed` or `rejected`; `outdated` where the annotation has changed since
    it was accepted; `unfit` where the fix is no valid annotation of that episode (any more)."""

    episode: int
    verdict: Verdict
    outcome: Literal["accepted", "fixed", "rejected", "outdated", "unfit"]
    note: str


@dataclass(frozen=True)
class Reviewed:
    """Annotations with the corrections applied, without the rejected episodes."""

    annotations: list[Annotation]
    rejected: list[int]
    outcomes: list[Outcome]


def of_now(
    annotation: Annotation, verdict: Verdict, segments: dict[str, Segments] | None = None, why: str = ""
) -> Correction:
    """A correction of `annotation` by whoever is logged in, now."""
    was = {head: annotation.head(head) for head in HEADS if annotation.head(head)}
    return Correction(annotation.episode, verdict, segments or {}, was, _who(), _now(), why)


def apply(
    annotations: list[Annotation], corrections: list[Correction], dataset: Dataset, vocabulary: dict[str, list[str]]
) -> Reviewed:
    """Put every correction on its annotation; nothing is dropped without an outcome that says so.

    A fix is about the video, so it holds also where the annotation beneath has changed; an acceptance is about the
    annotation that was seen, so it is outdated then. An episode that nobody annotated can be fixed too.
    """
    by_episode = {a.episode: a for a in annotations}
    lengths = {e.index: e.length for e in dataset.episodes}
    rejected, outcomes = [], []
    for correction in corrections:
        episode, current = correction.episode, by_episode.get(correction.episode)
        changed = current is None or any(current.head(head) != was for head, was in correction.was.items())
        if episode not in lengths:
            outcome, note = "unfit", "the dataset, as it is used here, has no such episode"
        elif correction.verdict == "reject":
            by_episode.pop(episode, None)
            rejected.append(episode)
            outcome, note = "rejected", correction.why
        elif correction.verdict == "accept":
            outcome = "outdated" if changed else "accepted"
            note = "the annotation is no longer the one that was accepted: look again" if changed else correction.why
        else:
            base = current or Annotation(episode, lengths[episode], "manual", None, None)
            heads = {head: correction.segments.get(head, base.head(head)) for head in HEADS}
            heads |= _whole(vocabulary, lengths[episode])
            fixed = Annotation(episode, lengths[episode], "corrected", **heads, provenance={"corrects": base.annotator})
            try:
                validate(fixed, vocabulary)
            except AnnotationError as error:
                outcome, note = "unfit", str(error)
            else:
                by_episode[episode] = fixed
                outcome = "fixed"
                note = "the annotation beneath has changed since" if changed else correction.why
        outcomes.append(Outcome(episode, correction.verdict, outcome, note))
    return Reviewed([by_episode[i] for i in sorted(by_episode)], sorted(rejected), outcomes)


# --- files ----------------------------------------------------------------------------------------------------------


def read_corrections(path: Path, dataset: Dataset) -> list[Correction]:
    """The corrections of `path`, or none where there is no file. Raises AnnotationError with what cannot be read."""
    found = []
    for where, entry in _entries(path, "corrections", dataset):
        verdict = entry.get("verdict")
        if verdict not in ("accept", "fix", "reject"):
            raise AnnotationError(f"{where}: verdict is accept, fix or reject, not {verdict!r}")
        segments = _segments(where, entry)
        if (verdict == "fix") != bool(segments):
            raise AnnotationError(f"{where}: a fix, and only a fix, has segments under sparse: or dense:")
        was = _segments(f"{where}, was", entry.get("was") or {})
        found.append(Correction(entry["episode"], verdict, segments, was, *_signed(entry)))
    return found


def read_marks(path: Path, dataset: Dataset, vocabulary: dict[str, list[str]]) -> list[Annotation]:
    """The marked episodes of `path` as valid annotations, or none where there is no file. Raises AnnotationError."""
    found = []
    lengths = {episode: int(length) for episode, length in enumerate(dataset.table.length)}
    for where, entry in _entries(path, "marks", dataset):
        episode = entry["episode"]
        if episode not in lengths:
            raise AnnotationError(f"{where}: the dataset has {len(lengths)} episodes")
        heads = {"sparse": None, "dense": None} | _segments(where, entry)
        heads |= _whole(vocabulary, lengths[episode])
        who, when, why = _signed(entry)
        signed = {"who": who, "when": when, "why": why}
        mark = Annotation(episode, lengths[episode], "manual", **heads, provenance=signed)
        try:
            validate(mark, vocabulary)
        except AnnotationError as error:
            raise AnnotationError(f"{path.name}: {error}") from None
        found.append(mark)
    return found


def contents(path: Path) -> Any:
    """What a file says, comments aside, as JSON values; None where there is no file."""
    return json.loads(json.dumps(_yaml(path), default=str)) if path.exists() else None


def marked_episodes(path: Path, dataset: Dataset) -> list[int]:
    """Episodes that `path` marks."""
    return [entry["episode"] for _, entry in _entries(path, "marks", dataset)]


def marks_from_params(params, dataset: Dataset) -> list[Annotation]:
    """The marks that `annotate.marks` names; none in `single_stage`, which asks nobody."""
    if params.base.annotation_mode == "single_stage":
        return []
    return read_marks(params.paths.resolve(params.annotate.marks), dataset, vocabulary(params))


def record_correction(path: Path, dataset: Dataset, correction: Correction) -> None:
    """Write a correction into `path`, in place of an earlier one of that episode. Raises AnnotationError where the file
    cannot be read, and leaves it as it is."""
    read_corrections(path, dataset)
    entry: dict[str, Any] = {"episode": correction.episode, "verdict": correction.verdict}
    entry |= {head: _rows(segments) for head, segments in correction.segments.items()}
    entry["was"] = {head: _rows(segments) for head, segments in correction.was.items()}
    _record(path, "corrections", dataset, entry | _signature(correction.who, correction.when, correction.why))


def record_mark(path: Path, dataset: Dataset, mark: Annotation, why: str = "") -> None:
    """Write a marked episode into `path`, in place of an earlier mark of that episode. Raises AnnotationError where the
    file cannot be read, and leaves it as it is."""
    for where, entry in _entries(path, "marks", dataset):
        _segments(where, entry)
    entry = {"episode": mark.episode} | {h: _rows(mark.head(h)) for h in HEADS if mark.head(h)}
    _record(path, "marks", dataset, entry | _signature(_who(), _now(), why))


def withdraw(path: Path, kind: Literal["marks", "corrections"], dataset: Dataset, episode: int) -> None:
    """Take the entry of an episode out of the file."""
    _write(path, kind, dataset, lambda entries: [e for e in entries if e["episode"] != episode])


def _entries(path: Path, kind: str, dataset: Dataset) -> list[tuple[str, dict]]:
    """(where, entry) of every entry of a file that is about this dataset; an episode stands there once."""
    if not path.exists():
        return []
    content = _yaml(path)
    if not isinstance(content, dict) or set(content) != {"dataset", kind} or not isinstance(content[kind], list | None):
        raise AnnotationError(f"{path.name}: needs `dataset:` and a list under `{kind}:` (docs/annotations.md)")
    name = fingerprint(dataset.root)
    if str(content["dataset"]) != name:
        raise AnnotationError(
            f"{path.name} is about another dataset ({content['dataset']}, this one is {name}): name another file in "
            "params.yaml, or, if it is the same recording, put this fingerprint there"
        )
    found, seen = [], set()
    for number, entry in enumerate(content[kind] or [], start=1):
        episode = entry.get("episode") if isinstance(entry, dict) else None
        if type(episode) is not int:
            raise AnnotationError(f"{path.name}, entry {number}: needs an episode number")
        if episode in seen:
            raise AnnotationError(f"{path.name}: episode {episode} stands there twice; keep one entry")
        seen.add(episode)
        found.append((f"{path.name}, episode {episode}", entry))
    return found


def _segments(where: str, entry: Any) -> dict[str, Segments]:
    """Segments by head from rows `[subtask, start, end]`."""
    found = {}
    for head in HEADS:
        rows = entry.get(head) if isinstance(entry, dict) else None
        if rows is None:
            continue
        for row in rows if isinstance(rows, list) else [rows]:
            if not (isinstance(row, list) and len(row) == 3 and [type(v) for v in row[1:]] == [int, int]):
                raise AnnotationError(f"{where}, {head}: expected [subtask, first frame, last frame], found {row!r}")
        found[head] = tuple(Segment(str(name), start, end) for name, start, end in rows)
    return found


def _whole(vocabulary: dict[str, list[str]], length: int) -> dict[str, Segments]:
    """The heads of which nobody says anything: one stage from the first frame to the last."""
    return {h: (Segment(SINGLE_STAGE, 0, length - 1),) for h, names in vocabulary.items() if names == [SINGLE_STAGE]}


def _signed(entry: dict) -> tuple[str, str, str]:
    return tuple(str(entry.get(key) or "") for key in ("who", "when", "why"))


def _signature(who: str, when: str, why: str) -> dict[str, str]:
    return {key: value for key, value in (("who", who), ("when", when), ("why", why)) if value}


def _rows(segments: Segments) -> list[list]:
    return [[s.subtask, s.start, s.end] for s in segments]


def _record(path: Path, kind: str, dataset: Dataset, entry: dict) -> None:
    def put(entries: list) -> list:
        others = [e for e in entries if e["episode"] != entry["episode"]]
        return sorted([*others, entry], key=lambda e: e["episode"])

    _write(path, kind, dataset, put)


def _write(path: Path, kind: str, dataset: Dataset, change) -> None:
    yaml = _round_trip()
    content = yaml.load(path.read_text()) if path.exists() else {"dataset": fingerprint(dataset.root), kind: []}
    entries = content[kind] if content[kind] is not None else []
    kept = change(list(entries))
    if hasattr(entries, "ca"):  # ruamel's list: changed in place, so that its comments stay
        entries[:] = [_flow(e) for e in kept]
    else:
        content[kind] = [_flow(e) for e in kept]
    with staged(path) as partial, partial.open("w") as file:
        yaml.dump(content, file)


def _flow(entry: Any) -> Any:
    """Rows of segments on a line each."""
    from ruamel.yaml.comments import CommentedSeq

    if not isinstance(entry, dict):
        return entry
    for key, value in entry.items():
        if key in HEADS:
            for i, row in enumerate(value):
                value[i] = CommentedSeq(row)
                value[i].fa.set_flow_style()
        elif isinstance(value, dict):
            _flow(value)
    return entry


def _round_trip():
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _yaml(path: Path) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(io.StringIO(path.read_text()))
    except (YAMLError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path.name} is not YAML: {error}") from None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        return ""
