"""The long stages on many GPUs, from `params.yaml` alone; the notebook then shows what came of it.

    accelerate launch -m sarm_lib.launch train          on as many GPUs as `accelerate config` was told

The functions are those that the notebooks call.
"""

import argparse
import json
import logging
from pathlib import Path

from sarm_lib import dataset, encoder, lerobot_io, training
from sarm_lib.params import load

log = logging.getLogger("sarm")


def train(params) -> Path:
    """Stage 03's training. Returns the checkpoint's folder."""
    device = dataset.pick_device(params.base.device)
    demos = dataset.from_params(params)
    embeddings = encoder.open_embeddings(params.paths.read("embeddings", "00_prepare"), demos)
    annotated = params.paths.read("dataset/meta", "02_verify").parent
    labels = lerobot_io.read_labels(annotated, demos, params.heads)
    model = training.new_reward_model(params, demos, embeddings, labels)
    sampler = training.new_sampler(params, demos, embeddings, labels, model, encoder.from_params(params, device))
    made_from, folder = training.provenance(params, demos, embeddings, labels), params.paths.write("sarm")
    validate = training.validator(demos, labels, sampler.store, params.sarm.learn_given_up)
    training.train_into(folder, model, sampler, validate, params, made_from, device)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train"])
    parser.add_argument("--params-file", default="params.yaml")
    parser.add_argument("--overrides", default={}, type=json.loads, help='such as {"sarm.steps": 5000}')
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info("%s", train(load(arguments.params_file, arguments.overrides)))


if __name__ == "__main__":
    main()
