"""Should `propagate` rewind what it learns from, how sharp should it decode, and how sure may it be? Asked of marked and verified episodes of train
and val, without a simulator's truth.

    python -m benchmarks.propagate [--choices 28]       # half an hour on one core; benchmarks/propagate.json

Eight of the marked episodes, of train and val alike, are chosen at random; `propagate` learns from them and annotates the other
marked ones and those that were verified by eye: some of train, all of val (`verify.corrections`, `benchmarks.looks`). That many
times over; frames, boundaries and retries are pooled. What varies is how often a marked episode is rewound (`REWIND`) and how
far neighbouring frames count as independent evidence (`SHARPNESS`); and, for the setting in use, how far they do where it says how
sure it is of a boundary (`CAUTION`, by the log-likelihood of which boundaries are right). `smaller` is the smaller of precision and recall of retries:
who claims many finds many. Who looked had the answer of REWIND 0 and SHARPNESS 0.5 before them, which favours that one. What favours rewinding is episode 94:
without it REWIND 0 comes first (`LOG.md`, 2026-11-26, says how it came to be looked at again).
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks import looks
from sarm_lib import agreement, annotations, corrections, dataset, encoder, params
from sarm_lib.annotations import Annotation
from sarm_lib.annotators import propagate
from sarm_lib.dataset import Dataset

REWIND = (0.0, 0.8)
SHARPNESS = (0.25, 0.35, 0.5, 0.65, 0.8, 1.0)
CAUTION = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.65)
LEARNED_FROM = 8
ROWS = (0.5, 0.7, 0.9, 0.99)  # of confidences


def known_episodes(config, demos: Dataset) -> tuple[list[Annotation], looks.Segments]:
    """The marks, and the dense segments of every marked or verified episode of train and val, as a person saw them."""
    marks = corrections.marks_from_params(config, demos)
    verified = looks.read(config.paths.resolve(config.verify.corrections), demos)
    test = {e.index for e in demos.split("test")}
    seen = {episode: segments for episode, segments in looks.decided(demos).items() if episode not in test}
    return marks, verified | seen | {mark.episode: mark.head(looks.HEAD) for mark in marks}


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
    marks, known = known_episodes(config, demos)
    features = propagate.PropagateAnnotator(demos, embeddings, marks, vocabulary, seed=0).features()
    in_use, rng = (propagate.REWIND, propagate.SHARPNESS), np.random.default_rng(0)
    assert in_use in itertools.product(REWIND, SHARPNESS), "what is in use is among what is compared"
    found = {setting: [] for setting in itertools.product(REWIND, SHARPNESS)}
    sure, cautious = {caution: [] for caution in CAUTION}, propagate.CAUTION
    for _ in tqdm(range(choices), unit="choice"):
        chosen = choose(rng, marks, vocabulary)
        others = [e for e in demos.episodes if e.index in known.keys() - {mark.episode for mark in chosen}]
        expected = {e.index: known[e.index] for e in others}
        annotator = propagate.PropagateAnnotator(demos, embeddings, marks, vocabulary, seed=0)
        annotator.marks = chosen  # of val too, which `propagate` leaves to those who measure it
        for rewind in REWIND:
            propagate.REWIND = rewind
            learned = annotator.learn(features)
            looked_at = [propagate.predict(learned.ensemble, features[episode.rows]) for episode in others]
            for sharpness in SHARPNESS:
                propagate.SHARPNESS = sharpness
                decoded = [annotator.decode(e, p, learned) for e, p in zip(others, looked_at, strict=True)]
                compared = agreement.compare_all(expected, decoded, looks.HEAD, vocabulary[looks.HEAD], demos.fps)
                found[rewind, sharpness] += compared
                if (rewind, sharpness) == in_use:
                    for caution in CAUTION:
                        propagate.CAUTION = caution
                        decoded = [annotator.decode(e, p, learned) for e, p in zip(others, looked_at, strict=True)]
                        sure[caution] += agreement.confidences(expected, decoded, looks.HEAD, vocabulary[looks.HEAD], demos.fps)
                    propagate.CAUTION = cautious
    propagate.REWIND, propagate.SHARPNESS = in_use
    rows = []
    for (rewind, sharpness), pairs in found.items():
        row = agreement.summary(pairs, demos.fps)
        smaller = min(row["retry_recall"], row["retry_precision"] or 0)
        rows.append({"rewind": rewind, "sharpness": sharpness, "smaller": smaller, **row})
    return {
        "marked": sorted(mark.episode for mark in marks),
        "verified": sorted(known.keys() - {mark.episode for mark in marks}),
        "learned_from": LEARNED_FROM,
        "choices": choices,
        "in_use": dict(zip(("rewind", "sharpness"), in_use, strict=True)),
        "settings": sorted(rows, key=lambda row: -row["smaller"]),
        "confidences": [{"caution": caution} | believable(np.array(pairs)) for caution, pairs in sure.items()],
    }


def believable(pairs: np.ndarray) -> dict:
    """Of (n, 2) confidences and whether the boundary is right: their means and the mean log-likelihood, and the same by rows of
    confidence."""
    sure, right = np.clip(pairs[:, 0], 1e-4, 1 - 1e-4), pairs[:, 1]  # annotations keep four digits
    likely = float(np.log(np.where(right, sure, 1 - sure)).mean())
    place = np.digitize(pairs[:, 0], ROWS)
    rows = [[int((place == i).sum()), *pairs[place == i].mean(0).round(3).tolist()] for i in np.unique(place)]
    return {"log_likelihood": round(likely, 4), "confidence": round(sure.mean(), 4), "right": round(right.mean(), 4), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choices", type=int, default=28)
    found = measure(parser.parse_args().choices)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    for row in found["confidences"]:
        print(row)
    for row in found["settings"]:
        print({k: row[k] for k in ("rewind", "sharpness", "frame_agreement", "retry_recall", "retry_precision", "retries")})


if __name__ == "__main__":
    main()
