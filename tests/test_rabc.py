"""Eq 6, 8, 9: LeRobot's numbers where it is right, and what a weight must never be."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sarm_lib import artifacts, charts, lerobot_io, params, rabc
from sarm_lib.dataset import fingerprint, from_params
from tests.conftest import run_notebook


def progress_file(path, lengths=(40, 7, 25), seed=0, nan_at=None):
    """Random walks in [0, 1], one an episode, in LeRobot's format."""
    rng = np.random.default_rng(seed)
    walks = [np.clip(np.cumsum(rng.normal(1 / n, 0.05, n)), 0, 1) for n in lengths]
    table = pd.DataFrame(
        {
            "index": np.arange(sum(lengths)),
            "episode_index": np.repeat(np.arange(len(lengths)), lengths),
            "frame_index": np.concatenate([np.arange(n) for n in lengths]),
            "progress_sparse": np.concatenate(walks).astype(np.float32),
        }
    )
    if nan_at is not None:
        table.loc[nan_at, "progress_sparse"] = np.nan
    table.to_parquet(path, index=False)
    return table


@pytest.mark.parametrize("kappa", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("delta_frames", [1, 5, 16])
@pytest.mark.parametrize("nan_at", [None, 43, [0, 1, 2, 70]])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lerobot_compat_gives_lerobot_s_weights(tmp_path, kappa, delta_frames, nan_at, dtype):
    from lerobot.rewards.sarm.rabc import RABCWeights

    path = tmp_path / "p.parquet"
    table = progress_file(path, nan_at=nan_at)
    table["progress_sparse"] = (table.progress_sparse.astype(dtype) / 3).astype(dtype)  # float64 that no float32 is
    table.to_parquet(path, index=False)
    theirs = RABCWeights(path, chunk_size=delta_frames, kappa=kappa, device=torch.device("cpu"))
    ours = rabc.compute(path, "sparse", delta_frames, kappa, 1e-6, [0], lerobot_compat=True)
    assert (ours.delta_mean, ours.delta_std) == pytest.approx((theirs.delta_mean, theirs.delta_std), abs=1e-7)
    assert np.isfinite(list(ours.statistics([0, 1, 2]).values())).all()
    assert charts.delta_bins(ours.delta, ours.weight).frames.sum() >= 0.9 * np.isfinite(ours.delta).sum()
    raw = theirs._compute_weights(np.array([theirs._compute_delta(i) for i in table["index"]], dtype=np.float32))
    np.testing.assert_allclose(ours.weight, raw, atol=1e-6)


@pytest.mark.parametrize("how", ["holes", "frames twice", "episodes that take turns"])
def test_lerobot_compat_looks_frames_up_as_lerobot_does(tmp_path, how):
    from lerobot.rewards.sarm.rabc import RABCWeights

    path = tmp_path / "p.parquet"
    table = progress_file(path)
    if how == "holes":
        table = table.drop([3, 11, 12, 39, 60])
    elif how == "frames twice":
        again = table.iloc[[60, 3, 11]].assign(progress_sparse=[0.9, 0.5, 0.1])
        table = pd.concat([table, again.astype(table.dtypes)], ignore_index=True)
    else:
        table.episode_index = table.index % 3
    table.to_parquet(path, index=False)
    theirs = RABCWeights(path, chunk_size=5, kappa=0.1, device=torch.device("cpu"))
    ours = rabc.compute(path, "sparse", 5, 0.1, 1e-6, [0], lerobot_compat=True)
    expected = {i: theirs._compute_delta(i) for i in table["index"]}
    found = dict(zip(ours.index.tolist(), ours.delta.tolist(), strict=True))
    assert found == pytest.approx(
        {i: float("nan") if d is None else d for i, d in expected.items()}, abs=1e-6, nan_ok=True
    )


def test_what_is_not_finite_is_named(tmp_path):
    path = tmp_path / "p.parquet"
    table = progress_file(path, nan_at=[3, 5, 41])
    with pytest.raises(ValueError, match=r"not finite in 3 frames \(episode 0: 3, 5; episode 1: 1\): score"):
        rabc.compute(path, "sparse", 5, 0.1, 1e-6, [0])
    table.loc[7, "progress_sparse"] = np.inf
    table.to_parquet(path, index=False)
    with pytest.raises(ValueError, match="infinite somewhere"):
        rabc.compute(path, "sparse", 5, 0.1, 1e-6, [0], lerobot_compat=True)


delta_arrays = st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=60).map(
    lambda x: np.array(x, dtype=np.float32)
)


