"""The explorer: look at an episode frame by frame, with curves that move along. It reads, and changes nothing.

Frames of all cameras stand over any number of panels: progress and its target, stage probabilities, weights, actions.
Only the episode that is shown is asked for its panels. explorer.js draws.
"""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from sarm_lib import charts
from sarm_lib.charts import ACCENT, PREDICTED, TARGET, TRUTH
from sarm_lib.dataset import Dataset, Episode
from sarm_lib.progress import Scores
from sarm_lib.rabc import RabcWeights
from sarm_lib.stages import Labels
from sarm_lib.widgets.panels import Panel, actions, on_one_axis, packed
from sarm_lib.widgets.player import Player, source


class Explorer(Player):
    """Shows the episodes in `order` with `reasons` (why one is worth a look), and `panels(episode)` of the shown one.

    Raises ValueError for panels of the first episode that are not right; those of a later one are told in the view.
    """

    _esm = source("player.js", "panels.js", "explorer.js")
    _css = source("player.css", "panels.css", "explorer.css")

    COMMANDS = Player.COMMANDS | {"send_panels"}
    ASKING = Player.ASKING | {"send_panels"}
    # Where an explorer of the same episodes was left, (episode, frame): a cell that runs again goes on from there.
    PLACES: ClassVar[dict[tuple, tuple[int, int]]] = {}

    def __init__(
        self,
        dataset: Dataset,
        panels: Callable[[Episode], list[Panel]],
        *,
        order: list[int] | None = None,
        reasons: dict[int, str] | None = None,
    ):
        self._panels_of = panels
        self._panels: list[tuple[dict, bytes]] = []  # of the shown episode: what to draw, and its values
        super().__init__(dataset, [e.index for e in dataset.episodes] if order is None else order, reasons)
        known = [i for i, _ in self.picker]
        self._key = (dataset.root, *known)
        self.show_episode(*self.PLACES.get(self._key, (known[0], 0)))

    def __repr__(self) -> str:
        titles = ", ".join(spec["title"] for spec, _ in self._panels)
        return f"Explorer: {len(self.picker)} episodes with {titles or 'no panel'}"

    def still(self) -> Image.Image:
        """The shown episode as a picture: eight of its frames over the panels."""
        return still(self._dataset, self._episodes[self.episode], self._panels_of(self._episodes[self.episode]))

    # --- commands: the view sends them, and tests call them -----------------------------------------------------------

    def send_panels(self, episode: int) -> None:
        """Send the panels, each with its curves' values one after the other, (curves, T) float32."""
        if episode == self.episode:
            content = {"episode": episode, "panels": [spec for spec, _ in self._panels]}
            self.send(content, buffers=[values for _, values in self._panels])

    def rest(self, episode: int, frame: int) -> None:
        """Remember where the view has stopped, for the next explorer too."""
        super().rest(episode, frame)
        if self.PLACES.get(self._key, (None,))[0] == episode == self.episode:  # one that failed is not gone back to
            self.PLACES[self._key] = (episode, frame)

    def show_episode(self, episode: int, frame: int = 0) -> None:
        """Show an episode. Raises ValueError for panels that are not right; then its frames are shown without any."""
        if episode not in self._episodes:
            raise ValueError(f"the dataset has no episode {episode}")
        shown, self._panels = self._episodes[episode], []
        try:
            self._panels = self._packed(shown)
            self.PLACES[self._key] = (episode, frame)
        finally:  # after the panels, which the view asks for as soon as it hears of the episode
            with self.hold_sync():
                self.length, self.frame, self.episode, self.error = shown.length, frame, episode, ""

    def _packed(self, episode: Episode) -> list[tuple[dict, bytes]]:
        try:
            panels = self._panels_of(episode)
        except Exception as error:  # anyone's code: the view tells what a callback would only log
            raise ValueError(f"episode {episode.index}: its panels raise {type(error).__name__}: {error}") from error
        return [packed(panel, episode) for panel in panels]


def still(
    dataset: Dataset, episode: Episode, panels: list[Panel], labels: list[str] | None = None, title: str | None = None
) -> Image.Image:
    """An episode as a picture: as many frames as `labels`, or eight, over its panels."""
    frames = np.linspace(0, episode.length - 1, len(labels or range(8))).astype(int)
    height = charts.HEIGHT // (1 if len(panels) <= 2 else 2)
    return charts.episode(
        dataset.read_frames(episode, dataset.image_keys[0], frames),
        labels or [f"{frame / dataset.fps:.2f} s" for frame in frames],
        [
            charts.panel(p.title, p.curves, dataset.fps, p.kind, p.domain, p.colours, p.dashed, height)
            for p in map(on_one_axis, panels)
        ],
        title or episode.title,
    )


