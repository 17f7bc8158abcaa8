"""Rollouts: what a policy is shown, when it looks, how an episode ends; figures and their intervals."""

import sys
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from sarm_lib import checkpoint, encoder, evaluate, params, policy, statistics
from sarm_lib.artifacts import write_json
from tests.conftest import CAMERAS


class Line(gymnasium.Env):
    """The tiny dataset's world: a square moves right by the action's first number; done at the edge."""

    looked = 0

    def __init__(self, cameras: bool = True, named: str = "top") -> None:
        self.cameras, self.named = cameras, named

    def reset(self, *, seed=None, options=None):
        self.at, self.seed = 0.1 * (seed % 5), seed
        return self._observe(), {}

    def step(self, action):
        self.at += 0.02 * abs(float(action[0]))
        done = self.at >= 1
        return self._observe(), float(done), done, False, {"is_success": done}

    def _observe(self):
        image = np.full((32, 32, 3), int(255 * min(self.at, 1)), dtype=np.uint8)
        pixels = {self.named: image, "side": image} if self.cameras else image
        return {"pixels": pixels, "agent_pos": np.array([self.at, 0, 0], dtype=np.float32)}


@pytest.fixture
def trained(in_project):
    config, _ = in_project
    return policy.load(config.paths.read("policy/bc", "06"), "cpu")


def test_rollouts_end_at_success_or_after_so_many_frames(in_project, trained):
    environments = [Line(), Line()]
    done = list(evaluate.rollouts(trained, environments, [4, 7, 9], 30, "stack the cubes", record=True, quiet=True))
    assert [r.seed for r in done] == [4, 7, 9]
    for rollout in done:
        assert rollout.frames <= 30 and rollout.success == (rollout.states[-1, 0] >= 1)
        assert len(rollout.states) == rollout.frames and set(rollout.images) == set(CAMERAS)
        assert all(images.shape == (rollout.frames, 32, 32, 3) for images in rollout.images.values())
        assert rollout.states[0, 0] == pytest.approx(0.1 * (rollout.seed % 5), abs=1e-6)
        assert rollout.images[CAMERAS[0]][0, 0, 0, 0] == int(255 * 0.1 * (rollout.seed % 5))
    again = list(evaluate.rollouts(trained, environments, [4, 7, 9], 30, "stack the cubes", quiet=True))
    assert [(r.success, r.frames) for r in again] == [(r.success, r.frames) for r in done]
    assert again[0].states is None and not again[0].images


def test_pictures_that_an_environment_names_otherwise_get_the_policy_s_names(trained, in_project):
    config, _ = in_project
    opened = {}
    for named, names in ((None, {}), ("left", {"observation.images.left": "observation.images.top"})):
        options = {"named": named} if named else {}
        changes = {"environment_options": options, "rename_map": names, "environment": "tests.test_evaluate:Line"}
        asked = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=changes)})
        opened[named], why_not = evaluate.try_environments(asked)
        assert why_not is None
    first, second = (
        next(evaluate.rollouts(trained, envs[:1], [3], 8, "stack the cubes", record=True, quiet=True))
        for envs in opened.values()
    )
    assert first.images.keys() == second.images.keys() and np.array_equal(first.states, second.states)
    for wrong, said in (
        (
            {"observation.images.up": "observation.images.top"},
            "the environment shows no 'observation.images.up'; it shows",
        ),
        ({"observation.images.left": "observation.images.side"}, "two pictures would have one name, of"),
        ({"observation.images.left": "top"}, "'top' is no camera's name; those begin with observation.images."),
    ):
        with pytest.raises(ValueError, match=rf"evaluate\.rename_map: {said}"):
            evaluate.open_environments(evaluate.environment("tests.test_evaluate:Line", {"named": "left"}), 1, wrong)


