"""What can be seen by eye? Two independent looks at the demo's held-out episodes, beside the annotator and the simulator.

    python -m benchmarks.looks      # seconds, after stage 01; benchmarks/looks.json

Every frame of the validation and test episodes, and of 24 training episodes drawn by chance, was looked at twice
(`demo/looks/first.yaml`, `second.yaml`), by the guide of `demo/marks.yaml`, on sheets whose code cannot see the simulator's
truth (`demo.contact_sheets`), neither knowing the other. Both looked at the answer of the annotator of that day too (`was`), so
that they are nearer to it, and to each other, than two markings from scratch would be. Where a boundary of theirs lies more
than `ALIKE` frames apart, a third look (`third.yaml`, among episodes where they agree) decides for the one that is nearer to
it: what is *decided* is what the annotator can be asked to find. Those of training and validation are also what
`benchmarks.propagate` compares with.
`suspicion` says whether the order in which notebook 02 shows episodes, before anybody corrects one, begins with those in which
something else is seen: the share of all such frames that its first tenth and fifth of the held-out episodes hold.

The guide had two sentences more: what a step back is, and that one of under 0.15 s is none, as for the simulator. Who had it done
knew which retries the annotator misses, that of validation episode 94 too, which had been verified before as having none; who
looked did not. Those who looked were models that see pictures, no people. No annotation is made from these looks but the
correction of episode 94; the setting of `propagate` was chosen by them.
"""

import json
from pathlib import Path

import pandas as pd

from sarm_lib import agreement, annotations, corrections, dataset, params
from sarm_lib.annotations import Annotation, Segment
from sarm_lib.dataset import Dataset

ALIKE = 3  # frames
LOOKS = Path("demo/looks")
HEAD = "dense"
FIGURES = ("episodes", "frame_agreement", "boundary_error_frames", "boundary_error_p90_frames", "boundaries_missed",
           "boundaries_extra", "retries", "retry_recall", "retry_precision")  # fmt: skip

type Segments = dict[int, tuple[Segment, ...]]  # by episode


def read(path: Path, demos: Dataset) -> Segments:
    """What a file of corrections says is right, in the dense head: a fix's segments, or those that were accepted."""
    said = corrections.read_corrections(path, demos)
    return {c.episode: c.segments.get(HEAD) or c.was[HEAD] for c in said if c.verdict != "reject"}


def apart(one: tuple[Segment, ...], other: tuple[Segment, ...]) -> float:
    """Frames between the boundaries that lie farthest apart; infinite where the subtasks are not the same."""
    if [s.subtask for s in one] != [s.subtask for s in other]:
        return float("inf")
    return max(abs(a.start - b.start) for a, b in zip(one, other, strict=True))


def decided(demos: Dataset) -> Segments:
    """What is right in every episode that was looked at, as far as it can be seen."""
    first, second, third = (read(LOOKS / f"{name}.yaml", demos) for name in ("first", "second", "third"))
    found = {}
    for episode, one in first.items():
        other = second[episode]
        nearest = apart(one, other) <= ALIKE or apart(one, third[episode]) <= apart(other, third[episode])
        found[episode] = one if nearest else other
    return found


def measure() -> dict:
    """Figures of every pair, by split."""
    config = params.load("params.yaml")
    demos = dataset.from_params(config)
    vocabulary = annotations.vocabulary(config)
    names, raw = vocabulary[HEAD], annotations.load(config.paths.read("annotations", "01_annotate"), vocabulary, demos)
    held_out = {e.index for e in demos.episodes if e.split != "train"}
    eye = {episode: segments for episode, segments in decided(demos).items() if episode in held_out}
    of = {
        "first": read(LOOKS / "first.yaml", demos),
        "second": read(LOOKS / "second.yaml", demos),
        "decided": eye,
        "annotator": {a.episode: a.head(HEAD) for a in raw if a.episode in eye},
    }
    stage = demos.truth("stage", config.base.truth_prefix)
    assert stage is not None, "the demo's dataset has a simulator's stages"
    of["simulator"] = {e: s for e, s in agreement.truth(stage, demos, names).items() if e in eye}
    lengths = {e.index: e.length for e in demos.episodes}

    def compared(reference: str, given: str, splits: tuple[str, ...]) -> dict:
        asked = {e.index for e in demos.episodes if e.split in splits} & of[reference].keys() & of[given].keys()
        theirs = [Annotation(e, lengths[e], "manual", None, of[given][e]) for e in sorted(asked)]
        pairs = agreement.compare_all({e: of[reference][e] for e in asked}, theirs, HEAD, names, demos.fps)
        row = agreement.summary(pairs, demos.fps)
        return {figure: row.get(figure) for figure in FIGURES}

    rows = [("first", "second"), ("decided", "annotator")]
    rows += [("simulator", given) for given in ("annotator", "first", "second", "decided")]
    opinions = annotations.load_opinions(config.paths.read("opinions", "01_annotate"), vocabulary, demos)
    val = {e.index for e in demos.split("val")}
    marks = [mark for mark in corrections.marks_from_params(config, demos) if mark.episode in val]
    trusted = {name: agreement.trust(given, marks, vocabulary, demos.fps) for name, given in opinions.items()}
    order = agreement.suspicion(raw, agreement.doubts(raw, vocabulary), opinions, vocabulary, trusted).score
    labels = lambda said, e: agreement.frame_labels(said[e], names, lengths[e])  # noqa: E731
    otherwise = pd.Series({e: int((labels(eye, e) != labels(of["annotator"], e)).sum()) for e in of["annotator"]})
    return {
        "alike": ALIKE,
        "suspicion": {
            "changed": [e for e in order.index if e in eye and apart(of["annotator"][e], eye[e]) > ALIKE],  # worst first
            "most_suspicious": [e for e in order.index if e in eye][: round(0.1 * len(eye))],
            **{f"first {share:.0%}": agreement.found_early(order, otherwise, share) for share in (0.1, 0.2)},
        },
        "changed": {name: [c.episode for c in corrections.read_corrections(LOOKS / f"{name}.yaml", demos) if c.verdict == "fix"]
                    for name in ("first", "second", "third")},
        "compared": [
            {"reference": reference, "given": given, "split": name, **compared(reference, given, splits)}
            for reference, given in rows
            for name, splits in agreement.SCORED.items()
        ],
    }  # fmt: skip


def main() -> None:
    found = measure()
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(found["suspicion"])
    for row in found["compared"]:
        print(f"{row['given']} against {row['reference']}, {row['split']}:", {k: row[k] for k in FIGURES if "boundar" not in k})


if __name__ == "__main__":
    main()
