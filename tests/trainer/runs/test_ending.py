"""A run ends with a picture of its log; nothing that is wrong with it costs the model."""

import errno
import os
import signal
from types import SimpleNamespace

import pytest
import tdpo.extras
import tdpo.runs.ending
from tdpo import TDPOTrainer
from tdpo.cli.main import main
from tdpo.runs.ending import PICTURE, show_log
from tdpo.runs.stopping import Terminated
from transformers import TrainerState
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from helpers.log_histories import evaluation, training
from helpers.trainer_cases import write_home

HISTORY = [training(2, accuracy=0.5), evaluation(4), training(4)]
SHOWN = f"![The log of the training]({PICTURE})"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    write_home(folder)
    return folder


@pytest.fixture
def train(home, tmp_path):
    def run(*options):
        return main(["train", str(home / "config.yaml"), "--output_dir", str(tmp_path), "--disable_tqdm", *options])

    return run


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


def end(folder, history=HISTORY, trackers=()):
    args = SimpleNamespace(output_dir=str(folder), kl_warning=20.0)
    return show_log(TrainerState(global_step=4, log_history=history), args, trackers)


def test_a_run_and_one_that_resumes(train, tmp_path, capsys):
    options = ["--save_steps", "2"]
    assert train(*options) == 0
    assert is_picture(tmp_path / PICTURE)
    assert SHOWN in (tmp_path / "README.md").read_text()
    assert SHOWN not in (tmp_path / "checkpoint-4" / "README.md").read_text()  # where there is none
    shown = capsys.readouterr().err
    assert "steps 1 to 4: the margin went from" in shown
    assert f"the log as a picture: {tmp_path / PICTURE}\n" in shown
    first = (tmp_path / PICTURE).read_bytes()
    assert train(*options, "--max_steps", "6") == 0
    assert "steps 1 to 6: the margin went from" in capsys.readouterr().err
    assert (tmp_path / PICTURE).read_bytes() != first


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_has_its_picture(kind, train, tmp_path, monkeypatch, capsys):
    step = TDPOTrainer.training_step

    def stopped(self, *arguments, **others):
        if self.state.global_step == 2:
            os.kill(os.getpid(), kind)
        return step(self, *arguments, **others)

    monkeypatch.setattr(TDPOTrainer, "training_step", stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if kind == signal.SIGINT:
            assert train() == 130
        else:
            with pytest.raises(Terminated):
                train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert is_picture(tmp_path / PICTURE)
    assert "steps 1 to 3: the margin went from" in capsys.readouterr().err
    assert (tmp_path / "checkpoint-3").is_dir()
    assert not (tmp_path / "model.safetensors").exists()


def test_without_matplotlib_a_run_ends_well(train, tmp_path, monkeypatch, capsys):
    find = tdpo.extras.find_spec
    monkeypatch.setattr(tdpo.extras, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    (tmp_path / PICTURE).write_bytes(b"of another run")
    assert train() == 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "there is no picture of the log: pictures need more packages: pip install 'tdpo_ext[plot]'"
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / PICTURE).exists()
    assert SHOWN not in (tmp_path / "README.md").read_text()


def test_a_full_disk(tmp_path, monkeypatch, capsys):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(tdpo.runs.ending, "write_bytes", full)
    assert not end(tmp_path)
    assert "there is no picture of the log: [Errno 28] No space left on device" in capsys.readouterr().err


def test_a_run_that_logged_nothing(tmp_path, capsys):
    assert not end(tmp_path, [{"train_loss": 0.6, "step": 4}])
    assert "nothing was logged" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_page_is_named_where_something_stands_out(tmp_path, capsys):
    assert end(tmp_path)
    assert "troubleshooting" not in capsys.readouterr().err
    assert end(tmp_path, [*HISTORY, training(6, accuracy=0.5)])
    shown = capsys.readouterr().err
    assert "look at this: the accuracy, 0.50," in shown
    assert "docs/troubleshooting.md" in shown


class Writer:
    """torch's SummaryWriter: what is added to it."""

    def __init__(self, log_dir):
        self.added = [log_dir]
        opened.append(self)

    def add_figure(self, tag, figure, step):
        self.added.append((tag, len(figure.axes), step))

    def add_text(self, tag, text, step):
        self.added.append((tag, text.split(":")[0], step))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.added.append("closed")


opened: list[Writer] = []


class WandbError(Exception):
    """wandb.Error."""


def tracker(kind, **attributes):
    """A callback of transformers as it is after a training, without its package."""
    made = kind.__new__(kind)
    vars(made).update(attributes)
    return made


def wandb(log):
    package = SimpleNamespace(Image=lambda path, caption: (path, caption.split(":")[0]), Error=WandbError, log=log)
    return tracker(WandbCallback, _wandb=package, _initialized=True)


def test_trackers_get_the_picture(tmp_path):
    opened.clear()
    logged = []
    tensorboard = tracker(TensorBoardCallback, tb_writer=None, logging_dir="runs/1", _SummaryWriter=Writer)
    others = [tracker(MLflowCallback, _initialized=False, _auto_end_run=False, _ml_flow=None)]
    assert end(tmp_path, trackers=[*others, tensorboard, wandb(logged.append)])
    assert [writer.added for writer in opened] == [
        ["runs/1", ("training", 4, 4), ("training", "steps 2 to 4", 4), "closed"]
    ]
    assert logged == [{"training": (str(tmp_path / PICTURE), "steps 2 to 4"), "train/global_step": 4}]


def test_a_tracker_that_fails_costs_nothing(tmp_path, capsys):
    def fail(entry):
        raise WandbError("the server is away")

    def broken(log_dir):
        raise OSError(errno.ENOSPC, "No space left on device")

    opened.clear()
    tensorboard = tracker(TensorBoardCallback, tb_writer=None, logging_dir="runs/1", _SummaryWriter=broken)
    unused = tracker(TensorBoardCallback, tb_writer=None, logging_dir=None, _SummaryWriter=Writer)
    assert end(tmp_path, trackers=[tensorboard, wandb(fail), unused])
    shown = capsys.readouterr().err
    assert "TensorBoard has no picture of the log: [Errno 28]" in shown
    assert "Weights & Biases has no picture of the log: the server is away" in shown
    assert opened == []
    assert is_picture(tmp_path / PICTURE)
