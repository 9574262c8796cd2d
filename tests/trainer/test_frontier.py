"""The report of benchmarks/sentiment_frontier.py: rewards at matched KL, and runs that are added to earlier ones."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def frontier(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sentiment_frontier

    return sentiment_frontier


def results(*points):
    curve = [{"step": step, "kl": kl, "reward": reward} for step, (kl, reward) in enumerate(points)]
    series = [
        {"step": step, "kl/chosen": kl, "kl/rejected": kl, "kl/margin": 0.0} for step, (kl, _) in enumerate(points)
    ]
    return {"frontier": curve, "kl": series}


def test_gains_are_interpolated_between_neighbours_and_never_beyond_a_run(frontier):
    far, near = results((0.0, 0.5), (1.0, 0.7)), results((0.0, 0.3), (0.5, 0.34))
    rows = {row["kl"]: row for row in frontier.matched({"dpo-0.1": {"0": far, "1": near}})}
    both = rows[0.25]["dpo-0.1"]
    assert both["mean"] == pytest.approx((0.05 + 0.02) / 2)
    assert both["sd"] == pytest.approx(0.015)
    assert both["seeds"] == 2
    assert rows[1.0]["dpo-0.1"] == {"mean": pytest.approx(0.2), "sd": 0, "seeds": 1}
    assert "dpo-0.1" not in rows[1.5]


def test_a_run_is_compared_with_the_baseline_of_its_seed_where_that_went_as_far(frontier):
    baseline, better = results((0.0, 0.5), (1.0, 0.7)), results((0.0, 0.5), (0.6, 0.6), (0.5, 0.65))
    further, alone = results((0.0, 0.5), (1.5, 0.9)), results((0.0, 0.5), (0.5, 0.6))
    runs = {"dpo-0.1": {"0": baseline}, "dpo-0.05": {"0": further}, "tdpo2-0.5": {"0": better, "1": alone}}
    assert frontier.over_baseline(runs) == {"dpo-0.1": {"0": 0}, "tdpo2-0.5": {"0": pytest.approx(0.05)}}


def test_what_is_kept_are_means_over_seeds(frontier):
    one, other = results((0.0, 0.5), (1.0, 0.7)), results((0.0, 0.3), (2.0, 0.4))
    curves = frontier.curves_of({"0": one, "1": other})
    assert curves["seeds"] == 2
    assert curves["samples_kl"]["mean"] == [0.0, 1.5]
    assert curves["gain"] == {"mean": pytest.approx([0.0, 0.15]), "sd": pytest.approx([0.0, 0.05])}
    assert curves["steps"] == [0, 1]
    assert curves["rejected_kl"]["sd"] == [0.0, 0.5]
    end = frontier.end_of(curves)
    assert end["gain"] == {"mean": pytest.approx(0.15), "sd": pytest.approx(0.05)}
    assert end["samples_kl"] == 1.5
    assert end["chosen_kl"] == 0.75  # of the last 8 steps, or as many as there are


def test_runs_are_added_and_other_settings_refused(frontier, tmp_path, monkeypatch):
    run = results((0.0, 0.5), (1.0, 0.7))
    monkeypatch.setattr(frontier, "run", lambda experiment, name: run)
    monkeypatch.setattr("tdpo.demo.experiment.Experiment", lambda settings: settings)
    call = ["frontier", "--out", str(tmp_path / "out"), "--results", str(tmp_path), "--tiny"]
    for methods in (["dpo-1"], ["dpo-1", "tdpo2-0.5"]):
        monkeypatch.setattr(sys, "argv", [*call, "--seeds", "0", "--methods", *methods])
        frontier.main()
    saved = json.loads((tmp_path / "out" / "runs.json").read_text())
    assert saved["runs"] == {"dpo-1": {"0": run}, "tdpo2-0.5": {"0": run}}
    assert list(json.loads((tmp_path / "frontier.json").read_text())["curves"]) == ["dpo-1", "tdpo2-0.5"]
    assert (tmp_path / "frontier.png").exists()
    monkeypatch.setattr(sys, "argv", [part for part in call if part != "--tiny"])
    with pytest.raises(SystemExit, match="runs with other settings"):
        frontier.main()
