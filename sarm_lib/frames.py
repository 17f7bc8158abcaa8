"""Single frames of an episode on demand: what a person who scrubs through a video asks for.

`Dataset.iterate_frames` decodes an episode from its first frame on. A `FrameReader` gives the same pixels in any order:
files stay open, the next frame is decoded from where the decoder stands, and for any other one it starts at the keyframe
before it. What was decoded on the way is kept, within a limit, so that steps back cost nothing.
"""

import io
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sarm_lib.dataset import REMEDY, Dataset, DatasetError, Episode, images_from

READ_ON = 30  # frames: a jump ahead that is no longer than this is decoded through, not sought
OPEN_FILES = 16


@dataclass
class _Video:
    """An open file and where its decoder stands: before frame `next` of `episode`, None where it has to seek."""

    container: av.container.InputContainer
    stream: av.VideoStream
    images: Iterator[av.VideoFrame] | None = None
    episode: int | None = None
    next: int = 0

    def seek(self, seconds: float, tolerance: float) -> None:
        """Go to the last keyframe that is shown at `seconds` or before."""
        self.images = images_from(self.container, self.stream, seconds + tolerance)


class FrameReader:
    """Reads single frames of a dataset. Keeps at most `cache_bytes` of decoded ones."""

    def __init__(self, dataset: Dataset, cache_bytes: int = 256 * 2**20):
        self.dataset = dataset
        self.cache_bytes = cache_bytes
        self._videos: OrderedDict[Path, _Video] = OrderedDict()
        self._kept: OrderedDict[tuple[int, str, int], av.VideoFrame] = OrderedDict()  # YUV: half the size of RGB
        self._kept_bytes = 0
        self._lock = threading.RLock()  # Lab may handle a widget's messages in several threads; a decoder takes one
        self._encoded: dict[str, tuple[int, pa.ChunkedArray]] = {}  # of image datasets: an episode's files, a camera

    def read(self, episode: Episode, image_key: str, frame: int) -> np.ndarray:
        """Frame `frame` of an episode, (H, W, 3) uint8, as `iterate_frames` gives it. Raises DatasetError."""
        with self._lock:
            return self._read(episode, image_key, frame)

    def _read(self, episode: Episode, image_key: str, frame: int) -> np.ndarray:
        if not 0 <= frame < episode.length:
            raise DatasetError(
                f"episode {episode.index}, {image_key}: there is no frame {frame}, it has {episode.length}"
            )
        if self.dataset.features[image_key]["dtype"] == "image":
            return self._read_image(episode, image_key, frame)
        key = (episode.index, image_key, frame)
        if key not in self._kept:
            self._decode(episode, image_key, frame)
        self._kept.move_to_end(key)
        return self._kept[key].to_ndarray(format="rgb24")

    def close(self) -> None:
        """Close every file and forget every frame."""
        with self._lock:
            while self._videos:
                self._videos.popitem()[1].container.close()
            self._kept.clear()
            self._encoded.clear()
            self._kept_bytes = 0

    def _decode(self, episode: Episode, image_key: str, frame: int) -> None:
        """Decode and keep frames up to `frame`."""
        row, prefix = self.dataset.table.iloc[episode.index], f"videos/{image_key}"
        path = self.dataset.root / self.dataset.info["video_path"].format(
            video_key=image_key, chunk_index=row[f"{prefix}/chunk_index"], file_index=row[f"{prefix}/file_index"]
        )
        first, fps = float(row[f"{prefix}/from_timestamp"]), self.dataset.fps
        where = f"episode {episode.index}, {image_key}"
        if not path.exists():
            raise DatasetError(f"{where}: {path.name} is missing; {REMEDY}")
        number = -1
        try:
            video = self._open(path)
            reads_on = video.episode == episode.index and 0 <= frame - video.next <= READ_ON
            if not reads_on:
                video.episode = None
                video.seek(first + frame / fps, 0.25 / fps)
            for image in video.images:
                number = round((float(image.pts * video.stream.time_base) - first) * fps)
                if number < 0:  # the episode before it in this file
                    continue
                self._keep((episode.index, image_key, number), image)
                video.episode, video.next = episode.index, number + 1
                if number >= frame:
                    break
        except (av.FFmpegError, IndexError) as error:
            self._forget(path)
            raise DatasetError(f"{where}: {path.name} cannot be decoded ({error}); {REMEDY}") from error
        if number > frame:
            self._forget(path)
            raise DatasetError(f"{where}: frame {frame} is missing in {path.name}; {REMEDY}")
        if number < frame:
            self._forget(path)
            raise DatasetError(f"{where}: {path.name} ends before frame {frame} of {episode.length}; {REMEDY}")

    def _open(self, path: Path) -> _Video:
        if path not in self._videos:
            container = av.open(str(path))
            stream = container.streams.video[0]
            stream.thread_type = "SLICE"  # frame threads decode ahead, which makes a single frame late
            self._videos[path] = _Video(container, stream)
        self._videos.move_to_end(path)
        while len(self._videos) > OPEN_FILES:
            self._videos.popitem(last=False)[1].container.close()
        return self._videos[path]

    def _forget(self, path: Path) -> None:
        if path in self._videos:
            self._videos.pop(path).container.close()

    def _keep(self, key: tuple[int, str, int], image: av.VideoFrame) -> None:
        if key in self._kept:
            self._kept_bytes -= _size(self._kept.pop(key))
        self._kept[key] = image
        self._kept_bytes += _size(image)
        while self._kept_bytes > self.cache_bytes and len(self._kept) > 1:
            self._kept_bytes -= _size(self._kept.popitem(last=False)[1])

    def _read_image(self, episode: Episode, image_key: str, frame: int) -> np.ndarray:
        row = self.dataset.table.iloc[episode.index]
        path = self.dataset.root / self.dataset.info["data_path"].format(
            chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
        )
        try:
            if self._encoded.get(image_key, (None,))[0] != episode.index:
                table = pq.read_table(path, columns=[image_key], filters=[("episode_index", "=", episode.index)])
                self._encoded[image_key] = (episode.index, table[image_key])
            cell = self._encoded[image_key][1][frame].as_py()
            source = io.BytesIO(cell["bytes"]) if cell["bytes"] else self.dataset.root / cell["path"]
            return np.array(Image.open(source).convert("RGB"))
        except (OSError, IndexError, pa.ArrowInvalid) as error:
            raise DatasetError(
                f"episode {episode.index}, {image_key}: frame {frame} cannot be read from {path.name} ({error}); {REMEDY}"
            ) from error


def jpeg(image: np.ndarray, width: int = 640, quality: int = 85) -> bytes:
    """A frame (H, W, 3) uint8 as a JPEG, no wider than `width`."""
    picture = Image.fromarray(image)
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _size(image: av.VideoFrame) -> int:
    return sum(plane.buffer_size for plane in image.planes)
