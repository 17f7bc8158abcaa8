"""Did the weights help? Trained policies act in a simulator, on starts that no training saw.

A success rate s/n carries Wilson's 95 % interval. Two arms are compared on the same starts: their difference carries a
bootstrap 95 % interval over training seeds and starts (`statistics.paired_difference`).

Environments are Gymnasium's, with observations as LeRobot names them: `pixels` (a picture, or one a camera) and
`agent_pos`; `info["is_success"]` says when the task is done.
"""

import dataclasses
import functools
import importlib
import itertools
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import pandas as pd
import torch
from lerobot.envs.utils import preprocess_observation
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_IMAGES, OBS_STATE
from PIL import Image

from sarm_lib import charts
from sarm_lib.artifacts import read_json
from sarm_lib.checkpoint import RewardModel, reward_model_of
from sarm_lib.dataset import Dataset, Episode
from sarm_lib.encoder import Embeddings, Encoder, from_params
from sarm_lib.live import bar
from sarm_lib.policy import CachedFrames, StreamedFrames, load
from sarm_lib.progress import Scores, score
from sarm_lib.statistics import wilson
from sarm_lib.windows import FrameStore, pad_state

log = logging.getLogger("sarm")

ARMS = ("bc", "rabc")  # what notebook 06 trains
UNDERTRAINED = 0.2  # plain BC below this says little about weights


class Unavailable(RuntimeError):
    """The environment is there and cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Rollout:
    """One episode of a policy: T frames, the last of which shows how it ended."""

    seed: int
    success: bool
    frames: int  # T
    states: np.ndarray | None = None  # (T, S); None unless recorded
    images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # a camera: (T, H, W, 3) uint8


# --- acting -------------------------------------------------------------------------------------------------------------


def environment(
    name: str, options: dict[str, Any] | None = None, root: Path | None = None
) -> Callable[[], gymnasium.Env]:
    """What makes an environment: `package.module:Name`, or an id that Gymnasium knows (`gym_pusht/PushT-v0`, whose package
    is imported). root: a folder whose packages count too. Raises ValueError where there is no such thing, and Unavailable where
    there is one that cannot be imported here, such as a simulator without OpenGL."""
    options = options or {}
    if root and str(root) not in sys.path:
        sys.path.append(str(root))
    try:
        if ":" in name:
            module, attribute = name.split(":", 1)
            found = getattr(_imported(module), attribute)
            if not callable(found):
                raise ValueError(f"evaluate.environment: {name!r} is {found!r}, which makes no environment")
            return functools.partial(found, **options)
        if "/" in name:
            _imported(name.split("/", 1)[0])
        gymnasium.spec(name)
    except (ModuleNotFoundError, AttributeError, gymnasium.error.Error) as error:
        raise ValueError(f"evaluate.environment: {name!r} cannot be found ({error})") from error
    return functools.partial(
        gymnasium.make, name, disable_env_checker=True, **options
    )  # it would look at every picture


def _imported(module: str) -> ModuleType:
    """A module. Raises ModuleNotFoundError where it does not exist, and Unavailable where it fails."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # renderers raise whatever they like when they are imported
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise
        raise Unavailable(f"{module} cannot be imported here ({type(error).__name__}: {error})") from error


