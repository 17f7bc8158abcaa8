"""Policies: LeRobot's loading, Eq 7, padded actions, two arms on the same draws, resumption."""

import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from lerobot.common.train_utils import load_training_state
from lerobot.configs import PreTrainedConfig, parser
from lerobot.configs.eval import EvalPipelineConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.optim.factory import make_optimizer_and_scheduler
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.scripts import lerobot_train
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sarm_lib import evaluate, lerobot_io, losses, params, policy, rabc
from sarm_lib.dataset import fingerprint
from sarm_lib.small_pi0 import SmallPI0Policy
from tests import tiny_policies
from tests.conftest import launch


@pytest.fixture
def frames(in_project):
    config, dataset = in_project
    return policy.frames_for(config.policy, dataset, ("train", "val"), "cpu")


def some_rows(dataset, count=6):
    episode = dataset.split("train")[0]
    return np.arange(episode.row + episode.length - count, episode.row + episode.length)  # the last ones: padded chunks


def test_both_policies_open_with_lerobot_s_from_pretrained_and_act(in_project, frames):
    config, dataset = in_project
    for arm in ("bc", "rabc"):
        path = config.paths.read(f"policy/{arm}", "06") / "checkpoints/last/pretrained_model"
        assert PreTrainedConfig.from_pretrained(path).type == "small_pi0"
        loaded = SmallPI0Policy.from_pretrained(path)
        before, after = make_pre_post_processors(loaded.config, pretrained_path=str(path))
        batch = frames.batch(some_rows(dataset, 2))
        observation = before({k: v for k, v in batch.items() if k.startswith("observation") or k == "task"})
        action = after(loaded.select_action(observation))
        assert action.shape == (2, 2) and action.isfinite().all()


def test_a_pretrained_policy_takes_this_dataset_s_cameras_and_statistics(in_project, tmp_path):
    """A checkpoint of another robot: other camera names, other statistics."""
    config, dataset = in_project
    made, before, after = policy.make(config.policy, dataset, "cpu")
    shifted = {
        k: {n: v + 1000 if n == "mean" else v for n, v in s.items()}
        for k, s in policy.training_statistics(dataset).items()
    }
    features = {key.replace("top", "base_0"): value for key, value in made.config.input_features.items()}
    made.config.input_features = features
    made.save_pretrained(tmp_path)
    before, after = make_pre_post_processors(made.config, dataset_stats=shifted, dataset_meta=dataset.lerobot_metadata)
    before.save_pretrained(tmp_path)
    after.save_pretrained(tmp_path)
    settings = config.policy.model_copy(update={"pretrained_path": str(tmp_path)})
    again, before, after = policy.make(settings, dataset, "cpu")
    assert set(again.config.input_features) == {*dataset.camera_keys, "observation.state"}
    for key, value in made.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    state = torch.tensor(dataset.states[:1])
    batch = {"observation.state": state, "action": torch.zeros(1, 4, 2), "task": ["x"]}
    assert before(batch)["observation.state"].abs().max() < 10
    assert after(torch.zeros(1, 2)).abs().max() < 10


def test_statistics_are_of_the_training_episodes_and_of_what_the_policy_sees(in_project):
    config, dataset = in_project
    statistics = policy.training_statistics(dataset)
    assert set(statistics) == {"observation.state", "action", *dataset.camera_keys}
    rows = np.concatenate([np.arange(e.row, e.row + e.length) for e in dataset.split("train")])
    np.testing.assert_allclose(statistics["action"]["mean"], dataset.actions[rows].mean(0))
    from safetensors.numpy import load_file

    folder = config.paths.read("policy/bc", "06") / "checkpoints/last/pretrained_model"
    assert not [key for path in folder.glob("*.safetensors") for key in load_file(path) if key.startswith("sim.")]


def test_a_checkpoint_that_does_not_fit_is_an_error(in_project, tmp_path):
    config, dataset = in_project
    made, *_ = policy.make(config.policy, dataset, "cpu")
    made.save_pretrained(tmp_path)
    other = PreTrainedConfig.from_pretrained(tmp_path)
    other.depth = 2
    with pytest.raises(RuntimeError, match="Missing key"):
        SmallPI0Policy.from_pretrained(tmp_path, config=other, strict=True)


def forget_two(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({key: weights[key] for key in list(weights)[2:]}, folder / "model.safetensors")


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("loading", ["ours", "pi0"])
@pytest.mark.parametrize(
    ("harm", "fields", "expected"),
    [
        (forget_two, {}, "lacks 2"),
        (cut_off, {}, "cannot be used|incomplete|too large"),
        (lambda folder: (folder / "model.safetensors").unlink(), {}, "cannot be used|No such file|not found"),
        (lambda _: None, {"depth": 2}, "lacks [1-9]"),
        (lambda _: None, {"vision_depth": 0}, "holds [1-9][0-9]* others"),
    ],
    ids=["missing", "corrupt", "absent", "deeper", "shallower"],
)
def test_a_pretrained_policy_without_its_weights_is_an_error(
    in_project, tmp_path, monkeypatch, loading, harm, fields, expected
):
    """π0's own loading would go on with random weights."""
    config, dataset = in_project
    if loading == "pi0":
        monkeypatch.setattr(SmallPI0Policy, "from_pretrained", classmethod(PI0Policy.from_pretrained.__func__))
    made, *_ = policy.make(config.policy, dataset, "cpu")
    made.save_pretrained(tmp_path)
    harm(tmp_path)
    changed = {"pretrained_path": str(tmp_path), "config": {**config.policy.config, **fields}}
    with pytest.raises((ValueError, OSError, SafetensorError), match=expected):
        policy.make(config.policy.model_copy(update=changed), dataset, "cpu")


def test_weights_are_compared_and_openpi_s_names_known(in_project, tmp_path):
    config, dataset = in_project
    made, *_ = policy.make(config.policy, dataset, "cpu")
    made.save_pretrained(tmp_path)
    policy.check_weights(made, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({key.removeprefix("model."): value for key, value in weights.items()}, tmp_path / "model.safetensors")
    policy.check_weights(made, tmp_path)
    with pytest.raises(ValueError, match="was not loaded"):
        policy.check_weights(policy.make(config.policy, dataset, "cpu")[0], tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"type": "pi00"}, "policy.type: LeRobot has no 'pi00'; it has .*small_pi0"),
        ({"type": "act", "config": {}}, "policy.weighting: act gives no loss of a single sample"),
        ({"n_action_steps": 5}, "policy.n_action_steps: 5 of a chunk of 4"),
        ({"config": {"dept": 3}}, "policy.config: small_pi0 has no 'dept'; it has .*depth"),
        (
            {"pretrained_path": "outputs/policy/nobody/at/home"},
            "policy.pretrained_path: there is no folder .*home, and no Hub id",
        ),
    ],
)
def test_a_policy_that_cannot_be_trained_is_named_with_its_key(in_project, changes, expected):
    config, _ = in_project
    with pytest.raises(ValueError, match=expected):
        policy.make_config(config.policy.model_copy(update=changes), "cpu")


