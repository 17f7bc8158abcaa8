"""Pushing: one explicit command each, everything that is needed, nothing else; against a Hub that only writes down."""

import shutil

import httpx
import pytest
from huggingface_hub.errors import RevisionNotFoundError
from lerobot.datasets.dataset_metadata import CODEBASE_VERSION

from sarm_lib import hub
from sarm_lib.artifacts import write_json


class Notebook:
    """Stands in for `HfApi`: keeps what it is asked."""

    def __init__(self):
        self.asked = []

    def create_repo(self, repo_id, **options):
        self.asked.append(("create", repo_id, options))
        return f"https://example.org/{repo_id}"

    def upload_folder(self, **options):
        self.asked.append(("folder", options["folder_path"], options))

    def upload_file(self, **options):
        self.asked.append(("file", options["path_in_repo"], options))

    def create_tag(self, repo_id, **options):
        self.asked.append(("tag", options["tag"], options))

    def delete_tag(self, repo_id, **options):
        raise RevisionNotFoundError(
            "no such tag", response=httpx.Response(404, request=httpx.Request("GET", "https://example.org"))
        )


def test_a_reward_model_is_pushed_with_a_card_that_says_what_it_is(project):
    api = Notebook()
    assert (
        hub.push("reward-model", "me/sarm", project / "outputs", private=True, api=api) == "https://example.org/me/sarm"
    )
    (_, repo, options), (_, folder, _), (_, name, card) = api.asked
    assert repo == "me/sarm" and options["private"] and options["repo_type"] == "model"
    assert folder == project / "outputs/sarm" and name == "README.md"
    text = card["path_or_fileobj"].decode()
    for said in ("SARMRewardModel.from_pretrained", "cross the left half", "data/encoder", "| voc |", "me/sarm"):
        assert said in text


def test_a_model_that_lerobot_cannot_load_says_so(project, tmp_path):
    import shutil

    copy = shutil.copytree(project / "outputs/sarm", tmp_path / "sarm")
    write_json(copy / "config.json", {"type": "sarm_lib"})
    assert "refuses it" in hub.model_card(copy, tmp_path, "me/x")


def test_a_model_that_was_not_measured_carries_no_other_model_s_figures(project, tmp_path):
    import shutil

    copy = shutil.copytree(project / "outputs/sarm", tmp_path / "sarm")
    assert "| voc |" in hub.model_card(copy, project / "outputs/metrics", "me/x")
    with (copy / "config.json").open("a") as file:
        file.write("\n")
    assert "Not measured." in hub.model_card(copy, project / "outputs/metrics", "me/x")


def test_dataset_and_progress_go_to_a_dataset_repository(project):
    api = Notebook()
    hub.push("dataset", "me/data", project / "outputs", api=api)
    hub.push("progress", "me/data", project / "outputs", api=api)
    assert [asked[0] for asked in api.asked] == ["create", "folder", "file", "tag", "create", "file", "tag"]
    assert all(asked[2]["repo_type"] == "dataset" for asked in api.asked)
    card, tagged = api.asked[2], {asked[1] for asked in api.asked if asked[0] == "tag"}
    assert (
        card[1] == "README.md" and b"LeRobot" in card[2]["path_or_fileobj"] and b"me/data" in card[2]["path_or_fileobj"]
    )
    assert tagged == {CODEBASE_VERSION}, "LeRobot opens no dataset without it"
    assert api.asked[5][1] == "sarm_progress.parquet"


def test_a_dataset_without_its_links_is_not_pushed(project, tmp_path):
    shutil.copytree(project / "outputs/dataset/meta", tmp_path / "dataset/meta")
    api = Notebook()
    with pytest.raises(FileNotFoundError, match=r"annotations and no frames(?s:.*)dvc repro -f -s 02_verify"):
        hub.push("dataset", "me/data", tmp_path, api=api)
    assert not api.asked


@pytest.mark.parametrize("kind", hub.KINDS)
def test_what_is_not_made_yet_is_not_pushed(kind, tmp_path):
    api = Notebook()
    with pytest.raises(FileNotFoundError, match="run the pipeline first"):
        hub.push(kind, "me/x", tmp_path, api=api)
    assert not api.asked
