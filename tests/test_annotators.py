"""Annotators: one interface, resumable, nothing invalid stored; keyframes, propagate, recorded labels, marks."""

import json
from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sarm_lib import agreement, annotations, annotators, corrections, dataset, lerobot_io, params
from sarm_lib.annotations import Annotation, AnnotationError, Segment
from sarm_lib.annotators import Failure, keyframes, propagate, recorded, sequences
from sarm_lib.dataset import Dataset, Episode, open_dataset
from sarm_lib.encoder import Embeddings

NAMES = {"sparse": ["go", "come back"], "dense": ["go", "stop", "come back"]}


@pytest.fixture(scope="module")
def demos(tiny):
    return open_dataset(tiny)


class Scripted:
    """Answers from a list; stops with an error where the list says so."""

    def __init__(self, answers: dict) -> None:
        self.identity, self.answers, self.asked = {"annotator": "scripted"}, answers, []

    def annotate(self, episodes) -> Iterator[Annotation | Failure]:
        for episode in episodes:
            self.asked.append(episode.index)
            answer = self.answers.get(episode.index, "good")
            if answer == "dies":
                raise RuntimeError("killed")
            cut = {"good": 5, "empty segment": 0}.get(answer, 5)
            segments = (Segment("go", 0, cut - 1), Segment("come back", cut, episode.length - 1))
            if answer == "fails":
                yield Failure(episode.index, "no answer")
            else:
                yield Annotation(episode.index, episode.length, "scripted", segments, None)


def test_a_killed_run_goes_on_where_it_was(demos, tmp_path):
    names = {"sparse": NAMES["sparse"]}
    with pytest.raises(RuntimeError):
        annotators.run(Scripted({3: "dies"}), demos, names, tmp_path)
    second = Scripted({})
    done, failures = annotators.run(second, demos, names, tmp_path)
    assert second.asked == [3, 4, 5, 6, 7] and len(done) == 8 and not failures
    again = Scripted({})
    assert annotators.run(again, demos, names, tmp_path)[0] == done and again.asked == []
    afresh = Scripted({})
    annotators.run(afresh, demos, names, tmp_path, skip_existing=False)
    assert len(afresh.asked) == 8


def test_a_failed_episode_is_listed_with_its_reason_and_blocks(demos, tmp_path):
    names = {"sparse": NAMES["sparse"]}
    done, failures = annotators.run(Scripted({2: "fails", 5: "empty segment"}), demos, names, tmp_path)
    assert [a.episode for a in done] == [0, 1, 3, 4, 6, 7] and [f.episode for f in failures] == [2, 5]
    assert "no answer" in failures[0].reason and "zero length: 'go' (0 to -1)" in failures[1].reason
    with pytest.raises(AnnotationError, match=r"(?s)2 episodes are not annotated:.*episode 2: no answer"):
        annotators.require(failures, allowed=False)
    annotators.require(failures, allowed=True)


def test_episodes_that_are_not_there_are_named(demos):
    assert [e.index for e in annotators.select(demos, [2, 0])] == [2, 0]
    with pytest.raises(AnnotationError, match="no episode 99"):
        annotators.select(demos, [99])


# --- sequences and their decoding -----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(2, 12))
def test_the_best_path_is_the_best_of_all_and_entries_are_probabilities(seed, count, length):
    rng = np.random.default_rng(seed)
    model = sequences.chain([rng.integers(0, count, 10)], np.arange(count))
    evidence = rng.normal(size=(length, count)) * 2

    def score(path):
        steps = model.log_transition[path[:-1], path[1:]].sum()
        return model.log_start[path[0]] + steps + evidence[np.arange(length), path].sum()

    best = sequences.best_path(evidence, model)
    others = rng.integers(0, count, (200, length))
    assert all(score(best) >= score(other) - 1e-9 for other in others)
    begin = sequences.entries(evidence, model)
    assert (begin >= -1e-12).all() and (begin.sum(1) <= 1 + 1e-9).all() and begin[0].sum() == pytest.approx(1)


# --- a robot that goes and comes back -------------------------------------------------------------------------------


