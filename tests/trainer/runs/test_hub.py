"""What is uploaded to a hub, by an API that only records it."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers.trainer
from tdpo.runs.checkpoints import STAGING

from helpers.trainer_cases import make_trainer


class Hub:
    """Reads what is uploaded in the background a moment later, as an upload does."""

    def __init__(self):
        self.uploads, self._background = [], ThreadPoolExecutor(1)

    def create_repo(self, name, **options):
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, folder_path, path_in_repo="", run_as_future=False, ignore_patterns=(), **options):
        job = self._background.submit(self._read, Path(folder_path), path_in_repo, ignore_patterns)
        return job if run_as_future else job.result()

    def _read(self, folder, path_in_repo, ignored):
        time.sleep(0.2)
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        names = [name for name in names if not any(fnmatch(name, pattern) for pattern in ignored)]
        self.uploads.append((path_in_repo, {name: (folder / name).read_bytes() for name in names}))


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    return hub


SAVES = {"push_to_hub": True, "hub_always_push": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.mark.parametrize("strategy", ["all_checkpoints", "checkpoint", "every_save"])
def test_whole_checkpoints_are_uploaded(strategy, hub, tmp_path):
    trainer = make_trainer(tmp_path, hub_strategy=strategy, save_total_limit=1, **SAVES)
    trainer.train()
    checkpoints = [upload for upload in hub.uploads if upload[0]]
    places = {
        "all_checkpoints": ["checkpoint-2", "checkpoint-4", "checkpoint-6"],
        "checkpoint": ["last-checkpoint"] * 3,
        "every_save": [],
    }
    assert [place for place, _ in checkpoints] == places[strategy]
    for step, (_, files) in zip((2, 4, 6), checkpoints):
        listed = json.loads(files["manifest.json"])["files"]
        assert set(listed) | {"manifest.json"} == set(files)
        assert json.loads(files["trainer_state.json"])["global_step"] == step
    models = [files for place, files in hub.uploads if not place]
    assert len(models) == 3
    for files in models:
        assert "model.safetensors" in files
        assert not [name for name in files if "checkpoint" in name]


def test_the_card_survives_the_upload(hub, tmp_path):
    trainer = make_trainer(tmp_path, beta=0.2, max_steps=2)
    trainer.train()
    (tmp_path / STAGING / "checkpoint-2").mkdir(parents=True)  # left by a process that was killed while writing
    (tmp_path / STAGING / "checkpoint-2" / "half.pt").write_bytes(b"half")
    trainer.push_to_hub(tags="mine", license="mit", dataset=["some/data"], finetuned_from="some/base")
    ((_, files),) = hub.uploads
    assert not [name for name in files if "half" in name]
    card = files["README.md"].decode()
    assert card == (tmp_path / "README.md").read_text()
    assert "variant: tdpo2\nbeta: 0.2\n" in card
    assert "| step | loss | rewards/accuracies |" in card
    assert "zeng2024tdpo" in card
    for line in (
        "- tdpo",
        "- mine",
        "license: mit",
        "- some/data",
        "base_model: some/base",
        f"model_name: {tmp_path.name}",
    ):
        assert f"\n{line}\n" in card.split("# A model")[0]
    with pytest.raises(TypeError, match="tasks"):
        trainer.push_to_hub(tasks="text-generation")
