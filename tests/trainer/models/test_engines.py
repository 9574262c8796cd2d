"""DeepSpeed, tensor-parallel plans and QLoRA: two processes train to the losses and gradients of one.

Those that need DeepSpeed or bitsandbytes run with `make engines`, which installs them.
"""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tdpo.cli.main import main
from tdpo.models.loading import load_policy
from tdpo.options import ModelOptions
from transformers import AutoModelForCausalLM

from helpers.model_families import make_model, make_tokenizer
from helpers.trainer_cases import make_preferences, make_trainer, run_python


def needs(package):
    return [pytest.mark.engines, pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")]


def run(folder, processes, **options):
    for seed in (0, 1):
        name = options.get("family", "llama")
        if not (folder / f"{name}-{seed}").exists():
            make_model(name, seed).save_pretrained(folder / f"{name}-{seed}")
    command = ["-m", "helpers.engine_run", str(folder / f"out-{processes}"), json.dumps(options)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--master_port", "0"]
        command = [*launcher, "--nproc_per_node", str(processes), *command]
    done = run_python(*command, cwd=folder, environment={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("RESULT")[1].splitlines()[0])


ZERO3 = {"engine": "zero3"}
CASES = {
    "tensor parallel, tied head": {"engine": "tensor_parallel", "family": "qwen2"},
    "tensor parallel, no reference given": {"engine": "tensor_parallel", "reference": False},
    "ZeRO-2": {"engine": "zero2"},
    "ZeRO-3": ZERO3,
    "ZeRO-3, partitioned as it loads, tied head, no reference given": {
        **ZERO3,
        "partitioned": True,
        "family": "qwen2",
        "reference": False,
    },
    "ZeRO-3, partitioned as it loads": {**ZERO3, "partitioned": True},
    "ZeRO-3, adapters": {**ZERO3, "partitioned": True, "adapters": "new"},
    "ZeRO-2, trained adapters": {"engine": "zero2", "adapters": "trained"},
    "ZeRO-3, trained adapters": {**ZERO3, "adapters": "trained"},
    "ZeRO-3, trained adapters, partitioned as it loads": {**ZERO3, "partitioned": True, "adapters": "trained"},
    "ZeRO-3, trained adapters that stay gathered": {**ZERO3, "adapters": "trained", "persistence_threshold": 100_000},
    "ZeRO-3, partly frozen": {**ZERO3, "partitioned": True, "reference": False, "trains": "mlp"},
    "tensor parallel, partly frozen": {"engine": "tensor_parallel", "reference": False, "trains": "mlp"},
}
MARKS = {name: needs("deepspeed") if name.startswith("ZeRO") else [] for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS[name]) for name in CASES])
def test_two_processes_equal_one(name, tmp_path):
    case = CASES[name]
    parallel = case["engine"] == "tensor_parallel"
    two = run(tmp_path, 2, **case, per_device_train_batch_size=4 if parallel else 2, max_steps=4)
    plain = {
        option: value
        for option, value in case.items()
        if option not in ("engine", "partitioned", "persistence_threshold")
    }
    one = run(tmp_path, 1, **plain, per_device_train_batch_size=4, max_steps=4)
    for quantity, values in one.items():
        assert two[quantity] == pytest.approx(values, rel=1e-5, abs=1e-6), quantity
    file = "adapter_model.safetensors" if case.get("adapters") else "model.safetensors"
    saved, expected = (load_file(tmp_path / f"out-{processes}" / "final" / file) for processes in (2, 1))
    assert saved.keys() >= expected.keys()  # transformers may save a tied head twice
    for tensor, value in expected.items():
        torch.testing.assert_close(saved[tensor], value, rtol=1e-3, atol=1e-4, msg=tensor)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param(name, marks=needs("deepspeed")) for name in ("zero2", "zero3")])
def test_the_reference_is_rounded_as_the_policy(engine, tmp_path):
    """DeepSpeed computes with weights that it has rounded to bfloat16 itself."""
    trained = run(tmp_path, 2, engine=engine, reference=False, bf16=True, max_steps=1)
    assert trained["kl/rejected"] == [0]
    assert trained["losses"] == [pytest.approx(math.log(2), abs=1e-6)]


def quantizable():
    """A Llama whose layers have multiples of 32 outputs, as bitsandbytes wants them on a CPU."""
    return make_model("llama", hidden_size=64, head_dim=16, intermediate_size=128)


def train_flags(folder, model):
    """Flags of two steps on a model and tiny data, which are written to a folder first."""
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    make_preferences().to_json(str(folder / "data.jsonl"))
    files = ["--model", str(folder / "model"), "--dataset", str(folder / "data.jsonl")]
    limits = ["--max_length", "40", "--max_prompt_length", "16", "--max_steps", "2", "--learning_rate", "0.01"]
    return [*files, "--output_dir", str(folder / "out"), *limits, "--use_cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("configuration", [pytest.param("zero3.yaml", marks=needs("deepspeed"))])
def test_the_examples_configuration_of_accelerate(configuration, tmp_path):
    """As written but for what a machine without GPUs lacks: eight of them, and their bfloat16."""
    path = Path(__file__).parents[3] / "examples" / "accelerate" / configuration
    here = ["--num_processes", "2", "--mixed_precision", "no"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(path), *here]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = run_python(
        *launch,
        "-m",
        "tdpo",
        "train",
        *train_flags(tmp_path, make_model("llama")),
        cwd=tmp_path,
        environment=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    partitions = (tmp_path / "out" / "checkpoint-2" / "global_step2").glob("zero_pp_rank_*_model_states.pt")
    assert len(list(partitions)) == 2  # ZeRO-3's: a part of the weights for each process
    start, trained = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "out"))
    assert (trained.lm_head.weight - start.lm_head.weight).abs().max() > 1e-3


@pytest.mark.engines
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_gradients_through_quantized_weights_after_an_evaluation(tmp_path):
    """Equal to those through the same weights in full precision, though bitsandbytes may compute otherwise by then."""
    quantizable().save_pretrained(tmp_path)
    gradients = []
    for dequantize in (False, True):
        model = load_policy(ModelOptions(model=str(tmp_path), load_in_4bit=True))
        if dequantize:
            model = model.dequantize().float()
        torch.manual_seed(0)
        adapters = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        trainer = make_trainer(tmp_path / "out", model, peft_config=adapters)
        trainer.evaluate()
        trainer.model.train()
        trainer.model(preference=next(iter(trainer.get_train_dataloader()))).loss.backward()
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trained]))
    quantized, dense = gradients
    assert (quantized - dense).norm() < 0.05 * dense.norm()  # it multiplies in bfloat16


@pytest.mark.parametrize("option", [pytest.param("--load_in_4bit", marks=needs("bitsandbytes"))])
def test_adapters_of_quantized_weights_are_merged_in_full_precision(option, tmp_path, recwarn):
    out = tmp_path / "out"
    assert main(["train", *train_flags(tmp_path, quantizable()), "--lora_r", "4", option, "--merge_adapters"]) == 0
    assert not [warning for warning in recwarn if "fused loss" in str(warning.message)]
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert {value.dtype for value in merged.state_dict().values()} == {torch.float32}
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), out)
    tokens = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(merged(input_ids=tokens).logits, adapted(input_ids=tokens).logits)