def test_an_environment_that_says_or_shows_too_little_is_an_error(trained, monkeypatch):
    act = lambda env: list(evaluate.rollouts(trained, [env], [1], 5, "stack the cubes", quiet=True))  # noqa: E731
    silent, blind = Line(), Line()
    stepped = silent.step
    monkeypatch.setattr(silent, "step", lambda action: (*stepped(action)[:4], {"success": True}))
    with pytest.raises(ValueError, match="no step's info says `is_success`"):
        act(silent)
    shown = blind._observe
    monkeypatch.setattr(blind, "_observe", lambda: {**shown(), "pixels": {"top": shown()["pixels"]["top"]}})
    with pytest.raises(
        ValueError, match=r"the policy sees observation\.images\.side; the environment shows observation\.images\.top"
    ):
        act(blind)
    small = Line()
    monkeypatch.setattr(
        small, "_observe", lambda: {**(seen := Line._observe(small)), "agent_pos": seen["agent_pos"][:2]}
    )
    with pytest.raises(ValueError, match="its states have 2 numbers, and the policy was trained on 3"):
        act(small)
    wide = Line()
    wide.action_space = gymnasium.spaces.Box(-1, 1, (7,))
    with pytest.raises(ValueError, match="its actions have 7 numbers, and the policy was trained on 2"):
        act(wide)
    for name in ("tests.test_evaluate:Line", "CartPole-v1"):
        with pytest.raises(ValueError, match=r"evaluate\.environment_options: .*'sede'"):
            evaluate.open_environments(evaluate.environment(name, {"sede": 3}), 1)
    with pytest.raises(ValueError, match="it shows ndarray; LeRobot's environments show"):
        evaluate.open_environments(evaluate.environment("CartPole-v1"), 1)


@pytest.mark.usefixtures("in_project")
def test_other_policies_act_beside_those_of_notebook_06():
    saved = "outputs/policy/rabc/checkpoints/last/pretrained_model"  # as a Hub repository or `lerobot-train` holds it
    named = params.load(overrides={"evaluate.policies": {"again": saved, "folder": "outputs/policy/rabc"}})
    found = evaluate.policies(named, "cpu")
    assert list(found) == ["bc", "rabc", "again", "folder"]
    acted = {
        name: [r.frames for r in evaluate.rollouts(found[name], [Line()], [4], 12, "stack the cubes", quiet=True)]
        for name in found
    }
    assert acted["again"] == acted["folder"] == acted["rabc"]
    with pytest.raises(FileNotFoundError, match=r"evaluate\.policies: act: there is no folder outputs/policy/act"):
        evaluate.policies(params.load(overrides={"evaluate.policies": {"act": "outputs/policy/act"}}), "cpu")
    with pytest.raises(
        ValueError, match=r"the policy 'sarm' .* cannot be loaded from .*outputs/sarm: Policy type 'sarm"
    ):
        evaluate.policies(params.load(overrides={"evaluate.policies": {"sarm": "outputs/sarm"}}), "cpu")
    with pytest.raises(params.ParamsError, match=r"evaluate\.policies: .*none of bc, .* not 'bc'"):
        params.load(overrides={"evaluate.policies": {"bc": saved}})


def test_the_experiment_is_told_of_its_own_dataset_only(tmp_path):
    assert evaluate.experiment(tmp_path / "none.json", "abc") is None
    runs = [{"seed": s, "rollouts": 100} for s in range(2)]
    over = {"difference": 0.3, "difference_low": 0.2, "difference_high": 0.4}
    arms = {"bc": {"runs": runs, "success_rate": 0.2}, "rabc": {"runs": runs, "success_rate": 0.5, "over_bc": over}}
    write_json(tmp_path / "experiment.json", {"fingerprint": "abc", "arms": arms})
    assert evaluate.experiment(tmp_path / "experiment.json", "other") is None
    found = evaluate.experiment(tmp_path / "experiment.json", "abc")
    assert found.loc["rabc"].tolist() == [2, 0.5, 0.2, 0.3, 0.2, 0.4, "", "the weights of chapter 05"]
    assert np.isnan(found.loc["bc", "low"]) and found.loc["bc", "bc, same seeds"] == 0.2
    single = {"runs": runs, "success_rate": 0.3, "made_from": {"weights": "99"}}  # of other code: no difference
    arms = {"bc": arms["bc"], "rabc": arms["rabc"] | {"made_from": {"weights": "12"}}, "rabc_single": single}
    write_json(tmp_path / "experiment.json", {"fingerprint": "abc", "arms": arms})
    same, other = (evaluate.experiment(tmp_path / "experiment.json", "abc", digest) for digest in ("12", "34"))
    assert (same.frames["rabc"], other.frames["rabc"]) == (
        "the weights of chapter 05",
        "the weights of chapter 05, as they were then",
    )
    assert same.frames["rabc_single"] == other.frames["rabc_single"] == "as rabc, by a reward model of one stage"
    assert same.loc["rabc_single", ["bc, same seeds", "over bc", "low"]].isna().all()


