"""Checkpoints: written whole or not at all, checked when training resumes, and the messages of runs that fail."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from tdpo.files import check_manifest
from tdpo.runs import checkpoints
from tdpo.runs.checkpoints import STAGING

from helpers.damage import flip_bit, random_damage
from helpers.trainer_cases import losses, make_trainer

SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An output folder with the checkpoints 2, 4 and 6, and the losses of the run."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(folder, **SAVES)
    trainer.train()
    return folder, losses(trainer)


@pytest.fixture
def out(trained, tmp_path):
    """A copy of that folder."""
    return Path(shutil.copytree(trained[0], tmp_path / "out"))


def resume(out, checkpoint=True, **options):
    trainer = make_trainer(out, **{**SAVES, **options})
    trainer.train(resume_from_checkpoint=checkpoint)
    return losses(trainer)


def files_of(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def test_a_manifest_lists_every_file(out):
    listed = json.loads((out / "checkpoint-6" / "manifest.json").read_text())["files"]
    names = {path.name for path in files_of(out / "checkpoint-6")}
    assert set(listed) == names - {"manifest.json"}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"} <= names


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "manifest.json"]
)
@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "missing"])
def test_a_damaged_file_is_named_and_an_older_checkpoint_is_good(name, kind, out):
    path = out / "checkpoint-6" / name
    if kind == "flipped":
        flip_bit(path, 8 * (path.stat().st_size // 2) + 1)
    elif kind == "missing":
        path.unlink()
    else:
        os.truncate(path, 0 if kind == "empty" else path.stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"checkpoint-6/{name} is (damaged|missing)"):
        check_manifest(out / "checkpoint-6")
    assert checkpoints.last_checkpoint(out) == str(out / "checkpoint-4")


def test_random_damage_is_detected_or_harmless(out):
    generator, checkpoint = random.Random(1), out / "checkpoint-6"
    state = (checkpoint / "manifest.json").read_bytes()
    for path in generator.choices(files_of(checkpoint), k=60):
        before = path.read_bytes()
        done = random_damage(path, generator)
        try:
            check_manifest(checkpoint)
        except ValueError as error:
            named = str(error)
        else:  # white space of the manifest
            assert path.name == "manifest.json", done
            assert json.loads(path.read_text()) == json.loads(state), done
            named = str(path)
        assert str(path) in named, done
        path.write_bytes(before)


def test_resuming_falls_back_to_the_newest_good_checkpoint(trained, out, caplog):
    flip_bit(out / "checkpoint-6" / "optimizer.pt", 999)
    (out / "checkpoint-4" / "scheduler.pt").unlink()
    with caplog.at_level("WARNING"):
        assert resume(out) == trained[1]
    for name in ("checkpoint-6/optimizer.pt is damaged", "checkpoint-4/scheduler.pt is missing"):
        assert f"resuming from an older checkpoint, {out / 'checkpoint-2'}: {out / name}" in caplog.text
    check_manifest(out / "checkpoint-6")  # written anew


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(out):
    flip_bit(out / "checkpoint-4" / "model.safetensors", 9999)
    with pytest.raises(ValueError, match=r"checkpoint-4/model.safetensors is damaged"):
        resume(out, str(out / "checkpoint-4"))


def test_no_good_checkpoint(out, tmp_path):
    for step in (2, 4, 6):
        (out / f"checkpoint-{step}" / "manifest.json").write_text("")
    with pytest.raises(ValueError, match=r"no good checkpoint.*checkpoint-6/manifest.json is damaged.*checkpoint-2"):
        resume(out)
    with pytest.raises(ValueError, match=r"no good checkpoint to resume from: none"):
        resume(tmp_path / "nothing")


def test_files_that_do_not_belong(out):
    (out / "checkpoint-6" / "pytorch_model.bin").write_bytes(b"other weights")
    with pytest.raises(ValueError, match=r"pytorch_model.bin does not belong"):
        check_manifest(out / "checkpoint-6")


def test_checkpoints_are_sorted_by_step(out):
    (out / "checkpoint-6").rename(out / "checkpoint-10")
    (out / "checkpoint-x").mkdir()
    (out / "checkpoint-99").write_text("a file")
    assert [path.name for path in checkpoints.checkpoints_of(out)] == ["checkpoint-10", "checkpoint-4", "checkpoint-2"]


def test_checkpoints_without_the_optimizer_are_not_resumed(tmp_path):
    make_trainer(tmp_path, **SAVES, save_only_model=True).train()
    check_manifest(tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match=r"checkpoint-6 was written with save_only_model"):
        resume(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_saved(value, tmp_path):
    trainer = make_trainer(tmp_path, **SAVES)
    step = trainer.training_step

    def poisoned(*arguments):
        loss = step(*arguments)
        if trainer.state.global_step == 3:  # the fourth step's update
            with torch.no_grad():
                trainer.model.transformer.ln_f.bias[3] = value
        return loss

    trainer.training_step = poisoned
    with pytest.raises(RuntimeError, match=r"step 4 could not be written: .*ln_f.bias are not all.*checkpoint-2"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    with pytest.raises(FloatingPointError, match=r"ln_f.bias"):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()


def test_the_best_model_is_checked_before_it_is_loaded(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = make_trainer(tmp_path, **SAVES, **best, metric_for_best_model="eval_loss")
    trainer.train()
    flip_bit(Path(trainer.state.best_model_checkpoint, "model.safetensors"), 5000)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        trainer._load_best_model()


def test_the_same_step_saved_twice(out):
    trainer = make_trainer(out, **SAVES)
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    (out / "checkpoint-6" / "stray").write_text("of the first copy")
    trainer._save_checkpoint(trainer.model, trial=None)
    check_manifest(out / "checkpoint-6")
    assert not (out / "checkpoint-6" / "stray").exists()


def test_loss_that_is_not_finite(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=6)
    step = trainer.compute_loss

    def poisoned(model, inputs, **options):
        if trainer.state.global_step == 3:
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(float("nan"))
        return step(model, inputs, **options)

    trainer.compute_loss = poisoned
    with pytest.raises(FloatingPointError, match=r"step 4, on rows \[\d+.*checkpoint-2"):
        trainer.train()
    again = make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert len(losses(again)) == 6


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=6)
    save = trainer._save_optimizer_and_scheduler

    def full(output_dir):
        if trainer.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(output_dir)

    trainer._save_optimizer_and_scheduler = full
    with pytest.raises(RuntimeError, match=r"step 4 could not be written.*No space left.*checkpoint-2"):
        trainer.train()
    assert [path.name for path in Path(tmp_path).glob("checkpoint*")] == ["checkpoint-2"]
    assert not (tmp_path / STAGING).exists()


def test_checkpoints_rotate_and_keep_the_best(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=8,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert best.is_dir()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)


def test_the_best_checkpoint_is_kept_though_it_is_the_oldest(tmp_path):
    """The loss falls, so that the first checkpoint is the best where the highest loss is wanted."""
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    wanted = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path, **{**SAVES, "max_steps": 8}, save_total_limit=2, **best, **wanted)
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert sorted(evaluated, reverse=True) == evaluated
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert [path.name for path in checkpoints.checkpoints_of(tmp_path)] == ["checkpoint-8", "checkpoint-2"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[0], rel=1e-5)  # it was loaded at the end


@pytest.mark.parametrize("limit", [1, 2, None])
def test_old_checkpoints_go_as_new_ones_come(limit, tmp_path):
    make_trainer(tmp_path, **SAVES, save_total_limit=limit).train()
    left = [f"checkpoint-{step}" for step in (6, 4, 2)][:limit]
    assert [path.name for path in checkpoints.checkpoints_of(tmp_path)] == left


def test_what_a_killed_run_was_writing_is_never_published(tmp_path):
    unfinished = tmp_path / checkpoints.STAGING / "checkpoint-99"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_bytes(b"half of a file")
    make_trainer(tmp_path, **SAVES).train()
    assert [path.name for path in checkpoints.checkpoints_of(tmp_path)] == [f"checkpoint-{n}" for n in (6, 4, 2)]
    assert not (tmp_path / checkpoints.STAGING).exists()


def test_what_an_earlier_run_left_goes_first(out):
    """Checkpoints are old by their time, not by their step: a run that began anew has lower steps."""
    for step in (4, 6):
        shutil.rmtree(out / f"checkpoint-{step}")
    (out / "checkpoint-2").rename(out / "checkpoint-90")
    os.utime(out / "checkpoint-90", (0, 0))
    make_trainer(out, **SAVES, save_total_limit=2).train()
    assert [path.name for path in checkpoints.checkpoints_of(out)] == ["checkpoint-6", "checkpoint-4"]


def test_a_model_is_saved_where_it_belongs_after_a_checkpoint_that_failed(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **SAVES)
    trainer.train()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(RuntimeError, match=r"No space left on device; last good checkpoint: .*checkpoint-6"):
            trainer._save_checkpoint(trainer.model, trial=None)
    assert trainer._get_output_dir(trial=None) == str(tmp_path)
