"""Demonstrations as people give them: the benchmark's expert, with one labelled imperfection an episode.

An imperfection is a generator of actions that takes over from the expert for 0.6-1.1 s and stops or reverses progress.
After it the expert goes on, or, in the episodes that fail, the demonstrator gives up: leaves, or just stands there.
Every frame is labelled by what the simulator shows afterwards, never by the name of its kind:

productive   progress is being made
injected     the imperfection acts
recovering   back to the progress that the imperfection cost
dead         after a failed episode's best progress
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from demo.simulator import FPS, GRASP_OFFSET, PEG_OFFSET, AssemblySimulator, Scene, new_expert

QUALITIES = ("productive", "injected", "recovering", "dead")
KINDS = ("clean", "hesitate", "wander", "overshoot", "missed_grasp", "drop_regrasp", "sloppy", "failing")
KEEP, CLOSE, RELEASE = 0.0, 0.6, -1.0  # gripper efforts: the expert's two, and an active opening
MAX_FRAMES = 140  # an episode that has not succeeded by then has failed
SETBACK = 0.005  # progress lost before a frame counts as recovering

Actions = Iterator[np.ndarray]


@dataclass
class Demonstration:
    """One episode: T frames, the last of which shows the success if there is one."""

    kind: str
    seed: int
    states: list[np.ndarray] = field(default_factory=list)  # T x (4,)
    actions: list[np.ndarray] = field(default_factory=list)  # T x (4,)
    scenes: list[Scene] = field(default_factory=list)  # T
    injected: list[bool] = field(default_factory=list)  # T

    @property
    def success(self) -> bool:
        return self.scenes[-1].success


def towards(hand: np.ndarray, target: np.ndarray, gripper: float, gain: float = 10.0, limit: float = 1.0) -> np.ndarray:
    """The expert's proportional controller: (4,) action that moves the hand to `target` (metres)."""
    return np.append(np.clip(gain * (target - hand), -limit, limit), gripper)


class Imperfection:
    """When a kind takes over from the expert, and what it does then."""

    def __init__(self, kind: str, rng: np.random.Generator) -> None:
        self.kind, self.rng = kind, rng
        self.frames = int(rng.integers(round(0.6 * FPS), round(1.1 * FPS) + 1))
        self.give_up: Callable[[AssemblySimulator], Actions] | None = None  # instead of going on with the task
        self.trigger, self.act = self._choose()

    def _choose(self) -> tuple[Callable[[Scene, int], bool], Callable[[AssemblySimulator], Actions]]:
        rng = self.rng
        start = int(rng.integers(4, 42))
        stage = int(rng.choice([0, 3]))
        into = rng.uniform(0.3, 0.8)  # how much of the stage is still to do when it happens
        at_stage = lambda scene, _: scene.stage == stage and scene.remaining < into  # noqa: E731
        early = rng.uniform(0.5, 1.0)  # dropped later, the nut may land on the peg
        carrying = lambda scene, _: scene.stage == 3 and scene.remaining < early  # noqa: E731
        at_carry = lambda scene, _: scene.stage == 3 and scene.remaining < into  # noqa: E731
        reaching = lambda scene, _: scene.stage == 1  # noqa: E731
        match self.kind:
            case "hesitate":
                return lambda _, frame: frame >= start, self._hesitate
            case "wander":
                return at_stage, self._wander
            case "overshoot":
                return lambda scene, _: scene.stage == 3 and scene.remaining < 0.15, self._overshoot
            case "missed_grasp":
                return reaching, self._miss
            case "drop_regrasp":
                return carrying, self._drop
            case "sloppy":
                return lambda _, frame: frame >= start, self._sloppy
            case "failing":
                trigger, act, self.give_up = (
                    (carrying, self._drop, self._leave),
                    (reaching, self._miss, self._leave),
                    (at_carry, self._hesitate, self._stand),
                )[int(rng.integers(3))]
                return trigger, act
        raise ValueError(f"unknown kind of demonstration: {self.kind!r}")

    def _hesitate(self, sim: AssemblySimulator) -> Actions:
        """Brakes and stays: without braking the hand coasts on."""
        place, gripper = sim.scene().hand, self._gripper(sim)
        for _ in range(self.frames):
            yield towards(sim.scene().hand, place, gripper) + np.append(self.rng.normal(0, 0.03, 3), 0)

    def _wander(self, sim: AssemblySimulator) -> Actions:
        scene, gripper = sim.scene(), self._gripper(sim)
        goal = scene.peg + PEG_OFFSET if scene.held else scene.handle + GRASP_OFFSET
        away = scene.hand - goal
        away[2] = 0
        angle = self.rng.uniform(-1.2, 1.2)
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        target = scene.hand + turn @ away / np.linalg.norm(away) * self.rng.uniform(0.12, 0.22)
        target[2] += self.rng.uniform(0.0, 0.06)
        for _ in range(self.frames):
            yield towards(sim.scene().hand, target, gripper, gain=6)

    def _overshoot(self, sim: AssemblySimulator) -> Actions:
        scene = sim.scene()
        ahead = scene.peg[:2] + PEG_OFFSET[:2] - [0.11, 0.6]
        angle = np.arctan2(ahead[1], ahead[0]) + self.rng.choice([-1, 1]) * self.rng.uniform(0.8, 1.3)
        reach = self.rng.uniform(0.08, 0.12)  # beside the peg: straight behind it the arm no longer reaches
        target = scene.peg + PEG_OFFSET + [reach * np.cos(angle), reach * np.sin(angle), self.rng.uniform(0, 0.05)]
        for _ in range(self.frames):
            yield towards(sim.scene().hand, target, CLOSE)

    def _miss(self, sim: AssemblySimulator) -> Actions:
        """Closes beside the handle, lifts nothing, and notices late."""
        handle = sim.scene().handle + GRASP_OFFSET
        beside = handle + [self.rng.uniform(0.0, 0.03), self.rng.choice([-1, 1]) * self.rng.uniform(0.06, 0.08), 0.06]
        close, lift = int(0.3 * self.frames), int(0.55 * self.frames)
        for frame in range(self.frames):
            target = beside if frame < lift else beside + [0, 0, 0.12]
            yield towards(sim.scene().hand, target, KEEP if frame < close else CLOSE)

    def _drop(self, sim: AssemblySimulator) -> Actions:
        """Stops, opens in mid-air and hovers over the fallen nut."""
        drift = self.rng.normal(0, 0.1, 3)
        for frame in range(self.frames):
            stopping = frame < 5
            yield np.append((0 if stopping else drift) + self.rng.normal(0, 0.03, 3), CLOSE if stopping else RELEASE)

    def _sloppy(self, sim: AssemblySimulator) -> Actions:
        """Shrinks back from where the expert wants to go, and shakes there."""
        intention = np.clip(new_expert().get_action(sim.expert_observation)[:3], -1, 1)
        place, gripper, shake = sim.scene().hand - 0.03 * intention, self._gripper(sim), np.zeros(3)
        for _ in range(self.frames):
            shake = 0.8 * shake + self.rng.normal(0, 0.2, 3)
            yield towards(sim.scene().hand, place, gripper) + np.append(shake, 0)

    def _leave(self, sim: AssemblySimulator) -> Actions:
        home = np.array([0.0, 0.6, 0.2]) + self.rng.normal(0, 0.02, 3)
        for _ in range(int(self.rng.integers(25, 45))):
            yield towards(sim.scene().hand, home, KEEP, limit=0.6)

    def _stand(self, sim: AssemblySimulator) -> Actions:
        for _ in range(int(self.rng.integers(15, 35))):
            yield np.append(self.rng.normal(0, 0.03, 3), CLOSE)

    @staticmethod
    def _gripper(sim: AssemblySimulator) -> float:
        """Holds what is held; fingers that are still closing do not go on."""
        scene = sim.scene()
        return CLOSE if scene.held and scene.opening < 0.5 else KEEP


