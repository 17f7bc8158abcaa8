"""A LeRobot v3 dataset as the other modules see it: episodes, columns, splits, and every frame once, in order.

Opening checks what later stages rely on (cameras, states, lengths, timestamps); what is wrong is an error that names
the episode, the key and the remedy. Nothing here knows which dataset it is.
"""

import hashlib
import io
import itertools
import json
import math
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from sarm_lib.artifacts import digest

SPLITS = ("train", "val", "test")
REJECTED = "rejected"  # in place of a split, see `Dataset.without`
TRUTH = "sim."  # prefix of columns with a simulator's truth: scored against, never learned or chosen from
REMEDY = "record or download the file again, or delete the episode with lerobot-edit-dataset."
DECODED_AT_ONCE = 64  # frames
ANNOTATED = ("names", "start_times", "end_times", "start_frames", "end_frames")
ANNOTATION_COLUMNS = frozenset(  # of episodes, that an annotated copy adds, and that its frames do not depend on
    f"{head}subtask_{name}" for head in ("", "sparse_", "dense_") for name in ANNOTATED
)


class DatasetError(ValueError):
    """A dataset that cannot be used as it is; the message says where and what to do."""


@dataclass(frozen=True)
class Episode:
    """One episode: frames `start` to `start + length` of the dataset, rows `row` to `row + length` of our arrays."""

    index: int
    length: int
    start: int  # global frame index of the first frame, LeRobot's `dataset_from_index`
    row: int  # first row in the arrays of this `Dataset`; equals `start` unless only some episodes are used
    split: str
    group: str

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.length)

    @property
    def title(self) -> str:
        """What a figure calls it."""
        return f"episode {self.index}" + (f" ({self.group})" if self.group != "all" else "")


