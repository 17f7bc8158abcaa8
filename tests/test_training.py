"""Training samples say what they show; a stopped run ends where an uninterrupted one does."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sarm_lib import encoder, lerobot_io, progress, schedule, training
from sarm_lib.artifacts import read_json_lines
from sarm_lib.training import Augmentation, SarmLoss
from tests.conftest import CAMERAS, launch


@pytest.fixture
def parts(in_project):
    config, dataset = in_project
    embeddings = encoder.open_embeddings(config.paths.read("embeddings", "00"), dataset)
    labels = lerobot_io.read_labels(config.paths.read("dataset/meta", "02").parent, dataset, config.heads)
    model = training.new_reward_model(config, dataset, embeddings, labels)
    clip = encoder.from_params(config, "cpu")
    sampler = training.new_sampler(config, dataset, embeddings, labels, model, clip)
    return config, dataset, embeddings, labels, model, sampler


@pytest.mark.parametrize(
    ("kind", "gap", "seed"), [("centred", 1, 0), ("centred", 3, 1), ("past", 1, 2), ("past", 2, 3)]
)
def test_images_states_and_targets_of_a_position_are_of_the_same_frame(parts, kind, gap, seed):
    _, dataset, embeddings, labels, model, sampler = parts
    window = replace(model.spec.window, kind=kind, frame_gap=gap)
    sampler.spec = replace(model.spec, window=window)
    sampler.augmentation = Augmentation(1.0, 0.0, 1.0)
    batch = sampler.draw(np.random.default_rng(seed), 64)
    assert (batch.windows.lengths > window.length).any(), "no rewind was drawn"
    for b, t in zip(*np.nonzero(batch.windows.valid.numpy()), strict=True):
        row = batch.rows[b, t]
        np.testing.assert_array_equal(batch.windows.images[b, 0, t], embeddings.cameras[dataset.image_keys[0]][row])
        np.testing.assert_array_equal(batch.windows.state[b, t, :3], model.normalise(dataset.states)[row])
        for head in labels.tau:
            assert batch.tau[head][b, t] == labels.tau[head][row] and batch.stage[head][b, t] == labels.stage[head][row]
        assert dataset.frames.episode_index[row] == dataset.frames.episode_index[batch.rows[b, 0]]


def test_each_sample_draws_its_own_augmentation_and_carries_its_own_task(parts):
    _, dataset, embeddings, _, _, sampler = parts
    sampler.augmentation = Augmentation(0.5, 0.5, 0.5)
    batch = sampler.draw(np.random.default_rng(0), 256)
    tasks = embeddings.tasks[dataset.frames.task_index.to_numpy()[batch.rows[:, 0]]]
    told = (batch.windows.text.numpy() == tasks).all(1)
    assert 0.4 < told.mean() < 0.6 and 0.4 < batch.given.float().mean() < 0.6
    assert len(np.unique(batch.windows.text.numpy()[~told], axis=0)) > 20  # wrong texts of their own
    steps = batch.windows.lengths.numpy() - sampler.spec.window.length
    room = sampler.spec.window.rewind_room(
        batch.rows[:, : sampler.spec.window.length] - sampler.store.start[batch.rows[:, :1]]
    )
    assert 0.4 < (steps[room > 0] > 0).mean() < 0.6 and len(np.unique(steps)) > 2
    assert (batch.tau["sparse"].numpy()[~told] == 0).all(), "another text than the task's must mean no progress"
    assert (batch.tau["sparse"].numpy()[told] > 0).any()


def test_what_a_sample_draws_does_not_depend_on_how_many_there_are(parts):
    *_, sampler = parts
    few, many = (sampler.draw(np.random.default_rng([3, 7]), size) for size in (8, 16))
    np.testing.assert_array_equal(few.rows, many.rows[:8])
    assert torch.equal(few.windows.text, many.windows.text[:8]) and torch.equal(few.given, many.given[:8])
    assert all(torch.equal(few.tau[head], many.tau[head][:8]) for head in few.tau)


def test_the_losses_are_means_over_what_is_learned(parts):
    """Of τ over the positions where it is known: segments that were given up do not make the others count less."""
    _, dataset, _, _, model, sampler = parts
    undone = np.zeros(dataset.num_frames, dtype=bool)
    undone[::2] = True
    sampler.unknown = dict.fromkeys(sampler.tau, undone)
    batch, loss = sampler.draw(np.random.default_rng(0), 32), SarmLoss(model.sarm.eval())
    found, valid = loss(batch), batch.windows.valid
    logits = model.sarm.stage_logits(batch.windows, list(batch.stage))
    prior = {h: torch.where(batch.given[:, None], k, logits[h].argmax(-1)) for h, k in batch.stage.items()}
    for head, tau in model.sarm.tau(batch.windows, prior).items():
        squared = ((tau - batch.tau[head]) ** 2)[valid & batch.known[head]]
        assert 0 < len(squared) < 0.8 * valid.sum()
        assert found[f"{head}_tau_loss"].item() == pytest.approx(squared.mean().item(), rel=1e-5)


def test_the_progress_of_a_try_that_was_given_up_is_not_learned_but_its_stage_is(parts):
    config, dataset, _, labels, model, sampler = parts
    sampler.augmentation = Augmentation(0.0, 0.0, 1.0)
    undone = np.zeros(dataset.num_frames, dtype=bool)
    for episode in dataset.split("train"):
        undone[episode.row : episode.row + 5] = True
    loss = SarmLoss(model.sarm.eval())
    for asked, counts in ((labels.given_up, True), ({"dense": undone}, False)):
        sampler.unknown = training.unknown_tau(replace(labels, given_up=asked), dataset, config.sarm)
        batch = sampler.draw(np.random.default_rng(0), 32)
        up = torch.from_numpy(undone[batch.rows])
        assert up.any()
        tau = {**batch.tau, "dense": torch.where(up, 123.0, batch.tau["dense"])}
        same = torch.equal(loss(batch)["loss"], loss(batch._replace(tau=tau))["loss"])
        assert same != counts
        wrong = {**batch.stage, "dense": torch.where(up, (batch.stage["dense"] + 1) % 3, batch.stage["dense"])}
        assert not torch.equal(loss(batch)["dense_stage_loss"], loss(batch._replace(stage=wrong))["dense_stage_loss"])
    all_learned = config.sarm.model_copy(update={"learn_given_up": True})
    found = training.unknown_tau(replace(labels, given_up={"dense": undone}), dataset, all_learned)
    assert not any(frames.any() for frames in found.values())


def test_the_progress_of_a_drawn_out_segment_is_neither_learned_nor_validated(parts):
    config, dataset, _, labels, model, sampler = parts
    stage, tau = ({head: values.copy() for head, values in of.items()} for of in (labels.stage, labels.tau))
    (long, *_), (held_out, *_) = dataset.split("train"), dataset.split("val")
    for episode in (long, held_out):  # the first subtask takes all but the last two frames
        for head, names in labels.stage_names.items():
            first = np.linspace(0, 1, episode.length - 2)
            stage[head][episode.rows] = [0] * len(first) + [len(names) - 1] * 2
            tau[head][episode.rows] = [*first, 0, 1]
    slow = replace(labels, stage=stage, tau=tau)
    unknown = training.unknown_tau(slow, dataset, config.sarm)["dense"]
    assert set(dataset.frames.episode_index[unknown]) == {long.index, held_out.index}
    assert unknown[long.rows].sum() == long.length - 2
    every = training.unknown_tau(slow, dataset, config.sarm.model_copy(update={"max_relative_duration": None}))
    assert not any(frames.any() for frames in every.values())
    for asked, seen in ((unknown, False), (every["dense"], True)):
        sampler.unknown = dict.fromkeys(labels.tau, asked)
        score = training.validator(dataset, slow, sampler)(model.sarm)["val_rmse"]
        wrong = {head: np.where(unknown, 1 - values, values).astype(np.float32) for head, values in tau.items()}
        again = training.validator(dataset, replace(slow, tau=wrong), sampler)(model.sarm)["val_rmse"]
        assert (score != again) == seen


def test_processes_share_a_batch_and_its_loss(parts):
    """What two processes draw and lose is together what one does."""
    *_, model, sampler = parts
    whole = sampler.draw(np.random.default_rng(3), 16)
    halves = [sampler.draw(np.random.default_rng(3), 16, process, 2) for process in range(2)]
    for process, half in enumerate(halves):
        np.testing.assert_array_equal(half.rows, whole.rows[process::2])
        assert torch.equal(half.windows.text, whole.windows.text[process::2])
    loss = SarmLoss(model.sarm.eval())
    losses = [loss(half)["loss"] for half in halves]
    assert loss(whole)["loss"].item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_lerobot_s_recipe_can_be_switched_on(parts):
    """One draw a batch, rewinds of other frames than their targets', padding in the loss: as LeRobot does it."""
    from lerobot.rewards.sarm.sarm_utils import apply_rewind_augmentation

    _, dataset, _, labels, model, sampler = parts
    sampler.augmentation = Augmentation(1.0, 0.5, 0.5, per="batch", rewind_images="of_lerobot")
    window, rewound = model.spec.window, 0
    for seed in range(20):
        batch = sampler.draw(np.random.default_rng(seed), 16)
        assert len(batch.given.unique()) == 1 and len(batch.windows.text.unique(dim=0)) == 1
        if (batch.tau["sparse"] == 0).all():  # told another task
            continue
        for b, length in enumerate(batch.windows.lengths.tolist()):
            episode = dataset.episodes[dataset.frames.episode_index[batch.rows[b, 0]]]
            frame = batch.rows[b, window.position] - episode.row
            steps = length - window.length
            _, targets = apply_rewind_augmentation(
                frame, 0, window.n_obs_steps, window.max_rewind_steps, window.frame_gap, rewind_step=max(steps, 1)
            )
            for r in range(steps):
                assert batch.rows[b, window.length + r] - episode.row == max(0, frame - (r + 1) * window.frame_gap)
                tau = labels.tau["sparse"][episode.row + targets[r]]
                assert batch.tau["sparse"][b, window.length + r] == pytest.approx(tau)
                rewound += 1
    assert rewound
    sampler.loss_positions = "all"
    batch = sampler.draw(np.random.default_rng(0), 16)
    loss, wrong = SarmLoss(model.sarm.eval(), "all"), torch.where(batch.windows.valid, batch.tau["sparse"], 123.0)
    assert not torch.equal(loss(batch)["loss"], loss(batch._replace(tau={**batch.tau, "sparse": wrong}))["loss"])


