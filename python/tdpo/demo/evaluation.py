"""What was measured of a policy at a step, prompt by prompt, and curves of reward over KL."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..files import write_json

Point = dict[str, float]  # of a frontier: step, reward and kl


@dataclass(frozen=True)
class Evaluation:
    """Of the same prompts in the same order, continued with the same random numbers, for every policy and step."""

    step: int
    texts: list[str]  # the n continuations
    rewards: list[float]  # of prompt and continuation, (n,)
    kls: list[float]  # sequence KL(reference || policy) in nats, of the first m <= n

    def point(self) -> Point:
        """Means, and the standard error of the reward."""
        return {
            "step": self.step,
            "reward": float(np.mean(self.rewards)),
            "reward_error": float(np.std(self.rewards) / len(self.rewards) ** 0.5),
            "kl": float(np.mean(self.kls)),
        }


def save_evaluations(path: Path, evaluations: list[Evaluation]) -> None:
    write_json(path, [asdict(evaluation) for evaluation in evaluations])


def load_evaluations(path: Path) -> list[Evaluation]:
    """Those of a method in order of their steps; none where there is no file yet."""
    return [Evaluation(**saved) for saved in json.loads(path.read_text())] if path.exists() else []


def reward_at(points: list[Point], kl: float) -> float:
    """Reward where a method's curve crosses a sequence KL, by interpolation between the nearest evaluations."""
    ordered = sorted(points, key=lambda point: point["kl"])
    return float(np.interp(kl, [point["kl"] for point in ordered], [point["reward"] for point in ordered]))


def reach(curves: list[list[Point]]) -> float:
    """The largest sequence KL that every curve reaches."""
    return min(max(point["kl"] for point in points) for points in curves)


def matched_kl(curves: dict[str, list[Point]]) -> list[dict[str, float]]:
    """Rewards of all methods at sequence KLs that every curve reaches."""
    levels = [share * reach(list(curves.values())) for share in (0.5, 0.75, 1.0)]
    return [{"kl": kl, **{method: reward_at(points, kl) for method, points in curves.items()}} for kl in levels]
