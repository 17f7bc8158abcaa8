"""What is pushed to the Hugging Face Hub, and only when somebody says so: one command each, never a stage.

    python -m sarm_lib.hub reward-model user/name     outputs/sarm with a model card
    python -m sarm_lib.hub dataset user/name          outputs/dataset: the annotated dataset, videos included, with LeRobot's card
    python -m sarm_lib.hub progress user/name         sarm_progress.parquet, into that dataset, where LeRobot looks for it

`--private` makes the repository private, `--outputs` names another folder than that of `params.yaml`. Log in first: `hf auth login`.
"""

import argparse
import contextlib
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError

from sarm_lib.artifacts import checkpoint_digest, read_json
from sarm_lib.checkpoint import CONFIG, OURS
from sarm_lib.params import load

KINDS = {
    "reward-model": ("model", "sarm"),
    "dataset": ("dataset", "dataset"),
    "progress": ("dataset", "sarm_progress.parquet"),
}


def push(kind: str, repo_id: str, outputs: Path, private: bool = False, api: HfApi | None = None) -> str:
    """Push one artifact and return its address. Raises FileNotFoundError where it was not made yet.

    LeRobot opens a dataset by the tag of its format's version, so that is put on what was pushed last.
    """
    api, (repo_type, name) = api or HfApi(), KINDS[kind]
    path = outputs / name
    if not (
        path / "meta/info.json" if kind == "dataset" else path / CONFIG if kind == "reward-model" else path
    ).exists():
        raise FileNotFoundError(f"{path} is not there yet: run the pipeline first (dvc repro)")
    if kind == "dataset" and not any(file.exists() for file in (path / "data").rglob("*.parquet")):
        raise FileNotFoundError(
            f"{path} has annotations and no frames: DVC does not keep its links to data and videos. "
            "`dvc repro -f -s 02_verify` makes them again"
        )
    address = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    where = {"repo_id": repo_id, "repo_type": repo_type, "commit_message": f"{kind} made by SARM"}
    if path.is_file():
        api.upload_file(path_or_fileobj=path, path_in_repo=path.name, **where)
        if (info := outputs / "dataset/meta/info.json").exists():
            tag(api, repo_id, read_json(info)["codebase_version"])
        return str(address)
    api.upload_folder(folder_path=path, **where)
    if kind == "dataset":
        from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
        from lerobot.datasets.utils import create_lerobot_dataset_card

        info = LeRobotDatasetMetadata(repo_id, root=path).info
        card = create_lerobot_dataset_card(tags=["sarm"], dataset_info=info, repo_id=repo_id)
        api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", **where)
        tag(api, repo_id, info.codebase_version)
    if kind == "reward-model":
        card = model_card(path, outputs / "metrics", repo_id)
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", **where)
    return str(address)


def tag(api: HfApi, repo_id: str, version: str) -> None:
    """Put the tag of a dataset format's version on the newest state of a dataset."""
    with contextlib.suppress(RevisionNotFoundError):
        api.delete_tag(repo_id, tag=version, repo_type="dataset")
    api.create_tag(repo_id, tag=version, repo_type="dataset")


def model_card(checkpoint: Path, metrics: Path, repo_id: str) -> str:
    """What the reward model is, what chapter 04 measured of exactly this one, and how to use it."""
    ours = read_json(checkpoint / OURS)
    spec, window = ours["spec"], ours["spec"]["window"]
    lerobot = read_json(checkpoint / CONFIG)["type"] == "sarm"
    stages = "\n".join(f"- {head}: {', '.join(names)}" for head, names in spec["stage_names"].items())
    loads = "`SARMRewardModel.from_pretrained` loads it" if lerobot else "LeRobot cannot express it and refuses it"
    headline, scorecard = metrics / "visualize.json", metrics / "scorecard.json"
    measured = headline.exists() and read_json(headline).get("reward_model") == checkpoint_digest(checkpoint)
    figures = read_json(scorecard)["sarm"]["all"] if measured else {}
    rows = [
        f"| {name} | {value:g} | [{figures[f'{name}_low']:g}, {figures[f'{name}_high']:g}] |"
        for name, value in figures.items()
        if f"{name}_low" in figures
    ]
    table = (
        "\n".join(["| metric | test episodes | 95 % interval |", "|---|---|---|", *rows]) if rows else "Not measured."
    )
    return f"""---
tags: [robotics, reward-model, sarm, lerobot]
---
# {repo_id.split("/")[-1]}

A SARM reward model (Stage-Aware Reward Modeling, arXiv 2509.25358): from a window of frames it says which stage of a task a robot is in
and how far it is, as progress in [0, 1].

- Window: {window["kind"]}, {window["n_obs_steps"]} frames beside the current one, {window["frame_gap"]} apart.
- Cameras: {", ".join(ours["image_keys"])}; state: {ours["state_key"]}, normalised with the statistics in `{OURS}`.
- Image and text encoder: {ours["encoder"]}.
- {loads}.

Stages:
{stages}

## Measured

{table}

The metrics' formulas stand in `sarm_lib/scorecard.py` of the repository that made it.

## Use

Set `rabc.reward_model_path: {repo_id}` in `params.yaml` and run notebook 05: it scores any dataset with these cameras and this encoder.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("repo_id")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--outputs", type=Path, default=None)
    arguments = parser.parse_args()
    params = load()
    outputs = arguments.outputs or params.paths.resolve(params.base.outputs)
    print(push(arguments.kind, arguments.repo_id, outputs, arguments.private))


if __name__ == "__main__":
    main()