@pytest.mark.parametrize("kept", ["images", "state"])
def test_an_input_that_is_left_out_changes_nothing(parts, kept):
    config, dataset, embeddings, labels, *_ = parts
    only = config.model_copy(update={"sarm": config.sarm.model_copy(update={"inputs": [kept]})})
    model = training.new_reward_model(only, dataset, embeddings, labels)
    store = progress.frame_store(dataset, embeddings, model)
    other = replace(store, states=store.states + 1) if kept == "images" else replace(store, image_keys=(CAMERAS[1],))
    rows = np.arange(20)
    one, two = (progress.score(model.sarm, s, rows, ["sparse"])["sparse"].progress for s in (store, other))
    np.testing.assert_array_equal(one, two)


def test_only_training_episodes_are_drawn(parts):
    _, dataset, _, _, _, sampler = parts
    drawn = set(dataset.frames.episode_index.to_numpy()[sampler.draw(np.random.default_rng(0), 512).rows].ravel())
    assert drawn == {e.index for e in dataset.split("train")}


def test_the_loss_sees_valid_positions_only(parts):
    *_, model, sampler = parts
    batch = sampler.draw(np.random.default_rng(0), 32)
    loss, valid = SarmLoss(model.sarm.eval()), batch.windows.valid
    assert not valid.all()
    found = loss(batch)
    for head in batch.tau:
        padded = {"tau": torch.where(valid, batch.tau[head], 123.0), "stage": torch.where(valid, batch.stage[head], 1)}
        for what, values in padded.items():
            wrong = batch._replace(**{what: {**getattr(batch, what), head: values}})
            assert not torch.equal(values, getattr(batch, what)[head])
            if what == "tau":
                assert torch.equal(found["loss"], loss(wrong)["loss"])
            else:  # a stage before a position is seen there: the loss of the stages themselves
                assert torch.equal(found[f"{head}_stage_loss"], loss(wrong)[f"{head}_stage_loss"])


