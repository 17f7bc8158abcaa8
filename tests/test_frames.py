"""Single frames in any order are the frames that `iterate_frames` gives."""

import io
import shutil
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
from PIL import Image

from sarm_lib.dataset import DatasetError, open_dataset
from sarm_lib.frames import FrameReader, jpeg

from .conftest import CAMERAS, make_dataset


def expected(opened) -> dict[tuple[int, str], np.ndarray]:
    """Frames (T, H, W, 3) by episode and camera."""
    return {
        (e.index, key): np.stack([image for _, image in opened.iterate_frames(key, (e,))])
        for e in opened.episodes
        for key in CAMERAS
    }


@pytest.fixture(scope="module", params=["one video file", "several video files", "images"])
def opened(request, tiny, tmp_path_factory):
    if request.param == "one video file":
        return open_dataset(tiny)
    folder = tmp_path_factory.mktemp("frames") / "dataset"
    several = request.param == "several video files"
    return open_dataset(make_dataset(folder, use_videos=several, files=3 if several else 1))


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_frames_in_any_order_are_those_of_iterate_frames(opened, order):
    truth = expected(opened)
    wanted = [(e, key, t) for e in opened.episodes for t in range(e.length) for key in CAMERAS]
    if order == "backward":
        wanted.reverse()
    elif order == "random":
        np.random.default_rng(0).shuffle(wanted)
    reader = FrameReader(opened, cache_bytes=5000)  # about three frames: most of them are decoded again
    for episode, key, frame in wanted:
        image = reader.read(episode, key, int(frame))
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, truth[episode.index, key][frame])


@pytest.mark.parametrize(("codec", "group"), [("libx264", 30), ("libx265", 30), ("libsvtav1", 2), ("libsvtav1", 30)])
def test_frames_around_keyframes_of_every_codec(tiny, tmp_path, codec, group):
    """The videos of a camera, encoded anew with frames that are stored in another order than they are shown in."""
    shutil.copytree(tiny, tmp_path / "dataset")
    opened = open_dataset(tmp_path / "dataset")
    path = next((opened.root / "videos" / CAMERAS[0]).rglob("*.mp4"))
    images = [frame.to_ndarray(format="rgb24") for frame in av.open(str(path)).decode(video=0)]
    encode(path, [np.tile(image, (2, 2, 1)) for image in images], codec, group)
    reader, (first, second, third) = FrameReader(opened), opened.episodes[:3]
    truth = {e.index: [image for _, image in opened.iterate_frames(CAMERAS[0], (e,))] for e in (first, second, third)}
    for episode in (third, first, second):
        for frame in (episode.length - 1, 0, 7, 6, 5, 8, 1, episode.length - 1):
            np.testing.assert_array_equal(reader.read(episode, CAMERAS[0], frame), truth[episode.index][frame])


def encode(path, images, codec: str, group: int) -> None:
    quiet = {"libx265": {"x265-params": "log-level=none:open-gop=1"}}.get(codec, {})
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"g": str(group), **quiet})
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def test_neighbours_are_not_decoded_from_the_keyframe_again(tiny, monkeypatch):
    opened = open_dataset(tiny)
    reader, episode = FrameReader(opened), opened.episodes[3]
    sought = []
    reader.read(episode, CAMERAS[0], 9)
    video = next(iter(reader._videos.values()))
    monkeypatch.setattr(type(video), "seek", lambda *a: sought.append(a))
    for frame in (10, 11, 12, 11, 10, 9, 13):
        reader.read(episode, CAMERAS[0], frame)
    assert not sought


def test_the_cache_is_bounded_and_closing_empties_it(tiny):
    opened = open_dataset(tiny)
    reader = FrameReader(opened, cache_bytes=20_000)
    for episode in opened.episodes:
        for key in CAMERAS:
            reader.read(episode, key, episode.length - 1)
    assert 0 < reader._kept_bytes <= 20_000
    assert reader._kept_bytes == sum(sum(p.buffer_size for p in image.planes) for image in reader._kept.values())
    reader.close()
    assert not reader._kept and not reader._videos
    assert reader.read(opened.episodes[0], CAMERAS[0], 0).shape == (32, 32, 3)