@given(delta=delta_arrays, target=st.floats(0, 1))
def test_rules_set_kappa_as_they_say(delta, target):
    mean, std = max(float(delta.mean()), 0.0), max(float(delta.std()), 1e-6)
    of = lambda rule: rabc.kappa_of(rule, delta, mean, std, 1e-6)  # noqa: E731
    assert (of("mean"), of("mean+std"), of("mean+2std"), of(0.3)) == (mean, mean + std, mean + 2 * std, 0.3)
    assert of("quantile=0.5") == pytest.approx(max(0.0, float(np.median(delta))))
    most, least = rabc.mean_weights(delta, mean, std, 1e-6)
    assert all(least - 1e-6 <= rabc.weights(delta, mean, std, k, 1e-6).mean() <= most + 1e-6 for k in (0.1, 0.5, mean))
    reached = lambda kappa: rabc.weights(delta, mean, std, kappa, 1e-6).astype(np.float64).mean()  # noqa: E731
    every = [reached(kappa) for kappa in [*delta[delta >= 0], 0.0]]
    best = min(abs(value - target) for value in every)
    assert abs(reached(of(f"mean_weight={target}")) - target) <= best + 1e-6


@pytest.mark.parametrize("rule", ["high", "mean=1", "mean_weight", "quantile=2", "quantile=x"])
def test_a_rule_that_does_not_exist_is_named(rule):
    with pytest.raises(ValueError, match="is no number and no rule"):
        rabc.kappa_of(rule, np.zeros(3), 0.1, 0.1, 1e-6)


def suggested(phi, episode_index, episodes, **asked):
    config = params.load("params.yaml", {f"rabc.{key}": value for key, value in asked.items()})
    return rabc.suggested_delta(phi, episode_index, episodes, 20, config)


def test_delta_is_long_enough_to_see_progress_over_the_jitter():
    noise, episode, found = np.random.default_rng(0).normal(0, 1, 50), np.repeat([4, 5, 6, 7], 50), {}
    for jitter in (0.0, 0.05, 0.2):
        phi = np.r_[np.tile(np.linspace(0, 1, 50) + jitter * noise, 3), 9 * noise]  # the last one is not asked
        found[jitter] = suggested(phi, episode, [4, 5, 6])
    assert found[0.0].frames == 4 and found[0.0].because.startswith("a fifth of a second, which is the least")
    assert found[0.0].frames < found[0.05].frames < found[0.2].frames == 16
    assert found[0.05].because.startswith("so that progress stands out. A median episode of 50 frames")
    assert found[0.2].because.startswith("the policy's chunk, which is the most")


def test_frames_that_were_not_scored_hide_no_jitter():
    """Between scored frames progress lies on a line."""
    noise, episode = 0.05 * np.random.default_rng(0).normal(size=400), np.repeat([0], 400)
    scored = np.unique(np.append(np.arange(0, 400, 3), 399))
    every = np.linspace(0, 1, 400) + noise
    some = np.interp(np.arange(400), scored, every[scored])
    assert suggested(some, episode, [0]).frames < 16 <= suggested(some, episode, [0], stride=3).frames
    assert suggested(every, episode, [0]).frames == 16


class Demos:
    """As much of a dataset as weights ask for: one training episode, the others held out."""

    fps = 10

    def __init__(self, held_out: int) -> None:
        self.held_out = held_out

    def split(self, name: str) -> list:
        chosen = {"train": [0], "val": range(1, 1 + self.held_out)}[name]
        return [SimpleNamespace(index=i) for i in chosen]


def chosen(tmp_path, walks: list[np.ndarray], held_out: int = 1, **asked) -> rabc.RabcWeights:
    """What `auto` chooses from episodes with this progress."""
    columns = [(i, t, phi) for i, walk in enumerate(walks) for t, phi in enumerate(walk)]
    table = pd.DataFrame(columns, columns=["episode_index", "frame_index", "progress_dense"])
    table.reset_index().to_parquet(tmp_path / "progress.parquet", index=False)
    asked = {"head_mode": "dense", "kappa": "auto", "delta_frames": "auto"} | asked
    config = params.load("params.yaml", {f"rabc.{key}": value for key, value in asked.items()})
    return rabc.from_params(tmp_path / "progress.parquet", config, Demos(held_out))


