"""TRL's DPOTrainer with the TDPO loss: data, configuration and logging are TRL's.

pip install '.[trl]' && python examples/trl_tdpo.py
"""

from datasets import load_dataset
from tdpo.trl import TDPOTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

NAME = "Qwen/Qwen2.5-0.5B-Instruct"

if __name__ == "__main__":
    args = DPOConfig(output_dir="out/trl", beta=0.1, learning_rate=5e-7, per_device_train_batch_size=4, bf16=True)
    TDPOTrainer(
        AutoModelForCausalLM.from_pretrained(NAME),
        args=args,
        alpha=0.5,
        variant="tdpo2",
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
        processing_class=AutoTokenizer.from_pretrained(NAME),
    ).train()
