"""The κ and Δ explorer without a browser."""

import numpy as np
import pytest

from sarm_lib import rabc
from sarm_lib.widgets.kappa import KappaExplorer

EPISODE = np.repeat(np.arange(4), 100)


def made(scale: float = 1.0, kappa: float = 0.02, delta_frames: int = 8) -> KappaExplorer:
    phi = scale * (np.tile(np.linspace(0, 1, 100), 4) + np.random.default_rng(0).normal(0, 0.01, 400)).astype("f4")
    return KappaExplorer(phi, EPISODE, [0, 1, 2], kappa, delta_frames, 1e-6, 64)


@pytest.fixture(autouse=True)
def nowhere():
    """No test goes on where another one left its sliders."""
    KappaExplorer.PLACES.clear()


def test_it_says_what_the_weights_would_be():
    sliders = made()
    mine = EPISODE < 3
    delta = rabc.deltas(sliders._phi, EPISODE[mine], 8)
    weight = rabc.weights(delta, delta.mean(), delta.std(), 0.02, 1e-6)
    assert f"mean weight <b>{weight.mean():.2f}</b>" in sliders.said.value and bytes(sliders.picture.value).startswith(
        b"\x89PNG"
    )
    sliders.kappa.value = sliders.kappa.max
    full = rabc.weights(delta, delta.mean(), delta.std(), sliders.kappa.value, 1e-6) == 1
    assert f"weight 1 for {full.mean():.0%}" in sliders.said.value


@pytest.mark.parametrize("scale", [1, 1e-3])
def test_the_slider_of_kappa_is_as_fine_as_r(scale):
    sliders = made(scale, kappa=0.02 * scale)
    assert sliders.kappa.value == pytest.approx(0.02 * scale)
    assert 0.05 * scale < sliders.kappa.max < scale and sliders.kappa.step == pytest.approx(sliders.kappa.max / 200)
    sliders.kappa.value = 0.031 * scale
    assert float(f"{0.031 * scale:{sliders.kappa.readout_format}}") == pytest.approx(0.031 * scale, rel=0.02)
    before = sliders.kappa.max
    sliders.delta_frames.value = 40  # five times the gain
    assert sliders.kappa.max > 3 * before and sliders.kappa.value == pytest.approx(0.031 * scale)


def test_the_sliders_stay_where_they_were_until_the_parameters_change():
    sliders = made()
    sliders.kappa.value, sliders.delta_frames.value = 0.05, 16
    again = made()
    assert (again.kappa.value, again.delta_frames.value) == (0.05, 16)
    assert made(kappa=0.03).kappa.value == 0.03


def test_the_weights_of_lerobot_where_these_are_asked_for():
    phi = np.tile(np.linspace(0, 1, 100, dtype="f4"), 4)
    given = phi, EPISODE, [0], 0.005, 8, 1e-6, 64
    ours, theirs = KappaExplorer(*given), KappaExplorer(*given, lerobot_compat=True)
    assert len(ours._phi) == 100 and len(theirs._phi) == 400
    assert "weight 1 for 100%" in ours.said.value
    assert "weight 1 for 99%" in theirs.said.value  # r shrinks to 0 in the last frames of an episode


def test_a_picture_where_nobody_can_move_them():
    assert made()._repr_mimebundle_()["image/png"].startswith(b"\x89PNG")
    chart = made().still().to_dict()
    curves = {row["curve"] for table in chart["datasets"].values() for row in table if "curve" in row}
    assert curves == {"Δ = 4 frames", "Δ = 8 frames", "Δ = 16 frames"}