def test_a_policy_looks_only_when_it_has_to(in_project, trained, monkeypatch):
    config, _ = in_project
    seen, select = [], trained[0].select_action
    monkeypatch.setattr(trained[0], "select_action", lambda batch: (seen.append(id(batch)), select(batch))[1])
    list(evaluate.rollouts(trained, [Line()], [0], 12, "stack the cubes", quiet=True))
    assert evaluate.looks_every(trained[0]) == config.policy.n_action_steps == 2
    assert len(seen) == 11 and all(a == b for a, b in zip(seen[::2], seen[1::2], strict=False))


def test_one_camera_without_a_name_is_lerobot_s_image():
    batch = evaluate.observe([Line(cameras=False).reset(seed=3)[0]] * 2)
    assert batch["observation.image"].shape == (2, 3, 32, 32) and batch["observation.state"].shape == (2, 3)


def test_environments_are_found_by_path_and_by_id():
    assert isinstance(evaluate.environment("tests.test_evaluate:Line", {"cameras": False})(), Line)
    with pytest.raises(ValueError, match=r"evaluate\.environment: 'os:sep' is '/', which makes no environment"):
        evaluate.environment("os:sep")
    assert isinstance(evaluate.environment("CartPole-v1")(), gymnasium.Env)
    for name in ("tests.test_evaluate:Nothing", "no_such_package:Env", "NoSuchEnv-v0", "no_package/Env-v0"):
        with pytest.raises(ValueError, match=r"evaluate.environment: .* cannot be found"):
            evaluate.environment(name)


def test_a_module_that_fails_when_it_is_imported_is_not_called_missing(in_project, tmp_path, monkeypatch):
    """A renderer without OpenGL, a package that is not installed: actions are compared then."""
    config, _ = in_project
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for name, body in (("no_gl", "None.glGetError"), ("no_physics", "import pymunk_that_is_not_here")):
        (tmp_path / f"{name}.py").write_text(body)
        with pytest.raises(evaluate.Unavailable, match=f"{name} cannot be imported here"):
            evaluate.environment(f"{name}:Env")
        settings = config.evaluate.model_copy(update={"environment": f"{name}:Env"})
        found, why = evaluate.try_environments(config.model_copy(update={"evaluate": settings}))
        assert not found and "cannot be imported here" in why and "Actions are compared" in why


def test_a_module_of_the_project_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_robot.py").write_text("from tests.test_evaluate import Line as Robot")
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError, match="cannot be found"):
        evaluate.environment("my_robot:Robot")
    assert isinstance(evaluate.environment("my_robot:Robot", root=tmp_path)(), Line)


def test_what_cannot_run_here_is_told_and_not_raised(in_project):
    config, _ = in_project
    assert evaluate.try_environments(config)[1].startswith("evaluate.environment names no simulator")
    broken = config.evaluate.model_copy(update={"environment": "tests.test_evaluate:Broken"})
    environments, why = evaluate.try_environments(config.model_copy(update={"evaluate": broken}))
    assert environments == [] and "RuntimeError: no OpenGL" in why


class Broken(Line):
    def reset(self, *, seed=None, options=None):
        raise RuntimeError("no OpenGL")


