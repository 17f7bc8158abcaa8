"""Opening datasets: LeRobot's own frames and columns, and errors that say what to do."""

import json
import shutil
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sarm_lib.dataset import (
    DatasetError,
    _keep,
    _splits,
    few_held_out,
    files_in,
    fingerprint,
    open_dataset,
    split_summary,
    suggest_frame_gap,
)
from tests.conftest import CAMERAS, LENGTHS, TASKS, make_dataset


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


@pytest.fixture(scope="module", params=["videos", "images", "many_files"])
def kind_of_dataset(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param) / "dataset"
    return make_dataset(root, use_videos=request.param != "images", files=2 if request.param == "many_files" else 1)


def test_frames_states_and_tasks_are_lerobot_s_own(kind_of_dataset):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    theirs = LeRobotDataset("test/tiny", root=kind_of_dataset, video_backend="pyav")
    ours = open_dataset(kind_of_dataset)
    assert ours.num_frames == len(theirs) == sum(LENGTHS)
    assert ours.camera_keys == list(CAMERAS) == theirs.meta.camera_keys
    for key in CAMERAS:
        for i, (episode, image) in enumerate(ours.iterate_frames(key)):
            item = theirs[i]
            assert item["episode_index"] == episode.index
            np.testing.assert_array_equal(image, (item[key] * 255).round().byte().permute(1, 2, 0).numpy())
    items = [theirs[i] for i in range(len(theirs))]
    np.testing.assert_array_equal(ours.states, np.stack([item["observation.state"] for item in items]))
    np.testing.assert_array_equal(ours.actions, np.stack([item["action"] for item in items]))
    assert [ours.tasks[i] for i in ours.frames.task_index] == [item["task"] for item in items]
    assert ours.tasks == list(TASKS)


def test_single_frames_are_those_of_the_iteration(kind_of_dataset):
    dataset = open_dataset(kind_of_dataset)
    episode = dataset.episodes[4]
    every = [image for e, image in dataset.iterate_frames(CAMERAS[0]) if e is episode]
    np.testing.assert_array_equal(
        dataset.read_frames(episode, CAMERAS[0], [9, 0, 9]), np.stack([every[9], every[0], every[9]])
    )


def test_splits_are_the_dataset_s_own_or_drawn(copy):
    drawn = open_dataset(copy, val_fraction=0.25, test_fraction=0.25, seed=1)
    assert [len(drawn.split(s)) for s in ("train", "val", "test")] == [4, 2, 2]
    info = json.loads((copy / "meta/info.json").read_text())
    info["splits"] = {"train": "0:5", "val": "5:6", "test": "6:8"}
    (copy / "meta/info.json").write_text(json.dumps(info))
    assert [e.index for e in open_dataset(copy).split("test")] == [6, 7]


@pytest.mark.parametrize("share", [0.1, 0.15, 0.25])
def test_an_appended_episode_moves_no_other_one_to_another_split(share):
    groups = np.random.default_rng(0).choice(["stack", "sort"], 60).tolist()

    def drawn(count):
        return _splits({}, groups[:count], share, share, 3)

    for count in range(30, 60):
        now, grown = drawn(count), drawn(count + 1)
        assert grown[:count] == now
        for group in ("stack", "sort"):  # each is held out in proportion
            mine = [split for split, name in zip(now, groups) if name == group]
            assert all(abs(mine.count(split) - share * len(mine)) <= 1 for split in ("val", "test"))
    assert set(_splits({}, ["all"] * 3, share, share, 3)) == {"train", "val", "test"}  # fewer than a run has
    with pytest.raises(DatasetError, match=r"2 episode\(s\) are too few: one each is needed to train on"):
        _splits({}, ["all"] * 2, 0.5, 0.5, 0)
    with pytest.raises(DatasetError, match="of 4 episodes they leave none to train on"):
        _splits({}, ["all"] * 4, 0.5, 0.5, 0)