def open_environments(
    make: Callable[[], gymnasium.Env], number: int, rename_map: dict[str, str] | None = None
) -> list[gymnasium.Env]:
    """So many environments, each of which has shown a picture. rename_map: other names of their pictures, those that policies and
    reward models know. Raises Unavailable where they cannot run here, ValueError where they show something else than LeRobot's do,
    or do not take the options that they are given."""
    try:
        environments = [make() for _ in range(number)]
        for env in environments:
            first = env.reset(seed=0)[0]
            if known := isinstance(first, dict) and {"pixels", "agent_pos"} <= set(first):
                observe([first])
    except Exception as error:  # simulators raise whatever their renderer raises
        if isinstance(error, TypeError) and any(repr(name) in str(error) for name in getattr(make, "keywords", ())):
            raise ValueError(f"evaluate.environment_options: {error}") from error
        raise Unavailable(f"the simulator cannot run here ({type(error).__name__}: {error})") from error
    if not known:
        shown = ", ".join(first) if isinstance(first, dict) else type(first).__name__
        raise ValueError(
            f"evaluate.environment: it shows {shown}; LeRobot's environments show a dictionary with pixels and agent_pos"
        )
    if not rename_map:
        return environments
    shown = _pictures(first)
    for name, other in rename_map.items():
        if name not in shown:
            raise ValueError(f"evaluate.rename_map: the environment shows no {name!r}; it shows {', '.join(shown)}")
        if not other.startswith(f"{OBS_IMAGES}."):
            raise ValueError(f"evaluate.rename_map: {other!r} is no camera's name; those begin with {OBS_IMAGES}.")
    called = [rename_map.get(name, name) for name in shown]
    if len(set(called)) < len(called):
        raise ValueError(f"evaluate.rename_map: two pictures would have one name, of {', '.join(called)}")
    if not isinstance(environments[0], gymnasium.Env):
        raise ValueError("evaluate.rename_map: the environment is no gymnasium.Env: let it name its pictures itself")
    renamed = functools.partial(_renamed, rename_map=rename_map)
    return [gymnasium.wrappers.TransformObservation(env, renamed, None) for env in environments]


def _pictures(observation: dict[str, Any]) -> dict[str, np.ndarray]:
    """What an environment shows, under LeRobot's names."""
    pixels = observation["pixels"]
    if isinstance(pixels, np.ndarray):
        return {OBS_IMAGE: pixels}
    return {f"{OBS_IMAGES}.{camera}": picture for camera, picture in pixels.items()}


def _renamed(observation: dict[str, Any], rename_map: dict[str, str]) -> dict[str, Any]:
    pictures = {rename_map.get(name, name): picture for name, picture in _pictures(observation).items()}
    return observation | {"pixels": {name.removeprefix(f"{OBS_IMAGES}."): p for name, p in pictures.items()}}


def try_environments(params) -> tuple[list[gymnasium.Env], str | None]:
    """The environments that `params.evaluate` names, or none and why. A name that does not exist is an error (ValueError).

    A module of the project is found from any folder, such as that of the notebooks.
    """
    settings = params.evaluate
    if settings.environment is None:
        return [], "evaluate.environment names no simulator: actions are compared instead"
    try:
        make = environment(settings.environment, settings.environment_options, params.paths.root)
        number = min(settings.num_environments, settings.rollouts)
        return open_environments(make, number, settings.rename_map), None
    except Unavailable as error:
        return [], f"{error}\nActions are compared instead."


def policies(params, device: str) -> dict[str, tuple[PreTrainedPolicy, Any, Any]]:
    """The policies of notebook 06 and those that `evaluate.policies` names, with their processors, by name."""
    sources: dict[str, Path | str] = {arm: params.paths.read(f"policy/{arm}", "06_train_pi0") for arm in ARMS}
    for name, source in params.evaluate.policies.items():
        folder = params.paths.resolve(source)
        if not folder.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise FileNotFoundError(
                f"evaluate.policies: {name}: there is no folder {source}, and no Hub id looks like that"
            )
        sources[name] = folder if folder.exists() else source
    return {name: _load(name, source, device) for name, source in sources.items()}


def _load(name: str, source: Path | str, device: str) -> tuple[PreTrainedPolicy, Any, Any]:
    """Raises ValueError for what is no policy, a reward model for one. (LeRobot's loading raises a dozen kinds.)"""
    try:
        return load(source, device)
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ValueError(
            f"the policy {name!r} (notebook 06, or evaluate.policies) cannot be loaded from {source}: {said}"
        ) from error


def task_of(params, dataset: Dataset) -> str:
    """What the policies are told to do. Raises ValueError where the dataset has several tasks and `evaluate.task` names none;
    one that it does not have is told too, with a warning."""
    tasks = [task for task in dataset.tasks if task]
    if params.evaluate.task is not None and params.evaluate.task not in tasks:
        log.warning("evaluate.task: %r is none of the dataset's tasks (%s)", params.evaluate.task, "; ".join(tasks))
    if params.evaluate.task is None and len(tasks) > 1:
        listed = "; ".join(tasks)
        raise ValueError(f"evaluate.task: which of the dataset's tasks does the environment pose? They are: {listed}")
    return params.evaluate.task or next(iter(tasks), "")