@dataclass(frozen=True)
class Dataset:
    """An opened dataset. Arrays have one row a frame, in the order of the episodes."""

    root: Path
    info: dict  # meta/info.json
    table: pd.DataFrame  # meta/episodes without statistics, a row an episode of the whole dataset
    episodes: tuple[Episode, ...]  # the ones that are used
    image_keys: tuple[str, ...]  # cameras that the reward model sees
    state_key: str

    @property
    def fps(self) -> int:
        return self.info["fps"]

    @property
    def features(self) -> dict[str, dict]:
        return self.info["features"]

    @property
    def camera_keys(self) -> list[str]:
        """Every camera of the dataset."""
        return _camera_keys(self.info)

    @cached_property
    def fingerprint(self) -> str:
        """Names what the frames are (`fingerprint`), as they were when it was first asked for."""
        return fingerprint(self.root)

    @cached_property
    def lerobot_metadata(self):
        """LeRobot's own view of the dataset. Imported here: it takes LeRobot ten seconds to load."""
        from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

        return LeRobotDatasetMetadata(f"local/{self.root.name}", root=self.root)

    @property
    def num_frames(self) -> int:
        return sum(episode.length for episode in self.episodes)

    @cached_property
    def tasks(self) -> list[str]:
        """Task texts by their number; an unused number has an empty one."""
        tasks = pd.read_parquet(self.root / "meta/tasks.parquet")
        texts = dict(zip(tasks.task_index.tolist(), tasks.index.astype(str)))
        return [texts.get(i, "") for i in range(max(texts, default=-1) + 1)]

    def without(self, rejected: Collection[int]) -> "Dataset":
        """The same rows, with the `rejected` episodes in none of the splits: nothing is learned from them, nor judged by them."""
        episodes = (replace(e, split=REJECTED) if e.index in rejected else e for e in self.episodes)
        return replace(self, episodes=tuple(episodes))

    def split(self, name: str) -> tuple[Episode, ...]:
        return tuple(episode for episode in self.episodes if episode.split == name)

    @cached_property
    def frames(self) -> pd.DataFrame:
        """`index`, `episode_index`, `frame_index`, `task_index` and `timestamp` of every frame."""
        names = ["index", "episode_index", "frame_index", "task_index", "timestamp"]
        return self._table(names).to_pandas()

    @property
    def states(self) -> np.ndarray:
        """Robot states, (N, D) float32, all finite."""
        return self.vectors(self.state_key)

    @property
    def actions(self) -> np.ndarray:
        """Actions, (N, A) float32, all finite."""
        return self.vectors("action")

    def iterate_frames(
        self, image_key: str, episodes: tuple[Episode, ...] | None = None
    ) -> Iterator[tuple[Episode, np.ndarray]]:
        """Every frame of a camera (of all episodes, or of some), decoded in order: (episode, (H, W, 3) uint8)."""
        decode = decode_with_torchcodec if torchcodec() else decode_with_pyav
        return self._iterate_frames(image_key, self.episodes if episodes is None else episodes, decode)

    def _iterate_frames(
        self, image_key: str, episodes: tuple[Episode, ...], decode: Callable
    ) -> Iterator[tuple[Episode, np.ndarray]]:
        if self.features[image_key]["dtype"] == "image":
            yield from self._read_images(episodes, image_key)
            return
        for episode in episodes:
            for image in self._decode(episode, image_key, decode):
                yield episode, image

    def read_frames(self, episode: Episode, image_key: str, frame_indices: list[int]) -> np.ndarray:
        """Single frames of an episode, to show them: (n, H, W, 3) uint8."""
        wanted = {int(i): None for i in frame_indices}
        # torchcodec takes longer to load than a page of pictures takes with PyAV
        for i, (_, image) in enumerate(self._iterate_frames(image_key, (episode,), decode_with_pyav)):
            if i in wanted:
                wanted[i] = image
            if i >= max(wanted):
                break
        return np.stack([wanted[int(i)] for i in frame_indices])

    def _table(self, columns: list[str]) -> pa.Table:
        """Columns of the data files, rows of the used episodes in order."""
        paths = sorted(self.root.glob("data/**/*.parquet"))
        table = pa.concat_tables([pq.read_table(path, columns=columns) for path in paths])
        kept = pa.array([episode.index for episode in self.episodes])
        if "episode_index" not in columns:
            episode_index = pa.concat_tables([pq.read_table(path, columns=["episode_index"]) for path in paths])[0]
        else:
            episode_index = table["episode_index"]
        return table.filter(pc.is_in(episode_index, kept))

    @cached_property
    def _read_vectors(self) -> dict[str, np.ndarray]:
        return {}

    def vectors(self, key: str) -> np.ndarray:
        """A column of vectors, (N, D) float32, read once. Raises DatasetError where it is none of `features`, or not
        finite."""
        if key not in self.features:
            raise DatasetError(f"{key}: the dataset has no such column; it has {', '.join(self.features)}")
        if key not in self._read_vectors:
            self._read_vectors[key] = self._finite_vectors(key)
        return self._read_vectors[key]

    def truth(self, name: str, prefix: str | None) -> np.ndarray | None:
        """A simulator's number a frame, (N,) float32: the column `name` behind `prefix`. For scoring only.

        None without a prefix or such a column. Raises DatasetError for a prefix that no column has.
        """
        if prefix and not any(key.startswith(prefix) for key in self.features):
            raise DatasetError(f"base.truth_prefix: no column begins with {prefix!r}; null where there is no truth")
        key = f"{prefix}{name}"
        return self.vectors(key)[:, 0] if prefix and key in self.features else None

    def _finite_vectors(self, key: str) -> np.ndarray:
        column = self._table([key])[key].combine_chunks()
        values = column.flatten() if pa.types.is_nested(column.type) else column
        vectors = np.asarray(values, dtype=np.float32).reshape(len(column), -1)
        bad = np.flatnonzero(~np.isfinite(vectors).all(1))
        if len(bad):
            where = self.frames.iloc[bad[0]]
            raise DatasetError(
                f"{key} is NaN or infinite in {len(bad)} frames, first in episode {int(where.episode_index)} at frame "
                f"{int(where.frame_index)}: repair it, or delete the episode with lerobot-edit-dataset."
            )
        return vectors

    def _video(self, episode: Episode, image_key: str) -> tuple[Path, float]:
        """The file with an episode's video, and the second in it at which the episode begins."""
        row, prefix = self.table.iloc[episode.index], f"videos/{image_key}"
        path = self.root / self.info["video_path"].format(
            video_key=image_key, chunk_index=row[f"{prefix}/chunk_index"], file_index=row[f"{prefix}/file_index"]
        )
        if not path.exists():
            raise DatasetError(f"episode {episode.index}, {image_key}: {path.name} is missing; {REMEDY}")
        return path, float(row[f"{prefix}/from_timestamp"])

    def _decode(self, episode: Episode, image_key: str, decode: Callable) -> Iterator[np.ndarray]:
        """An episode's frames from its video file, in order; reading on from the last keyframe before it."""
        path, first = self._video(episode, image_key)
        expected = 0
        try:
            for seconds, image in decode(path, first, episode.length, self.fps):
                if round((seconds - first) * self.fps) != expected:
                    raise DatasetError(
                        f"episode {episode.index}, {image_key}: frame {expected} is missing in {path.name}; {REMEDY}"
                    )
                yield image
                expected += 1
                if expected == episode.length:
                    return
        except (av.FFmpegError, IndexError, RuntimeError) as error:
            raise DatasetError(
                f"episode {episode.index}, {image_key}: {path.name} cannot be decoded ({error}); {REMEDY}"
            ) from error
        raise DatasetError(
            f"episode {episode.index}, {image_key}: {path.name} ends after {expected} of {episode.length} frames; {REMEDY}"
        )

    def content(self, episode: Episode, image_key: str) -> str:
        """Names what an episode's camera shows, by its bytes: the same in a dataset that has grown. Decodes nothing."""
        found = hashlib.sha256(str(episode.length).encode())
        if self.features[image_key]["dtype"] == "image":
            row = self.table.iloc[episode.index]
            path = self.root / self.info["data_path"].format(
                chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
            )
            cells = pq.read_table(path, columns=[image_key], filters=[("episode_index", "=", episode.index)])[image_key]
            for cell in cells.to_pylist():
                found.update(cell["bytes"] or (self.root / cell["path"]).read_bytes())
            return found.hexdigest()[:32]
        path, first = self._video(episode, image_key)
        try:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                found.update(stream.codec_context.extradata or b"")
                for packet in packets_from(container, stream, first + 0.25 / self.fps):
                    if packet.dts is None or packet.dts * stream.time_base >= first + episode.length / self.fps:
                        break
                    frame = round((float(packet.pts * stream.time_base) - first) * self.fps)
                    if frame < episode.length:  # not the next episode's, which a file may list before it is shown
                        found.update(f"{frame} ".encode() + bytes(packet))
        except (av.FFmpegError, IndexError) as error:
            raise DatasetError(
                f"episode {episode.index}, {image_key}: {path.name} cannot be read ({error}); {REMEDY}"
            ) from error
        return found.hexdigest()[:32]

    def _read_images(self, episodes: tuple[Episode, ...], image_key: str) -> Iterator[tuple[Episode, np.ndarray]]:
        """Frames of a dataset that stores images instead of videos. A data file is read once, a few rows at a time, for
        all episodes that follow each other in it."""
        for path, members in self._runs(episodes):
            wanted, read = {episode.index: episode for episode in members}, dict.fromkeys(members, 0)
            with pq.ParquetFile(path) as file:
                groups = [i for i in range(file.num_row_groups) if wanted.keys() & _episodes_of_group(file, i)]
                for batch in file.iter_batches(32, row_groups=groups, columns=["episode_index", image_key]):
                    indices = batch["episode_index"].to_pylist()
                    for row in (row for row, index in enumerate(indices) if index in wanted):
                        episode, cell = wanted[indices[row]], batch[image_key][row].as_py()
                        try:
                            source = io.BytesIO(cell["bytes"]) if cell["bytes"] else self.root / cell["path"]
                            image = np.array(Image.open(source).convert("RGB"))
                        except (OSError, TypeError) as error:
                            raise DatasetError(
                                f"episode {episode.index}, {image_key}: frame {read[episode]} in {path.name} cannot be "
                                f"read ({error}); {REMEDY}"
                            ) from error
                        read[episode] += 1
                        yield episode, image
            for episode, count in read.items():
                if count != episode.length:
                    raise DatasetError(
                        f"episode {episode.index}, {image_key}: {path.name} holds {count} of {episode.length} frames; {REMEDY}"
                    )

    def _runs(self, episodes: tuple[Episode, ...]) -> Iterator[tuple[Path, list[Episode]]]:
        """Stretches of `episodes` that follow each other in one data file, with its path."""
        run, path = [], None
        for episode in episodes:
            row = self.table.iloc[episode.index]
            file = self.root / self.info["data_path"].format(
                chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
            )
            if run and (file != path or episode.index < run[-1].index):
                yield path, run
                run = []
            run, path = [*run, episode], file
        if run:
            yield path, run