def test_what_is_only_shown_does_not_move_the_splits(copy):
    path = next((copy / "meta/episodes").rglob("*.parquet"))
    table = pq.read_table(path)
    kinds = pa.array([["a", "b", "c"][i % 3] for i in range(len(table))])
    pq.write_table(table.append_column("sim.kind", kinds), path)
    plain, shown = open_dataset(copy), open_dataset(copy, group_key="sim.kind")
    assert [e.split for e in plain.episodes] == [e.split for e in shown.episodes]
    assert {e.group for e in shown.episodes} == {"a", "b", "c"}


def test_several_tasks_are_the_kinds_of_a_dataset_that_names_none(tiny):
    dataset = open_dataset(tiny)
    assert {e.group for e in dataset.episodes} == set(TASKS)
    episode = dataset.episodes[0]
    assert episode.group == dataset.tasks[dataset.frames.task_index[episode.row]]
    assert episode.title == f"episode 0 ({episode.group})"


@pytest.mark.parametrize("text", ["", None])
def test_a_task_without_a_text_is_an_error_that_names_an_episode(copy, text):
    path = copy / "meta/tasks.parquet"
    tasks = pd.read_parquet(path)
    lost = tasks.index[tasks.task_index == 1][0]
    (tasks.drop(lost) if text is None else tasks.rename(index={lost: ""})).to_parquet(path)
    with pytest.raises(DatasetError, match=r"episode \d+: meta/tasks.parquet has no text for its task, number 1"):
        open_dataset(copy)


def test_few_held_out_episodes_are_said(tiny):
    dataset = open_dataset(tiny, val_fraction=0.25, test_fraction=0.25)
    assert few_held_out(dataset).startswith("val has 2 and test has 2 episode(s)")
    assert few_held_out(dataset, 2) == ""


def test_some_episodes_only(tiny):
    whole, some = open_dataset(tiny), open_dataset(tiny, max_episodes=4)
    assert {e.split for e in some.episodes} == {"train", "val", "test"} and len(some.episodes) == 4
    for episode in some.episodes:
        np.testing.assert_array_equal(some.states[episode.rows], whole.states[whole.episodes[episode.index].rows])
        assert whole.frames["index"][whole.episodes[episode.index].row] == episode.start


@pytest.mark.parametrize("limit", [1, 3, 4, 10, 57, 144, 145, 1000])
def test_so_many_episodes_and_no_other_number(limit):
    splits = ["train"] * 80 + ["val"] * 25 + ["test"] * 40
    kept = _keep(splits, limit)
    assert len(set(kept)) == len(kept) == min(max(limit, 3), 145) and kept == sorted(kept)
    count = Counter(splits[i] for i in kept)
    for name, size in Counter(splits).items():
        assert abs(count[name] - len(kept) * size / 145) <= 1
    assert _keep(["train", "test"] * 3, 3) == [0, 1, 2]


def test_images_are_read_once_and_in_the_order_of_the_episodes_that_were_asked_for(tmp_path, monkeypatch):
    root = make_dataset(tmp_path / "d", use_videos=False)
    path = next(root.glob("data/**/*.parquet"))
    pq.write_table(pq.read_table(path), path, row_group_size=25)  # as tools other than LeRobot write it
    dataset = open_dataset(root)
    every = list(dataset.iterate_frames(CAMERAS[0]))
    opened, file = [], pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda path: opened.append(path) or file(path))
    some = tuple(dataset.episodes[i] for i in (1, 2, 5, 0, 4))
    found = list(dataset.iterate_frames(CAMERAS[0], some))
    assert len(opened) == 2, "1, 2, 5 in one go, and 0, 4 in another"
    expected = [(e.index, every[row][1]) for e in some for row in range(e.row, e.row + e.length)]
    assert [e.index for e, _ in found] == [index for index, _ in expected]
    for (_, image), (_, wanted) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(image, wanted)


