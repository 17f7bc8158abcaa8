"""The validator, the files, and LeRobot's columns."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sarm_lib import annotations
from sarm_lib.annotations import Annotation, AnnotationError, Segment
from sarm_lib.dataset import open_dataset
from sarm_lib.lerobot_io import read_labels, write_annotated_dataset
from tests.conftest import make_dataset

NAMES = {"sparse": ["reach", "grasp"]}


def annotation(*segments: Segment, length: int = 20) -> Annotation:
    return Annotation(7, length, "test", segments, None)


@pytest.mark.parametrize(
    ("segments", "rule"),
    [
        ([Segment("grab", 0, 19)], "unknown subtask 'grab'; known are reach, grasp"),
        ([Segment("reach", 0, 20)], "leaves the episode's 20 frames"),
        ([Segment("reach", -1, 5)], "leaves the episode's 20 frames"),
        ([Segment("reach", 6, 5)], "before it starts at 6"),
        ([Segment("reach", 0, 9), Segment("grasp", 9, 19)], "'grasp' starts at 9, inside the segment before it"),
        ([], "no segment"),
    ],
)
def test_a_broken_rule_names_episode_and_subtask(segments, rule):
    with pytest.raises(AnnotationError) as error:
        annotations.validate(annotation(*segments), NAMES)
    assert rule in str(error.value) and "episode 7, sparse" in str(error.value)


@given(
    st.lists(
        st.tuples(st.sampled_from(["reach", "grasp", "fly"]), st.integers(-3, 25), st.integers(-3, 25)), max_size=5
    )
)
def test_whatever_passes_is_in_order_in_bounds_and_known(raw):
    segments = [Segment(*values) for values in raw]
    try:
        annotations.validate(annotation(*segments), NAMES)
    except AnnotationError:
        return
    bounds = [x for s in segments for x in (s.start, s.end)]
    assert bounds == sorted(bounds) and bounds[0] >= 0 and bounds[-1] < 20
    assert all(a.end < b.start for a, b in itertools.pairwise(segments))
    assert {s.subtask for s in segments} <= set(NAMES["sparse"])


def test_files_are_read_back_as_they_were_written(tmp_path):
    written = [annotation(Segment("reach", 0, 4), Segment("grasp", 5, 19))]
    annotations.save(tmp_path / "a", written, NAMES)
    assert annotations.load(tmp_path / "a", NAMES) == written


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
    assert (tmp_path / "target/videos").is_symlink() and len(opened) == dataset.num_frames
    rows = opened.meta.episodes
    for i, row in enumerate(rows):
        expected = None if i == 3 else [0, i + 2]
        assert row["sparse_subtask_start_frames"] == row["subtask_start_frames"] == expected
        if i != 3:
            assert row["sparse_subtask_end_times"] == [(i + 1) / 10, (dataset.episodes[i].length - 1) / 10]
    labels = read_labels(tmp_path / "target", open_dataset(tmp_path / "target"), ("sparse",))
    assert labels.annotated == {0, 1, 2, 4, 5, 6, 7} and labels.stage_names == {"sparse": ["reach", "grasp"]}
