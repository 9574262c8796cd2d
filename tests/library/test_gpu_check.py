"""tools/gpu_check.sh without a GPU: its limits, and what it runs where; and that its tests need torch and pytest alone.

tests/virtual_gpu/test_rehearsal.py runs its stages.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
CALLS = {
    "facts": ["facts", "tests", "memcheck", "racecheck"],
    "peers": ["bench_linear", "bench_logits", "counters"],
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("prepared", "left_out"),
    [({"wheels", "import"}, set()), ({"wheels", "build"}, {"memcheck", "racecheck", "bench_logits", "counters"})],
    ids=["from a wheel", "from the source"],
)
def test_limits_add_up_to_less_than_the_call_takes(call, prepared, left_out):
    """Where it is built from the source, the last stages run only if that was quick."""
    text = SCRIPT.read_text()
    limits = {name: int(limit) for name, limit in re.findall(r"^ +stage (\w+) (\d+) ", text, re.M)}
    assert limits.keys() == {"wheels", "import", "build", *CALLS["facts"], *CALLS["peers"]}
    most = int(re.search(rf"^{call}\) seconds=(\d+) ;;$", text, re.M)[1])
    assert most <= {"facts": 300, "peers": 290}[call]
    assert sum(limits[name] for name in {*prepared, *CALLS[call]} - left_out) <= most


@pytest.fixture
def machine(tmp_path):
    """A copy of the script among programs that write down how they were called, and do nothing."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    (tmp_path / "tools").mkdir()
    (tmp_path / "tests").mkdir()
    shutil.copy(SCRIPT, tmp_path / "tools")
    answers = {"python": "", "nvidia-smi": "echo 9.0", "nvcc": "", "compute-sanitizer": "", "ncu": ""}
    programs.mkdir()
    for name, answer in answers.items():
        noted = f"{{ echo {name} \"$@\" $TDPO_CUDA_ARCHS | tr '\\n' ' '; echo; }} >>{calls}"
        (programs / name).write_text(f"#!/bin/sh\n{noted}\n{answer}\n")
        (programs / name).chmod(0o755)

    def run(call, *wheels, python="", without=(), seconds=None):
        if seconds is not None:
            script = tmp_path / "tools" / SCRIPT.name
            script.write_text(re.sub(r" seconds=\d+ ", f" seconds={seconds} ", script.read_text()))
        (tmp_path / "wheels").mkdir()
        for wheel in wheels:
            (tmp_path / "wheels" / wheel).touch()
        with open(programs / "python", "a") as file:
            file.write(python)
        for name in without:
            (programs / name).unlink()
        environment = {**os.environ, "PATH": f"{programs}:/usr/bin:/bin", "PYTHON": "python", "TMPDIR": str(tmp_path)}
        command = ["bash", str(tmp_path / "tools" / SCRIPT.name), call]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**environment, "OUT": str(tmp_path / "out")}, cwd="/"
        )
        stages = re.findall(r"^(ok|FAILED|skipped) +(\w[\w-]*)", done.stdout, re.M)
        return done, [(outcome.strip(), name) for outcome, name in stages], calls.read_text()

    return run


@pytest.mark.parametrize("call", CALLS)
def test_a_carried_wheel_is_used(machine, call):
    done, stages, calls = machine(call, "tdpo_ext-0-cp312-cp312-linux_x86_64.whl", "trl-1-py3-none-any.whl")
    assert done.returncode == 0, done.stdout
    assert stages == [("ok", name) for name in ("wheels", "import", *CALLS[call])]
    assert "--no-index" in calls
    assert "--no-build-isolation" not in calls


def test_without_a_wheel_it_is_built_for_the_gpu_that_is_there(machine, tmp_path):
    done, stages, calls = machine("facts", "trl-1-py3-none-any.whl")
    assert done.returncode == 0, done.stdout
    assert stages == [("ok", name) for name in ("wheels", "build", *CALLS["facts"])]
    assert f"--no-build-isolation {tmp_path} 90 " in calls
    assert "compute-sanitizer --error-exitcode 1 --kernel-name kns=tdpo --tool racecheck" in calls
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["facts_logs.tar.gz", "facts_stages.txt"]
    assert "ok      racecheck (" in (tmp_path / "out" / "facts_stages.txt").read_text()


def test_a_wheel_that_does_not_load_is_built_again(machine):
    fails = 'case "$*" in *build_info*) exit 1 ;; esac\n'
    done, stages, _ = machine("peers", "tdpo_ext-0-cp312-cp312-linux_x86_64.whl", python=fails)
    assert done.returncode == 1
    assert stages[:3] == [("ok", "wheels"), ("FAILED", "import"), ("ok", "build")]
    assert stages[3:] == [("ok", name) for name in CALLS["peers"]]