def _episodes_of_group(file: pq.ParquetFile, group: int) -> set[int]:
    return set(file.read_row_group(group, columns=["episode_index"])["episode_index"].to_pylist())


@cache
def torchcodec() -> bool:
    """Whether torchcodec finds FFmpeg's libraries; PyAV brings its own. Both give the same pixels."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def decode_with_torchcodec(path: Path, first: float, length: int, fps: float) -> Iterator[tuple[float, np.ndarray]]:
    """When each of `length` frames from second `first` on is shown, and its pixels (H, W, 3) uint8."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", seek_mode="approximate")
    for start in range(0, length, DECODED_AT_ONCE):
        stop = min(start + DECODED_AT_ONCE, length)
        frames = decoder.get_frames_played_in_range(first + (start + 0.25) / fps, first + (stop - 0.5) / fps)
        yield from zip(frames.pts_seconds.tolist(), frames.data.numpy(), strict=True)


def decode_with_pyav(path: Path, first: float, length: int, fps: float) -> Iterator[tuple[float, np.ndarray]]:
    """The same, without any library of the system's."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in images_from(container, stream, first + 0.25 / fps):
            seconds = float(frame.pts * stream.time_base)
            if seconds > first - 0.5 / fps:
                yield seconds, frame.to_ndarray(format="rgb24")


def images_from(
    container: av.container.InputContainer, stream: av.VideoStream, seconds: float
) -> Iterator[av.VideoFrame]:
    """Images of a video from the last keyframe on that is shown at `seconds` or before."""
    return _from_keyframe(container, stream, seconds, container.decode)


def packets_from(container: av.container.InputContainer, stream: av.VideoStream, seconds: float) -> Iterator[av.Packet]:
    """The same undecoded, in the order of the file."""
    return _from_keyframe(container, stream, seconds, container.demux)


def _from_keyframe(container, stream, seconds: float, read: Callable) -> Iterator:
    back = 0.0
    while True:
        start = max(0.0, seconds - back)
        container.seek(round(start / stream.time_base), backward=True, stream=stream)
        found = read(stream)
        first = next(found, None)
        # Files are indexed by decoding time, in which a keyframe may come before frames that are shown before it.
        if first is None or start == 0 or first.pts is None or first.pts * stream.time_base <= seconds:
            return itertools.chain([first] if first else [], found)
        back = 2 * back + 1


def open_dataset(
    dataset: str | Path,
    *,
    revision: str | None = None,
    image_keys: list[str] | None = None,
    state_key: str = "observation.state",
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    max_episodes: int | None = None,
    group_key: str | None = None,
    seed: int = 0,
) -> Dataset:
    """Open a local LeRobot v3 folder or a Hub dataset and check it. Raises DatasetError."""
    root = _locate(dataset, revision)
    info, table = _read_info(root), _episode_table(root)
    known, cameras = _camera_keys(info), tuple(image_keys or _camera_keys(info))
    for key in cameras:
        if key not in known:
            raise DatasetError(f"base.image_keys: no camera {key!r} in this dataset; it has {', '.join(known)}")
    vectors = [k for k, f in info["features"].items() if k.startswith(("observation.", "action")) and _is_vector(f)]
    if "action" not in info["features"]:
        raise DatasetError("this dataset has no action: policies cannot learn from it")
    if state_key not in vectors:
        raise DatasetError(f"base.state_key: no {state_key!r} in this dataset; its vectors are {', '.join(vectors)}")
    for row in table.itertuples():
        if row.length <= 0 or row.dataset_to_index - row.dataset_from_index != row.length:
            raise DatasetError(
                f"episode {row.episode_index} is empty or its length disagrees with its frames "
                f"(length {row.length}, frames {row.dataset_from_index} to {row.dataset_to_index}): "
                f"delete it with lerobot-edit-dataset --operation.type delete_episodes"
            )
    groups = _groups(table, group_key)
    splits = _splits(info, _task_of_each(table), val_fraction, test_fraction, seed)
    kept = _keep(splits, max_episodes)
    episodes, row = [], 0
    for index in kept:
        length = int(table.length.iloc[index])
        episodes.append(
            Episode(index, length, int(table.dataset_from_index.iloc[index]), row, splits[index], groups[index])
        )
        row += length
    opened = Dataset(root, info, table, tuple(episodes), cameras, state_key)
    if len(opened.frames) != opened.num_frames:
        raise DatasetError(
            f"the data files hold {len(opened.frames)} frames, the episode table {opened.num_frames}: download again"
        )
    _check_frames(opened)
    return opened


def _check_frames(dataset: Dataset) -> None:
    """Every frame is where the episode table says, at the time that its number says, and its task has a text."""
    frames, texts = dataset.frames, dataset.tasks
    numbers = frames.task_index.to_numpy()
    for number in np.unique(numbers).tolist():
        if not (0 <= number < len(texts) and texts[number].strip()):
            episode = int(frames.episode_index.to_numpy()[(numbers == number).argmax()])
            raise DatasetError(
                f"episode {episode}: meta/tasks.parquet has no text for its task, number {number}: write there what the robot "
                "does (lerobot-edit-dataset --operation.type modify_tasks)"
            )
    expected = np.concatenate([np.arange(e.start, e.start + e.length) for e in dataset.episodes])
    within = expected - np.concatenate([np.full(e.length, e.start) for e in dataset.episodes])
    late = np.abs(frames.timestamp.to_numpy() - within / dataset.fps) > 0.5 / dataset.fps
    for wrong, what in (
        (frames["index"].to_numpy() != expected, "is not where the episode table says"),
        (late, f"is not at the time that {dataset.fps} frames a second give it"),
    ):
        if wrong.any():
            where = frames.iloc[int(wrong.argmax())]
            raise DatasetError(
                f"episode {int(where.episode_index)}: frame {int(where.frame_index)} {what}: record or download it again, "
                "or delete the episode with lerobot-edit-dataset"
            )


def few_held_out(dataset: Dataset, enough: int = 10) -> str:
    """What to say where val or test has fewer than `enough` episodes; nothing where it is enough."""
    few = {name: len(dataset.split(name)) for name in ("val", "test") if len(dataset.split(name)) < enough}
    if not few:
        return ""
    counted = " and ".join(f"{name} has {count}" for name, count in few.items())
    return f"{counted} episode(s): what is said of so few is weak (base.val_fraction, base.test_fraction)"


def from_params(params) -> Dataset:
    """Open the dataset that `params.base` names."""
    base = params.base
    local = params.paths.resolve(base.dataset)
    return open_dataset(
        local if local.exists() else base.dataset,
        revision=base.revision,
        image_keys=base.image_keys,
        state_key=base.state_key,
        val_fraction=base.val_fraction,
        test_fraction=base.test_fraction,
        max_episodes=base.episodes,
        group_key=base.group_key,
        seed=base.seed,
    )


def describe(dataset: Dataset) -> pd.DataFrame:
    """What a person wants to know first, as a table."""
    seconds = dataset.num_frames / dataset.fps
    facts = {
        "dataset": dataset.root.name,
        "episodes": len(dataset.episodes),
        "frames": f"{dataset.num_frames:,} ({seconds / 60:.1f} min at {dataset.fps} frames/s)",
        "cameras": ", ".join(dataset.camera_keys),
        "seen by the reward model": ", ".join(dataset.image_keys),
        "state": f"{dataset.state_key}, {dataset.states.shape[1]} numbers",
        "tasks": "; ".join(dataset.tasks),
        "fingerprint": dataset.fingerprint,
    }
    return pd.Series(facts).to_frame("value")


def episode_table(dataset: Dataset) -> pd.DataFrame:
    """One row an episode: `episode`, `split`, `group`, `frames`, `seconds`."""
    rows = [(e.index, e.split, e.group, e.length, e.length / dataset.fps) for e in dataset.episodes]
    return pd.DataFrame(rows, columns=["episode", "split", "group", "frames", "seconds"])


def split_summary(dataset: Dataset) -> dict[str, int | str]:
    """How many episodes each split has, and a digest of which they are."""
    sizes = {name: len(dataset.split(name)) for name in SPLITS}
    return {**sizes, "digest": digest([[episode.index, episode.split] for episode in dataset.episodes])}


def rows_of(episodes: tuple[Episode, ...]) -> np.ndarray:
    """Rows of all frames of `episodes`."""
    return np.concatenate([np.arange(e.row, e.row + e.length) for e in episodes])


def vector_names(dataset: Dataset, key: str) -> list[str]:
    """Names of a vector's components, numbered where the dataset does not name them."""
    names = dataset.features[key].get("names")
    if isinstance(names, dict):
        names = next(iter(names.values()))
    return list(names) if names else [str(i) for i in range(dataset.features[key]["shape"][0])]


