"""`dvc.yaml`: each stage depends on exactly what it uses, and `dvc repro` re-runs exactly what changed."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from sarm_lib import annotations, corrections, pipeline
from sarm_lib.artifacts import import_closure, imported_modules, module_path, read_json
from sarm_lib.params import load
from sarm_lib.pipeline import SMOKE, code_of
from tests import pages
from tests.conftest import ROOT, chapters, make_project
from tests.test_reproducible import digests

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("name", chapters())
def test_a_stage_depends_on_its_notebook_and_on_every_module_it_imports(name):
    declared = {d for d in STAGES[name]["deps"] if d.startswith("sarm_lib/") and d.endswith(".py")}
    used = import_closure(imported_modules(code_of(ROOT / "notebooks" / f"{name}.ipynb")))
    assert declared == {module_path(module).relative_to(ROOT).as_posix() for module in used}
    assert f"outputs/sources/{name}.py" in STAGES[name]["deps"]
    if name != "00_prepare":  # it names the splits, which are no part of the fingerprint
        assert "outputs/metrics/prepare.json" in STAGES[name]["deps"]


@pytest.mark.parametrize("name", chapters())
def test_a_stage_tracks_existing_parameters_and_every_section_its_notebook_reads(name):
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    tracked = STAGES[name]["params"]
    for dotted in tracked:
        section, _, key = dotted.partition(".")
        assert section in values and (not key or key in values[section]), dotted
    read = {
        (node.value.attr, node.attr)
        for node in ast.walk(ast.parse(code_of(ROOT / "notebooks" / f"{name}.ipynb")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr in values
    }
    for section, key in read - {("base", "device")}:  # a device changes where, not what
        assert section in tracked or f"{section}.{key}" in tracked, f"{name} reads {section}.{key}"


def test_smoke_sets_parameters_that_exist():
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert all(dotted.split(".")[1] in values[dotted.split(".")[0]] for dotted in SMOKE)


def page(folder: Path, *code: str) -> Path:
    """A project of one notebook whose overrides somebody saved by hand."""
    (folder / "notebooks").mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", folder)
    cells = [nbformat.v4.new_code_cell(source) for source in ('overrides = {"sarm.steps": 1}', *code)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebooks/00_page.ipynb")
    return folder


def test_overrides_saved_by_hand_are_no_code_and_do_not_reach_a_stage(tmp_path):
    folder = page(tmp_path / "p", 'assert (params_file, overrides) == ("params.yaml", {})')
    assert "overrides = " not in code_of(folder / "notebooks/00_page.ipynb")
    pipeline.run(folder, "00_page")
    assert sorted(p.name for p in (folder / "outputs/reports").iterdir()) == ["00_page.html", "00_page.ipynb"]


def test_a_dead_kernel_leaves_the_page_as_failed_and_says_so(tmp_path):
    folder = page(tmp_path / "p", "print('so far')", "import os; os._exit(1)")
    with pytest.raises(SystemExit, match="00_page: the kernel died"):
        pipeline.run(folder, "00_page")
    (failed,) = (folder / "outputs/reports").iterdir()
    assert failed.name == "00_page.failed.ipynb" and "so far" in failed.read_text()


def test_what_we_say_of_params_is_said_without_a_traceback(tmp_path):
    """By the program and by a page that it runs, without the name of a class."""
    folder = page(tmp_path / "p", "from sarm_lib.params import ParamsError; raise ParamsError('base.seed: wrong')")
    with pytest.raises(SystemExit, match=r"^00_page: base\.seed: wrong"):
        pipeline.run(folder, "00_page")
    values = yaml.safe_load((folder / "params.yaml").read_text())
    values["base"]["annotation_mode"] = "dens_only"
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "sarm_lib.pipeline", "sources"]
    said = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (
        said.returncode == 1
        and said.stderr.startswith("params.yaml cannot be used:")
        and "Traceback" not in said.stderr
    )


def test_check_says_what_is_there_and_all_that_is_wrong(tmp_path, tiny, tiny_encoder):
    folder = make_project(tmp_path / "p", tiny, tiny_encoder)
    config = load(folder / "params.yaml")
    said = pipeline.check(folder)
    assert (
        "8 episodes" in said
        and "cameras observation.images.top" in said
        and said.endswith("nothing is wrong with these")
    )
    marks, fixes = (config.paths.resolve(name) for name in (config.annotate.marks, config.verify.corrections))
    values = yaml.safe_load((folder / "params.yaml").read_text())
    values["annotate"]["dense_subtasks"][0] = "renamed"
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    fixes.parent.mkdir(exist_ok=True)
    fixes.write_text("dataset: another\ncorrections:\n  - {episode: 1, verdict: reject}\n")
    with pytest.raises(SystemExit) as stopped:
        pipeline.check(folder)
    assert f"{marks.name}, episode" in str(stopped.value) and "was renamed" in str(stopped.value)
    assert f"{fixes.name} is about another dataset" in str(stopped.value)


def test_check_knows_corrections_that_cannot_be_used_whatever_is_annotated(in_project):
    config, dataset = in_project
    path, episode = config.paths.resolve(config.verify.corrections), dataset.episodes[1]
    stored = config.paths.read("annotations", "01")
    given = annotations.load_one(stored / annotations.file_name(1), annotations.vocabulary(config))
    wrong = {"dense": (annotations.Segment("nobody", 0, episode.length - 1),)}
    try:
        corrections.record_correction(path, dataset, corrections.of_now(given, "accept"))
        said = pipeline.check(Path.cwd())
        assert (
            "corrections: 1\nof these wait for a new look, by what was annotated last: none\nnothing is wrong" in said
        )
        stored.rename(stored.with_name("hidden"))
        assert "nothing is annotated by these values yet" in pipeline.check(Path.cwd())
        corrections.record_correction(path, dataset, corrections.of_now(given, "fix", wrong))
        with pytest.raises(SystemExit, match=r"corrections\.yaml, episode 1: .*nobody"):
            pipeline.check(Path.cwd())
    finally:
        if stored.with_name("hidden").exists():
            stored.with_name("hidden").rename(stored)
        path.unlink()


def test_splits_are_part_of_what_a_dataset_is(tmp_path, tiny, tiny_encoder):
    folder = make_project(tmp_path / "p", tiny, tiny_encoder)
    before = pipeline.describe_dataset(load(folder / "params.yaml"))
    info = read_json(folder / "data/tiny/meta/info.json")
    info["splits"] = {"train": "0:6", "val": "6:7", "test": "7:8"}
    (folder / "data/tiny/meta/info.json").write_text(json.dumps(info))
    after = pipeline.describe_dataset(load(folder / "params.yaml"))
    assert after == {**before, "splits": info["splits"]} and before["splits"] != after["splits"]


def test_labels_mended_in_the_dataset_are_seen_where_they_are_asked_for(tmp_path, tiny, tiny_encoder):
    folder = make_project(tmp_path / "p", tiny, tiny_encoder)
    (table,) = sorted((folder / "data/tiny").glob("meta/episodes/**/*.parquet"))
    asked = {"annotate.annotator": "dataset"}

    def seen(overrides=None):
        config = load(folder / "params.yaml", overrides)
        return pipeline.describe_dataset(config), pipeline.describe_labels(config)

    (before, labels), (_, unasked) = seen(asked), seen()
    rows = pq.read_table(table)
    pq.write_table(rows.append_column("sparse_subtask_names", pa.array([["a"]] * len(rows))), table)
    assert seen(asked)[0] == before and seen(asked)[1] != labels
    assert unasked is seen()[1] is None
    assert seen({"annotate.second_opinion": "dataset"})[1] == seen(asked)[1]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2026-11-26: x\n", "corrections.yaml says what no file of ours can say"),
        ("dataset: [", "corrections.yaml is not YAML"),
    ],
)
def test_a_file_of_people_that_cannot_be_read_is_said_before_anything_runs(tmp_path, tiny, tiny_encoder, text, found):
    folder = make_project(tmp_path / "p", tiny, tiny_encoder)
    (folder / "corrections.yaml").write_text(text)
    (folder / "params.yaml").write_text(
        re.sub(r"corrections: .*", "corrections: corrections.yaml", (folder / "params.yaml").read_text(), count=1)
    )
    asked = subprocess.run(
        [sys.executable, "-m", "sarm_lib.pipeline", "sources"], cwd=folder, capture_output=True, text=True
    )
    assert asked.returncode == 1 and found in asked.stderr and "Traceback" not in asked.stderr


@pytest.fixture(scope="module")
def nbval(tmp_path_factory, tiny, tiny_encoder):
    """Every notebook under nbval in a tiny project; it runs beside `dvc repro`, for both are mostly waiting for imports."""
    folder = make_project(tmp_path_factory.mktemp("nbval") / "p", tiny, tiny_encoder)
    pages.expect(folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "nbval.txt").open("w") as output:
        process = subprocess.Popen(pages.nbval("notebooks"), cwd=folder, stdout=output, stderr=output, env=environment)
    yield process, folder / "nbval.txt"
    process.kill()


@pytest.fixture(scope="module")
def repository(tmp_path_factory, tiny, tiny_encoder, nbval) -> Path:
    """A tiny project under git and DVC in which `dvc repro` has run."""
    folder = make_project(tmp_path_factory.mktemp("dvc") / "p", tiny, tiny_encoder)
    shutil.copytree(ROOT / "sarm_lib", folder / "sarm_lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", folder)
    (folder / "benchmarks").mkdir()
    for name in ("scorecard", "experiment"):
        shutil.copy(ROOT / f"benchmarks/{name}.json", folder / "benchmarks")
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "config", "core.analytics", "false"]):
        run(folder, *command)
    run(folder, "dvc", "repro", "-q")
    return folder


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def stages_that_ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def written(path: Path) -> int:
    return path.stat().st_mtime_ns


def test_every_notebook_says_under_nbval_what_is_stored(repository, nbval):
    process, output = nbval
    assert process.wait(timeout=900) == 0, output.read_text()[-6000:]
    notebooks = [nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4) for name in chapters()]
    cells = sum(cell.cell_type == "code" for notebook in notebooks for cell in notebook.cells)
    assert f"{cells} passed" in output.read_text()


def test_every_output_of_the_design_is_there(repository):
    outputs = repository / "outputs"
    for name in (
        "embeddings", "annotations", "dataset/meta", "sarm/config.json", "sarm/model.safetensors", "figures", "reports",
        "sarm_progress.parquet", "rabc_weights.parquet", "episode_ranking.csv", "policy/rabc", "policy/bc",
        *(f"metrics/{s}.json" for s in ("prepare", "annotate", "verify", "sarm", "scorecard", "rabc", "policy", "evaluate")),
        *(f"reports/{name}.html" for name in chapters()),
    ):  # fmt: skip
        assert (outputs / name).exists(), name
    videos = [path for path in (outputs / "dataset/videos").rglob("*") if path.is_file()]
    assert videos and all(path.is_symlink() for path in videos)
    left = {path.name for path in (outputs / "work").glob("*")}
    assert left <= {"annotations"}  # nothing unfinished; what annotators answered is kept


def test_other_processes_make_the_same_bytes(repository, project):
    """DVC's kernels, and this process."""
    here, there = digests(project), digests(repository, "reports", "sources")
    assert len(here) > 30 and [name for name in here if here[name] != there.get(name)] == []
    assert [name for name in there if name not in here and not name.endswith(".gitignore")] == []