def test_a_folder_beside_the_parameters_is_found_from_the_notebooks(in_project, monkeypatch):
    config, dataset = in_project
    named = "outputs/policy/bc/checkpoints/last/pretrained_model"
    monkeypatch.chdir("notebooks")
    other = params.load(overrides={"policy.pretrained_path": named})
    made, *_ = policy.make(other.policy, dataset, "cpu")
    kept = load_file(config.paths.root / named / "model.safetensors")
    assert all(torch.equal(made.state_dict()[key], value) for key, value in kept.items())
    found = policy.provenance(policy.Arm("bc"), other, dataset, 0)
    assert found["pretrained"] and str(config.paths.root) not in json.dumps(found)
    hub = params.load(overrides={"policy.pretrained_path": "lerobot/pi0_base"})
    assert hub.policy.pretrained_path == "lerobot/pi0_base"


def test_lerobot_s_command_line_finds_the_small_policy(monkeypatch):
    arguments = ["--dataset.repo_id=user/name", "--policy.type=small_pi0", "--policy.push_to_hub=false"]
    arguments += ["--policy.discover_packages_path=sarm_lib.small_pi0", "--policy.depth=2"]
    monkeypatch.setattr(sys, "argv", ["lerobot-train", *arguments])
    config = parser.wrap()(read_configuration)()
    assert config.policy.type == "small_pi0" and config.policy.depth == 2


def test_lerobot_s_evaluation_opens_the_small_policy(in_project, monkeypatch):
    config, _ = in_project
    folder = config.paths.read("policy/bc", "06") / "checkpoints/last/pretrained_model"
    arguments = [f"--policy.path={folder}", "--discover_packages_path=sarm_lib.small_pi0", "--env.type=pusht"]
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", *arguments])
    found = parser.wrap()(read_evaluation)()
    assert found.policy.type == "small_pi0" and found.policy.pretrained_path == folder


def read_evaluation(cfg: EvalPipelineConfig) -> EvalPipelineConfig:
    return cfg


def read_configuration(cfg: TrainPipelineConfig) -> TrainPipelineConfig:
    return cfg


def test_lerobot_goes_on_from_a_trained_policy(in_project, monkeypatch):
    config, _ = in_project
    folder = config.paths.read("policy/bc", "06") / "checkpoints/last"
    path = folder / "pretrained_model/train_config.json"
    monkeypatch.setattr(sys, "argv", ["lerobot-train", "--resume=true", f"--config_path={path}", "--steps=1000"])
    resumed = parser.wrap()(read_configuration)()
    resumed.validate()
    assert resumed.checkpoint_path == folder and resumed.policy.pretrained_path == folder / "pretrained_model"
    loaded = SmallPI0Policy.from_pretrained(resumed.policy.pretrained_path)
    optimizer, scheduler = make_optimizer_and_scheduler(resumed, loaded)
    step, optimizer, scheduler = load_training_state(folder, optimizer, scheduler)
    assert step == scheduler.last_epoch == config.policy.steps
    assert optimizer.state_dict()["state"] and optimizer.param_groups[0]["initial_lr"] == config.policy.learning_rate


def test_the_loss_is_pi0_s_without_the_padded_actions(in_project, frames):
    config, dataset = in_project
    made, preprocess, _ = policy.make(config.policy, dataset, "cpu")
    batch = preprocess(frames.batch(some_rows(dataset)))
    padded = batch["action_is_pad"]
    assert padded.any() and not padded.all(1).any()
    torch.manual_seed(3)
    ours = losses.per_sample_loss(made, batch)
    torch.manual_seed(3)
    theirs, _ = made.forward(batch, reduction="none")
    whole = ~padded.any(1)
    torch.testing.assert_close(ours[whole], theirs[whole])
    changed = {**batch, "action": torch.where(padded[..., None], 50.0, batch["action"])}
    with torch.no_grad():
        torch.manual_seed(3)
        # π0 reads the noisy padded actions too, so only what the loss itself counts can be compared: no 50² in it.
        assert (losses.per_sample_loss(made, changed)[~whole] < theirs.max() * 20).all()
        torch.manual_seed(3)
        assert (made.forward(changed, reduction="none")[0][~whole] > 100).all()


