"""Does RA-BC help, and how much of the way to an oracle does it go? (`make experiment`, resumable)

    python -m benchmarks.experiment [--arms bc rabc ...] [--seeds 0 1 2 3 4] [--jobs 2] [--kind test|tune] [--steps N]
    python -m benchmarks.experiment --begin         # `make experiment`: results of other code or data are put aside
    python -m benchmarks.experiment --policy pi05 --arms bc rabc            # a second policy
    python -m benchmarks.experiment --arms rabc_single top_k                # more arms; runs that are stored stay
    python -m benchmarks.experiment --arms rabc shuffled --anew             # these again, by other weights; other arms stay
    python -m benchmarks.experiment --arms                                  # none: the table of what is stored
    python -m benchmarks.experiment --film docs/rollouts.gif --seeds 0      # the first starts, by policies that are trained

The same policy, data and training budget for every arm; an arm decides only how often each training frame is drawn
(`policy.weighting: sampling`, equal in expectation to scaling losses by Eq 7). Training seeds and starts are paired: the
k-th policies of all arms begin with the same weights and take the same random numbers, and all act from the same starts.

bc               every frame alike
rabc             the weights of notebook 05
oracle           1 for productive and recovering frames, 0 for injected and dead ones, by the simulator's labels
shuffled         the weights of rabc, each given to another frame
success_filter   the frames of episodes that succeeded
rabc_single      as rabc, by a reward model of one stage (`make scorecard` trains it)
duration_filter  the faster half of the episodes that succeeded
top_k            as much of the data as rabc keeps, by highest r
clean_only       the episodes without an imperfection

Runs of other code, weights or parameters are never mixed within an arm, and arms of other code are not compared: to add seeds
to what is stored, run at the commit that it names (`git worktree add ../experiment <commit>`).

oracle, success_filter, duration_filter and clean_only know the simulator's truth: they are references, and nothing reads
what they leave. The second policy is LeRobot's π0.5 with towers as small as π0's (`small_pi05`), with a budget of its own. Starts
of `--kind tune` choose the budgets and are never reported; those of `test` choose nothing.
"""

import argparse
import concurrent.futures
import functools
import inspect
import json
import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ARMS = ("bc", "rabc", "oracle", "shuffled", "success_filter", "rabc_single", "duration_filter", "top_k", "clean_only")
STARTS = {
    "tune": range(50_000, 50_050),
    "test": range(60_000, 60_100),
}  # seeds of the simulator; the dataset's are below
POLICY = {  # beside params.yaml's: the same for every arm
    "policy.weighting": "sampling",
    "policy.steps": 2000,
    "policy.warmup_steps": 100,
    "policy.ema_decay": 0.995,
    "policy.save_every": 500,
    "policy.log_every": 50,
}
TOWERS = {"depth": 3, "vision_depth": 1, "expert_width": 64}  # as `policy.config` of params.yaml has them
PI05 = {  # the same again for the second policy, which learns more slowly
    "policy.type": "pi05",
    "policy.config": {"image_resolution": [128, 128], "tokenizer_max_length": 24},
    "policy.steps": 4000,
}
ENVIRONMENTS = 20  # that act together
SINGLE_STAGE = "scratch/scorecard/single_stage"  # the reward model of one stage, that `make scorecard` trains


