"""The scrubber: look at episodes frame by frame, and say which subtask is shown when.

It verifies annotations (accept, fix or reject: `corrections.yaml`) or marks episodes from scratch (`marks.yaml`). The
files are the result, so it never has to be waited for: a notebook shows it and goes on. scrubber.js draws and sends
commands; every edit is made and checked here.
"""

import itertools
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import traitlets
from PIL import Image

from sarm_lib import corrections as files
from sarm_lib.annotations import Annotation, AnnotationError, Segment, validate, violations
from sarm_lib.charts import STAGE_COLOURS, annotated_episode, middles
from sarm_lib.dataset import Dataset
from sarm_lib.widgets.panels import packed, state
from sarm_lib.widgets.player import Player, source

Segments = tuple[Segment, ...]
Heads = dict[str, Segments]
SHORTEST = 2  # frames of a segment: the gate refuses one without a duration
UNSAID = ""  # the subtask of a segment that nobody has named: no vocabulary has it, and the gate refuses it


# --- edits: each keeps a valid head valid ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Boundary:
    """Between the frames `at` - 1 and `at`, movable from `low` to `high`.

    left, right: the segments that end and begin there; one of them is None beside a gap.
    """

    at: int
    low: int
    high: int
    left: int | None
    right: int | None


def boundaries(segments: Segments, length: int) -> list[Boundary]:
    """Where segments begin and end, in the order of time; the two ends of the episode are none."""
    found, last = [], len(segments) - 1
    for i, segment in enumerate(segments):
        before = segments[i - 1].end if i else -1
        high = segment.end - SHORTEST + 1
        if i and segment.start == before + 1:
            found.append(Boundary(segment.start, segments[i - 1].start + SHORTEST, high, i - 1, i))
        elif segment.start > 0:
            found.append(Boundary(segment.start, before + 1, high, None, i))
        after = segments[i + 1].start if i < last else length
        if segment.end + 1 < after:
            found.append(Boundary(segment.end + 1, segment.start + SHORTEST, after, i, None))
    return found


def moved(segments: Segments, boundary: Boundary, at: int) -> Segments:
    """`boundary` moved to `at`, or as near as its neighbours allow."""
    at, changed = min(max(at, boundary.low), boundary.high), list(segments)
    if boundary.left is not None:
        changed[boundary.left] = replace(segments[boundary.left], end=at - 1)
    if boundary.right is not None:
        changed[boundary.right] = replace(segments[boundary.right], start=at)
    return tuple(changed)


def removed(segments: Segments, boundary: Boundary) -> Segments:
    """Without `boundary`: its two segments become one, named as the left one; a gap beside it is closed."""
    if boundary.left is None or boundary.right is None:
        return moved(segments, boundary, boundary.low if boundary.left is None else boundary.high)
    one = replace(segments[boundary.left], end=segments[boundary.right].end)
    return (*segments[: boundary.left], one, *segments[boundary.right + 1 :])


def split(segments: Segments, frame: int, names: list[str]) -> Segments:
    """A new segment from `frame` on, named as what usually follows; what nobody has named begins with the first subtask.
    Raises AnnotationError where there is no room."""
    i = segment_at(segments, frame)
    cut = segments[i] if segments[i].subtask != UNSAID else replace(segments[i], subtask=names[0])
    if frame - cut.start < SHORTEST or cut.end - frame + 1 < SHORTEST:
        raise AnnotationError(f"frame {frame} is too near to an end of {cut.subtask!r} ({cut.start} to {cut.end})")
    following = names[min(names.index(cut.subtask) + 1, len(names) - 1)] if cut.subtask in names else names[0]
    return (*segments[:i], replace(cut, end=frame - 1), Segment(following, frame, cut.end), *segments[i + 1 :])


def segment_at(segments: Segments, frame: int) -> int:
    """Index of the segment that `frame` lies in. Raises AnnotationError in a gap."""
    for i, segment in enumerate(segments):
        if segment.start <= frame <= segment.end:
            return i
    raise AnnotationError(f"frame {frame} lies in no segment")


