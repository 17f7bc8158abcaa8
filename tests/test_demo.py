"""The demo dataset: LeRobot opens it, its truth keeps its promises, the same seed gives the same episode."""

import json

import numpy as np
import pandas as pd
import pytest

from demo.demonstrations import KINDS, QUALITIES, label_quality
from demo.record import FIRST_SEED, MIXTURE, planned_episodes
from demo.simulator import DENSE_STAGES
from sarm_lib.dataset import open_dataset
from tests.conftest import ROOT

DATA = ROOT / "data/demo/assembly"


@pytest.fixture(scope="module")
def frames():
    return pd.concat([pd.read_parquet(path) for path in sorted(DATA.glob("data/**/*.parquet"))], ignore_index=True)


@pytest.fixture(scope="module")
def table():
    return pd.read_csv(ROOT / "demo/episodes.csv")


def test_lerobot_opens_it():
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("demo/assembly", root=DATA, video_backend="pyav")
    item = dataset[1000]
    assert dataset.fps == 40 and item["observation.images.front"].shape == item["observation.images.wrist"].shape == (
        3,
        128,
        128,
    )
    assert item["observation.state"].shape == item["action"].shape == (4,)


def test_the_table_the_plan_and_the_dataset_agree(table, frames):
    assert [tuple(r) for r in table[["split", "kind", "seed"]].itertuples(index=False)] == planned_episodes()
    dataset = open_dataset(DATA, group_key="sim.kind")
    assert [e.split for e in dataset.episodes] == table.split.tolist()
    assert [e.group for e in dataset.episodes] == table.kind.tolist()
    assert [e.length for e in dataset.episodes] == table.frames.tolist()
    assert frames.groupby("episode_index")["sim.success"].last().tolist() == table.success.tolist()


def test_every_kind_is_in_every_split_and_no_seed_is_in_two(table):
    assert set(map(tuple, table.groupby(["split", "kind"]).size().index)) == {(s, k) for s in MIXTURE for k in KINDS}
    assert len(set(table.seed)) == len(table) and set(FIRST_SEED) == set(MIXTURE)
    assert (table.split != "test").sum() >= 100 and (table.split == "test").sum() == 40


def test_an_episode_ends_at_its_success(frames):
    assert (frames.groupby("episode_index")["sim.success"].sum() <= 1).all()


def test_imperfections_last_as_long_as_people_s(table):
    imperfect = table[~table.kind.isin(["clean", "failing"])]
    assert imperfect.imperfect_frames.between(0.6 * 40, 1.1 * 40).all()
    assert (table[table.kind == "clean"].imperfect_frames == 0).all()


def test_true_progress_is_eq_2_on_the_true_stages(frames):
    truth = json.loads((ROOT / "demo/truth.json").read_text())
    assert list(truth) == list(DENSE_STAGES)
    shares = np.array([stage["proportion"] for stage in truth.values()])
    assert shares.sum() == pytest.approx(1, abs=1e-4)
    before = np.concatenate([[0], np.cumsum(shares)])
    stage, progress = frames["sim.stage"].to_numpy(), frames["sim.progress"].to_numpy()
    assert (progress >= before[stage] - 1e-5).all() and (progress <= before[stage + 1] + 1e-5).all()
    assert (progress[frames["sim.success"]] == 1).all()


def test_true_progress_is_the_clock_on_clean_episodes_stops_in_pauses_and_goes_back_after_a_drop(frames, table):
    by_kind = frames.assign(kind=table.kind.to_numpy()[frames.episode_index])
    clean = by_kind[by_kind.kind == "clean"].groupby("episode_index")["sim.progress"]
    assert max(np.abs(p - np.linspace(0, 1, len(p))).max() for _, p in clean) < 0.1
    paused = by_kind[(by_kind.kind == "hesitate") & (by_kind["sim.quality"] == QUALITIES.index("injected"))]
    moved = paused.groupby("episode_index")["sim.progress"].agg(lambda p: p.iloc[-1] - p.iloc[4])
    assert moved.abs().median() < 0.05
    dropped = by_kind[by_kind.kind == "drop_regrasp"].groupby("episode_index")["sim.progress"]
    assert all((p.cummax() - p).max() > 0.3 for _, p in dropped)


def test_quality_labels():
    progress = np.array([0.1, 0.3, 0.2, 0.1, 0.2, 0.35, 0.5], dtype=np.float32)
    injected = np.array([0, 0, 1, 1, 0, 0, 0], dtype=bool)
    names = [QUALITIES[q][0] for q in label_quality(progress, injected, success=True)]
    assert names == ["p", "p", "i", "i", "r", "p", "p"]
    names = [QUALITIES[q][0] for q in label_quality(progress[:5], injected[:5], success=False)]
    assert names == ["p", "p", "d", "d", "d"]


@pytest.mark.parametrize("kind", ["clean", "drop_regrasp"])
def test_the_same_seed_gives_the_recorded_states_and_actions(kind, table, frames):
    from demo.demonstrations import demonstrate
    from demo.simulator import AssemblySimulator

    episode = table[table.kind == kind].iloc[0]
    one, two = (demonstrate(AssemblySimulator(), kind, int(episode.seed)) for _ in range(2))
    np.testing.assert_array_equal(one.states, two.states)
    np.testing.assert_array_equal(one.actions, two.actions)
    recorded = frames[frames.episode_index == episode.episode]
    # Another processor rounds otherwise, and the simulator amplifies it: the first second must agree anywhere.
    np.testing.assert_allclose(np.stack(recorded["observation.state"])[:20], one.states[:20], atol=1e-3)


def test_the_encoder_loads_through_the_library_and_tells_scenes_apart():
    import torch

    from sarm_lib import encoder

    clip = encoder.load(str(ROOT / "data/demo/encoder"))
    texts = clip.texts(["put the nut onto the peg", "pick up the nut and place it on the peg", "open the drawer"])
    similarity = torch.nn.functional.cosine_similarity
    assert clip.width == 512 and similarity(texts[0], texts[1], dim=0) > similarity(texts[0], texts[2], dim=0)