def test_nothing_runs_where_nothing_can_be_built(machine):
    done, stages, _ = machine("facts", python='case "$*" in *no-build-isolation*) exit 1 ;; esac\n')
    assert done.returncode == 1
    assert stages == [("FAILED", "build")]


def test_a_failure_is_the_calls_and_the_next_stage_runs(machine):
    done, stages, _ = machine("facts", python='case "$*" in *"-m pytest"*) echo broken; exit 1 ;; esac\n')
    assert done.returncode == 1
    assert stages == [("ok", "build"), ("ok", "facts"), ("FAILED", "tests"), ("ok", "memcheck"), ("ok", "racecheck")]
    assert "broken" in done.stdout


def test_what_no_longer_fits_into_the_call_is_skipped(machine):
    done, stages, _ = machine("facts", "tdpo_ext-0-cp312-cp312-linux_x86_64.whl", seconds=60)
    assert done.returncode == 1
    assert stages[:2] == [("ok", "wheels"), ("ok", "import")]
    assert stages[2:] == [("skipped", "facts"), ("skipped", "tests"), ("ok", "memcheck"), ("ok", "racecheck")]


def test_a_program_that_is_not_installed_is_said_to_be_skipped(machine):
    done, _, _ = machine("peers", without=["ncu"])
    assert "skipped: ncu is not installed" in done.stdout


COLLECTED = """
import sys
import pytest
sys.modules |= dict.fromkeys(["hypothesis", "psutil", "yaml", "transformers", "datasets", "tdpo"])  # absent
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "-m", "cuda", "library"]))
"""


def test_the_cuda_tests_need_torch_and_pytest_alone():
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", COLLECTED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stdout
    for name in ("cuda_divergence", "cuda_linear", "vocab_parallel"):
        assert f"library/test_{name}.py: " in done.stdout


def test_the_table_has_the_predictions_of_the_gpu(tmp_path):
    candidates = [{"candidate": "tdpo_ext packed", "seconds": 0.0485, "over_products": 1.113, "reserved_mb": 5120.0}]
    step = {"rows": 8192, "vocab": 128_256, "width": 4096, "dtype": "bfloat16", "candidates": candidates}
    facts = [
        {"fact": "machine", "gpu": "NVIDIA H200", "torch": "2.11.0"},
        {"fact": "row kernels", "case": "float32 to bfloat16", "rows": 9, "vocab": 8, "of_copy": {"forward": 0.9}},
        {"fact": "fused loss", **step},
        {"fact": "products", "rows": 391, "tflops": {"dhidden": 612.345}},
    ]
    (tmp_path / "facts.jsonl").write_text("".join(f"{json.dumps(fact)}\n" for fact in facts))
    command = [sys.executable, ROOT / "tools" / "gpu_table.py", "--results", tmp_path]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    predicted = json.loads((ROOT / "benchmarks/results/modelled_times.json").read_text())
    of_copy = next(k for k in predicted["kernels"] if k["kernel"] == "forward, float32")["of_copy"]["H200"]
    milliseconds = next(s for s in predicted["steps"] if (s["rows"], s["vocab"]) == (8192, 128_256))["H200"]["ms"]
    assert f"forward 90% (predicted {of_copy:.0%}, at least" in shown
    assert f"; predicted {milliseconds:.1f} ms, " in shown
    assert re.search(r"tdpo_ext packed +48.50 ms +1.11x products +5120 MiB reserved", shown)
    assert "products; rows: 391; tflops: dhidden 612.3" in shown


@pytest.mark.slow
def test_the_benchmarks_it_runs(tmp_path):
    """On the CPU, where peers that need a compiler run too."""
    for name in ("bench_linear", "bench_logits"):
        command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--tiny", "--output", tmp_path]
        options = ["--skip-sweep"] if name == "bench_linear" else []
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    logits = json.loads((tmp_path / "bench_logits.json").read_text())["results"]
    assert {"published, eager", "published, compiled"} <= logits[0]["faster_than"].keys()
    for step in json.loads((tmp_path / "bench_linear.json").read_text())["steps"]:
        names = {row["candidate"] for row in step["candidates"]}
        assert {"tdpo_ext chunked", "tdpo_ext packed", "products", "published, eager"} <= names
        assert "trl divergence and log-probabilities" in names
        assert step["plan"].startswith("chunked")