def test_the_summary_of_the_splits_names_who_is_in_which(copy):
    drawn = split_summary(open_dataset(copy))
    assert drawn.keys() == {"train", "val", "test", "digest"} and drawn["train"] == 6
    info = json.loads((copy / "meta/info.json").read_text())
    found = []
    for splits in ({"train": "0:6", "val": "6:7", "test": "7:8"}, {"train": "0:6", "test": "6:7", "val": "7:8"}):
        (copy / "meta/info.json").write_text(json.dumps({**info, "splits": splits}))
        found.append(split_summary(open_dataset(copy)))
    assert found[0]["digest"] != found[1]["digest"] and {**found[0], "digest": ""} == {**found[1], "digest": ""}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"image_keys": ["observation.images.font"]}, "it has observation.images.top, observation.images.side"),
        ({"state_key": "observation.images.top"}, "its vectors are observation.state, action"),
        ({"state_key": "sim.progress"}, "its vectors are observation.state, action"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "they leave none to train on"),
        ({"state_key": "observation.joints"}, "its vectors are observation.state, action"),
        ({"group_key": "mood"}, "no column 'mood'"),
    ],
)
def test_a_wrong_name_is_answered_with_those_that_exist(tiny, options, expected):
    with pytest.raises(DatasetError) as error:
        open_dataset(tiny, **options)
    assert expected in str(error.value)


@pytest.mark.parametrize("splits", [{"train": "0:6", "val": "6:8"}, {"train": "0:6", "validation": "6:8"}])
def test_own_splits_that_cannot_be_used_are_an_error_and_not_drawn_again(copy, splits):
    info = json.loads((copy / "meta/info.json").read_text())
    (copy / "meta/info.json").write_text(json.dumps({**info, "splits": splits}))
    with pytest.raises(DatasetError, match="needed are train, val, test"):
        open_dataset(copy)


@pytest.mark.parametrize(
    "splits",
    [
        {"train": "0:5", "val": "5:6", "test": "6:9"},  # more than there are, as after an episode was deleted
        {"train": "0:5", "val": "5:6", "test": "7:8"},  # one is in none
        {"train": "0:6", "val": "5:6", "test": "6:8"},  # one is in two
        {"train": "0:7", "val": "7:7", "test": "7:8"},  # none to validate on
    ],
)
def test_own_splits_hold_every_episode_once(copy, splits):
    info = json.loads((copy / "meta/info.json").read_text())
    (copy / "meta/info.json").write_text(json.dumps({**info, "splits": splits}))
    with pytest.raises(DatasetError, match="do not hold each of the 8 episodes once"):
        open_dataset(copy)


@pytest.mark.parametrize("broken", ["damaged", "empty", "missing"])
def test_a_stored_image_that_is_not_there_names_episode_and_frame(tmp_path, broken):
    root = make_dataset(tmp_path / "d", use_videos=False)
    path = next(root.glob("data/**/*.parquet"))
    table = pq.read_table(path)
    row = open_dataset(root).episodes[3].row + 4
    cells = table[CAMERAS[0]].to_pylist()
    cells[row] = {"damaged": {"bytes": b"no picture", "path": None}, "empty": None, "missing": cells[row]}[broken]
    column = pa.array(cells, table.schema.field(CAMERAS[0]).type)
    table = table.set_column(table.schema.get_field_index(CAMERAS[0]), table.schema.field(CAMERAS[0]), column)
    dataset = open_dataset(root)
    if broken == "missing":
        table = pa.concat_tables([table.slice(0, row), table.slice(row + 1)])
    pq.write_table(table, path)
    with pytest.raises(DatasetError, match=r"episode 3, .*: (frame 4 in .* cannot be read|.* holds \d+ of \d+ frames)"):
        list(dataset.iterate_frames(CAMERAS[0]))


def test_truth_is_a_simulator_s_column_behind_the_prefix_or_nothing(tiny):
    dataset = open_dataset(tiny)
    assert dataset.truth("progress", "sim.").shape == (dataset.num_frames,)
    assert dataset.truth("progress", None) is None and dataset.truth("stage", "sim.") is None
    with pytest.raises(DatasetError, match="no column begins with"):
        dataset.truth("progress", "simulator.")


def test_a_frame_at_the_wrong_time_is_named(copy):
    path = next(copy.glob("data/**/*.parquet"))
    table = pd.read_parquet(path)
    table.loc[LENGTHS[0] + 4, "timestamp"] += 0.3
    table.to_parquet(path, index=False)
    with pytest.raises(DatasetError, match="episode 1: frame 4 is not at the time"):
        open_dataset(copy)


