"""The demo dataset: LeRobot opens it, its truth keeps its promises, the same seed gives the same episode."""

import json
import os
import subprocess
import sys

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
    imperfect = table[table.kind != "clean"]
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
    assert max(np.abs(p - np.linspace(0, 1, len(p))).max() for _, p in clean) < 0.12  # ᾱ is of all kinds
    paused = by_kind[(by_kind.kind == "hesitate") & (by_kind["sim.quality"] == QUALITIES.index("injected"))]
    moved = paused.groupby("episode_index")["sim.progress"].agg(lambda p: p.iloc[-1] - p.iloc[4])
    assert moved.abs().median() < 0.05
    dropped = by_kind[by_kind.kind == "drop_regrasp"].groupby("episode_index")["sim.progress"]
    assert all((p.cummax() - p).max() > 0.3 for _, p in dropped)


def test_an_imperfection_stops_or_reverses_progress(frames, table):
    for episode in table[table.kind != "clean"].itertuples():
        mine = frames[frames.episode_index == episode.episode]
        first = int((mine["sim.quality"] == QUALITIES.index("injected")).to_numpy().argmax())
        progress = mine["sim.progress"].to_numpy()[first : first + episode.imperfect_frames]
        assert len(progress) == episode.imperfect_frames and progress[-1] - progress[0] < 0.02, episode


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


def test_it_was_marked_and_corrected_without_the_simulators_truth():
    """The columns are gone, asking for one is an error, and what was seen otherwise than it was annotated is in git."""
    from demo import contact_sheets
    from sarm_lib.dataset import DatasetError

    blind = contact_sheets.open_blind(DATA)
    assert not [name for name in [*blind.features, *blind.table] if name.startswith("sim.")]
    recorded = [name for name in open_dataset(DATA).features if name.startswith("sim.")]
    for name in [*recorded, "no.such.column"]:
        with pytest.raises(DatasetError, match=f"{name}: the dataset has no such column; it has observation"):
            blind.vectors(name)
    assert "sim.stage" in recorded and blind.truth("stage", None) is None
    assert blind.vectors("observation.state").shape == (blind.num_frames, 4)
    sheets = sorted((ROOT / "demo/contact_sheets").glob("*.jpg"))
    assert [path.stem for path in sheets] == [f"episode_{i:03d}" for i in contact_sheets.in_git(blind)]
    assert {"episode_006", "episode_037", "episode_086", "episode_094"} < {path.stem for path in sheets}


WITHOUT_GL = """
import ctypes.util, sys

found = ctypes.util.find_library
ctypes.util.find_library = lambda name: None if name in ("EGL", "OSMesa") else found(name)
import demo.captions, demo.truth
if len(sys.argv) > 1:
    import demo.encoder
from demo.demonstrations import demonstrate
from demo.simulator import AssemblySimulator, RenderingError

assert not {"mujoco", "metaworld"} & set(sys.modules), "imported before a backend is chosen"
sim = AssemblySimulator()
assert demonstrate(sim, "clean", 1000).success
try:
    sim.render()
except RenderingError as error:
    print(error)
"""


@pytest.mark.parametrize("chosen", ["disabled", ""])
def test_without_opengl_everything_but_rendering_works(chosen):
    arguments = [] if chosen else ["with the encoder, which takes long to import"]
    environment = {**os.environ, "MUJOCO_GL": chosen}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GL, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "needs OpenGL" in done.stdout and "apt-get install" in done.stdout and done.stdout.count("\n") == 1


def test_a_backend_that_was_asked_for_and_is_not_there_is_an_error(monkeypatch):
    from demo import simulator

    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(simulator, "_is_installed", lambda _: False)
    with pytest.raises(simulator.RenderingError, match="libOSMesa is not installed"):
        simulator.choose_gl()


def test_a_rendered_frame_is_the_recorded_one(table):
    from demo.simulator import AssemblySimulator, RenderingError

    episode, sim = table.iloc[0], AssemblySimulator()
    sim.reset(int(episode.seed))
    try:
        rendered = sim.render()["front"]
    except RenderingError as error:
        pytest.skip(str(error))
    dataset = open_dataset(DATA)
    recorded = dataset.read_frames(dataset.episodes[0], "observation.images.front", [0])[0]
    assert np.abs(rendered.astype(int) - recorded).mean() < 6, "more than what compression and another driver change"