@torch.no_grad()
def test_a_forced_sample_is_given_its_true_stage_and_another_one_the_predicted(parts, monkeypatch):
    *_, model, sampler = parts
    batch, loss, logits = (
        sampler.draw(np.random.default_rng(0), 32),
        SarmLoss(model.sarm.eval()),
        model.sarm.stage_logits,
    )
    true = {
        head: torch.nn.functional.one_hot(k, model.spec.num_stages(head)).float() for head, k in batch.stage.items()
    }
    losses = {}
    for predicted, sign in (("right", 1), ("wrong", -1)):
        monkeypatch.setattr(model.sarm, "stage_logits", lambda *_, sign=sign: {h: sign * k for h, k in true.items()})
        for given in (True, False):
            losses[predicted, given] = loss(batch._replace(given=torch.full_like(batch.given, given)))["dense_tau_loss"]
    monkeypatch.setattr(model.sarm, "stage_logits", logits)
    assert torch.equal(losses["right", True], losses["wrong", True])
    assert torch.equal(losses["right", True], losses["right", False])
    assert not torch.equal(losses["wrong", False], losses["right", False])


class Stopped(Exception):
    pass


def test_a_stopped_run_resumes_to_the_same_weights(parts, tmp_path):
    config, dataset, embeddings, labels, _, sampler = parts
    config = config.model_copy(update={"sarm": config.sarm.model_copy(update={"dropout": 0.1})})  # draws at every step
    validate = training.validator(dataset, labels, sampler)
    validations = 0

    def validate_and_stop(sarm):
        nonlocal validations
        validations += 1
        if validations == 3:
            raise Stopped
        return validate(sarm)

    def run(work, validator):
        sarm = training.new_reward_model(config, dataset, embeddings, labels).sarm
        trained = training.train(sarm, sampler, validator, config.sarm, 0, "cpu", work)
        return sarm.state_dict(), trained

    whole, trained = run(tmp_path / "whole", validate)
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", validate_and_stop)
    assert (tmp_path / "stopped/training_state.pt").exists()
    torch.rand(7)  # whatever was drawn in between
    resumed, again = run(tmp_path / "stopped", validate)
    assert again.log == trained.log and [line["step"] for line in trained.log] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in trained.log if "val_rmse" in line] == [4, 8, 12]
    assert read_json_lines(tmp_path / "whole/log.jsonl") == trained.log
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key
    for key, value in trained.last.items():
        assert torch.equal(value, again.last[key]), key