def test_a_rollout_is_scored_like_an_episode(in_project, trained):
    """The frames and states of a recorded episode as a rollout get the progress that stage 05 gave them."""
    import pandas as pd

    config, dataset = in_project
    model, _ = checkpoint.reward_model_of(config, "cpu")
    clip = encoder.from_params(config, "cpu")
    episode = dataset.split("test")[0]
    images = {key: dataset.read_frames(episode, key, range(episode.length)) for key in dataset.image_keys}
    states = dataset.states[episode.rows]
    rollout = evaluate.Rollout(0, True, episode.length, states, {k: np.stack(list(v)) for k, v in images.items()})
    task = dataset.tasks[int(dataset.frames.task_index[episode.row])]
    head = config.rabc.head_mode
    table = pd.read_parquet(config.paths.read("sarm_progress.parquet", "05"))
    recorded = table[table.episode_index == episode.index][f"progress_{head}"]
    found = evaluate.score_rollout(model, clip, rollout, task)[head].progress
    np.testing.assert_allclose(found, recorded, atol=1e-5)
    with pytest.raises(ValueError, match=r"the environment shows nothing\.else"):
        evaluate.score_rollout(model, clip, evaluate.Rollout(0, True, 3, states[:3], {"nothing.else": None}), task)


def test_the_recorded_actions_have_no_error(in_project, trained, monkeypatch):
    config, dataset = in_project
    frames = policy.frames_of(config.policy, dataset, dataset.split("test"), "cpu")
    errors = evaluate.action_errors(trained, frames, dataset.split("test"))
    assert errors.shape == (len(dataset.split("test")),) and (errors > 0).all()
    model, before, after = trained
    told = []  # with the recorded actions, which a policy is not told: normalised, as it answers
    watched = lambda batch: told.append(before(batch)) or dict(told[-1])  # noqa: E731
    monkeypatch.setattr(model, "predict_action_chunk", lambda seen: told[-1]["action"])
    errors = evaluate.action_errors((model, watched, after), frames, dataset.split("test"))
    np.testing.assert_allclose(errors, 0, atol=1e-10)


def test_what_is_concluded_is_what_the_figures_say():
    arm = lambda k: {"successes": k, "rollouts": 20, "success_rate": k / 20}  # noqa: E731
    gap = lambda low, high: {"difference": (low + high) / 2, "difference_low": low, "difference_high": high}  # noqa: E731

    def say(bc, ours, low, high):
        return evaluate.conclusion({"bc": arm(bc), "rabc": arm(ours), "difference": gap(low, high)})

    assert "undertrained" in say(1, 9, 0.2, 0.6)
    assert "cannot tell them apart" in say(8, 10, -0.1, 0.3)
    assert "this rabc is the better" in say(8, 18, 0.3, 0.7) and "this bc is the better" in say(18, 8, -0.7, -0.3)


def test_examples_show_successes_and_failures():
    done = [evaluate.Rollout(i, i < 5, 10) for i in range(6)]
    assert {r.success for r in evaluate.examples(done, 2)} == {True, False} and len(evaluate.examples(done, 9)) == 6


def test_wilson_s_interval():
    """Figures of Newcombe (1998), table I."""
    assert statistics.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert statistics.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert statistics.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_the_difference_s_interval_is_the_bootstrap_s():
    rng = np.random.default_rng(0)
    ours, theirs = rng.random((1, 200)) < 0.6, rng.random((1, 200)) < 0.4
    found = statistics.paired_difference(ours, theirs)
    reference = bootstrap(((ours[0].astype(float) - theirs[0]),), np.mean, method="percentile", rng=rng)
    low, high = reference.confidence_interval
    assert (found["difference_low"], found["difference_high"]) == pytest.approx((low, high), abs=0.01)
    several = statistics.paired_difference(np.repeat(ours, 3, 0), np.repeat(theirs, 3, 0))  # alike: as one seed
    assert (several["difference_low"], several["difference_high"]) == pytest.approx((low, high), abs=0.01)
    few = statistics.paired_difference(ours[:, :4], ours[:, :4])  # four starts that both end alike say little
    assert few["difference"] == 0 and few["difference_low"] == -few["difference_high"] < -0.4
    always = statistics.paired_difference(np.ones((1, 3)), np.zeros((1, 3)))
    assert always["difference"] == 1 and -0.2 < always["difference_low"] < 0.2 and always["difference_high"] == 1
    seeds = np.repeat([[1], [0]], 50, axis=1)  # all depends on the training seed: two of them say little
    wide = statistics.paired_difference(seeds, np.zeros_like(seeds))
    assert (wide["difference_low"], wide["difference_high"]) == pytest.approx((0.0, 1.0))


