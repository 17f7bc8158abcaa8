"""What a person says about an episode, in files that belong into git: marks (`marks.yaml`) and corrections
(`corrections.yaml`). docs/annotations.md has their schemas and an example of each.

Marks are annotations made by hand, from which `propagate` and `manual` start. A correction is a verdict on an
annotation that an annotator made: *accept* it as it is, *fix* it (the segments as they should be), or *reject* the
episode, which takes it out of training. Raw annotations are never changed; `apply` puts the verdicts on top.

Both files name the dataset that they are about by its fingerprint; those of another dataset are refused. Writing one
entry leaves every other line as it is, and the comments of people with them.
"""

import datetime
import getpass
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WithJsonSchema, model_validator

from sarm_lib.annotations import (
    HEADS,
    SINGLE_STAGE,
    STRICT,
    Annotation,
    AnnotationError,
    Finding,
    Segment,
    validate,
    violations,
    vocabulary,
)
from sarm_lib.artifacts import read_json, staged, write_json
from sarm_lib.dataset import Dataset

log = logging.getLogger(__name__)

Kind = Literal["marks", "corrections"]
Verdict = Literal["accept", "fix", "reject"]
Segments = tuple[Segment, ...]
NO_SUCH_EPISODE = "the dataset, as it is used here, has no such episode"
UNSETTLED = ("outdated", "unfit")  # outcomes that wait for a new look
SEEN_ALIKE = 0.05  # seconds: who looks at a video does not tell such boundaries apart, and another processor's rounding moves them


@dataclass(frozen=True)
class Correction:
    """A person's verdict on one episode.

    segments: what a *fix* says, by head; heads that it does not name stay as they were annotated. A *reject* keeps those of
    the fix before it, which holds again once the rejection is withdrawn.
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
    """What became of a correction: `accepted`, `fixed` or `rejected`; `outdated` where an annotation has changed since it was
    accepted, or left as it was by a fix of the other head; `unfit` where the fix is no valid annotation of that episode (any
    more)."""

    episode: int
    verdict: Verdict
    outcome: Literal["accepted", "fixed", "rejected", "outdated", "unfit"]
    note: str


@dataclass(frozen=True)
class Reviewed:
    """Annotations with the corrections applied, without the rejected episodes and those that the gate refuses."""

    annotations: list[Annotation]
    rejected: list[int]
    outcomes: list[Outcome]
    refused: tuple[Finding, ...] = ()  # they wait for a person's word

    @property
    def accepted(self) -> list[int]:
        return [o.episode for o in self.outcomes if o.outcome == "accepted"]

    @property
    def unsettled(self) -> list[Outcome]:
        """Corrections that say nothing any more, and wait for a new look."""
        return [o for o in self.outcomes if o.outcome in UNSETTLED]


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

    A fix is about the video, so it holds also where the annotation beneath has changed; an acceptance, as of a head that a
    fix does not name, is about the annotation that was seen, so it is outdated where a boundary lies more than `SEEN_ALIKE`
    seconds, and a frame, from where it was. An episode that nobody annotated can be fixed too.
    """
    frames = max(1, round(SEEN_ALIKE * dataset.fps))
    by_episode = {a.episode: a for a in annotations}
    lengths = {e.index: e.length for e in dataset.episodes}
    rejected, outcomes = [], []
    for correction in corrections:
        episode, current = correction.episode, by_episode.get(correction.episode)
        # What is said of a head that this annotation mode does not ask about waits for a mode that does.
        asked = asked_heads(vocabulary)
        changed = current is None or not all(
            _alike(current.head(head), was, frames) for head, was in correction.was.items() if head in asked
        )
        if episode not in lengths:
            outcome, note = "unfit", NO_SUCH_EPISODE
        elif correction.verdict == "reject":
            by_episode.pop(episode, None)
            rejected.append(episode)
            outcome, note = "rejected", correction.why
        elif correction.verdict == "accept":
            outcome, note = "accepted", correction.why
            if changed:
                outcome, note = "outdated", "the annotation is no longer the one that was accepted: look again"
            elif unsaid := [head for head in asked if head not in correction.was]:
                outcome = "outdated"
                note = f"does not say which {' and '.join(unsaid)} segments were accepted (`was:`): look again"
        else:
            base = current or Annotation(episode, lengths[episode], "manual", None, None)
            said = said_of(correction.segments, vocabulary)
            heads = {head: said.get(head, base.head(head)) for head in HEADS}
            heads |= _whole(vocabulary, lengths[episode])
            fixed = Annotation(episode, lengths[episode], "corrected", **heads, provenance={"corrects": base.annotator})
            try:
                validate(fixed, vocabulary)
                if asked and not said:
                    raise AnnotationError(f"says nothing of {' and '.join(asked)} segments, which this mode asks about")
            except AnnotationError as error:
                outcome, note = "unfit", str(error)
                if current is None and (missing := [head for head in asked if head not in said]):
                    note = f"nobody annotated this episode, so that its fix has to give {' and '.join(missing)} segments too"
                if any(f.rule == "vocabulary" and f.subtask for f in violations(fixed, vocabulary)):
                    note += "\nIf a subtask was renamed in params.yaml, rename it in this correction too."
            else:
                by_episode[episode] = fixed
                outcome, note = "fixed", correction.why
                unseen = [
                    head
                    for head, was in correction.was.items()
                    if head in asked and head not in said and not _alike(base.head(head), was, frames)
                ]
                if unseen:
                    outcome = "outdated"
                    note = f"what it fixes holds; the {' and '.join(unseen)} annotation is no longer the one that was seen: look again"
                elif changed and correction.was:
                    note = "the annotation beneath has changed since"
        outcomes.append(Outcome(episode, correction.verdict, outcome, note))
    return Reviewed([by_episode[i] for i in sorted(by_episode)], sorted(rejected), outcomes)


