"""Annotators: one interface, resumable, nothing invalid stored; keyframes, propagate, recorded labels, marks."""

import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sarm_lib import agreement, annotations, annotators, corrections, dataset, lerobot_io, params
from sarm_lib.annotations import Annotation, AnnotationError, Segment
from sarm_lib.annotators import Failure, keyframes, propagate, recorded, sequences
from sarm_lib.annotators.server import ServerAnnotator
from sarm_lib.annotators.vlm import VlmAnnotator
from sarm_lib.dataset import Dataset, Episode, open_dataset
from sarm_lib.encoder import Embeddings
from tests.conftest import ROOT, make_project, run_notebook

NAMES = {"sparse": ["go", "come back"], "dense": ["go", "stop", "come back"]}


@pytest.fixture(scope="module")
def demos(tiny):
    return open_dataset(tiny)


class Scripted:
    """Answers from a list; stops with an error where the list says so."""

    def __init__(self, answers: dict, name: str = "scripted") -> None:
        self.identity, self.answers, self.name, self.asked = {"annotator": "scripted"}, answers, name, []

    def annotate(self, episodes) -> Iterator[Annotation | Failure]:
        for episode in episodes:
            self.asked.append(episode.index)
            answer = self.answers.get(episode.index, "good")
            if answer == "dies":
                raise RuntimeError("killed")
            cut = {"good": 5, "empty segment": 0}.get(answer, 5)
            segments = (Segment("go", 0, cut - 1), Segment("come back", cut, episode.length - 1))
            if answer == "fails":
                yield Failure(episode.index, "no answer", {"prompt": "where?"})
            else:
                yield Annotation(episode.index, episode.length, self.name, segments, None)


SPARSE = {"sparse": NAMES["sparse"]}


def test_a_killed_run_goes_on_where_it_was(demos, tmp_path):
    with pytest.raises(RuntimeError):
        annotators.run(Scripted({3: "dies"}), demos, SPARSE, tmp_path)
    second = Scripted({})
    assert [e.index for e in annotators.waiting(second, demos, SPARSE, tmp_path)] == [3, 4, 5, 6, 7]
    done, failures = annotators.run(second, demos, SPARSE, tmp_path)
    assert second.asked == [3, 4, 5, 6, 7] and len(done) == 8 and not failures
    again = Scripted({})
    assert annotators.run(again, demos, SPARSE, tmp_path)[0] == done and again.asked == []
    afresh = Scripted({})
    annotators.run(afresh, demos, SPARSE, tmp_path, skip_existing=False)
    assert len(afresh.asked) == 8


def test_a_stored_answer_that_was_damaged_is_asked_for_again(demos, tmp_path, caplog):
    annotators.run(Scripted({}), demos, SPARSE, tmp_path)
    stored = next(tmp_path.glob("*/000003.json"))
    stored.write_text(stored.read_text()[:40])
    assert [e.index for e in annotators.waiting(Scripted({}), demos, SPARSE, tmp_path)] == [3]
    again = Scripted({})
    done, _ = annotators.run(again, demos, SPARSE, tmp_path)
    assert again.asked == [3] and len(done) == 8
    assert str(stored) in caplog.text and "asked about it again" in caplog.text


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8)), max_size=6))
def test_whatever_is_killed_no_answer_is_lost_and_none_is_asked_for_twice(demos, runs):
    """Runs that skip what exists or do not, each killed at an episode (8: not at all), against a model of two stores."""
    stored, again = {}, {}
    with tempfile.TemporaryDirectory() as work:
        for number, (skip_existing, killed) in enumerate(runs):
            answers = stored if skip_existing else again
            todo = [i for i in range(8) if i not in answers]
            asked = todo[: todo.index(killed) + 1] if killed in todo else todo
            scripted = Scripted({killed: "dies"}, name=f"run {number}")
            how = {"work": Path(work), "skip_existing": skip_existing}
            assert [e.index for e in annotators.waiting(scripted, demos, SPARSE, **how)] == todo
            answers |= {i: f"run {number}" for i in asked if i != killed}
            if killed in todo:
                with pytest.raises(RuntimeError):
                    annotators.run(scripted, demos, SPARSE, **how)
            else:
                found, _ = annotators.run(scripted, demos, SPARSE, **how)
                assert {a.episode: a.annotator for a in found} == answers
                stored, again = (stored, again) if skip_existing else ({**stored, **again}, {})
            assert scripted.asked == asked
            # Who only looks sees what is finished, whatever `skip_existing` says, and changes nothing.
            before = {path: path.read_bytes() for path in Path(work).rglob("*.json")}
            found, missing = annotators.run(
                annotators.Existing(scripted, Path(work) / "none"),
                demos,
                SPARSE,
                Path(work),
                skip_existing=False,
            )
            everything = stored if len(stored) == 8 else {}  # a part is not shown as if it were the whole
            assert {a.episode: a.annotator for a in found} == everything
            assert [f.episode for f in missing] == [i for i in range(8) if i not in everything]
            assert {path: path.read_bytes() for path in Path(work).rglob("*.json")} == before


