"""The rehearsal of tools/gpu_check.sh: every stage of both calls, on the virtual GPU."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_check.sh"
FACTS = {
    "machine": 1,
    "logits against float64": 2,
    "fused loss against float64": 4,
    "copy": 1,
    "row kernels": 6,
    "scaling": 1,
    "fused loss": 3,
    "kernels of a step": 1,
    "products": 2,
    "misaligned product": 1,
    "memory over batches": 1,
    "end": 1,
}


def rehearse(call, folder, temporary):
    """What a call prints; its caches and logs lie apart from its results."""
    environment = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(temporary)}
    command = ["bash", str(SCRIPT), call, str(folder), "--rehearse"]
    done = subprocess.run(command, env=environment, cwd=temporary, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_facts(tmp_path):
    folder = tmp_path / "results"
    shown = rehearse("facts", folder, tmp_path)
    for stage in ("import", "facts", "tests", "memcheck", "racecheck"):
        assert f"ok      {stage} (" in shown
    facts = [json.loads(line) for line in (folder / "facts.jsonl").read_text().splitlines()]
    assert Counter(fact["fact"] for fact in facts) == FACTS
    assert list(dict.fromkeys(fact["fact"] for fact in facts))[:5] == list(FACTS)[:5]  # the most valuable first
    against_float64 = [fact for fact in facts if "errors" in fact]
    for fact in against_float64:
        assert all(error < 5e-3 for error in fact["errors"].values()), fact
    plans = [fact["plan"].partition(":")[0] for fact in against_float64 if "plan" in fact]
    assert plans == ["chunked", "chunked", "deferred", "streaming"]
    for fact in (fact for fact in facts if fact["fact"] == "fused loss"):
        assert fact["plan"].startswith("chunked")
        names = [row["candidate"] for row in fact["candidates"]]
        assert names == ["tdpo_ext chunked", "tdpo_ext packed", "tdpo_ext streaming", "products"]
        assert all("reserved_mb" in row for row in fact["candidates"][:3])
    assert "fused, 12 x 301" in shown  # the table at the end
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["facts.jsonl", "facts_logs.tar.gz", "facts_stages.txt"]


def test_peers(tmp_path):
    folder = tmp_path / "results"
    shown = rehearse("peers", folder, tmp_path)
    for stage in ("import", "bench_linear", "bench_logits", "counters"):
        assert f"ok      {stage} (" in shown
    linear = json.loads((folder / "bench_linear_cuda.json").read_text())
    assert {"tdpo_ext packed", "published, eager"} <= {row["candidate"] for row in linear["steps"][0]["candidates"]}
    logits = json.loads((folder / "bench_logits_cuda.json").read_text())
    assert "published, eager" in logits["results"][0]["faster_than"]
    assert all(path.is_file() for path in folder.iterdir())
    assert len(list(folder.iterdir())) == 4
