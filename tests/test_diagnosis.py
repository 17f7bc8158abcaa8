"""What weights say about a dataset: symptoms, a Δ, a verdict, which episodes and frames."""

import math
import shlex

import numpy as np
import pandas as pd
import pytest

from sarm_lib import diagnosis, rabc
from sarm_lib.dataset import open_dataset

FPS = 20


def weights_of(walks: list[np.ndarray], delta_frames: int = 4, kappa: float | str = "mean+std") -> tuple:
    """Weights of episodes with this progress, and the progress."""
    phi = np.concatenate(walks).astype(np.float32)
    episode = np.repeat(np.arange(len(walks)), [len(w) for w in walks])
    frame = np.concatenate([np.arange(len(w)) for w in walks])
    delta = rabc.deltas(phi, episode, delta_frames)
    mean, std = float(delta.mean()), float(delta.std())
    number = rabc.kappa_of(kappa, delta, mean, std, 1e-6)
    weight = rabc.weights(delta, mean, std, number, 1e-6)
    columns = np.arange(len(phi)), episode, frame, delta, weight
    return rabc.RabcWeights(*columns, mean, std, delta_frames, number, 1e-6), phi


STEADY = [np.linspace(0, 1, n) + 0.002 * np.sin(np.arange(n)) for n in (40, 44, 50, 42)]
STALLED = np.concatenate(
    [np.linspace(0, 0.5, 20), np.full(20, 0.5), np.linspace(0.5, 0.2, 12), np.linspace(0.2, 1, 30)]
)


@pytest.mark.parametrize(
    ("mean", "std", "weight", "expected"),
    [
        (0.1, 0.1, 0.5, None),
        (0.1, 0.1, 0.99, "raise rabc.kappa"),
        (0.1, 0.1, 0.85, "raise rabc.kappa"),
        (0.1, 0.1, 0.1, "lower rabc.kappa"),
        (-0.1, 0.1, 0.5, "delta mean ≤ 0"),
        (0.1, 0.0, 0.5, "delta std ≈ 0"),
    ],
)
def test_the_guide_s_table_of_symptoms(mean, std, weight, expected):
    found = diagnosis.warnings(
        {"delta_mean": mean, "delta_std": std, "mean_weight": weight, "kappa": 0.1, "delta_frames": 5}, 20
    )
    assert (not found) if expected is None else any(expected in text for text in found)


def test_a_delta_that_no_episode_lasts_is_a_symptom():
    healthy = {"delta_mean": 0.1, "delta_std": 0.1, "mean_weight": 0.5, "kappa": 0.1, "delta_frames": 20}
    assert diagnosis.warnings(healthy, 21) == []
    assert "Δ is 20 frames and no training episode has more than 20" in diagnosis.warnings(healthy, 20)[0]


def test_a_kappa_below_0_is_a_symptom():
    found = diagnosis.warnings(
        {"delta_mean": 0.1, "delta_std": 0.1, "mean_weight": 0.5, "kappa": -0.01, "delta_frames": 5}, 20
    )
    assert found == ["κ below 0: frames that lose progress count in full; set rabc.kappa to 0 or more"]


def test_the_verdict_is_of_what_can_be_filtered():
    steady, messy = weights_of(STEADY), weights_of([*STEADY, STALLED, STALLED])
    falling, through = weights_of([w[::-1] for w in STEADY]), weights_of([*STEADY, STALLED], kappa=-1.0)
    everyone = list(range(6))
    assert not (found := diagnosis.verdict(*steady, everyone, FPS)).likely and "consistent" in found.because
    assert (found := diagnosis.verdict(*messy, everyone, FPS)).likely and "stand still or go back" in found.because
    assert "does not rise" in diagnosis.verdict(*falling, everyone, FPS).because
    assert not diagnosis.verdict(*through, [0, 1], FPS).likely
    walk = np.random.default_rng(0).normal(0.002, 0.02, (6, 100)).cumsum(1)  # noise that drifts: no reward model
    astray = weights_of(list(0.5 + walk))
    assert (
        not (found := diagnosis.verdict(*astray, everyone, FPS)).likely and "look at the reward model" in found.because
    )


class Demos:
    """As much of a dataset as an episode table needs."""

    fps = FPS

    def __init__(self, lengths):
        self.lengths = lengths


def test_the_ranking_puts_the_worst_first_and_says_why(monkeypatch):
    walks = [STEADY[0], STALLED, STEADY[1]]
    computed, phi = weights_of(walks)
    table = pd.DataFrame({"episode": [0, 1, 2], "group": ["a", "b", "a"]})
    monkeypatch.setattr(diagnosis, "episode_table", lambda _: table)
    found = diagnosis.ranking(computed, Demos([len(w) for w in walks]), [0, 1, 2], phi)
    assert found.episode[0] == 1 and found.mean_weight.is_monotonic_increasing
    assert found.why[0].startswith("goes back at 0.9-2.5 s") and set(found.why[1:]) == {"steady"}
    assert found.stalled[0] > 0.3 and found.seconds[0] == len(STALLED) / FPS
    assert 1 not in set(diagnosis.ranking(computed, Demos([]), [0, 2], phi).episode)