def test_who_only_looks_sees_what_these_settings_made_or_else_what_the_stage_left_last(demos, tmp_path, caplog):
    work, last = tmp_path / "work", tmp_path / "annotations"
    made, _ = annotators.run(Scripted({}, name="before"), demos, SPARSE, work)
    annotations.save(last, made[:6], SPARSE)
    (last / "000002.json").write_text("{}")
    now = Scripted({5: "fails"}, name="now")
    now.identity = {**now.identity, "model": "another"}
    annotators.run(now, demos, SPARSE, work)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    looking = annotators.Existing(now, last)
    found, missing = annotators.run(looking, demos, SPARSE, work)  # not a mixture of both
    assert [a.episode for a in found] == [0, 1, 3, 4, 5] and {a.annotator for a in found} == {"before"}
    assert annotators.made_by(looking, found) == "before" and annotators.made_by(now, found) == "scripted"
    assert [f.episode for f in missing] == [2, 6, 7]
    assert "cannot be read" in missing[0].reason and missing[1].reason == missing[2].reason
    some = [episode for episode in demos.episodes if episode.index != 5]
    found, missing = annotators.run(looking, demos, SPARSE, work, episodes=some)
    assert {a.annotator for a in found} == {"now"} and len(found) == 7 and not missing
    assert annotators.waiting(looking, demos, SPARSE, work) == []
    caplog.clear()
    _, missing = annotators.run(looking, demos, {"sparse": ["x", "y"]}, work)  # renamed since
    assert len({f.reason for f in missing if f.episode < 6}) == 1 and len(caplog.records) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


def test_who_only_looks_needs_nothing_that_annotating_needs(in_project):
    config, dataset = in_project
    changes = {"annotator": "manual", "marks": "none.yaml", "visualize_only": True}
    config = config.model_copy(update={"annotate": config.annotate.model_copy(update=changes)})
    looking = annotators.from_params(config, dataset)
    found, missing = annotators.run(looking, dataset, annotations.vocabulary(config), config.paths.root / "none")
    assert found and not missing and annotators.made_by(looking, found) != "manual"


def test_an_opinion_that_cannot_be_loaded_stops_nothing():
    """A model may be refused only when it is opened, which its estimate does first."""

    class Gated(Scripted):
        def estimate(self, episodes):
            raise AnnotationError("the model is gated")

    opinion = annotators.Opinion("vlm", lambda: Gated({}))
    assert annotators.estimate(opinion, [None]) == "nothing: the model is gated"


def test_an_opinion_may_fail_in_any_way(demos, tmp_path):
    """What a library raises for half a download or too little memory is its own."""

    class Breaks(Scripted):
        def estimate(self, episodes):
            raise AttributeError("no such attribute")

        def annotate(self, episodes):
            yield from super().annotate(episodes[:2])
            raise MemoryError("too little")

    opinion = annotators.Opinion("other", lambda: Breaks({}))
    assert annotators.estimate(opinion, [None]) == "nothing: AttributeError: no such attribute"
    done, failures = annotators.run(opinion, demos, SPARSE, tmp_path)
    assert [a.episode for a in done] == [0, 1] and {f.reason for f in failures} == {"MemoryError: too little"}

    def cannot_be_made():
        raise ImportError("no module")

    opinion = annotators.Opinion("other", cannot_be_made)
    done, failures = annotators.run(opinion, demos, SPARSE, tmp_path / "none")
    assert not done and {f.reason for f in failures} == {"ImportError: no module"} and len(failures) == 8


def test_the_parameters_reach_the_model_that_is_asked(in_project):
    config, demos = in_project
    options = {
        "annotator": "vlm",
        "model": "user/name",
        "visualize_only": False,
        "frames_per_second": 3.0,
        "max_frames": 17,
        "time_resolution": 0.2,
        "temperature": 0.3,
        "max_attempts": 7,
        "batch_size": 5,
        "num_workers": 2,
        "video_key": demos.camera_keys[-1],
        "server_url": "http://there:1/v1",
        "requests_in_flight": 9,
        "server_timeout": 11.0,
        "server_grammar": True,
    }
    config = config.model_copy(update={"annotate": config.annotate.model_copy(update=options)})
    here, there = (annotators.from_params(config, demos, name=name, seed=23) for name in ("vlm", "server"))
    renamed = {"time_resolution": "resolution"}
    both = ("model", "frames_per_second", "max_frames", "time_resolution", "temperature", "max_attempts", "video_key")
    for asked in (here, there):
        assert {key: getattr(asked, renamed.get(key, key)) for key in both} == {key: options[key] for key in both}
        assert asked.seed == 23 and asked.vocabulary == annotations.vocabulary(config)
    assert (here.batch_size, here.num_workers) == (5, 2)
    assert (there.url, there.in_flight, there.timeout, there.use_grammar) == ("http://there:1/v1", 9, 11.0, True)


