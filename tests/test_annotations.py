"""The validator, the files, and LeRobot's columns."""

import itertools
import json
import shutil
from dataclasses import asdict, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sarm_lib import annotations
from sarm_lib.annotations import Annotation, AnnotationError, Segment
from sarm_lib.dataset import open_dataset
from sarm_lib.lerobot_io import read_labels, write_annotated_dataset
from tests.conftest import ROOT, make_dataset

NAMES = {"sparse": ["reach", "grasp"]}


def annotation(*segments: Segment, length: int = 20) -> Annotation:
    return Annotation(7, length, "test", segments, None)


@pytest.mark.parametrize(
    ("segments", "rule"),
    [
        ([Segment("grab", 0, 19)], "vocabulary: unknown subtask 'grab' (0 to 19); known are reach, grasp"),
        ([Segment("reach", 0, 20)], "bounds: 'reach' (0 to 20) leaves the episode's 20 frames"),
        ([Segment("reach", -1, 18)], "bounds: 'reach' (-1 to 18) leaves the episode's 20 frames"),
        ([Segment("reach", 6, 5), Segment("reach", 7, 19)], "zero length: 'reach' (6 to 5) has no duration"),
        ([Segment("reach", 0, 0), Segment("grasp", 1, 19)], "zero length: 'reach' (0 to 0) has no duration"),
        ([Segment("reach", 0, 9), Segment("grasp", 9, 19)], "overlap: 'grasp' (9 to 19) starts inside 'reach'"),
        ([Segment("grasp", 10, 19), Segment("reach", 0, 9)], "order: 'reach' (0 to 9) stands after 'grasp'"),
        ([Segment("reach", 0, 9)], "coverage: only 10 of 20 frames lie in a segment, at least 80% have to"),
        ([], "coverage: no segment"),
    ],
)
def test_a_broken_rule_names_episode_subtask_and_rule(segments, rule):
    with pytest.raises(AnnotationError) as error:
        annotations.validate(annotation(*segments), NAMES)
    assert f"episode 7, sparse, {rule}" in str(error.value)


def test_every_broken_rule_is_named_at_once_and_another_length_too():
    bad = annotation(Segment("fly", 0, 30), Segment("reach", 25, 19))
    rules = {finding.rule for finding in annotations.violations(bad, NAMES)}
    assert rules == {"vocabulary", "bounds", "zero length", "overlap"}
    good = annotation(Segment("reach", 0, 9), Segment("grasp", 10, 19))
    annotations.validate(good, NAMES, length=20)
    with pytest.raises(AnnotationError, match="made for 20 frames, the episode has 21"):
        annotations.validate(good, NAMES, length=21)


def test_what_the_annotation_mode_does_not_have_and_negative_episodes_are_refused():
    good = annotation(Segment("reach", 0, 9), Segment("grasp", 10, 19))
    broken = {
        "dense, vocabulary: has segments": replace(good, dense=(Segment("garbage", -5, 99),)),
        "nonsense, confidence: is of no head": replace(good, confidence={"nonsense": (0.5, 0.5)}),
        "dense, confidence: is of no head": replace(good, confidence={"dense": ()}),
        "sparse, confidence: needs one value": replace(good, confidence={"sparse": (0.5,)}),
        "sparse, doubt: needs one value": replace(good, doubt={"sparse": (0.5,)}),
        "bounds: episodes are numbered from 0": replace(good, episode=-5),
    }
    for message, bad in broken.items():
        with pytest.raises(AnnotationError, match=message):
            annotations.validate(bad, NAMES, length=20)


def test_a_subtask_may_recur_and_an_episode_may_end_early():
    annotations.validate(annotation(Segment("grasp", 0, 9), Segment("reach", 10, 14), Segment("grasp", 15, 19)), NAMES)
    annotations.validate(annotation(Segment("reach", 0, 19)), NAMES)


def test_a_head_that_the_mode_needs_must_be_there():
    with pytest.raises(AnnotationError, match="dense, coverage: no segment"):
        annotations.validate(annotation(Segment("reach", 0, 19)), {**NAMES, "dense": ["reach"]})


leaves = st.none() | st.booleans() | st.integers(-30, 30) | st.floats() | st.sampled_from(["reach", "grasp", "fly", ""])
junk = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
segment = st.fixed_dictionaries(
    {
        "subtask": st.sampled_from(["reach", "grasp", "fly"]) | junk,
        "start": st.integers(-3, 25) | junk,
        "end": st.integers(-3, 25) | junk,
    }
)
near = st.fixed_dictionaries(
    {
        "episode": st.integers(-3, 9) | junk,
        "length": st.just(20) | junk,
        "annotator": st.just("x") | junk,
        "sparse": st.lists(segment, max_size=4) | junk,
        "dense": st.none() | st.lists(segment, max_size=2) | junk,
    },
    optional={
        key: st.none()
        | st.dictionaries(st.sampled_from(["sparse", "dense", "nonsense"]), st.lists(st.floats(-1, 2), max_size=4))
        | junk
        for key in ("confidence", "doubt")
    }
    | {
        "more": junk,
    },
)


