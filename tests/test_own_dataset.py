"""A user's own dataset through the whole chain: images instead of videos, several files, no cache, from the Hub."""

import pytest

from sarm_lib import dataset, params
from sarm_lib.artifacts import read_json
from tests.conftest import CAMERAS, make_dataset, make_project, run_chapters


@pytest.mark.parametrize(
    ("source", "overrides"),
    [
        ({"use_videos": False}, {"base.image_keys": []}),  # both cameras: a model that LeRobot cannot express
        ({"files": 2}, {"policy.cache_frames": False, "sarm.window": "past", "rabc.stride": 3}),
    ],
    ids=["images_two_cameras", "several_files_streamed_past_window"],
)
def test_the_whole_chain_runs(tmp_path, tiny_encoder, source, overrides):
    project = make_project(tmp_path / "p", make_dataset(tmp_path / "d", **source), tiny_encoder, overrides)
    run_chapters(project)
    assert read_json(project / "outputs/sarm/config.json")["type"] == "sarm_lib"
    assert read_json(project / "outputs/metrics/policy.json")["rabc"]["val_loss"] > 0


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