def test_the_demo_s_annotator_is_the_one_that_marked_validation_episodes_prefer():
    who = yaml.safe_load((ROOT / "params.yaml").read_text())["annotate"]["annotator"]
    agreed = json.loads((ROOT / "outputs/metrics/annotate.json").read_text())["agreement_with_marks"]
    for head, by_whom in agreed.items():
        shares = {name: by_whom[name]["frame_agreement"] for name in ("keyframes", "propagate")}
        assert shares[who] == max(shares.values()), head


def test_a_model_s_folder_is_found_from_the_notebooks_folder(in_project, monkeypatch):
    from sarm_lib.annotators import vlm

    config, dataset = in_project
    monkeypatch.setattr(vlm, "VlmAnnotator", lambda dataset, names, **asked: asked["model"])
    for model, expected in (("data/encoder", str(config.paths.root / "data/encoder")), ("user/name", "user/name")):
        settings = config.annotate.model_copy(update={"annotator": "vlm", "model": model, "visualize_only": False})
        assert annotators.from_params(config.model_copy(update={"annotate": settings}), dataset) == expected


def test_asked_anew_only_what_failed_is_asked_once_more(demos, tmp_path):
    annotators.run(Scripted({}, name="first"), demos, SPARSE, tmp_path)
    how = {"work": tmp_path, "skip_existing": False}
    done, failures = annotators.run(Scripted({5: "fails"}, name="second"), demos, SPARSE, **how)
    assert [f.episode for f in failures] == [5] and len(done) == 7
    third = Scripted({}, name="third")
    found, failures = annotators.run(third, demos, SPARSE, **how)
    assert third.asked == [5] and not failures and {a.annotator for a in found} == {"second", "third"}
    fourth = Scripted({}, name="fourth")
    annotators.run(fourth, demos, SPARSE, **how)
    assert len(fourth.asked) == 8, "all was answered: again means all of them"
    mark = Annotation(5, demos.episodes[5].length, "manual", (Segment("go", 0, demos.episodes[5].length - 1),), None)
    for settled in ({"allow_failed": True}, {"marks": [mark]}):  # the stage goes on, so that the next run begins anew
        for _ in range(2):
            stubborn = Scripted({5: "fails"})
            annotators.run(stubborn, demos, SPARSE, **how, **settled)
            assert len(stubborn.asked) == 8


def test_a_failed_episode_is_listed_with_its_reason_and_blocks(demos, tmp_path):
    done, failures = annotators.run(Scripted({5: "empty segment", 2: "fails", 3: "fails"}), demos, SPARSE, tmp_path)
    assert [a.episode for a in done] == [0, 1, 4, 6, 7] and [f.episode for f in failures] == [2, 3, 5]
    assert "no answer" in failures[0].reason and "zero length: 'go' (0 to -1)" in failures[2].reason
    with pytest.raises(
        AnnotationError, match=r"(?s)3 episodes are not annotated:.*episodes 2, 3: no answer.*episode 5: "
    ):
        annotators.require(failures, allowed=False)
    annotators.require(failures, allowed=True)


def test_what_a_failed_episode_was_asked_is_kept_until_it_is_annotated(demos, tmp_path):
    annotators.run(Scripted({2: "fails", 5: "empty segment"}), demos, SPARSE, tmp_path)
    files = sorted(tmp_path.glob("*/failed/*"))
    assert [path.name for path in files] == ["000002.json", "000005.json"]
    first = json.loads(files[0].read_text())
    assert first == {"episode": 2, "reason": "no answer", "provenance": {"prompt": "where?"}}
    again = Scripted({5: "fails"})
    annotators.run(again, demos, SPARSE, tmp_path)
    assert again.asked == [2, 5] and sorted(tmp_path.glob("*/failed/*")) == files[1:]


def test_a_mark_stands_in_for_an_annotation_that_failed_and_for_no_other(demos, tmp_path):
    marks = [
        Annotation(i, demos.episodes[i].length, "manual", (Segment("go", 0, demos.episodes[i].length - 1),), None)
        for i in (1, 2, 5)
    ]
    scripted = Scripted({2: "fails", 3: "fails", 5: "empty segment"})
    some = [e for e in demos.episodes if e.index != 5]
    done, failures = annotators.run(scripted, demos, SPARSE, tmp_path, episodes=some, marks=marks)
    assert [(a.episode, a.annotator) for a in done if a.annotator == "manual"] == [(2, "manual")]
    assert [a.episode for a in done] == [0, 1, 2, 4, 6, 7] and [f.episode for f in failures] == [3]
    again = Scripted({})
    annotators.run(again, demos, SPARSE, tmp_path, episodes=some)
    assert again.asked == [2, 3]  # the mark is no answer of the annotator's