def test_roc_area():
    assert statistics.roc_auc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True])) == 0.875
    assert np.isnan(statistics.roc_auc(np.ones(3), np.ones(3, dtype=bool)))


def test_noise_is_the_same_whoever_acts_first(trained):
    """Two arms from the same starts take the same noise."""
    state = torch.random.get_rng_state()
    one = [r.frames for r in evaluate.rollouts(trained, [Line()], [1, 2], 20, "stack the cubes", quiet=True)]
    torch.random.set_rng_state(state)
    torch.rand(7)
    assert one == [r.frames for r in evaluate.rollouts(trained, [Line()], [1, 2], 20, "stack the cubes", quiet=True)]


def test_of_several_tasks_the_one_that_an_environment_poses_is_named(in_project, caplog):
    config, dataset = in_project
    with pytest.raises(ValueError, match=r"evaluate.task: which of .* They are: stack the cubes; sort the cubes"):
        evaluate.task_of(config, dataset)
    named = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"task": "sort the cubes"})})
    assert evaluate.task_of(named, dataset) == "sort the cubes" and not caplog.messages
    named = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"task": "sort the cups"})})
    assert evaluate.task_of(named, dataset) == "sort the cups"
    assert "'sort the cups' is none of the dataset's tasks (stack the cubes; sort the cubes)" in caplog.text
    silent = replace(dataset)
    silent.__dict__["tasks"] = [""]
    assert evaluate.task_of(config, silent) == ""


def test_rollouts_are_judged_as_they_end_and_few_keep_their_pictures(in_project, trained):
    config, _ = in_project
    judge, why = evaluate.judge_from_params(config, Line(), "stack the cubes", "cpu")
    assert judge is not None and why is None
    given = trained, [Line(), Line()], range(6), 20, "stack the cubes", judge
    done, progress = evaluate.act(*given, shown=1)
    whole = list(evaluate.rollouts(*given[:-1], record=True, quiet=True))
    assert [(r.seed, r.frames, r.success) for r in done] == [(r.seed, r.frames, r.success) for r in whole]
    assert [len(phi) for phi in progress] == [r.frames for r in done]
    np.testing.assert_allclose(progress[-1], judge(whole[-1]), atol=1e-6)
    assert sum(bool(r.images) for r in done) == len({r.success for r in done})
    assert all(r.images for r in evaluate.examples(done, 1))
    assert evaluate.act(*given[:-1], None, shown=0)[1] == []


def test_what_cannot_judge_is_said_before_anybody_acts(in_project, tmp_path):
    """Progress that somebody else computed needs no reward model, and some do not see what the environment shows."""
    config, _ = in_project
    elsewhere = config.model_copy(update={"base": config.base.model_copy(update={"outputs": str(tmp_path)})})
    taken = elsewhere.model_copy(update={"rabc": config.rabc.model_copy(update={"progress_path": "mine.parquet"})})
    judge, why = evaluate.judge_from_params(taken, Line(), "stack the cubes", "cpu")
    assert judge is None and "no reward model is here" in why and "rabc.progress_path" in why
    judge, why = evaluate.judge_from_params(config, Line(cameras=False), "stack the cubes", "cpu")
    assert judge is None and "the reward model sees" in why
