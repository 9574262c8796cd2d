"""What `tdpo memory` says of a step, against the bytes of the tensors that are alive in a real one."""

import pytest
import torch
from datasets import Dataset
from tdpo import TDPOConfig, TDPOTrainer
from tdpo.memory.training import Batch, Device, Training
from tdpo.models.loading import load_policy, lora_config
from tdpo.options import ModelOptions

from helpers.live_bytes import LiveBytes
from helpers.model_families import make_model, make_tokenizer

PROMPT, RESPONSE, PAIRS = 10, 30, 2
# So that weights, activations and the loss take about as much as each other, and what is outside the layers little.
SIZES = {"hidden_size": 96, "intermediate_size": 192, "vocab_size": 1600, "num_hidden_layers": 6}
STEPS = {"max_steps": 2, "audit": "never", "save_strategy": "no", "disable_tqdm": True, "shared_prompts": "never"}


def pairs():
    """The batches that the estimate is for, but that one response is a token shorter: most batches are padded."""
    lengths = {"prompt_ids": PROMPT, "chosen_ids": RESPONSE, "rejected_ids": RESPONSE}
    rows = [{name: torch.randint(1, 200, (size,)).tolist() for name, size in lengths.items()} for _ in range(8)]
    for row in rows[::PAIRS]:
        row["chosen_ids"].pop()
    return Dataset.from_list(rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("options", "phase"),
    [
        ({}, "loss"),
        ({"bf16": True}, "loss"),
        ({"gradient_accumulation_steps": 2}, "loss"),
        ({"bf16": True, "gradient_accumulation_steps": 2}, "loss"),
        ({"activation_checkpointing": True, "logits_budget": 300_000}, "gradients"),
        ({"lora_r": 4}, "loss"),
        ({"lora_r": 4, "bf16": True, "activation_checkpointing": True}, "loss"),
    ],
)
def test_the_peak_of_a_step_is_that_of_its_tensors(options, phase, tied, tmp_path):
    make_model("llama", tie_word_embeddings=tied, **SIZES).save_pretrained(tmp_path / "model")
    models = ModelOptions(model=str(tmp_path / "model"), lora_r=options.get("lora_r", 0))
    settings = {"max_length": PROMPT + RESPONSE, "max_prompt_length": PROMPT, "per_device_train_batch_size": PAIRS}
    settings |= {name: value for name, value in options.items() if name != "lora_r"}
    args = TDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **STEPS, **settings)
    # As of a GPU: blocks that the CPU's cache keeps for the next loss are no tensors.
    training, batch = Training.of(models, args, Device("cuda", 1 << 30)), Batch(PAIRS, PROMPT, RESPONSE, False)
    phases = training.phases(batch, training.loss(batch)["tdpo"])
    trainer = TDPOTrainer(
        load_policy(models),
        args=args,
        train_dataset=pairs(),
        processing_class=make_tokenizer(),
        peft_config=lora_config(models),
    )
    with LiveBytes() as alive:
        trainer.train()
    loaded = training.weights + training.reference.bytes
    assert training.together(batch)["tdpo"] == max(phases.values()) == phases[phase]
    assert alive.peak == pytest.approx(max(phases.values()) - loaded, rel=0.1)
