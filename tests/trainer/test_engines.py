"""DeepSpeed, tensor-parallel plans and QLoRA: two processes train to the losses and gradients of one.

Those that need DeepSpeed or bitsandbytes run with `make engines`, which installs them.
"""

import json
from importlib.util import find_spec

import pytest
import torch
from model_families import make_model, make_tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from tdpo.cli import main
from trainer_cases import make_preferences, run_python
from transformers import AutoModelForCausalLM


def needs(package):
    return [pytest.mark.engines, pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")]


def run(folder, processes, **options):
    for seed in (0, 1):
        name = options.get("family", "llama")
        if not (folder / f"{name}-{seed}").exists():
            make_model(name, seed).save_pretrained(folder / f"{name}-{seed}")
    command = ["-m", "engine_run", str(folder / f"out-{processes}"), json.dumps(options)]
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
    "ZeRO-3, adapters": {**ZERO3, "partitioned": True, "adapters": True},
}
MARKS = {name: needs("deepspeed") if name.startswith("ZeRO") else [] for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS[name]) for name in CASES])
def test_two_processes_equal_one(name, tmp_path):
    case = CASES[name]
    parallel = case["engine"] == "tensor_parallel"
    two = run(tmp_path, 2, **case, per_device_train_batch_size=4 if parallel else 2, max_steps=4)
    plain = {option: value for option, value in case.items() if option not in ("engine", "partitioned")}
    one = run(tmp_path, 1, **plain, per_device_train_batch_size=4, max_steps=4)
    for quantity, values in one.items():
        assert two[quantity] == pytest.approx(values, rel=1e-5, abs=1e-6), quantity
    file = "adapter_model.safetensors" if case.get("adapters") else "model.safetensors"
    saved, expected = (load_file(tmp_path / f"out-{processes}" / "final" / file) for processes in (2, 1))
    assert saved.keys() >= expected.keys()  # transformers may save a tied head twice
    for tensor, value in expected.items():
        torch.testing.assert_close(saved[tensor], value, rtol=1e-3, atol=1e-4, msg=tensor)


@pytest.mark.parametrize("option", [pytest.param("--load_in_4bit", marks=needs("bitsandbytes"))])
def test_adapters_of_quantized_weights_are_merged_in_full_precision(option, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    make_preferences().to_json(str(tmp_path / "data.jsonl"))
    out = tmp_path / "out"
    limits = ["--max_length", "40", "--max_prompt_length", "16", "--max_steps", "2", "--learning_rate", "0.01"]
    flags = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "data.jsonl"), "--output_dir", str(out)]
    assert main(["train", *flags, *limits, "--use_cpu", "--lora_r", "4", option, "--merge_adapters"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert {value.dtype for value in merged.state_dict().values()} == {torch.float32}
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), out)
    tokens = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(merged(input_ids=tokens).logits, adapted(input_ids=tokens).logits)