def suggest_frame_gap(dataset: Dataset, n_obs_steps: int) -> int:
    """Frames between observations for a window that spans a third of the median training episode."""
    median = np.median([episode.length for episode in dataset.split("train")])
    return max(1, round(median / 3 / n_obs_steps))


def pick_device(name: str) -> str:
    """`auto` is a GPU where there is one."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def fingerprint(root: Path) -> str:
    """Names what the frames are: features, episode bounds and statistics, every number of the data files, and the size
    of every video.

    Reads no video, so it is fast for any size. Annotations do not change it, so an annotated copy has its source's; nor
    does the truth of a simulator, from which nothing is made.
    """
    info = json.loads((root / "meta/info.json").read_text())
    features = {k: (f["dtype"], list(f["shape"])) for k, f in info["features"].items() if not _is_truth(k)}
    found = hashlib.sha256(json.dumps([info["fps"], info["total_frames"], features], sort_keys=True).encode())
    for path in sorted(root.glob("meta/episodes/**/*.parquet")):
        table = pq.read_table(path)
        names = sorted(n for n in table.column_names if n not in ANNOTATION_COLUMNS and not _is_truth(n))
        found.update(json.dumps(table.select(names).to_pylist(), sort_keys=True, default=str).encode())
    cameras = set(_camera_keys(info))
    for path in sorted(root.glob("data/**/*.parquet")):
        names = [n for n in pq.read_schema(path).names if n in features and n not in cameras]
        for name, column in zip(names, pq.read_table(path, columns=names).columns, strict=True):
            values = column.combine_chunks()
            while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
                values = values.flatten()
            numbers = values.to_numpy(zero_copy_only=False)
            text = numbers.dtype == object
            found.update(name.encode() + (str(values.to_pylist()).encode() if text else numbers.tobytes()))
    for folder in ("videos", "images"):
        for path in files_in(root / folder):
            found.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
    return found.hexdigest()[:16]


def files_in(folder: Path, within: frozenset[Path] = frozenset()) -> list[Path]:
    """All files under a folder of a dataset, sorted; a folder in it, such as a camera's, may be a link.

    within: the folders that this one lies in; a link back to one of them shows nothing new, and without end.
    """
    place, found = folder.resolve(), []
    if place in within or not folder.is_dir():
        return found
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found += files_in(path, within | {place})
        elif path.is_file():
            found.append(path)
    return found


def _is_truth(column: str) -> bool:
    return column.removeprefix("stats/").startswith(TRUTH)


def is_local(dataset: str | Path) -> bool:
    return (Path(dataset) / "meta/info.json").is_file()


def _locate(dataset: str | Path, revision: str | None) -> Path:
    """The folder of a local dataset, or of a Hub dataset once LeRobot has downloaded it."""
    if is_local(dataset):
        return Path(dataset)
    if Path(dataset).is_absolute() or len(Path(dataset).parts) != 2:
        raise DatasetError(
            f"base.dataset: {dataset} is neither a LeRobot v3 folder (with meta/info.json) nor a Hub id (user/name). "
            "If DVC tracks it, `dvc pull` fetches it."
        )
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.datasets.utils import BackwardCompatibilityError

    try:
        return Path(LeRobotDataset(str(dataset), revision=revision).root)
    except BackwardCompatibilityError as error:
        name = Path(dataset).name
        raise DatasetError(
            f"base.dataset: {dataset} is a LeRobot dataset of an older version, v3.0 is needed: fetch it with hf download {dataset} "
            f"--repo-type dataset --local-dir {name}, convert it with {_converter(str(dataset), name)}, and set base.dataset: {name}"
        ) from error
    except Exception as error:  # huggingface_hub raises a dozen kinds
        raise DatasetError(
            f"base.dataset: there is no folder {dataset}, and as a Hub dataset it cannot be loaded "
            f"(revision {revision}): {type(error).__name__}: {error}"
        ) from error


def _read_info(root: Path) -> dict:
    info = json.loads((root / "meta/info.json").read_text())
    version = info.get("codebase_version", "?")
    if not version.startswith("v3"):
        raise DatasetError(
            f"{root.name} is a LeRobot dataset {version}, v3.0 is needed: convert it with {_converter(f'user/{root.name}', root)}"
        )
    return info


def _converter(repo_id: str, root: Path | str) -> str:
    return f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={repo_id} --root={root} --push-to-hub=false"


def _is_vector(feature: dict) -> bool:
    return feature["dtype"].startswith("float") and len(feature["shape"]) == 1


def _camera_keys(info: dict) -> list[str]:
    return [key for key, feature in info["features"].items() if feature["dtype"] in ("video", "image")]


def _episode_table(root: Path) -> pd.DataFrame:
    """The episode metadata in the order of the episodes, without the statistics."""
    paths = sorted(root.glob("meta/episodes/**/*.parquet"))
    table = pd.concat([_without_statistics(path) for path in paths], ignore_index=True)
    table = table.sort_values("episode_index").reset_index(drop=True)
    if table.episode_index.tolist() != list(range(len(table))):
        raise DatasetError(
            "meta/episodes: episode indices are not 0, 1, 2, …: the dataset is incomplete, download it again"
        )
    return table


def _without_statistics(path: Path) -> pd.DataFrame:
    names = [name for name in pq.read_schema(path).names if not name.startswith("stats/")]
    return pq.read_table(path, columns=names).to_pandas()


def _groups(table: pd.DataFrame, group_key: str | None) -> list[str]:
    if group_key is None:  # several tasks are the kinds that every dataset names
        tasks = _task_of_each(table)
        return tasks if len(set(tasks)) > 1 else ["all"] * len(table)
    if group_key not in table:
        columns = ", ".join(n for n in table.columns if table[n].dtype == object)
        raise DatasetError(f"base.group_key: the episodes have no column {group_key!r}; text columns are {columns}")
    return table[group_key].astype(str).tolist()


def _task_of_each(table: pd.DataFrame) -> list[str]:
    """What splits are drawn by. Never `base.group_key`, which may be a simulator's truth, and is only shown."""
    return ["; ".join(texts) for texts in table.tasks] if "tasks" in table else [""] * len(table)


