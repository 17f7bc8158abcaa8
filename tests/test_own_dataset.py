"""A user's own dataset through the whole chain: images instead of videos, several files, no cache, from the Hub."""

import shutil

import numpy as np
import pandas as pd
import pytest
from lerobot.configs import PreTrainedConfig
from lerobot.policies import make_pre_post_processors

from sarm_lib import checkpoint, dataset, launch, params
from sarm_lib.artifacts import read_json, write_json
from sarm_lib.dataset import rows_of
from sarm_lib.policy import StreamedFrames
from tests.conftest import CAMERAS, LENGTHS, make_dataset, make_project, run_chapters, run_notebook

JOINTS = "observation.joints"


@pytest.mark.parametrize(
    ("source", "overrides"),
    [
        # both cameras: a model that LeRobot cannot express
        ({"use_videos": False, "state_keys": (JOINTS,)}, {"base.image_keys": []}),
        (
            {"files": 2, "state_keys": (JOINTS, "observation.state")},
            {"policy.cache_frames": False, "sarm.window": "past", "rabc.stride": 3},
        ),
    ],
    ids=["images_two_cameras_joints", "several_files_streamed_past_window_joints_and_another_state"],
)
def test_the_whole_chain_runs(tmp_path, tiny_encoder, monkeypatch, source, overrides):
    overrides = {**overrides, "base.state_key": JOINTS}
    project = make_project(tmp_path / "p", make_dataset(tmp_path / "d", **source), tiny_encoder, overrides)
    run_chapters(project)
    assert read_json(project / "outputs/sarm/config.json")["type"] == "sarm_lib"
    assert read_json(project / "outputs/metrics/policy.json")["rabc"]["val_loss"] > 0
    monkeypatch.chdir(project)
    opened = dataset.from_params(params.load())
    joints_reach_the_policy_as_its_state(project / "outputs/policy/rabc/checkpoints/last/pretrained_model", opened)


def joints_reach_the_policy_as_its_state(path, opened):
    """By the checkpoint's own processor, from the dataset as LeRobot's loader returns it."""
    config = PreTrainedConfig.from_pretrained(path)
    assert set(config.input_features) == {*CAMERAS, "observation.state"}
    preprocess, _ = make_pre_post_processors(config, pretrained_path=str(path))
    batch = next(
        StreamedFrames(opened, opened.camera_keys, 0, tuple(range(4))).batches(iter([rows_of(opened.split("train"))]))
    )
    state = preprocess(batch)["observation.state"]
    assert state.shape[1] == 3 and state.mean(0).abs().max() < 1e-3 and (state.std(0) - 1).abs().max() < 0.02


def test_a_hub_dataset_is_downloaded_at_its_revision_and_opened(tiny, tmp_path, tiny_encoder, monkeypatch):
    import lerobot.datasets.lerobot_dataset as lerobot

    asked = []

    class Downloaded:
        def __init__(self, repo_id, revision=None):
            asked.append((repo_id, revision))
            self.root = tiny

    monkeypatch.setattr(lerobot, "LeRobotDataset", Downloaded)
    hub = {"base.dataset": "someone/cubes", "base.revision": "v1.2"}
    monkeypatch.chdir(make_project(tmp_path / "p", tiny, tiny_encoder, hub))
    opened = dataset.from_params(params.load())
    assert asked == [("someone/cubes", "v1.2")] and opened.camera_keys == list(CAMERAS)


def test_an_old_dataset_of_the_hub_is_answered_with_how_to_convert_it(monkeypatch):
    from lerobot.datasets import lerobot_dataset as lerobot
    from lerobot.datasets.utils import BackwardCompatibilityError
    from packaging.version import Version

    def refuses(repo_id, revision=None):
        raise BackwardCompatibilityError(repo_id, Version("2.1"))

    monkeypatch.setattr(lerobot, "LeRobotDataset", refuses)
    with pytest.raises(
        dataset.DatasetError, match=r"hf download someone/cubes .* --root=cubes --push-to-hub=false, and set"
    ):
        dataset.open_dataset("someone/cubes")