class Demonstrator:
    """The benchmark's expert, which also opens the gripper again when it has closed on nothing (the benchmark's never
    finds out: nothing disturbs it there)."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.expert, self.rng, self.reopening = new_expert(), rng, False

    def act(self, observation: np.ndarray, scene: Scene) -> np.ndarray:
        self.reopening = scene.empty or (self.reopening and scene.opening < 0.95)
        action = self.expert.get_action(observation) + np.append(self.rng.normal(0, 0.05, 3), 0)
        if self.reopening:
            action = np.array([0, 0, 0.3, RELEASE])
        return action


def demonstrate(
    sim: AssemblySimulator, kind: str, seed: int, on_frame: Callable[[], None] = lambda: None
) -> Demonstration:
    """Record one demonstration; `on_frame` is called before each action (the recorder renders there)."""
    rng = np.random.default_rng([seed, 7])
    imperfection = None if kind == "clean" else Imperfection(kind, rng)
    demonstrator, demonstration = Demonstrator(rng), Demonstration(kind, seed)
    injection: Actions | None = None  # what acts instead of the expert, once it has been triggered
    giving_up: Actions | None = None
    sim.reset(seed)
    while True:
        scene = sim.scene()
        if imperfection and injection is None and imperfection.trigger(scene, len(demonstration.states)):
            injection = imperfection.act(sim)
        action = next(injection, None) if injection else None
        injected = action is not None
        if injection and not injected and imperfection.give_up:
            giving_up = giving_up or imperfection.give_up(sim)
            action = next(giving_up, None)
            if action is None:
                break
        elif not injected:
            action = demonstrator.act(sim.expert_observation, scene)
        action = np.clip(action, -1, 1).astype(np.float32)
        on_frame()
        demonstration.states.append(sim.observe())
        demonstration.actions.append(action)
        demonstration.scenes.append(scene)
        demonstration.injected.append(injected)
        if scene.success or len(demonstration.states) >= MAX_FRAMES:
            break
        sim.step(action)
    return demonstration


def label_quality(progress: np.ndarray, injected: np.ndarray, success: bool) -> np.ndarray:
    """Quality of each frame, (T,) index into `QUALITIES`, from the true progress (T,) and where an imperfection acted."""
    quality = np.zeros(len(progress), dtype=np.int64)
    best_before = np.maximum.accumulate(np.concatenate([[0.0], progress[:-1]]))
    disturbed = np.maximum.accumulate(injected)
    quality[disturbed & (progress < best_before - SETBACK)] = QUALITIES.index("recovering")
    quality[injected] = QUALITIES.index("injected")
    if not success:
        quality[int(progress.argmax()) + 1 :] = QUALITIES.index("dead")
    return quality
