"""Does `propagate` annotate episodes as well that no choice has seen? Recorded anew, compared with the simulator's truth.

    python -m benchmarks.unseen [--sets 12]     # an hour and a half on two cores (needs OpenGL), resumable; benchmarks/unseen.json

The demo's held-out episodes were looked at while settings were chosen, so what is reached on them is no proof. Here the demo's
own demonstrator gives as many episodes of the same kinds from other starts, several sets of them; `propagate` learns from the
demo's eight marks with its settings as they are, as the pipeline does, and annotates the demo's held-out episodes and the new
ones alike. Nothing is learned or chosen from the new ones: a setting that is changed because of what comes out here asks for
sets from other seeds (`FIRST_SEED`). Beside it stand the settings that were in use before rewinding was chosen (`BEFORE`),
`keyframes`, and the same network taught the simulator's truth of all training episodes: so much would perfect marks of all of
them give, with these settings, and with four times as many components of the embeddings, which eight marks are too few for.

Retries have 95 % intervals by bootstrap over episodes. `lasting` has those whose step back lasts at least so long, by the
simulator: so long has a step back to last to be found.
`suspicion` is the share of the wrong frames in the first tenth and fifth of the new episodes, most suspicious first, as notebook 02
orders them, and what all new episodes are like once these are as the simulator says: so much would a person who sees what the
simulator says gain by looking at no more than these.

`looks`: what an eye says instead. The first tenth was looked at frame by frame (`benchmarks/unseen_looks.yaml`), as a person would
in notebook 02: the annotation and what made it suspicious before them, the guide of `demo/marks.yaml`, and nothing of the
simulator's. Those who looked were models that see pictures, no people, one look an episode; some enlarged what they saw.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from demo.record import MIXTURE, TRUTH, interleaved, record_episodes, simulator, write_splits
from demo.truth import Truth
from sarm_lib import agreement, annotations, corrections, dataset, encoder, params
from sarm_lib.annotations import Annotation, AnnotationError, Segment
from sarm_lib.annotators import propagate
from sarm_lib.annotators.keyframes import KeyframeAnnotator
from sarm_lib.artifacts import code_digest, digest, file_digest, staged
from sarm_lib.dataset import Dataset
from sarm_lib.params import read_yaml

FIRST_SEED, SEEDS = 40_000, 1000  # of the first set, and from one set to the next
HELD_OUT = tuple(val + test for val, test in zip(MIXTURE["val"], MIXTURE["test"], strict=True))  # episodes of each kind
BEFORE = {"REWIND": 0.0, "SHARPNESS": 0.5, "CAUTION": 0.5}  # confidences were as sharp as the path
MADE_BY = [Path("demo") / name for name in ("demonstrations.py", "record.py", "simulator.py", "truth.json")]
HEAD, CEILING = "dense", "propagate, taught the truth"
MANY = {"COMPONENTS": 32}  # of each camera's embeddings
SHARES = (0.1, 0.2)  # of the new episodes, most suspicious first
LOOKS = Path(__file__).with_name("unseen_looks.yaml")

type Truths = dict[int, tuple[Segment, ...]]  # by episode


def record_set(folder: Path, number: int) -> Path:
    """The dataset of one set of episodes, recorded unless it is there."""
    plan = interleaved("test", HELD_OUT, FIRST_SEED + SEEDS * number)
    root = folder / digest(plan, [file_digest(path) for path in MADE_BY])
    if not root.exists():
        record_episodes(root, plan, Truth.load(TRUTH), simulator())
    return root


def with_new_episodes(demos: Dataset, roots: list[Path], target: Path) -> None:
    """The demo's dataset with the episodes of other ones behind its own, all of them test episodes."""
    from lerobot.datasets.dataset_tools import merge_datasets
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    with staged(target) as partial_target:
        parts = [LeRobotDataset(f"demo/{root.name}", root=root) for root in (demos.root, *roots)]
        merged = merge_datasets(parts, "demo/unseen", partial_target)
        splits = [episode.split for episode in demos.episodes]
        write_splits(partial_target, splits + ["test"] * (merged.meta.total_episodes - len(splits)))


def interval(pairs: list[agreement.Comparison], rng: np.random.Generator) -> dict[str, list[float]]:
    """95 % of recall and precision of retries over episodes drawn anew."""
    counts = np.array([(c.retries_matched, c.retries_missed, c.retries_extra) for c in pairs])
    found, missed, extra = counts[rng.integers(len(counts), size=(10_000, len(counts)))].sum(1).T
    rates = {"retry_recall": found / (found + missed), "retry_precision": found / (found + extra)}
    return {f"{name}_95": np.nanquantile(values, (0.025, 0.975)).round(3).tolist() for name, values in rates.items()}