# --- what a reward model says, and what comes of it -----------------------------------------------------------------------


def of_scores(
    dataset: Dataset,
    scores: dict[tuple[int, str], Scores],
    labels: Labels,
    head: str,
    order: list[int] | None = None,
    reasons: dict[int, str] | None = None,
    truth: dict[int, np.ndarray] | None = None,
) -> Explorer:
    """Scored episodes of one head: progress and target, the stage probabilities where there are several stages, actions.

    truth: of an episode, the progress (T,) that a simulator knows, to be drawn beside them.
    """
    scored = sorted(i for i, of in scores if of == head)
    missing = sorted(set(order or ()) - set(scored))
    if missing:
        raise ValueError(f"order: episodes {missing} have no {head} scores")

    def panels(episode: Episode) -> list[Panel]:
        known = (truth or {}).get(episode.index)
        return [*_of_scores(episode, scores[episode.index, head], labels, head, known), actions(dataset, episode)]

    return Explorer(dataset, panels, order=scored if order is None else order, reasons=reasons)


def _of_scores(
    episode: Episode, scores: Scores, labels: Labels, head: str, truth: np.ndarray | None = None
) -> list[Panel]:
    curves, colours, dashed = {"predicted": scores.progress}, [PREDICTED], ()
    if episode.index in labels.annotated:
        curves["target"], dashed = labels.progress(episode, head), ("target",)
        colours.append(TARGET)
    if truth is not None:
        curves["truth"] = truth
        colours.append(TRUTH)
    found = [Panel("progress φ", curves, colours=colours, dashed=dashed)]
    if len(names := labels.stage_names[head]) > 1:
        found.append(Panel("stage probability", dict(zip(names, scores.probabilities.T, strict=True)), "areas"))
    return found


def of_weights(
    dataset: Dataset,
    weights: RabcWeights,
    phi: np.ndarray,
    stages: dict[str, float],
    order: list[int] | None = None,
    reasons: dict[int, str] | None = None,
) -> Explorer:
    """Weighted episodes: progress φ (N,) in the order of `weights`, the stage that it lies in, the weight, and actions.

    stages: ᾱ of every stage of the head that made φ, by name and in order; without them no stages are shown.
    """
    edges = np.cumsum(list(stages.values()))[:-1]

    def panels(episode: Episode) -> list[Panel]:
        rows = np.flatnonzero(weights.episode_index == episode.index)
        rows = rows[np.argsort(weights.frame_index[rows], kind="stable")]
        found = [Panel("progress φ", {"progress": phi[rows]}, colours=[PREDICTED])]
        if len(stages) > 1:
            # Eq 2 read backwards: a stage is what φ has reached of the stages' shares
            reached = np.searchsorted(edges, phi[rows], side="right")
            shown = {name: (reached == k).astype(np.float32) for k, name in enumerate(stages)}
            found.append(Panel("stage that φ lies in", shown, "areas"))
        found.append(Panel("weight w", {"weight": weights.weight[rows]}, colours=[ACCENT]))
        return [*found, actions(dataset, episode)]

    return Explorer(dataset, panels, order=order, reasons=reasons)


def save_film(
    path: Path, dataset: Dataset, episode: Episode, scores: Scores, labels: Labels, head: str, most: int = 48
) -> None:
    """The same as a moving picture that mail and web pages play (GIF): at most `most` pictures, at a third of the speed
    and with a rest at the end."""
    frames = charts.thinned(episode.length, most)
    pages = charts.moving_episode(
        dataset.read_frames(episode, dataset.image_keys[0], frames),
        frames,
        scores.progress,
        labels.progress(episode, head) if episode.index in labels.annotated else None,
        dataset.fps,
        f"{episode.title}, {head} head",
    )
    charts.save_film(path, pages, 3 * episode.length / dataset.fps)


def picture(
    dataset: Dataset,
    episode: Episode,
    scores: Scores,
    labels: Labels,
    head: str,
    truth: np.ndarray | None = None,
    count: int = 8,
) -> Image.Image:
    """The same as a still: `count` frames of an episode with the progress that is seen in them, over its curves."""
    frames = np.linspace(0, episode.length - 1, count).astype(int)
    said = [f"{frame / dataset.fps:.2f} s: {scores.progress[frame]:.2f}" for frame in frames]
    return still(
        dataset, episode, _of_scores(episode, scores, labels, head, truth), said, f"{episode.title}, {head} head"
    )
