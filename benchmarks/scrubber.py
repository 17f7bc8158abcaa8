"""How long the scrubber's kernel takes to answer for a frame: decoding and the JPEG, at 480x640.

    python benchmarks/scrubber.py [--frames 400]

Writes a dataset for each encoding into a temporary folder, measures the next frame, the one before, and any frame, for
one camera and for two, and leaves the table in benchmarks/scrubber.json. The aim: the next frame within 50 ms.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import pandas as pd

from sarm_lib.dataset import Dataset, open_dataset
from sarm_lib.frames import FrameReader, jpeg

HEIGHT, WIDTH, FPS = 480, 640, 30
CAMERAS = ("observation.images.front", "observation.images.wrist")
SHORT = 10  # frames of the episodes before and after the measured one, in the same file
ENCODINGS = {  # codec, frames between keyframes
    "LeRobot's default (AV1, keyframe every 2)": ("libsvtav1", 2),
    "H.264, keyframe every 2": ("h264", 2),
    "H.264, keyframe every 30": ("h264", 30),
    "H.264, keyframe every 250": ("h264", 250),
}


def write_dataset(root: Path, codec: str, group: int, frames: int) -> Dataset:
    """An episode of two cameras, a textured background that moves under sensor noise, between two short ones."""
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    picture = {"dtype": "video", "shape": (HEIGHT, WIDTH, 3), "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "shape": (2,), "names": None}
    features = {**dict.fromkeys(CAMERAS, picture), "observation.state": vector, "action": vector}
    encoder = RGBEncoderConfig(vcodec=codec, g=group)
    dataset = LeRobotDataset.create(
        "benchmark/scrubber",
        FPS,
        features,
        root=root,
        rgb_encoder=encoder,
        streaming_encoding=True,
        encoder_queue_maxsize=999,
    )
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    scene = np.stack([128 + 60 * np.sin(x / 17), 128 + 60 * np.cos(y / 11), 128 + 60 * np.sin((x + y) / 23)], -1)
    noise = rng.normal(0, 4, (8, HEIGHT, WIDTH, 1))
    for t in range(frames + 2 * SHORT):
        image = np.clip(np.roll(scene, 2 * t, axis=1) + noise[t % 8], 0, 255).astype(np.uint8)
        state = np.zeros(2, np.float32)
        images = {CAMERAS[0]: image, CAMERAS[1]: np.ascontiguousarray(image[::-1])}
        dataset.add_frame({**images, "observation.state": state, "action": state, "task": "look"})
        if t + 1 in (SHORT, SHORT + frames, 2 * SHORT + frames):
            dataset.save_episode()
    dataset.finalize()
    return open_dataset(root)


def measure(dataset: Dataset, cameras: tuple[str, ...], order: np.ndarray, keeps: bool) -> dict[str, float]:
    """Milliseconds for the frames of `order` one after the other; `keeps`: with those it has decoded on the way."""
    reader, episode = FrameReader(dataset, **({} if keeps else {"cache_bytes": 1})), dataset.episodes[1]
    times = []
    for camera in cameras:
        reader.read(episode, camera, int(order[0]))
    for frame in order[1:]:
        start = time.perf_counter()
        for camera in cameras:
            jpeg(reader.read(episode, camera, int(frame)))
        times.append(1000 * (time.perf_counter() - start))
    reader.close()
    return {"p50": np.percentile(times, 50), "p95": np.percentile(times, 95), "max": np.max(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--encodings", type=int, nargs="*", help="numbers of the encodings, from 0; all by default")
    options = parser.parse_args()
    av.logging.set_level(av.logging.PANIC)
    orders = {
        "next": np.arange(options.frames),
        "previous": np.arange(options.frames)[::-1],
        "any": np.random.default_rng(1).integers(0, options.frames, min(options.frames, 300)),
    }
    chosen = list(ENCODINGS.items())
    rows = []
    for number in options.encodings or range(len(chosen)):
        encoding, (codec, group) = chosen[number]
        with tempfile.TemporaryDirectory() as folder:
            dataset = write_dataset(Path(folder) / "dataset", codec, group, options.frames)
            for cameras in (CAMERAS[:1], CAMERAS):
                for frame, order in orders.items():
                    # A jump to any frame is measured as the first visit there.
                    times = measure(dataset, cameras, order, keeps=frame != "any")
                    times = {name: round(float(value), 2) for name, value in times.items()}
                    rows.append({"encoding": encoding, "cameras": len(cameras), "frame": frame, **times})
    machine = {"cores": os.cpu_count(), "architecture": platform.machine(), "python": platform.python_version()}
    result = {"size": [HEIGHT, WIDTH], "frames": options.frames, "unit": "ms", "machine": machine, "latency": rows}
    print(pd.DataFrame(rows).to_string(index=False))
    if options.encodings is None and options.frames == parser.get_default("frames"):
        Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