def robot(seed: int = 0, episodes: int = 12) -> tuple[Dataset, dict[int, tuple[Segment, ...]], Embeddings]:
    """Made-up episodes at 20 fps: an arm goes out, stops with its gripper closing, comes back; every fourth goes back
    out once more, having lost what it held. With embeddings that are the state, seen through noise."""
    rng = np.random.default_rng(seed)
    states, rows, truth, start = [], [], {}, 0
    for index in range(episodes):
        parts = [("go", int(rng.integers(18, 26))), ("stop", int(rng.integers(8, 14))), ("come back", 0)]
        parts[-1] = ("come back", parts[0][1])
        if index % 4 == 3:
            parts = [*parts[:2], ("go", 9), *parts[1:]]
        x, grip, values, segments = 0.0, 1.0, [], []
        for name, length in parts:
            segments.append(Segment(name, len(values), len(values) + length - 1))
            for i in range(length):
                lost = name == "go" and len(segments) > 1
                step = {"go": 0.02 if lost else 1 / parts[0][1], "stop": 0.0, "come back": -x / (length - i)}[name]
                grip += {"go": 0.3, "stop": -0.12, "come back": 0.0}[name]
                x, grip = x + step, float(np.clip(grip, 0, 1))
                values.append([x, grip])
        states.append(np.array(values) + rng.normal(size=(len(values), 2)) * 0.004)
        split = "val" if index >= episodes - 2 else "train"
        rows.append(Episode(index, len(values), start, start, split, "all"))
        truth[index], start = tuple(segments), start + len(values)
    features = {"observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "gripper"]}}
    made = Dataset(None, {"fps": 20, "features": features}, None, tuple(rows), (), "observation.state")
    stacked = np.concatenate(states).astype(np.float32)
    made._read_vectors["observation.state"] = stacked
    picture = (stacked @ rng.normal(size=(2, 16)) + rng.normal(size=(start, 16)) * 0.05).astype(np.float32)
    return made, truth, Embeddings({"camera": picture}, np.zeros((1, 16)), "test", "test", "test")


def test_keyframes_find_the_subtasks_of_a_robot_from_its_order_alone():
    made, truth, _ = robot()
    names = {"dense": NAMES["dense"]}
    found = list(keyframes.KeyframeAnnotator(made, names).annotate(made.episodes))
    for annotation in found:
        annotations.validate(annotation, names, truth[annotation.episode][-1].end + 1)
    straight = [a for a in found if a.episode % 4 != 3]
    result = agreement.summary(agreement.compare_all(truth, straight, "dense", NAMES["dense"], 20), 20)
    assert result["frame_agreement"] > 0.9 and result["boundary_error_frames"] <= 2


def test_propagate_carries_marks_finds_the_retry_and_knows_its_doubts():
    made, truth, embeddings = robot()
    names = {"sparse": NAMES["sparse"], "dense": NAMES["dense"]}

    def mark(index: int) -> Annotation:
        dense = truth[index]
        sparse = tuple(Segment("come back" if s.subtask == "come back" else "go", s.start, s.end) for s in dense)
        return Annotation(index, dense[-1].end + 1, "manual", _joined(sparse), dense)

    marks = [mark(i) for i in (0, 3, 5)]
    annotator = propagate.PropagateAnnotator(made, embeddings, marks, names, seed=0)
    found = list(annotator.annotate(made.episodes))
    assert [a for a in found if a.episode in (0, 3, 5)] == marks
    for annotation in found:
        annotations.validate(annotation, names)
    others = [a for a in found if a.annotator == "propagate"]
    result = agreement.summary(agreement.compare_all(truth, others, "dense", NAMES["dense"], 20), 20)
    assert result["frame_agreement"] > 0.93 and result["boundary_error_frames"] <= 1
    assert result["retries"] == 2 and result["retry_recall"] == 1.0 and result["retry_precision"] == 1.0
    sure = [c for a in others for c in a.confidence["dense"]]
    assert min(sure) >= 0 and max(sure) <= 1 and np.median(sure) > 0.8
    again = list(propagate.PropagateAnnotator(made, embeddings, marks, names, seed=0).annotate(made.episodes))
    assert again == found


def _joined(segments):
    joined = [segments[0]]
    for s in segments[1:]:
        joined[-1:] = (
            [Segment(s.subtask, joined[-1].start, s.end)] if s.subtask == joined[-1].subtask else [joined[-1], s]
        )
    return tuple(joined)


def test_propagate_says_what_is_missing():
    made, _, embeddings = robot()
    with pytest.raises(AnnotationError, match="no training episode is marked"):
        propagate.PropagateAnnotator(made, embeddings, [], NAMES, 0)
    short = Annotation(0, 30, "manual", None, (Segment("go", 0, 29),))
    with pytest.raises(AnnotationError, match="no marked training episode shows dense 'stop'"):
        propagate.PropagateAnnotator(made, embeddings, [short], {"dense": NAMES["dense"]}, 0)


def test_suggested_episodes_are_training_episodes_each_once():
    made, _, embeddings = robot()
    chosen = propagate.suggest(made, embeddings, 5)
    assert len(set(chosen)) == 5 and set(chosen) <= set(range(10))
    assert propagate.suggest(made, embeddings, 3) == chosen[:3]


# --- labels that a dataset carries ----------------------------------------------------------------------------------


def test_annotation_columns_of_another_tool_are_read(demos, tmp_path):
    written = [
        Annotation(e.index, e.length, "x", (Segment("go", 0, 5), Segment("come back", 6, e.length - 1)), None)
        for e in demos.episodes
        if e.index != 2
    ]
    lerobot_io.write_annotated_dataset(demos, written, {"sparse": {"go": 0.5, "come back": 0.5}}, tmp_path / "d")
    carried = open_dataset(tmp_path / "d")
    annotator = recorded.RecordedAnnotator(carried, {"sparse": NAMES["sparse"]})
    results = list(annotator.annotate(carried.episodes))
    assert [r.sparse for r in results if isinstance(r, Annotation)] == [a.sparse for a in written]
    assert [r.episode for r in results if isinstance(r, Failure)] == [2]
    with pytest.raises(AnnotationError, match="none of these names is in the dataset; its labels are come back, go"):
        recorded.RecordedAnnotator(carried, {"sparse": ["fold"]})


def test_lerobots_language_rows_and_subtask_indices_are_read(demos, tmp_path):
    import shutil

    import pyarrow as pa
    from lerobot.datasets.language import LANGUAGE_PERSISTENT, PERSISTENT_ROW_FIELDS, language_feature_info

    root = shutil.copytree(demos.root, tmp_path / "d")
    (path,) = root.glob("data/**/*.parquet")
    table = pq.read_table(path)

    def said(text, time):
        return {
            "role": "assistant",
            "content": text,
            "style": "subtask",
            "timestamp": time,
            "camera": None,
            "tool_calls": None,
        }

    rows = [[said("go", 0.0), said("come back", 0.6)]] * table.num_rows
    info = json.loads((root / "meta/info.json").read_text())
    info["features"] |= language_feature_info()
    (root / "meta/info.json").write_text(json.dumps(info))
    assert set(rows[0][0]) == set(PERSISTENT_ROW_FIELDS)
    column = pa.array(rows)
    pq.write_table(table.append_column(LANGUAGE_PERSISTENT, column), path)
    opened = open_dataset(root)
    first = next(iter(recorded.RecordedAnnotator(opened, {"sparse": NAMES["sparse"]}).annotate(opened.episodes)))
    assert first.sparse == (Segment("go", 0, 5), Segment("come back", 6, 13))

    info["features"] = {k: v for k, v in info["features"].items() if not k.startswith("language")}
    info["features"]["subtask_index"] = {"dtype": "int64", "shape": (1,), "names": None}
    (root / "meta/info.json").write_text(json.dumps(info))
    index = (np.asarray(table["frame_index"]) >= 6).astype(np.int64)
    pq.write_table(table.append_column("subtask_index", pa.array(index)), path)
    names = pa.table({"subtask_index": [0, 1], "subtask": ["go", "come back"]})
    pq.write_table(names, root / "meta/subtasks.parquet")
    opened = open_dataset(root)
    second = next(iter(recorded.RecordedAnnotator(opened, {"sparse": NAMES["sparse"]}).annotate(opened.episodes)))
    assert second.sparse == first.sparse


# --- the demo's marks -----------------------------------------------------------------------------------------------


def test_the_demo_was_marked_without_the_simulators_truth():
    from demo import contact_sheets

    config = params.load(params.find_upwards("params.yaml"))
    blind = contact_sheets.open_blind(contact_sheets.DATA)
    assert not [name for name in [*blind.features, *blind.table] if name.startswith("sim.")]
    demos, names = dataset.from_params(config), annotations.vocabulary(config)
    marks = corrections.read_marks(config.paths.resolve(config.annotate.marks), blind, names)
    splits = [demos.episodes[mark.episode].split for mark in marks]
    assert splits.count("train") <= 8 and "test" not in splits
    sheets = sorted(path.stem for path in (contact_sheets.FOLDER / "contact_sheets").glob("*.jpg"))
    assert sheets == sorted(f"episode_{mark.episode:03d}" for mark in marks)