def test_episodes_that_are_not_there_are_named(demos):
    assert [e.index for e in annotators.select(demos, [2, 0])] == [2, 0]
    assert annotators.select(demos, None) == list(demos.episodes)
    with pytest.raises(AnnotationError, match="no episode 99"):
        annotators.select(demos, [99])
    with pytest.raises(AnnotationError, match=r"annotate\.episodes: names no episode; null means all"):
        annotators.select(demos, [])
    with pytest.raises(params.ParamsError, match=r"annotate\.episodes: names no episode; null means all"):
        configured(episodes=[])


# --- who annotates, and who else ------------------------------------------------------------------------------------


def configured(**changes) -> params.Params:
    """The repository's parameters with other ones under `annotate`."""
    return params.load(ROOT / "params.yaml", {f"annotate.{key}": value for key, value in changes.items()})


def test_the_estimate_is_of_the_episodes_that_are_left(demos):
    asked = annotators.from_params(configured(annotator="server", dense_subtasks=["go", "stop"]), demos)
    every, few = (annotators.estimate(asked, demos.episodes[:n]) for n in (8, 2))
    assert "16 requests or more" in every and "4 requests or more" in few
    assert annotators.estimate(asked, []) == "nothing is left to annotate"
    looking = annotators.from_params(configured(annotator="server", visualize_only=True), demos)
    assert annotators.estimate(looking, demos.episodes) == "nothing is asked: annotate.visualize_only is set"
    assert annotators.estimate(Scripted({}), demos.episodes) == "seconds, no GPU"


def test_every_option_of_the_server_is_a_parameter(demos):
    options = {"server_grammar": True, "server_timeout": 5.0, "requests_in_flight": 3, "server_url": "http://x/v1"}
    made = annotators.from_params(configured(annotator="server", **options), demos)
    assert (made.use_grammar, made.timeout, made.in_flight, made.url) == (True, 5.0, 3, "http://x/v1")


@pytest.mark.parametrize("name", ["keyframes", "propagate", "server"])
def test_nobody_is_a_second_opinion_on_himself(name):
    with pytest.raises(params.ParamsError, match=rf"annotate\.second_opinion: {name} would agree .*annotate\.repeats"):
        configured(annotator=name, second_opinion=name)
    configured(annotator=name, second_opinion=None)
    configured(annotator=name, second_opinion="dataset")
    params.load(
        ROOT / "params.yaml",
        {
            "base.annotation_mode": "single_stage",
            "annotate.annotator": name,
            "annotate.second_opinion": name,
            "rabc.head_mode": "sparse",
        },
    )


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999), st.integers(0, 999), st.sampled_from(["propagate", "vlm", "server"]))
def test_two_seeds_share_neither_a_work_folder_nor_a_member_of_the_ensemble(seed, other, name):
    made, truth, embeddings = robot(episodes=3)
    made.__dict__["tasks"] = ["tidy up"]  # there is no file to read it from
    names = {"dense": NAMES["dense"]}
    mark = Annotation(0, truth[0][-1].end + 1, "manual", None, truth[0])
    build = {
        "propagate": lambda s: propagate.PropagateAnnotator(made, embeddings, [mark], names, s),
        "vlm": lambda s: VlmAnnotator(made, names, seed=s),
        "server": lambda s: ServerAnnotator(made, names, model="m", url="http://x/v1", seed=s),
    }[name]
    assert (build(seed).identity == build(other).identity) == (seed == other)
    members = [set(build(s).members) for s in (seed, other)] if name == "propagate" else [{seed}, {other}]
    assert members[0].isdisjoint(members[1]) == (seed != other)


def test_an_annotator_is_asked_again_with_other_seeds_where_they_matter(demos):
    values = {"annotator": "server", "second_opinion": "keyframes", "repeats": 2, "dense_subtasks": ["go", "stop"]}
    config = configured(**values, temperature=1.0)
    first, others = annotators.from_params(config, demos), annotators.opinions_from_params(config, demos)
    assert list(others) == ["keyframes", "server-seed-1", "server-seed-2"]
    seeds = [others[f"server-seed-{s}"].identity for s in (1, 2)]
    assert seeds == [{**first.identity, "seed": config.base.seed + s} for s in (1, 2)]
    assert list(annotators.opinions_from_params(configured(**values, temperature=0.0), demos)) == ["keyframes"]
    assert not annotators.opinions_from_params(configured(annotator="keyframes", second_opinion=None, repeats=3), demos)


def test_an_opinion_that_cannot_be_had_is_a_failure_of_each_episode_and_no_error(demos, tmp_path):
    config = configured(
        annotator="keyframes", second_opinion="dataset", sparse_subtasks=["go"], dense_subtasks=["go", "stop"]
    )
    second = annotators.opinions_from_params(config, demos)["dataset"]
    found, failures = annotators.run(second, demos, annotations.vocabulary(config), tmp_path)
    assert found == [] and [f.episode for f in failures] == list(range(8))
    assert {"carries no sparse labels" in f.reason for f in failures} == {True}
    assert "carries no sparse labels" in annotators.estimate(second, demos.episodes)

    class Breaks(Scripted):
        def annotate(self, episodes):
            yield from super().annotate(episodes[:3])
            raise AnnotationError("no server answers")

    second = annotators.Opinion("scripted", lambda: Breaks({}))
    found, failures = annotators.run(second, demos, SPARSE, tmp_path)
    assert [a.episode for a in found] == [0, 1, 2]
    assert [(f.episode, f.reason) for f in failures] == [(i, "no server answers") for i in range(3, 8)]
    config = configured(annotator="keyframes", second_opinion="dataset", visualize_only=True)
    assert isinstance(annotators.opinions_from_params(config, demos)["dataset"], annotators.Existing)


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


