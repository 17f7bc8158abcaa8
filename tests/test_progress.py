"""Scoring: equal to LeRobot's on the same features, and a file that LeRobot reads."""

import os
import resource
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from sarm_lib import artifacts, checkpoint, encoder, progress


@pytest.fixture
def parts(in_project):
    config, dataset = in_project
    embeddings = encoder.open_embeddings(config.paths.read("embeddings", "00"), dataset)
    model = checkpoint.load_reward_model(config.paths.read("sarm", "03"))
    return config, dataset, embeddings, model, progress.frame_store(dataset, embeddings, model)


def test_progress_is_lerobot_s_from_the_same_features(parts):
    import torch
    from lerobot.rewards.sarm.modeling_sarm import SARMRewardModel
    from lerobot.rewards.sarm.sarm_utils import compute_absolute_indices

    config, dataset, embeddings, model, store = parts
    theirs = SARMRewardModel.from_pretrained(config.paths.read("sarm", "03"), strict=True)
    window, camera = model.spec.window, embeddings.cameras[dataset.image_keys[0]]
    for episode in dataset.episodes[:2]:
        ours = progress.score_episodes(model.sarm, store, [episode], ["sparse"])[episode.index, "sparse"]
        for frame in range(episode.length):
            rows, _ = compute_absolute_indices(
                episode.row + frame, episode.row, episode.row + episode.length, window.n_obs_steps, window.frame_gap
            )
            reward = theirs.calculate_rewards(
                store.task_texts(np.array([episode.row]))[0].numpy(),
                torch.from_numpy(camera[rows.numpy()]),
                store.states[rows],
                frame_index=window.n_obs_steps // 2,
            )
            assert ours.progress[frame] == pytest.approx(float(reward), abs=1e-6)


def test_the_batch_size_does_not_matter(parts):
    _, dataset, _, model, store = parts
    rows = np.arange(dataset.num_frames)
    one, many = (progress.score(model.sarm, store, rows, ["sparse"], size)["sparse"].progress for size in (7, 64))
    np.testing.assert_allclose(one, many, atol=1e-6)


def test_a_stride_predicts_some_frames_and_interpolates_the_rest(parts):
    _, dataset, _, model, store = parts
    episode = dataset.episodes[1]
    every, some = (
        progress.score_episodes(model.sarm, store, dataset.episodes[:3], ["sparse"], stride)[episode.index, "sparse"]
        for stride in (1, 4)
    )
    asked = [*range(0, episode.length, 4), episode.length - 1]
    np.testing.assert_allclose(some.progress[asked], every.progress[asked], atol=1e-6)
    np.testing.assert_allclose(some.progress[2], (every.progress[0] + every.progress[4]) / 2, atol=1e-6)


def test_the_file_has_lerobot_s_columns_and_says_what_made_it(parts):
    config, dataset, embeddings, *_ = parts
    path = config.paths.read("sarm_progress.parquet", "05")
    schema = pq.read_schema(path)
    assert [(f.name, str(f.type)) for f in schema] == [
        ("index", "int64"), ("episode_index", "int64"), ("frame_index", "int64"), ("progress_dense", "float"),
    ]  # fmt: skip
    assert schema.metadata[b"reward_model_path"] == b"outputs/sarm"
    made = artifacts.read_provenance(path)
    assert made["fingerprint"] == embeddings.fingerprint
    assert made["checkpoint"] == artifacts.checkpoint_digest(config.paths.read("sarm", "03"))
    assert len(pq.read_table(path)) == dataset.num_frames


def test_a_value_that_is_not_finite_is_never_written(parts, tmp_path):
    _, dataset, *_ = parts
    values = np.zeros(dataset.num_frames, dtype=np.float32)
    values[dataset.episodes[2].row + 5] = np.nan
    with pytest.raises(ValueError, match="first in episode 2 at frame 5"):
        progress.write_progress(tmp_path / "p.parquet", dataset, {"sparse": values}, {"reward_model_path": "x"})
    assert not (tmp_path / "p.parquet").exists()


def test_embeddings_of_another_encoder_are_refused(parts):
    import dataclasses

    _, dataset, embeddings, model, _ = parts
    with pytest.raises(ValueError, match="trained on embeddings of data/encoder"):
        progress.frame_store(dataset, dataclasses.replace(embeddings, encoder_identity="other"), model)


def test_embeddings_are_the_encoder_s_and_are_made_once(parts, monkeypatch):
    config, dataset, embeddings, *_ = parts
    clip = encoder.from_params(config, "cpu")
    episode = dataset.episodes[3]
    images = dataset.read_frames(episode, dataset.image_keys[0], range(episode.length))
    stored = embeddings.cameras[dataset.image_keys[0]][episode.rows]
    np.testing.assert_allclose(stored, clip.images(images).numpy(), atol=1e-5)
    monkeypatch.setattr(encoder.Encoder, "embed", lambda *_: pytest.fail("encoded again"))
    encoder.ensure_embeddings(config.paths.read("embeddings", "00"), config, dataset, clip)


def test_the_encoder_gives_what_lerobot_s_clip_gives(parts):
    """Same pixels in, same embedding out, as LeRobot's processor step computes it with PIL images."""
    import torch
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    config, dataset, *_ = parts
    clip = encoder.load(config.encoder)
    images = dataset.read_frames(dataset.episodes[0], dataset.image_keys[0], [0, 5, 9])
    theirs = CLIPModel.from_pretrained(config.encoder).eval()
    pixels = CLIPProcessor.from_pretrained(config.encoder)(
        images=[Image.fromarray(i) for i in images], return_tensors="pt"
    )
    with torch.no_grad():
        expected = theirs.get_image_features(**pixels).pooler_output
    torch.testing.assert_close(clip.images(images), expected, atol=1e-5, rtol=0)


