"""Several processes (DDP and FSDP2; on gloo, but for real GPUs) train to the loss curve of one."""

import itertools
import json

import pytest

from helpers.device import DEVICE
from helpers.distributed import backend_of, on_time
from helpers.trainer_cases import run_python

RUN = """
import json, os, sys

import accelerate.state
from helpers.damage import flip_bit
from helpers.model_families import make_model
from torch.distributed.tensor import DTensor
from helpers.trainer_cases import losses, make_preferences, make_trainer, with_trained_adapters

out, options = sys.argv[1], json.loads(sys.argv[2])
fsdp = bool(os.environ.get("ACCELERATE_USE_FSDP"))
initialise = accelerate.state.AcceleratorState.__init__


def initialise_with_fsdp(self, *arguments, fsdp_plugin=None, **rest):
    initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **rest)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = accelerate.state.DistributedType.FSDP, fsdp_plugin


def full_state_dict(model):
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


if fsdp:  # accelerate shards on accelerators only; the rest of it works on gloo too
    accelerate.state.AcceleratorState.__init__ = initialise_with_fsdp
adapted = options.pop("adapters", False)
shards, rows = options.pop("shards", None), options.pop("rows", 24)


def data(rows):
    preferences = make_preferences(rows)
    return preferences if shards is None else preferences.to_iterable_dataset(num_shards=shards)


def make():
    if adapted:
        of_head = {"target_modules": ["q_proj", "lm_head"]} if adapted == "head" else {}
        models = {"model": with_trained_adapters(make_model("llama"), **of_head)}
    else:
        models = {"model": make_model("llama"), "ref_model": make_model("llama", 1)}
    return make_trainer(out, **models, train_dataset=data(rows), eval_dataset=data(37), **options)


trainer = make()
trainer.train()
if fsdp:
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    # What is outside the layers, norm and head, stays gathered after a forward without a backward.
    frozen = trainer.model if adapted else trainer.ref_model
    of_layers = [parameter for name, parameter in frozen.named_parameters() if ".layers." in name]
    assert len(of_layers) > 10
    assert all(isinstance(parameter, DTensor) for parameter in of_layers)
    trainer.accelerator.get_state_dict = full_state_dict  # what accelerate gathers on an accelerator
if os.path.exists(out + "/checkpoint-3"):
    trained, trainer = trainer, make()
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        flip_bit(out + "/checkpoint-6/optimizer.pt", 999)
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=True)  # all processes from checkpoint-3
    assert losses(trainer) == losses(trained)
evaluated = trainer.evaluate()
trainer.save_model(out + "/final")
if trainer.args.should_save:
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "losses": losses(trainer),
        "kl": [entry["kl/rejected"] for entry in log],
        **{name: value for name, value in evaluated.items() if "per_second" not in name and "time" not in name},
    }
    print("RESULT" + json.dumps(result))
# Without finalising the interpreter: gloo's threads may need its lock for their last tensors, and abort then.
sys.stdout.flush()
os._exit(0)
"""
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def run(folder, processes, environment=None, **options):
    script = folder / "run.py"
    script.write_text(RUN)
    if processes > 1:
        options["ddp_backend"] = backend_of(DEVICE)
    command = [str(script), str(folder), json.dumps(options)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--master_port", "0"]
        command = [*launcher, "--nproc_per_node", str(processes), *command]
    variables = {"OMP_NUM_THREADS": "1", **on_time(DEVICE), **(environment or {})}
    done = run_python(*command, cwd=folder, environment=variables)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("RESULT")[1].splitlines()[0])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The results of one process: without adapters, with trained ones, and with one of them on the head."""
    return {
        adapters: run(tmp_path_factory.mktemp("alone"), 1, per_device_train_batch_size=4, adapters=adapters)
        for adapters in (False, True, "head")
    }


def assert_equal(two, one):
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "adapters"),
    [
        *itertools.product(["ddp", "ddp with a cache", "ddp of split batches", "fsdp2"], [False, True]),
        ("ddp", "head"),
        ("fsdp2", "head"),  # from logits: the engine spreads the adapters
    ],
)
def test_two_processes_equal_one(kind, adapters, tmp_path, alone):
    options = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    if kind == "ddp with a cache":
        options |= {"precompute_reference": True, "reference_dtype": "float32"}
    if kind == "ddp of split batches":
        options = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
        options |= {"accelerator_config": {"split_batches": True}}
    if kind == "ddp":
        options |= {"save_strategy": "steps", "save_steps": 3}
    two = run(tmp_path, 2, FSDP if kind == "fsdp2" else None, adapters=adapters, **options)
    # 37 rows in batches of two leave three rows for the last four places: a loader fills up, metrics must not.
    assert {"eval_loss", "eval_rewards/accuracies", "eval_entropy"} <= set(alone[adapters])
    assert_equal(two, alone[adapters])
    assert (tmp_path / "final" / ("adapter_model.safetensors" if adapters else "model.safetensors")).exists()


@pytest.mark.slow
def test_two_processes_on_a_stream_equal_one(tmp_path):
    """Through one and a half passes, a resumption, and an evaluation.

    Of as many files as processes: shares of files would have other lengths, and evaluations wait for ever.
    """
    options = {"rows": 16, "shards": 4}
    one = run(tmp_path, 1, per_device_train_batch_size=4, **options)
    options |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    assert_equal(run(tmp_path, 2, **options, save_strategy="steps", save_steps=3), one)