def test_a_missing_dataset_and_an_old_one_are_answered_with_what_to_do(tmp_path, copy):
    with pytest.raises(DatasetError, match="neither a LeRobot v3 folder"):
        open_dataset(tmp_path / "nothing")
    info = json.loads((copy / "meta/info.json").read_text())
    (copy / "meta/info.json").write_text(json.dumps({**info, "codebase_version": "v2.1"}))
    with pytest.raises(DatasetError, match="convert_dataset_v21_to_v30"):
        open_dataset(copy)


def test_a_nan_in_a_state_names_episode_and_frame(copy):
    path = next(copy.glob("data/**/*.parquet"))
    table = pq.read_table(path)
    states = table["observation.state"].to_pylist()
    states[LENGTHS[0] + 3][1] = float("nan")
    column = pa.array(states, table.schema.field("observation.state").type)
    pq.write_table(
        table.set_column(table.schema.get_field_index("observation.state"), "observation.state", column), path
    )
    with pytest.raises(
        DatasetError, match=r"observation.state is NaN or infinite in 1 frames, first in episode 1 at frame 3"
    ):
        _ = open_dataset(copy).states


def test_an_empty_episode_is_named(copy):
    path = next(copy.glob("meta/episodes/**/*.parquet"))
    table = pq.read_table(path).to_pandas()
    table.loc[2, "length"] = 0
    table.to_parquet(path)
    with pytest.raises(DatasetError, match="episode 2 is empty"):
        open_dataset(copy)


def test_a_corrupt_and_a_missing_video_name_episode_and_file(copy):
    path = next(copy.glob(f"videos/{CAMERAS[0]}/**/*.mp4"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DatasetError, match=r"episode \d+, observation.images.top: file-000.mp4"):
        list(open_dataset(copy).iterate_frames(CAMERAS[0]))
    path.unlink()
    with pytest.raises(DatasetError, match=r"episode 0, observation.images.top: file-000.mp4 is missing"):
        list(open_dataset(copy).iterate_frames(CAMERAS[0]))


def test_the_fingerprint_names_the_frames_and_not_the_annotations(tiny, copy):
    name = fingerprint(tiny)
    assert fingerprint(copy) == name
    path = next(copy.glob("meta/episodes/**/*.parquet"))
    table = pd.read_parquet(path)
    table.assign(sparse_subtask_names=[["task"]] * len(table)).to_parquet(path)
    assert fingerprint(copy) == name
    table.assign(subtask=range(len(table))).to_parquet(path)  # somebody's own column, which no annotated copy adds
    assert fingerprint(copy) != name
    table.to_parquet(path)
    with next(copy.glob("videos/**/*.mp4")).open("ab") as file:
        file.write(b"x")
    assert fingerprint(copy) != name


def test_a_camera_whose_folder_is_a_link_is_in_the_fingerprint(copy, tmp_path):
    name, camera = fingerprint(copy), copy / "videos" / CAMERAS[0]
    camera.rename(tmp_path / "elsewhere")
    assert fingerprint(copy) != name
    camera.symlink_to(tmp_path / "elsewhere")
    assert fingerprint(copy) == name


def test_links_in_a_circle_come_to_an_end_and_two_cameras_may_be_one_folder(tmp_path):
    (tmp_path / "videos/front/deep").mkdir(parents=True)
    (tmp_path / "videos/front/deep/a.mp4").touch()
    (tmp_path / "videos/front/deep/back").symlink_to(tmp_path / "videos")
    (tmp_path / "videos/top").symlink_to(tmp_path / "videos/front")
    found = [str(path.relative_to(tmp_path)) for path in files_in(tmp_path / "videos")]
    assert found == ["videos/front/deep/a.mp4", "videos/top/deep/a.mp4"] and files_in(tmp_path / "none") == []


def test_the_suggested_window_spans_a_third_of_a_training_episode(tiny):
    demos = open_dataset(tiny)
    median = np.median([e.length for e in demos.split("train")])
    for steps in (2, 4, 8):
        gap = suggest_frame_gap(demos, steps)
        assert gap >= 1 and (gap == 1 or abs(gap * steps - median / 3) <= steps / 2)
    assert suggest_frame_gap(demos, 1) == round(median / 3)
    assert suggest_frame_gap(demos, 1000) == 1  # more frames than there are