def arm_weights(arm: str, seed: int, config, demos, work: Path):
    """The weight of every row of the dataset, (N,) float32; None for plain BC."""
    import numpy as np

    from sarm_lib import dataset, rabc

    if arm == "bc":
        return None
    train = dataset.rows_of(demos.split("train"))
    table = dataset.episode_table(demos)
    path = config.paths.read("rabc_weights.parquet", "05_compute_rabc")
    ours, r = rabc.weights_of_rows(path, config, demos)
    if arm == "rabc":
        return ours
    if arm == "rabc_single":
        return single_stage_weights(config, demos, work)
    weight = np.zeros(demos.num_frames, dtype=np.float32)
    if arm == "shuffled":
        weight[train] = np.random.default_rng([seed, 11]).permutation(ours[train])
        return weight
    if arm == "oracle":
        quality = demos.truth("quality", config.base.truth_prefix)
        return np.isin(quality, (0, 2)).astype(np.float32)
    if arm == "top_k":
        kept = train[np.argsort(-r[train], kind="stable")[: round(len(train) * ours[train].mean())]]
        weight[kept] = 1
        return weight
    success = demos.truth("success", config.base.truth_prefix)
    episodes = [e for e in demos.split("train") if success[e.rows].any()]
    if arm == "duration_filter":
        episodes = sorted(episodes, key=lambda e: (e.length, e.index))[: len(episodes) // 2]
    if arm == "clean_only":
        clean = set(table[table.group == "clean"].episode)
        episodes = [e for e in demos.split("train") if e.index in clean]
    weight[dataset.rows_of(episodes)] = 1
    return weight


def single_stage_weights(config, demos, work: Path):
    """Weights by the reward model of one stage that `make scorecard` trains, with the same Δ and the same rule for κ."""
    from sarm_lib import checkpoint, encoder, progress, rabc

    model = checkpoint.load_reward_model(config.paths.read(SINGLE_STAGE, "make scorecard"), "cpu")
    same = settled(config) | {"head_mode": "sparse"}
    config = config.model_copy(update={"rabc": config.rabc.model_copy(update=same)})
    other = config.rabc_embeddings(demos) if config.rabc.dataset else None
    embeddings = encoder.open_embeddings(other or config.paths.read("embeddings", "00_prepare"), demos)
    path = work / "single_stage.parquet"
    progress.ensure_progress(path, config, demos, embeddings, model, "single_stage")
    return rabc.from_params(path, config, demos, embeddings.fingerprint).weight


def settled(config) -> dict:
    """Δ and the rule for κ that the weights of notebook 05 were made with."""
    from sarm_lib import artifacts, rabc

    made = artifacts.read_provenance(config.paths.read("rabc_weights.parquet", "05_compute_rabc"))[rabc.SETTLED]
    return {"delta_frames": made["delta_frames"], "kappa": made["kappa_rule"]}


def end_with_parent() -> None:
    """A worker whose parent was killed would train on for hours, unseen."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@functools.cache
def materials(overrides: str, device: str):
    """What every run of a process shares: parameters, dataset, frames at the policy's resolution."""
    from benchmarks import small_pi05
    from sarm_lib import corrections, dataset, params, policy

    config = params.load("params.yaml", json.loads(overrides)).weighing
    if config.policy.type == "pi05":
        small_pi05.shrink(TOWERS)
    demos = corrections.without_rejected(dataset.from_params(config), config)
    return config, demos, policy.frames_for(config.policy, demos, ("train",), device)


def run(arm: str, seed: int, kind: str, overrides: str, device: str, work: str) -> dict:
    """Train one policy and let it act; what was done before is read."""
    import torch

    from demo.simulator import TASK
    from sarm_lib import artifacts, evaluate, policy

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config, demos, frames = materials(overrides, device)
    start = time.perf_counter()
    trained = policy.Arm(arm, arm_weights(arm, seed, config, demos, Path(work)))
    folder = Path(work) / f"{arm}-{seed}"
    curve = policy.train_arm(trained, config, demos, frames, device, folder / "policy", seed)
    seconds = time.perf_counter() - start
    result = folder / f"{kind}.json"
    origin = {
        "policy": artifacts.read_json(folder / "policy" / artifacts.PROVENANCE),
        "starts": [STARTS[kind].start, STARTS[kind].stop],
        "code": code(config),
    }
    if result.exists() and artifacts.read_json(result)["made_from"] == origin:
        return artifacts.read_json(result)
    make = evaluate.environment("demo.environment:AssemblyEnv")
    start = time.perf_counter()
    environments = evaluate.open_environments(make, ENVIRONMENTS)
    loaded = policy.load(folder / "policy", device)
    most = environments[0]._max_episode_steps
    done = list(evaluate.rollouts(loaded, environments, STARTS[kind], most, TASK, quiet=True))
    evaluate.close(environments)
    found = {
        "seed": seed,
        **evaluate.summary(done, demos.fps),
        "succeeded": [int(r.success) for r in done],
        "frames": [r.frames for r in done],
        "train_loss": curve[-1]["loss"],
        "seconds": {"training": round(seconds, 1), "acting": round(time.perf_counter() - start, 1)},
        "made_from": origin,
    }
    artifacts.write_json(result, found)
    return found


def code(config) -> str:
    """Names what trains, weights and acts: the library's, the demo's simulator, the arms and, where it acts, the second policy."""
    from sarm_lib import artifacts

    ours = [artifacts.code_digest("policy"), artifacts.code_digest("evaluate")]
    demo = [artifacts.file_digest(Path("demo") / f"{name}.py") for name in ("environment", "simulator")]
    demo += [artifacts.file_digest(Path("benchmarks/small_pi05.py"))] if config.policy.type == "pi05" else []
    return artifacts.digest(*ours, *demo, inspect.getsource(arm_weights), inspect.getsource(single_stage_weights))


def commit() -> str | None:
    """The checkout's commit, with a mark where files differ from it; None without git."""
    try:
        found = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
        return subprocess.run(found, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def made_from(arm: str, config) -> dict:
    """What all runs of an arm have in common: the weights, if it reads any, the parameters of `params.yaml` and the code, by
    its digest and by the commit to go back to."""
    from sarm_lib import artifacts, rabc

    source, parameters = None, [config.policy.model_dump()]
    if arm in ("rabc", "shuffled", "top_k"):
        source = rabc.weights_digest(config.paths.read("rabc_weights.parquet", "05_compute_rabc"))
    if arm == "rabc_single":
        source = artifacts.folder_digest(config.paths.read(SINGLE_STAGE, "make scorecard"))
        parameters += [config.rabc.model_dump(), settled(config)]  # the other arms are named by their weights
    return {
        "weights": source,
        "parameters": artifacts.digest(*parameters),
        "code": code(config),
        "commit": commit(),
    }


def report(runs: dict[str, dict[int, dict]], common: dict, origins: dict[str, dict]) -> dict:
    """Success of every arm, and its difference from plain BC, from shuffled weights and from the duration filter where the same
    code trained both, with intervals. common: what all arms share; origins: what `made_from` says of each."""
    import numpy as np

    from sarm_lib import statistics

    def alike(*arms: str) -> bool:
        return len({origins[arm]["code"] for arm in arms}) == 1

    arms = {}
    for arm, by_seed in sorted(runs.items(), key=lambda item: ARMS.index(item[0])):
        rows = [by_seed[seed] for seed in sorted(by_seed)]
        successes, rollouts = sum(r["successes"] for r in rows), sum(r["rollouts"] for r in rows)
        arms[arm] = {
            "made_from": origins[arm],
            "runs": [
                {key: r[key] for key in ("seed", "successes", "rollouts", "median_seconds", "train_loss")}
                | {"succeeded": "".join(map(str, r["succeeded"]))}
                for r in rows
            ],
            "success_rate": successes / rollouts,
        }
        for other in ("bc", "shuffled", "duration_filter"):
            shared = sorted(set(by_seed) & set(runs.get(other, {})))
            if arm != other and shared and alike(arm, other):
                mine, theirs = (np.array([r[s]["succeeded"] for s in shared]) for r in (by_seed, runs[other]))
                arms[arm][f"over_{other}"] = statistics.paired_difference(mine, theirs)
    shared = set.intersection(
        *(set(runs.get(arm, {})) for arm in ("bc", "rabc", "oracle"))
    )  # seeds that all three have
    bc, ours, oracle = (
        (sum(runs[arm][s]["successes"] for s in shared) for arm in ("bc", "rabc", "oracle")) if shared else (0, 0, 0)
    )
    if oracle != bc and alike("bc", "rabc", "oracle"):
        arms["rabc"]["gap_closed"] = (ours - bc) / (oracle - bc)
    return {**common, "arms": arms}


def film(
    path: Path, arms: list[str], seed: int, kind: str, device: str, work: Path, shown: int = 5, every: int = 3
) -> None:
    """The policies of one training seed from the first starts, side by side: a picture every so many frames. A rollout that
    has ended stays on its last picture, framed blue for a success and orange for a failure."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    from demo.simulator import TASK
    from sarm_lib import charts, evaluate, policy

    make = evaluate.environment("demo.environment:AssemblyEnv")
    environments = evaluate.open_environments(make, ENVIRONMENTS)
    most, done = environments[0]._max_episode_steps, {}
    for arm in arms:  # as many together as were measured, so that these are the same rollouts
        loaded = policy.load(work / f"{arm}-{seed}" / "policy", device)
        starts = STARTS[kind][:ENVIRONMENTS]
        done[arm] = list(evaluate.rollouts(loaded, environments, starts, most, TASK, record=True))[:shown]
    evaluate.close(environments)
    rolled = [r for rows in done.values() for r in rows]
    camera = next(iter(rolled[0].images))
    tile, left, font = rolled[0].images[camera].shape[1], 90, ImageFont.load_default(size=15)
    pages = []
    for t in range(0, max(r.frames for r in rolled) + every, every):
        page = Image.new("RGB", (left + shown * (tile + 4), len(arms) * (tile + 4)), "white")
        draw = ImageDraw.Draw(page)
        for row, arm in enumerate(arms):
            draw.text(
                (4, row * (tile + 4) + tile // 2), {"bc": "plain BC", "rabc": "RA-BC"}.get(arm, arm), "black", font
            )
            for column, r in enumerate(done[arm]):
                x, y, images = left + column * (tile + 4), row * (tile + 4), r.images[camera]
                page.paste(Image.fromarray(np.asarray(images[min(t, len(images) - 1)])), (x, y))
                if t >= len(images) - 1:
                    colour = charts.PREDICTED if r.success else charts.ACCENT
                    draw.rectangle((x, y, x + tile - 1, y + tile - 1), outline=colour, width=6)
        pages.append(page)
    charts.save_film(path, pages, len(pages) * every / 40)


def stored(
    results: Path, common: dict, origins: dict[str, dict], again: Sequence[str] = ()
) -> tuple[dict[str, dict[int, dict]], dict[str, dict]]:
    """The runs that the results file has, by arm and seed, and what each arm was made from.

    origins: of the arms that are to run; again: those of them whose runs are left out, as they begin anew. Exits where the
    file is of other settings or data, or an arm would be continued with other weights or code: it would be an average over
    what is not one thing.
    """
    if not results.exists():
        return {}, origins
    found = json.loads(results.read_text())
    other, commits = differences(found, common, origins, again)
    if other:
        where = (
            f", or go on at commit {', '.join(commits)} (git worktree add ../experiment <commit>)" if commits else ""
        )
        raise SystemExit(
            f"{results.name} has runs with other {', '.join(other)}: --anew runs these arms again, --begin puts the file aside{where}"
        )
    stays = {arm: value["made_from"] for arm, value in found["arms"].items() if arm not in again}
    runs = {
        arm: {run["seed"]: run | {"succeeded": [int(s) for s in run["succeeded"]]} for run in value["runs"]}
        for arm, value in found["arms"].items()
        if arm not in again
    }
    return runs, {**origins, **stays}


def differences(
    found: dict, common: dict, origins: dict[str, dict], again: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """In what the runs of a results file differ from those to come, which would be mixed with them; and their commits."""
    differing = [
        (arm, key)
        for arm, value in found["arms"].items()
        if arm in origins and arm not in again
        for key in origins[arm].keys() - {"commit"}
        if value["made_from"].get(key) != origins[arm][key]
    ]
    other = [key for key in common if found.get(key) != common[key]] + [f"{key} in {arm}" for arm, key in differing]
    commits = {str(found["arms"][arm]["made_from"].get("commit")) for arm, _ in differing} - {"None"}
    return sorted(other), sorted(commits)


def put_aside(results: Path) -> Path:
    """Rename a results file by the commit of its first arm that names one; says where it is now."""
    commits = [value["made_from"].get("commit") for value in json.loads(results.read_text())["arms"].values()]
    name = f"{results.stem}_{next(filter(None, commits), 'before')}"
    aside, count = results.with_stem(name), 1
    while aside.exists():
        aside, count = results.with_stem(f"{name}-{count}"), count + 1
    return results.rename(aside)


def table(found: dict) -> str:
    """The results as Markdown."""
    lines = ["| arm | successes | rate | over plain BC (95 %) |", "|---|---|---|---|"]
    for arm, value in found["arms"].items():
        successes, rollouts = (sum(r[key] for r in value["runs"]) for key in ("successes", "rollouts"))
        over = value.get("over_bc")
        text = (
            f"{over['difference']:+.3f} ({over['difference_low']:+.3f} … {over['difference_high']:+.3f})"
            if over
            else ""
        )
        lines.append(f"| `{arm}` | {successes} of {rollouts} | {value['success_rate']:.3f} | {text} |")
    codes = {}
    for arm, value in found["arms"].items():
        codes.setdefault(value["made_from"]["code"], []).append(f"`{arm}`")
    if len(codes) > 1:
        lines += [
            "",
            "Trained by different versions of the code, and not compared: "
            + "; ".join(", ".join(arms) for arms in codes.values())
            + ".",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS[:5]))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)))
    parser.add_argument("--policy", choices=("small_pi0", "pi05"), default="small_pi0")
    parser.add_argument("--kind", choices=STARTS, default="test")
    parser.add_argument("--steps", type=int, help="the training budget, if not the policy's")
    parser.add_argument("--set", nargs="*", default=[], help="other parameters, as policy.batch_size=64")
    parser.add_argument("--device", help="base.device of params.yaml if not said")
    parser.add_argument("--jobs", type=int, help="runs at a time: on a CPU a core each, on a GPU one, if not said")
    parser.add_argument("--work", default="outputs/work/experiment")
    parser.add_argument(
        "--anew", action="store_true", help="keep the other arms of the results file, and run all seeds of these again"
    )
    parser.add_argument(
        "--begin",
        action="store_true",
        help="put a results file of other code, weights or data aside, and begin a new one",
    )
    parser.add_argument(
        "--film", type=Path, help="where to put a moving picture of bc and rabc, instead of running anything"
    )
    arguments = parser.parse_args()
    from sarm_lib import dataset, params

    arguments.device = dataset.pick_device(arguments.device or params.load("params.yaml").base.device)
    arguments.jobs = arguments.jobs or (max(1, os.cpu_count() or 1) if arguments.device == "cpu" else 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))
    results, work = Path(__file__).with_suffix(".json"), Path(arguments.work)
    if arguments.film:
        where = arguments.kind, arguments.device, work
        return film(arguments.film, ["bc", "rabc"], arguments.seeds[0], *where)
    given = {key: json.loads(value) for key, value in (item.split("=", 1) for item in arguments.set)}
    if arguments.policy != "small_pi0":
        results, work = results.with_stem(f"{results.stem}_{arguments.policy}"), work / arguments.policy
        given = {**PI05, **given}
    given |= {"policy.steps": arguments.steps} if arguments.steps else {}
    settings = {**POLICY, **given, "base.outputs": "outputs"}
    overrides = json.dumps(settings, sort_keys=True)
    jobs = [(arm, seed) for seed in arguments.seeds for arm in arguments.arms]
    config = params.load("params.yaml", settings).weighing
    # notebook 07 shows results of its own dataset alone
    common = {"settings": settings, "fingerprint": dataset.from_params(config).fingerprint}
    origins = {arm: made_from(arm, config) for arm in arguments.arms}
    reported, again = arguments.kind == "test", arguments.arms if arguments.anew else ()
    begin = arguments.begin and reported and results.exists()
    begin = begin and bool(differences(json.loads(results.read_text()), common, origins, again)[0])
    runs, origins = stored(results, common, origins, again) if reported and not begin else ({}, origins)
    jobs = [(arm, seed) for arm, seed in jobs if seed not in runs.get(arm, {})]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, context, end_with_parent) as pool:
        futures = {
            pool.submit(run, arm, seed, arguments.kind, overrides, arguments.device, str(work)): (arm, seed)
            for arm, seed in jobs
        }
        for future in concurrent.futures.as_completed(futures):
            arm, seed = futures[future]
            done = future.result()
            runs.setdefault(arm, {})[seed] = done
            print(f"{arm} {seed}: {done['successes']} of {done['rollouts']}, {done['seconds']}", flush=True)
            if begin:  # only now: until then DVC and notebook 07 need the file that is there
                print(f"results of other code, weights or data: {put_aside(results).name}")
                begin = False
            if reported:
                results.write_text(json.dumps(report(runs, common, origins), indent=1) + "\n")
    found = report(runs, common, origins)
    if reported and not begin:
        results.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
