"""A run of the trainer on one of the engines, as a program: python -m helpers.engine_run OUT OPTIONS (JSON).

Beside TDPOConfig's options: `engine`, zero2, zero3, tensor_parallel or none; `partitioned`, weights are partitioned
while they are loaded; `persistence_threshold`, of ZeRO-3; `adapters`, new or trained (before); `trains`, the name of
what trains alone; `family` of the models; `reference`, false to have the policy as it starts. Prints RESULT and what
the run logged. The models are read from folders FAMILY-0 and FAMILY-1 beside OUT.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.parallelism_config import ParallelismConfig
from peft import LoraConfig
from tdpo import TDPOConfig
from transformers import AutoModelForCausalLM

from helpers.trainer_cases import SETTINGS, losses, make_preferences, make_trainer, with_trained_adapters

KEPT = []  # options with a DeepSpeed configuration, by which transformers loads models as long as they live


def deepspeed_config(stage, persistence_threshold):
    """Nothing is left to DeepSpeed's own compiled optimizers. Smaller parameters than the threshold stay gathered."""
    zero = {"stage": stage}
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": persistence_threshold,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    automatic = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True, **dict.fromkeys(automatic, "auto")}


def main(
    out,
    *,
    engine="",
    partitioned=False,
    adapters=None,
    trains=None,
    family="llama",
    reference=True,
    persistence_threshold=0,
    **options,
):
    if engine.startswith("zero"):
        options["deepspeed"] = deepspeed_config(int(engine[-1]), persistence_threshold)
    loading = {"tp_plan": "auto"} if engine == "tensor_parallel" else {}
    if loading:  # accelerate wants an accelerator for it; the rest of it works on gloo too
        ParallelismConfig._validate_accelerator = lambda *arguments: None
    if partitioned:
        import deepspeed

        KEPT.append(TDPOConfig(output_dir=out, **{**SETTINGS, **options}))
        deepspeed.init_distributed("gloo")
    policy, frozen = (
        AutoModelForCausalLM.from_pretrained(Path(out).parent / f"{family}-{seed}", **loading) for seed in (0, 1)
    )
    spread = partitioned or engine == "tensor_parallel"
    assert any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in policy.parameters()) == spread
    if trains is not None:
        for name, parameter in policy.named_parameters():
            parameter.requires_grad = trains in name
    if adapters == "trained":
        policy = with_trained_adapters(policy)
    if adapters == "new":
        options["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer = make_trainer(
        out, policy, frozen if reference and not adapters else None, eval_dataset=make_preferences(37), **options
    )
    trainer.train()
    if engine == "zero3" and trainer.ref_model is not None:
        assert all(hasattr(parameter, "ds_id") for parameter in trainer.ref_model.parameters())
    evaluated = trainer.evaluate()
    trainer.save_model(out + "/final")
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "losses": losses(trainer),
        **{name: [entry[name] for entry in log] for name in ("grad_norm", "kl/rejected", "num_tokens")},
        "evaluation": [evaluated["eval_loss"], evaluated["eval_kl/chosen"]],
    }
    if int(os.environ.get("RANK", 0)) == 0:
        print("RESULT" + json.dumps(result))


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1], **json.loads(sys.argv[2]))
    # Without finalising the interpreter: gloo's threads may need its lock for their last tensors, and abort then.
    sys.stdout.flush()
    os._exit(0)