def test_a_second_run_and_a_saved_notebook_run_nothing(repository):
    assert stages_that_ran(run(repository, "dvc", "repro")) == ["sources"]
    path = repository / "notebooks/03_train_sarm.ipynb"
    notebook = nbformat.read(path, as_version=4)
    next(c for c in notebook.cells if c.cell_type == "markdown").source += " (read)"
    code = next(c for c in notebook.cells if c.cell_type == "code")
    code.outputs, code.execution_count = [nbformat.v4.new_output("stream", text="saved in Lab")], 7
    tagged = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    tagged.source = 'params_file = "params.yaml"\noverrides = {"sarm.steps": 3}'
    nbformat.write(notebook, path)
    assert stages_that_ran(run(repository, "dvc", "repro")) == ["sources"]


def test_another_kappa_scores_nothing_again_and_retrains_only_what_uses_the_weights(repository):
    outputs = repository / "outputs"
    page = outputs / "reports/05_compute_rabc.ipynb"
    kept = [outputs / "policy/bc/provenance.json", outputs / "sarm/model.safetensors"]
    before, progress = [written(path) for path in kept], (outputs / "sarm_progress.parquet").read_bytes()
    assert "scored 135 frames" in page.read_text()
    weighted = written(outputs / "policy/rabc/provenance.json")
    params = repository / "params.yaml"
    delta = pd.read_parquet(outputs / "rabc_weights.parquet").delta
    kappa = float(delta[delta > 0].median())  # the tiny model's progress hardly moves: a κ that divides its frames
    was = params.read_text()
    assert "kappa: auto" in was
    params.write_text(was.replace("kappa: auto", f"kappa: {kappa:.9f}"))
    ran = stages_that_ran(run(repository, "dvc", "repro", "06_train_pi0"))
    assert ran == ["sources", "05_compute_rabc", "06_train_pi0"]
    assert (
        run(repository, "dvc", "status", "--quiet", "06_train_pi0")
        == ""
        != run(repository, "dvc", "status", "07_evaluate")
    )
    assert "kept the progress of 135 frames" in page.read_text() and "scored" not in page.read_text()
    assert [written(path) for path in kept] == before and (outputs / "sarm_progress.parquet").read_bytes() == progress
    assert written(outputs / "policy/rabc/provenance.json") > weighted


