"""How fast encoding, scoring, training and weighting are, beside LeRobot's own code in one run (`make bench`).

    python -m benchmarks.speed [--only progress_dual_fp32 ...]

Both sides get the same dataset (some seconds of the demo's frames), the same randomly initialised ViT-B/32-shaped encoder
and the same full-size SARM (768 wide, 8 layers), loaded and run once beforehand, on one thread of one core. SARM's random
weights are such that stages and progress differ from frame to frame: `std` says how much, beside the largest difference and
the mean one. In bf16 the largest is that of a frame whose two best stages are nearly alike and change places.

progress_*     seconds for the progress of every frame by both heads, or one: LeRobot's `compute_rabc_weights` against
               decoding, encoding, storing and scoring here. LeRobot's is measured in fp32; bf16 is our encoding alone,
               and `scored_in_bf16` within that row our scoring too. `float64` is how far each side's largest error is from
               the same arithmetic in float64, encoder and all: two float32 codes differ by what both are off
train_dual_*   seconds for a training step, the worse ratio of batches of 8 and of 32. LeRobot's begins with a batch of
               decoded frames, ours with drawing one from the store. The difference is that of the losses of one batch.
               `with_average` are the seconds with the moving average of the weights, which LeRobot does not have
rabc_build_*   seconds from a progress file to weights of one and of five million frames: `RABCWeights` against `rabc.compute`
rabc_batch     seconds for the weights of a batch of 32
encode_vs_bare frames a second of decoding, encoding and storing, against the encoder's bare forward pass on ready pixels

Ours is measured before and after LeRobot's, and the median counts. Ours scores more `frames`, of which LeRobot's is given
the first `lerobot_frames`: what is done once for a dataset would count for much of a hundred. The ratio is that of the
seconds a frame. On a machine with a GPU the first two kinds and the last are measured there too, as `*_gpu`: on all cores,
with up to eight threads, and ours on some 2,000 frames. Results are merged into benchmarks/speed.json.
"""

import argparse
import contextlib
import copy
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import batched
from pathlib import Path
from unittest import mock

TASK = "pick up the nut and place it on the peg"
LENGTHS = {"cpu": [32] * 3 + [100] * 4, "cuda": [32] * 3 + [100] * 23}  # most frames of each episode
LEROBOTS = 3  # LeRobot's side takes the first episodes
GPU_THREADS = 8
STAGES = {"sparse": ["pick up", "place"], "dense": ["reach", "grasp", "lift", "carry", "lower"]}
SHARES = {"sparse": [0.55, 0.45], "dense": [0.2, 0.15, 0.15, 0.35, 0.15]}
CAMERA, STATE = "observation.images.front", "observation.state"
SIZE = {"hidden_dim": 768, "num_heads": 12, "num_layers": 8}  # the paper's
RESULTS = Path(__file__).with_suffix(".json")
NAMES = (
    "progress_dual_fp32", "progress_single_fp32", "progress_dual_bf16", "train_dual_fp32", "train_dual_bf16",
    "rabc_build_1m", "rabc_build_5m", "rabc_batch", "encode_vs_bare",
)  # fmt: skip
ON_GPU = ("progress_dual_fp32", "progress_single_fp32", "progress_dual_bf16", "train_dual_fp32", "train_dual_bf16", "encode_vs_bare")


# --- what both sides are given ------------------------------------------------------------------------------------------