STEADY, HALF = np.linspace(0, 1, 60), np.r_[np.linspace(0, 0.5, 30), np.full(30, 0.5), np.linspace(0.5, 1, 30)]


def test_auto_takes_the_guide_s_first_rule_that_does_not_pass_nearly_all_held_out_frames(tmp_path):
    found = chosen(tmp_path, [HALF, HALF])
    assert (found.delta_frames, found.kappa_rule) == (2, "mean") and "none of" not in found.because
    assert found.kappa == pytest.approx(found.delta_mean) and "0.3 to 0.8 is healthy" in found.because
    often = chosen(tmp_path, [HALF, STEADY])  # all of it gains more than μ: mean weight 1
    assert often.kappa_rule == "mean+std" and "1.00 by `mean`" in often.because
    little = chosen(tmp_path, [STEADY, np.zeros(60)])
    assert little.kappa_rule == "mean" and little.because.endswith("none of the guide's rules brings it there")
    much = chosen(tmp_path, [np.linspace(0, 0.1, 60), STEADY])
    assert much.kappa_rule == "mean+2std" and much.because.endswith("none of the guide's rules brings it there")
    extrapolated = chosen(tmp_path, [HALF, HALF, np.array([0.0, 0.9])], held_out=2, delta_frames=16)
    assert extrapolated.because == chosen(tmp_path, [HALF, HALF], delta_frames=16).because


def test_auto_looks_at_held_out_episodes_alone_where_there_are_some(tmp_path):
    assert chosen(tmp_path, [HALF, STEADY], held_out=0).kappa_rule == "mean"
    jitter = np.clip(STEADY + 0.05 * np.random.default_rng(0).normal(size=60), 0, 1)
    assert chosen(tmp_path, [jitter, HALF]).delta_frames < chosen(tmp_path, [HALF, jitter]).delta_frames


@pytest.mark.parametrize("key", ["delta_frames", "kappa"])
def test_auto_without_progress_of_held_out_episodes_says_what_to_set(tmp_path, key):
    asked = {"lerobot_compat": True} | {other: 3 for other in {"delta_frames", "kappa"} - {key}}
    with pytest.raises(ValueError, match=rf"rabc.{key}: auto needs progress of validation episodes .*: set a number"):
        chosen(tmp_path, [HALF, np.full(60, np.nan)], **asked)


def test_what_is_not_auto_is_as_it_was_asked_for(tmp_path):
    found = chosen(tmp_path, [HALF, HALF], delta_frames=5, kappa=0.3)
    assert (found.delta_frames, found.kappa, found.kappa_rule, found.because) == (5, 0.3, 0.3, "")
    assert chosen(tmp_path, [HALF, HALF], delta_frames=None).delta_frames == 16  # the policy's chunk
    assert chosen(tmp_path, [HALF, HALF], kappa="mean+2std").kappa_rule == "mean+2std"
    with pytest.raises(ValueError, match="has no progress_sparse; it has progress_dense"):
        chosen(tmp_path, [HALF, HALF], head_mode="sparse")


def test_weights_that_were_chosen_by_other_validation_episodes_weight_nothing(in_project, tmp_path):
    config, dataset = in_project
    auto = lambda **other: config.model_copy(  # noqa: E731
        update={"rabc": config.rabc.model_copy(update={"delta_frames": "auto", "kappa": "auto"} | other)}
    )
    progress, path = config.paths.read("sarm_progress.parquet", "05"), tmp_path / "weights.parquet"
    checkpoint = (artifacts.read_provenance(progress) or {}).get("checkpoint")

    def write(asked) -> rabc.RabcWeights:
        made = rabc.from_params(progress, asked, dataset, dataset.fingerprint)
        rabc.write_weights(path, made, rabc.provenance(asked, dataset, checkpoint))
        return made

    made = write(auto())
    settled = artifacts.read_provenance(path)[rabc.SETTLED]
    assert settled == {"delta_frames": made.delta_frames, "kappa": made.kappa, "kappa_rule": made.kappa_rule}
    rabc.weights_of_rows(path, auto(), dataset)
    moved = [replace(e, split="test") if e.split == "val" else e for e in dataset.episodes]
    with pytest.raises(ValueError, match="held_out_episodes is "):
        rabc.weights_of_rows(path, auto(), replace(dataset, episodes=tuple(moved)))
    longer = {"policy": config.policy.model_copy(update={"chunk_size": 9})}
    with pytest.raises(ValueError, match="chunk_size is 4, not 9"):
        rabc.weights_of_rows(path, auto().model_copy(update=longer), dataset)
    before = rabc.weights_digest(path)
    write(auto(delta_frames=made.delta_frames, kappa=made.kappa))  # the same weights, asked for by their numbers
    assert rabc.weights_digest(path) == before
    write(auto(delta_frames=3))  # the chunk decides nothing then
    rabc.weights_of_rows(path, auto(delta_frames=3).model_copy(update=longer), dataset)
    assert rabc.weights_digest(path) != before


