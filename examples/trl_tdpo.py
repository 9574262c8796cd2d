"""TRL's DPOTrainer with the TDPO loss: data, configuration and logging are TRL's; only one import differs.

pip install '.[trl]' && python examples/trl_tdpo.py
"""

from datasets import Dataset, load_dataset
from tdpo.trl import TDPOTrainer as DPOTrainer  # before: from trl import DPOTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

NAME = "Qwen/Qwen2.5-0.5B-Instruct"


def main(name: str, preferences: Dataset, args: DPOConfig) -> DPOTrainer:
    """Trains a model on preferences. TDPO's own options, such as `alpha` and `variant`, would be further arguments."""
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(name),
        args=args,
        train_dataset=preferences,
        processing_class=AutoTokenizer.from_pretrained(name),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(
        NAME,
        load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
        DPOConfig(output_dir="out/trl", beta=0.1, learning_rate=5e-7, per_device_train_batch_size=4, bf16=True),
    )