def close(environments: Sequence[gymnasium.Env]) -> None:
    for env in environments:
        env.close()


def observe(observations: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Observations of B environments as one batch under LeRobot's names, pictures (B, 3, H, W) in [0, 1]."""
    batch: dict[str, Any] = {"agent_pos": np.stack([o["agent_pos"] for o in observations])}
    pixels = [o["pixels"] for o in observations]
    if isinstance(pixels[0], np.ndarray):
        batch["pixels"] = np.stack(pixels)
    else:
        batch["pixels"] = {camera: np.stack([p[camera] for p in pixels]) for camera in pixels[0]}
    return preprocess_observation(batch)


def looks_every(policy: PreTrainedPolicy) -> int:
    """How often a policy looks at what it is given: between, it acts from its queue."""
    config = policy.config
    remembers = getattr(config, "n_obs_steps", 1) > 1 or getattr(config, "temporal_ensemble_coeff", None) is not None
    return 1 if remembers else getattr(config, "n_action_steps", 1)


@torch.inference_mode()
def rollouts(
    policy: tuple[PreTrainedPolicy, Any, Any],
    environments: Sequence[gymnasium.Env],
    seeds: Sequence[int],
    max_frames: int,
    task: str,
    record: bool = False,
    quiet: bool = False,
    desc: str = "rollouts",
) -> Iterator[Rollout]:
    """Act once from every start in `seeds`, several environments at a time, in order.

    policy: with its pre- and postprocessor (`policy.load`). The policy's own noise is seeded by the starts that share a
    batch. record: keep every picture and state.
    """
    model, preprocess, postprocess = policy
    model.eval()
    looks, says_success = looks_every(model), False
    acted = bar(
        total=len(seeds) * max_frames, desc=desc, unit="frame", quiet=quiet
    )  # of a rollout that ends early, all
    for first in range(0, len(seeds), len(environments)):
        wave = list(seeds[first : first + len(environments)])
        torch.manual_seed(wave[0])
        model.reset()
        members = list(zip(environments, wave, strict=False))
        seen = [env.reset(seed=int(seed))[0] for env, seed in members]
        kept: list[list[dict[str, Any]]] = [[] for _ in members]
        success, frames = [False] * len(members), [1] * len(members)
        running, step = set(range(len(members))), 0
        if record:
            for i in running:
                kept[i].append(_copy(seen[i]))
        shown = list(seen)  # a finished environment goes on showing what it showed when the policy last looked
        batch: dict[str, Any] = {}
        while running:
            if step % looks == 0:
                shown = [_copy(seen[i]) if i in running else shown[i] for i in range(len(members))]
                seen_now = observe(shown)
                _check_fit(model, seen_now, environments[0])
                batch = preprocess({**seen_now, "task": [task] * len(members)})
            actions = postprocess(model.select_action(batch)).float().cpu().numpy()
            for i in sorted(running):
                seen[i], _, terminated, truncated, info = members[i][0].step(actions[i])
                frames[i] += 1
                acted.update()
                success[i] = bool(info.get("is_success", False))
                says_success |= "is_success" in info
                if record:
                    kept[i].append(_copy(seen[i]))
                if success[i] or terminated or truncated or frames[i] >= max_frames:
                    running.discard(i)
                    acted.update(max_frames - frames[i] + 1)  # and the first frame, which no action led to
            step += 1
        if not says_success:
            raise ValueError(
                "evaluate.environment: no step's info says `is_success`, so nobody knows which rollout succeeded; wrap the "
                "environment so that it does"
            )
        for i, (_, seed) in enumerate(members):
            yield Rollout(int(seed), success[i], frames[i], *_recorded(kept[i]))
    acted.close()


def _check_fit(policy: PreTrainedPolicy, observed: dict[str, torch.Tensor], env: gymnasium.Env) -> None:
    """Raises ValueError where a policy would act without a camera that it was trained with (some do so in silence), or was
    trained on states or actions of another size."""
    missing = [key for key in policy.config.image_features if key not in observed]
    if missing:
        shown = ", ".join(key for key in observed if "image" in key)
        raise ValueError(
            f"the policy sees {', '.join(missing)}; the environment shows {shown} (evaluate.rename_map gives pictures other names)"
        )
    taken = getattr(getattr(env, "action_space", None), "shape", None)  # not every environment says
    sizes = [("states", policy.config.robot_state_feature, observed[OBS_STATE].shape[1:])]
    sizes += [("actions", policy.config.action_feature, taken)] if taken else []
    for name, feature, found in sizes:
        if feature is not None and tuple(feature.shape) != tuple(found):
            raise ValueError(
                f"evaluate.environment: its {name} have {found[-1]} numbers, and the policy was trained on {feature.shape[0]}"
            )


def _copy(observation: dict[str, Any]) -> dict[str, Any]:
    """An observation with its pictures looked at: some environments draw them only then, and only until the next step."""
    pixels = observation["pixels"]
    looked = pixels.copy() if isinstance(pixels, np.ndarray) else {c: np.array(pixels[c]) for c in pixels}
    return {"pixels": looked, "agent_pos": np.array(observation["agent_pos"])}


def _recorded(kept: list[dict[str, Any]]) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
    if not kept:
        return None, {}
    shown = [_pictures(observation) for observation in kept]
    states = np.stack([o["agent_pos"] for o in kept]).astype(np.float32)
    return states, {key: np.stack([pictures[key] for pictures in shown]) for key in shown[0]}


# --- what the reward model says of it -----------------------------------------------------------------------------------

Judge = Callable[[Rollout], np.ndarray]  # φ of every frame of a recorded rollout


def judge_from_params(params, environment: gymnasium.Env, task: str, device: str) -> tuple[Judge | None, str | None]:
    """What scores a rollout by the reward model of notebooks 04 and 05, or none and why: where there is no reward model, and
    where it does not see what the environment shows."""
    try:
        model, _ = reward_model_of(params, device)
    except FileNotFoundError as error:
        taken = " (rabc.progress_path takes progress that somebody else computed)" if params.rabc.progress_path else ""
        return None, f"no reward model is here to score rollouts{taken}: {error}"
    encoder = from_params(params, device)

    def judge(rollout: Rollout) -> np.ndarray:
        return score_rollout(model, encoder, rollout, task)[model.spec.heads[-1]].progress

    first = [_copy(environment.reset(seed=0)[0])]
    try:
        judge(Rollout(0, False, 1, *_recorded(first)))
    except ValueError as error:
        return None, f"the reward model cannot score these rollouts: {error}"
    return judge, None


def act(
    policy: tuple[PreTrainedPolicy, Any, Any],
    environments: Sequence[gymnasium.Env],
    seeds: Sequence[int],
    max_frames: int,
    task: str,
    judge: Judge | None,
    shown: int,
    desc: str = "rollouts",
) -> tuple[list[Rollout], list[np.ndarray]]:
    """`rollouts`, and φ of each by the judge. Only those that `examples` can show keep their pictures: all frames of all of
    them are gigabytes."""
    done: list[Rollout] = []
    progress: list[np.ndarray] = []
    for rollout in rollouts(policy, environments, seeds, max_frames, task, record=True, desc=desc):
        if judge is not None:
            progress.append(judge(rollout))
        alike = sum(r.success == rollout.success for r in done)
        done.append(rollout if alike < shown else dataclasses.replace(rollout, images={}))
    return done, progress


def score_rollout(
    model: RewardModel, encoder: Encoder, rollout: Rollout, task: str, batch_size: int = 64
) -> dict[str, Scores]:
    """Progress of every frame of a recorded rollout, by head. Raises ValueError for a camera that the rollout lacks."""
    missing = [key for key in model.image_keys if key not in rollout.images]
    if missing:
        raise ValueError(
            f"the reward model sees {', '.join(missing)}; the environment shows {', '.join(rollout.images)}"
        )
    length, cameras = rollout.frames, {}
    for key in model.image_keys:
        parts = [encoder.images(rollout.images[key][i : i + batch_size]) for i in range(0, length, batch_size)]
        cameras[key] = torch.cat(parts).cpu().numpy()
    texts = encoder.texts([task]).cpu().numpy()
    embeddings = Embeddings(cameras, texts, encoder.name, encoder.identity, "rollout")
    states = pad_state(torch.from_numpy(model.normalise(rollout.states)), model.spec.max_state_dim)
    one_episode = np.zeros(length, dtype=int), np.zeros(length, dtype=int), np.full(length, length)
    store = FrameStore(embeddings, model.image_keys, states, *one_episode, model.spec.inputs)
    return score(model.sarm, store, np.arange(length), model.spec.heads)


# --- without a simulator ------------------------------------------------------------------------------------------------


@torch.no_grad()
def action_errors(
    policy: tuple[PreTrainedPolicy, Any, Any],
    frames: CachedFrames | StreamedFrames,
    episodes: Sequence[Episode],
    every: int = 8,
    batch_size: int = 32,
) -> np.ndarray:
    """Mean squared error of the actions that a policy would execute, (episodes,), in the robot's units, on every so many
    frames of each episode. Actions beyond the end of an episode do not count."""
    if not episodes:
        raise ValueError("no test episode is left to compare actions on: were all rejected in notebook 02?")
    model, preprocess, postprocess = policy
    model.eval()
    now = frames.action_deltas.index(0)  # Diffusion learns actions of the past too, and answers with those from now on
    found = []
    for episode in episodes:
        rows, squared, count = np.arange(episode.row, episode.row + episode.length, every), 0.0, 0
        for batch in frames.batches(np.array_split(rows, math.ceil(len(rows) / batch_size))):
            torch.manual_seed(0)
            model.reset()
            chunk = postprocess(_answer(model, preprocess(batch), frames.observation_deltas)).float().cpu()
            chunk = chunk[:, : getattr(model.config, "n_action_steps", None)]  # VQ-BeT, which has none, executes all
            told = slice(now, now + chunk.shape[1])
            recorded, exists = batch["action"][:, told], ~batch["action_is_pad"][:, told]
            squared += float((((chunk - recorded) ** 2).mean(-1) * exists).sum())
            count += int(exists.sum())
        found.append(squared / count)
    return np.array(found)


def _answer(model: PreTrainedPolicy, batch: dict[str, Any], deltas: tuple[int, ...] | None) -> torch.Tensor:
    """The chunk (B, n, A) that a policy answers a batch with. One that sees several frames (`deltas`) reads them from queues, which
    its `select_action` fills frame by frame; of frames of the future, which some learn to foresee, it sees none."""
    batch = {key: value for key, value in batch.items() if key != ACTION}
    if deltas is None:
        return model.predict_action_chunk(batch)
    cameras = list(model.config.image_features)
    seen = {key: batch[key] for key in (*cameras, OBS_STATE)}  # (B, T, ...)
    current = {key: value[:, deltas.index(0)] for key, value in seen.items()}
    queues = getattr(model, "_queues", {})
    if OBS_STATE not in queues:
        return model.predict_action_chunk(batch | current)
    current[OBS_IMAGES] = torch.stack([current[key] for key in cameras], dim=-4)
    seen[OBS_IMAGES] = torch.stack([seen[key] for key in cameras], dim=-4)
    for key in queues.keys() & seen.keys():
        queues[key].extend(seen[key].unbind(1))
    return model.predict_action_chunk(batch | current)


# --- figures ------------------------------------------------------------------------------------------------------------


def summary(done: Sequence[Rollout], fps: float) -> dict[str, float | int | None]:
    """Success rate with its interval, and the median time to success in seconds."""
    successes = [r for r in done if r.success]
    low, high = wilson(len(successes), len(done))
    times = [(r.frames - 1) / fps for r in successes]
    return {
        "rollouts": len(done),
        "successes": len(successes),
        "success_rate": round(len(successes) / len(done), 4),
        "success_rate_low": round(low, 4),
        "success_rate_high": round(high, 4),
        "median_seconds": round(float(np.median(times)), 3) if times else None,
    }


def conclusion(metrics: dict[str, dict]) -> str:
    """What the comparison of `rabc` with `bc` says, in words."""
    bc, ours, gap = metrics["bc"], metrics["rabc"], metrics["difference"]
    said = (
        f"rabc succeeds in {ours['successes']} of {ours['rollouts']} rollouts, bc in {bc['successes']}: a difference of "
        f"{gap['difference']:+.2f}, 95 % interval {gap['difference_low']:+.2f} to {gap['difference_high']:+.2f}"
    )
    if bc["success_rate"] < UNDERTRAINED:
        return f"{said}. Plain BC succeeds in under {UNDERTRAINED:.0%}: the policies are undertrained, and this says little (policy.steps)"
    if gap["difference_low"] <= 0 <= gap["difference_high"]:
        return f"{said}: so few rollouts cannot tell them apart"
    which = "rabc" if gap["difference"] > 0 else "bc"
    return f"{said}: this {which} is the better of these two policies; whether the weights made it so takes several training seeds"


EXPERIMENT = {
    "bc": "every frame alike",
    "rabc": "the weights of chapter 05",
    "oracle": "1 for productive and recovering frames by the simulator's labels, 0 for bad ones",
    "shuffled": "the weights of chapter 05, each given to another frame",
    "success_filter": "the frames of episodes that succeeded",
    "rabc_single": "as rabc, by a reward model of one stage",
    "duration_filter": "the faster half of the episodes that succeeded",
    "top_k": "as much of the data as rabc keeps, by highest r",
    "clean_only": "the episodes without an imperfection",
}


OF_CHAPTER_05 = ("rabc", "shuffled", "top_k")  # arms that draw by its weights


def experiment(path: Path, fingerprint: str, weights: str | None = None) -> pd.DataFrame | None:
    """What `make experiment` found on the dataset with this fingerprint, a row an arm, those of most training seeds first:
    None where it has not run on it. `attrs["settings"]` has the parameters of its policies, `attrs["over_filter"]`
    how much rabc lies over the duration filter, if both were run.

    The success rate, plain BC's with the same training seeds, how much the one lies over the other with its 95 % interval
    (over seeds and starts; none where other code trained plain BC), the digest of the `weights` of arms that a reward model
    made ("" where it is not known), and what the arm draws frames by. weights: digest of chapter 05's file, as it is now.
    """
    found = read_json(path) if path.exists() else {}
    if found.get("fingerprint") != fingerprint:
        return None
    rows = {}
    for arm, value in found["arms"].items():
        over = value.get("over_bc", {"difference": 0.0} if arm == "bc" else {})
        made_from = value.get("made_from") or {}
        older = weights is not None and arm in OF_CHAPTER_05 and made_from.get("weights") != weights
        rows[arm] = {
            "seeds": len(value["runs"]),
            "success rate": value["success_rate"],
            "bc, same seeds": value["success_rate"] - over["difference"] if over else None,
            "over bc": over.get("difference") if arm != "bc" else None,
            "low": over.get("difference_low"),
            "high": over.get("difference_high"),
            "weights": (made_from.get("weights") or "")[:8],
            "frames": EXPERIMENT.get(arm, "") + (", as they were then" if older else ""),
        }
    table = pd.DataFrame(rows).T.sort_values("seeds", ascending=False, kind="stable").rename_axis("arm")
    table = table.astype({"seeds": int} | dict.fromkeys(table.columns[1:6], float)).round(3)
    table.attrs["settings"] = found.get("settings", {})
    table.attrs["over_filter"] = found["arms"].get("rabc", {}).get("over_duration_filter")
    return table


# --- pictures -----------------------------------------------------------------------------------------------------------


def examples(done: Sequence[Rollout], number: int) -> list[Rollout]:
    """So many rollouts to look at, successes and failures in turn."""
    good, bad = ([r for r in done if r.success is kind] for kind in (True, False))
    turns = [r for pair in itertools.zip_longest(good, bad) for r in pair if r is not None]
    return turns[:number]


def save_film(path: Path, rollout: Rollout, fps: float, every: int = 3) -> None:
    """Every camera of a recorded rollout, side by side, as a moving picture: one frame of so many, and the last."""
    shown = [*range(0, rollout.frames - 1, every), rollout.frames - 1]
    pages = [Image.fromarray(np.hstack([images[t] for images in rollout.images.values()])) for t in shown]
    charts.save_film(path, pages, rollout.frames / fps)


def strip(rollout: Rollout, fps: float, frames: int = 12) -> Image.Image:
    """Every camera of a recorded rollout, so many frames each, one row a camera."""
    shown = np.unique(np.linspace(0, rollout.frames - 1, frames).round().astype(int))
    labels = [f"{t / fps:.1f} s" for t in shown]
    rows = [charts.filmstrip(images[shown], labels) for images in rollout.images.values()]
    page = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    return page
