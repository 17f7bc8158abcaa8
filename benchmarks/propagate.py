"""How sharp should `propagate` decode? Asked of marked and verified episodes of train and val, without a simulator's truth.

    python -m benchmarks.propagate [--choices 28]       # under ten minutes on one core; benchmarks/propagate.json

Eight of the marked episodes, of train and val alike, are chosen at random; `propagate` learns from them and annotates the other
marked ones and those that were verified by eye: some of train (`verify.corrections`) and all of val (`benchmarks.looks`). That
many times over; frames, boundaries and retries are pooled. What varies is how far neighbouring frames count as independent evidence (`SHARPNESS`). `smaller` is the smaller of
precision and recall of retries: who claims many finds many. Who looked at val had the answer of the setting in use before them,
which favours it.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks import looks
from sarm_lib import agreement, annotations, corrections, dataset, encoder, params
from sarm_lib.annotations import Annotation
from sarm_lib.annotators import propagate

SHARPNESS = (0.35, 0.5, 0.65, 0.8, 1.0)
LEARNED_FROM = 8


def known_episodes(config, demos, vocabulary: dict[str, list[str]]) -> tuple[list, dict]:
    """The marks, and what is known of every marked or verified episode of train and val (episode: Annotation)."""
    marks = corrections.marks_from_params(config, demos)
    said = corrections.read_corrections(config.paths.resolve(config.verify.corrections), demos)
    raw = annotations.load(config.paths.read("annotations", "01_annotate"), vocabulary, demos)
    reviewed = corrections.apply(raw, said, demos, vocabulary)
    verified = {outcome.episode for outcome in reviewed.outcomes} - {outcome.episode for outcome in reviewed.unsettled}
    seen = looks.decided(config, demos)
    of_val = {e.index: Annotation(e.index, e.length, "manual", None, seen[e.index]) for e in demos.split("val")}
    known = {a.episode: a for a in reviewed.annotations if a.episode in verified}
    return marks, known | of_val | {mark.episode: mark for mark in marks}


def choose(rng: np.random.Generator, marks: list, vocabulary: dict[str, list[str]]) -> list:
    """Eight marks that show every subtask, without which nothing can be learned."""
    while True:
        chosen = [marks[i] for i in sorted(rng.choice(len(marks), LEARNED_FROM, replace=False))]
        if all({s.subtask for m in chosen for s in m.head(h)} == set(vocabulary[h]) for h in vocabulary):
            return chosen


def measure(choices: int) -> dict:
    """A row of figures for every setting."""
    config = params.load("params.yaml")
    demos = dataset.from_params(config)
    vocabulary = annotations.vocabulary(config)
    embeddings = encoder.open_embeddings(config.paths.read("embeddings", "00_prepare"), demos)
    marks, known = known_episodes(config, demos, vocabulary)
    features = propagate.PropagateAnnotator(demos, embeddings, marks, vocabulary, seed=0).features()
    in_use, rng, found = propagate.SHARPNESS, np.random.default_rng(0), {s: [] for s in SHARPNESS}
    for _ in tqdm(range(choices), unit="choice"):
        chosen = choose(rng, marks, vocabulary)
        others = [e for e in demos.episodes if e.index in known.keys() - {mark.episode for mark in chosen}]
        expected = {e.index: known[e.index].head("dense") for e in others}
        annotator = propagate.PropagateAnnotator(demos, embeddings, marks, vocabulary, seed=0)
        annotator.marks = chosen  # of val too, which `propagate` leaves to those who measure it
        learned = annotator.learn(features)
        looked_at = [propagate.predict(learned.ensemble, features[episode.rows]) for episode in others]
        for sharpness in SHARPNESS:
            propagate.SHARPNESS = sharpness
            decoded = [annotator.decode(e, p, learned) for e, p in zip(others, looked_at, strict=True)]
            found[sharpness] += agreement.compare_all(expected, decoded, "dense", vocabulary["dense"], demos.fps)
    propagate.SHARPNESS = in_use
    rows = []
    for sharpness, pairs in found.items():
        row = agreement.summary(pairs, demos.fps)
        rows.append({"sharpness": sharpness, "smaller": min(row["retry_recall"], row["retry_precision"] or 0), **row})
    return {
        "marked": sorted(mark.episode for mark in marks),
        "verified": sorted(known.keys() - {mark.episode for mark in marks}),
        "learned_from": LEARNED_FROM,
        "choices": choices,
        "in_use": in_use,
        "settings": sorted(rows, key=lambda row: -row["smaller"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choices", type=int, default=28)
    found = measure(parser.parse_args().choices)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    for row in found["settings"]:
        print({k: row[k] for k in ("sharpness", "frame_agreement", "retry_recall", "retry_precision", "retries")})


if __name__ == "__main__":
    main()