def taught(demos: Dataset, truth: Truths, marks: list[Annotation]) -> list[Annotation]:
    """Every training episode marked by the truth; a dense subtask is a part of the sparse one in which the marks have it."""
    part_of = {d.subtask: s.subtask for m in marks for s in m.sparse for d in m.dense if s.start <= d.start <= s.end}
    found = []
    for episode in demos.split("train"):
        sparse: list[Segment] = []
        for s in truth[episode.index]:
            start = sparse.pop().start if sparse and sparse[-1].subtask == part_of[s.subtask] else s.start
            sparse.append(Segment(part_of[s.subtask], start, s.end))
        found.append(Annotation(episode.index, episode.length, "manual", tuple(sparse), truth[episode.index]))
    return found


def figures(given: list[Annotation], stage: np.ndarray, merged: Dataset, names: list[str], first_new: int) -> dict:
    """Of the demo's held-out episodes and of all new ones; of these, each set, each kind, and retries by where they go."""
    pairs = agreement.compare_all(agreement.truth(stage, merged, names), given, HEAD, names, merged.fps)
    new = [c for c in pairs if c.episode >= first_new]
    sets = [new[i : i + sum(HELD_OUT)] for i in range(0, len(new), sum(HELD_OUT))]
    kinds = agreement.by_group(new, {e.index: e.group for e in merged.episodes}, merged.fps)
    return {
        "demo": agreement.summary([c for c in pairs if c.episode < first_new], merged.fps),
        "new": agreement.summary(new, merged.fps) | interval(new, np.random.default_rng(0)),
        "sets": [agreement.summary(of, merged.fps) for of in sets],
        "lasting": lasting(new, merged.fps),
        "kinds": {kind: row.dropna().to_dict() for kind, row in kinds.iterrows()},
        "steps_back": agreement.by_step(new).to_dict("records"),
    }


def lasting(pairs: list[agreement.Comparison], fps: float) -> dict:
    """Retries whose step back lasts at least so long: how many, and which share is found, with its 95 % interval."""
    found, rng = agreement.by_length(pairs, fps), np.random.default_rng(0)
    for least, row in zip(agreement.LASTING, found.values(), strict=True):
        steps = [[hit for *_, frames, hit in c.steps_back if frames >= least * fps] for c in pairs]
        counts = np.array([(sum(hits), len(hits)) for hits in steps])
        hit, of = counts[rng.integers(len(counts), size=(10_000, len(counts)))].sum(1).T
        rates = hit[of > 0] / of[of > 0]
        row["retry_recall_95"] = np.quantile(rates, (0.025, 0.975)).round(3).tolist() if len(rates) else None
    return found


def doubted(given: list[Annotation], second: list[Annotation], trusted: dict, truth: Truths, names: dict, fps: float) -> dict:
    """Whether confidences can be believed, whether suspicion finds what is wrong, and what putting that right is worth."""
    order = agreement.suspicion(given, agreement.doubts(given, names), {"keyframes": second}, names, {"keyframes": trusted})
    pairs = agreement.compare_all(truth, given, HEAD, names[HEAD], fps)
    wrong = pd.Series({c.episode: (1 - c.agreement) * c.confusion.sum() for c in pairs})
    rows = {}
    for share in SHARES:
        right = {episode: truth[episode] for episode in order.index[: round(share * len(order))]}
        after = [replace(a, dense=right.get(a.episode, a.dense)) for a in given]
        row = agreement.summary(agreement.compare_all(truth, after, HEAD, names[HEAD], fps), fps)
        rows[f"first {share:.0%}"] = agreement.found_early(order.score, wrong, share) | {
            f"{figure}_once_right": row[figure] for figure in ("frame_agreement", "retry_recall", "retry_precision")
        }
    return {"confidence": agreement.reliability(truth, given, HEAD, names[HEAD], fps), "suspicion": rows}


def read_looks(merged: Dataset) -> Truths:
    """What an eye said, by episode: a fix, or what was accepted. The episodes are the same on every machine and their pixels are
    not, so what the looks name is not compared by its bytes; raises AnnotationError where an episode has another length, or was
    rejected, which says nothing of its subtasks."""
    named = SimpleNamespace(fingerprint=str(read_yaml(LOOKS)["dataset"]))
    looks = corrections.read_corrections(LOOKS, named)
    if rejected := [c.episode for c in looks if c.verdict == "reject"]:
        raise AnnotationError(f"{LOOKS.name}: episodes {rejected} were rejected, and nobody has said what is seen in them")
    said = {c.episode: c.segments.get(HEAD) or c.was[HEAD] for c in looks}
    lengths = {e.index: e.length for e in merged.episodes}
    for episode, segments in said.items():
        if lengths.get(episode) != segments[-1].end + 1:
            raise AnnotationError(
                f"{LOOKS.name}, episode {episode}: {segments[-1].end + 1} frames were looked at, and it has {lengths.get(episode)} "
                "here: these are other episodes (--sets?)"
            )
    return said


