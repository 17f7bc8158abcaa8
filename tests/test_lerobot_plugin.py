"""LeRobot's own scripts take a policy of notebook 06 into the demo's simulator, and act as `evaluate` does."""

import json
import signal
import sys

import numpy as np
import pytest
import torch
from lerobot.envs import make_env, make_env_pre_post_processors
from lerobot.scripts import lerobot_eval, lerobot_rollout

from demo.environment import AssemblyEnv
from demo.lerobot_plugin import AssemblyEnvConfig, AssemblyRobot
from demo.simulator import TASK, AssemblySimulator, RenderingError
from sarm_lib import dataset, evaluate, params, policy
from tests.conftest import ROOT

PLUGIN = "--discover_packages_path=demo.lerobot_plugin"
SMALL = {
    "policy.config": {"depth": 1, "vision_depth": 1, "stem": [8, 16, 16, 16], "vision_width": 32, "vlm_width": 32, "expert_width": 32},
    "policy.chunk_size": 4, "policy.n_action_steps": 4, "policy.steps": 1, "policy.batch_size": 2, "policy.cache_frames": False,
    "base.dataset": str(ROOT / "data/demo/assembly"), "base.device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """What notebook 06 leaves of a policy."""
    try:
        AssemblySimulator().render()
    except RenderingError as error:
        pytest.skip(str(error))
    config = params.load(ROOT / "params.yaml", SMALL)
    demos = dataset.from_params(config)
    folder = tmp_path_factory.mktemp("policy")
    frames = policy.frames_for(config.policy, demos, ("train",), "cpu")
    policy.train_arm(policy.Arm("bc", None), config, demos, frames, "cpu", folder)
    return folder


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(AssemblyEnv, "_max_episode_steps", 12)
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():  # `lerobot-rollout` takes them over
        signal.signal(number, handler)


def test_lerobot_s_evaluation_and_ours_see_the_same_rollouts(checkpoints, short):
    loaded = policy.load(checkpoints, "cpu")
    ours = list(evaluate.rollouts(loaded, [AssemblyEnv(), AssemblyEnv()], [7, 8], 12, TASK, record=True, quiet=True))
    config = AssemblyEnvConfig()
    environments = make_env(config, n_envs=2)["assembly"][0]
    before, after = make_env_pre_post_processors(env_cfg=config, policy_cfg=loaded[0].config)
    torch.manual_seed(7)
    given = environments, loaded[0], before, after, *loaded[1:]
    theirs = lerobot_eval.eval_policy(*given, n_episodes=2, return_episode_data=True, start_seed=7)
    episode = theirs["episodes"]["episode_index"].numpy()
    for i, rollout in enumerate(ours):
        states = theirs["episodes"]["observation.state"].numpy()[episode == i][: rollout.frames - 1]
        np.testing.assert_allclose(states, rollout.states[:-1], atol=1e-5)  # their last one is of the next start
        assert theirs["per_episode"][i]["success"] == rollout.success
    assert np.ptp(ours[0].states, axis=0).max() > 1e-3


def test_lerobot_eval_runs_on_a_checkpoint(checkpoints, short, monkeypatch, tmp_path):
    model = checkpoints / "checkpoints/last/pretrained_model"
    arguments = ["lerobot-eval", PLUGIN, "--env.type=assembly", f"--policy.path={model}", "--eval.n_episodes=2"]
    arguments += [
        "--eval.batch_size=2",
        "--eval.use_async_envs=false",
        f"--output_dir={tmp_path}",
        "--policy.device=cpu",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    lerobot_eval.eval_main()
    found = json.loads((tmp_path / "eval_info.json").read_text())["overall"]
    assert found["n_episodes"] == 2 and found["pc_success"] == 0
    assert len(list(tmp_path.glob("videos/**/*.mp4"))) == 2


def test_lerobot_rollout_drives_the_robot_with_a_checkpoint(checkpoints, short, monkeypatch, tmp_path, capsys):
    sent, send = [], AssemblyRobot.send_action
    monkeypatch.setattr(
        AssemblyRobot, "send_action", lambda robot, action: (sent.append(action), send(robot, action))[1]
    )
    model = checkpoints / "checkpoints/last/pretrained_model"
    arguments = [
        "lerobot-rollout",
        PLUGIN,
        "--robot.type=assembly",
        f"--robot.calibration_dir={tmp_path}",
        "--robot.seed=7",
    ]
    arguments += [f"--policy.path={model}", f"--task={TASK}", "--fps=40", "--duration=1", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--return_to_initial_position=false"])
    torch.manual_seed(7)
    lerobot_rollout.rollout()
    assert "The nut is not on the peg." in capsys.readouterr().out

    torch.manual_seed(7)
    loaded, before, after = policy.load(checkpoints, "cpu")
    seen, _ = AssemblyEnv().reset(seed=7)
    with torch.inference_mode():
        expected = after(loaded.select_action(before({**evaluate.observe([seen]), "task": [TASK]})))
    np.testing.assert_allclose(list(sent[0].values()), expected[0], atol=1e-5)
