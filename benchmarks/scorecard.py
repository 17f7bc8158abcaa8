"""The ablation rows of the scorecard: what each part of SARM is worth on the test episodes (`make scorecard`).

    window_past (window_centred)  the window that `params.yaml` does not set
    state_only, images_only       one kind of input left out, zeros in its place
    single_stage                  no annotations: the clock of each episode is its target
    all_cameras                   every camera that is encoded, instead of one
    images_only_all_cameras       and no state
    learn_given_up                τ = 1 at the end of a try that failed too
    learn_drawn_out               τ by the clock in segments with a pause or a detour too
    no_rewind                     no rewind augmentation
    no_repeats                    each stage once, as most annotators are told, of the episodes that do the whole task
    lerobot_augmentation          LeRobot's recipe but for what it learns: with no clock of a failed try, a pause or a detour
    lerobot_recipe                centred, one draw a batch, rewinds whose images are not their targets', padding in the loss,
                                  no average of the weights, τ learned wherever there is a clock: failed tries, pauses and detours too

Every row is trained like stage 03 does it, with the seed, the steps and the size of `params.yaml`, validated on val episodes
by its own targets, where it learns them, and measured against the same references. Needs the outputs of stages 00 and 02. A
row that was made from the same inputs before is kept, so that a stopped run goes on. The file says what it was made from.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from sarm_lib import artifacts, checkpoint, dataset, encoder, lerobot_io, params, progress, scorecard, stages, training
from sarm_lib.dataset import Dataset
from sarm_lib.stages import Labels

LEROBOT_AUGMENTATION = {
    "sarm.window": "centred",
    "sarm.augmentation_per": "batch",
    "sarm.rewind_images": "of_lerobot",
    "sarm.loss_positions": "all",
    "sarm.ema_decay": 0.0,
}
LEROBOT = {**LEROBOT_AUGMENTATION, "sarm.learn_given_up": True, "sarm.max_relative_duration": None}
Relabel = Callable[[Labels, Dataset], Labels]


def single_stage(labels: Labels, demos: Dataset) -> Labels:
    """One stage, τ the clock of the episode."""
    tau = np.concatenate([scorecard.clock(e.length).tau for e in demos.episodes])
    stage = np.zeros(demos.num_frames, dtype=np.int64)
    return Labels({"sparse": stage}, {"sparse": tau}, {"sparse": ["task"]}, {"sparse": [1.0]}, labels.annotated)


def no_repeats(labels: Labels, demos: Dataset) -> Labels:
    """Each stage once and in order, as most annotators are told: a frame belongs to the earliest stage that is still to come.

    Episodes that do not do the whole task cannot be annotated so; they are left out.
    """
    stage, tau = ({head: values.copy() for head, values in of.items()} for of in (labels.stage, labels.tau))
    for episode in demos.episodes:
        for head in stage:
            once = np.minimum.accumulate(stage[head][episode.rows][::-1])[::-1]
            stage[head][episode.rows] = once
            for k in np.unique(once):
                frames = np.flatnonzero(once == k)
                tau[head][episode.row + frames] = np.linspace(0, 1, len(frames)) if len(frames) > 1 else 1.0
    kept = frozenset(stages.complete_episodes(labels, demos.episodes))
    proportions = {}
    for head, names in labels.stage_names.items():
        shares = [
            np.bincount(stage[head][e.rows], minlength=len(names)) / e.length for e in demos.episodes if e.index in kept
        ]
        proportions[head] = np.mean(shares, axis=0).tolist()
    return replace(labels, stage=stage, tau=tau, proportions=proportions, annotated=kept, given_up={})


def rows(cameras: list[str], window: str) -> dict[str, tuple[dict, Relabel | None]]:
    """What differs from `params.yaml`, whose `sarm.window` is `window`, and from the labels, by row."""
    other = "centred" if window == "past" else "past"
    return {
        f"window_{other}": ({"sarm.window": other}, None),
        "state_only": ({"sarm.inputs": ["state"]}, None),
        "images_only": ({"sarm.inputs": ["images"]}, None),
        "single_stage": ({"base.annotation_mode": "single_stage", "rabc.head_mode": "sparse"}, single_stage),
        "learn_given_up": ({"sarm.learn_given_up": True}, None),
        "learn_drawn_out": ({"sarm.max_relative_duration": None}, None),
        "no_rewind": ({"sarm.rewind_probability": 0.0}, None),
        "no_repeats": ({}, no_repeats),
        "lerobot_augmentation": (LEROBOT_AUGMENTATION, None),
        "lerobot_recipe": (LEROBOT, None),
        "all_cameras": ({"base.image_keys": cameras}, None),
        "images_only_all_cameras": ({"base.image_keys": cameras, "sarm.inputs": ["images"]}, None),
    }


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    base = params.load("params.yaml")
    device = dataset.pick_device(base.base.device)
    demos = dataset.from_params(base)
    embeddings = encoder.open_embeddings(base.paths.read("embeddings", "00_prepare"), demos)
    labels = lerobot_io.read_labels(base.paths.read("dataset/meta", "02_verify").parent, demos, base.heads)
    clip = encoder.from_params(base, device)
    instead = scorecard.instructions(base.visualize, demos.tasks, clip)
    test = scorecard.test_episodes(demos, labels)
    references = scorecard.references(demos, labels, test, base.base.truth_prefix)
    cards, values, validation, path = {}, {}, {}, base.paths.root / "benchmarks/scorecard.json"
    of_sarm = training.provenance(base, demos, embeddings, labels)
    of_sarm = {key: of_sarm[key] for key in ("fingerprint", "labels", "settings", "image_keys", "seed", "code")}
    for name, (overrides, relabel) in rows(list(embeddings.cameras), base.sarm.window).items():
        config = params.load("params.yaml", overrides)
        shown = dataset.from_params(config)
        mine = relabel(labels, shown) if relabel else labels
        model = training.new_reward_model(config, shown, embeddings, mine)
        sampler = training.new_sampler(config, shown, embeddings, mine, model, clip)
        made_from = training.provenance(config, shown, embeddings, mine)
        folder = base.paths.write(f"scratch/scorecard/{name}")
        validate = training.validator(shown, mine, sampler)
        training.train_into(folder, model, sampler, validate, config, made_from, device)
        model = checkpoint.load_reward_model(folder, device)
        store = progress.frame_store(shown, embeddings, model)
        predicted = scorecard.predictions(model, store, test, 1, instead)
        cards[name] = scorecard.card(references, predicted)
        metric = scorecard.main_metric(cards[name])
        values[name] = scorecard.values(references, predicted, metric)
        log = artifacts.read_json_lines(folder / checkpoint.LOG)
        validation[name] = round(min(line["val_rmse"] for line in log if "val_rmse" in line), 6)
        print(scorecard.table({name: cards[name]}, ["mse_truth", "stage_accuracy_dense", "retry_order"]).to_string())
        measured = {"metric": metric, "episodes": [e.index for e in test], "values": values}
        made = {"made_from": of_sarm, "rows": cards, **measured, "val_rmse": validation}
        artifacts.write_json(path, made)
    print(f"{path.relative_to(base.paths.root)}: notebook 04 shows these rows beside its own")


if __name__ == "__main__":
    sys.exit(main())
