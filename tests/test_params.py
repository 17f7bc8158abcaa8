"""`params.yaml`: one typed object, errors that name the key."""

import math

import pytest

from sarm_lib import params
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_repository_s_own_values_load_and_are_found_from_the_notebooks_folder(monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    assert params.load().paths.root == ROOT


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rabc.kapa", 0.1, "rabc.kapa: unknown key. Did you mean kappa?"),
        ("rabc.kappa", "high", "rabc.kappa: should be a number, auto, mean, mean+std"),
        ("rabc.kappa", math.nan, "rabc.kappa: should be a number, auto, mean, mean+std"),
        ("rabc.delta_frames", "often", "rabc.delta_frames: should be a number of frames above 0, auto, or null"),
        ("rabc.delta_frames", 0, "rabc.delta_frames: should be a number of frames above 0, auto, or null"),
        ("rabc.dataset", "", "rabc.dataset: string should have at least 1 character"),
        ("sarm.learning_rate", math.inf, "sarm.learning_rate: "),
        ("sarm.steps", 1.5, "sarm.steps: input should be a valid integer, found 1.5"),
        ("sarm.steps", True, "sarm.steps: input should be a valid integer, found True"),
        (
            "base.annotation_mode",
            "triple",
            "base.annotation_mode: input should be 'single_stage', 'dense_only' or 'dual'",
        ),
        ("base.val_fraction", 2.0, "base.val_fraction: input should be less than or equal to 1"),
        ("annotate.annotator", "magic", "annotate.annotator: input should be 'keyframes', 'propagate', 'vlm'"),
        ("annotate.server_url", "localhost:8000/v1", "annotate.server_url: string should match pattern '^https?://'"),
        ("annotate.time_resolution", 7, "annotate.time_resolution: input should be less than or equal to 1"),
        ("annotate.max_frames", 1, "annotate.max_frames: input should be greater than or equal to 2"),
        ("sarm.n_obs_steps", 7, "needs an even number"),
        ("sarm.max_rewind_steps", 8, "must be smaller than sarm.n_obs_steps"),
        ("policy.n_action_steps", 17, "policy.n_action_steps: must not exceed policy.chunk_size"),
        ("sarm.save_every", 150, "must be a multiple of sarm.eval_every"),
        ("nonsense.key", 1, "nonsense: unknown key"),
    ],
)
def test_a_bad_value_is_refused_with_its_path(key, value, expected):
    with pytest.raises(params.ParamsError, match=r".*") as error:
        params.load(overrides={key: value})
    assert expected in str(error.value)


def test_a_head_that_the_mode_does_not_have_is_refused():
    with pytest.raises(params.ParamsError, match=r"rabc\.head_mode: annotation_mode single_stage has no dense head"):
        params.load(overrides={"base.annotation_mode": "single_stage", "rabc.head_mode": "dense"})


def test_a_missing_key_is_named(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("  kappa: ", "  # kappa: "))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(params.ParamsError, match=r"rabc\.kappa: missing"):
        params.load()


def test_numbers_are_read_as_dvc_reads_them(tmp_path, monkeypatch):
    text = (ROOT / "params.yaml").read_text().replace("epsilon: 1.0e-6", "epsilon: 1e-6")
    (tmp_path / "params.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert params.load().rabc.epsilon == 1e-6


def test_runs_with_other_values_write_to_scratch_and_read_what_is_there(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    usual, other = params.load().paths, params.load(overrides={"sarm.steps": 5}).paths
    assert usual.write("sarm") == tmp_path / "outputs/sarm"
    assert other.write("sarm").parent.parent == tmp_path / "outputs/scratch"
    assert params.load(overrides={"sarm.steps": 6}).paths.write("sarm") != other.write("sarm")
    usual.write("sarm").mkdir()
    assert other.read("sarm", "03_train_sarm") == tmp_path / "outputs/sarm"
    other.write("sarm").mkdir()
    assert other.read("sarm", "03_train_sarm") == other.write("sarm")
    with pytest.raises(FileNotFoundError, match="run the notebook 00_prepare first"):
        usual.read("embeddings", "00_prepare")


GUIDE = """--batch_size --dataset-repo-id --dataset.repo_id --dense-only --dense-subtasks --device --episodes --head-mode --model
--multi_gpu --num-visualizations --num-workers --num_processes --output-dir --output_dir --policy.annotation_mode
--policy.frame_gap --policy.image_key --policy.n_obs_steps --policy.repo_id --policy.state_key --policy.type --push-to-hub
--rabc_head_mode --rabc_kappa --rabc_progress_path --repo-id --reward-model-path --skip-existing --sparse-subtasks --steps
--stride --use_rabc --video-key --visualize-only --visualize-type --wandb.enable --wandb.project"""


def test_the_table_of_the_guide_s_options_names_existing_keys_and_their_defaults():
    import re

    import yaml

    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    page = (ROOT / "docs/options.md").read_text()
    rows = re.findall(r"^\| (`--.+?) \| `(\w+)\.(\w+)` \| (.+?) \| .*?\|$", page, re.M)
    assert set(GUIDE.split()) <= set(re.findall(r"--[\w.-]+", page))
    assert len(rows) >= 30
    for _, section, key, default in rows:
        assert key in values[section], f"{section}.{key}"
        if default.startswith("`"):
            assert yaml.safe_load(default.strip("`")) == values[section][key], f"{section}.{key}"


def test_chapters_that_weigh_another_dataset_see_it_as_theirs(tmp_path):
    of = lambda name: params.load("params.yaml", {"rabc.dataset": name}).weighing  # noqa: E731
    assert of(None).base == params.load().base
    assert (of("user/large@v2").base.dataset, of("user/large@v2").base.revision) == ("user/large", "v2")
    assert (of("user/large").base.dataset, of("user/large").base.revision) == ("user/large", None)
    (folder := tmp_path / "robot@home").mkdir()
    assert (of(str(folder)).base.dataset, of(str(folder)).base.revision) == (str(folder), None)
    assert of("user/large").prepare.image_keys == [] and of("user/large").base.group_key is None
    assert of("user/large").paths.root == ROOT and of("user/large").rabc.dataset == "user/large"


def test_a_single_dense_subtask_is_refused_before_anything_runs(tmp_path):
    one = {"annotate.dense_subtasks": ["do it all"]}
    with pytest.raises(params.ParamsError, match=r"annotate\.dense_subtasks: one subtask divides nothing"):
        params.load(ROOT / "params.yaml", one)
    single = {"base.annotation_mode": "single_stage", "rabc.head_mode": "sparse"}
    assert params.load(ROOT / "params.yaml", one | single).heads == ("sparse",)
