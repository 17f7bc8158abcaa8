"""Progress online is progress offline, frame by frame; the wrapper's reward is its gain."""

import dataclasses

import gymnasium
import numpy as np
import pytest
import torch

from sarm_lib import checkpoint, encoder, progress
from sarm_lib.model import Sarm
from sarm_lib.online import OnlineScorer, ProgressReward


@pytest.fixture
def past(in_project):
    """A randomly initialised model of a `past` window, its encoder, and the tiny dataset."""
    config, dataset = in_project
    trained = checkpoint.load_reward_model(config.paths.read("sarm", "03"))
    window = dataclasses.replace(trained.spec.window, kind="past", n_obs_steps=4, frame_gap=3)
    torch.manual_seed(0)
    model = dataclasses.replace(trained, sarm=Sarm(dataclasses.replace(trained.spec, window=window)).eval())
    for parameter in model.sarm.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return config, dataset, model, encoder.from_params(config, "cpu")


def observations(dataset, model, episode):
    images = {key: dataset.read_frames(episode, key, range(episode.length)) for key in model.image_keys}
    for t in range(episode.length):
        yield {key: frames[t] for key, frames in images.items()}, dataset.states[episode.row + t]


def test_it_says_what_the_offline_scores_say(past):
    config, dataset, model, clip = past
    embeddings = encoder.open_embeddings(config.paths.read("embeddings", "00"), dataset)
    store = progress.frame_store(dataset, embeddings, model)
    heads = model.spec.heads
    scorer = OnlineScorer(model, clip, "")
    for episode in dataset.episodes[:2]:
        offline = progress.score_episodes(model.sarm, store, [episode], heads)
        scorer.reset(dataset.tasks[dataset.frames.task_index[episode.row]])
        for t, (images, state) in enumerate(observations(dataset, model, episode)):
            for head, found in scorer.step(images, state).items():
                expected = offline[episode.index, head]
                assert found.progress == pytest.approx(expected.progress[t], abs=1e-5)
                assert found.stage == model.spec.stage_names[head][expected.stage[t]]
                np.testing.assert_allclose(found.probabilities, expected.probabilities[t], atol=1e-5)
        assert len(scorer._recent) == 10  # (4 - 1) · 3 + 1, however long the episode


def test_a_model_that_looks_ahead_and_a_missing_camera_are_refused(past):
    config, _, model, clip = past
    centred = checkpoint.load_reward_model(config.paths.read("sarm", "03"))
    with pytest.raises(ValueError, match="train with sarm"):
        OnlineScorer(centred, clip, "go")
    with pytest.raises(ValueError, match="no image of observation"):
        OnlineScorer(model, clip, "go").step({"elsewhere": np.zeros((32, 32, 3), np.uint8)}, np.zeros(3))


class Replay(gymnasium.Env):
    """Shows an episode of a dataset, whatever the action."""

    observation_space = gymnasium.spaces.Dict({})
    action_space = gymnasium.spaces.Discrete(1)

    def __init__(self, shown):
        self.shown = shown

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.shown[0], {"kept": True}

    def step(self, action):
        self.t += 1
        return self.shown[self.t], 0.5, self.t == len(self.shown) - 1, False, {}


def test_the_wrapper_rewards_the_gain_in_progress(past):
    _, dataset, model, clip = past
    shown = list(observations(dataset, model, dataset.episodes[0]))
    scorer = OnlineScorer(model, clip, dataset.tasks[0])
    env = ProgressReward(Replay(shown), scorer, observe=lambda shown: shown, weight=2.0, discount=0.9)
    for _ in range(2):  # an episode does not remember the one before
        _, info = env.reset()
        phi, total, ended = [info["sarm"][env.head].progress], 0.0, False
        assert info["kept"]
        while not ended:
            _, reward, ended, _, info = env.step(0)
            phi.append(info["sarm"][env.head].progress)
            assert reward == pytest.approx(0.5 + 2.0 * (0.9 * phi[-1] - phi[-2]))
            total += reward
        assert len(phi) == len(shown)
    assert env.head == model.spec.heads[-1]
