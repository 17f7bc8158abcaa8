"""A million frames through scoring and RA-BC: the most memory that it takes, which has to stay below 4 GB.

    python -m benchmarks.memory [--frames 1000000] [--stride 1]

The demo, repeated until it has so many frames: numbers and metadata are written again, videos are linked, embeddings copied
as float16. Then `progress.ensure_progress` and `rabc.compute` run on it with the demo's reward model, in a process of its own.
Needs the outputs of stages 00 and 03. Leaves benchmarks/memory.json.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sarm_lib import artifacts, checkpoint, dataset, encoder, params, progress, rabc
from sarm_lib.lerobot_io import link_media

RESULTS = Path(__file__).with_suffix(".json")
LIMIT = 4e9


def repeat(root: Path, target: Path, frames: int) -> int:
    """Write the dataset `root` so often that it has `frames` frames. Returns how often."""
    (data,) = root.glob("data/**/*.parquet")
    (episodes,) = root.glob("meta/episodes/**/*.parquet")
    rows, table = pq.read_table(data), pq.read_table(episodes)
    times = -(-frames // len(rows))

    def shifted(table: pa.Table, steps: dict[str, int], i: int) -> pa.Table:
        for name, step in steps.items():
            at = table.column_names.index(name)
            table = table.set_column(at, table.field(name), pa.array(table[name].to_numpy() + i * step))
        return table

    link_media(root, target)
    for path in target.glob("data/**/*.parquet"):
        path.unlink()
    for source, steps in (
        (rows, {"index": len(rows), "episode_index": len(table)}),
        (table, {"episode_index": len(table), "dataset_from_index": len(rows), "dataset_to_index": len(rows)}),
    ):
        path = target / (data if source is rows else episodes).relative_to(root)
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, source.schema) as writer:
            for i in range(times):
                writer.write_table(shifted(source, steps, i))
    for name in ("tasks.parquet", "stats.json"):
        (target / "meta" / name).write_bytes((root / "meta" / name).read_bytes())
    info = json.loads((root / "meta/info.json").read_text()) | {"splits": {}}
    info |= {"total_episodes": len(table) * times, "total_frames": len(rows) * times}
    (target / "meta/info.json").write_text(json.dumps(info))
    return times


def repeat_embeddings(source: encoder.Embeddings, folder: Path, demos: dataset.Dataset, times: int) -> None:
    """What stage 00 would leave, without decoding a million frames that are the same."""
    folder.mkdir()
    for key, values in source.cameras.items():
        shape = (len(values) * times, source.width)
        store = np.lib.format.open_memmap(folder / f"{key}.npy", "w+", np.float16, shape)
        for i in range(times):
            store[i * len(values) : (i + 1) * len(values)] = values
    np.save(folder / "tasks.npy", source.tasks)
    index = {
        "fingerprint": demos.fingerprint,
        "episodes": [[e.index, e.length] for e in demos.episodes],
        "cameras": list(source.cameras),
        "encoder": source.encoder,
        "encoder_identity": source.encoder_identity,
    }
    artifacts.write_json(folder / encoder.INDEX, index)


def peak() -> float:
    """The most memory that this process held, in GB (memory-mapped embeddings included)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def measure(folder: Path, stride: int) -> dict[str, float]:
    """Score and weigh what lies in `folder`; times in seconds, memory in GB."""
    here = {"base.dataset": str(folder / "dataset"), "base.outputs": str(folder), "rabc.stride": stride}
    config = params.load("params.yaml", here)
    start = time.perf_counter()
    demos = dataset.from_params(config)
    embeddings = encoder.open_embeddings(folder / "embeddings", demos)
    model = checkpoint.load_reward_model("outputs/sarm")
    opened = time.perf_counter()
    progress.ensure_progress(folder / "progress.parquet", config, demos, embeddings, model, "outputs/sarm")
    scored = time.perf_counter()
    train = [episode.index for episode in demos.split("train")]
    head = rabc.head_of(config)
    weights = rabc.compute(folder / "progress.parquet", head, config.policy.chunk_size, "mean", 1e-6, train)
    rabc.write_weights(folder / "weights.parquet", weights, {})
    return {
        "checkpoint": model.checkpoint,
        "frames": demos.num_frames,
        "stride": stride,
        "opening_seconds": opened - start,
        "scoring_seconds": scored - opened,
        "rabc_seconds": time.perf_counter() - scored,
        "peak_gb": peak(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--stride", type=int, default=1, help="score every n-th frame; memory does not depend on it")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.stride)))
        return
    config = params.load("params.yaml")
    demos = dataset.from_params(config)
    source = encoder.open_embeddings(config.paths.read("embeddings", "00_prepare"), demos)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        times = repeat(demos.root, folder / "dataset", arguments.frames)
        many = dataset.from_params(params.load("params.yaml", {"base.dataset": str(folder / "dataset")}))
        repeat_embeddings(source, folder / "embeddings", many, times)
        command = [sys.executable, "-m", "benchmarks.memory", "--measure", str(folder), "--stride", str(arguments.stride)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    artifacts.write_json(RESULTS, found)
    print(json.dumps(found, indent=1))
    if found["peak_gb"] * 1e9 > LIMIT:
        sys.exit(f"{found['peak_gb']:.1f} GB: more than {LIMIT / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
