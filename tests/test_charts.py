"""Charts are drawn from datasets of any length: Altair takes 5,000 rows, an episode may have more frames."""

import io
import itertools
from types import SimpleNamespace

import altair as alt
import numpy as np
import pandas as pd
import pytest
import vl_convert
from matplotlib import font_manager
from PIL import Image

from sarm_lib import charts

FRAMES, NAMES = 9_000, ["reach", "grasp", "lift", "carry", "lower"]


def rng():
    return np.random.default_rng(0)


def long_episode():
    images = rng().integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    curve = np.linspace(0, 1, FRAMES)
    stages = dict(zip(NAMES, rng().dirichlet(np.ones(5), FRAMES).T, strict=True))
    panels = [charts.progress(curve, curve, 30, ""), charts.panel("stage", stages, 30, "areas")]
    return charts.episode(images, ["0 s"] * 8, panels, "a long episode")


def long_training(draw):
    steps = pd.DataFrame({"step": range(FRAMES), "loss": 1.0, "val": 1.0})
    return draw(steps)


def many_rollouts(number):
    ended = [SimpleNamespace(seed=i, success=i % 2 == 0) for i in range(number)]
    arms = {"bc": ended, "rabc": ended}
    return charts.rollouts({arm: [np.linspace(0, 1, 300)] * number for arm in arms}, arms, 30).to_dict()


def linked(episodes: int = 3, **curves):
    """Episode 5 has to be looked at first; the others follow."""
    table = pd.DataFrame({"episode": range(5, 5 + episodes), "group": "clean", "error": 0.1, "why": 'it\'s "late"'})
    curves = {i: curves or {"progress": rng().random(FRAMES), "weight": rng().random(FRAMES)} for i in table.episode}
    return charts.linked_episodes(table, "error", curves, 30, "episodes")