@pytest.mark.parametrize(
    "sparse", [["go", "come back"], ["go", "stop", "come back"], ["leave", "wait", "return", "rest"]]
)
def test_keyframes_of_two_heads_never_contradict_each_other(sparse):
    """Whichever head is the finer one."""
    names = {"sparse": sparse, "dense": NAMES["dense"]}
    made, truth, _ = robot()
    coarser, finer = ("dense", "sparse") if len(sparse) > len(NAMES["dense"]) else ("sparse", "dense")
    part_of = {}
    for annotation in keyframes.KeyframeAnnotator(made, names).annotate(made.episodes):
        annotations.validate(annotation, names, truth[annotation.episode][-1].end + 1)
        for segment in annotation.head(finer):
            (around,) = [s for s in annotation.head(coarser) if s.start <= segment.start and segment.end <= s.end]
            assert part_of.setdefault(segment.subtask, around.subtask) == around.subtask
    assert set(part_of.values()) == set(names[coarser])


@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_fine_subtasks_belong_to_coarse_ones_in_runs_that_share_the_most(seed, coarse, more):
    fine = coarse + more
    together = np.random.default_rng(seed).integers(0, 9, (fine, coarse)).astype(float)
    found = keyframes.in_runs(together)
    ways = [
        np.searchsorted(cuts, np.arange(fine), side="right")
        for cuts in itertools.combinations(range(1, fine), coarse - 1)
    ]
    assert any((found == way).all() for way in ways)
    rows = np.arange(fine)
    assert together[rows, found].sum() == max(together[rows, way].sum() for way in ways)


def test_keyframes_pass_over_an_episode_that_is_too_short_to_learn_from():
    made, _, _ = robot()
    names = {"dense": NAMES["dense"]}
    usual = list(keyframes.KeyframeAnnotator(made, names).annotate(made.episodes[1:]))
    first = made.episodes[0]
    for length in (1, 3, 5):
        cut = replace(made, episodes=(replace(first, length=length), *made.episodes[1:]))
        cut._read_vectors["observation.state"] = made.states
        found = list(keyframes.KeyframeAnnotator(cut, names).annotate(cut.episodes))
        assert [a.episode for a in found] == [e.index for e in made.episodes]
        annotations.validate(found[0], names, length)
        same = np.mean([a.dense == b.dense for a, b in zip(found[1:], usual)])
        assert same > 0.8  # the short episode counts in nothing but the standardisation
    short = replace(made, episodes=tuple(replace(e, length=5) for e in made.episodes))
    short._read_vectors["observation.state"] = made.states
    with pytest.raises(AnnotationError, match="no training episode has 6 frames, which 3 subtasks need"):
        list(keyframes.KeyframeAnnotator(short, names).annotate(short.episodes))


def test_what_a_fit_depends_on_names_its_work():
    """Training episodes and the state that is looked at: other ones, other answers, another folder."""
    made, truth, embeddings = robot()
    names = {"dense": NAMES["dense"]}
    mark = Annotation(0, truth[0][-1].end + 1, "manual", None, truth[0])
    moved = tuple(replace(e, split="val") if e.index == 4 else e for e in made.episodes)
    others = [
        replace(made, episodes=made.episodes[:-3]),
        replace(made, episodes=moved),
        replace(made, state_key="joints"),
    ]
    for build in (
        lambda d: keyframes.KeyframeAnnotator(d, names),
        lambda d: propagate.PropagateAnnotator(d, embeddings, [mark], names, 0),
    ):
        identities = [json.dumps(build(d).identity, sort_keys=True) for d in (made, *others)]
        assert len(set(identities)) == 4
        assert (
            build(replace(made, episodes=made.episodes[:-1])).identity == build(made).identity
        )  # one of val: no matter
    halved = replace(embeddings, cameras={k: v.astype(np.float16) for k, v in embeddings.cameras.items()})
    rounded = replace(halved, cameras={k: v.astype(np.float32) for k, v in halved.cameras.items()})
    known = [propagate.PropagateAnnotator(made, e, [mark], names, 0).identity for e in (embeddings, halved, rounded)]
    assert known[0] != known[1] != known[2] != known[0], "stored or encoded in another precision"


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
    doubts = [d for a in others for d in a.doubt["dense"]]
    assert min(doubts) >= 0 and max(doubts) <= 1 and np.median(doubts) < 0.2
    again = list(propagate.PropagateAnnotator(made, embeddings, marks, names, seed=0).annotate(made.episodes))
    assert again == found
    features, unmarked = annotator.features(), [e for e in made.episodes if e.index not in (0, 3, 5)]
    learned = annotator.learn(features)  # once, to be decoded in many ways, as the benchmark does
    looked_at = {e.index: propagate.predict(learned.ensemble, features[e.rows]) for e in unmarked}
    assert [annotator.decode(e, looked_at[e.index], learned) for e in unmarked] == others
    with pytest.MonkeyPatch.context() as patched:  # as sharp as the path is decoded, which is unmoved: surer of itself
        patched.setattr(propagate, "CAUTION", propagate.SHARPNESS)
        sharper = [annotator.decode(e, looked_at[e.index], learned) for e in unmarked]
    assert [a.dense for a in sharper] == [a.dense for a in others]
    assert np.mean([c for a in sharper for c in a.confidence["dense"]]) > np.mean(sure)


