"""`make demo`: record the demo dataset again. Same command, same machine, same states and actions.

    python -m demo.record data/demo/assembly

The mixture below was fixed before any policy was trained on it. `demo/episodes.csv` lists every episode.
"""

import argparse
import csv
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from tqdm.auto import tqdm

from demo.demonstrations import KINDS, Demonstration, demonstrate, label_quality
from demo.simulator import FPS, IMAGE_SIZE, TASK, AssemblySimulator, RenderingError
from demo.truth import Truth, fit_truth
from sarm_lib.artifacts import staged

# Episodes of each kind in each split, in the order of KINDS.
MIXTURE = {
    "train": (16, 9, 10, 10, 9, 9, 8, 9),
    "val": (4, 3, 3, 3, 3, 3, 3, 3),
    "test": (5, 5, 5, 5, 5, 5, 5, 5),
}
FIRST_SEED = {"train": 1000, "val": 2000, "test": 3000}
TRUTH = Path(__file__).with_name("truth.json")
CODEC = RGBEncoderConfig(vcodec="h264", crf=21, g=20)
FEATURES = {
    **{
        f"observation.images.{camera}": {
            "dtype": "video",
            "shape": (IMAGE_SIZE, IMAGE_SIZE, 3),
            "names": ["height", "width", "channels"],
        }
        for camera in ("front", "wrist")
    },
    "observation.state": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper"]},
    "action": {"dtype": "float32", "shape": (4,), "names": ["dx", "dy", "dz", "gripper"]},
    "sim.stage": {"dtype": "int64", "shape": (1,), "names": None},
    "sim.progress": {"dtype": "float32", "shape": (1,), "names": None},
    "sim.success": {"dtype": "bool", "shape": (1,), "names": None},
    "sim.quality": {"dtype": "int64", "shape": (1,), "names": None},
}


type Plan = list[tuple[str, str, int]]  # (split, kind, seed) of every episode


def planned_episodes() -> Plan:
    """The demo's episodes, kinds interleaved within a split."""
    return [episode for split in MIXTURE for episode in interleaved(split, MIXTURE[split], FIRST_SEED[split])]


def interleaved(split: str, counts: tuple[int, ...], first_seed: int) -> Plan:
    """So many episodes of each of the `KINDS`, in turn."""
    kinds = [kind for turn in range(max(counts)) for kind, count in zip(KINDS, counts, strict=True) if turn < count]
    return [(split, kind, first_seed + i) for i, kind in enumerate(kinds)]


def record(root: Path) -> None:
    """Record the demo's dataset at `root`, and what follows from it: its truth and its table of episodes."""
    plan, sim = planned_episodes(), simulator()
    training = [demonstrate(sim, kind, seed) for split, kind, seed in plan if split == "train"]
    truth = fit_truth([d.scenes for d in training if d.kind == "clean"], [d.scenes for d in training if d.success])
    rows = record_episodes(root, plan, truth, sim)
    truth.save(TRUTH)
    with Path(__file__).with_name("episodes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def simulator() -> AssemblySimulator:
    """One that can render. Raises RenderingError where there is no OpenGL, before anything is lost."""
    sim = AssemblySimulator()
    sim.reset(0)
    sim.render()
    return sim


def record_episodes(root: Path, plan: Plan, truth: Truth, sim: AssemblySimulator) -> list[dict]:
    """Record the planned episodes into a LeRobot v3 dataset at `root`, replacing what is there; a row an episode."""
    rows = []
    with staged(root) as partial:
        dataset = LeRobotDataset.create(
            "demo/assembly", FPS, FEATURES, root=partial, robot_type="sawyer", rgb_encoder=CODEC, image_writer_threads=4
        )
        for index, (split, kind, seed) in enumerate(tqdm(plan, desc="recording")):
            images: list[dict[str, np.ndarray]] = []
            demonstration = demonstrate(sim, kind, seed, on_frame=lambda kept=images: kept.append(sim.render()))
            add_episode(dataset, demonstration, images, truth)
            rows.append(
                {
                    "episode": index,
                    "split": split,
                    "kind": kind,
                    "seed": seed,
                    "frames": len(images),
                    "imperfect_frames": sum(demonstration.injected),
                    "success": demonstration.success,
                }
            )
        dataset.finalize()
        write_splits(partial, [split for split, _, _ in plan])
        add_episode_columns(partial, rows)
        for video in partial.glob("videos/**/*.mp4"):
            video.chmod(0o644)  # LeRobot writes 0600
    return rows


def add_episode(dataset: LeRobotDataset, demonstration: Demonstration, images: list[dict], truth: Truth) -> None:
    progress = truth.progress(demonstration.scenes)
    quality = label_quality(progress, np.array(demonstration.injected), demonstration.success)
    for t, scene in enumerate(demonstration.scenes):
        dataset.add_frame(
            {
                "observation.images.front": images[t]["front"],
                "observation.images.wrist": images[t]["wrist"],
                "observation.state": demonstration.states[t],
                "action": demonstration.actions[t],
                "sim.stage": np.array([scene.stage]),
                "sim.progress": progress[t : t + 1],
                "sim.success": np.array([scene.success]),
                "sim.quality": quality[t : t + 1],
                "task": TASK,
            }
        )
    dataset.save_episode(parallel_encoding=False)  # no fork of a process that has OpenGL's threads


def write_splits(root: Path, splits: list[str]) -> None:
    """Name the episodes' splits where LeRobot keeps them: `{"train": "0:80", ...}` in `meta/info.json`."""
    info, start = json.loads((root / "meta/info.json").read_text()), 0
    info["splits"] = {}
    for split, members in itertools.groupby(splits):
        info["splits"][split] = f"{start}:{(start := start + len(list(members)))}"
    (root / "meta/info.json").write_text(json.dumps(info, indent=4) + "\n")


def add_episode_columns(root: Path, rows: list[dict]) -> None:
    """Add kind, seed and outcome as `sim.*` columns of the episode metadata, which LeRobot carries along."""
    for path in sorted(root.glob("meta/episodes/**/*.parquet")):
        table = pq.read_table(path)
        mine = [rows[i] for i in table["episode_index"].to_pylist()]
        for name, kind in (("kind", pa.string()), ("seed", pa.int64()), ("success", pa.bool_())):
            table = table.append_column(f"sim.{name}", pa.array([row[name] for row in mine], kind))
        pq.write_table(table, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    try:
        record(parser.parse_args().root)
    except RenderingError as error:
        sys.exit(str(error))
