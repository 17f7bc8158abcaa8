"""Training samples say what they show; a stopped run ends where an uninterrupted one does."""

import numpy as np
import pytest
import torch

from sarm_lib import encoder, lerobot_io, schedule, training
from sarm_lib.training import Augmentation, SarmLoss


@pytest.fixture
def parts(in_project):
    config, dataset = in_project
    embeddings = encoder.open_embeddings(config.paths.read("embeddings", "00"), dataset)
    labels = lerobot_io.read_labels(config.paths.read("dataset/meta", "02").parent, dataset, config.heads)
    model = training.new_reward_model(config, dataset, embeddings, labels)
    clip = encoder.from_params(config, "cpu")
    sampler = training.new_sampler(config, dataset, embeddings, labels, model, clip)
    return config, dataset, embeddings, labels, model, sampler


def test_images_states_and_targets_of_a_position_are_of_the_same_frame(parts):
    _, dataset, embeddings, labels, model, sampler = parts
    sampler.augmentation = Augmentation(1.0, 0.0, 1.0)
    batch = sampler.draw(np.random.default_rng(0), 64)
    assert (batch.windows.lengths > model.spec.window.length).any(), "no rewind was drawn"
    for b, t in zip(*np.nonzero(batch.windows.valid.numpy()), strict=True):
        row = batch.rows[b, t]
        np.testing.assert_array_equal(batch.windows.images[b, 0, t], embeddings.cameras[dataset.image_keys[0]][row])
        np.testing.assert_array_equal(batch.windows.state[b, t, :3], model.normalise(dataset.states)[row])
        assert batch.tau["sparse"][b, t] == labels.tau["sparse"][row]
        assert dataset.frames.episode_index[row] == dataset.frames.episode_index[batch.rows[b, 0]]


def test_each_sample_draws_its_own_augmentation_and_carries_its_own_task(parts):
    _, dataset, embeddings, _, _, sampler = parts
    sampler.augmentation = Augmentation(0.5, 0.5, 0.5)
    batch = sampler.draw(np.random.default_rng(0), 256)
    tasks = embeddings.tasks[dataset.frames.task_index.to_numpy()[batch.rows[:, 0]]]
    told = (batch.windows.text.numpy() == tasks).all(1)
    assert 0.4 < told.mean() < 0.6 and 0.4 < batch.given.float().mean() < 0.6
    assert (batch.tau["sparse"].numpy()[~told] == 0).all(), "another text than the task's must mean no progress"
    assert (batch.tau["sparse"].numpy()[told] > 0).any()


def test_only_training_episodes_are_drawn(parts):
    _, dataset, _, _, _, sampler = parts
    drawn = set(dataset.frames.episode_index.to_numpy()[sampler.draw(np.random.default_rng(0), 512).rows].ravel())
    assert drawn == {e.index for e in dataset.split("train")}


def test_the_loss_sees_valid_positions_only(parts):
    *_, model, sampler = parts
    batch = sampler.draw(np.random.default_rng(0), 32)
    loss = SarmLoss(model.sarm.eval())
    wrong = torch.where(batch.windows.valid, batch.tau["sparse"], 123.0)
    assert not torch.equal(wrong, batch.tau["sparse"])
    assert torch.equal(loss(batch)["loss"], loss(batch._replace(tau={**batch.tau, "sparse": wrong}))["loss"])


class Stopped(Exception):
    pass


def test_a_stopped_run_resumes_to_the_same_weights(parts, tmp_path):
    config, dataset, embeddings, labels, _, sampler = parts
    validate = training.validator(dataset, labels, sampler.store)
    validations = 0

    def validate_and_stop(sarm):
        nonlocal validations
        validations += 1
        if validations == 3:
            raise Stopped
        return validate(sarm)

    def run(work, validator):
        sarm = training.new_reward_model(config, dataset, embeddings, labels).sarm
        curve = training.train(sarm, sampler, validator, config.sarm, 0, "cpu", work)
        return sarm.state_dict(), curve

    whole, curve = run(tmp_path / "whole", validate)
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", validate_and_stop)
    assert (tmp_path / "stopped/training_state.pt").exists()
    resumed, resumed_curve = run(tmp_path / "stopped", validate)
    assert resumed_curve == curve and [row["step"] for row in curve] == [4, 8, 12]
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


def test_training_learns(parts, tmp_path):
    config, dataset, embeddings, labels, _, sampler = parts
    settings = config.sarm.model_copy(update={"steps": 300, "eval_every": 100, "learning_rate": 3e-3, "dropout": 0.0})
    sarm = training.new_reward_model(config, dataset, embeddings, labels).sarm
    curve = training.train(
        sarm, sampler, training.validator(dataset, labels, sampler.store), settings, 0, "cpu", tmp_path
    )
    assert curve[-1]["val_mse"] < 0.02 < curve[0]["val_mse"] or curve[-1]["val_mse"] < 0.01


def test_the_learning_rate_warms_up_and_decays_to_a_tenth():
    rates = [schedule.learning_rate(step, 100, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[10] == 1 and rates[-1] == pytest.approx(0.1) and (np.diff(rates[10:]) < 0).all()