@pytest.mark.parametrize(
    "draw",
    [
        long_episode,
        lambda: linked(episodes=90).to_dict(),
        lambda: long_training(lambda t: charts.learning_curve(t, ["loss", "val"], "loss")).to_dict(),
        lambda: long_training(lambda t: charts.policy_curve(pd.concat([t.assign(arm=a) for a in "ab"]))).to_dict(),
        lambda: many_rollouts(3000),
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


def test_a_short_drop_in_a_long_episode_is_drawn():
    weight = np.ones(10_000)
    weight[7_123] = 0
    shown = charts.telling(weight, 80)
    assert 7_123 in shown and len(shown) <= 80
    assert charts.telling(weight[:60], 80).tolist() == list(range(60))
    drawn = max(linked(progress=np.linspace(0, 1, 10_000), weight=weight).to_dict()["datasets"].values(), key=len)
    assert min(row["weight"] for row in drawn) == 0


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


def test_a_chart_in_which_something_can_be_chosen_answers_where_somebody_watches(monkeypatch):
    monkeypatch.setattr(charts.live, "watched", lambda: True)
    charts.setup()
    bundle, _ = alt.renderers.get()(linked().to_dict())
    assert bundle["image/png"].startswith(b"\x89PNG")
    spec = bundle[charts.VEGA_LITE_OF_LAB]
    assert spec["$schema"].endswith("v5.json") and len(spec["params"]) == 2
    still, _ = alt.renderers.get()(charts.delta_histogram(rng().normal(size=99), np.ones(99), 0.1).to_dict())
    assert charts.VEGA_LITE_OF_LAB not in still and still["image/png"].startswith(b"\x89PNG")
    monkeypatch.setattr(charts.live, "watched", lambda: False)
    charts.setup()
    assert alt.renderers.active == "png"


def test_linked_episodes_carry_the_first_ones_within_a_limit_and_begin_with_the_first():
    spec = linked(episodes=90).to_dict()
    tables = sorted(spec["datasets"].values(), key=len)
    assert len(tables[0]) == charts.MOST_EPISODES
    assert charts.MOST_ROWS * 0.9 < len(tables[1]) <= charts.MOST_ROWS
    assert {row["episode"] for row in tables[1]} == set(range(5, 5 + charts.MOST_EPISODES))
    assert [p["value"] for p in spec["params"] if "value" in p] == [[{"episode": 5}]]
    short = linked(predicted=np.array([0.0, 0.5]), target=np.array([0.0, 1.0])).to_dict()
    assert {"episode": 6, "time": 0.033, "predicted": 0.5, "target": 1.0} in max(short["datasets"].values(), key=len)


def test_stages_are_compared_with_anything_that_has_a_name():
    table = pd.DataFrame([[0.9, 0.1], [0.0, 1.0]], index=["it's", "b.c"], columns=["it's", "b.c"])
    chart = charts.confusion(table, "Stages", "simulator's truth", "it's [said]")
    assert vl_convert.vegalite_to_png(chart.to_json()).startswith(b"\x89PNG")


def test_a_table_shows_whole_numbers_as_such_and_says_where_there_is_none():
    shown = charts.table(pd.DataFrame({"retries": [3.0, 0.0], "retry_recall": [0.75, float("nan")]}, index=["a", "b"]))
    assert shown.to_dict("list") == {"retries": [3, 0], "retry recall": [0.75, "–"]}
    assert "3.0" not in shown.to_string()


@pytest.mark.parametrize("length", [2, 40, 100_000])
def test_a_segment_of_two_frames_is_drawn_in_an_episode_of_any_length(length):
    rows = [("a", 0, 0), ("b", 1, 1)] if length == 2 else [("a", 0, 9), ("b", 10, 11), ("a", 12, length - 1)]
    page = charts.annotated_episode(
        np.zeros((10, 8, 8, 3), np.uint8), {"dense": rows}, {"dense": ["a", "b"]}, length, 30, ""
    )
    assert page.width > 1000


@pytest.mark.parametrize("name", ["Tür öffnen", "déposer la tasse", "открыть ящик", "φ > 0"])
def test_names_in_other_alphabets_are_drawn_with_a_font_that_has_them(name):
    """What a font has not it draws alike, as boxes."""
    drawn = {bytes(charts._font([name], 15).getmask(letter)) for letter in set(name) if letter > "~"}
    box = bytes(charts._font([name], 15).getmask("\uffff"))
    assert box not in drawn and len(drawn) == len({letter for letter in name if letter > "~"})


def test_letters_that_no_font_has_are_said_and_the_rest_is_drawn(monkeypatch, caplog):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    charts._font_file.cache_clear()
    assert charts._font(["open 打开抽屉"], 15).getmask("o").getbbox()
    assert "no font of this machine has 屉 开 打 抽" in caplog.text and "fonts-noto-cjk" in caplog.text
    charts._font_file.cache_clear()


def test_a_legend_is_not_wider_than_its_chart():
    joints = {f"{side}_joint_{i}.pos": np.arange(20.0) for side in ("left", "right") for i in range(7)}
    capitals = {f"MMMWWW MMMWWW {i}": np.arange(20.0) for i in range(8)}
    for curves, kind in itertools.product((joints, capitals), ("lines", "areas")):
        chart = charts.panel("action", curves, 10, kind, domain=None)
        picture = Image.open(io.BytesIO(vl_convert.vegalite_to_png(chart.to_json())))
        assert picture.width < 1.12 * charts.WIDTH  # with the numbers of the axis


def test_a_font_is_looked_for_once_whatever_the_numbers(monkeypatch):
    charts._font_file.cache_clear()
    for i in range(5):
        charts._font([f"Tür {i}"], 15)
    assert charts._font_file.cache_info().misses == 1


def test_names_that_fit_nowhere_stand_below_the_picture():
    images, names = (
        np.zeros((10, 8, 8, 3), np.uint8),
        {"sparse": ["all of it"], "dense": ["reach the handle", "grasp it"]},
    )

    def height(dense: list) -> int:
        rows = {"sparse": [("all of it", 0, 99)], "dense": dense}
        return charts.annotated_episode(images, rows, names, 100, 30, "").height

    fits = height([("reach the handle", 0, 49), ("grasp it", 50, 99)])
    assert height([("reach the handle", 0, 49), ("grasp it", 50, 96), ("reach the handle", 97, 99)]) == fits
    assert height([("reach the handle", 0, 3), ("grasp it", 4, 99)]) > fits
