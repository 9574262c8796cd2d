"""One run at a time in an output folder, whatever became of the one before."""

import contextlib
import errno
import os
import signal
import subprocess
import sys

import pytest
from tdpo.cli.main import main
from tdpo.runs import lock
from tdpo.runs.lock import LOCK, only_run_in

from helpers.trainer_cases import make_trainer, run_python, write_home

HOLDER = """
import os, sys, time
from tdpo.runs.lock import only_run_in

with only_run_in(sys.argv[1]):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(600)
"""
RANK = """
import sys
from tdpo import TDPOConfig
from tdpo.runs.lock import only_run_in

TDPOConfig(output_dir=sys.argv[1], use_cpu=True).device
try:
    with only_run_in(sys.argv[1]):
        print("ENTERED")
except ValueError as error:
    print(f"REFUSED {error}")
"""


@contextlib.contextmanager
def held_by_another(folder):
    """Another process, which has a child, holds the folder; yields the process."""
    arguments = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=folder.parent) as holder:
        child = int(holder.stdout.readline())
        try:
            yield holder
        finally:
            os.kill(child, signal.SIGKILL)
            holder.kill()


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path, capsys):
    """Killed, it leaves a file, and maybe a child: neither keeps anybody out."""
    out = tmp_path / "out"
    write_home(tmp_path, max_steps=1)
    with held_by_another(out) as holder:
        said = rf"^output_dir is {out}, in which process {holder.pid} on \S+ is training: wait until it ends, or give"
        with pytest.raises(ValueError, match=said):
            make_trainer(out, max_steps=1).train()
        command = ["train", str(tmp_path / "config.yaml"), "--output_dir", str(out)]
        assert main(command) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"tdpo: output_dir is {out}, in which process ")
        assert [path.name for path in out.iterdir()] == [LOCK]
        holder.kill()
        holder.wait()
        assert (out / LOCK).exists()
        trainer = make_trainer(out, max_steps=1)
        trainer.train()
    assert trainer.state.global_step == 1
    assert not (out / LOCK).exists()


@pytest.mark.slow
def test_every_process_of_a_run_is_refused(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    out = tmp_path / "out"
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(tmp_path / "rank.py"),
        str(out),
    ]
    assert run_python(*launch, cwd=tmp_path).stdout.count("ENTERED") == 2
    with held_by_another(out) as holder:
        said = run_python(*launch, cwd=tmp_path).stdout
    assert said.count(f"REFUSED output_dir is {out}, in which process {holder.pid}") == 2


def test_a_process_may_enter_again(tmp_path):
    with only_run_in(tmp_path):
        with only_run_in(tmp_path / "." / ""):
            pass
        assert (tmp_path / LOCK).exists()
        with only_run_in(tmp_path / "another"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["another"]


def test_a_run_that_fails_lets_go(tmp_path):
    with pytest.raises(RuntimeError, match="failed"), only_run_in(tmp_path):
        raise RuntimeError("failed")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("without", ["locks", "fcntl", "a folder"])
def test_where_nothing_can_be_locked_nobody_is_refused(without, tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    if without == "locks":
        monkeypatch.setattr(lock.fcntl, "lockf", no_locks)
    elif without == "fcntl":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        (tmp_path / "out").write_text("a file")
    with only_run_in(tmp_path / "out"):
        entered = True
    assert entered


def test_a_file_that_was_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """Another process may have opened it before its owner removed it."""
    lockf, removed = lock.fcntl.lockf, []

    def lock_late(*arguments):
        if not removed:
            removed.append((tmp_path / LOCK).unlink())
        return lockf(*arguments)

    monkeypatch.setattr(lock.fcntl, "lockf", lock_late)
    with only_run_in(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
