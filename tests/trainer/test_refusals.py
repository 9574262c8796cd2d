"""Options of transformers that make no run, or would be wrong here."""

import logging
from types import SimpleNamespace

import pytest
import torch
from tdpo import TDPOConfig
from tdpo.cli.main import main
from tdpo.refusals import use_one_gpu
from transformers.trainer_pt_utils import AcceleratorConfig

from helpers.device import USE_CPU
from helpers.trainer_cases import make_trainer, write_home

NO_RUN = {
    "num_train_epochs": [0, 0.0, -1, float("nan"), float("inf")],
    "max_steps": [0, -2],
    "gradient_accumulation_steps": [0, -1],
    "per_device_train_batch_size": [0, -4],
    "per_device_eval_batch_size": [0, -4],
    "eval_accumulation_steps": [0],
    "save_total_limit": [0, -1],
    "dataloader_num_workers": [-1],
    "logging_steps": [0, -1, float("nan")],
    "eval_steps": [0, -1, float("nan")],
    "save_steps": [0, -0.5, float("inf")],
    "weight_decay": [-0.1, float("nan")],
    "max_grad_norm": [-1.0],
    "warmup_steps": [-1],
    "eval_delay": [-1],
    "adam_beta1": [-0.1, 1, 2, float("nan")],
    "adam_beta2": [1.0],
    "adam_epsilon": [-1e-8],
    "neftune_noise_alpha": [-1],
    "router_aux_loss_coef": [-0.1, float("inf")],
    "dataloader_prefetch_factor": [0],
    "torch_empty_cache_steps": [0],
    "seed": [-1, 2**32],
    "data_seed": [-1, 2**32],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NO_RUN.items() for value in values])
def test_numbers_that_make_no_run_are_named(name, value, tmp_path):
    evaluates = {"eval_strategy": "steps"} if name == "eval_steps" else {}
    with pytest.raises(ValueError, match=rf"^{name} is {value}; it must "):
        TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, **{name: value}, **evaluates)


@pytest.mark.parametrize("what", ["logging", "eval", "save"])
def test_steps_of_what_is_turned_off_are_not_read(what, tmp_path):
    off = {f"{what}_strategy": "no", f"{what}_steps": 0}
    assert getattr(TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, **off), f"{what}_steps") == 0


@pytest.mark.parametrize(
    ("name", "value"), [("max_steps", 2.5), ("per_device_train_batch_size", "4"), ("save_steps", "often")]
)
def test_what_is_no_number_is_named(name, value, tmp_path):
    with pytest.raises(TypeError, match=rf"^{name} is "):
        TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, **{name: value})


def test_numbers_that_are_good(tmp_path):
    unused = {"num_train_epochs": 0, "max_steps": 3, "max_grad_norm": 0, "save_total_limit": None, "eval_delay": 0}
    shares = {"logging_steps": 0.1, "save_steps": 0.5, "eval_steps": 0.5, "warmup_steps": 0.1}
    assert TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, **unused, **shares).max_steps == 3
    assert TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, max_steps=-1, num_train_epochs=0.5).max_steps == -1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_train_epochs", "0", "--max_steps", "-1"], "num_train_epochs is 0.0; it must be positive"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps is 0; it must be at least 1"),
        (["--save_steps", "0"], "save_steps is 0.0; it must be positive (save_strategy no turns it off)"),
    ],
)
def test_commands_refuse_them(flags, said, tmp_path, capsys):
    write_home(tmp_path)
    assert main(["train", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"tdpo: {said}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_evaluation_in_another_precision_is_refused(precision, tmp_path):
    said = rf"^{precision}_full_eval is True; .* set {precision} instead"
    with pytest.raises(ValueError, match=said):
        make_trainer(tmp_path, **{f"{precision}_full_eval": True})


@pytest.mark.parametrize("config", [{"dispatch_batches": True}, AcceleratorConfig(dispatch_batches=True)])
def test_batches_that_would_be_cut_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match=r"^accelerator_config has dispatch_batches True"):
        make_trainer(tmp_path, accelerator_config=config)
    make_trainer(tmp_path, accelerator_config={"dispatch_batches": False})


def test_batches_that_are_split_are_another_run(tmp_path):
    """Each process then makes its part of a batch of all (tests/trainer/test_trainer_distributed.py)."""
    plain, split = (
        make_trainer(tmp_path, accelerator_config={"split_batches": split_batches}) for split_batches in (False, True)
    )
    plain.record.write(tmp_path)
    with pytest.raises(ValueError, match="split_batches was None and is True"):
        split.record.check(tmp_path, anyway=False)


@pytest.mark.parametrize(
    ("device", "gpus", "device_map", "left", "warned"),
    [
        ("cuda", 2, None, 1, True),
        ("cuda", 2, {"": 0}, 1, True),
        ("cuda", 2, {"model.layers.0": 0, "model.layers.1": 1}, 1, False),
        ("cuda", 1, None, 1, False),
        ("cpu", 0, None, 0, False),
    ],
)
def test_one_process_uses_one_gpu(device, gpus, device_map, left, warned, caplog):
    """On a virtual GPU, all of the trainer's tests see two."""
    args = SimpleNamespace(device=torch.device(device), n_gpu=gpus, _n_gpu=gpus)
    model = SimpleNamespace() if device_map is None else SimpleNamespace(hf_device_map=device_map)
    with caplog.at_level(logging.WARNING, logger="tdpo"):
        use_one_gpu(args, model)
    assert args._n_gpu == left
    assert ("accelerate launch" in caplog.text) == warned