def test_the_encoder_loads_through_the_library_and_tells_scenes_apart():
    import torch

    from sarm_lib import encoder

    clip = encoder.load(str(ROOT / "data/demo/encoder"))
    texts = clip.texts(["put the nut onto the peg", "pick up the nut and place it on the peg", "open the drawer"])
    similarity = torch.nn.functional.cosine_similarity
    assert clip.width == 512 and similarity(texts[0], texts[1], dim=0) > similarity(texts[0], texts[2], dim=0)


def test_the_environment_is_the_simulator_and_looks_only_when_asked(monkeypatch):
    """The benchmark's expert succeeds in it from a start that was not recorded, and no picture is drawn for that."""
    from demo.environment import AssemblyEnv
    from demo.simulator import AssemblySimulator, new_expert

    monkeypatch.setattr(AssemblySimulator, "render", lambda _: pytest.fail("a picture was drawn"))
    env, expert = AssemblyEnv(), new_expert()
    first, info = env.reset(seed=10_000)
    assert first["agent_pos"].shape == (4,) and first["agent_pos"].dtype == np.float32 and not info["is_success"]
    assert set(first["pixels"]) == set(env.observation_space["pixels"])
    done = False
    while not done:
        _, reward, success, truncated, info = env.step(expert.get_action(env.sim.expert_observation))
        done = success or truncated
    assert success and reward == 1.0 and info["is_success"] and not truncated
    with pytest.raises(RuntimeError, match="look at the pictures before the next step"):
        first["pixels"]["front"]
    again, _ = env.reset(seed=10_000)
    np.testing.assert_array_equal(again["agent_pos"], first["agent_pos"])
    frames = 1
    while not truncated:
        *_, success, truncated, info = env.step(np.zeros(4))
        frames += 1
    assert frames == env._max_episode_steps and not success


def test_the_experiment_s_arms_weigh_what_they_say(monkeypatch):
    """On the demo's own episodes, with weights in place of those of notebook 05."""
    from benchmarks import experiment
    from sarm_lib import dataset as datasets
    from sarm_lib import params, rabc

    config = params.load(ROOT / "params.yaml", {"base.dataset": str(ROOT / "data/demo/assembly")})
    demos = datasets.from_params(config)
    rng = np.random.default_rng(0)
    ours, r = rng.random(demos.num_frames).astype(np.float32), rng.normal(size=demos.num_frames)
    monkeypatch.setattr(rabc, "weights_of_rows", lambda *_: (ours, r))
    monkeypatch.setattr(type(config.paths), "read", lambda *_: None)
    train = datasets.rows_of(demos.split("train"))
    arms = [arm for arm in experiment.ARMS if arm not in ("bc", "rabc_single")]
    found = {arm: experiment.arm_weights(arm, 0, config, demos, None) for arm in arms}
    kept = lambda arm: {e.index for e in demos.split("train") if found[arm][e.rows].any()}  # noqa: E731

    assert experiment.arm_weights("bc", 0, config, demos, None) is None and found["rabc"] is ours
    quality, success = demos.truth("quality", "sim."), demos.truth("success", "sim.")
    np.testing.assert_array_equal(found["oracle"] == 1, (quality == 0) | (quality == 2))  # productive, recovering
    assert sorted(found["shuffled"][train]) == sorted(ours[train]) and not np.array_equal(found["shuffled"], ours)
    lightest_kept, heaviest_left = (
        r[train][found["top_k"][train] == 1].min(),
        r[train][found["top_k"][train] == 0].max(),
    )
    assert lightest_kept > heaviest_left and found["top_k"][train].mean() == pytest.approx(ours[train].mean(), abs=1e-3)
    succeeded = {e.index for e in demos.split("train") if success[e.rows].any()}
    assert kept("success_filter") == succeeded and 0 < len(succeeded) < len(demos.split("train"))
    length = {e.index: e.length for e in demos.episodes}
    fast = kept("duration_filter")
    assert len(fast) == len(succeeded) // 2 and fast < succeeded
    assert max(length[i] for i in fast) <= min(length[i] for i in succeeded - fast)
    assert kept("clean_only") == {e.index for e in demos.split("train") if e.group == "clean"}
    for arm in ("success_filter", "duration_filter", "clean_only"):
        assert set(np.unique(found[arm])) == {0, 1}