def test_a_failing_page_names_the_error_and_leaves_no_broken_report(repository, tmp_path):
    copy = shutil.copytree(repository, tmp_path / "p", symlinks=True)
    params = copy / "params.yaml"
    params.write_text(params.read_text().replace("state_key: observation.state", "state_key: observation.joints"))
    done = subprocess.run(
        [sys.executable, "-m", "sarm_lib.pipeline", "run", "00_prepare"], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode != 0 and "its vectors are observation.state, action" in done.stderr
    assert (copy / "outputs/reports/00_prepare.failed.ipynb").exists()
    assert (copy / "outputs/reports/00_prepare.ipynb").read_bytes() == (
        repository / "outputs/reports/00_prepare.ipynb"
    ).read_bytes()


def names(value) -> set[str]:
    """Every key of nested JSON."""
    inner = value.items() if isinstance(value, dict) else ()
    return {name for key, below in inner for name in (key, *names(below))}


def test_metrics_are_small_and_carry_no_timings(repository):
    """How long a run took would make every run's metrics differ; lengths within an episode are results."""
    for path in (repository / "outputs/metrics").glob("*.json"):
        committed = ROOT / "outputs/metrics" / path.name
        large = path.name == "scorecard.json"  # every row, kind and interval: an output, whose headline is the metric
        assert path.stat().st_size < 50_000 and (large or committed.stat().st_size < 50_000), path.name
        timing = re.compile(r"elapsed|wall|duration|runtime|per_second|timestamp|^seconds$|^time$")
        assert not [name for name in names(json.loads(path.read_text())) if timing.search(name)], path
    assert "mse_target_sparse" in run(repository, "dvc", "metrics", "show")