def test_an_episode_that_is_done_does_not_stand_still(monkeypatch):
    """It gains nothing more at its end; one that loses what it had is said all the same."""
    rests = np.concatenate([np.linspace(0, 0.97, 40), np.full(20, 0.97)])
    drops = np.concatenate([np.linspace(0, 0.97, 40), np.linspace(0.97, 0.5, 20)])
    computed, phi = weights_of([*STEADY, rests, drops])
    table = pd.DataFrame({"episode": range(6), "group": ["a"] * 6})
    monkeypatch.setattr(diagnosis, "episode_table", lambda _: table)
    found = diagnosis.ranking(computed, Demos([]), [0, 4, 5], phi).set_index("episode").why
    assert found[4] == "steady" and found[5].startswith("goes back at")


def test_the_lightest_frame_is_where_most_is_lost():
    computed, phi = weights_of([STEADY[0], STALLED])
    light, heavy = diagnosis.extremes(computed, [0, 1], phi, 1)
    assert light.episode[0] == 1 and 40 <= light.frame[0] < 52 and light.delta[0] < 0 and light.weight[0] == 0
    assert heavy.delta[0] == computed.delta.max() and heavy.later[0] == heavy.frame[0] + 4
    assert len(diagnosis.extremes(computed, [0, 1], phi, 0)[0]) == 0
    heavy = diagnosis.extremes(computed, [1], phi, 1, {"reach": 0.1, "lift": 0.1, "lower": 0.8})[1]
    before, after = (phi[40 + heavy[key][0]] for key in ("frame", "later"))  # of the last thirty frames, from 0.2 on
    assert heavy.why[0] == f"progress {before:.2f} to {after:.2f}, in 'lower'"
    low = np.r_[np.linspace(0, 0.35, 10), np.linspace(0.35, 0.2, 4), np.linspace(0.2, 1, 30)]
    computed, phi = weights_of([low], delta_frames=3)
    assert diagnosis.extremes(computed, [0], phi, 1, {"reach": 0.3, "grasp": 0.1, "lift": 0.6})[0].why[0] == (
        "progress 0.35 to 0.20, from 'grasp' to 'reach'"
    )


def test_detection_knows_bad_from_productive_and_leaves_recovery_apart():
    computed, _ = weights_of([STEADY[0], STALLED])
    quality = np.concatenate([np.zeros(40), np.zeros(20), np.full(32, 1), np.full(5, 2), np.zeros(25)]).astype(int)
    groups = np.repeat(["clean", "messy"], [40, 82])
    found = diagnosis.detection(computed, quality, groups)
    assert list(found.index) == ["all", "clean", "messy"] and found.bad["all"] == 32
    bad, good = quality == 1, quality == 0
    pairs = np.mean(
        [(g > b) + 0.5 * (g == b) for g in computed.delta[good] for b in computed.delta[bad]]
    )  # what an area under the ROC curve is
    assert found.auc_delta["all"] == pytest.approx(pairs, abs=1e-6) and pairs > 0.8
    zero = computed.weight == 0
    assert found.zero_precision["all"] == pytest.approx((zero & bad).sum() / (zero & (bad | good)).sum())
    assert found.zero_recovering["all"] == pytest.approx(zero[quality == 2].mean())
    assert math.isnan(found.zero_recovering["clean"])
    assert math.isnan(found.auc_weight["clean"]) and "auc_weight" not in diagnosis.figures(found)["clean"]
    with pytest.raises(ValueError, match="quality has values 7; 0 is productive"):
        diagnosis.detection(computed, np.where(quality == 2, 7, quality), groups)


def test_only_the_worst_tenth_and_only_what_something_is_wrong_with_is_proposed_to_be_left_out():
    table = pd.DataFrame({"episode": range(40), "why": ["goes back", "steady", "stands still", "ends at 0.50"] * 10})
    assert diagnosis.worth_leaving_out(table) == [0, 2, 3]
    assert diagnosis.worth_leaving_out(table.head(4)) == []


@pytest.mark.parametrize("folder", [None, "data/demo/assembly"])
def test_lerobot_reads_the_command_that_leaves_episodes_out(tiny, folder):
    import draccus
    from lerobot.scripts.lerobot_edit_dataset import DeleteEpisodesConfig, EditDatasetConfig

    dataset = open_dataset(tiny)
    name, *arguments = shlex.split(diagnosis.delete_command(dataset, [7, 3], folder))
    found = draccus.parse(EditDatasetConfig, args=arguments)
    assert name == "lerobot-edit-dataset" and isinstance(found.operation, DeleteEpisodesConfig)
    assert found.operation.episode_indices == [3, 7] and found.repo_id == dataset.lerobot_metadata.repo_id
    assert (found.root, found.new_root) == ((folder, f"{folder}_filtered") if folder else (None, None))