def make_dataset(folder: Path, lengths: list[int]) -> Path:
    """A LeRobot dataset of the demo's first episodes, so many frames of each or all, spread over it, with annotations:
    LeRobot's script wants some."""
    import numpy as np
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from sarm_lib import lerobot_io
    from sarm_lib.annotations import Annotation, Segment
    from sarm_lib.dataset import open_dataset

    demo = open_dataset("data/demo/assembly")
    image, state = demo.features[CAMERA], demo.features[STATE]
    features = {
        CAMERA: {"dtype": "video", "shape": tuple(image["shape"]), "names": ["height", "width", "channels"]},
        STATE: {"dtype": "float32", "shape": tuple(state["shape"]), "names": None},
        "action": {"dtype": "float32", "shape": (4,), "names": None},
    }
    raw = LeRobotDataset.create("bench/raw", demo.fps, features, root=folder / "raw")
    for episode, most in zip(demo.episodes, lengths):
        shown = np.linspace(0, episode.length - 1, min(most, episode.length)).round().astype(int)
        for image, row in zip(demo.read_frames(episode, CAMERA, shown), episode.row + shown, strict=True):
            numbers = {STATE: demo.states[row], "action": demo.actions[row]}
            raw.add_frame({CAMERA: image, **numbers, "task": TASK})
        raw.save_episode(parallel_encoding=False)
    raw.finalize()
    dataset, annotations = open_dataset(folder / "raw"), []
    for episode in dataset.episodes:
        heads = {}
        for head, names in STAGES.items():
            edges = np.linspace(0, episode.length, len(names) + 1).round().astype(int)
            heads[head] = tuple(
                Segment(n, int(a), int(b) - 1) for n, a, b in zip(names, edges, edges[1:], strict=False)
            )
        annotations.append(Annotation(episode.index, episode.length, "manual", **heads))
    shares = {head: dict(zip(STAGES[head], SHARES[head], strict=True)) for head in STAGES}
    lerobot_io.write_annotated_dataset(dataset, annotations, shares, folder / "bench/demo")
    return folder / "bench/demo"


def make_encoder(folder: Path) -> Path:
    """CLIP ViT-B/32 with random weights, and the demo's tokenizer. The image tower's weights are wider than usual: pictures of
    an episode then differ by a sixth of their embeddings' length, and otherwise by a thirtieth."""
    import torch
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip import CLIPImageProcessor

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained("data/demo/encoder")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    wider = {"initializer_factor": 5.0}
    config = CLIPConfig(text_config={"vocab_size": len(tokenizer), **special}, vision_config=wider, projection_dim=512)
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(image_processor=CLIPImageProcessor(), tokenizer=tokenizer).save_pretrained(folder)
    return folder


def make_reward_model(folder: Path, mode: str, dataset: Path, demos, embeddings) -> Path:
    """The full-size SARM with random weights, in LeRobot's format, normalised as LeRobot normalises this dataset."""
    import numpy as np
    import torch

    from sarm_lib.checkpoint import RewardModel, save_reward_model
    from sarm_lib.model import Sarm, SarmSpec
    from sarm_lib.progress import frame_store
    from sarm_lib.windows import WindowSpec

    torch.manual_seed(0)
    stages = {"sparse": ["task"]} if mode == "single_stage" else STAGES
    shares = {"sparse": [1.0]} if mode == "single_stage" else SHARES
    sarm = Sarm(SarmSpec(WindowSpec("centred", 8, 3, 4), stages, shares, mode, **SIZE)).eval()
    statistics = json.loads((dataset / "meta/stats.json").read_text())[STATE]
    mean, std = (np.array(statistics[name], dtype=np.float32) for name in ("mean", "std"))
    model = RewardModel(sarm, (CAMERA,), STATE, mean, std, embeddings.encoder, None, None)
    widen(sarm, frame_store(demos, embeddings, model))
    save_reward_model(model, folder, {}, [])
    return folder


def widen(sarm, store) -> None:
    """Scale the heads of an untrained `sarm` until frames differ: logits get the mean 0, and stages' a standard deviation of 1,
    that of τ 0.25 (more would multiply the encoder's rounding). As LeRobot initialises them, τ varies by less than 0.01 and
    most frames have the same dense stage: a comparison of φ would show little."""
    import numpy as np
    import torch

    window, rows = sarm.spec.window, np.arange(len(store.start))[:100]
    frames = window.observed(rows - store.start[rows], store.length[rows]) + store.start[rows][:, None]
    windows = store.gather(frames, np.full(len(rows), window.length), store.task_texts(rows))

    def standardise(head: torch.nn.Linear, logits: torch.Tensor, std: float) -> None:
        was, mean = torch.std_mean(logits, 0)
        head.weight *= (std / was)[:, None]
        head.bias.copy_((head.bias - mean) * std / was)

    with torch.no_grad():
        for head, logits in sarm.stage_logits(windows, sarm.spec.heads).items():
            if sarm.spec.num_stages(head) > 1:
                standardise(sarm.stage_model.heads[head], logits[:, window.position], 1.0)
        for head, found in sarm.predict(windows, sarm.spec.heads, window.position).items():
            standardise(sarm.subtask_model.heads[head], found.tau.logit(), 0.25)