def test_lerobot_s_own_class_opens_our_file(in_project):
    from lerobot.rewards.sarm.rabc import RABCWeights

    config, dataset = in_project
    theirs = RABCWeights(
        config.paths.read("sarm_progress.parquet", "05"), 4, config.rabc.head_mode, device=torch.device("cpu")
    )
    weights, stats = theirs.compute_batch_weights({"index": torch.arange(8)})
    assert len(theirs.progress_lookup) == dataset.num_frames and weights.sum() == pytest.approx(8, abs=1e-3)
    assert 0 <= stats["mean_weight"] <= 1


@given(
    delta=st.lists(st.floats(-1, 1), min_size=2, max_size=50).map(lambda x: np.array(x, dtype=np.float32)),
    kappa=st.floats(0, 0.5),
)
def test_eq_9(delta, kappa):
    weight = rabc.weights(delta, float(delta.mean()), float(delta.std()), kappa, 1e-6)
    assert ((weight >= 0) & (weight <= 1)).all()
    assert (weight[delta < 0] == 0).all() and (weight[delta > kappa] == 1).all()
    order = np.argsort(delta)
    assert (np.diff(weight[order]) >= 0).all()


@given(length=st.integers(2, 60), delta_frames=st.integers(1, 40))
def test_steady_progress_is_worth_the_same_everywhere_also_at_the_end(length, delta_frames):
    """LeRobot's delta shrinks to 0 towards the end, so the frames that finish the task look worthless."""
    progress = np.linspace(0, 1, length).astype(np.float32)
    delta = rabc.deltas(progress, np.zeros(length), delta_frames)
    np.testing.assert_allclose(delta, delta_frames / (length - 1), rtol=1e-4)


def test_deltas_stay_within_their_episode(tmp_path):
    table = progress_file(tmp_path / "p.parquet")
    phi, episode = table.progress_sparse.to_numpy(), table.episode_index.to_numpy()
    whole = rabc.deltas(phi, episode, 5)
    for i in range(3):
        np.testing.assert_array_equal(whole[episode == i], rabc.deltas(phi[episode == i], episode[episode == i], 5))


def test_statistics_come_from_training_episodes_alone(tmp_path):
    progress_file(tmp_path / "p.parquet")
    before = rabc.compute(tmp_path / "p.parquet", "sparse", 5, 0.1, 1e-6, [0, 1])
    table = pd.read_parquet(tmp_path / "p.parquet")
    table.loc[table.episode_index == 2, "progress_sparse"] = 0.5
    table.to_parquet(tmp_path / "p.parquet", index=False)
    after = rabc.compute(tmp_path / "p.parquet", "sparse", 5, 0.1, 1e-6, [0, 1])
    assert (before.delta_mean, before.delta_std) == (after.delta_mean, after.delta_std)


def test_a_nan_is_an_error_that_names_the_frame_and_never_a_weight(tmp_path):
    progress_file(tmp_path / "p.parquet", nan_at=43)
    with pytest.raises(ValueError, match=r"1 frames \(episode 1: 3\)"):
        rabc.compute(tmp_path / "p.parquet", "sparse", 5, 0.1, 1e-6, [0, 1, 2])


def test_a_file_of_another_dataset_and_a_missing_head_are_refused(in_project):
    config, dataset = in_project
    path = config.paths.read("sarm_progress.parquet", "05")
    train = [e.index for e in dataset.split("train")]
    with pytest.raises(ValueError, match="progress of another dataset"):
        rabc.compute(path, "sparse", 4, 0.1, 1e-6, train, "0123456789abcdef")
    with pytest.raises(ValueError, match="has no progress_sparse; it has progress_dense"):
        rabc.compute(path, "sparse", 4, 0.1, 1e-6, train)