def test_where_every_clock_of_the_val_episodes_is_masked_they_count_all_the_same(parts, caplog):
    *_, dataset, _, labels, model, sampler = parts
    expected = training.validator(dataset, labels, sampler)(model.sarm)
    sampler.unknown = {head: np.ones(len(tau), dtype=bool) for head, tau in labels.tau.items()}
    with caplog.at_level("WARNING"):
        found = training.validator(dataset, labels, sampler)(model.sarm)
    assert found == expected and "no val frame has a τ that is learned" in caplog.text


def test_a_split_without_an_annotation_is_named(parts):
    _, dataset, _, labels, *_ = parts
    val = [episode.index for episode in dataset.split("val")]
    listed = ", ".join(map(str, val))
    with pytest.raises(
        ValueError, match=rf"none of the {len(val)} val episodes \({listed}\) is annotated: annotate or mark some"
    ):
        training.annotated_rows(dataset.split("val"), labels.annotated - set(val))


def test_what_is_validated_and_kept_is_the_average_of_the_weights(parts, tmp_path):
    config, dataset, embeddings, labels, _, sampler = parts
    seen = {0.0: [], 0.5: []}
    for decay, weights in seen.items():
        every = {"steps": 4, "log_every": 1, "eval_every": 1, "save_every": 1, "ema_decay": decay}
        sarm = training.new_reward_model(config, dataset, embeddings, labels).sarm
        start = sarm.state_dict()["stage_model.lang_proj.weight"].clone()

        def validate(sarm, weights=weights):
            weights.append(sarm.state_dict()["stage_model.lang_proj.weight"].clone())
            return {"val_rmse": 1.0 / len(weights)}

        settings = config.sarm.model_copy(update=every)
        last = training.train(sarm, sampler, validate, settings, 0, "cpu", tmp_path / str(decay)).last
        assert torch.equal(last["stage_model.lang_proj.weight"], weights[-1])
        assert torch.equal(sarm.state_dict()["stage_model.lang_proj.weight"], weights[-1])  # the best
    average = start
    for step, (live, kept) in enumerate(zip(*seen.values(), strict=True), start=1):
        decay = min(0.5, step / (step + 9))
        average = decay * average + (1 - decay) * live
        torch.testing.assert_close(kept, average)
    assert not torch.equal(seen[0.0][-1], seen[0.5][-1])


