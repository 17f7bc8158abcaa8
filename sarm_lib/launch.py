"""The long stages on many GPUs, from `params.yaml` alone; the notebook then shows what came of it.

    accelerate launch -m sarm_lib.launch encode         stage 00's embeddings, an episode a process in turn
    accelerate launch -m sarm_lib.launch train          stage 03's training, a batch shared among the processes
    accelerate launch -m sarm_lib.launch score          stage 05's progress, a block of episodes a process in turn
    accelerate launch -m sarm_lib.launch policy         stage 06's policies, each step's frames shared among the processes

They run on as many GPUs and machines as `accelerate config` was told; machines need one `outputs/` that all of them see. The
functions are those that the notebooks call, and what they make does not depend on how many processes of as many threads
there are. In training that is but for rounding, and with a dropout of 0 only: each process draws masks of its own.
"""

import argparse
import json
import logging
from pathlib import Path

from sarm_lib import checkpoint, corrections, dataset, encoder, lerobot_io, progress, rabc, training
from sarm_lib.params import load
from sarm_lib.processes import own_device, share

log = logging.getLogger("sarm")


def encode(params) -> Path:
    """Stage 00's embeddings. Returns their folder."""
    folder, clip = (
        params.paths.write("embeddings"),
        encoder.from_params(params, own_device(dataset.pick_device(params.base.device))),
    )
    encoder.ensure_embeddings(folder, params, dataset.from_params(params), clip)
    return folder


def score(params) -> Path:
    """Stage 05's progress of every frame. Returns its file. Raises ValueError where `rabc.progress_path` names one."""
    if params.rabc.progress_path:
        raise ValueError(
            f"rabc.progress_path: progress is taken from {params.rabc.progress_path}; there is nothing to score"
        )
    params, device = params.weighing, own_device(dataset.pick_device(params.base.device))
    demos, path = dataset.from_params(params), params.paths.write("sarm_progress.parquet")
    if params.rabc.dataset:
        folder = params.rabc_embeddings(demos)
        encoder.ensure_embeddings(folder, params, demos, encoder.from_params(params, device))
    else:
        folder = params.paths.read("embeddings", "00_prepare")
    embeddings = encoder.open_embeddings(folder, demos)
    model, named = checkpoint.reward_model_of(params, device)
    progress.ensure_progress(path, params, demos, embeddings, model, named)
    return path


def train(params) -> Path:
    """Stage 03's training. Returns the checkpoint's folder."""
    device = dataset.pick_device(params.base.device)
    demos = dataset.from_params(params)
    embeddings = encoder.open_embeddings(params.paths.read("embeddings", "00_prepare"), demos)
    annotated = params.paths.read("dataset/meta", "02_verify").parent
    labels = lerobot_io.read_labels(annotated, demos, params.heads)
    model = training.new_reward_model(params, demos, embeddings, labels)
    sampler = training.new_sampler(
        params, demos, embeddings, labels, model, encoder.from_params(params, own_device(device))
    )
    made_from, folder = training.provenance(params, demos, embeddings, labels), params.paths.write("sarm")
    validate = training.validator(demos, labels, sampler)
    training.train_into(folder, model, sampler, validate, params, made_from, device)
    return folder


def train_policies(params) -> Path:
    """Stage 06's policies. Returns the folder of the last one."""
    from sarm_lib import policy  # LeRobot's policies take a while to load, and no other stage needs them

    params = params.weighing
    demos = corrections.without_rejected(dataset.from_params(params), params)
    device = dataset.pick_device(params.base.device)
    weighted = rabc.weights_of_rows(params.paths.read("rabc_weights.parquet", "05_compute_rabc"), params, demos)
    arms = (policy.Arm("bc"), policy.Arm("rabc", *weighted))
    folders = {arm.name: params.paths.write(f"policy/{arm.name}") for arm in arms}
    todo = [arm for arm in arms if not policy.is_trained(arm, params, demos, folders[arm.name])]
    if todo:
        held = policy.cached_bytes(params.policy, demos, ("train",), own_device(device))
        log.info("%.2f GB of frames are held in the memory of each process", held / 1e9)
        frames = policy.frames_for(params.policy, demos, ("train",), own_device(device))
        if share(device).is_main_process:
            log.info(
                "each process, for each of %d policies: %s", len(todo), policy.estimate(params, demos, frames, device)
            )
    for arm in todo:
        policy.train_arm(arm, params, demos, frames, device, folders[arm.name])
    return folders["rabc"]


STAGES = {"encode": encode, "train": train, "score": score, "policy": train_policies}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--params-file", default="params.yaml")
    parser.add_argument("--overrides", default={}, type=json.loads, help='such as {"sarm.steps": 5000}')
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)  # libraries configure it when imported
    params = load(arguments.params_file, arguments.overrides)
    processes = share(dataset.pick_device(params.base.device))
    log.info("process %d of %d", processes.process_index + 1, processes.num_processes)
    log.info("%s", STAGES[arguments.stage](params))


if __name__ == "__main__":
    main()
