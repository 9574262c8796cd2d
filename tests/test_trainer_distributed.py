"""Several processes (DDP and FSDP2, on gloo) train to the loss curve of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import json, os, sys
import accelerate.state
from model_families import make_model, make_tokenizer
from trainer_cases import losses, make_preferences, make_trainer

out, options = sys.argv[1], json.loads(sys.argv[2])
if os.environ.get("ACCELERATE_USE_FSDP"):  # accelerate shards on accelerators only; the rest of it works on gloo too
    initialise = accelerate.state.AcceleratorState.__init__
    def sharding(self, *arguments, fsdp_plugin=None, **rest):
        initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **rest)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = accelerate.state.DistributedType.FSDP, fsdp_plugin
    accelerate.state.AcceleratorState.__init__ = sharding
models = make_model("llama"), make_model("llama", 1)
trainer = make_trainer(out, make_tokenizer(), make_preferences(), *models, **options)
trainer.train()
if os.environ.get("ACCELERATE_USE_FSDP"):
    from torch.distributed.tensor import DTensor
    assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
    # What accelerate would gather on an accelerator.
    whole = lambda model: {name: value.full_tensor() for name, value in model.state_dict().items()}
    trainer.accelerator.get_state_dict = whole
evaluated = trainer.evaluate()
trainer.save_model(out + "/final")
if trainer.args.should_save:
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    print("RESULT" + json.dumps({"losses": losses(trainer), "kl": [entry["kl/rejected"] for entry in log],
                                 "eval": evaluated["eval_loss"], "eval_kl": evaluated["eval_kl/chosen"]}))
"""
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def run(out, processes, environment=None, **options):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0", "--standalone"]
    script = Path(out, "run.py")
    Path(out).mkdir(parents=True, exist_ok=True)
    script.write_text(RUN)
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), str(out), json.dumps(options)]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=out)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("RESULT")[1].splitlines()[0])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"), 1, per_device_train_batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "ddp with a cache", "fsdp2"])
def test_two_processes_equal_one(kind, tmp_path, alone):
    options = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    if kind == "ddp with a cache":
        options |= {"precompute_reference": True, "reference_dtype": "float32"}
    two = run(tmp_path, 2, FSDP if kind == "fsdp2" else None, **options)
    for name, values in alone.items():
        assert two[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
    assert (tmp_path / "final" / "model.safetensors").exists()