def test_training_that_diverges_stops_with_a_remedy(parts, tmp_path):
    *_, model, sampler = parts
    config = parts[0]
    with pytest.raises(FloatingPointError, match=r"lower sarm\.learning_rate"):
        training.train(model.sarm, sampler, lambda sarm: {"val_rmse": float("nan")}, config.sarm, 0, "cpu", tmp_path)


def test_a_tracker_that_is_not_installed_is_named(parts):
    with pytest.raises(ValueError, match=r"sarm\.log_with: trackio is not installed"):
        training.make_accelerator(parts[0].sarm.model_copy(update={"log_with": "trackio"}), "cpu")


def test_weights_and_biases_is_told_the_losses(parts, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    logged, log = [], wandb.sdk.wandb_run.Run.log
    monkeypatch.setattr(
        wandb.sdk.wandb_run.Run, "log", lambda run, *a, **k: (logged.append((run.project, a[0])), log(run, *a, **k))
    )
    config, dataset, embeddings, labels, _, sampler = parts
    settings = config.sarm.model_copy(update={"log_with": "wandb", "log_project": "cubes"})
    sarm = training.new_reward_model(config, dataset, embeddings, labels).sarm
    training.train(sarm, sampler, training.validator(dataset, labels, sampler), settings, 0, "cpu", tmp_path / "w")
    assert {project for project, _ in logged} == {"cubes"} and any("val_rmse" in values for _, values in logged)
    assert wandb.run is None and list(tmp_path.glob("wandb/offline-run-*"))  # ended, and on disk


def test_the_estimate_is_of_this_model_and_leaves_it_alone(parts):
    *_, model, sampler = parts
    before = {key: value.clone() for key, value in model.sarm.state_dict().items()}
    found = training.estimate(model.sarm, sampler, parts[0].sarm, "cpu")
    assert found.parameters == sum(p.numel() for p in model.sarm.parameters())
    assert found.memory > 16 * found.parameters and 0 < found.seconds_per_step < 5
    assert all(torch.equal(before[key], value) for key, value in model.sarm.state_dict().items())


def test_two_processes_learn_what_one_learns(project, tmp_path):
    """The same batches, the same losses, the same weights up to the order of sums, which AdamW makes larger where a gradient
    is nearly zero: far below what eight steps of 5e-4 move."""
    found = []
    for processes in (1, 2):
        copy = shutil.copytree(project, tmp_path / str(processes), symlinks=True)
        said = launch(copy, processes, "train", {"sarm.dropout": 0.0, "sarm.steps": 8})
        assert ("each process: " in said and " minutes for 8 steps" in said) == (processes == 2)
        (folder,) = (copy / "outputs/scratch").glob("*/sarm")
        found.append((load_file(folder / "last/model.safetensors"), read_json_lines(folder / "log.jsonl")))
    (one, one_log), (two, two_log) = found
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], atol=1e-4, rtol=1e-4)
    losses = [[line["loss"] for line in log if "loss" in line] for log in (one_log, two_log)]
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [line["val_rmse"] for line in one_log if "val_rmse" in line] == pytest.approx(
        [line["val_rmse"] for line in two_log if "val_rmse" in line], abs=1e-5
    )


def test_training_learns(parts, tmp_path):
    config, dataset, embeddings, labels, _, sampler = parts
    settings = config.sarm.model_copy(update={"steps": 300, "eval_every": 100, "learning_rate": 3e-3, "dropout": 0.0})
    sarm = training.new_reward_model(config, dataset, embeddings, labels).sarm
    validate = training.validator(dataset, labels, sampler)
    curve = [
        line for line in training.train(sarm, sampler, validate, settings, 0, "cpu", tmp_path).log if "val_rmse" in line
    ]
    assert curve[-1]["val_rmse"] < 0.14 and curve[-1]["val_rmse"] < curve[0]["val_rmse"]


def test_the_learning_rate_warms_up_and_decays_to_a_tenth():
    rates = [schedule.learning_rate(step, 100, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[10] == 1 and rates[-1] == pytest.approx(0.1) and (np.diff(rates[10:]) < 0).all()
