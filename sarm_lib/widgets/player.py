"""What the scrubber and the explorer share: episodes to pick from, the frames of all cameras, and one playhead.

player.js draws and sends commands ({do: command, ...}). Frames are decoded when they are looked at and travel as JPEGs in
messages of their own, so that a saved notebook holds none of them.
"""

import io
import logging
import threading
from pathlib import Path
from typing import ClassVar

import anywidget
import traitlets
from PIL import Image

from sarm_lib import live
from sarm_lib.dataset import Dataset, DatasetError
from sarm_lib.frames import FrameReader, jpeg

log = logging.getLogger(__name__)


def source(*names: str) -> str:
    """The text of files beside this one, as one."""
    return "\n".join(Path(__file__).with_name(name).read_text() for name in names)


class Player(anywidget.AnyWidget):
    """Shows the episodes in `order` with `reasons` (why one is worth a look).

    Raises ValueError for an order without episodes, or with ones that the dataset does not have.
    """

    fps = traitlets.Float().tag(sync=True)
    cameras = traitlets.List().tag(sync=True)
    picker = traitlets.List().tag(sync=True)  # [episode, reason]
    episode = traitlets.Int().tag(sync=True)
    length = traitlets.Int().tag(sync=True)
    frame = traitlets.Int().tag(sync=True)  # where the view came to rest, and starts when the page is loaded again
    error = traitlets.Unicode().tag(sync=True)

    COMMANDS: ClassVar[frozenset[str]] = frozenset(("send_frame", "rest", "show_episode"))
    ASKING: ClassVar[frozenset[str]] = frozenset(
        ("send_frame", "rest")
    )  # the view's own: what went wrong stays in sight

    def __init__(self, dataset: Dataset, order: list[int], reasons: dict[int, str] | None = None, **traits):
        self._dataset, self._reader = dataset, FrameReader(dataset)
        self._episodes = {e.index: e for e in dataset.episodes}
        known = [int(i) for i in order]  # int: pandas gives its own
        unknown = [i for i in known if i not in self._episodes]
        if unknown or not known:
            raise ValueError(f"order: the dataset has no episodes {unknown}" if unknown else "no episode to show")
        self._one = threading.Lock()  # JupyterLab's first messages come in two threads, and a decoder knows only one
        super().__init__(
            fps=dataset.fps,
            cameras=[key.removeprefix("observation.").removeprefix("images.") for key in dataset.camera_keys],
            picker=[[i, (reasons or {}).get(i, "")] for i in known],
            **traits,
        )
        self.on_msg(self._receive)

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        """Where nobody can drag a playhead: a still of the shown episode."""
        bundle, metadata = super()._repr_mimebundle_(**kwargs)
        if not live.watched():
            picture = io.BytesIO()
            self.still().save(picture, format="png")
            bundle["image/png"] = picture.getvalue()
        return bundle, metadata

    def still(self) -> Image.Image:
        """The shown episode as a picture."""
        raise NotImplementedError

    # --- commands: the view sends them, and tests call them -----------------------------------------------------------

    def _receive(self, _, content: dict, buffers: list) -> None:
        """Run a command of the view; what goes wrong is shown there, and nothing is lost."""
        arguments = dict(content)
        command = arguments.pop("do", None)
        if command not in self.COMMANDS:
            self.error = f"unknown command {command!r}"
            return
        if command not in self.ASKING:
            self.error = ""
        try:
            with self._one:
                getattr(self, command)(**arguments)
        except (ValueError, OSError) as error:
            self.error = str(error)
        except Exception as error:  # else nobody would see that nothing was done
            log.exception("%s", command)
            self.error = f"{command} was not done: {type(error).__name__}: {error}"

    def send_frame(self, episode: int, frame: int) -> None:
        """Send one frame, a JPEG a camera; nothing of a camera that cannot be read, and why."""
        if episode != self.episode:  # the person has moved on
            return
        shown, images, problems = self._episodes[episode], [], []
        for key in self._dataset.camera_keys:
            try:
                images.append(jpeg(self._reader.read(shown, key, frame)))
            except DatasetError as error:  # the other cameras may be fine
                log.warning("%s", error)
                images.append(b"")
                problems.append(str(error))
        self.send({"episode": episode, "frame": frame, "error": "\n".join(dict.fromkeys(problems))}, buffers=images)

    def rest(self, episode: int, frame: int) -> None:
        """Remember where the view has stopped."""
        if episode == self.episode:
            self.frame = frame

    def show_episode(self, episode: int) -> None:
        """Show an episode from its first frame on."""
        raise NotImplementedError

    def look_at(self, frame: int) -> None:
        """Move the view's playhead. A message, as the view's own position may be newer than the trait."""
        self.send({"go": min(max(frame, 0), self.length - 1)})