def test_the_experiment_compares_what_is_comparable_and_says_how_much_it_helped(tmp_path):
    import json

    from benchmarks import experiment
    from sarm_lib import params

    runs = {
        arm: {
            seed: {
                "seed": seed, "rollouts": 4, "successes": sum(done), "succeeded": done, "median_seconds": 1.0,
                "train_loss": 0.1,
            }
            for seed, done in by_seed.items()
        }
        for arm, by_seed in {
            "bc": {0: [0, 0, 0, 1], 1: [0, 1, 0, 0]},
            "rabc": {0: [1, 0, 1, 1], 1: [1, 1, 0, 0]},
            "oracle": {0: [1, 1, 1, 1], 1: [1, 1, 0, 1]},
        }.items()
    }  # fmt: skip
    common, file = {"settings": {"policy.steps": 4}}, tmp_path / "found.json"
    origins = {
        "bc": {"weights": None, "code": "1"},
        "rabc": {"weights": "a", "code": "1"},
        "oracle": {"weights": None, "code": "1"},
    }
    found = experiment.report(runs, common, origins)
    file.write_text(json.dumps(found))
    further = {"top_k": {"weights": "b", "code": "2"}}
    for to_run in (origins, further):
        again, from_what = experiment.stored(file, common, to_run)
        assert from_what == to_run | origins and experiment.report(again, common, from_what) == found
    with pytest.raises(
        SystemExit, match=r"runs with other weights in rabc: --anew runs these arms again, --begin puts the file aside$"
    ):
        experiment.stored(file, common, {"rabc": {"weights": "b", "code": "1"}})
    anew = {"rabc": {"weights": "b", "code": "1"}}  # begins again by other weights, and the others stay
    others, from_what = experiment.stored(file, common, anew, ["rabc"])
    assert set(others) == {"bc", "oracle"} and from_what == origins | anew
    again = experiment.report(others | {"rabc": runs["oracle"]}, common, from_what)
    assert again["arms"]["bc"] == found["arms"]["bc"] and again["arms"]["rabc"]["made_from"] == anew["rabc"]
    with pytest.raises(SystemExit, match="runs with other parameters in bc: --anew"):
        experiment.stored(file, common, {"bc": {"weights": None, "parameters": "c", "code": "1"}})
    config, other = (params.load(ROOT / "params.yaml", {"rabc.delta_frames": frames}) for frames in (8, 9))
    assert experiment.made_from("bc", config) == experiment.made_from("bc", other)  # it reads no weights
    longer = params.load(ROOT / "params.yaml", {"policy.batch_size": 7})
    differing = [k for k, v in experiment.made_from("bc", config).items() if experiment.made_from("bc", longer)[k] != v]
    assert differing == ["parameters"] and set(experiment.made_from("bc", config)) > {"code", "commit"}
    with pytest.raises(SystemExit, match="runs with other settings: --anew"):
        experiment.stored(file, {"settings": {"policy.steps": 8}}, further)
    later = experiment.report({**runs, "top_k": runs["rabc"]}, common, origins | further)
    assert "over_bc" not in later["arms"]["top_k"] and later["arms"]["rabc"] == found["arms"]["rabc"]
    assert "code, and not compared: `bc`, `rabc`, `oracle`; `top_k`." in experiment.table(later)
    alike = experiment.report({**runs, "top_k": runs["rabc"]}, common, origins | {"top_k": {"code": "1"}})
    assert alike["arms"]["top_k"]["over_bc"] == found["arms"]["rabc"]["over_bc"]
    of_commit = {arm: made | {"commit": "abc"} for arm, made in origins.items()}
    file.write_text(json.dumps(experiment.report(runs, common, of_commit)))
    assert experiment.stored(file, common, origins)[1] == of_commit  # another commit with the same code
    with pytest.raises(SystemExit, match=r"other code in bc: .* or go on at commit abc"):
        experiment.stored(file, common, {"bc": {"weights": None, "code": "2", "commit": "def"}})
    aside, was = [experiment.put_aside(file).name], json.dumps(found)
    for again in (was, was):
        file.write_text(again)
        aside.append(experiment.put_aside(file).name)
    assert aside == ["found_abc.json", "found_before.json", "found_before-1.json"] and not file.exists()
    assert (tmp_path / "found_before-1.json").read_text() == was
    assert "different" not in experiment.table(found)
    assert found["arms"]["rabc"]["success_rate"] == 5 / 8 and found["arms"]["rabc"]["gap_closed"] == pytest.approx(
        3 / 5
    )
    over = found["arms"]["rabc"]["over_bc"]
    assert over["difference"] == 3 / 8 and over["difference_low"] <= 3 / 8 <= over["difference_high"]
    assert [r["successes"] for r in found["arms"]["oracle"]["runs"]] == [4, 3] and json.dumps(found)
    assert "| `rabc` | 5 of 8 |" in experiment.table(found)
