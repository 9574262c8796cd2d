"""What is uploaded to a hub, by an API that only records it."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import tdpo.runs.hub
import transformers.trainer
from huggingface_hub.utils import filter_repo_objects
from tdpo.cli.main import main
from tdpo.runs.checkpoints import STAGING

from helpers.model_families import make_model
from helpers.trainer_cases import make_trainer, with_trained_adapters, write_home

MODEL = {"README.md", "config.json", "generation_config.json", "model.safetensors", "training_args.bin"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


class Hub:
    """Reads what is uploaded in the background a moment later, as an upload does."""

    def __init__(self):
        self.uploads, self.arguments, self._background = [], {}, ThreadPoolExecutor(1)

    def create_repo(self, name, **options):
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, folder_path, path_in_repo="", run_as_future=False, ignore_patterns=(), **options):
        self.arguments = {name: options[name] for name in ("token", "revision")}
        job = self._background.submit(self._read, Path(folder_path), path_in_repo, ignore_patterns)
        return job if run_as_future else job.result()

    def _read(self, folder, path_in_repo, ignored):
        time.sleep(0.2)
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        names = list(filter_repo_objects(names, ignore_patterns=list(ignored)))
        self.uploads.append((path_in_repo, {name: (folder / name).read_bytes() for name in names}))


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    monkeypatch.setattr(tdpo.runs.hub, "upload_folder", hub.upload_folder)
    return hub


SAVES = {"push_to_hub": True, "hub_always_push": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.mark.parametrize("strategy", ["all_checkpoints", "checkpoint", "every_save", "end"])
def test_whole_checkpoints_are_uploaded(strategy, hub, tmp_path):
    trainer = make_trainer(tmp_path, hub_strategy=strategy, save_total_limit=1, **SAVES)
    trainer.train()
    checkpoints = [upload for upload in hub.uploads if upload[0]]
    places = {
        "all_checkpoints": ["checkpoint-2", "checkpoint-4", "checkpoint-6"],
        "checkpoint": ["last-checkpoint"] * 3,
        "every_save": [],
        "end": [],
    }
    assert [place for place, _ in checkpoints] == places[strategy]
    for step, (_, files) in zip((2, 4, 6), checkpoints):
        listed = json.loads(files["manifest.json"])["files"]
        assert set(listed) | {"manifest.json"} == set(files)
        assert {"optimizer.pt", "run.json"} | MODEL | TOKENIZER <= set(files)
        assert json.loads(files["trainer_state.json"])["global_step"] == step
    models = [files for place, files in hub.uploads if not place]
    assert len(models) == (0 if strategy == "end" else 3)
    for step, files in zip((2, 4, 6), models):
        assert set(files) == MODEL | TOKENIZER
        assert f"for {step} steps".encode() in files["README.md"]
    weights = [files["model.safetensors"] for files in models]
    assert len(set(weights)) == len(weights)
    assert hub.arguments == {"token": None, "revision": None} or not models


def test_a_push_that_runs_is_not_joined_by_another(hub, tmp_path):
    make_trainer(tmp_path, **{**SAVES, "hub_always_push": False, "save_steps": 1}).train()
    assert 0 < len(hub.uploads) < 6


@pytest.mark.parametrize("cache", [None, "states/of/reference"])
def test_working_files_stay_here(cache, hub, tmp_path):
    options = {"precompute_reference": True, "eval_samples": 1, "eval_sample_tokens": 2}
    if cache is not None:
        options["reference_cache"] = str(tmp_path / cache)
    trainer = make_trainer(tmp_path, **options, **{**SAVES, "max_steps": 2, "hub_strategy": "end"})
    trainer.train()
    trainer.evaluate()
    (tmp_path / "half.part").write_bytes(b"half")
    (tmp_path / "metrics.json").write_bytes(b"{}")
    trainer.save_model()
    ((_, files),) = hub.uploads
    assert set(files) == MODEL | TOKENIZER | {"metrics.json"}
    assert list((tmp_path / (cache or "reference-cache")).rglob("*.safetensors"))
    assert list((tmp_path / "samples").iterdir())


def test_a_cache_elsewhere_does_not_matter(hub, tmp_path):
    trainer = make_trainer(tmp_path / "out", precompute_reference=True, reference_cache=str(tmp_path / "cache"))
    trainer.push_to_hub(token="secret", revision="draft")
    assert set(hub.uploads[0][1]) == MODEL | TOKENIZER
    assert hub.arguments == {"token": "secret", "revision": "draft"}


def test_every_adapter_is_uploaded(hub, tmp_path):
    model = with_trained_adapters(make_model("llama"))
    model.add_adapter("other", model.peft_config["default"])
    make_trainer(tmp_path, model=model, hub_strategy="every_save", **{**SAVES, "max_steps": 2}).train()
    ((_, files),) = hub.uploads
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert adapter | {f"other/{name}" for name in adapter} <= set(files)


def test_a_finished_run_is_uploaded_whole_and_again(hub, tmp_path, capsys):
    """An upload that failed is made up for by the same command."""
    write_home(tmp_path, max_steps=2, push_to_hub=True, hub_strategy="end", lora_r=2, merge_adapters=True)
    command = ["train", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0
    ((_, files),) = hub.uploads
    assert {"adapter_model.safetensors", "run.json", "trainer_state.json", "merged/model.safetensors"} <= set(files)
    assert files["training.png"].startswith(b"\x89PNG")
    assert b"](training.png)" in files["README.md"]
    capsys.readouterr()
    assert main(command) == 0
    assert "nothing was trained or changed" in capsys.readouterr().out
    assert hub.uploads == [("", files)] * 2


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