def looked_at(given: list[Annotation], merged: Dataset, stage: np.ndarray, names: dict[str, list[str]]) -> dict:
    """The episodes that were looked at: annotator, eye and simulator, each beside each; and all new ones with what the eye
    says put in. Raises AnnotationError where the looks are about other episodes."""
    truth, by_eye = agreement.truth(stage, merged, names[HEAD]), read_looks(merged)
    reviewed = [replace(a, dense=by_eye.get(a.episode, a.dense)) for a in given]
    annotator, eye = ([a for a in of if a.episode in by_eye] for of in (given, reviewed))
    compared = {
        "annotator against simulator": (truth, annotator),
        "eye against simulator": (truth, eye),
        "annotator against eye": (by_eye, annotator),
        "all new ones, these by eye, against simulator": (truth, reviewed),
    }
    rows = {}
    for what, (reference, of) in compared.items():
        pairs = agreement.compare_all(reference, of, HEAD, names[HEAD], merged.fps)
        steps = agreement.by_step(pairs).to_dict("records")
        rows[what] = agreement.summary(pairs, merged.fps) | {"steps_back": steps}
        rows[what]["lasting"] = lasting(pairs, merged.fps)
    return rows


def measure(sets: int) -> dict:
    """Figures of every annotator on the demo's held-out episodes and on new ones."""
    config = params.load("params.yaml", {"base.outputs": "outputs/unseen"})  # out of the way of a pipeline that runs beside it
    demos, folder = dataset.from_params(config), config.paths.shared("recorded")
    with ProcessPoolExecutor(min(sets, os.cpu_count() or 1), get_context("spawn")) as pool:
        roots = list(pool.map(partial(record_set, folder), range(sets)))
    target, first_new = folder / digest(demos.fingerprint, [root.name for root in roots]), len(demos.episodes)
    if not target.exists():
        with_new_episodes(demos, roots, target)
    merged = dataset.open_dataset(target, image_keys=config.base.image_keys, group_key=config.base.group_key)
    at = config.paths.write("embeddings")
    encoder.ensure_embeddings(at, config, merged, encoder.from_params(config, dataset.pick_device(config.base.device)))
    embeddings = encoder.open_embeddings(at, merged)

    names, marks = annotations.vocabulary(config), corrections.marks_from_params(config, demos)
    stage = merged.truth("stage", config.base.truth_prefix)
    assert stage is not None, "the demo's dataset has a simulator's stages"
    truth = agreement.truth(stage, merged, names[HEAD])
    held_out = [e for e in merged.episodes if e.split != "train"]
    judging = [mark for mark in marks if merged.episodes[mark.episode].split == "val"]
    second = list(KeyframeAnnotator(merged, names).annotate(held_out))
    trusted = agreement.trust(second, judging, names, merged.fps)
    found = {"keyframes": figures(second, stage, merged, names[HEAD], first_new)}
    in_use = {name: getattr(propagate, name) for name in BEFORE | MANY}
    compared = {"propagate, before": in_use | BEFORE, "propagate": in_use, CEILING: in_use, f"{CEILING}, 32 components": in_use | MANY}
    for who, settings in compared.items():
        for name, value in settings.items():
            setattr(propagate, name, value)
        learned_from = taught(demos, truth, marks) if who.startswith(CEILING) else marks
        annotator = propagate.PropagateAnnotator(merged, embeddings, learned_from, names, config.base.seed)
        given = list(annotator.annotate(held_out))
        found[who] = settings | figures(given, stage, merged, names[HEAD], first_new)
        new, others = ([a for a in said if a.episode >= first_new] for said in (given, second))
        found[who] |= doubted(new, others, trusted, truth, names, merged.fps)
        if who == "propagate":
            try:
                seen = looked_at(new, merged, stage, names)
            except AnnotationError as error:
                seen = {"left out": str(error)}
    return {"code": code_digest("annotators.propagate"), "sets": sets, "first_seed": FIRST_SEED, "found": found, "looks": seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=12)
    found = measure(parser.parse_args().sets)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    shown = ("episodes", "frame_agreement", "boundary_error_frames", "retries", "retry_recall", "retry_precision", "retry_recall_95", "retry_precision_95")
    for who, rows in found["found"].items():
        for of in ("demo", "new"):
            print(who, of, {figure: rows[of].get(figure) for figure in shown})
        print(pd.DataFrame(rows["steps_back"]).to_string(index=False))
    for what, row in found["looks"].items():
        print(what, {k: row.get(k) for k in shown} if isinstance(row, dict) else row)


if __name__ == "__main__":
    main()