def test_what_turns_round_where_an_episode_is_rewound_are_the_velocities(monkeypatch):
    made, truth, embeddings = robot()
    names, given_to = {"dense": NAMES["dense"]}, []
    marks = [Annotation(i, truth[i][-1].end + 1, "manual", None, truth[i]) for i in (0, 3, 5)]
    annotator = propagate.PropagateAnnotator(made, embeddings, marks, names, seed=0)
    monkeypatch.setattr(propagate, "train", lambda examples, turns, states, seed: given_to.append((examples, turns)))
    features = annotator.features()
    annotator.learn(features)
    examples, turns = given_to[0]
    speeds = sequences.velocity(made, made.states.astype(float))
    assert turns.sum() == made.states.shape[1] and len(examples) == 3
    for turning, speed in zip(features[:, turns].T, speeds.T, strict=True):
        assert speed.std() < 1e-8 or np.corrcoef(turning, speed)[0, 1] > 0.999


@pytest.mark.parametrize("length", [40, 3 * propagate.WINDOW])
def test_marked_episodes_are_rewound_as_often_as_is_said(length):
    """Long ones as well, of which parts are learned from."""
    rng, place = np.random.default_rng(0), np.arange(length)
    seen = [propagate._seen(place[:, None].astype(np.float32), place, np.array([False]), rng)[1] for _ in range(500)]
    assert abs(np.mean([(np.diff(frames.numpy()) < 0).any() for frames in seen]) - propagate.REWIND) < 0.06