def test_every_row_gets_its_own_frame_s_weight(in_project, tmp_path):
    config, dataset = in_project
    path = config.paths.read("rabc_weights.parquet", "05")
    table = pd.read_parquet(path)
    assert list(table) == ["index", "episode_index", "frame_index", "delta", "weight"]
    weight, delta = rabc.weights_of_rows(path, config, dataset)
    np.testing.assert_array_equal(weight, table.weight)
    np.testing.assert_array_equal(delta, table.delta)
    copy = tmp_path / "w.parquet"
    pq.write_table(pq.read_table(path).slice(0, len(table) - 3), copy)  # with its metadata
    with pytest.raises(ValueError, match="no weight for some frames"):
        rabc.weights_of_rows(copy, config, dataset)


@pytest.mark.parametrize("wrong", [np.nan, -3.0, 1.5])
def test_weights_that_are_none_weight_nothing(in_project, tmp_path, wrong):
    config, dataset = in_project
    table = pq.read_table(config.paths.read("rabc_weights.parquet", "05"))
    weight = table["weight"].to_numpy().copy()
    weight[5] = wrong
    column = table.schema.get_field_index("weight")
    path = tmp_path / "w.parquet"
    pq.write_table(table.set_column(column, "weight", [weight]), path)
    with pytest.raises(
        ValueError, match=r"w\.parquet: 1 weights are not between 0 and 1, the first .* index 5: run 05"
    ):
        rabc.weights_of_rows(path, config, dataset)
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(ValueError, match="no weight for some frames"):
        rabc.weights_of_rows(path, config, dataset)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"w\.parquet cannot be read"):
        rabc.weights_of_rows(path, config, dataset)


def test_weights_of_the_model_before_weight_nothing(in_project):
    """Notebook 03 ran again, and 05 did not."""
    config, dataset = in_project
    path = config.paths.read("rabc_weights.parquet", "05")
    folder = config.paths.read("sarm", "03")
    kept = (folder / "sarm_lib.json").read_text()
    (folder / "sarm_lib.json").write_text(kept + " ")
    try:
        with pytest.raises(
            ValueError, match=r"is of another reward model than .*sarm holds: run 05_compute_rabc again"
        ):
            rabc.weights_of_rows(path, config, dataset)
    finally:
        (folder / "sarm_lib.json").write_text(kept)
    rabc.weights_of_rows(path, config, dataset)


def test_a_file_of_lerobot_s_that_lacks_progress_goes_through_the_whole_chapter(in_project, tmp_path):
    """LeRobot weighs such frames 1; their pictures have a line between their neighbours."""
    config, _ = in_project
    theirs = pd.read_parquet(config.paths.read("sarm_progress.parquet", "05"))
    theirs.loc[::7, [name for name in theirs if name.startswith("progress")]] = np.nan
    theirs.to_parquet(tmp_path / "theirs.parquet")
    overrides = {"rabc.progress_path": str(tmp_path / "theirs.parquet"), "rabc.lerobot_compat": True}
    overrides |= {"base.outputs": str(tmp_path / "outputs"), "rabc.delta_frames": 4}
    for rule in ("quantile=0.6", 0.01, "auto"):
        page = run_notebook(config.paths.root, "05_compute_rabc", overrides | {"rabc.kappa": rule})
        name = page["weights"].kappa_rule
        assert name == rule or (rule == "auto" and name in rabc.KAPPA_RULES[:3])
        in_use = page["table"].loc[f"{name} (in use)"]
        assert in_use["κ"] == pytest.approx(page["weights"].kappa)
        assert page["table"].notna().all(axis=None) and page["lightest"].delta.notna().all()
    made = pd.read_parquet(tmp_path / "outputs/rabc_weights.parquet")
    assert (made.weight[made.delta.isna()] == 1).all() and made.delta.isna().any()


def test_weights_of_another_dataset_or_of_other_settings_weight_nothing(in_project, tmp_path):
    config, dataset = in_project
    path = config.paths.read("rabc_weights.parquet", "05")
    other = config.model_copy(update={"rabc": config.rabc.model_copy(update={"kappa": 0.77})})
    with pytest.raises(ValueError, match=r"kappa is .*, not 0\.77"):
        rabc.weights_of_rows(path, other, dataset)
    other = config.model_copy(update={"rabc": config.rabc.model_copy(update={"reward_model_path": "another/model"})})
    with pytest.raises(ValueError, match="reward_model_path is None, not another/model"):
        rabc.weights_of_rows(path, other, dataset)
    moved = [replace(e, split="val") if i == 0 else e for i, e in enumerate(dataset.episodes)]
    assert dataset.episodes[0].split == "train"
    with pytest.raises(ValueError, match="training_episodes is "):  # μ, σ and κ are of other episodes
        rabc.weights_of_rows(path, config, replace(dataset, episodes=tuple(moved)))
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"sarm_lib": b'{"fingerprint": "another"}'}), tmp_path / "w.parquet")
    with pytest.raises(ValueError, match="fingerprint is another"):
        rabc.weights_of_rows(tmp_path / "w.parquet", config, dataset)