def test_a_reward_model_of_lerobot_s_is_measured_and_weights_a_policy_s_frames(tmp_path, project):
    """Chapters 04 to 06 with what `SARMRewardModel.save_pretrained` wrote."""
    from lerobot.rewards.sarm.configuration_sarm import SARMConfig
    from lerobot.rewards.sarm.modeling_sarm import SARMRewardModel

    ours = checkpoint.load_reward_model(project / "outputs/sarm").spec
    heads = {
        f"{head}_{what}": value
        for head in ours.heads
        for what, value in (("subtask_names", ours.stage_names[head]), ("temporal_proportions", ours.proportions[head]))
    }
    config = SARMConfig(
        annotation_mode="dual", **heads, **{f"num_{head}_stages": ours.num_stages(head) for head in ours.heads},
        hidden_dim=16, num_heads=2, num_layers=1, frame_gap=1, image_key=CAMERAS[0], device="cpu",
    )  # fmt: skip
    SARMRewardModel(config).save_pretrained(tmp_path / "theirs")
    folder = shutil.copytree(project, tmp_path / "p")
    named = {"rabc.reward_model_path": str(tmp_path / "theirs"), "base.outputs": "outputs/theirs"}
    for needed in ("embeddings", "dataset"):
        (folder / "outputs/theirs").mkdir(exist_ok=True)
        (folder / "outputs/theirs" / needed).symlink_to(folder / "outputs" / needed)
    scored = run_notebook(folder, "04_visualize", named)
    cards = read_json(folder / "outputs/theirs/metrics/scorecard.json")
    assert cards["sarm"]["all"]["episodes"] == len(scored["test"]) and "mse_target_dense" in cards["sarm"]["all"]
    assert "not known" in str(scored["findings"].comparable({"seed": 0}, scored["model"].made_from))
    run_notebook(folder, "05_compute_rabc", named)
    phi = pd.read_parquet(folder / "outputs/theirs/sarm_progress.parquet")
    for episode in scored["test"]:
        mine = phi[phi.episode_index == episode.index].progress_dense
        np.testing.assert_allclose(mine, scored["scores"][episode.index, "dense"].progress, atol=1e-5)
    assert pd.read_parquet(folder / "outputs/theirs/rabc_weights.parquet").weight.between(0, 1).all()
    run_notebook(folder, "06_train_pi0", named)
    assert (folder / "outputs/theirs/policy/rabc/checkpoints/last/pretrained_model/model.safetensors").exists()
    of_another_task = read_json(tmp_path / "theirs/config.json")
    of_another_task["dense_subtask_names"][0] = "push the cube"
    write_json(tmp_path / "theirs/config.json", of_another_task)
    with pytest.raises(
        ValueError, match=r"theirs knows the dense stages \['push the cube'.*the annotations \['leave the edge'"
    ):
        run_notebook(folder, "04_visualize", named)


def test_a_model_of_a_small_dataset_weights_a_large_one(tmp_path, project, tiny_encoder):
    """The README's way: chapters 00, 05 and 06 on a dataset that nobody annotated."""
    large = make_dataset(tmp_path / "large", seed=1, lengths=LENGTHS * 2)
    named = {"base.outputs": "outputs/large", "rabc.reward_model_path": str(project / "outputs/sarm")}
    folder = make_project(tmp_path / "p", large, tiny_encoder, named)
    (folder / "marks.yaml").unlink()
    for name in ("00_prepare", "05_compute_rabc", "06_train_pi0"):
        run_notebook(folder, name)
    weights = pd.read_parquet(folder / "outputs/large/rabc_weights.parquet")
    assert len(weights) == 2 * sum(LENGTHS) and weights.weight.between(0, 1).all()
    assert (folder / "outputs/large/policy/rabc/checkpoints/last/pretrained_model/model.safetensors").exists()
    assert not (folder / "outputs/large/sarm").exists()
    # the same in the project of the small one, whose chapters 00 to 04 stay as they are
    small = shutil.copytree(project, tmp_path / "small")
    before = {f: f.read_bytes() for f in (small / "outputs/embeddings").rglob("*") if f.is_file()}
    named = {"rabc.dataset": str(large), "base.outputs": "outputs"}
    for name in ("05_compute_rabc", "06_train_pi0", "07_evaluate"):
        page = run_notebook(small, name, named)
    pd.testing.assert_frame_equal(pd.read_parquet(small / "outputs/rabc_weights.parquet"), weights)
    assert before == {f: f.read_bytes() for f in (small / "outputs/embeddings").rglob("*") if f.is_file()}
    assert page["demos"].num_frames == 2 * sum(LENGTHS) and page["metrics"]["rabc"]["action_error"] > 0
    config = params.load(small / "params.yaml", named)
    scored = launch.score(config).read_bytes()  # as several processes do
    assert scored == (small / "outputs/sarm_progress.parquet").read_bytes()
    learned = read_json(small / "outputs/policy/rabc/provenance.json")
    assert learned["fingerprint"] == dataset.fingerprint(large)
    # and from the progress file alone
    taken = {"base.outputs": "outputs/taken", "rabc.progress_path": "outputs/large/sarm_progress.parquet"}
    run_notebook(folder, "05_compute_rabc", taken)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "outputs/taken/rabc_weights.parquet"), weights)