def test_of_a_long_episode_parts_are_learned_from_and_every_frame_as_often_as_the_others():
    """Its frames in their order, at most as many as `WINDOW`."""
    rng, length, times = np.random.default_rng(0), 3 * propagate.WINDOW, 2000
    place, seen = np.arange(length), np.zeros(length)
    with mock.patch.object(propagate, "REWIND", 0.0):
        for _ in range(times):
            features, labels = propagate._seen(place[:, None].astype(np.float32), place // 100, np.array([False]), rng)
            frames = features[:, 0].numpy().astype(int)
            assert 0 < len(frames) == len(labels) <= propagate.WINDOW and (labels.numpy() == frames // 100).all()
            assert (np.diff(frames) == 1).all()
            seen[frames] += 1
    share = propagate.WINDOW / (length + propagate.WINDOW - 1)
    assert np.abs(seen / times - share).max() < 5 * (share * (1 - share) / times) ** 0.5


def test_the_estimate_of_propagate_knows_how_much_is_marked():
    made, truth, embeddings = robot()
    marks = [Annotation(i, truth[i][-1].end + 1, "manual", None, truth[i]) for i in (0, 1)]
    names = {"dense": NAMES["dense"]}
    few = propagate.PropagateAnnotator(made, embeddings, marks, names, 0)
    assert few.estimate(made.episodes) == "seconds, no GPU"
    few.marks = [replace(mark, length=2700) for mark in marks * 4]
    assert few.estimate(made.episodes) == "about 4 min on one core, no GPU"
    assert annotators.estimate(few, made.episodes) == few.estimate(made.episodes)


def test_keyframes_of_a_large_dataset_take_minutes_and_marks_are_as_many_as_there_are():
    made, truth, _ = robot()
    many = keyframes.KeyframeAnnotator(made, {"dense": NAMES["dense"]})
    assert annotators.estimate(many, made.episodes) == "seconds, no GPU"
    many.dataset = SimpleNamespace(num_frames=2_700_000)
    assert annotators.estimate(many, made.episodes) == "about 4 min on one core, no GPU"
    mark = Annotation(3, truth[3][-1].end + 1, "manual", None, truth[3])
    assert annotators.estimate(annotators.Manual([mark]), made.episodes).startswith("1 of these are marked")


def test_splits_of_which_nothing_is_annotated_are_said():
    made, truth, _ = robot()
    given = [Annotation(e.index, e.length, "x", None, truth[e.index]) for e in made.split("train")]
    held_out = {name: [e.index for e in made.split(name)] for name in ("val", "test") if made.split(name)}
    said = annotators.annotated_splits(given, made)
    assert said.startswith(f"annotated: {len(given)} of {len(given)} train, 0 of ")
    assert ("val (03 needs one)" in said, "test (04 judges by these)" in said) == (
        "val" in held_out,
        "test" in held_out,
    )
    everything = [Annotation(e.index, e.length, "x", None, truth[e.index]) for e in made.episodes]
    assert "(" not in annotators.annotated_splits(everything, made)


def test_a_mark_without_a_head_is_named():
    made, truth, embeddings = robot()
    mark = Annotation(3, truth[3][-1].end + 1, "manual", None, truth[3])
    with pytest.raises(AnnotationError, match="nothing is marked for the sparse head of episode 3"):
        propagate.PropagateAnnotator(made, embeddings, [mark], NAMES, 0)


@given(st.integers(2, 300), st.integers(0, 999))
def test_a_rewound_episode_goes_frame_by_frame_to_its_end(length, seed):
    order, backwards = propagate.rewound(length, np.random.default_rng(seed))
    assert order[0] == 0 and order[-1] == length - 1 and set(order) == set(range(length))
    assert (np.diff(order) == np.where(backwards[1:], -1, 1)).all()
    assert 1 <= backwards.sum() <= length // 2 and len(order) == length + 2 * backwards.sum()


@given(st.integers(2, 60), st.integers(0, 999))
def test_what_is_learned_of_a_rewound_episode_is_what_its_frames_show(length, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, length)
    features = np.stack([np.arange(length), np.ones(length)], axis=1).astype(np.float32)  # a place, a speed
    with mock.patch.object(propagate, "REWIND", 1.0):
        seen, learned = propagate._seen(features, labels, np.array([False, True]), rng)
    place, speed = seen.numpy().astype(int).T
    assert len(place) > length and (learned.numpy() == labels[place]).all()
    assert (np.diff(place) == speed[1:]).all() and speed[0] == 1


def test_a_mark_of_a_single_frame_is_learned_as_it_is():
    seen, learned = propagate._seen(np.ones((1, 2), np.float32), np.zeros(1, int), np.array([False, True]), mock.Mock())
    assert seen.shape == (1, 2) and len(learned) == 1


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


@settings(max_examples=200)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 40), st.integers(0, 5))
def test_ends_that_are_the_next_ones_first_frames_become_last_frames(lengths, beyond, gap):
    """Whether a tool writes the last frame or the one after it, the same frames are meant."""
    edges = np.cumsum([0, *(n + 1 for n in lengths)]).tolist()  # two frames a segment at least
    closed = tuple(Segment("go", a, b - 1) for a, b in itertools.pairwise(edges))
    opened = [Segment("go", a, b) for a, b in itertools.pairwise(edges)]
    opened[-1] = replace(opened[-1], end=edges[-1] + beyond)
    assert recorded._closed(opened, edges[-1]) == closed
    assert recorded._closed(list(closed), edges[-1]) == closed
    apart = [replace(s, end=max(s.start, s.end - gap)) for s in closed]  # gaps are for the gate to judge
    assert recorded._closed(apart, edges[-1]) == tuple(apart)