def _splits(info: dict, groups: list[str], val: float, test: float, seed: int) -> list[str]:
    """The dataset's own splits (`meta/info.json`), or drawn episodes of every group where it names no val split."""
    count = len(groups)
    own = info.get("splits") or {}
    if set(own) - {"train"}:
        if set(own) != set(SPLITS):
            raise DatasetError(
                f"meta/info.json: splits are {', '.join(own)}; needed are {', '.join(SPLITS)}, or train alone"
            )
        bounds = {split: tuple(map(int, text.split(":"))) for split, text in own.items()}
        covered = sorted(i for start, stop in bounds.values() for i in range(start, stop))
        if covered != list(range(count)) or any(start >= stop for start, stop in bounds.values()):
            listed = ", ".join(f"{split} {text}" for split, text in own.items())
            raise DatasetError(
                f"meta/info.json: the splits {listed} do not hold each of the {count} episodes once, and one at least "
                "each: correct them, or leave train alone for splits by base.val_fraction and base.test_fraction"
            )
        return [split for i in range(count) for split, (start, stop) in bounds.items() if start <= i < stop]
    return _drawn(groups, {"test": test, "val": val}, seed)


def _drawn(groups: list[str], shares: dict[str, float], seed: int) -> list[str]:
    """A split for every episode: of each group, one episode of every run of 1 / share goes there, drawn by that run alone.

    So every group is held out in proportion, and so is every part of a long day of recording, and an episode that is
    appended moves no other one to another split.
    """
    members = {name: [i for i, group in enumerate(groups) if group == name] for name in dict.fromkeys(groups)}
    taken: dict[str, set[int]] = {name: set() for name in members}  # places within a group, also of episodes to come
    names = ["train"] * len(groups)
    for number, (split, share) in enumerate(shares.items()):
        for group, mine in members.items():
            draws, runs = [seed, number, zlib.crc32(group.encode())], math.ceil(len(mine) * share - 1e-9)
            for run in range(runs):
                ends = (math.ceil(edge / share - 1e-9) for edge in (run, run + 1))
                if free := [place for place in range(*ends) if place not in taken[group]]:
                    place = int(np.random.default_rng([*draws, run]).choice(free))
                    taken[group].add(place)
                    if place < len(mine):
                        names[mine[place]] = split
        if split not in names and "train" in names:  # too few episodes for a run
            free = [i for i, name in enumerate(names) if name == "train"]
            names[int(np.random.default_rng([seed, number]).choice(free))] = split
    if "train" not in names:
        few = f"{len(groups)} episode(s) are too few: one each is needed to train on, to choose by (val) and to judge by (test)"
        none = f"base.val_fraction, base.test_fraction: of {len(groups)} episodes they leave none to train on"
        raise DatasetError(few if len(groups) < len(SPLITS) else none)
    return names


def _keep(splits: list[str], limit: int | None) -> list[int]:
    """Indices of the episodes to use: all, or the first `limit` ones of the splits in proportion, at least one of each."""
    if limit is None or limit >= len(splits):
        return list(range(len(splits)))
    members = {name: [i for i, split in enumerate(splits) if split == name] for name in dict.fromkeys(splits)}
    count = dict.fromkeys(members, 1)
    while sum(count.values()) < limit:  # the next one goes to the split that is furthest below its share
        lacks = {name: limit * len(members[name]) / len(splits) - count[name] for name in count}
        count[max(lacks, key=lacks.get)] += 1
    return sorted(i for name, number in count.items() for i in members[name][:number])
