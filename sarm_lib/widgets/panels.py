"""Panels of curves over the frames of one episode, under a player's pictures: progress, weights, what the robot says of itself.

They travel as float32 in a message of their own, so that a saved notebook holds none of them. panels.js draws.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from sarm_lib.charts import STAGE_COLOURS
from sarm_lib.dataset import Dataset, Episode, vector_names


@dataclass(frozen=True)
class Panel:
    """Curves over the frames of one episode, drawn on one pair of axes.

    curves: name: (T,) values, one a frame; the first is drawn on top. `areas` are stacked, the first at the bottom.
    domain: of the values, None for what the curves need. own: (curves, 2) lowest and highest value of each, where every line
    has an axis of its own. colours: of the curves, None for those of the stages.
    """

    title: str
    curves: dict[str, np.ndarray]
    kind: Literal["lines", "areas"] = "lines"
    domain: tuple[float, float] | None = (0, 1)
    colours: list[str] | None = None
    dashed: tuple[str, ...] = ()  # names of curves
    own: np.ndarray | None = None


def packed(panel: Panel, episode: Episode) -> tuple[dict, bytes]:
    """A panel as the view takes it: what to draw, and (curves, T) float32, little-endian.

    Raises ValueError naming episode, panel and curve.
    """
    where, names, rows = f"episode {episode.index}, panel {panel.title!r}", list(panel.curves), []
    colours = panel.colours or [STAGE_COLOURS[i % len(STAGE_COLOURS)] for i in range(len(names))]
    if panel.kind not in ("lines", "areas"):
        raise ValueError(f"{where}: kind is lines or areas, not {panel.kind!r}")
    if not names or len(colours) != len(names):
        raise ValueError(f"{where}: {len(names)} curves and {len(colours)} colours")
    if not set(panel.dashed) <= set(names):
        raise ValueError(f"{where}: dashed names {', '.join(set(panel.dashed) - set(names))}, which is no curve")
    for name, given in panel.curves.items():
        values = np.asarray(given, dtype="<f4")
        if values.shape != (episode.length,):
            raise ValueError(f"{where}, curve {name!r}: values {values.shape} for {episode.length} frames")
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ValueError(f"{where}, curve {name!r}: {len(bad)} values are not finite, first at frame {bad[0]}")
        if panel.kind == "areas" and values.min() < 0:
            raise ValueError(f"{where}, curve {name!r}: below 0 at frame {values.argmin()}, which no stack can show")
        rows.append(values)
    stacked = np.stack(rows)
    spec = {
        "title": panel.title,
        "kind": panel.kind,
        "names": names,
        "colours": list(colours),
        "dashed": list(panel.dashed),
    }
    return spec | _axes(panel, stacked, where), stacked.tobytes()


def _axes(panel: Panel, values: np.ndarray, where: str) -> dict:
    """`domains` of the curves, and whether they are one (`shared`)."""
    areas = panel.kind == "areas"
    if panel.own is None:
        domains = [panel.domain or _domain(values.sum(0, keepdims=True) if areas else values, panel.kind)] * len(values)
    elif areas or np.shape(panel.own) != (len(values), 2):
        raise ValueError(f"{where}: {len(values)} {panel.kind}, and axes of their own {np.shape(panel.own)}")
    else:
        domains = [_domain(np.array(extremes), panel.kind) for extremes in panel.own]
    for low, high in domains:
        if not low < high:
            raise ValueError(f"{where}: domain {low} to {high}")
    return {"domains": [[float(low), float(high)] for low, high in domains], "shared": panel.own is None}


def on_one_axis(panel: Panel) -> Panel:
    """The same for a picture, which has one axis: lines that have one each go from 0 to 1."""
    if panel.own is None:
        return panel
    scaled = {
        n: (v - low) / ((high - low) or 1) for (n, v), (low, high) in zip(panel.curves.items(), panel.own, strict=True)
    }
    return replace(panel, curves=scaled, domain=(0, 1), own=None)


def _domain(values: np.ndarray, kind: str) -> tuple[float, float]:
    """What holds all values with a margin; areas stand on 0, and a constant has room on both sides."""
    low, high = (0.0 if kind == "areas" else float(values.min())), float(values.max())
    margin = 0.05 * (high - low) or max(0.5, 1e-3 * abs(high))
    return (0.0 if kind == "areas" else low - margin), high + margin


def actions(dataset: Dataset, episode: Episode) -> Panel:
    """What the robot was told to do."""
    return Panel("action", _named(dataset, "action", dataset.actions[episode.rows]), domain=None)


def state(dataset: Dataset, episode: Episode) -> Panel:
    """What the robot says of itself, each component from its least to its most in this dataset."""
    rows = dataset.states
    curves = _named(dataset, dataset.state_key, rows[episode.rows])
    return Panel("state", curves, own=np.stack([rows.min(0), rows.max(0)], axis=1))


def _named(dataset: Dataset, key: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The components of (T, D), by the names that the dataset has for them; numbered where it has not as many different ones."""
    names = list(map(str, vector_names(dataset, key)))
    names = names if len(set(names)) == rows.shape[1] == len(names) else [str(i) for i in range(rows.shape[1])]
    return dict(zip(names, rows.T, strict=True))