@settings(max_examples=200)
@given(st.data(), st.booleans(), st.booleans())
def test_a_row_that_cannot_be_read_is_a_failure_of_its_episode_alone(data, times, prefixed):
    """A value too few or too many, or one that is no number or name; whatever the row, the others are read."""
    prefix, suffix = "sparse_" if prefixed else "", "times" if times else "frames"
    bounds = [f"{prefix}subtask_{end}_{suffix}" for end in ("start", "end")]
    rows = [
        {
            "episode_index": i,
            "length": 20,
            f"{prefix}subtask_names": ["go", "come back"],
            bounds[0]: [0, (i + 5) / (10 if times else 1)],
            bounds[1]: [(i + 4) / (10 if times else 1), 1.9 if times else 19],
        }
        for i in range(4)
    ]

    def read():
        table = pd.DataFrame([{k: np.array(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows])
        return recorded._episode_columns(SimpleNamespace(table=table, fps=10), "sparse")

    assert read() == {i: (Segment("go", 0, i + 4), Segment("come back", i + 5, 19)) for i in range(4)}
    bad, column = data.draw(st.integers(0, 3)), data.draw(st.sampled_from([*bounds, f"{prefix}subtask_names"]))
    values = rows[bad][column]
    if column in bounds:
        odd = st.sampled_from([None, float("nan"), float("inf"), "0"])
        changed = odd.map(lambda value: [values[0], value]) | st.sampled_from([values[:1], [*values, 3], [], None])
    else:
        changed = st.sampled_from([values[:1], [*values, "go"], ["go", None]])
    rows[bad][column] = data.draw(changed)
    found = read()
    assert [i for i in range(4) if isinstance(found[i], Failure)] == [bad] and found[bad].episode == bad
    assert found[bad].reason.startswith(f"episode {bad}, {prefix}subtask_")
    assert column in found[bad].reason and "correct it in the dataset, or mark the episode" in found[bad].reason


def test_what_lerobots_own_annotation_tool_writes_is_valid(demos, tmp_path):
    import shutil

    from lerobot.data_processing.sarm_annotations import subtask_annotation as tool

    root = shutil.copytree(demos.root, tmp_path / "d")
    said = {
        e.index: tool.SubtaskAnnotation(
            subtasks=[
                tool.Subtask(name="go", timestamps=tool.Timestamp(start="00:00", end="00:01")),
                tool.Subtask(name="come back", timestamps=tool.Timestamp(start="00:01", end="00:02")),
            ]
        )
        for e in demos.episodes
    }
    tool.save_annotations_to_dataset(root, said, demos.fps, "sparse")
    carried = open_dataset(root)
    work = tmp_path / "work"
    found, failures = annotators.run(recorded.RecordedAnnotator(carried, SPARSE), carried, SPARSE, work)
    assert not failures
    for annotation, episode in zip(found, demos.episodes):
        assert annotation.sparse == (Segment("go", 0, 9), Segment("come back", 10, episode.length - 1))
    said[3].subtasks[0].timestamps.end = "00:02"  # this overlaps
    tool.save_annotations_to_dataset(root, said, demos.fps, "sparse")
    carried = open_dataset(root)
    _, failures = annotators.run(recorded.RecordedAnnotator(carried, SPARSE), carried, SPARSE, work)
    assert [f.episode for f in failures] == [3]
    assert "overlap: 'come back' (10 to 19) starts inside" in failures[0].reason


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
    carried.table["sparse_subtask_end_frames"] = None  # nothing can be read: that is no lack of labels
    results = list(recorded.RecordedAnnotator(carried, SPARSE).annotate(carried.episodes))
    reasons = [result.reason.split(":")[0] for result in results if result.episode != 2]
    assert reasons[0] == "episode 0, sparse_subtask_end_frames has 0 values, and sparse_subtask_names 2"
    assert len(set(reasons)) == 7


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

    episode = np.asarray(table["episode_index"])
    rows = [[said("go", 0.0), said("come back", None if index == 2 else 0.6)] for index in episode]
    info = json.loads((root / "meta/info.json").read_text())
    info["features"] |= language_feature_info()
    (root / "meta/info.json").write_text(json.dumps(info))
    assert set(rows[0][0]) == set(PERSISTENT_ROW_FIELDS)
    column = pa.array(rows)
    pq.write_table(table.append_column(LANGUAGE_PERSISTENT, column), path)
    opened = open_dataset(root)
    first, _, timeless, *others = recorded.RecordedAnnotator(opened, SPARSE).annotate(opened.episodes)
    assert first.sparse == (Segment("go", 0, 5), Segment("come back", 6, 13))
    assert timeless.reason.startswith("episode 2, language_persistent.timestamp has None, which is no finite number")
    assert all(isinstance(other, Annotation) for other in others)

    info["features"] = {k: v for k, v in info["features"].items() if not k.startswith("language")}
    info["features"]["subtask_index"] = {"dtype": "int64", "shape": (1,), "names": None}
    (root / "meta/info.json").write_text(json.dumps(info))
    index = (np.asarray(table["frame_index"]) >= 6).astype(np.int64)
    index[np.flatnonzero(episode == 4)[7]] = 5
    pq.write_table(table.append_column("subtask_index", pa.array(index)), path)
    names = pa.table({"subtask_index": [0, 1], "subtask": ["go", "come back"]})
    pq.write_table(names, root / "meta/subtasks.parquet")
    opened = open_dataset(root)
    second = list(recorded.RecordedAnnotator(opened, SPARSE).annotate(opened.episodes))
    assert second[0].sparse == first.sparse
    assert [result.episode for result in second if isinstance(result, Failure)] == [4]
    said = "episode 4, subtask_index is 5 at frame 7, which meta/subtasks.parquet does not name: correct it"
    assert second[4].reason.startswith(said)


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


def test_looking_at_some_episodes_takes_no_annotation_away(tmp_path, tiny, tiny_encoder):
    project = make_project(tmp_path / "p", tiny, tiny_encoder)

    def say(**settings) -> None:  # in params.yaml: what is overridden lands in a folder of its own
        file = project / "params.yaml"
        content = yaml.safe_load(file.read_text())
        content["annotate"] |= settings
        file.write_text(yaml.safe_dump(content, sort_keys=False))

    say(annotator="keyframes", second_opinion=None)
    run_notebook(project, "00_prepare")
    run_notebook(project, "01_annotate")
    folder = project / "outputs/annotations"
    stored = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(stored) == 8
    say(visualize_only=True, episodes=[0, 3])
    assert [a.episode for a in run_notebook(project, "01_annotate")["annotated"]] == [0, 3]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == stored
