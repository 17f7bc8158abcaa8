"""Charts are drawn from datasets of any length: Altair takes 5,000 rows, an episode may have more frames."""

import numpy as np
import pandas as pd
import pytest

from sarm_lib import charts

FRAMES, NAMES = 9_000, ["reach", "grasp", "lift", "carry", "lower"]


def rng():
    return np.random.default_rng(0)


def long_episode():
    images = rng().integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    curve = np.linspace(0, 1, FRAMES)
    return charts.episode(
        images, ["0 s"] * 8, curve, curve, rng().dirichlet(np.ones(5), FRAMES), NAMES, 30, "a long episode"
    )


@pytest.mark.parametrize(
    "draw",
    [
        long_episode,
        lambda: charts.weights_over_time(np.linspace(0, 1, FRAMES), rng().random(FRAMES), 30, "weights").to_dict(),
        lambda: charts.delta_histogram(rng().normal(size=FRAMES), rng().random(FRAMES).round(), 0.1).to_dict(),
        lambda: charts.episode_lengths(
            pd.DataFrame(
                {"seconds": rng().random(FRAMES) * 90, "split": rng().choice(["train", "val", "test"], FRAMES)}
            )
        ).to_dict(),
    ],
)
def test_any_number_of_frames_can_be_drawn(draw):
    assert draw() is not None


def test_a_thinned_curve_keeps_its_ends_and_a_short_one_every_frame():
    assert charts.thinned(500).tolist() == list(range(500))
    shown = charts.thinned(100_000)
    assert len(shown) == charts.MOST_POINTS and shown[0] == 0 and shown[-1] == 99_999


def test_the_lengths_are_counted_once():
    table = pd.DataFrame({"seconds": [1.0, 2.0, 2.0, 60.0], "split": ["train", "train", "val", "test"]})
    rows = charts.episode_lengths(table).data
    assert rows.episodes.sum() == 4 and rows.groupby("split").episodes.sum().to_dict() == {
        "train": 2,
        "val": 1,
        "test": 1,
    }


def test_a_metric_that_some_rows_do_not_have_is_drawn_for_the_others():
    figures = {"sarm": {"voc": 0.9, "voc_low": 0.8, "voc_high": 1.0}, "time_linear": {"mse": 0.1}}
    assert charts.scorecard(figures, "voc", "VOC").to_dict()["height"] == 26