@settings(max_examples=6000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(near.map(json.dumps), junk.map(json.dumps), st.text(), st.binary()))
def test_whatever_a_file_holds_it_is_refused_or_valid(text):
    try:
        read = annotations.parse(text, NAMES, length=20)
    except AnnotationError as error:
        assert str(error)
        return
    bounds = [x for s in read.sparse for x in (s.start, s.end)]
    assert bounds == sorted(set(bounds)) and bounds[0] >= 0 and bounds[-1] < 20
    assert {s.subtask for s in read.sparse} <= set(NAMES["sparse"])
    assert sum(s.end - s.start + 1 for s in read.sparse) >= 16 and read.length == 20
    assert read.episode >= 0 and read.dense is None
    for head, values in (*(read.confidence or {}).items(), *(read.doubt or {}).items()):
        assert head == "sparse" and len(values) == len(read.sparse) and all(0 <= v <= 1 for v in values)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES["sparse"]), st.integers(2, 9)), min_size=1, max_size=8))
def test_what_is_valid_is_accepted_and_survives_its_file(parts):
    edges = list(itertools.accumulate((n for _, n in parts), initial=0))
    segments = tuple(Segment(name, a, b - 1) for (name, _), a, b in zip(parts, edges, edges[1:]))
    whole = Annotation(7, edges[-1], "x", segments, None, {"sparse": (0.5,) * len(parts)}, {"seed": 1})
    assert annotations.parse(json.dumps(asdict(whole)), NAMES, edges[-1]) == whole


def test_the_documented_example_is_valid_and_the_schema_is_the_codes():
    import jsonschema

    text = (ROOT / "docs/annotations.md").read_text()
    example, schema = (block.split("```")[0] for block in text.split("```json\n")[1:3])
    names = {
        "sparse": ["pick up the nut", "place the nut on the peg"],
        "dense": ["reach the nut handle", "grasp the nut"],
    }
    annotations.parse(example, names)
    assert json.loads(schema) == annotations.json_schema()
    jsonschema.validate(json.loads(example), json.loads(schema))


def test_files_are_read_back_as_they_were_written(tmp_path):
    written = [annotation(Segment("reach", 0, 4), Segment("grasp", 5, 19))]
    annotations.save(tmp_path / "a", written, NAMES)
    assert annotations.load(tmp_path / "a", NAMES) == written


def test_a_file_that_is_not_named_after_an_episode_is_said(tmp_path):
    annotations.save(tmp_path / "a", [annotation(Segment("reach", 0, 19))], NAMES)
    text = (tmp_path / "a/000007.json").read_text()
    for name in ("000007 (1).json", "7.json", "7a.json"):
        (tmp_path / "a" / name).write_text(text)
        with pytest.raises(AnnotationError) as error:
            annotations.load(tmp_path / "a", NAMES)
        assert f"{name}: files in a are named after their episode, such as 000003.json" in str(error.value)
        (tmp_path / "a" / name).unlink()
    assert len(annotations.load(tmp_path / "a", NAMES)) == 1


def test_an_invalid_annotation_is_never_stored(tmp_path):
    with pytest.raises(AnnotationError):
        annotations.save(tmp_path / "a", [annotation(Segment("reach", 0, 4)), annotation(Segment("fly", 0, 4))], NAMES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("files", [1, 2])
def test_lerobot_opens_the_annotated_dataset_and_every_row_is_the_right_episode_s(tmp_path, files):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = open_dataset(make_dataset(tmp_path / "source", files=files))
    if files > 1:
        assert len(list(dataset.root.glob("meta/episodes/**/*.parquet"))) > 1
    written = [
        Annotation(
            e.index,
            e.length,
            "test",
            (Segment("reach", 0, e.index + 1), Segment("grasp", e.index + 2, e.length - 1)),
            None,
        )
        for e in dataset.episodes
        if e.index != 3  # partly annotated is fine
    ]
    write_annotated_dataset(dataset, written, {"sparse": {"reach": 0.4, "grasp": 0.6}}, tmp_path / "target")
    opened = LeRobotDataset("test/target", root=tmp_path / "target", video_backend="pyav")
    assert len(opened) == dataset.num_frames
    media = [path for path in (tmp_path / "target").rglob("*") if path.is_file() and "meta" not in path.parts]
    assert media and all(path.is_symlink() for path in media)  # nothing is copied
    from huggingface_hub import HfApi

    uploads = HfApi()._prepare_upload_folder_additions(str(tmp_path / "target"), path_in_repo="")
    assert {str(path.relative_to(tmp_path / "target")) for path in media} < {u.path_in_repo for u in uploads}
    rows = opened.meta.episodes
    for i, row in enumerate(rows):
        expected = None if i == 3 else [0, i + 2]
        assert row["sparse_subtask_start_frames"] == row["subtask_start_frames"] == expected
        if i != 3:
            assert row["sparse_subtask_end_times"] == [(i + 1) / 10, (dataset.episodes[i].length - 1) / 10]
    labels = read_labels(tmp_path / "target", open_dataset(tmp_path / "target"), ("sparse",))
    assert labels.annotated == {0, 1, 2, 4, 5, 6, 7} and labels.stage_names == {"sparse": ["reach", "grasp"]}


def test_a_subtask_that_the_proportions_do_not_know_is_named_with_its_episode(tmp_path, project):
    copy = shutil.copytree(project / "outputs/dataset", tmp_path / "dataset")
    path = copy / "meta/temporal_proportions_dense.json"
    path.write_text(path.read_text().replace("cross the middle", "stay in the middle"))
    with pytest.raises(
        ValueError, match=r"episode \d+: dense subtask 'cross the middle' is not one of leave the edge, stay in"
    ):
        read_labels(copy, open_dataset(project / "data/tiny"), ("sparse", "dense"))
