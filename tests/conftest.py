"""A tiny dataset, a tiny encoder and a tiny project: everything runs on them in seconds, without network or GPU."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# notebooks run as stages do, and no page hangs on the time it takes
os.environ |= {"SARM_HEADLESS": "1", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order, here and in the kernels that tests start

import nbformat
import numpy as np
import pytest
import torch
import yaml
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # a busy machine is no error
settings.load_profile("any machine")

ROOT = Path(__file__).parents[1]
CAMERAS = ("observation.images.top", "observation.images.side")
TASKS = ("stack the cubes", "sort the cubes")
LENGTHS = (14, 18, 16, 20, 15, 17, 19, 16)
torch.set_num_threads(1)


def make_dataset(
    root: Path,
    *,
    use_videos: bool = True,
    seed: int = 0,
    files: int = 1,
    state_keys: tuple[str, ...] = ("observation.state",),
    lengths: tuple[int, ...] = LENGTHS,
) -> Path:
    """A LeRobot v3 dataset of short episodes: a bright square crosses the picture, `sim.*` columns ride along.

    files > 1 spreads it over several data, video and episode files. The i-th of `state_keys` is the state plus 100 i.
    """
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    picture = {
        "dtype": "video" if use_videos else "image",
        "shape": (32, 32, 3),
        "names": ["height", "width", "channels"],
    }
    features = {
        **dict.fromkeys(CAMERAS, picture),
        **{key: {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]} for key in state_keys},
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        "sim.progress": {"dtype": "float32", "shape": (1,), "names": None},
    }
    # x264's slower presets now and then give other bytes for the same pictures, and with them another dataset
    codec = RGBEncoderConfig(vcodec="h264", crf=18, g=5, preset="ultrafast")
    dataset = LeRobotDataset.create(
        "test/tiny",
        10,
        features,
        root=root,
        use_videos=use_videos,
        rgb_encoder=codec,
        video_files_size_in_mb=0.001 if files > 1 else None,
        data_files_size_in_mb=0.001 if files > 1 else None,
        metadata_buffer_size=2 if files > 1 else 10,
    )
    _record(dataset, lengths, seed, state_keys)
    return root


def grow_dataset(root: Path, lengths: tuple[int, ...]) -> None:
    """Add episodes to a dataset of `make_dataset`, as LeRobot does when a recording goes on."""
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    codec = RGBEncoderConfig(vcodec="h264", crf=18, g=5, preset="ultrafast")
    _record(LeRobotDataset.resume("test/tiny", root=root, rgb_encoder=codec), lengths, 1)


def _record(dataset, lengths: tuple[int, ...], seed: int, state_keys: tuple[str, ...] = ("observation.state",)) -> None:
    rng = np.random.default_rng(seed)
    for episode, length in enumerate(lengths):
        for t in range(length):
            progress = t / (length - 1)
            image = rng.integers(0, 40, (32, 32, 3), dtype=np.uint8)
            image[8:16, int(progress * 24) : int(progress * 24) + 8] = 200
            state = np.array([progress, rng.normal(), episode], dtype=np.float32)
            frame = {
                CAMERAS[0]: image,
                CAMERAS[1]: np.ascontiguousarray(image[::-1]),
                **{key: state + 100 * i for i, key in enumerate(state_keys)},
                "action": rng.normal(size=2).astype(np.float32),
                "sim.progress": np.array([progress], dtype=np.float32),
                "task": TASKS[episode % 2],
            }
            dataset.add_frame(frame)
        # LeRobot would encode the cameras in forked processes: a fork of a process with threads may hang for ever
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()


def make_encoder(folder: Path, width: int = 512) -> Path:
    """A randomly initialised CLIP in Hugging Face format."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from demo.encoder import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(list(TASKS), folder)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, **ids, "vocab_size": len(tokenizer)},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=width,
    )
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


TINY = {
    "base.dataset": "data/tiny",
    "base.image_keys": [CAMERAS[0]],
    "base.group_key": None,
    "base.val_fraction": 0.25,
    "base.test_fraction": 0.25,
    "base.device": "cpu",
    "prepare.encoder": "data/encoder",
    "prepare.image_keys": [CAMERAS[1]],
    "prepare.encode_batch_size": 16,
    "prepare.num_visualizations": 1,
    "annotate.sparse_subtasks": ["cross the left half", "cross the right half"],
    "annotate.dense_subtasks": ["leave the edge", "cross the middle", "reach the other edge"],
    "annotate.marks": "marks.yaml",
    "base.truth_prefix": None,
    "verify.num_visualizations": 1,
    "visualize.num_visualizations": 1,
    "sarm.frame_gap": 1,
    "sarm.hidden_dim": 16,
    "sarm.num_heads": 2,
    "sarm.num_layers": 1,
    "sarm.steps": 12,
    "sarm.batch_size": 8,
    "sarm.warmup_steps": 2,
    "sarm.log_every": 2,
    "sarm.eval_every": 4,
    "sarm.save_every": 4,
    "policy.chunk_size": 4,
    "policy.n_action_steps": 2,
    "policy.steps": 6,
    "policy.batch_size": 4,
    "policy.warmup_steps": 2,
    "policy.log_every": 2,
    "policy.save_every": 2,
    "evaluate.environment": None,
    "evaluate.reference_group": None,
    "policy.config": {
        "image_resolution": [32, 32],
        "stem": [8, 8, 16],
        "depth": 1,
        "vision_depth": 1,
        "vision_width": 16,
        "head_dim": 4,
        "vlm_width": 16,
        "expert_width": 16,
    },
}