def tell(reviewed: Reviewed) -> None:
    """Say on the console which corrections are not used: a headless run ends well without them, and its page is read later."""
    if waiting := [str(outcome.episode) for outcome in reviewed.unsettled]:
        log.warning(
            "%d of %d corrections wait for a new look (episodes %s): what they say is not used, or not all of it. Notebook 02 says why",
            len(waiting),
            len(reviewed.outcomes),
            ", ".join(waiting),
        )


def unusable(correction: Correction, dataset: Dataset, vocabulary: dict[str, list[str]]) -> str:
    """What is wrong with a correction, whatever was annotated; empty where nothing is."""
    length = next((episode.length for episode in dataset.episodes if episode.index == correction.episode), None)
    if length is None:
        return NO_SUCH_EPISODE
    said = said_of(correction.segments, vocabulary)
    shown = Annotation(correction.episode, length, "corrected", **{head: said.get(head) for head in HEADS})
    return "; ".join(map(str, violations(shown, {head: vocabulary[head] for head in said})))


def refuse(reviewed: Reviewed, findings: Sequence[Finding]) -> Reviewed:
    """Without the episodes of `findings` that no person has marked, fixed or accepted as they are; a person's word stands
    above a rule of thumb. A fix of one head says nothing of the other where that has changed since (`outdated`)."""
    by_hand = {a.episode for a in reviewed.annotations if a.annotator == "manual"}
    by_hand |= {o.episode for o in reviewed.outcomes if o.outcome in ("accepted", "fixed")}
    refused = tuple(finding for finding in findings if finding.episode not in by_hand)
    out = {finding.episode for finding in refused}
    return replace(reviewed, annotations=[a for a in reviewed.annotations if a.episode not in out], refused=refused)


def asked_heads(vocabulary: dict[str, list[str]]) -> list[str]:
    """Heads that this annotation mode asks people about."""
    return [head for head, names in vocabulary.items() if names != [SINGLE_STAGE]]


def said_of(segments: dict[str, Segments], vocabulary: dict[str, list[str]]) -> dict[str, Segments]:
    """What somebody said of the heads that are asked about. One stage of a mode that did not ask is nobody's word."""
    return {
        head: segments[head]
        for head in asked_heads(vocabulary)
        if head in segments and (_names_subtasks(segments[head]) or SINGLE_STAGE in vocabulary[head])
    }


def _names_subtasks(segments: Segments) -> bool:
    return {s.subtask for s in segments} != {SINGLE_STAGE}


def _of_others(segments: dict[str, Segments], heads: Collection[str]) -> dict[str, Segments]:
    """What is said of other heads than these."""
    return {head: given for head, given in segments.items() if head not in heads and _names_subtasks(given)}