def random_windows(spec, size: int, length: int):
    """`size` windows of `length` positions for a model of `spec`, all of them valid."""
    import torch

    from sarm_lib.windows import Windows

    images, text = torch.randn(size, spec.num_cameras, length, spec.image_dim), torch.randn(size, spec.text_dim)
    return Windows(images, text, torch.randn(size, length, spec.max_state_dim), torch.full((size,), length))


def training_batch(spec, size: int):
    """A training batch of `size` windows for a model of `spec`: random stages, all given, and a τ that is learned everywhere."""
    import torch

    from sarm_lib.training import Batch

    shape = size, spec.window.padded_length
    windows = random_windows(spec, *shape)
    stage = {head: torch.randint(0, spec.num_stages(head), shape) for head in spec.heads}
    tau = {head: torch.rand(shape) * 0.99 for head in spec.heads}
    known = dict.fromkeys(spec.heads, torch.ones(shape, dtype=torch.bool))
    positions = float(windows.valid.sum())
    given = torch.ones(size, dtype=torch.bool)
    return Batch(windows, stage, tau, known, given, None, positions, dict.fromkeys(spec.heads, positions))


class Bench:
    """The materials, and both sides' ways from them to results."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.kept: dict = {}  # what LeRobot took and gave, which fp32 and bf16 are compared with alike
        self.dataset = folder / "bench/demo" if (folder / "bench").exists() else make_dataset(folder, LENGTHS[device])
        self.clip = folder / "clip" if (folder / "clip").exists() else make_encoder(folder / "clip")

    def config(self, mode: str, encode: str = "fp32", score: str = "fp32", train: str = "fp32"):
        from sarm_lib import params

        return params.load(
            "params.yaml",
            {
                "base.dataset": str(self.dataset), "base.outputs": str(self.folder / "outputs"), "base.device": self.device,
                "base.image_keys": [CAMERA], "base.group_key": None, "base.truth_prefix": None, "base.annotation_mode": mode,
                "base.state_key": STATE,
                "prepare.encoder": str(self.clip), "prepare.image_keys": [], "prepare.precision": encode,
                "rabc.head_mode": "sparse" if mode == "single_stage" else "both", "rabc.precision": score,
                "sarm.frame_gap": 3, "sarm.precision": train, **{f"sarm.{name}": size for name, size in SIZE.items()},
            },
        )  # fmt: skip

    def embedded(self) -> tuple:
        """Dataset, encoder and embeddings, in fp32."""
        from sarm_lib import dataset, encoder

        config = self.config("dual")
        demos, clip, folder = dataset.from_params(config), encoder.from_params(config, self.device), config.paths.write("embeddings")
        encoder.ensure_embeddings(folder, config, demos, clip)
        return demos, clip, encoder.open_embeddings(folder, demos)

    def reward_model(self, mode: str) -> Path:
        folder = self.folder / mode
        if not folder.exists():
            demos, _, embeddings = self.embedded()
            make_reward_model(folder, mode, self.dataset, demos, embeddings)
        return folder

    @contextlib.contextmanager
    def lerobot(self, mode: str) -> Iterator[tuple]:
        """LeRobot's dataset, model and preprocessor, its encoder read from our folder instead of the Hub."""
        from lerobot.datasets import LeRobotDataset
        from lerobot.rewards.sarm import compute_rabc_weights, processor_sarm

        folder = str(self.clip)

        def local(reader: Callable) -> Callable:
            return lambda _, **options: reader(folder, **options)

        read_model, read_processor = (
            processor_sarm.CLIPModel.from_pretrained,
            processor_sarm.CLIPProcessor.from_pretrained,
        )
        some = {"root": self.dataset, "episodes": list(range(LEROBOTS))}
        here = lambda repo, **options: LeRobotDataset(repo, **some, **options)  # noqa: E731
        with (
            mock.patch.object(processor_sarm.CLIPModel, "from_pretrained", local(read_model)),
            mock.patch.object(processor_sarm.CLIPProcessor, "from_pretrained", local(read_processor)),
            mock.patch.object(compute_rabc_weights, "LeRobotDataset", here),
        ):
            loaded = compute_rabc_weights.load_sarm_resources("bench/demo", str(self.reward_model(mode)), self.device)
            with mock.patch.object(compute_rabc_weights, "load_sarm_resources", lambda *_: loaded):
                yield loaded

    # --- progress -------------------------------------------------------------------------------------------------------

    def progress(self, mode: str, precision: str) -> dict:
        row = self.progress_row(mode, precision, "fp32")
        return row | ({"scored_in_bf16": self.progress_row(mode, "bf16", "bf16")} if precision == "bf16" else {})

    def progress_row(self, mode: str, encode: str, score: str) -> dict:
        import numpy as np
        import pandas as pd
        from lerobot.rewards.sarm.compute_rabc_weights import compute_sarm_progress

        from sarm_lib import checkpoint, dataset, encoder, progress

        config = self.config(mode, encode, score)
        clip, demos = encoder.from_params(config, self.device), dataset.from_params(config)
        model = checkpoint.load_reward_model(self.reward_model(mode), self.device)

        def ours() -> pd.DataFrame:
            shutil.rmtree(self.folder / "outputs", ignore_errors=True)
            folder, path = config.paths.write("embeddings"), config.paths.write("progress.parquet")
            encoder.ensure_embeddings(folder, config, demos, clip)
            embeddings = encoder.open_embeddings(folder, demos)
            progress.ensure_progress(path, config, demos, embeddings, model, "bench")
            return pd.read_parquet(path)

        def lerobots() -> tuple[float, pd.DataFrame]:
            path = self.folder / "lerobot.parquet"
            arguments = "bench/demo", "bench", str(path), config.rabc.head_mode, self.device, 0
            with self.lerobot(mode):
                compute_sarm_progress(*arguments, stride=10_000)  # an episode's first and last frame
                seconds, _ = timed(lambda: compute_sarm_progress(*arguments))
            return seconds, pd.read_parquet(path)

        ours()
        before, mine = timed(ours)
        if mode not in self.kept:
            self.kept[mode] = *lerobots(), self.exact(demos, model)
        seconds, theirs, exact = self.kept[mode]
        ours_seconds = statistics.median([before, *(timed(ours)[0] for _ in range(2))])
        columns = list(exact)
        alike = mine[columns][: len(theirs)]
        difference = np.abs(alike.to_numpy() - theirs[columns].to_numpy())
        row = result(ours_seconds, seconds, difference.max()) | {"mean_abs_diff": float(difference.mean())}
        row["ratio"] *= len(mine) / len(theirs)
        flops = self.flops(clip, model, demos, config)
        spread = {name: float(alike[name].std()) for name in columns}
        errors = {
            side: max(float(np.abs(of[name] - exact[name][: len(of)]).max()) for name in columns)
            for side, of in (("ours", alike), ("lerobot", theirs))
        }
        found = {"float64": errors, "std": spread, "frames": len(mine), "lerobot_frames": len(theirs)}
        found |= {"flops_per_frame": flops}
        operations = [(flops["encode"] * len(mine), encode), (flops["score"] * len(mine), score)]
        return row | found | self.rate(operations, ours_seconds)

    def exact(self, demos, model) -> dict:
        """Progress in float64, of every frame that LeRobot's side is given too: (n,) by column."""
        import numpy as np
        import torch

        from sarm_lib import encoder, progress, stages, windows

        clip, sarm = encoder.load(str(self.clip)), copy.deepcopy(model.sarm).cpu().double()
        clip.dtype = torch.float64
        clip.model.double()
        episodes = demos.episodes[:LEROBOTS]
        images = [clip.images(np.stack([image for _, image in demos.iterate_frames(CAMERA, (e,))])) for e in episodes]
        embeddings = encoder.Embeddings({CAMERA: torch.cat(images).numpy()}, clip.texts(demos.tasks).numpy(),
                                        model.encoder, "", "")  # fmt: skip
        store, spec = progress.frame_store(demos, embeddings, model), sarm.spec
        rows = np.arange(episodes[-1].rows.stop)
        frames = spec.window.observed(rows - store.start[rows], store.length[rows]) + store.start[rows, None]
        seen = store.gather(frames, np.full(len(rows), spec.window.length), store.task_texts(rows))
        seen = windows.Windows(*(part.double() for part in seen[:3]), seen.lengths)
        with torch.inference_mode():
            found = sarm.predict(seen, spec.heads, spec.window.position)
        return {
            f"progress_{head}": stages.progress(p.stage[:, 0].numpy(), p.tau[:, 0].numpy(), np.array(spec.proportions[head]))
            for head, p in found.items()
        }

    def flops(self, clip, model, demos, config) -> dict[str, float]:
        """Floating point operations a frame: of encoding it once, and of scoring it."""
        import numpy as np
        from torch.utils.flop_counter import FlopCounterMode

        from sarm_lib import encoder, kernels, progress

        image = next(demos.iterate_frames(CAMERA))[1][None]
        plain = mock.patch.object(kernels, "_has_onednn", lambda: False)  # the counter does not know its product
        with plain, FlopCounterMode(display=False) as encoding:
            clip.images(np.repeat(image, 8, 0))
        embeddings = encoder.open_embeddings(config.paths.read("embeddings", "00"), demos)
        store = progress.frame_store(demos, embeddings, model)
        with plain, FlopCounterMode(display=False) as scoring:
            progress.score(model.sarm, store, np.arange(8), model.spec.heads)
        return {"encode": encoding.get_total_flops() / 8, "score": scoring.get_total_flops() / 8}

    def rate(self, operations: list[tuple[float, str]], seconds: float) -> dict[str, float]:
        """What was reached of the arithmetic, in GFLOP/s, beside what large products of two matrices reach here with as many
        operations of each precision."""
        total = sum(flops for flops, _ in operations)
        products = sum(flops / self.matmul(precision) for flops, precision in operations)
        return {"gflop_per_s": total / seconds / 1e9, "matmul_gflop_per_s": total / products / 1e9}

    def matmul(self, precision: str) -> float:
        """Operations a second of a large product of two matrices: 2048 wide, or less where that would take long, as bf16 does on
        a processor that has no instructions for it."""
        import torch

        dtype, size, seconds = torch.bfloat16 if precision == "bf16" else torch.float32, 128, 0.0
        while size < 2048 and seconds < 0.1:
            size *= 2
            left = torch.randn(size, size, device=self.device, dtype=dtype)

            def product(left=left) -> None:
                left @ left
                self.wait()

            product()
            seconds = min(timed(product)[0] for _ in range(5))
        return 2 * size**3 / seconds

    def wait(self) -> None:
        """Until the GPU has done what it was given: only then is time taken."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    # --- training -------------------------------------------------------------------------------------------------------

    def training(self, precision: str) -> dict:
        rows = {batch: self.training_step(precision, batch) for batch in (8, 32)}
        worst = min(rows.values(), key=lambda row: row["ratio"])
        return worst | {"by_batch": {str(batch): row for batch, row in rows.items()}}

    def training_step(self, precision: str, batch_size: int) -> dict:
        import numpy as np
        import torch
        from accelerate.state import AcceleratorState
        from torch.utils.flop_counter import FlopCounterMode

        from sarm_lib import checkpoint, kernels, lerobot_io, training
        from sarm_lib.schedule import Average

        config, (demos, clip, embeddings) = self.config("dual", train=precision), self.embedded()
        labels = lerobot_io.read_labels(self.dataset, demos, ("sparse", "dense"))
        model = checkpoint.load_reward_model(self.reward_model("dual"), self.device)
        sampler = training.new_sampler(config, demos, embeddings, labels, model, clip)
        AcceleratorState._reset_state(True)  # one precision a process otherwise
        accelerator = training.make_accelerator(config.sarm, self.device)
        loss = accelerator.prepare(training.SarmLoss(model.sarm, "valid").train())
        optimizer, rng = torch.optim.AdamW(model.sarm.parameters(), lr=1e-5, fused=True), np.random.default_rng(0)
        average = Average(list(model.sarm.parameters()), config.sarm.ema_decay)

        def ours(average: Average | None = None) -> None:
            batch = sampler.draw(rng, batch_size).to(torch.device(self.device))
            accelerator.backward(loss(batch)["loss"])
            torch.nn.utils.clip_grad_norm_(model.sarm.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if average:
                average.update()
            self.wait()

        ours(), ours(average)
        laps = [timed(ours)[0] for _ in range(3)]
        key = f"train-{batch_size}"
        if key not in self.kept:
            self.kept[key] = self.lerobot_training_step(batch_size)
        seconds = statistics.median([*laps, *(timed(ours)[0] for _ in range(3))])
        averaged = statistics.median(timed(lambda: ours(average))[0] for _ in range(3))
        with mock.patch.object(kernels, "_has_onednn", lambda: False), FlopCounterMode(display=False) as step:
            ours()
        flops = step.get_total_flops()
        row = result(seconds, self.kept[key], self.loss_difference(precision))
        return row | {"with_average": averaged, "flops_per_step": flops} | self.rate([(flops, precision)], seconds)

    def lerobot_training_step(self, batch_size: int) -> float:
        import torch
        from torch.utils.data import default_collate

        with self.lerobot("dual") as (demos, model, preprocess):
            items = default_collate([demos[i % len(demos)] for i in range(batch_size)])
            model.train()
            optimizer = torch.optim.AdamW(model.get_optim_params(), lr=1e-5)

            def step() -> None:
                copied = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in items.items()}
                total, _ = model(preprocess(copied))
                total.backward()
                torch.nn.utils.clip_grad_norm_(list(model.get_optim_params()), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                self.wait()

            step()
            return statistics.median(timed(step)[0] for _ in range(3))

    def loss_difference(self, precision: str) -> float:
        """Of both sides' losses on one batch without augmentation, every position valid, the true stage given."""
        import torch
        from lerobot.rewards.sarm.modeling_sarm import SARMRewardModel

        from sarm_lib import checkpoint, training

        torch.manual_seed(0)
        sarm = checkpoint.load_reward_model(self.reward_model("dual"), self.device).sarm.eval()
        batch = training_batch(sarm.spec, 4)
        theirs = SARMRewardModel.from_pretrained(self.reward_model("dual")).to(self.device).eval()
        theirs.config.device, theirs.gt_stage_ratio = self.device, 1.0
        bf16 = torch.autocast(self.device, torch.bfloat16, enabled=precision == "bf16")
        targets = {f"{head}_targets": batch.stage[head] + batch.tau[head] for head in batch.stage}
        features = {
            "video_features": batch.windows.images[:, 0],
            "text_features": batch.windows.text,
            "state_features": batch.windows.state,
        }
        with torch.no_grad():
            with bf16:
                mine = float(training.SarmLoss(sarm)(batch.to(torch.device(self.device)))["loss"])
            other = float(theirs({**features, **targets, "lengths": batch.windows.lengths})[0])
        return abs(mine - other)

    # --- encoding -------------------------------------------------------------------------------------------------------

    def encoding(self) -> dict:
        import numpy as np
        import torch

        from sarm_lib import dataset, encoder

        config = self.config("dual")
        demos, clip = dataset.from_params(config), encoder.from_params(config, self.device)
        size = config.prepare.encode_batch_size
        batches = [len(batch) for e in demos.episodes for batch in batched(range(e.length), size)]
        side = clip.model.config.vision_config.image_size
        pixels = torch.randn(max(batches), 3, side, side, device=self.device)

        def bare() -> None:
            for frames in batches:
                clip.embed(pixels[:frames])
            self.wait()

        def ours() -> None:
            shutil.rmtree(self.folder / "outputs", ignore_errors=True)
            encoder.ensure_embeddings(config.paths.write("embeddings"), config, demos, clip)

        bare(), ours()
        rates = [demos.num_frames / timed(way)[0] for _ in range(3) for way in (ours, bare)]
        mine, forward = np.median(rates[::2]), np.median(rates[1::2])
        return {"ours": float(mine), "lerobot": None, "bare": float(forward), "ratio": float(mine / forward),
                "max_abs_diff": None}  # fmt: skip


