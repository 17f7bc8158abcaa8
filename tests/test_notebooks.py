"""The notebooks as pages: their form, what an override does, and what nbval notices. Their run under nbval is in `test_pipeline`."""

import ast
import re
import shutil
import statistics
import subprocess

import nbformat
import pytest

from tests import pages
from tests.conftest import ROOT, chapters, run_notebook


def code_cells(name: str):
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", chapters())
def test_a_page_has_the_form_of_a_page(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith(f"# {name[:2]} · ")
    assert "widgets" not in notebook.metadata
    cells = code_cells(name)
    lines = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in cells]
    assert statistics.median(lines) <= 6 and max(lines) <= 30
    for cell in cells:
        tree = ast.parse(cell.source)  # no magics, no shell lines
        assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(tree))
        assert "chdir" not in cell.source and not any(o.output_type == "error" for o in cell.outputs)


@pytest.mark.parametrize("name", chapters())
def test_the_parameters_cell_holds_the_file_and_the_overrides_only(name):
    tagged = [cell for cell in code_cells(name) if "parameters" in cell.metadata.get("tags", [])]
    assert [cell.source for cell in tagged] == ['params_file = "params.yaml"\noverrides = {}']


CHANGES = {  # a metric, the columns of a table, a widget
    "**statistics,": '**statistics | {"kappa": 1.1 * statistics["kappa"]},',  # as small as 0.001
    "ranking.head(8)": "ranking.rename(columns={'seconds': 'duration'}).head(8)",
    "kappa.KappaExplorer(": "print(",
}


def test_nbval_notices_a_metric_a_table_and_a_widget_that_changed(tmp_path, project):
    """Each change is made in the code, and the cells that show it fail, and no others."""
    copy = shutil.copytree(project, tmp_path / "p", symlinks=True)
    pages.expect(copy)
    (copy / "outputs/sarm_progress.parquet").unlink()  # what is there already is not said again
    path = copy / "notebooks/05_compute_rabc.ipynb"
    page, changed = nbformat.read(path, as_version=4), set()
    for old, new in CHANGES.items():
        (cell,) = [cell for cell in page.cells if cell.cell_type == "code" and old in cell.source]
        changed.add(page.cells.index(cell))
        cell.source = cell.source.replace(old, new)
    nbformat.write(page, path)
    done = subprocess.run(pages.nbval(path.name), cwd=copy / "notebooks", capture_output=True, text=True)
    failed = {int(i) for i in re.findall(r"^FAILED .*::Cell (\d+)", done.stdout, re.MULTILINE)}
    code = [i for i, cell in enumerate(page.cells) if cell.cell_type == "code"]
    assert {code[i] for i in failed} == changed, done.stdout[-5000:]


def test_an_override_writes_to_scratch_and_leaves_the_outputs_alone(tmp_path, project):
    import shutil

    copy = shutil.copytree(project, tmp_path / "p", symlinks=True)
    before = (copy / "outputs/metrics/rabc.json").read_bytes()
    run_notebook(copy, "05_compute_rabc", {"rabc.kappa": 0.9})
    assert (copy / "outputs/metrics/rabc.json").read_bytes() == before
    (scratch,) = (copy / "outputs/scratch").glob("*/metrics/rabc.json")
    assert '"kappa": 0.9' in scratch.read_text()