def make_project(folder: Path, dataset: Path, encoder: Path, overrides: dict | None = None) -> Path:
    """A project folder: the repository's notebooks and `params.yaml` with tiny values; notebooks find it by themselves."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    for dotted, value in {**TINY, **(overrides or {})}.items():
        section, key = dotted.split(".")
        values[section][key] = value
    (folder / "data").mkdir(parents=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    shutil.copytree(dataset, folder / "data/tiny")
    shutil.copytree(encoder, folder / "data/encoder")
    unsaid = shutil.ignore_patterns(".ipynb_checkpoints", "kernel-ipc-*")  # the sockets of a pipeline that is running
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=unsaid)
    write_marks(folder)
    return folder


def write_marks(project: Path) -> None:
    """Mark three training episodes and a validation episode: the subtasks are thirds and halves of the way."""
    from sarm_lib import annotations, corrections, dataset, params
    from sarm_lib.annotations import Annotation, Segment

    local = {"base.annotation_mode": "dual", "base.dataset": "data/tiny", "base.revision": None}
    config = params.load(project / "params.yaml", local)
    demos, names = dataset.from_params(config), annotations.vocabulary(config)
    path = config.paths.resolve(config.annotate.marks)
    for episode in [*demos.split("train")[:3], *demos.split("val")[:1]]:
        heads = {}
        for head, subtasks in names.items():
            edges = [round(i * episode.length / len(subtasks)) for i in range(len(subtasks) + 1)]
            heads[head] = tuple(Segment(n, edges[i], edges[i + 1] - 1) for i, n in enumerate(subtasks))
        mark = Annotation(episode.index, episode.length, "manual", **heads)
        corrections.record_mark(path, demos, mark)
    path.write_text(re.sub("when: .*", "when: '2026-01-01'", path.read_text()))  # the same bytes at any time


def run_chapters(project: Path) -> Path:
    """Run every notebook of a project in this process."""
    for name in chapters():
        run_notebook(project, name)
    return project


def run_notebook(project: Path, name: str, overrides: dict | None = None) -> dict:
    """Run a notebook's code in this process, as Lab would: from its own folder. Returns its variables."""
    notebook = nbformat.read(project / "notebooks" / f"{name}.ipynb", as_version=4)
    variables: dict = {"display": lambda *_: None}
    before = Path.cwd()
    os.chdir(project / "notebooks")
    try:
        for cell in notebook.cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{name}:{cell.id}", "exec"), variables)
                if "parameters" in cell.metadata.get("tags", []) and overrides:
                    variables["overrides"] = overrides
    finally:
        os.chdir(before)
    return variables


def launch(project: Path, processes: int, stage: str, overrides: dict | None = None) -> str:
    """Run a stage of `sarm_lib.launch` in a project: in this process, as a notebook does, or in so many on the CPU. Returns
    what these said.

    Several are started by `accelerate launch`: with `--multi_gpu` and ACCELERATE_USE_CPU, since `--cpu` starts a single one
    whatever it is asked for.
    """
    from sarm_lib.launch import STAGES
    from sarm_lib.params import load

    if processes == 1:
        STAGES[stage](load(project / "params.yaml", overrides))
        return ""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
    command += ["--num_machines=1", "--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no"]
    command += ["--module", "sarm_lib.launch", stage, "--overrides", json.dumps(overrides or {})]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for i in range(processes):
        assert f"process {i + 1} of {processes}" in done.stderr
    return done.stderr


def chapters() -> list[str]:
    return sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))


@pytest.fixture(autouse=True)
def ordinary_priority():
    """SVT-AV1, where it runs as root, makes its process real-time; kernels that later tests start would inherit that and
    starve each other on a small machine."""
    yield
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install -e .[dev])")

    from .lab import CHROMIUM

    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory, tiny):
    """(address, its root folder) of a JupyterLab beside the tiny dataset."""
    from .lab import jupyter_lab

    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(tiny, folder / "work/dataset")
    with jupyter_lab(folder) as address:
        yield address, folder / "work"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The tiny dataset's folder; read only."""
    return make_dataset(tmp_path_factory.mktemp("tiny") / "dataset")


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> Path:
    """The tiny encoder's folder; read only."""
    return make_encoder(tmp_path_factory.mktemp("encoder") / "clip")


@pytest.fixture(scope="session")
def project(tmp_path_factory, tiny, tiny_encoder) -> Path:
    """A tiny project in which every notebook has run; read only."""
    return run_chapters(make_project(tmp_path_factory.mktemp("project") / "p", tiny, tiny_encoder))


@pytest.fixture
def in_project(project, monkeypatch):
    """Parameters and dataset of the finished tiny project."""
    from sarm_lib import dataset, params

    monkeypatch.chdir(project)
    config = params.load()
    return config, dataset.from_params(config)
