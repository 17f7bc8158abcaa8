"""The κ and Δ explorer: two sliders, and what the weights would be. It reads, and changes nothing; what is good goes into
`params.yaml`."""

from collections.abc import Sequence
from typing import ClassVar

import ipywidgets
import numpy as np
import pandas as pd
import vl_convert

from sarm_lib import charts, live, rabc

MOST_FRAMES = 200_000  # that a picture of all κ looks at


class KappaExplorer(ipywidgets.VBox):
    """Sliders of κ and Δ over the histogram of r of some episodes, with the mean weight that they give.

    phi (N,) float: progress in the order of episode_index (N,). Arrow keys move a focused slider. A cell that runs again
    goes on where the sliders were left, unless κ or Δ in `params.yaml` have changed. With lerobot_compat r, μ and σ are
    LeRobot's.
    """

    # Where the sliders were left, by the κ and Δ that were given.
    PLACES: ClassVar[dict[tuple[float, int], tuple[float, int]]] = {}

    def __init__(
        self,
        phi: np.ndarray,
        episode_index: np.ndarray,
        episodes: Sequence[int],
        kappa: float,
        delta_frames: int,
        epsilon: float,
        most_frames: int,
        lerobot_compat: bool = False,
    ) -> None:
        mine = np.isin(episode_index, episodes) | lerobot_compat  # LeRobot's μ and σ are of all episodes
        self._compat = lerobot_compat
        self._phi, self._episode, self._epsilon = phi[mine], episode_index[mine], epsilon
        self._given = (kappa, delta_frames)
        kappa, delta_frames = self.PLACES.get(self._given, self._given)
        look = {"layout": ipywidgets.Layout(width="min(640px, 95%)"), "continuous_update": False}
        self.kappa = ipywidgets.FloatSlider(min=0.0, description="κ", **look)
        self.delta_frames = ipywidgets.IntSlider(
            value=delta_frames, min=1, max=max(most_frames, delta_frames), description="Δ (frames)", **look
        )
        self.picture, self.said = ipywidgets.Image(format="png", layout=look["layout"]), ipywidgets.HTML()
        self._fit(kappa)
        self._show()
        self.kappa.observe(lambda _: self._show(), "value")
        self.delta_frames.observe(lambda _: (self._fit(self.kappa.value), self._show()), "value")
        super().__init__([self.kappa, self.delta_frames, self.said, self.picture])

    def __repr__(self) -> str:
        return f"KappaExplorer(κ={self.kappa.value:g}, Δ={self.delta_frames.value}): open the notebook in JupyterLab to move them"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """Where nobody can move the sliders: the mean weight by κ, for half of Δ, Δ and twice Δ."""
        bundle = super()._repr_mimebundle_(**kwargs)
        if not live.watched():
            bundle["image/png"] = vl_convert.vegalite_to_png(self.still().to_json(), scale=2)
        return bundle

    def still(self):
        """The mean weight by κ, for half of Δ, Δ and twice Δ."""
        delta_frames, tables = self.delta_frames.value, []
        for frames in sorted({max(1, delta_frames // 2), delta_frames, 2 * delta_frames}):
            delta, mean, std = self._deltas(frames)
            delta = delta[charts.thinned(len(delta), MOST_FRAMES)]
            kappas = np.linspace(0, self.kappa.max, 60)
            means = [rabc.weights(delta, mean, std, kappa, self._epsilon).mean() for kappa in kappas]
            tables.append(pd.DataFrame({"kappa": kappas, "mean weight": means, "curve": f"Δ = {frames} frames"}))
        title = "Mean weight by κ and Δ; 0.3 to 0.8 (grey) is healthy"
        return charts.mean_weights(pd.concat(tables), self.kappa.value, title)

    def _deltas(self, frames: int) -> tuple[np.ndarray, float, float]:
        """r (n,), μ and σ for a Δ."""
        if self._compat:
            delta = rabc.lerobot_deltas(self._phi, np.arange(len(self._phi)), self._episode, frames)
            delta = delta[np.isfinite(delta)]
        else:
            delta = rabc.deltas(self._phi, self._episode, frames)
        seen = delta if self._compat else delta[rabc.telling(self._episode, np.ones(len(delta), bool), frames)]
        return delta, max(float(seen.mean()), 0.0), max(float(seen.std()), self._epsilon)

    def _fit(self, kappa: float) -> None:
        """Let κ's slider span what r does with this Δ, in two hundred steps, whatever the size of r."""
        delta, mean, std = self._deltas(self.delta_frames.value)
        most = max(kappa, mean + 3 * std, float(np.quantile(np.abs(delta), 0.995)))
        digits = max(1, 1 - int(np.floor(np.log10(most / 200))))
        with self.kappa.hold_trait_notifications():
            self.kappa.readout_format = f".{digits}f"
            self.kappa.step, self.kappa.max, self.kappa.value = most / 200, most, kappa

    def _show(self) -> None:
        self.PLACES[self._given] = (self.kappa.value, self.delta_frames.value)
        delta, mean, std = self._deltas(self.delta_frames.value)
        weight = rabc.weights(delta, mean, std, self.kappa.value, self._epsilon)
        chart = charts.delta_histogram(delta, weight, self.kappa.value)
        self.picture.value = vl_convert.vegalite_to_png(chart.to_json(), scale=2)
        self.said.value = (
            f"mean weight <b>{weight.mean():.2f}</b> (0.3 to 0.8 is healthy), weight 0 for {(weight == 0).mean():.0%}, weight 1 "
            f"for {(weight == 1).mean():.0%}; μ = {mean:.3g}, σ = {std:.3g}, μ + σ = {mean + std:.3g}"
        )