def unmarked(names: list[str], length: int) -> Segments:
    """Where marking starts: one segment that nobody has named, so that every boundary is a person's; one name leaves nothing
    to say."""
    return (Segment(UNSAID if len(names) > 1 else names[0], 0, length - 1),)


def twins(segments: Segments) -> Counter[str]:
    """How often two segments of a subtask stand side by side: the first one counts as a try that failed."""
    return Counter(
        a.subtask for a, b in itertools.pairwise(segments) if a.subtask == b.subtask and a.end + 1 == b.start
    )


# --- the widget -------------------------------------------------------------------------------------------------------


class Scrubber(Player):
    """Shows episodes in `order` (worst first) with `reasons` (why one is suspicious), and writes what a person says.

    Give `corrections` to verify `annotations`, or `marks` to mark episodes, beginning with `annotations` where there
    are some; the file need not exist. What it already says is shown. An episode without annotation starts as one segment
    without a name, which cannot be saved until it is split or named. Raises AnnotationError for a file that cannot be read.
    """

    _esm = source("player.js", "panels.js", "scrubber.js")
    _css = source("player.css", "panels.css", "scrubber.css")

    mode = traitlets.Enum(("verify", "mark")).tag(sync=True)
    vocabulary = traitlets.Dict().tag(sync=True)  # head: names
    colours = traitlets.List().tag(sync=True)  # of a head's names, in order
    states = traitlets.Dict().tag(sync=True)  # episode (as text, as JSON has it): what became of it

    head = traitlets.Unicode().tag(sync=True)  # the head that keys edit
    segments = traitlets.Dict().tag(sync=True)  # head: [subtask, first frame, last frame]
    boundaries = traitlets.Dict().tag(sync=True)  # head: [at, low, high, left, right, confidence]
    selected = traitlets.Int(-1).tag(sync=True)  # boundary of `head`, -1 for none
    why = traitlets.Unicode().tag(sync=True)
    status = traitlets.Unicode().tag(sync=True)

    # Edits that were not saved, by episode, the latest last: what the file or annotation said, and the edits. A cell that
    # runs again goes on with them, unless what they began with has changed.
    DRAFTS: ClassVar[dict[tuple, dict[int, tuple[Heads, list[Heads]]]]] = {}

    COMMANDS = Player.COMMANDS | frozenset(
        "send_panels activate select move nudge put split merge rename undo accept fix reject withdraw".split()
    )
    ASKING = Player.ASKING | {"send_panels"}

    def __init__(
        self,
        dataset: Dataset,
        annotations: list[Annotation],
        vocabulary: dict[str, list[str]],
        *,
        order: list[int] | None = None,
        reasons: dict[int, str] | None = None,
        corrections: Path | None = None,
        marks: Path | None = None,
    ):
        if (corrections is None) == (marks is None):
            raise ValueError("give either corrections (to verify annotations) or marks (to mark episodes)")
        self._vocabulary, self._annotations = vocabulary, {a.episode: a for a in annotations}
        self._asked = files.asked_heads(vocabulary)
        self._path = Path(corrections if marks is None else marks)
        self._history: dict[int, list[Heads]] = {}  # of an episode: as annotated first, as shown last
        self._saved: dict[int, Heads] = {}  # as the annotation or the file says
        self._verdicts: dict[int, tuple[str, str, str]] = {}  # of an episode: state, why, note
        self._lacking: dict[int, list[str]] = {}  # heads of which nothing is marked, where something is of others
        if order is None:
            order = sorted(self._annotations) if marks is None else [e.index for e in dataset.episodes]
        super().__init__(
            dataset,
            order,
            reasons,
            mode="verify" if marks is None else "mark",
            vocabulary=vocabulary,
            colours=list(STAGE_COLOURS),
            head=list(vocabulary)[-1],
        )
        self._key = (self._path, self.mode, dataset.root, str(vocabulary))
        self._read_file()
        self._take_up_drafts()
        settled = {i for i, (state, _, _) in self._verdicts.items() if state not in files.UNSETTLED}
        drafted = [i for i in reversed(self.DRAFTS[self._key]) if i in self._drafts()]
        self.show_episode(next((i for i in [*drafted, *order] if i not in settled or i in drafted), order[0]))

    def __repr__(self) -> str:
        return f"Scrubber: {len(self.picker)} episodes to {self.mode}, into {self._path.name}"

    def still(self) -> Image.Image:
        """The shown episode as a picture: ten of its frames over what is said of them."""
        shown = self._episodes[self.episode]
        images = self._dataset.read_frames(shown, self._dataset.image_keys[0], middles(shown.length, 10))
        rows = {head: [(s.subtask, s.start, s.end) for s in segments] for head, segments in self._shown.items()}
        given = images, rows, self._vocabulary, shown.length, self._dataset.fps
        return annotated_episode(*given, f"episode {shown.index}")

    # --- commands: the view sends them, and tests call them -----------------------------------------------------------

    def send_panels(self, episode: int) -> None:
        """Send the robot's state: where the gripper closes or a joint turns back, a boundary is not far."""
        if episode == self.episode:
            panels = []  # none of an episode whose state cannot be read, so that no other one's stays in sight
            try:
                panels = [packed(state(self._dataset, self._episodes[episode]), self._episodes[episode])]
            finally:
                specs, values = [spec for spec, _ in panels], [sent for _, sent in panels]
                self.send({"episode": episode, "panels": specs}, buffers=values)

    def show_episode(self, episode: int) -> None:
        """Show an episode; edits of the one before stay as a draft."""
        self._start(episode)
        _, why, note = self._verdicts.get(episode, ("", "", ""))
        with self.hold_sync():
            self.length, self.frame, self.selected = self._episodes[episode].length, 0, -1
            self.episode, self.why, self.status, self.error = episode, why, note, ""
            self._publish()

    def activate(self, head: str) -> None:
        """Let the keys edit another head."""
        if head in self._vocabulary:
            with self.hold_sync():
                self.head, self.selected = head, -1

    def select(self, step: int, frame: int) -> None:
        """Select the next (`step` 1) or previous (-1) boundary as seen from the selected one, or from `frame`."""
        found = self._boundaries(self.head)
        if self.selected >= 0:
            chosen = self.selected + step
        else:
            chosen = sum(b.at <= frame for b in found) - (step < 0)
        if 0 <= chosen < len(found):
            self.selected = chosen
            self.look_at(found[chosen].at)

    def move(self, head: str, boundary: int, at: int) -> None:
        """Select a boundary and move it to `at`, or as near as its neighbours allow."""
        found = self._boundaries(head)
        if not 0 <= boundary < len(found):
            raise AnnotationError(f"{head} has no boundary {boundary}")
        segments = moved(self._shown[head], found[boundary], at)
        with self.hold_sync():
            self.head = head
            self._edit(head, segments)
            self._select_at(min(max(at, found[boundary].low), found[boundary].high))

    def nudge(self, by: int) -> None:
        """Move the selected boundary by some frames and look at it."""
        boundary = self._selected_boundary()
        self.move(self.head, self.selected, boundary.at + by)
        if self.selected >= 0:
            self.look_at(self._boundaries(self.head)[self.selected].at)

    def put(self, frame: int) -> None:
        """Move the selected boundary to `frame`. Raises AnnotationError where a neighbour is in the way."""
        boundary = self._selected_boundary()
        if not boundary.low <= frame <= boundary.high:
            raise AnnotationError(
                f"the selected boundary (frame {boundary.at}) can be put at frames {boundary.low} to {boundary.high}, between its "
                f"neighbours: for frame {frame} select another one ([ and ]), move that first, or split there (s)"
            )
        self.move(self.head, self.selected, frame)

    def split(self, frame: int) -> None:
        """Begin a new segment at `frame`, named as what usually follows."""
        with self.hold_sync():
            self._edit(self.head, split(self._shown[self.head], frame, self._vocabulary[self.head]))
            self._select_at(frame)

    def merge(self) -> None:
        """Delete the selected boundary."""
        boundary = self._selected_boundary()
        with self.hold_sync():
            self._edit(self.head, removed(self._shown[self.head], boundary))
            self.selected = -1

    def rename(self, frame: int, number: int) -> None:
        """Name the segment at `frame` after the vocabulary's `number`-th subtask, counted from 1."""
        names, segments = self._vocabulary[self.head], list(self._shown[self.head])
        if not 1 <= number <= len(names):
            raise AnnotationError(f"{self.head} has {len(names)} subtasks, there is no number {number}")
        i = segment_at(segments, frame)
        segments[i] = replace(segments[i], subtask=names[number - 1])
        self._edit(self.head, tuple(segments))

    def undo(self) -> None:
        """Take back the last edit of this episode."""
        history = self._history[self.episode]
        if len(history) == 1:
            raise AnnotationError("nothing to undo: this is what was annotated")
        history.pop()
        with self.hold_sync():
            self.selected, self.status = -1, self._remarks()
            self._publish()

    def accept(self, why: str = "") -> None:
        """The annotation is right as it is."""
        raw = self._annotations.get(self.episode)
        if self.mode != "verify" or raw is None:
            raise AnnotationError("there is no annotation to accept: edit the segments and save them")
        if self._changed_heads():
            raise AnnotationError(
                "what is shown differs from the annotation: save it as a fix, or undo the edits first"
            )
        self._record(files.of_now(raw, "accept", why=why))

    def fix(self, why: str = "") -> None:
        """Save the segments as shown: a fix of the annotation, or a mark."""
        if not self._asked:
            raise AnnotationError(
                "base.annotation_mode: single_stage has one stage from the first frame to the last, and nothing to fix: accept "
                "the episode, or reject it"
            )
        if unsaid := self._unsaid_heads():
            first = self._vocabulary[unsaid[0]][0]
            other = "" if unsaid[0] == self.head else f" in the {unsaid[0]} row (h)"
            raise AnnotationError(
                f"nobody has said where {unsaid[0]} subtasks begin. Step to the frame where the second one begins and split there "
                f"(s){other}; where there is none, say that all of the episode is {first!r} (1)"
            )
        length = self._episodes[self.episode].length
        both = {"sparse": None, "dense": None} | self._shown
        shown = Annotation(self.episode, length, "manual", **both)
        validate(shown, self._vocabulary, length)
        if self.mode == "mark":
            files.record_mark(self._path, self._dataset, shown, why, self._asked)
            self._settle("marked", why)
            return
        raw = self._annotations.get(self.episode) or Annotation(self.episode, length, "manual", None, None)
        changed = self._changed_heads()
        if not changed:
            raise AnnotationError("nothing differs from the annotation: accept it, or edit it first")
        self._record(files.of_now(raw, "fix", {head: self._shown[head] for head in changed}, why))

    def reject(self, why: str = "") -> None:
        """Take the episode out of training."""
        if self.mode != "verify":
            raise AnnotationError("an episode that is marked cannot be rejected: leave it unmarked")
        length = self._episodes[self.episode].length
        raw = self._annotations.get(self.episode) or Annotation(self.episode, length, "manual", None, None)
        self._record(files.of_now(raw, "reject", why=why))

    def withdraw(self) -> None:
        """Take what was said about this episode out of the file; the segments shown stay as a draft."""
        if self.episode not in self._verdicts:
            raise AnnotationError(f"{self._path.name} says nothing about episode {self.episode}")
        kind = "corrections" if self.mode == "verify" else "marks"
        before, saved, shown = self._verdicts[self.episode][0], self._saved[self.episode], self._shown
        stays = files.withdraw(self._path, kind, self._dataset, self.episode, self._asked)
        del self._verdicts[self.episode]
        self._lacking.pop(self.episode, None)
        self._saved[self.episode] = self._history[self.episode][0]
        try:
            if stays:
                self._read_file(self.episode)
        finally:
            if self._shown != shown and (before != "rejected" or shown != saved):
                self._history[self.episode].append(shown)
            state, self.why, note = self._verdicts.get(self.episode, ("", "", ""))
            self.status = f"episode {self.episode}: taken out of {self._path.name}"
            if stays and before == "rejected":
                self.status = f"episode {self.episode}: no longer rejected" + "; its fix holds again" * (
                    state == "fixed"
                )
            elif stays:
                self.status += "; what it says of heads that this annotation mode does not ask about stays"
            self.status += f"\n{note}" if note else ""
            self._publish()

    # --- state --------------------------------------------------------------------------------------------------------

    def _read_file(self, only: int | None = None) -> None:
        """What the file says already, of one episode or all: verdicts, and segments that a person has saved."""
        episodes = self._episodes if only is None else {only}
        if self.mode == "mark":
            for mark in files.read_marks(self._path, self._dataset, self._vocabulary):
                if mark.episode in episodes:
                    self._start(mark.episode)
                    self._save({head: mark.head(head) for head in self._vocabulary}, mark.episode)
                    self._verdicts[mark.episode] = ("marked", mark.provenance["why"], "")
            for episode, said in files.unfinished(self._path, self._dataset, self._vocabulary).items():
                if episode in episodes:
                    self._start(episode)
                    self._history[episode].append(
                        self._history[episode][0] | {h: said[h] for h in self._vocabulary if h in said}
                    )
                    self._lacking[episode] = [head for head in self._vocabulary if head not in said]
                    note = f"nothing is marked for {' and '.join(self._lacking[episode])} yet: mark it and save"
                    self._verdicts[episode] = ("unfit", "", note)
            return
        found = files.read_corrections(self._path, self._dataset)
        outcomes = files.apply(list(self._annotations.values()), found, self._dataset, self._vocabulary).outcomes
        for correction, outcome in zip(found, outcomes, strict=True):
            if correction.episode not in episodes:
                continue
            self._start(correction.episode)
            base = self._history[correction.episode][0]
            said = base | files.said_of(correction.segments, self._vocabulary)
            note = f"{outcome.outcome}: {outcome.note}" if outcome.outcome in files.UNSETTLED else ""
            if outcome.outcome == "fixed" or (outcome.outcome == "outdated" and correction.verdict == "fix"):
                self._save(said, correction.episode)
            elif outcome.outcome == "unfit" and self._can_show(said, correction.episode):
                if said != self._history[correction.episode][-1]:
                    self._history[correction.episode].append(said)
                note += "\nIts segments are shown as a draft: mend and save them, or undo (u) for the annotation."
            elif outcome.outcome == "unfit":
                note += "\nIts segments cannot be shown; a new fix takes their place."
            self._verdicts[correction.episode] = (outcome.outcome, correction.why, note)

    def _take_up_drafts(self) -> None:
        for episode, (saved, history) in self.DRAFTS.setdefault(self._key, {}).items():
            if episode in self._episodes:
                self._start(episode)
                if self._saved[episode] == saved and self._history[episode][0] == history[0]:
                    self._history[episode] = list(history)

    def _drafts(self) -> set[int]:
        """Episodes with edits that are not saved."""
        return {i for i, history in self._history.items() if history[-1] != self._saved[i]}

    def _can_show(self, segments: Heads, episode: int) -> bool:
        """Whether segments can be drawn and edited: unknown names can, frames outside the episode cannot."""
        both = {"sparse": None, "dense": None} | segments
        found = violations(Annotation(episode, self._episodes[episode].length, "manual", **both), self._vocabulary)
        return {finding.rule for finding in found} <= {"vocabulary", "coverage"} and all(segments.values())

    def _start(self, episode: int) -> None:
        """The segments that an episode has before anyone touches them."""
        if episode not in self._history:
            raw, length = self._annotations.get(episode), self._episodes[episode].length
            first = {h: (raw and raw.head(h)) or unmarked(names, length) for h, names in self._vocabulary.items()}
            self._history[episode], self._saved[episode] = [first], first

    def _save(self, segments: Heads, episode: int) -> None:
        if segments != self._history[episode][-1]:
            self._history[episode].append(segments)
        self._saved[episode] = segments

    @property
    def _shown(self) -> Heads:
        return self._history[self.episode][-1]

    def _unsaid_heads(self) -> list[str]:
        """Heads that people are asked about and of which nobody has said anything: they are still one segment."""
        return [head for head in self._asked if self._shown[head][0].subtask == UNSAID]

    def _remarks(self) -> str:
        """What a person may not have meant in the edits that are shown, a line each."""
        first, found = self._history[self.episode][0], [self._left_behind()]
        for head in self._asked:
            if new := twins(self._shown[head]) - twins(first[head]):
                found.append(
                    f"two segments of {min(new)!r} stand side by side now: the first one counts as a try that failed. If they are one, "
                    "select the boundary between them and delete it (x); if one of them is another subtask, name it (1 … 9)"
                )
        return "\n".join(filter(None, found))

    def _left_behind(self) -> str:
        """A boundary that two heads shared as they were annotated, and that one of them has moved away from."""
        first, shown = self._history[self.episode][0], self._shown
        if self.episode not in self._annotations:
            return ""
        starts = {h: ({s.start for s in first[h][1:]}, {s.start for s in shown[h][1:]}) for h in self._asked}
        for one, (before, now) in starts.items():
            for other, (others_before, others_now) in starts.items():
                if stayed := sorted((before & others_before & now) - others_now):
                    return f"{one} still changes at frame {stayed[0]}, where {other} did too: if that is one boundary, move it there as well (h)"
        return ""

    def _changed_heads(self) -> list[str]:
        """Heads that people are asked about and that are shown otherwise than they were annotated."""
        raw = self._annotations.get(self.episode)
        return [head for head in self._asked if raw is None or self._shown[head] != raw.head(head)]

    def _boundaries(self, head: str) -> list[Boundary]:
        return boundaries(self._shown[head], self.length)

    def _selected_boundary(self) -> Boundary:
        found = self._boundaries(self.head)
        if not 0 <= self.selected < len(found):
            raise AnnotationError("no boundary is selected: click one, or press [ or ]")
        return found[self.selected]

    def _select_at(self, at: int) -> None:
        self.selected = next((i for i, b in enumerate(self._boundaries(self.head)) if b.at == at), -1)

    def _edit(self, head: str, segments: Segments) -> None:
        if self._asked and head not in self._asked:
            raise AnnotationError(
                f"base.annotation_mode does not ask about {head} segments: the whole episode is one stage"
            )
        if segments != self._shown[head]:
            self._history[self.episode].append(self._shown | {head: segments})
            self.status = self._remarks()
            self._publish()

    def _record(self, correction: files.Correction) -> None:
        verdict = files.record_correction(self._path, self._dataset, correction, self._asked)
        self._settle({"accept": "accepted", "fix": "fixed", "reject": "rejected"}[verdict], correction.why)

    def _settle(self, state: str, why: str) -> None:
        """After a file was written."""
        before = self._verdicts.get(self.episode, ("",))[0]
        self._verdicts[self.episode] = (state, why, "")
        self._lacking.pop(self.episode, None)
        if state in ("fixed", "marked"):
            self._save(self._shown, self.episode)
        elif (before, state) not in (("fixed", "rejected"), ("rejected", "rejected")):  # these keep the fix in the file
            self._saved[self.episode] = self._history[self.episode][0]
        self.why, self.status = why, f"episode {self.episode}: {state}, written to {self._path.name}"
        if state == "fixed" and (left := self._left_behind()):
            self.status += f"\n{left}"
        self._publish()

    def _publish(self) -> None:
        """Give the view the shown segments and the states of all episodes."""
        with self.hold_sync():
            self.segments = {h: [[s.subtask, s.start, s.end] for s in segments] for h, segments in self._shown.items()}
            self.boundaries = {head: self._rows(head) for head in self._vocabulary}
            edited, drafts = self._drafts(), self.DRAFTS[self._key]
            drafts.pop(self.episode, None)
            if self.episode in edited:
                drafts[self.episode] = self._saved[self.episode], list(self._history[self.episode])
            words = {i: [state] for i, (state, _, _) in self._verdicts.items()}
            for i in edited:
                words.setdefault(i, []).append("edited")
            self.states = {str(i): ", ".join(texts) for i, texts in sorted(words.items())}

    def _rows(self, head: str) -> list[list[Any]]:
        """A head's boundaries for the view, each with the annotator's confidence where it is where that put it."""
        raw = self._annotations.get(self.episode)
        known = (raw.confidence or {}).get(head) if raw else None
        confidence = {s.start: round(c, 2) for s, c in zip(raw.head(head), known, strict=True)} if known else {}
        return [[b.at, b.low, b.high, b.left, b.right, confidence.get(b.at)] for b in self._boundaries(head)]
