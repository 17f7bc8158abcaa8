"""The κ and Δ explorer: two sliders, and what the weights would be. It reads, and changes nothing; what is good goes into
`params.yaml`."""

from collections.abc import Sequence

import ipywidgets
import numpy as np
import vl_convert

from sarm_lib import charts, rabc


class KappaExplorer(ipywidgets.VBox):
    """Sliders of κ and Δ over the histogram of r of some episodes, with the mean weight that they give.

    phi (N,) float: progress in the order of episode_index (N,). Arrow keys move a focused slider.
    """

    def __init__(
        self,
        phi: np.ndarray,
        episode_index: np.ndarray,
        episodes: Sequence[int],
        kappa: float,
        delta_frames: int,
        epsilon: float,
        most_frames: int,
    ) -> None:
        mine = np.isin(episode_index, episodes)
        self._phi, self._episode, self._epsilon = phi[mine], episode_index[mine], epsilon
        wide = ipywidgets.Layout(width="min(640px, 95%)")
        step = {"readout_format": ".3f", "step": 0.005, "min": 0.0}
        self.kappa = ipywidgets.FloatSlider(value=kappa, max=max(0.5, 2 * kappa), description="κ", layout=wide, **step)
        self.delta_frames = ipywidgets.IntSlider(
            value=delta_frames, min=1, max=most_frames, description="Δ (frames)", layout=wide
        )
        self.picture, self.said = ipywidgets.Image(format="png", layout=wide), ipywidgets.HTML()
        for slider in (self.kappa, self.delta_frames):
            slider.observe(lambda _: self._show(), "value")
        self._show()
        super().__init__([self.kappa, self.delta_frames, self.said, self.picture])

    def __repr__(self) -> str:
        return f"KappaExplorer(κ={self.kappa.value:g}, Δ={self.delta_frames.value}): open the notebook in JupyterLab to move them"

    def _show(self) -> None:
        delta = rabc.deltas(self._phi, self._episode, self.delta_frames.value)
        mean, std = max(float(delta.mean()), 0.0), max(float(delta.std()), self._epsilon)
        weight = rabc.weights(delta, mean, std, self.kappa.value, self._epsilon)
        chart = charts.delta_histogram(delta, weight, self.kappa.value)
        self.picture.value = vl_convert.vegalite_to_png(chart.to_json(), scale=2)
        self.said.value = (
            f"mean weight <b>{weight.mean():.2f}</b> (0.3 to 0.8 is healthy), weight 0 for {(weight == 0).mean():.0%}, weight 1 "
            f"for {(weight == 1).mean():.0%}; μ = {mean:.3f}, σ = {std:.3f}, μ + σ = {mean + std:.3f}"
        )