def test_states_are_those_that_the_model_reads_and_its_head_must_exist(parts):
    _, dataset, embeddings, model, store = parts
    by_action = replace(model, state_key="action", state_mean=np.zeros(2), state_std=np.ones(2))
    other = progress.frame_store(dataset, embeddings, by_action)
    np.testing.assert_allclose(other.states[:, :2].numpy(), dataset.actions, atol=1e-6)
    assert (store.states[:, :3].numpy() != other.states[:, :3].numpy()).any()
    with pytest.raises(ValueError, match="reads 'joints', which this dataset does not have"):
        progress.frame_store(dataset, embeddings, replace(model, state_key="joints"))
    wide = replace(model, sarm=type("S", (), {"spec": replace(model.spec, image_dim=768)})())
    with pytest.raises(ValueError, match="embeddings of width 768, these have 512"):
        progress.frame_store(dataset, embeddings, wide)


def test_progress_is_computed_again_when_only_the_proportions_changed(parts, tmp_path):
    config, dataset, embeddings, model, _ = parts
    path = tmp_path / "progress.parquet"
    say = lambda model: progress.ensure_progress(path, config, dataset, embeddings, model, "outputs/sarm")  # noqa: E731
    assert say(model).startswith("scored") and say(model).startswith("kept")
    flipped = {head: shares[::-1] for head, shares in model.spec.proportions.items()}
    checkpoint.save_reward_model(
        replace(model, sarm=with_spec(model.sarm, replace(model.spec, proportions=flipped))), tmp_path / "sarm", {}, []
    )
    assert say(checkpoint.load_reward_model(tmp_path / "sarm")).startswith("scored")


def with_spec(sarm, spec):
    from sarm_lib.model import Sarm

    other = Sarm(spec)
    other.load_state_dict(sarm.state_dict())
    return other


def test_blocks_are_whole_episodes_in_order(in_project):
    _, dataset = in_project
    for frames in (1, 40, 10_000):
        found = progress.blocks(dataset.episodes, frames)
        assert [e for block in found for e in block] == list(dataset.episodes)
        assert all(sum(e.length for e in block) >= frames for block in found[:-1])
        assert all(sum(e.length for e in block[:-1]) < frames for block in found)


def test_a_stopped_run_scores_the_rest(parts, tmp_path, monkeypatch):
    config, dataset, embeddings, model, _ = parts
    monkeypatch.setattr(progress, "blocks", lambda episodes: [[e] for e in episodes])
    ensure = lambda name: progress.ensure_progress(tmp_path / name, config, dataset, embeddings, model, "m")  # noqa: E731
    ensure("whole.parquet")
    scored, real = [], progress.score_episodes

    def stops(sarm, store, episodes, *rest, **options):
        scored.append(episodes)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return real(sarm, store, episodes, *rest, **options)

    monkeypatch.setattr(progress, "score_episodes", stops)
    with pytest.raises(KeyboardInterrupt):
        ensure("stopped.parquet")
    ensure("stopped.parquet")
    assert len(scored) == 1 + len(dataset.episodes)  # the one at which it stopped comes twice
    assert (tmp_path / "stopped.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_share_the_blocks_score_each_once_and_give_the_bytes_of_one(
    parts, tmp_path, monkeypatch, processes
):
    config, dataset, embeddings, model, _ = parts
    monkeypatch.setattr(progress, "blocks", lambda episodes: [[e] for e in episodes])
    ensure = lambda name: progress.ensure_progress(tmp_path / name, config, dataset, embeddings, model, "m")  # noqa: E731
    ensure("alone.parquet")
    scored, real = [], progress.score_episodes

    def noted(sarm, store, episodes, *rest, **options):
        scored.extend(episode.index for episode in episodes)
        return real(sarm, store, episodes, *rest, **options)

    monkeypatch.setattr(progress, "score_episodes", noted)
    for rank in reversed(range(processes)):  # one after the other, the one that puts the blocks together last
        here = SimpleNamespace(
            process_index=rank, num_processes=processes, is_main_process=rank == 0, wait_for_everyone=lambda: None
        )
        monkeypatch.setattr(progress, "share", lambda device, here=here: here)
        before = len(scored)
        ensure("shared.parquet")
        assert 0 < len(scored) - before < len(dataset.episodes)
    assert sorted(scored) == [episode.index for episode in dataset.episodes]
    assert (tmp_path / "shared.parquet").read_bytes() == (tmp_path / "alone.parquet").read_bytes()


def test_putting_blocks_together_holds_few_files_open(parts, tmp_path, monkeypatch):
    config, dataset, embeddings, model, _ = parts
    monkeypatch.setattr(progress, "blocks", lambda episodes: [[e] for e in episodes])
    free = [os.open(os.devnull, os.O_RDONLY) for _ in range(len(dataset.episodes) - 2)]  # the lowest numbers there are
    for number in free:
        os.close(number)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1] + 1, hard))
    try:
        progress.ensure_progress(tmp_path / "p.parquet", config, dataset, embeddings, model, "m")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert pq.read_table(tmp_path / "p.parquet").num_rows == dataset.num_frames
