"""How long the scrubber takes to show another frame, at 480x640.

    python -m benchmarks.scrubber [--frames 400]

Writes a dataset for each encoding into a temporary folder and measures on it

    shown     from the press of a key to the frame that it asks for on the page (`data-shown`), two cameras, in a headless
              Chromium on a real JupyterLab: what a person waits for. The aim: the next frame within 50 ms
    latency   of that, what the kernel takes to decode a frame and to make the JPEG, for one camera and for two

and leaves both tables in benchmarks/scrubber.json. Without a browser it measures the second only, and writes nothing.
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
from tests.lab import CHROMIUM, VIEWPORT, jupyter_lab, open_notebook, run_cell, shows

HEIGHT, WIDTH, FPS = 480, 640, 30
CAMERAS = ("observation.images.front", "observation.images.wrist")
SHORT = 10  # frames of the episodes before and after the measured one, in the same file
ENCODINGS = {  # codec, frames between keyframes
    "LeRobot's default (AV1, keyframe every 2)": ("libsvtav1", 2),
    "H.264, keyframe every 2": ("h264", 2),
    "H.264, keyframe every 30": ("h264", 30),
    "H.264, keyframe every 250": ("h264", 250),
}
KEYS = {  # what is pressed: (key, frames that it moves by, milliseconds between presses; 0 waits for the frame and a moment)
    "next": ("ArrowRight", 1, 0),
    "previous": ("ArrowLeft", -1, 0),
    "ten on": ("Shift+ArrowRight", 10, 0),
    "next, key held down": ("ArrowRight", 1, 33),
}
PRESSES, PAUSE = 100, 150  # of each kind; milliseconds between a frame and the next press: time to look
SCRUBBER = """\
from pathlib import Path
from sarm_lib.annotations import Annotation, Segment
from sarm_lib.dataset import open_dataset
from sarm_lib.widgets.scrubber import Scrubber
dataset = open_dataset("dataset")
given = [Annotation(e.index, e.length, "", (Segment("task", 0, e.length - 1),), None) for e in dataset.episodes]
Scrubber(dataset, given, {"sparse": ["task"]}, order=[1], corrections=Path("corrections.yaml"))"""
# A press counts from the event's own time, and as answered when the pictures are those of its frame or of a later one.
WATCH = """([step, length]) => {
  const root = document.querySelector(".sarm-scrubber"), waiting = [];
  const now = () => Number(root.dataset.shown.split(":")[1]);
  let wanted = now();
  window.latencies = [];
  const pressed = (event) => {
    if (!event.key.startsWith("Arrow")) return;
    wanted = Math.min(Math.max(wanted + step, 0), length - 1);
    waiting.push([wanted, event.timeStamp]);
  };
  const changed = new MutationObserver(() => {
    while (waiting.length && (now() - waiting[0][0]) * Math.sign(step) >= 0)
      window.latencies.push(performance.now() - waiting.shift()[1]);
  });
  root.addEventListener("keydown", pressed, true);
  changed.observe(root, { attributes: true, attributeFilter: ["data-shown"] });
}"""


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
            dataset.save_episode(parallel_encoding=False)
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
    return summary(times)


def measure_shown(root: Path, frames: int) -> dict[str, dict[str, float]]:
    """Milliseconds from the press of each of `KEYS` to its frame on the page, on the dataset in the folder `work/dataset` of `root`."""
    from playwright.sync_api import sync_playwright

    found = {}
    with jupyter_lab(root) as address, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=VIEWPORT)
        open_notebook(page, address, root, SCRUBBER)
        for name, (key, step, period) in KEYS.items():
            run_cell(page)  # a new scrubber, which has no frame yet
            shows(page, "1:0")
            page.locator(".sarm-scrubber").focus()
            first = 0 if step > 0 else frames - 1
            page.keyboard.press("Home" if step > 0 else "End")
            shows(page, f"1:{first}")
            page.wait_for_timeout(500)  # the frames ahead have arrived, as they have for a person who looks
            page.evaluate(WATCH, [step, frames])
            presses = min(PRESSES, (frames - 1) // abs(step))
            for i in range(presses):
                page.keyboard.press(key)
                if not period:
                    shows(page, f"1:{first + (i + 1) * step}")
                page.wait_for_timeout(period or PAUSE)
            shows(page, f"1:{first + presses * step}")
            found[name] = {"presses": presses, **summary(page.evaluate("() => window.latencies"))}
        browser.close()
    return found


def summary(times: list[float]) -> dict[str, float]:
    figures = {"p50": np.percentile(times, 50), "p95": np.percentile(times, 95), "max": np.max(times)}
    return {name: round(float(value), 2) for name, value in figures.items()}


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
    shown, rows = [], []
    for number in options.encodings or range(len(chosen)):
        encoding, (codec, group) = chosen[number]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "work").mkdir()
            dataset = write_dataset(Path(folder) / "work/dataset", codec, group, options.frames)
            for press, times in (measure_shown(Path(folder), options.frames) if CHROMIUM else {}).items():
                shown.append({"encoding": encoding, "press": press, **times})
            for cameras in (CAMERAS[:1], CAMERAS):
                for frame, order in orders.items():
                    # A jump to any frame is measured as the first visit there.
                    times = measure(dataset, cameras, order, keeps=frame != "any")
                    rows.append({"encoding": encoding, "cameras": len(cameras), "frame": frame, **times})
    load = round(os.getloadavg()[2], 1)  # other programs run beside it
    machine = {
        "cores": os.cpu_count(),
        "load": load,
        "architecture": platform.machine(),
        "python": platform.python_version(),
    }
    result = {"size": [HEIGHT, WIDTH], "frames": options.frames, "unit": "ms", "machine": machine}
    result |= {"shown": shown, "latency": rows}
    print(pd.DataFrame(shown).to_string(index=False), pd.DataFrame(rows).to_string(index=False), sep="\n\n")
    if CHROMIUM and options.encodings is None and options.frames == parser.get_default("frames"):
        Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