def test_five_million_frames_take_little_beside_their_progress(tmp_path):
    from benchmarks.speed import progress_file, rabc_memory

    path, episodes = progress_file(tmp_path, 5_000_000), 10_000
    column = 4 * 5_000_000 / 1e6
    for lerobot_compat in (False, True):
        assert rabc_memory(path, episodes, lerobot_compat) - column < 300  # MB


@pytest.mark.parametrize("rows", [[*range(10), *range(11, 72)], [*range(72), 10]])
def test_frames_that_are_there_twice_or_not_at_all_are_named(tmp_path, rows):
    """Δ rows further would not be Δ frames later."""
    progress_file(tmp_path / "p.parquet").iloc[rows].to_parquet(tmp_path / "p.parquet", index=False)
    with pytest.raises(ValueError, match=r"twice or not at all, after episode 0: (9|10)"):
        rabc.compute(tmp_path / "p.parquet", "sparse", 5, 0.1, 1e-6, [0])


def test_episodes_shorter_than_delta_do_not_decide_what_is_usual(tmp_path):
    """Their r is extrapolated: two frames that gain 0.3 would gain 15 in 50."""
    long = progress_file(tmp_path / "long.parquet", (200,) * 5)
    short = pd.DataFrame(
        {"index": [1000, 1001], "episode_index": 5, "frame_index": [0, 1], "progress_sparse": [0.0, 0.3]}
    )
    pd.concat([long, short.astype(long.dtypes)]).to_parquet(tmp_path / "both.parquet", index=False)
    asked = "sparse", 50, "mean+std", 1e-6, [0, 1, 2, 3, 4, 5]
    alone, both = (rabc.compute(tmp_path / f"{name}.parquet", *asked) for name in ("long", "both"))
    assert (both.delta_mean, both.delta_std, both.kappa) == (alone.delta_mean, alone.delta_std, alone.kappa)
    assert both.delta[-1] == pytest.approx(15) and both.weight[-1] == 1
    short.assign(index=[0, 1]).astype(long.dtypes).to_parquet(tmp_path / "short.parquet", index=False)
    assert rabc.compute(tmp_path / "short.parquet", *asked).delta_mean == pytest.approx(15), (
        "where there is nothing else"
    )


def test_progress_that_somebody_else_computed_is_known_by_its_frames(in_project, tmp_path, monkeypatch):
    """LeRobot's own file names no dataset."""
    config, dataset = in_project
    root, theirs = config.paths.read("dataset", "02"), tmp_path / "sarm_progress.parquet"
    copy = tmp_path / "dataset"
    shutil.copytree(root, copy)
    table = pq.read_table(config.paths.read("sarm_progress.parquet", "05")).replace_schema_metadata(None)
    pq.write_table(table, theirs)
    lerobot_io.export_progress(theirs, copy, fingerprint(copy))
    assert pq.read_table(copy / "sarm_progress.parquet").equals(table)
    taken = config.model_copy(update={"rabc": config.rabc.model_copy(update={"progress_path": str(theirs)})})
    assert "took the progress" in rabc.take_progress(tmp_path / "taken.parquet", taken, dataset)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), theirs)
    rabc.take_progress(tmp_path / "taken.parquet", taken, dataset)
    assert pq.read_table(tmp_path / "taken.parquet").equals(table), "in the order of the dataset, whatever the file's"
    monkeypatch.setattr("lerobot.rewards.sarm.rabc.hf_hub_download", lambda repo_id, filename, repo_type: str(theirs))
    named = taken.rabc.model_copy(update={"progress_path": "hf://datasets/user/name/sarm_progress.parquet"})
    hub = taken.model_copy(update={"rabc": named})
    assert "from hf://" in rabc.take_progress(tmp_path / "taken.parquet", hub, dataset)