# --- weights ------------------------------------------------------------------------------------------------------------


def progress_file(folder: Path, frames: int) -> Path:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, length, rng = folder / f"progress_{frames}.parquet", 500, np.random.default_rng(0)
    if not path.exists():
        index = np.arange(frames)
        noisy = np.clip(index % length / (length - 1) + rng.normal(0, 0.02, frames), 0, 1).astype(np.float32)
        columns = {"index": index, "episode_index": index // length, "frame_index": index % length}
        pq.write_table(pa.table(columns | {"progress_sparse": noisy}), path)
    return path


def rabc_build(folder: Path, frames: int) -> dict:
    import numpy as np
    from lerobot.rewards.sarm.rabc import RABCWeights

    from sarm_lib import rabc

    path = progress_file(folder, frames)
    settings = (16, 0.05, 1e-6)
    ours = lambda: rabc.compute(path, "sparse", *settings, list(range(frames // 500)), lerobot_compat=True)  # noqa: E731
    seconds, mine = timed(ours)
    theirs_seconds, theirs = timed(lambda: RABCWeights(path, settings[0], "sparse", *settings[1:]))
    seconds = statistics.median([seconds, *(timed(ours)[0] for _ in range(2))])
    some = np.random.default_rng(0).choice(frames, 2000, replace=False)
    deltas = np.array([theirs._compute_delta(int(i)) for i in some], dtype=np.float32)
    difference = np.abs(theirs._compute_weights(deltas) - mine.weight[some]).max()
    kept[frames] = theirs, mine
    peak = {name: rabc_memory(path, frames // 500, how) for name, how in (("peak_mb", False), ("peak_mb_compat", True))}
    return result(seconds, theirs_seconds, difference) | {"frames": frames} | peak


kept: dict = {}


def rabc_batch(folder: Path) -> dict:
    import numpy as np
    import torch

    if 1_000_000 not in kept:
        rabc_build(folder, 1_000_000)
    theirs, mine = kept[1_000_000]
    batches = np.random.default_rng(1).integers(0, 1_000_000, (2000, 32))
    weight = torch.from_numpy(mine.weight)

    def ours(rows: torch.Tensor) -> torch.Tensor:  # what `losses.WeightedLoss` does with the weights of a batch
        found = weight[rows]
        return found * len(found) / (found.sum() + 1e-6)

    def lap(side: Callable) -> tuple[float, object]:
        start = time.perf_counter()
        for rows in batches:
            found = side(rows)
        return (time.perf_counter() - start) / len(batches), found

    mine_seconds, mine_last = lap(lambda rows: ours(torch.from_numpy(rows)))
    theirs_seconds, (theirs_last, _) = lap(lambda rows: theirs.compute_batch_weights({"index": torch.from_numpy(rows)}))
    return result(mine_seconds, theirs_seconds, float((mine_last - theirs_last).abs().max()))


def rabc_memory(path: Path, episodes: int, lerobot_compat: bool) -> float:
    """Most memory that `rabc.compute` takes, in MB beyond what was held before it, in a process of its own."""
    code = (
        "import re, sys\nfrom pathlib import Path\nfrom sarm_lib import rabc\n"
        "held = lambda key: int(re.search(rf'{key}:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024 / 1e6\n"
        "before = held('VmRSS')\n"
        "rabc.compute(Path(sys.argv[1]), 'sparse', 16, 0.05, 1e-6, list(range(int(sys.argv[2]))), None, sys.argv[3] == 'True')\n"
        "print(held('VmHWM') - before)"
    )
    return float(
        subprocess.run([sys.executable, "-c", code, str(path), str(episodes), str(lerobot_compat)], capture_output=True, check=True, text=True).stdout
    )


# --- the run ------------------------------------------------------------------------------------------------------------


def timed(function: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def result(ours: float, lerobot: float, difference: float) -> dict:
    return {"ours": ours, "lerobot": lerobot, "ratio": lerobot / ours, "max_abs_diff": float(difference)}


def measure(name: str, bench: Bench, folder: Path) -> dict:
    match name.removesuffix("_gpu").split("_"):
        case ["progress", mode, precision]:
            return bench.progress("single_stage" if mode == "single" else mode, precision)
        case ["train", _, precision]:
            return bench.training(precision)
        case ["rabc", "build", size]:
            return rabc_build(folder, int(size.removesuffix("m")) * 1_000_000)
        case ["rabc", "batch"]:
            return rabc_batch(folder)
        case ["encode", *_]:
            return bench.encoding()
    raise ValueError(name)


def table(results: list[dict]) -> str:
    """The results as Markdown."""
    number = lambda x: "" if x is None else f"{x:.3g}"  # noqa: E731
    lines = ["| | ours | LeRobot | ratio | largest difference | device |", "|---|---|---|---|---|---|"]
    for r in results:
        cells = (number(r["ours"]), number(r["lerobot"]), f"{r['ratio']:.1f}", number(r["max_abs_diff"]), r["device"])
        lines.append(f"| `{r['name']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*NAMES, *(f"{name}_gpu" for name in ON_GPU)])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    import torch

    logging.basicConfig(level=logging.WARNING)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))
    gpu = torch.cuda.is_available()
    everything = [*NAMES, *(f"{name}_gpu" for name in ON_GPU)]
    names = arguments.only or everything
    made = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else []
    rows, skipped = {row["name"]: row for row in made}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        benches: dict[str, Bench] = {}
        for name in names:
            on_gpu = name.endswith("_gpu")
            if on_gpu and not gpu:
                skipped[name] = "no GPU here"
                continue
            device = "cuda" if on_gpu else "cpu"
            threads = min(GPU_THREADS, len(cores)) if on_gpu else arguments.threads
            # One core for one thread: what threads of other libraries do, such as decoding ahead, is paid for.
            settle(cores if on_gpu else cores[-threads:], threads)
            if device not in benches:
                benches[device] = Bench(folder / device, device)
            where = torch.cuda.get_device_name() if on_gpu else processor()
            rows[name] = {
                "name": name,
                **measure(name, benches[device], folder),
                "device": where,
                "threads": threads,
                "date": time.strftime("%Y-%m-%d"),
            }
            print(json.dumps(rows[name]), flush=True)
            ordered = [rows[n] for n in everything if n in rows]
            missing = {n: "no GPU was there" if n.endswith("_gpu") else "not run yet" for n in everything if n not in rows}
            RESULTS.write_text(json.dumps({"results": ordered, "not_run": missing}, indent=1) + "\n")
    print(table([row for row in rows.values()]))
    for name, why in skipped.items():
        print(f"{name}: {why}")


def settle(cores: list[int], threads: int) -> None:
    """Run this thread, and those that it starts from now on, on `cores`, and PyTorch's products on so many threads."""
    import torch

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


def processor() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    flags = " with bf16" if "avx512_bf16" in info or "amx_bf16" in info else ""
    return (named[0] if named else platform.processor()) + flags


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