def test_people_s_verdicts_reach_training_and_partly_annotated_datasets_are_scored_whole(tmp_path, project):
    """Some episodes annotated, one of them rejected, one fixed: SARM learns from the others, and all are scored."""
    import shutil

    import pandas as pd
    import yaml

    from sarm_lib import annotations, corrections, dataset, params
    from sarm_lib.artifacts import read_json
    from sarm_lib.lerobot_io import read_labels

    copy = shutil.copytree(project, tmp_path / "p", symlinks=True)
    values = yaml.safe_load((copy / "params.yaml").read_text())
    config = params.load(copy / "params.yaml")
    demos, names = dataset.from_params(config), annotations.vocabulary(config)
    train, test = [[e.index for e in demos.split(s)] for s in ("train", "test")]
    chosen = sorted(e.index for e in demos.episodes if e.index != test[0])
    values["annotate"]["episodes"] = chosen
    values["verify"]["corrections"] = "corrections.yaml"
    (copy / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    given = {a.episode: a for a in annotations.load(copy / "outputs/annotations", names, demos)}
    marked = {m.episode for m in corrections.read_marks(copy / "marks.yaml", demos, names)}
    doubtful = next(i for i in train if i not in marked)
    rejected = next(i for i in train if i != doubtful)
    fix = {"dense": (annotations.Segment(names["dense"][0], 0, given[doubtful].length - 1),)}
    corrections.record_correction(
        copy / "corrections.yaml", demos, corrections.of_now(given[doubtful], "fix", fix, why="it never leaves")
    )
    corrections.record_correction(copy / "corrections.yaml", demos, corrections.of_now(given[rejected], "reject"))
    for name in ("01_annotate", "02_verify", "03_train_sarm", "05_compute_rabc"):
        run_notebook(copy, name)
    metrics = read_json(copy / "outputs/metrics/verify.json")
    assert metrics["rejected"] == [rejected] and metrics["corrections"] == {"fixed": 1, "rejected": 1}
    labels = read_labels(copy / "outputs/dataset", demos, config.heads)
    assert labels.annotated == set(chosen) - {rejected}
    assert set(labels.stage["dense"][demos.episodes[doubtful].rows]) == {0}
    progress = pd.read_parquet(copy / "outputs/sarm_progress.parquet")
    assert set(progress.episode_index) == {e.index for e in demos.episodes}
    assert progress[["progress_dense"]].notna().all().all()


def test_a_duration_beyond_belief_waits_for_a_person(tmp_path, project, monkeypatch):
    """No annotation until somebody accepts it; first to look at; and figures keep it, or they would look better for it."""
    import shutil
    from dataclasses import replace

    import yaml

    from sarm_lib import annotations, corrections, params
    from sarm_lib.artifacts import read_json
    from sarm_lib.lerobot_io import read_labels

    copy = shutil.copytree(project, tmp_path / "p", symlinks=True)
    values = yaml.safe_load((copy / "params.yaml").read_text())
    values["verify"] |= {"corrections": "corrections.yaml", "unlikely_duration": 1.1}
    (copy / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    monkeypatch.setattr(annotations, "ENOUGH", 3)  # of eight episodes
    monkeypatch.setattr(annotations, "USUAL", (0.0, 0.5))
    config, found = params.load(copy / "params.yaml"), run_notebook(copy, "02_verify")
    demos, names, refused = found["demos"], found["vocabulary"], found["kept"].refused
    out = {finding.episode for finding in refused}
    assert (
        out
        and len(out) < len(demos.episodes)
        and read_json(copy / "outputs/metrics/verify.json")["refused"] == [str(finding) for finding in refused]
    )
    everyone = {a.episode for a in found["raw"]}
    labels = read_labels(copy / "outputs/dataset", demos, config.heads)
    assert labels.annotated == everyone - out
    assert set(found["suspicion"].index[: len(out)]) == out == set(list(found["reasons"])[: len(out)])
    assert all("refused: " in found["reasons"][i] for i in out)
    for figures in found["quality"].values():
        assert not figures.get("missing")
    victim = next(a for a in found["raw"] if a.episode in out)
    corrections.record_correction(copy / "corrections.yaml", demos, corrections.of_now(victim, "accept"))
    again = run_notebook(copy, "02_verify")
    assert {f.episode for f in again["kept"].refused} == out - {victim.episode}
    half = replace(
        victim, sparse=(annotations.Segment(names["sparse"][0], 0, victim.length - 1),)
    )  # another sparse head
    said = corrections.of_now(half, "fix", {"dense": victim.dense})
    reviewed = corrections.apply(found["raw"], [said], demos, names)
    assert [o.outcome for o in reviewed.outcomes] == ["outdated"]
    assert victim.episode in {f.episode for f in corrections.refuse(reviewed, refused).refused}


def test_who_marks_every_episode_is_offered_every_episode(tmp_path, project):
    """`manual`: those of test too, without a mark of which notebook 04 has nothing to compare with."""
    import shutil

    import yaml

    from sarm_lib import annotations, corrections

    copy = shutil.copytree(project, tmp_path / "p", symlinks=True)
    values = yaml.safe_load((copy / "params.yaml").read_text())
    values["annotate"] |= {"annotator": "manual", "second_opinion": None}
    values["verify"]["corrections"] = "corrections.yaml"
    (copy / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    for name in ("01_annotate", "02_verify", "03_train_sarm"):
        found = run_notebook(copy, name)
        if name == "01_annotate":
            demos, offered, reasons = found["demos"], found["marking"]["order"], found["reasons"]
    (test, *_), everyone = demos.split("test"), {e.index for e in demos.episodes}
    assert set(offered) == everyone and reasons[test.index] == "not annotated"
    with pytest.raises(ValueError, match=r"no test episode is annotated: .*mark some \(notebook 01\)"):
        run_notebook(copy, "04_visualize")
    given = annotations.load(project / "outputs/annotations", found["labels"].stage_names, demos)
    corrections.record_mark(copy / "marks.yaml", demos, next(a for a in given if a.episode == test.index))
    for name in ("01_annotate", "02_verify", "03_train_sarm", "04_visualize"):
        found = run_notebook(copy, name)
    assert [episode.index for episode in found["test"]] == [test.index]


def test_a_vision_language_model_annotates_in_the_notebook_and_makes_room_for_its_other_seed(
    tmp_path, project, monkeypatch
):
    import weakref

    import yaml

    from sarm_lib.annotators import vlm
    from tests.tiny_vlm import make_vlm

    loaded, init = [], vlm._Model.__init__

    def counted(self, *args):
        assert not [model for model in loaded if model() is not None], "two models at once"
        loaded.append(weakref.ref(self))
        init(self, *args)

    monkeypatch.setattr(vlm._Model, "__init__", counted)
    copy = shutil.copytree(project, tmp_path / "p", symlinks=True)
    make_vlm(copy / "model")
    values = yaml.safe_load((copy / "params.yaml").read_text())
    asked = {"annotator": "vlm", "model": "model", "temperature": 1.0, "repeats": 1, "frames_per_second": 1.0}
    values["annotate"] |= asked | {"batch_size": 8, "max_attempts": 5, "allow_failed": True}
    (copy / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    found = run_notebook(copy, "01_annotate")
    assert {a.annotator for a in found["annotated"]} == {"vlm"} and len(loaded) == 2
    other = found["opinions"][f"vlm-seed-{found['config'].base.seed + 1}"]
    assert {a.episode for a in other} == {a.episode for a in found["annotated"]} != set()
    assert run_notebook(copy, "01_annotate")["annotated"] == found["annotated"] and len(loaded) == 2, (
        "nobody is asked again"
    )


@pytest.mark.parametrize("mode", ["single_stage", "dense_only"])
def test_the_chain_runs_in_every_annotation_mode(tmp_path, tiny, tiny_encoder, mode):
    from sarm_lib.artifacts import read_json
    from tests.conftest import make_project

    head = "sparse" if mode == "single_stage" else "dense"
    overrides = {"base.annotation_mode": mode, "rabc.head_mode": head}
    project = make_project(tmp_path / "p", tiny, tiny_encoder, overrides)
    for name in chapters():
        run_notebook(project, name)
    heads = {"single_stage": {"sparse"}, "dense_only": {"sparse", "dense"}}[mode]
    metrics = read_json(project / "outputs/metrics/verify.json")
    assert set(metrics["proportions"]) == heads and metrics["proportions"]["sparse"] == {"task": 1.0}