def test_a_part_of_a_dataset_takes_its_part_of_the_progress(in_project, tmp_path):
    """`base.episodes`, as `make smoke` sets it, beside a file of all episodes."""
    config, dataset = in_project
    table = pq.read_table(config.paths.read("sarm_progress.parquet", "05"))
    pq.write_table(table, tmp_path / "all.parquet")
    found = {"rabc": config.rabc.model_copy(update={"progress_path": str(tmp_path / "all.parquet")})}
    few = config.model_copy(update=found | {"base": config.base.model_copy(update={"episodes": 3})})
    part = from_params(few)
    assert len(part.episodes) == 3 < len(dataset.episodes)
    rabc.take_progress(tmp_path / "taken.parquet", few, part)
    assert pq.read_table(tmp_path / "taken.parquet")["index"].to_pylist() == part.frames["index"].tolist()
    with pytest.raises(ValueError, match="of other episodes than"):
        rabc.take_progress(tmp_path / "taken.parquet", config.model_copy(update=found), part)


def test_progress_of_other_frames_is_refused(in_project, tmp_path):
    config, dataset = in_project
    root, theirs = config.paths.read("dataset", "02"), tmp_path / "sarm_progress.parquet"
    copy = tmp_path / "dataset"
    shutil.copytree(root, copy)
    table = pq.read_table(config.paths.read("sarm_progress.parquet", "05")).replace_schema_metadata(None)
    taken = config.model_copy(update={"rabc": config.rabc.model_copy(update={"progress_path": str(theirs)})})
    pq.write_table(table.slice(0, 0), theirs)
    with pytest.raises(ValueError, match="of other episodes than"):
        rabc.take_progress(tmp_path / "taken.parquet", taken, dataset)
    pq.write_table(table.slice(0, len(table) - 2), theirs)
    with pytest.raises(ValueError, match="its frames are not those of"):
        lerobot_io.export_progress(theirs, copy, fingerprint(copy))
    column, by = "progress_dense", table.column_names.index

    def with_one(value):
        values = table[column].to_numpy().copy()
        values[7] = value
        return table.set_column(by(column), column, pa.array(values))

    holed, nan = with_one(np.nan), np.full(len(table), np.nan, dtype=np.float32)
    nothing = table.set_column(by(column), column, pa.array(nan))
    numbers = table.set_column(by(column), column, table["index"])
    doubles = table.set_column(by("episode_index"), "episode_index", table["episode_index"].cast(pa.float64()))
    of_another = table.replace_schema_metadata({artifacts.PARQUET_KEY: json.dumps({"fingerprint": "another"})})
    for wrong, changes, said in (
        (table.drop(["frame_index"]), {}, "has no column frame_index; which frame is which"),
        (table.drop([column]), {}, "no progress_dense, which rabc.head_mode asks for; it has no progress"),
        (table, {"head_mode": "sparse"}, r"no progress_sparse, .* it has progress_dense"),
        (doubles, {}, "episode_index is double; whole numbers say"),
        (numbers, {}, "progress_dense is int64, not a number from 0 to 1"),
        (of_another, {}, rf"is the progress of another dataset \(another, {dataset.root.name} is"),
        (holed, {}, r"is no number in 1 of .* frames, first in episode 0 at frame 7"),
        (with_one(np.inf), {"lerobot_compat": True}, r"number from 0 to 1, and is not in 1 of .* at frame 7"),
        (with_one(1.5), {}, r"number from 0 to 1, and is not in 1 of .* first in episode 0 at frame 7"),
        (table.slice(0, len(table) - 3), {}, r"lacks 3 of .* frames, first in episode \d+ at frame"),
        (nothing, {"lerobot_compat": True}, "progress_dense is no number in any frame"),
    ):
        pq.write_table(wrong, theirs)
        asked = taken.model_copy(update={"rabc": taken.rabc.model_copy(update=changes)})
        with pytest.raises(ValueError, match=f"rabc.progress_path: .*{said}"):
            rabc.take_progress(tmp_path / "taken.parquet", asked, dataset)
    pq.write_table(holed, theirs)
    asked = taken.model_copy(update={"rabc": taken.rabc.model_copy(update={"lerobot_compat": True})})
    rabc.take_progress(tmp_path / "taken.parquet", asked, dataset)
    theirs.write_text("index,progress_sparse")
    with pytest.raises(ValueError, match=r"rabc.progress_path: sarm_progress.parquet is no Parquet file"):
        rabc.take_progress(tmp_path / "other.parquet", taken, dataset)