def test_only_so_many_files_stay_open(tmp_path, monkeypatch):
    opened = open_dataset(make_dataset(tmp_path / "dataset", files=3))
    monkeypatch.setattr("sarm_lib.frames.OPEN_FILES", 2)
    reader = FrameReader(opened)
    for episode in opened.episodes:
        for key in CAMERAS:
            reader.read(episode, key, 3)
    assert len(reader._videos) == 2


def test_errors_name_episode_camera_and_file(tiny, tmp_path):
    opened = open_dataset(tiny)
    with pytest.raises(DatasetError, match=rf"episode 2, {CAMERAS[0]}: there is no frame 16, it has 16"):
        FrameReader(opened).read(opened.episodes[2], CAMERAS[0], 16)

    shutil.copytree(tiny, tmp_path / "dataset")
    opened = open_dataset(tmp_path / "dataset")
    path = next((opened.root / "videos" / CAMERAS[0]).rglob("*.mp4"))
    images = [frame.to_ndarray(format="rgb24") for frame in av.open(str(path)).decode(video=0)]
    encode(path, images[:20], "libx264", 5)  # episode 0 has 14 frames
    reader = FrameReader(opened)
    with pytest.raises(DatasetError, match=rf"episode 1, {CAMERAS[0]}: file-000.mp4 ends before frame 9 of 18"):
        reader.read(opened.episodes[1], CAMERAS[0], 9)
    assert reader.read(opened.episodes[0], CAMERAS[0], 3).shape == (32, 32, 3)  # what is there can still be read

    path.write_bytes(b"not a video")
    with pytest.raises(DatasetError, match=rf"episode 3, {CAMERAS[0]}: file-000.mp4 cannot be decoded"):
        FrameReader(opened).read(opened.episodes[3], CAMERAS[0], 0)
    path.unlink()
    with pytest.raises(DatasetError, match=rf"episode 3, {CAMERAS[0]}: file-000.mp4 is missing"):
        FrameReader(opened).read(opened.episodes[3], CAMERAS[0], 0)


def test_a_missing_frame_is_named(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "dataset")
    opened = open_dataset(tmp_path / "dataset")
    path = next((opened.root / "videos" / CAMERAS[0]).rglob("*.mp4"))
    images = [frame.to_ndarray(format="rgb24") for frame in av.open(str(path)).decode(video=0)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "5"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for t, image in enumerate(images):
            if t != 6:
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts = t
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    reader = FrameReader(opened)
    with pytest.raises(DatasetError, match=rf"episode 0, {CAMERAS[0]}: frame 6 is missing in file-000.mp4"):
        reader.read(opened.episodes[0], CAMERAS[0], 6)
    assert reader.read(opened.episodes[0], CAMERAS[0], 7).shape == (32, 32, 3)


def test_a_damaged_image_is_named(tmp_path):
    opened = open_dataset(make_dataset(tmp_path / "dataset", use_videos=False))
    path = next((opened.root / "data").rglob("*.parquet"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DatasetError, match=rf"episode 1, {CAMERAS[1]}: frame 2 cannot be read from file-000.parquet"):
        FrameReader(opened).read(opened.episodes[1], CAMERAS[1], 2)


def test_a_jpeg_is_small_and_like_the_frame():
    y, x = np.mgrid[:480, :960]
    image = np.stack([x // 4, y // 2, (x + y) // 6], -1).astype(np.uint8)
    shown = Image.open(io.BytesIO(jpeg(image)))
    assert shown.size == (640, 320)
    same = np.asarray(Image.open(io.BytesIO(jpeg(image, width=960))), dtype=int)
    assert np.abs(same - image).mean() < 3


def test_several_threads_may_read(tiny):
    """JupyterLab may hand a widget's messages to more than one."""
    dataset = open_dataset(tiny)
    reader = FrameReader(dataset, cache_bytes=2**16)
    wanted = [(e, f) for e in dataset.episodes[:4] for f in range(0, e.length, 3)] * 3
    alone = {(e.index, f): FrameReader(dataset).read(e, CAMERAS[0], f) for e, f in wanted[: len(wanted) // 3]}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ask: reader.read(ask[0], CAMERAS[0], ask[1]), wanted))
    for (episode, frame), image in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(image, alone[episode.index, frame])
