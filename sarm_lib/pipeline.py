"""How the notebooks run as DVC stages.

    python -m sarm_lib.pipeline sources          what stages depend on: notebooks without outputs, the dataset's name
    python -m sarm_lib.pipeline run 03_train_sarm
    python -m sarm_lib.pipeline check            what params.yaml, marks and corrections say, and what is wrong with them; runs nothing
    python -m sarm_lib.pipeline smoke            ten episodes through every notebook, on one page, outputs/scratch/smoke
    python -m sarm_lib.pipeline export           the progress file into outputs/dataset, where lerobot-train looks for it

Saving a notebook changes its file but not its code, so stages depend on the code alone. papermill runs the page with the
values of `params.yaml`, whatever overrides somebody saved in its `parameters` cell; a run that fails leaves its report
beside the good one as `NN_name.failed.ipynb`.
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from traitlets.config import Config

from sarm_lib import annotations, corrections, lerobot_io, live, reports
from sarm_lib import dataset as datasets
from sarm_lib.annotations import AnnotationError
from sarm_lib.artifacts import digest, file_digest, folder_digest, folder_identity, read_json, staged, write_json
from sarm_lib.dataset import DatasetError
from sarm_lib.params import ParamsError, find_upwards, load

log = logging.getLogger("sarm")

# Small values for a first look at a dataset: every stage, about a minute.
SMOKE = {
    "base.episodes": 10,
    "base.outputs": "outputs/scratch/smoke",
    "annotate.annotator": "keyframes",  # needs neither marks nor a large model
    "annotate.second_opinion": None,
    "annotate.repeats": 0,
    "sarm.steps": 20,
    "sarm.log_every": 5,
    "sarm.eval_every": 10,
    "sarm.save_every": 10,
    "sarm.warmup_steps": 5,
    "sarm.batch_size": 8,
    "visualize.stride": 5,
    "rabc.stride": 5,
    "policy.steps": 4,
    "policy.batch_size": 4,
    "policy.log_every": 2,
    "policy.warmup_steps": 1,
    "policy.save_every": 1000,
    "evaluate.environment": None,
}


OURS = (ParamsError, DatasetError, AnnotationError)  # errors that say what to do: of params.yaml, or of what it names


def notebooks(root: Path) -> list[Path]:
    """The chapters, in order."""
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def code_of(notebook: Path) -> str:
    """The code cells of a notebook, as one text; neither prose nor outputs nor the `parameters` cell are part of it."""
    cells = nbformat.read(notebook, as_version=4).cells
    code = [cell.source.rstrip() for cell in cells if cell.cell_type == "code" and not _has_parameters(cell)]
    return "\n\n".join(code) + "\n"


def _has_parameters(cell: nbformat.NotebookNode) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def write_sources(root: Path) -> None:
    """Write `outputs/sources/NN_name.py` for every notebook and, as JSON, what the dataset and the models named by
    `params.yaml` are, and what people said."""
    params = load(root / "params.yaml")
    folder = params.paths.write("sources")
    with staged(folder) as partial:
        partial.mkdir()
        for notebook in notebooks(root):
            (partial / f"{notebook.stem}.py").write_text(code_of(notebook))
        described = describe_dataset(params)
        write_json(partial / "rabc_dataset.json", describe_dataset(params.weighing) if params.rabc.dataset else None)
        write_json(partial / "dataset.json", described)
        write_json(partial / "labels.json", describe_labels(params))
        check_people(params, described["fingerprint"])
        for kind, path in (("marks", params.annotate.marks), ("corrections", params.verify.corrections)):
            write_json(partial / f"{kind}.json", corrections.contents(params.paths.resolve(path)))
        for name, path in (("reward_model", params.rabc.reward_model_path), ("policy", params.policy.pretrained_path)):
            files = folder_identity(params.paths.resolve(path)) if path else None
            write_json(partial / f"{name}.json", {"path": path, "files": files})
        others = {name: folder_identity(params.paths.resolve(path)) for name, path in params.evaluate.policies.items()}
        write_json(partial / "policies.json", others)
        taken = params.rabc.progress_path and params.paths.resolve(params.rabc.progress_path)
        write_json(partial / "progress.json", {"file": file_digest(taken) if taken and taken.is_file() else None})
        write_json(partial / "environment.json", describe_environment(root, params.evaluate.environment))
        write_json(
            partial / "encoder.json", {"encoder": params.prepare.encoder, "identity": folder_digest(params.encoder)}
        )


def check_people(params, fingerprint: str | None) -> None:
    """Stop before anything runs where marks or corrections are about another local dataset: both are told at once."""
    asked = {"corrections": params.verify.corrections}
    if params.base.annotation_mode != "single_stage":
        asked["marks"] = params.annotate.marks
    wrong = []
    for kind, name in asked.items():
        said = corrections.contents(path := params.paths.resolve(name))
        if fingerprint and isinstance(said, dict) and said.get("dataset") != fingerprint:  # else stages 01 and 02 tell
            wrong.append(corrections.is_about_another(path, kind, said.get("dataset"), fingerprint))
    if wrong:
        sys.exit("\n".join(wrong))


def describe_dataset(params) -> dict[str, Any]:
    """The name of the dataset and, of a local one, its fingerprint and own splits: no video is read, whatever its size."""
    local = params.paths.resolve(params.base.dataset)
    where = Path(local if local.exists() else params.base.dataset)
    there = datasets.is_local(where)
    return {
        "dataset": params.base.dataset,
        "revision": params.base.revision,
        "fingerprint": datasets.fingerprint(where) if there else None,
        "splits": read_json(where / "meta/info.json").get("splits") if there else None,
    }


def describe_labels(params) -> str | None:
    """A digest of the files in which a local dataset carries annotations, where they are asked for: its fingerprint leaves
    these out. Labels of frames count in that."""
    root = params.paths.resolve(params.base.dataset)
    if "dataset" not in (params.annotate.annotator, params.annotate.second_opinion) or not datasets.is_local(root):
        return None
    files = [*sorted(root.glob("meta/episodes/**/*.parquet")), root / "meta/subtasks.parquet"]
    return digest([file_digest(file) for file in files if file.is_file()])


def describe_environment(root: Path, name: str | None) -> dict[str, Any]:
    """The name of the simulator and, of one whose package is in the project, its code."""
    package = root / (name or "").split(":")[0].split(".")[0] if name and ":" in name else None
    files = sorted(package.rglob("*.py")) if package and package.is_dir() else []
    files += [package.with_suffix(".py")] if package and package.with_suffix(".py").is_file() else []
    return {"environment": name, "files": {f.relative_to(root).as_posix(): file_digest(f) for f in files}}


def check(root: Path) -> str:
    """What `params.yaml`, the marks and the corrections say of the dataset, in words. Exits with what is wrong in each."""
    params = load(root / "params.yaml")
    data, names = datasets.from_params(params), annotations.vocabulary(params)
    annotations.video_key(params, data)
    splits = {split: {e.index for e in data.split(split)} for split in datasets.SPLITS}
    said = [
        f"{params.base.dataset}: {len(data.episodes)} episodes ({', '.join(f'{len(e)} {s}' for s, e in splits.items())}), "
        f"{data.num_frames} frames at {data.fps:g} a second; cameras {', '.join(data.camera_keys)}; {params.base.state_key} of "
        f"{data.features[params.base.state_key]['shape'][0]} numbers",
        *(f"{head}: {', '.join(of_head)}" for head, of_head in names.items()),
    ]
    wrong = []
    try:
        marks = {mark.episode: mark for mark in corrections.marks_from_params(params, data)}
        said.append(f"marked: {', '.join(f'{len(e & set(marks))} of {s}' for s, e in splits.items())}")
        taught = {(h, s.subtask) for i in splits["train"] & set(marks) for h in names for s in marks[i].head(h)}
        lacking = [name for head, of_head in names.items() for name in of_head if (head, name) not in taught]
        asked = {params.annotate.annotator, params.annotate.second_opinion} if corrections.asked_heads(names) else set()
        if lacking and "propagate" in asked:
            wrong.append(
                f"{params.annotate.marks}: no marked training episode shows {', '.join(lacking)}, which propagate needs"
            )
        if not marks and "manual" in asked:
            wrong.append(f"{params.annotate.marks}: no episode is marked, and `manual` annotates no other ones")
    except AnnotationError as error:
        wrong.append(str(error))
    try:
        people = corrections.read_corrections(params.paths.resolve(params.verify.corrections), data)
        said.append(f"corrections: {len(people)}")
        bad = {c.episode: why for c in people if (why := corrections.unusable(c, data, names))}
        wrong += [f"{params.verify.corrections}, episode {episode}: {why}" for episode, why in bad.items()]
        if people:
            said.append(_against_annotations(params, data, names, [c for c in people if c.episode not in bad]))
    except AnnotationError as error:
        wrong.append(str(error))
    if wrong:
        sys.exit("\n".join([*said, "", *wrong]))
    return "\n".join([*said, "nothing is wrong with these"])


def _against_annotations(params, data: datasets.Dataset, names: dict, people: list) -> str:
    """Which corrections wait for a new look, by what was annotated last; that may be of other values, so it is no fault."""
    try:
        stored = annotations.load(params.paths.read("annotations", "01_annotate"), names, data)
    except (AnnotationError, FileNotFoundError):
        return "nothing is annotated by these values yet: acceptances are compared with what 01 will say"
    waiting = corrections.apply(stored, people, data, names).unsettled
    return f"of these wait for a new look, by what was annotated last: {', '.join(str(o.episode) for o in waiting) or 'none'}"


def run(root: Path, name: str) -> None:
    """Run one notebook with papermill; its executed copy and HTML land in `outputs/reports/`."""
    report = load(root / "params.yaml").paths.write(f"reports/{name}.ipynb")
    execute(root / "notebooks" / f"{name}.ipynb", report, {"params_file": "params.yaml", "overrides": {}})


def smoke(root: Path) -> None:
    """Every notebook on ten episodes with few steps, one after the other in one kernel: a first look at a dataset."""
    chain, folder = nbformat.v4.new_notebook(), root / SMOKE["base.outputs"]
    for notebook in notebooks(root):
        for cell in nbformat.read(notebook, as_version=4).cells:
            cell.id = f"{notebook.stem}-{cell.id}"
            if _has_parameters(cell):
                cell.source = f'params_file = "params.yaml"\noverrides = {SMOKE!r}'
            chain.cells.append(cell)
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(chain, folder / "chain.ipynb")
    execute(folder / "chain.ipynb", folder / "smoke.ipynb", cwd=root / "notebooks")
    log.info("the whole chain runs on this dataset")


def export(root: Path, to: Path | None) -> Path:
    """Copy `sarm_progress.parquet` into the folder of its dataset, for `lerobot-train`. Returns where it is."""
    params = load(root / "params.yaml")
    if params.rabc.dataset and to is None:
        sys.exit(f"the progress is that of {params.rabc.dataset} (rabc.dataset): say where that lies, --to FOLDER")
    paths = params.paths
    target = to or paths.read("dataset", "02_verify")
    progress = paths.read("sarm_progress.parquet", "05_compute_rabc")
    return lerobot_io.export_progress(progress, target, datasets.fingerprint(target))


def execute(notebook: Path, report: Path, parameters: dict[str, Any] | None = None, cwd: Path | None = None) -> None:
    """Run `notebook` into `report` and HTML beside it. A page that fails, or whose kernel dies, is kept as
    `*.failed.ipynb`; the program exits."""
    running, failed = report.with_name(f".{report.stem}.running.ipynb"), report.with_suffix(".failed.ipynb")
    os.environ |= {live.HEADLESS: "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    start = time.monotonic()
    try:
        papermill.execute_notebook(
            notebook,
            running,
            parameters,
            cwd=str(cwd or notebook.parent),
            kernel_name="python3",
            language="python",
            progress_bar=False,
            log_output=True,
            config=Config(KernelManager={"transport": "ipc"}),  # no port, and no warning about one
        )
    except BaseException as error:
        if running.exists():
            os.replace(running, failed)
        if not isinstance(error, Exception):  # Ctrl-C
            raise
        sys.exit(f"{report.stem}: {_explain(error)}\nThe page up to the failing cell is {failed}")
    os.replace(running, report)
    failed.unlink(missing_ok=True)
    log.info("%s ran in %.0f s: %s", report.stem, time.monotonic() - start, reports.write_html(report, notebook.parent))


def _explain(error: Exception) -> str:
    """Why a page failed, in one line: an error of its own, or its kernel's end."""
    if isinstance(error, papermill.PapermillExecutionError) and error.ename in {kind.__name__ for kind in OURS}:
        return str(error.evalue)
    if isinstance(error, papermill.PapermillExecutionError):
        return f"{error.ename}: {error.evalue}"
    if isinstance(error, DeadKernelError):
        return "the kernel died; the usual reason is that memory ran out"
    return f"{type(error).__name__}: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sources")
    commands.add_parser("run").add_argument("name")
    commands.add_parser("check")
    commands.add_parser("smoke")
    commands.add_parser("export", help="put the progress file where lerobot-train looks for it").add_argument(
        "--to", type=Path, default=None, help="a folder of the same dataset; outputs/dataset if not said"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("papermill").setLevel(logging.WARNING)
    logging.getLogger("traitlets").setLevel(logging.ERROR)  # nbconvert counts images without alternative text
    root = find_upwards("params.yaml").parent
    try:
        act(arguments, root)
    except OURS as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)


def act(arguments: argparse.Namespace, root: Path) -> None:
    if arguments.command == "sources":
        write_sources(root)
    elif arguments.command == "run":
        run(root, arguments.name)
    elif arguments.command == "check":
        print(check(root))
    elif arguments.command == "export":
        print(export(root, arguments.to))
    else:
        smoke(root)


if __name__ == "__main__":
    main()