def test_eq_7(in_project, frames):
    config, dataset = in_project
    made, preprocess, _ = policy.make(config.policy, dataset, "cpu")
    batch, weight = preprocess(frames.batch(some_rows(dataset))), torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 0.25])
    found = []
    for w in (None, weight, torch.zeros(6)):
        torch.manual_seed(3)
        found.append(losses.WeightedLoss(made, 1e-6)(batch, w))
    torch.manual_seed(3)
    each = losses.per_sample_loss(made, batch)
    torch.testing.assert_close(found[0], each.mean())
    torch.testing.assert_close(found[1], (weight * each).sum() / weight.sum(), atol=1e-5, rtol=1e-5)
    assert found[2] == 0, "a batch of weight 0 must teach nothing, not NaN"


def test_cached_frames_are_what_lerobot_s_loader_returns(in_project, frames):
    config, dataset = in_project
    rows = [some_rows(dataset), np.array([e.row for e in dataset.split("val")])]
    streamed = policy.StreamedFrames(dataset, dataset.camera_keys, 0, tuple(range(config.policy.chunk_size)))
    for cached, loaded in zip(frames.batches(iter(rows)), streamed.batches(iter(rows)), strict=True):
        for key in cached:
            if key == "task":
                assert cached[key] == loaded[key]
            else:
                torch.testing.assert_close(cached[key], loaded[key].to(cached[key].dtype), atol=1e-6, rtol=0)


def test_without_zero_weights_both_arms_are_the_same_and_with_them_they_differ(
    in_project, frames, tmp_path, monkeypatch
):
    config, dataset = in_project
    monkeypatch.setattr(type(config.paths), "write", lambda _, name: tmp_path / name)
    ones = np.ones(dataset.num_frames, dtype=np.float32)
    half = ones * (np.arange(dataset.num_frames) % 2)
    arms = [policy.Arm("bc", None), policy.Arm("ones", ones), policy.Arm("half", half)]
    curves = {a.name: policy.train_arm(a, config, dataset, frames, "cpu", tmp_path / a.name) for a in arms}
    loss = {name: [row["loss"] for row in curve] for name, curve in curves.items()}
    assert loss["ones"] == pytest.approx(loss["bc"], rel=1e-4)
    assert loss["half"] != pytest.approx(loss["bc"], rel=1e-3)
    assert 0.2 < np.mean([row["rabc_mean_weight"] for row in curves["half"]]) < 0.8


def test_a_batch_of_zero_weights_moves_nothing(in_project, frames, tmp_path, monkeypatch):
    """Nor does AdamW's momentum: the steps that learn something come first, and then none does."""
    config, dataset = in_project
    monkeypatch.setattr(type(config.paths), "write", lambda _, name: tmp_path / name)
    settings = config.policy.model_copy(update={"ema_decay": 0.0, "weighting": "loss", "warmup_steps": 1})
    monkeypatch.setattr(policy, "learning_rate", lambda step, *_: 1.0)
    counting, worthless = dataset.split("train")[0], dataset.split("train")[1]
    rows = lambda episode, samples: np.full(samples, episode.row)  # noqa: E731
    monkeypatch.setattr(policy.Draws, "at", lambda self, step, n: rows(counting if step < 2 else worthless, n))
    weights = np.ones(dataset.num_frames, dtype=np.float32)
    weights[worthless.row] = 0
    found = []
    for steps in (2, 6):
        params = config.model_copy(update={"policy": settings.model_copy(update={"steps": steps})})
        curve = policy.train_arm(policy.Arm("rabc", weights), params, dataset, frames, "cpu", tmp_path / str(steps))
        found.append(load_file(tmp_path / str(steps) / policy.CHECKPOINT / "pretrained_model/model.safetensors"))
    assert curve[-1]["rabc_num_zero"] > 0
    assert all(torch.equal(values, found[1][name]) for name, values in found[0].items())


