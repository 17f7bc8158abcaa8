"""The demo's ground truth: progress by Eq 2 on the simulator's stages, with ᾱ by Eq 1 over the training episodes that succeed.

    φ_t = P_{k-1} + ᾱ_k · τ_t        ᾱ_k = mean over the successful training episodes of L_{i,k} / T_i        (Eq 1, Eq 2)

Stage k and the geometric distance that remains in it come from the simulator (`demo.simulator.Scene`). τ is that distance
on the clock of a clean demonstration: the share of the stage's time that a clean demonstration has spent when as much
remains, a monotone curve fitted once on the clean training episodes. On a clean episode τ therefore is (t - s_k)/(e_k - s_k)
up to the expert's noise; in a pause it stands still and in a detour it goes back, which a clock cannot do.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo.simulator import DENSE_STAGES, Scene

QUANTILES = np.linspace(0, 1, 21)


@dataclass(frozen=True)
class Truth:
    """ᾱ (K,) and, a stage, τ (21,) at ascending remaining distances (21,)."""

    proportions: np.ndarray
    remaining: np.ndarray  # (K, 21)
    tau: np.ndarray  # (K, 21)

    def progress(self, scenes: list[Scene]) -> np.ndarray:
        """True progress φ of each frame, (T,) float32 in [0, 1]."""
        before = np.concatenate([[0.0], np.cumsum(self.proportions)])
        stages = np.array([scene.stage for scene in scenes])
        tau = np.array([np.interp(s.remaining, self.remaining[s.stage], self.tau[s.stage]) for s in scenes])
        tau[[scene.success for scene in scenes]] = 1.0
        return np.clip(before[stages] + self.proportions[stages] * tau, 0, 1).astype(np.float32)

    def save(self, path: Path) -> None:
        table = {
            name: {"proportion": round(float(a), 6), "remaining": r.round(4).tolist(), "tau": t.round(4).tolist()}
            for name, a, r, t in zip(DENSE_STAGES, self.proportions, self.remaining, self.tau, strict=True)
        }
        path.write_text(json.dumps(table, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Truth":
        rows = json.loads(path.read_text()).values()
        return cls(*(np.array([row[name] for row in rows]) for name in ("proportion", "remaining", "tau")))


def fit_truth(clean_episodes: list[list[Scene]], successful_episodes: list[list[Scene]]) -> Truth:
    """Fit ᾱ on successful episodes and the τ curves on the clean ones, lists of scenes that visit every stage once."""
    remaining, tau = [[] for _ in DENSE_STAGES], [[] for _ in DENSE_STAGES]
    shares = [
        np.bincount([scene.stage for scene in scenes], minlength=len(DENSE_STAGES)) / len(scenes)
        for scenes in successful_episodes
    ]
    for scenes in clean_episodes:
        stages = np.array([scene.stage for scene in scenes])
        assert (np.diff(stages) >= 0).all() and set(stages) == set(range(len(DENSE_STAGES))), "not a clean episode"
        for k in range(len(DENSE_STAGES)):
            frames = np.flatnonzero(stages == k)
            last = k == len(DENSE_STAGES) - 1
            tau[k].extend(np.arange(len(frames)) / (len(frames) - last))
            remaining[k].extend(scenes[frame].remaining for frame in frames)
    curves = [_monotone_curve(np.array(r), np.array(t)) for r, t in zip(remaining, tau, strict=True)]
    return Truth(np.mean(shares, axis=0), np.stack([r for r, _ in curves]), np.stack([t for _, t in curves]))


def _monotone_curve(remaining: np.ndarray, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Match equal quantiles: the least remaining distance belongs to the latest τ. Ascending in remaining, (21,) each."""
    return np.quantile(remaining, QUANTILES), np.quantile(tau, 1 - QUANTILES)