def _alike(segments: Segments | None, others: Segments, frames: int) -> bool:
    """Are they the same subtasks, with boundaries at most so many frames apart?"""
    if segments is None or [s.subtask for s in segments] != [s.subtask for s in others]:
        return False
    return all(abs(a.start - b.start) <= frames and abs(a.end - b.end) <= frames for a, b in zip(segments, others))


# --- what the files hold ----------------------------------------------------------------------------------------------


def _text(value: Any) -> Any:
    """YAML makes a date of 2026-11-22, a number of a fingerprint without letters, and nothing of an empty value."""
    value = "" if value is None else str(value) if isinstance(value, datetime.date | int | float) else value
    # Half an emoji cannot be written into an annotation that is read again.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _row(value: Any) -> Any:
    if not (isinstance(value, list) and len(value) == 3 and [type(v) for v in value] == [str, int, int]):
        raise ValueError(f"expected [subtask, first frame, last frame], found {value!r}")
    return tuple(value)


ROW = {  # the gate refuses negative frames itself, see `annotations.Index`
    "type": "array",
    "prefixItems": [{"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "integer", "minimum": 0}],
    "minItems": 3,
    "maxItems": 3,
}
Text = Annotated[str, BeforeValidator(_text)]
type Row = Annotated[tuple[str, int, int], BeforeValidator(_row), WithJsonSchema(ROW)]
type Rows = Annotated[list[Row], Field(min_length=1)]


class Heads(BaseModel):
    """Rows of subtask, first and last frame."""

    model_config = STRICT

    sparse: Rows | None = None
    dense: Rows | None = None

    @property
    def segments(self) -> dict[str, Segments]:
        rows = {"sparse": self.sparse, "dense": self.dense}
        return {head: tuple(Segment(*row) for row in given) for head, given in rows.items() if given is not None}


def _given(head: str) -> dict[str, Any]:
    return {"properties": {head: {"type": "array"}}, "required": [head]}


A_FIX_HAS_SEGMENTS = {
    "allOf": [
        {
            "if": {"properties": {"verdict": {"const": "fix"}}},
            "then": {"anyOf": [_given(head) for head in HEADS]},
        },
        {
            "if": {"properties": {"verdict": {"const": "accept"}}},
            "then": {"properties": {head: {"type": "null"} for head in HEADS}},
        },
    ]
}


class MarkEntry(Heads):
    """One episode that a person marked."""

    episode: Annotated[int, Field(ge=0)]
    who: Text = ""
    when: Text = ""
    why: Text = ""


class CorrectionEntry(MarkEntry):
    """A person's verdict on one episode. A fix has segments, a rejection may keep those of the fix before it, an acceptance has
    none; `was` is the annotation that was seen."""

    model_config = STRICT | {"json_schema_extra": A_FIX_HAS_SEGMENTS}

    verdict: Verdict
    was: Heads | None = None

    @model_validator(mode="after")
    def _fixes_have_segments(self) -> "CorrectionEntry":
        if self.verdict != "reject" and (self.verdict == "fix") != bool(self.segments):
            raise ValueError("a fix has segments under sparse: or dense:, an acceptance has none")
        return self


class MarksFile(BaseModel):
    model_config = STRICT

    dataset: Text  # its fingerprint
    marks: list[MarkEntry] | None


class CorrectionsFile(BaseModel):
    model_config = STRICT

    dataset: Text
    corrections: list[CorrectionEntry] | None


FORMS = {"marks": MarksFile, "corrections": CorrectionsFile}
KEYS = {"marks": "annotate.marks", "corrections": "verify.corrections"}  # where params.yaml names the files


def json_schema(kind: Kind) -> dict:
    """JSON schema of a file of marks or of corrections."""
    return FORMS[kind].model_json_schema()


# --- reading ------------------------------------------------------------------------------------------------------------


def read_corrections(path: Path, dataset: Dataset) -> list[Correction]:
    """The corrections of `path`, or none where there is no file. Raises AnnotationError with what cannot be read."""
    return [
        Correction(e.episode, e.verdict, e.segments, e.was.segments if e.was else {}, e.who, e.when, e.why)
        for e in _entries(path, "corrections", dataset)
    ]


def read_marks(path: Path, dataset: Dataset, vocabulary: dict[str, list[str]]) -> list[Annotation]:
    """The marked episodes of `path` as valid annotations, or none where there is no file. Raises AnnotationError.

    Marks that lack a head are `unfinished`, and left out (`marks_from_params` says so).
    """
    found, entries = [], _entries(path, "marks", dataset)
    lengths = {episode: int(length) for episode, length in enumerate(dataset.table.length)}
    _refuse_other_names(path, entries, vocabulary)
    lacking = _unfinished(entries, vocabulary)
    for entry in entries:
        if entry.episode in lacking:
            continue
        if entry.episode not in lengths:
            raise AnnotationError(f"{path.name}, episode {entry.episode}: the dataset has {len(lengths)} episodes")
        said = said_of(entry.segments, vocabulary)
        if not said and asked_heads(vocabulary):  # marked in another mode
            continue
        heads = {head: said.get(head) for head in HEADS} | _whole(vocabulary, lengths[entry.episode])
        signed = {"who": entry.who, "when": entry.when, "why": entry.why}
        mark = Annotation(entry.episode, lengths[entry.episode], "manual", **heads, provenance=signed)
        try:
            validate(mark, vocabulary)
        except AnnotationError as error:
            raise AnnotationError(f"{path.name}: {error}") from None
        found.append(mark)
    return found


def unfinished(path: Path, dataset: Dataset, vocabulary: dict[str, list[str]]) -> dict[int, dict[str, Segments]]:
    """What is marked of episodes of which some heads are and others are not, as after a change of `base.annotation_mode`:
    segments by head, by episode."""
    return _unfinished(_entries(path, "marks", dataset), vocabulary)


def _unfinished(entries: list[MarkEntry], vocabulary: dict[str, list[str]]) -> dict[int, dict[str, Segments]]:
    asked, said = (
        len(asked_heads(vocabulary)),
        {entry.episode: said_of(entry.segments, vocabulary) for entry in entries},
    )
    return {episode: heads for episode, heads in said.items() if 0 < len(heads) < asked}


def contents(path: Path) -> Any:
    """What a file says, comments aside, as JSON values; None where there is no file. Raises AnnotationError where it cannot be
    read."""
    if not path.exists():
        return None
    try:
        return json.loads(json.dumps(_yaml(path), default=str))
    except (TypeError, ValueError) as error:  # a date for a key, or a list that holds itself
        raise AnnotationError(f"{path.name} says what no file of ours can say: {error}") from None


def episodes_in(path: Path, kind: Kind, dataset: Dataset) -> list[int]:
    """Episodes of which `path` says something."""
    return [entry.episode for entry in _entries(path, kind, dataset)]


def write_rejected(path: Path, dataset: Dataset, reviewed: Reviewed) -> None:
    """`rejected.json`: which episodes a person rejected, for the stages that learn from the others."""
    write_json(path, {"dataset": dataset.fingerprint, "episodes": reviewed.rejected})


def without_rejected(dataset: Dataset, params) -> Dataset:
    """The dataset with the episodes that were rejected in notebook 02 in none of its splits, but as `rejected`: nothing is learned
    from them. As it is where 02 has not run, or on another dataset."""
    path = params.paths.find("rejected.json")
    found = read_json(path) if path else {}
    return dataset.without(found["episodes"] if found.get("dataset") == dataset.fingerprint else [])


def marks_from_params(params, dataset: Dataset) -> list[Annotation]:
    """The marks that `annotate.marks` names; none in `single_stage`, which asks nobody."""
    if params.base.annotation_mode == "single_stage":
        return []
    path, names = params.paths.resolve(params.annotate.marks), vocabulary(params)
    found, begun = read_marks(path, dataset, names), unfinished(path, dataset, names)
    for head in asked_heads(names):
        if without := [str(episode) for episode, said in begun.items() if head not in said]:
            text = "%s: nothing is marked for the %s head of episodes %s, which are left out until it is: open them in notebook 01"
            log.warning(text, path.name, head, ", ".join(without))
    return found


def is_about_another(path: Path, kind: Kind, named: str | None, fingerprint: str) -> str:
    """What to say of a file that names another dataset than the one with this fingerprint."""
    return (
        f"{path.name} is about another dataset ({named}, this one is {fingerprint}): name another file in params.yaml "
        f"({KEYS[kind]}), or, if it is the same recording with episodes added at its end, put this fingerprint there: "
        f"`dataset: {fingerprint}` in {path}"
    )


def _entries(path: Path, kind: Kind, dataset: Dataset) -> list:
    """The entries of a file that is about this dataset; an episode stands there once."""
    if not path.exists():
        return []
    if path.is_dir():
        raise AnnotationError(f"the file of {kind} is {path}, a folder: name a file")
    content = _yaml(path)
    if content is None:  # nothing, or comments alone
        return []
    try:
        file = FORMS[kind].model_validate(content)
    except ValidationError as error:
        raise AnnotationError(_explain(path, kind, content, error)) from None
    name = dataset.fingerprint
    if file.dataset != name:
        raise AnnotationError(is_about_another(path, kind, file.dataset, name))
    entries = getattr(file, kind) or []
    episodes = [entry.episode for entry in entries]
    for episode, times in Counter(episodes).items():
        if times > 1:
            raise AnnotationError(f"{path.name}: episode {episode} stands there twice; keep one entry")
    return entries


def _explain(path: Path, kind: Kind, content: Any, error: ValidationError) -> str:
    """The first thing that is wrong with a file: which episode, what, and what was expected."""
    first = error.errors()[0]
    if len(first["loc"]) == 1 and first["type"] == "extra_forbidden":
        return f"{path.name}: unknown key {first['loc'][0]!r} (docs/annotations.md has those that there are)"
    if len(first["loc"]) < 2:
        return f"{path.name}: needs `dataset:` and a list under `{kind}:` (docs/annotations.md)"
    _, number, *keys = first["loc"]
    entry = content[kind][number]
    episode = entry.get("episode") if isinstance(entry, dict) else None
    where = f"{path.name}, episode {episode}" if type(episode) is int else f"{path.name}, entry {number + 1}"
    place = ", ".join([where, *(key for key in keys if isinstance(key, str))])
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key (docs/annotations.md has those that there are)"
    if first["type"] == "value_error":
        return f"{place}: {first['ctx']['error']}"
    if first["type"] == "model_type":
        return f"{place}: expected keys and their values, found {first['input']!r}"
    return f"{place}: {first['msg'].lower()}" + ("" if first["type"] == "missing" else f", found {first['input']!r}")


def _refuse_other_names(path: Path, entries: list[MarkEntry], vocabulary: dict[str, list[str]]) -> None:
    """Raise AnnotationError with what to write where, if marks use names that `params.yaml` does not (any more)."""
    for head in asked_heads(vocabulary):
        names, users = vocabulary[head], {}
        for entry in entries:
            for segment in said_of(entry.segments, vocabulary).get(head, ()):
                users.setdefault(segment.subtask, []).append(entry.episode)
        unknown, unused = [n for n in users if n not in names], [n for n in names if n not in users]
        if unknown:
            old, episodes = unknown[0], ", ".join(map(str, dict.fromkeys(users[unknown[0]])))
            new = repr(unused[0]) if len(unknown) == len(unused) else f"one of {', '.join(map(repr, unused))}"
            raise AnnotationError(
                f"{path.name}, episode {users[old][0]}, {head}: {old!r} is none of annotate.{head}_subtasks ({', '.join(names)}). "
                + (
                    f"If it was renamed there, write {new} in place of {old!r} throughout {path.name} "
                    if unused
                    else "It stands there "
                )
                + f"({len(users[old])} times, episodes {episodes}). If it was dropped, split or joined with another, mark these episodes "
                "anew: take their entries out, or name another file in annotate.marks."
            )


def _whole(vocabulary: dict[str, list[str]], length: int) -> dict[str, Segments]:
    """The heads of which nobody says anything: one stage from the first frame to the last."""
    return {h: (Segment(SINGLE_STAGE, 0, length - 1),) for h, names in vocabulary.items() if names == [SINGLE_STAGE]}


@dataclass
class _Read:
    """What a text says, its nodes, which know where they stand in it, and where its entries stand, once that was asked. A text
    that was put together here has no nodes, as nobody has read it."""

    values: Any
    nodes: Any = None
    cut: "_Cut | None" = None


# The last texts, the latest last: who accepts one episode after another reads each time what was written the time before, and
# to read a thousand entries takes seconds.
_READ: dict[str, _Read] = {}


def _remember(text: str, read: _Read) -> None:
    _READ[text] = read
    if len(_READ) > 8:
        del _READ[next(iter(_READ))]


def _read(text: str) -> _Read:
    if text not in _READ:
        nodes, values = _parsed(text)
        _remember(text, _Read(values, nodes))
    return _READ[text]


def _parsed(text: str) -> tuple[Any, Any]:
    """A text's nodes, and what it says."""
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import SafeConstructor

    class KeepsTheNodes(SafeConstructor):
        def get_single_data(self) -> Any:
            self.nodes = self.composer.get_single_node()
            return None if self.nodes is None else self.construct_document(self.nodes)

    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = KeepsTheNodes
    values = yaml.load(io.StringIO(text))
    return yaml.constructor.nodes, values


def _yaml(path: Path) -> Any:
    try:
        return _read(path.read_text()).values
    except RecursionError:
        raise AnnotationError(f"{path.name} is not YAML of ours: it is nested too deeply") from None
    # ruamel makes dates and numbers of what it reads, and what it makes nothing of ends in any error: an empty !!int in an IndexError.
    except Exception as error:
        raise AnnotationError(f"{path.name} is not YAML that can be read: {error}") from None


# --- writing ------------------------------------------------------------------------------------------------------------


def record_correction(path: Path, dataset: Dataset, correction: Correction, heads: Collection[str] = HEADS) -> Verdict:
    """Write a correction into `path`, in place of an earlier one of that episode. Raises AnnotationError where the file
    cannot be read, and leaves it as it is.

    heads: those that the person was asked about. What the file says of others stays, so that an acceptance of these may be
    written as a fix that says both; a rejection keeps all that a fix said. Returns the verdict that was written.
    """
    said = {head: given for head, given in correction.segments.items() if head in heads}
    seen = {head: given for head, given in correction.was.items() if head in heads}
    before = _entry(path, "corrections", dataset, correction.episode)
    verdict = correction.verdict
    if before and verdict == "reject" and before.segments:
        said, seen = before.segments, before.was.segments if before.was else {}
    elif before and verdict != "reject" and (before.verdict != "reject" or before.segments):
        seen_before = _of_others(before.was.segments if before.was else {}, heads)
        kept = _of_others(before.segments, heads)
        if verdict == "fix" and before.verdict == "accept":
            kept = seen_before
        if kept:
            said, verdict = kept | (said if verdict == "fix" else seen), "fix"
        seen |= seen_before
    entry: dict[str, Any] = {"episode": correction.episode, "verdict": verdict}
    entry |= _rows(said) | ({"was": _rows(seen)} if seen else {})
    entry |= _signature(correction.who, correction.when, correction.why)
    _put(path, "corrections", dataset, correction.episode, entry)
    return verdict


def record_mark(path: Path, dataset: Dataset, mark: Annotation, why: str = "", heads: Collection[str] = HEADS) -> None:
    """Write a marked episode into `path`, in place of an earlier mark of that episode. Raises AnnotationError where the
    file cannot be read, and leaves it as it is. heads: those that the person was asked about; what the file says of others
    stays."""
    before = _entry(path, "marks", dataset, mark.episode)
    kept = _of_others(before.segments, heads) if before else {}
    rows = _rows(kept | {head: mark.head(head) for head in heads if mark.head(head)})
    _put(path, "marks", dataset, mark.episode, {"episode": mark.episode} | rows | _signature(_who(), _now(), why))


def withdraw(path: Path, kind: Kind, dataset: Dataset, episode: int, heads: Collection[str] = HEADS) -> bool:
    """Take what the file says of these heads of an episode out of it: the whole entry, unless it has segments of others; of
    a rejection, the rejection alone. Returns whether something of the episode stays."""
    before, entry = _entry(path, kind, dataset, episode), None
    rejected = kind == "corrections" and before and before.verdict == "reject"
    heads = () if rejected else heads  # a fix before it holds again
    if before and (kept := _of_others(before.segments, heads)):
        entry = {"episode": episode} | ({"verdict": "fix"} if kind == "corrections" else {}) | _rows(kept)
        if kind == "corrections" and before.was and (seen := _of_others(before.was.segments, heads)):
            entry["was"] = _rows(seen)
        # The rejection's reason is none for the fix, which whoever withdraws it says to be right.
        entry |= _signature(_who(), _now(), "") if rejected else _signature(before.who, before.when, before.why)
    _put(path, kind, dataset, episode, entry)
    return entry is not None


def _entry(path: Path, kind: Kind, dataset: Dataset, episode: int) -> Any:
    """What the file says of an episode, or None."""
    return next((entry for entry in _entries(path, kind, dataset) if entry.episode == episode), None)


def _signature(who: str, when: str, why: str) -> dict[str, str]:
    return {key: value for key, value in (("who", who), ("when", when), ("why", why)) if value}


def _rows(segments: dict[str, Segments]) -> dict[str, list]:
    """Rows of segments by head, a line each."""
    from ruamel.yaml.comments import CommentedSeq

    found = {head: [CommentedSeq([s.subtask, s.start, s.end]) for s in given] for head, given in segments.items()}
    for rows in found.values():
        for row in rows:
            row.fa.set_flow_style()
    return found


REFERRED = (
    "{name} stays as it was: with this change nobody could read it. Does this entry refer to another place of the file, or another "
    "entry to this one (& and *)? Write it out there, then save again"
)
REFERS = re.compile(r"(?:^|[\s\[{,:\"'\]}])[&*]\S", re.MULTILINE)  # in a quoted text too, which costs a moment
COMMENTS_BELOW = re.compile(r"(?:^[ \t]*(?:#[^\n]*)?\n)*\Z", re.MULTILINE)  # and empty lines


@dataclass
class _Piece:
    """Lines of a file: the comments above an entry, and the entry."""

    episode: int
    above: str
    lines: str


@dataclass
class _Cut:
    """A file's text: what stands before the entries, the entries, what stands behind them, and the column of their dashes."""

    begin: str
    pieces: list[_Piece]
    end: str
    column: int

    @property
    def text(self) -> str:
        return self.begin + "".join(piece.above + piece.lines for piece in self.pieces) + self.end


def _put(path: Path, kind: Kind, dataset: Dataset, episode: int, entry: dict | None) -> None:
    """Put `entry` in the place of that of `episode`, or take it out (None); all other lines stay as they are.

    Raises AnnotationError where that cannot be done, and leaves the file as it is. The text is cut at its entries: ruamel
    ties a comment to what stands before it, and would lose it with that.
    """
    from ruamel.yaml.error import YAMLError

    before = _entries(path, kind, dataset)
    text = path.read_text() if path.exists() else ""
    if not path.exists() or _yaml(path) is None:  # comments, if anything
        comments = [line for line in text.splitlines() if not line.strip() or line.lstrip().startswith("#")]
        text = "".join(f"{line}\n" for line in comments) + _dump({"dataset": dataset.fingerprint, kind: None})
    newline = "\r\n" if path.exists() and b"\r\n" in path.read_bytes() else "\n"
    text = text if text.endswith("\n") else f"{text}\n"
    episodes = [e.episode for e in before]
    cut = _cut(text, kind, episodes)
    base, cut = (text, cut) if cut else (None, _cut(_in_lines(text, kind), kind, episodes))
    cut = replace(cut, pieces=list(cut.pieces))
    if old := next((piece for piece in cut.pieces if piece.episode == episode), None):
        del cut.pieces[place := cut.pieces.index(old)]
    else:
        place = next((i for i, piece in enumerate(cut.pieces) if piece.episode > episode), len(cut.pieces))
    if entry is not None:
        try:
            new = _Piece(episode, old.above if old else "", _lines(entry, cut.column, old.lines if old else ""))
        except YAMLError as error:  # it refers to what stands elsewhere
            raise AnnotationError(REFERRED.format(name=path.name)) from error
        cut.pieces.insert(place, new)
        if base and len(cut.pieces) > 1 and not REFERS.search(f"{new.lines}\n{old.lines if old else ''}"):
            _remember_with(base, kind, cut, place, replaced=old is not None)
    elif old:
        cut.pieces.insert(place, replace(old, lines=""))  # the comments above it stay
    text = cut.text
    with staged(path.resolve()) as partial:  # a link may lead into another repository, and stays one
        partial.write_text(text, newline=newline)
        try:
            _entries(partial, kind, dataset)
        except AnnotationError as error:
            raise AnnotationError(REFERRED.format(name=path.name)) from error


def _remember_with(text: str, kind: Kind, cut: _Cut, place: int, replaced: bool) -> None:
    """Know what the text that is made of `text` with one more piece, or another one, says, without reading the others again:
    the piece is read beside one of them, between what stands before and behind all."""
    beside = 1 if place == 0 else 0
    few = replace(cut, pieces=[cut.pieces[i] for i in sorted((beside, place))])
    was, values = _read(text).values, dict(_read(text).values)
    neighbour = was[kind][beside - (beside > place) + (beside > place and replaced)]
    try:
        read = _parsed(few.text)[1]
    except Exception:  # whatever YAML chokes on (see `_yaml`), such as an entry that is referred to and not among these
        return
    if read | {kind: None} != values | {kind: None} or len(read[kind]) != 2 or read[kind][place < beside] != neighbour:
        return
    values[kind] = [*was[kind][:place], read[kind][place > beside], *was[kind][place + replaced :]]
    _remember(cut.text, _Read(values, cut=cut))


def _cut(text: str, kind: Kind, episodes: list[int]) -> _Cut | None:
    """A text cut at its entries, which are of these `episodes`; None where entries do not begin on lines of their own."""
    read = _read(text)
    read.cut = read.cut or _cut_at(read.nodes, text, kind, episodes)
    return read.cut


def _cut_at(nodes: Any, text: str, kind: Kind, episodes: list[int]) -> _Cut | None:
    from ruamel.yaml.nodes import SequenceNode

    key, listed = next(pair for pair in nodes.value if pair[0].value == kind)
    if not isinstance(listed, SequenceNode) and listed.value:  # `null` or `~`, which entries would stand behind
        return None
    items = listed.value if isinstance(listed, SequenceNode) else []
    assert len(items) == len(episodes)
    last = text.index("\n", key.end_mark.index) + 1  # behind what was cut off so far
    starts = [text.rfind("\n", 0, item.start_mark.index) + 1 for item in items]
    dashes = [re.match(r" *- ", text[start:]) for start in starts]
    if not all(dashes) or (isinstance(listed, SequenceNode) and listed.flow_style):
        return None
    begin, pieces = text[:last], []
    for item, episode, start, stop in zip(items, episodes, starts, [*starts[1:], listed.end_mark.index]):
        end = start + COMMENTS_BELOW.search(text[start:stop]).start()
        if (
            block := _block_at_end(item)
        ) and block.end_mark.index > end:  # whose lines may look like comments, or be empty
            end = text.rfind("\n", 0, block.end_mark.index) + 1
        pieces.append(_Piece(episode, text[last:start], text[start:end]))
        last = end
    return _Cut(begin, pieces, text[last:], len(dashes[0][0]) - 2 if dashes else 2)


def _block_at_end(node: Any) -> Any:
    """The text in block style (`|`, `>`) with which a node ends, if it does."""
    from ruamel.yaml.nodes import MappingNode, ScalarNode

    while not isinstance(node, ScalarNode):
        if not node.value:
            return None
        node = node.value[-1][1] if isinstance(node, MappingNode) else node.value[-1]
    return node if node.style in ("|", ">") else None


def _in_lines(text: str, kind: Kind) -> str:
    """The same content, an entry on lines of its own."""
    content = _round_trip().load(text)
    content[kind] = list(content[kind] or []) or None
    content.fa.set_block_style()
    return _dump(content)


def _lines(entry: dict, column: int, before: str = "") -> str:
    """An entry as text, with the comments beside those keys of the entry before it that stay."""
    from ruamel.yaml.comments import CommentedMap

    new = CommentedMap(entry)
    if before:
        old = _round_trip(column).load(before)[0]
        new.ca.items.update({key: comment for key, comment in old.ca.items.items() if key in entry})
        new.update({key: old[key] for key in entry if key in old and old[key] == entry[key]})  # with comments within
    return _dump([new], column)


def _dump(content: Any, column: int = 2) -> str:
    text = io.StringIO()
    _round_trip(column).dump(content, text)
    return text.getvalue()


def _round_trip(column: int = 2):
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=column + 2, offset=column)
    return yaml


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        return ""