def test_a_stopped_arm_resumes_to_the_same_weights(in_project, frames, tmp_path, monkeypatch):
    config, dataset = in_project
    arm = policy.Arm("bc", None)
    monkeypatch.setattr(type(config.paths), "write", lambda _, name: tmp_path / "one" / name)
    policy.train_arm(arm, config, dataset, frames, "cpu", tmp_path / "one/bc")
    monkeypatch.setattr(type(config.paths), "write", lambda _, name: tmp_path / "two" / name)
    loss = losses.per_sample_loss
    calls = []

    def stop_at_the_fifth_step(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(losses, "per_sample_loss", stop_at_the_fifth_step)
    with pytest.raises(KeyboardInterrupt):
        policy.train_arm(arm, config, dataset, frames, "cpu", tmp_path / "two/bc")
    assert not (tmp_path / "two/bc").exists()
    monkeypatch.setattr(losses, "per_sample_loss", loss)
    policy.train_arm(arm, config, dataset, frames, "cpu", tmp_path / "two/bc")
    for name in ("model.safetensors", "config.json"):
        one, two = (tmp_path / run / "bc/checkpoints/last/pretrained_model" / name for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), name
    assert not list((tmp_path / "two/work").iterdir())


def test_an_arm_that_is_trained_already_is_kept(in_project, frames, monkeypatch):
    config, dataset = in_project
    monkeypatch.setattr(policy, "make", lambda *_: pytest.fail("trained again"))
    curve = policy.train_arm(
        policy.Arm("bc", None), config, dataset, frames, "cpu", config.paths.read("policy/bc", "06")
    )
    assert curve[-1]["step"] == config.policy.steps


def test_many_draws_are_the_mean_of_single_ones(in_project, frames):
    """The prefix is computed once for all of them; what each draw gives is what LeRobot's own pass gives."""
    config, dataset = in_project
    made, preprocess, _ = policy.make(config.policy, dataset, "cpu")
    batch = preprocess(frames.batch(some_rows(dataset)))
    noise, time = losses.sample_noise(made, 6, 5, torch.device("cpu"))
    together = losses.per_sample_loss(made, batch, 5, noise, time)
    each = [losses.per_sample_loss(made, batch, 1, noise[:, i : i + 1], time[:, i : i + 1]) for i in range(5)]
    torch.testing.assert_close(together, torch.stack(each).mean(0), atol=1e-6, rtol=1e-5)
    parameter = made.model.paligemma_with_expert.paligemma.model.vision_tower.parameters
    for loss in (together.sum(), torch.stack(each).mean(0).sum()):
        loss.backward()
    gradients = [p.grad for p in parameter() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients), "the shared prefix learns too"


def test_frames_are_drawn_by_weight_and_never_without():
    rows, weights = np.arange(10, 60), np.zeros(100, dtype=np.float32)
    weights[10:60] = np.random.default_rng(0).random(50) * (np.arange(50) % 3 > 0)
    drawn = policy.Draws(rows, weights, True, 0).at(0, 200_000)
    share = np.bincount(drawn, minlength=100) / len(drawn)
    np.testing.assert_allclose(share, weights / weights.sum(), atol=0.002)
    assert not set(drawn) & set(np.flatnonzero(weights == 0))


def test_drawing_by_weight_is_eq_7_in_expectation(in_project, frames):
    config, dataset = in_project
    made, preprocess, _ = policy.make(config.policy, dataset, "cpu")
    rows = some_rows(dataset)
    weights = np.zeros(dataset.num_frames, dtype=np.float32)
    weights[rows] = [0.0, 1.0, 0.5, 0.0, 1.0, 0.25]
    noise = losses.sample_noise(made, 6, 1, torch.device("cpu"))
    with torch.no_grad():
        each = losses.per_sample_loss(made, preprocess(frames.batch(rows)), 1, *noise)
        eq_7 = losses.WeightedLoss(made, 1e-6)(
            preprocess(frames.batch(rows)), torch.from_numpy(weights[rows]), None, 1, *noise
        )
    drawn = policy.Draws(rows, weights, True, 0)
    chance = np.diff(drawn.cumulative, prepend=0.0)
    assert float((torch.from_numpy(chance) * each).sum()) == pytest.approx(float(eq_7), rel=1e-5)
    many = [int(row) - int(rows[0]) for row in drawn.at(3, 20_000)]
    assert float(each[many].mean()) == pytest.approx(float(eq_7), rel=0.05)


def test_arms_take_the_same_random_numbers():
    rows = np.arange(40)
    some = np.where(np.arange(40) < 20, 1.0, 0.0).astype(np.float32)
    plain, halved = policy.Draws(rows, None, True, 7), policy.Draws(rows, some, True, 7)
    assert (plain.at(3, 64) // 2 == halved.at(3, 64)).all()
    with pytest.raises(ValueError, match="every training frame has weight 0"):
        policy.Draws(rows, np.zeros(40, dtype=np.float32), False, 7)


ACT = {
    "dim_model": 16, "n_heads": 2, "dim_feedforward": 32, "n_encoder_layers": 1, "n_vae_encoder_layers": 1,
    "latent_dim": 4, "pretrained_backbone_weights": None,
}  # fmt: skip


VQBET = {"gpt_n_layer": 1, "gpt_n_head": 2, "gpt_hidden_dim": 16, "gpt_input_dim": 16, "gpt_output_dim": 16}
VQBET |= {"vqvae_embedding_dim": 8, "vqvae_enc_hidden_dim": 8, "n_vqvae_training_steps": 1, "n_obs_steps": 2}
VQBET |= {"pretrained_backbone_weights": None, "use_group_norm": True, "crop_shape": None}


@pytest.mark.parametrize("kind", ["act", "diffusion", "multi_task_dit", "vqbet"])
def test_a_policy_whose_loss_cannot_be_weighted_learns_from_drawn_frames(
    kind, in_project, tiny_encoder, tmp_path, monkeypatch
):
    config, dataset = in_project
    clip = str(tiny_encoder)
    dit = {"vision_encoder_name": clip, "text_encoder_name": clip, "n_obs_steps": 1, "hidden_dim": 16}
    dit |= {
        "num_layers": 1,
        "num_heads": 2,
        "num_train_timesteps": 2,
        "image_crop_shape": None,
        "tokenizer_max_length": 12,
    }
    diffusion = {"down_dims": [16, 32], "n_groups": 4, "diffusion_step_embed_dim": 8, "num_train_timesteps": 2}
    diffusion |= {
        "pretrained_backbone_weights": None,
        "use_group_norm": True,
        "crop_shape": None,
        "spatial_softmax_num_keypoints": 4,
    }
    sizes = {"act": ACT, "diffusion": diffusion, "multi_task_dit": dit, "vqbet": VQBET}[kind]
    changes = {"type": kind, "config": sizes, "weighting": "sampling", "steps": 2}
    changes["image_keys"] = dataset.camera_keys[:1] if kind == "vqbet" else []  # which takes one camera
    params = config.model_copy(update={"policy": config.policy.model_copy(update=changes)})
    monkeypatch.setattr(type(config.paths), "write", lambda _, name: tmp_path / name)
    weights = np.linspace(0, 1, dataset.num_frames, dtype=np.float32)
    cached = policy.frames_for(params.policy, dataset, ("train",), "cpu")
    curve = policy.train_arm(policy.Arm("rabc", weights), params, dataset, cached, "cpu", tmp_path / kind)
    assert np.isfinite(curve[-1]["loss"]) and curve[-1]["rabc_num_zero"] == 0
    loaded, before, after = policy.load(tmp_path / kind, "cpu")
    batch = cached.batch(np.array([dataset.split("train")[0].row]))
    seen = {
        k: v[:, -1] if kind != "act" and k.startswith("observation") else v for k, v in batch.items() if k != "action"
    }
    assert after(loaded.select_action(before(seen))).shape == (1, 2)
    assert getattr(loaded.config, "do_mask_loss_for_padding", True), "copies of the last action are not learned"
    first = cached.action_deltas.index(0)
    errors = evaluate.action_errors((loaded, before, after), cached, dataset.split("train"))
    assert np.isfinite(errors).all() and (errors > 0).all()
    answered_as_in_the_loop(loaded, before, cached)
    told = []  # what the policy is asked about, whose recorded actions are the perfect answer (normalised, as policies answer)
    watched = lambda batch: told.append(before(batch)) or dict(told[-1])  # noqa: E731
    monkeypatch.setattr(loaded, "predict_action_chunk", lambda _: told[-1]["action"][:, first:])
    errors = evaluate.action_errors((loaded, watched, after), cached, dataset.split("train"))
    np.testing.assert_allclose(errors, 0, atol=1e-8)
    held_out = policy.frames_for(params.policy, dataset, ("val",), "cpu")  # what notebook 06 asks of it
    given = tmp_path / kind, held_out
    assert np.isfinite(policy.validation_loss(*given, dataset.split("val"), 0, "cpu"))
    assert policy.first_action(*given, dataset.split("val")[0], "cpu").shape == (2,)


def answered_as_in_the_loop(loaded, before, cached):
    """A chunk for frame 5 of an episode is what `select_action` starts there, having seen the frames before."""
    row, deltas = cached.dataset.split("train")[0].row + 5, cached.observation_deltas
    batch = before(cached.batch(np.array([row])))
    del batch["action"]
    loaded.reset()
    torch.manual_seed(0)
    chunk = evaluate._answer(loaded, batch, deltas)
    loaded.reset()
    for i in range(len(deltas or (0,))):
        if "action" in getattr(loaded, "_queues", {}):
            loaded._queues["action"].clear()  # so that the last frame begins a chunk
        torch.manual_seed(0)
        seen = {key: batch[key] if deltas is None else batch[key][:, i] for key in loaded.config.input_features}
        action = loaded.select_action(batch | seen)
    torch.testing.assert_close(chunk[:, 0], action)


def test_every_imitating_policy_of_lerobot_is_known(in_project):
    """Each has a configuration that our parameters make; those that learn from rewards are refused."""
    config, _ = in_project
    for kind in PreTrainedConfig.get_known_choices().keys() - {"eo1"}:  # whose configuration needs a model of the Hub
        executed = 1 if kind == "tdmpc" else 8
        changes = {
            "type": kind,
            "config": {},
            "weighting": "sampling",
            "chunk_size": 16,
            "n_action_steps": executed,
        }
        settings = config.policy.model_copy(update=changes)
        if kind in ("tdmpc", "gaussian_actor"):
            with pytest.raises(ValueError, match=f"policy.type: {kind} learns from rewards, not from demonstrations"):
                policy.make_config(settings, "cpu")
            continue
        made = policy.make_config(settings, "cpu")
        if kind == "vqbet":  # a chunk from each frame on that it sees, and from some to come
            assert made.action_chunk_size == 16
        else:
            assert len(made.action_delta_indices) == 16
    other = config.policy.model_copy(
        update={"type": "lingbot_va", "config": {}, "weighting": "sampling", "chunk_size": 20}
    )
    with pytest.raises(ValueError, match=r"policy\.chunk_size: lingbot_va predicts 16 actions, .* set this to 16"):
        policy.make_config(other, "cpu")


def test_a_codebook_that_takes_every_step_is_refused(in_project):
    """VQ-BeT would have learned nothing of how to act, and its loss would look well."""
    config, _ = in_project
    vqbet = {"type": "vqbet", "weighting": "sampling", "steps": 700, "accumulate": 2}

    def codebook(**fields):
        asked = config.policy.model_copy(update={**vqbet, "config": fields})
        return policy.make_config(asked, "cpu").n_vqvae_training_steps

    assert codebook() == 280 and codebook(n_vqvae_training_steps=1000) == 1000
    with pytest.raises(ValueError, match=r"from 1400 batches, .* of which policy.steps leaves none \(1400 in all\)"):
        codebook(n_vqvae_training_steps=1400)


@pytest.mark.parametrize("stopped_at", [4, 6])  # before the codebook is through, and after
def test_a_stopped_vqbet_resumes_to_the_same_weights(in_project, tmp_path, monkeypatch, stopped_at):
    """How far its codebook is stands in no tensor."""
    config, dataset = in_project
    fields = VQBET | {"n_vqvae_training_steps": 5}
    changes = {"type": "vqbet", "config": fields, "weighting": "sampling", "steps": 8, "save_every": 3}
    changes |= {"image_keys": dataset.camera_keys[:1], "ema_decay": 0.0}
    params = config.model_copy(update={"policy": config.policy.model_copy(update=changes)})
    frames, found = policy.frames_for(params.policy, dataset, ("train",), "cpu"), []
    batch, given = policy.CachedFrames.batch, []

    def stop(self, rows):
        given.append(1)
        if len(given) == stopped_at + 1:
            raise KeyboardInterrupt
        return batch(self, rows)

    for run in ("one", "two"):
        monkeypatch.setattr(type(config.paths), "write", lambda _, name, run=run: tmp_path / run / name)
        arguments = policy.Arm("bc"), params, dataset, frames, "cpu", tmp_path / run / "bc"
        if run == "two":
            with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
                stopping.setattr(policy.CachedFrames, "batch", stop)
                policy.train_arm(*arguments)
        policy.train_arm(*arguments)
        found.append(load_file(tmp_path / run / "bc/checkpoints/last/pretrained_model/model.safetensors"))
    one, two = found
    assert any(key.endswith("discretized") and value for key, value in one.items())
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_cameras_that_a_policy_cannot_see_are_said_with_their_key(in_project):
    config, dataset = in_project
    changes = {"type": "vqbet", "weighting": "sampling", "config": {"n_vqvae_training_steps": 1}}
    with pytest.raises(ValueError, match=r"vqbet cannot be made .* \(policy.image_keys\) .* only one image"):
        policy.make(config.policy.model_copy(update=changes), dataset, "cpu")


def test_what_changes_nothing_that_is_learned_makes_no_other_policy(in_project, frames):
    config, dataset = in_project
    bc = config.paths.read("policy/bc", "06")
    for changes in ({"save_every": 1}, {"log_every": 3}, {"cache_frames": False}, {"num_workers": 2}):
        asked = config.model_copy(update={"policy": config.policy.model_copy(update=changes)})
        assert policy.is_trained(policy.Arm("bc"), asked, dataset, bc), changes
    streamed = policy.StreamedFrames(dataset, dataset.camera_keys, 0, frames.action_deltas)
    found = [policy.validation_loss(bc, f, dataset.split("val"), 0, "cpu") for f in (frames, streamed)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_another_precision_is_taken_within_one_process(in_project):
    config, _ = in_project
    mixed = []
    for precision in ("fp32", "bf16", "fp32"):
        asked = config.policy.model_copy(update={"precision": precision})
        mixed.append(policy.make_accelerator(asked, "cpu").mixed_precision)
    assert mixed == ["no", "bf16", "no"]


def test_a_policy_sees_the_cameras_that_it_is_given(in_project):
    config, dataset = in_project
    one = config.policy.model_copy(update={"image_keys": dataset.camera_keys[1:]})
    frames = policy.frames_for(one, dataset, ("val",), "cpu")
    made, _, _ = policy.make(one, dataset, "cpu")
    assert list(made.config.image_features) == list(frames.images) == dataset.camera_keys[1:]
    with pytest.raises(ValueError, match=r"policy\.image_keys: no camera 'left' in this dataset; it has observation"):
        policy.make(one.model_copy(update={"image_keys": ["left"]}), dataset, "cpu")


def test_parts_that_learn_slower_keep_their_share_of_the_rate(in_project):
    config, dataset = in_project
    changes = {
        "type": "act",
        "config": {**ACT, "optimizer_lr": 1e-4, "optimizer_lr_backbone": 1e-5},
        "weighting": "sampling",
    }
    made, _, _ = policy.make(config.policy.model_copy(update=changes), dataset, "cpu")
    groups = policy.make_optimizer(made, 3e-4).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([3e-4, 3e-5])
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in made.parameters() if p.requires_grad}


def test_a_task_that_the_policy_would_read_in_part_is_refused(in_project):
    config, dataset = in_project
    short = config.policy.model_copy(update={"config": {**config.policy.config, "tokenizer_max_length": 2}})
    with pytest.raises(
        ValueError, match=r"tokenizer_max_length: the task 'stack the cubes' has \d+ tokens, and the .* reads 2"
    ):
        policy.make(short, dataset, "cpu")


def test_two_processes_learn_what_one_with_twice_the_batch_learns(project, tmp_path):
    found = {}
    for processes, size in ((1, 4), (2, 2)):
        copy = tmp_path / str(processes)
        shutil.copytree(project, copy)
        overrides = {"policy.batch_size": size, "policy.noise_draws": 2, "base.outputs": "outputs"}
        launch(copy, processes, "policy", overrides)
        found[processes] = [
            json.loads((copy / f"outputs/policy/{arm}/curve.json").read_text()) for arm in ("bc", "rabc")
        ]
    for one, two in zip(found[1], found[2], strict=True):
        for left, right in zip(one, two, strict=True):
            assert left == pytest.approx(right, rel=1e-4)


def test_accumulated_batches_are_one_large_batch(in_project, frames, tmp_path, monkeypatch):
    config, dataset = in_project
    weights = np.random.default_rng(0).random(dataset.num_frames).astype(np.float32)
    curves = []
    for accumulate, size in ((1, 4), (2, 2)):
        changes = {"accumulate": accumulate, "batch_size": size}
        params = config.model_copy(update={"policy": config.policy.model_copy(update=changes)})
        monkeypatch.setattr(type(config.paths), "write", lambda _, name, n=size: tmp_path / str(n) / name)
        curves.append(
            policy.train_arm(policy.Arm("rabc", weights), params, dataset, frames, "cpu", tmp_path / f"a{size}")
        )
    for left, right in zip(*curves, strict=True):
        assert left == pytest.approx(right, rel=1e-4)


def test_adapters_are_trained_and_saved_alone(in_project, frames, tmp_path, monkeypatch):
    """`policy.peft`: LeRobot's LoRA on a pretrained policy, resumed like any other."""
    config, dataset = in_project
    path = config.paths.read("policy/bc", "06") / "checkpoints/last/pretrained_model"
    base = SmallPI0Policy.from_pretrained(path)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    changes = {"pretrained_path": str(path), "peft": {"r": 2, "lora_alpha": 4}}
    params = config.model_copy(update={"policy": config.policy.model_copy(update=changes)})
    monkeypatch.setattr(type(config.paths), "write", lambda _, name: tmp_path / name)
    saving, saved = policy.save_checkpoint, []

    def stop_after_the_second_save(*args):
        saving(*args)
        saved.append(args[1])
        if len(saved) == 2:
            raise KeyboardInterrupt

    whole = policy.train_arm(policy.Arm("bc"), params, dataset, frames, "cpu", tmp_path / "whole")
    monkeypatch.setattr(policy, "save_checkpoint", stop_after_the_second_save)
    with pytest.raises(KeyboardInterrupt):
        policy.train_arm(policy.Arm("bc"), params, dataset, frames, "cpu", tmp_path / "stopped")
    monkeypatch.setattr(policy, "save_checkpoint", saving)
    assert policy.train_arm(policy.Arm("bc"), params, dataset, frames, "cpu", tmp_path / "stopped") == whole

    folder = tmp_path / "stopped/checkpoints/last/pretrained_model"
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()
    loaded, preprocess, _ = policy.load(tmp_path / "stopped", "cpu")
    theirs = make_policy(
        PreTrainedConfig.from_pretrained(folder, cli_overrides=[f"--pretrained_path={folder}"]),
        ds_meta=dataset.lerobot_metadata,
    )
    assert isinstance(theirs, PeftModel), "LeRobot takes it for adapters"
    batch, noise = preprocess(frames.batch(some_rows(dataset))), {}
    for name, which in (("ours", loaded), ("lerobot's", theirs.get_base_model()), ("base", base)):
        torch.manual_seed(1)
        noise[name] = losses.per_sample_loss(which.eval(), batch)
    torch.testing.assert_close(noise["ours"], noise["lerobot's"])
    assert not torch.allclose(noise["ours"], noise["base"])
    trained = dict(loaded.named_parameters())
    frozen = [key.replace(".base_layer", "") for key in trained if "lora" not in key]
    assert sorted(frozen) == sorted(dict(base.named_parameters()))
    assert all(
        torch.equal(before[key.replace(".base_layer", "")], value)
        for key, value in trained.items()
        if "lora" not in key
    )


def test_adapters_need_a_policy_and_known_fields(in_project, tmp_path):
    config, _ = in_project
    with pytest.raises(ValueError, match=r"policy\.peft: adapters change a pretrained policy"):
        policy.make_config(config.policy.model_copy(update={"peft": {"r": 2}}), "cpu")
    with pytest.raises(ValueError, match=r"policy\.peft: LeRobot has no rank; it has .*lora_alpha"):
        policy.peft_config(config.policy.model_copy(update={"peft": {"rank": 2}}))


@pytest.mark.parametrize("changes", [{}, {"accumulate": 3}, {"type": "act", "config": ACT, "weighting": "sampling"}])
def test_an_estimate_counts_what_is_trained(in_project, changes):
    config, dataset = in_project
    params = config.model_copy(update={"policy": config.policy.model_copy(update=changes)})
    frames = policy.frames_for(params.policy, dataset, ("train",), "cpu")
    found = policy.estimate(params, dataset, frames, "cpu")
    made, *_ = policy.make(params.policy, dataset, "cpu")
    assert found.parameters == sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert found.seconds_per_step > 0 and found.steps == params.policy.steps

    def memory(**other) -> float:
        asked = config.model_copy(update={"policy": config.policy.model_copy(update={**changes, **other})})
        return policy.estimate(asked, dataset, frames, "cpu").memory

    assert params.policy.ema_decay, "the average of the weights is a copy more"
    assert found.memory - memory(ema_decay=0.0) == 4 * found.parameters
    made, preprocess, _ = policy.make(params.policy, dataset, "cpu")
    loss = losses.WeightedLoss(made, 1e-6, params.policy.noise_draws)
    loss(preprocess(frames.batch(some_rows(dataset)))).backward()
    gradients = 4 * sum(p.numel() for p in made.parameters() if p.grad is not None)  # language heads have none
    kept = 8 * found.parameters + 2 * gradients  # weights and their average, AdamW's moments
    assert 0.25 * found.parameters < gradients / 4 <= found.parameters
    activations = memory(accumulate=2) - kept - gradients  # with the gradients of the part before
    size = params.policy.batch_size
    more = memory(accumulate=2, batch_size=2 * size) - kept - gradients - activations
    assert more == pytest.approx(activations, rel=0.15), "activations grow with the batch"
    for batch_size, held in ((size, activations), (2 * size, activations + more)):
        passing = held + gradients if params.policy.accumulate > 1 else max(held, gradients)
        assert memory(batch_size=batch_size) == kept + passing
    held = policy.cached_bytes(params.policy, dataset, ("train",), "cpu")
    assert held == sum(images.nbytes for images in frames.images.values())


def test_lerobot_s_training_takes_our_progress(in_project, tmp_path, monkeypatch, capfd):
    """`lerobot-train` on the annotated dataset, with the file where it looks for it."""
    config, dataset = in_project
    root = tmp_path / "dataset"
    shutil.copytree(config.paths.read("dataset", "02"), root)
    lerobot_io.export_progress(config.paths.read("sarm_progress.parquet", "05"), root, fingerprint(root))
    fields = [f"--policy.{key}={json.dumps(value)}" for key, value in config.policy.config.items()]
    arguments = [
        "lerobot-train", f"--dataset.repo_id={dataset.lerobot_metadata.repo_id}", f"--dataset.root={root}", "--dataset.video_backend=pyav",
        "--policy.discover_packages_path=sarm_lib.small_pi0", "--policy.type=small_pi0", "--policy.device=cpu", "--policy.push_to_hub=false",
        "--policy.chunk_size=4", "--policy.n_action_steps=2", *fields, f"--output_dir={tmp_path / 'out'}", "--steps=3", "--log_freq=1",
        "--batch_size=4", "--num_workers=0", "--sample_weighting.type=rabc", "--sample_weighting.head_mode=dense", "--sample_weighting.kappa=0.1",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    lerobot_train.train()
    said = "".join(capfd.readouterr())
    table = pd.read_parquet(config.paths.read("sarm_progress.parquet", "05"))
    ours = rabc.compute(root / "sarm_progress.parquet", "dense", 4, 0.1, 1e-6, [0], lerobot_compat=True)
    assert f"Loaded {len(table)} frame progress values" in said
    assert f"mean={ours.delta_mean:.4f}, std={ours.delta_std:.4f}" in said, "its weights are made from our file"
    weights = json.loads((tmp_path / "out/checkpoints/last/pretrained_model/train_config.json").read_text())
    assert weights["sample_weighting"]["kappa"] == 0.1
    assert (tmp_path / "out/checkpoints/last/pretrained_model/model.safetensors").exists()


def learns_and_acts(config, dataset, folder, changes):
    """A policy through the same lines as π0: its loss weighted, saved, loaded, acting."""
    params = config.model_copy(update={"policy": config.policy.model_copy(update={"steps": 2, **changes})})
    cached = policy.frames_for(params.policy, dataset, ("train",), "cpu")
    weights = np.linspace(0, 1, dataset.num_frames, dtype=np.float32)
    curve = policy.train_arm(policy.Arm("rabc", weights), params, dataset, cached, "cpu", folder)
    loaded, before, after = policy.load(folder, "cpu")
    batch = before(cached.batch(some_rows(dataset)))
    with torch.no_grad():
        torch.manual_seed(5)
        ours = losses.per_sample_loss(loaded, batch)
        torch.manual_seed(5)
        theirs = loaded.forward(dict(batch), reduction="none")[0]
    observation = {key: value for key, value in before(cached.batch(some_rows(dataset, 1))).items() if key != "action"}
    assert np.isfinite(curve[-1]["loss"]) and after(loaded.select_action(observation)).shape == (1, 2)
    return ours, theirs, ~batch["action_is_pad"].any(1)


def test_smolvla_takes_weights(in_project, tmp_path, monkeypatch):
    config, dataset = in_project
    monkeypatch.setattr(type(config.paths), "write", lambda _, name: tmp_path / name)
    sizes = {
        "vlm_model_name": str(tiny_policies.make_smolvlm(tmp_path / "vlm")),
        "load_vlm_weights": True,
        "num_vlm_layers": 2,
    }
    fields = {**sizes, "resize_imgs_with_padding": [32, 32], "tokenizer_max_length": 16, "expert_width_multiplier": 0.5}
    ours, theirs, _ = learns_and_acts(config, dataset, tmp_path / "p", {"type": "smolvla", "config": fields})
    torch.testing.assert_close(ours, theirs, msg="its own loss knows padded actions")
    cached = policy.frames_for(config.policy, dataset, ("train",), "cpu")
    curves = []
    for accumulate, size in ((1, 4), (2, 2)):  # one noise, however a step is divided
        changes = {"type": "smolvla", "config": fields, "steps": 2, "accumulate": accumulate, "batch_size": size}
        params = config.model_copy(update={"policy": config.policy.model_copy(update=changes)})
        curves.append(policy.train_arm(policy.Arm("bc"), params, dataset, cached, "cpu", tmp_path / f"a{size}"))
    for left, right in zip(*curves, strict=True):
        assert left == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize("draws", [1, 3])
def test_pi05_takes_weights_and_several_noises(in_project, tmp_path, monkeypatch, draws):
    config, dataset = in_project
    monkeypatch.setattr(type(config.paths), "write", lambda _, name: tmp_path / name)
    tiny_policies.shrink_pi05(monkeypatch)
    fields = {"image_resolution": [32, 32], "tokenizer_max_length": 64}
    changes = {"type": "pi05", "config": fields, "noise_draws": draws}
    ours, theirs, whole = learns_and_acts(config, dataset, tmp_path / "p", changes)
    torch.testing.assert_close(ours[whole], theirs[whole])
    assert whole.any() and not whole.all() and not torch.allclose(ours[~whole], theirs[~whole])


def test_what_a_step_weighs_knows_of_frames_without_progress():
    """With `lerobot_compat` such a frame has no r; a log with NaN in it is no JSON."""
    arm = policy.Arm("rabc", np.array([1, 0, 0.5], np.float32), np.array([np.nan, -0.1, 0.3], np.float32))
    found = policy.batch_statistics(arm, np.array([0, 1, 2]))
    assert found["rabc_delta_mean"] == pytest.approx(0.1) and found["rabc_delta_std"] == pytest.approx(0.2)
    assert "rabc_delta_mean" not in policy.batch_statistics(arm, np.array([0]))


@pytest.mark.parametrize("first", [True, False])
def test_training_goes_on_through_batches_of_frames_without_progress(in_project, frames, tmp_path, monkeypatch, first):
    config, dataset = in_project
    monkeypatch.setattr(type(config.paths), "write", lambda _, name: tmp_path / name)
    params = config.model_copy(update={"policy": config.policy.model_copy(update={"steps": 4, "log_every": 2})})
    without, other = (episode.row for episode in dataset.split("train")[:2])
    rows = lambda _, step, samples: np.full(samples, without if (step % 2 == 0) == first else other)  # noqa: E731
    monkeypatch.setattr(policy.Draws, "at", rows)
    delta = np.full(dataset.num_frames, 0.25, np.float32)
    delta[without] = np.nan
    arm = policy.Arm("rabc", np.ones(dataset.num_frames, np.float32), delta)
    curve = policy.train_arm(arm, params, dataset, frames, "cpu", tmp_path / "rabc")
    assert [row["rabc_delta_mean"] for row in curve] == [0.25, 0.25] and np.isfinite(curve[-1]["loss"])
