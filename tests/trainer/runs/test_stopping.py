"""Signals while training: the first lets a step end, the second does what it does elsewhere."""

import contextlib
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tdpo.runs.checkpoints import checkpoints_of
from tdpo.runs.stopping import StopAfterStep, Terminated

from helpers.trainer_cases import losses, make_trainer

SAVES = {"save_strategy": "steps", "save_steps": 500, "max_steps": 3}


@pytest.fixture(autouse=True)
def interruptible():
    """A job in the background starts with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def act_in_step(trainer, number, action):
    """Calls `action` in the middle of a step, counted from 1."""
    training_step = trainer.training_step

    def step(*arguments):
        loss = training_step(*arguments)
        if trainer.state.global_step == number - 1:
            action()
        return loss

    trainer.training_step = step


@contextlib.contextmanager
def not_interrupted():
    """Lets a test fail, instead of the whole session, where training is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        pytest.fail("the training was interrupted")


def send(*kinds):
    for kind in kinds:
        os.kill(os.getpid(), kind)


def test_a_second_interrupt_stops_at_once(tmp_path):
    trainer = make_trainer(tmp_path, **SAVES)
    act_in_step(trainer, 1, lambda: send(signal.SIGINT, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 0
    assert checkpoints_of(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_sigterm_would_end_the_process(tmp_path):
    trainer, handlers = make_trainer(tmp_path, **SAVES), []

    def terminate():
        send(signal.SIGTERM)
        handlers.extend(signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT))

    act_in_step(trainer, 1, terminate)
    with pytest.raises(Terminated) as ended:
        trainer.train()
    assert ended.value.code == 143
    assert handlers[0] is signal.SIG_DFL
    assert handlers[1] not in (signal.SIG_DFL, signal.default_int_handler)  # the first interrupt still waits
    assert trainer.state.global_step == 1


def test_the_last_of_two_signals_is_raised(tmp_path):
    trainer = make_trainer(tmp_path, **SAVES)
    act_in_step(trainer, 1, lambda: send(signal.SIGINT, signal.SIGTERM))
    with pytest.raises(Terminated):
        trainer.train()
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-1"]


def test_ignored_interrupts_stay_ignored(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = make_trainer(tmp_path, **SAVES)
    act_in_step(trainer, 1, lambda: send(signal.SIGINT))
    with not_interrupted():
        trainer.train()
    assert trainer.state.global_step == 3
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_handlers_come_back_after_an_error(tmp_path):
    trainer = make_trainer(tmp_path, **SAVES)

    def fail():
        raise OSError("the disk is gone")

    act_in_step(trainer, 1, fail)
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_stops_one_call_of_train(tmp_path):
    trainer = make_trainer(tmp_path, **SAVES)
    act_in_step(trainer, 1, lambda: send(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1
    with not_interrupted():
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


@pytest.mark.parametrize(("kind", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_signals_write_a_checkpoint(kind, raised, tmp_path, capsys):
    unbroken = make_trainer(tmp_path / "unbroken", max_steps=4)
    unbroken.train()
    options = {"save_strategy": "steps", "save_steps": 500, "max_steps": 4}
    trainer = make_trainer(tmp_path / "out", **options)
    act_in_step(trainer, 1, lambda: send(kind))
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(raised):
        trainer.train()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [path.name for path in checkpoints_of(tmp_path / "out")] == ["checkpoint-1"]
    assert "Stopping after this step with a checkpoint" in capsys.readouterr().err
    again = make_trainer(tmp_path / "out", **options)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(unbroken)


def test_signals_without_checkpoints(tmp_path, capsys):
    trainer = make_trainer(tmp_path, max_steps=4)  # save_strategy "no"
    act_in_step(trainer, 2, lambda: send(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2
    assert checkpoints_of(tmp_path) == []
    assert "Stopping after this step; once more" in capsys.readouterr().err


def test_training_in_a_thread_leaves_signals_alone(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("received", [True, False])
def test_a_step_ends_with_the_checkpoint_that_anyone_wants(saves, wanted, received):
    stop = StopAfterStep(Accelerator(cpu=True), saves=saves)
    control = SimpleNamespace(should_save=wanted, should_training_stop=False)
    with pytest.raises(Terminated) if received else contextlib.nullcontext(), stop.listening():
        if received:
            send(signal.SIGTERM)
        stop.on_step_end(None, None, control)
    assert control.should_training_stop == received
    assert control.should_save == (wanted or (received and saves))
    assert stop.received == (signal.SIGTERM if received else 0)


@pytest.mark.parametrize("here", [0, int(signal.SIGINT)])
@pytest.mark.parametrize("elsewhere", [0, int(signal.SIGTERM)])
def test_all_processes_stop_where_one_was_told_to(here, elsewhere):
    def gather(received):
        return torch.cat([received, torch.tensor([elsewhere])])

    stop = StopAfterStep(SimpleNamespace(num_processes=2, device=torch.device("cpu"), gather=gather), saves=True)
    stop.received, control = here, SimpleNamespace(should_save=False, should_training_stop=False)
    stop.on_step_end(None, None, control)
    assert control.should_training_stop == control.should_save == bool(here or elsewhere)
    assert stop.received == max(here, elsewhere)
