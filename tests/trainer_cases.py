"""A small preference data set and a trainer on tiny models, for the trainer's tests."""

from datasets import Dataset
from model_families import make_model
from tdpo import TDPOConfig, TDPOTrainer


def make_preferences(rows=24):
    return Dataset.from_list(
        [
            {
                "prompt": "the film was" + " really" * (i % 3),
                "chosen": " great" + " good" * (i % 4),
                "rejected": " bad" + " awful" * (i % 5),
            }
            for i in range(rows)
        ]
    )


def make_trainer(path, tokenizer, preferences, model=None, ref_model=None, trainer=TDPOTrainer, **options):
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "max_length": 40,
        "max_prompt_length": 16,
        "save_strategy": "no",
    }
    peft_config, evaluation = options.pop("peft_config", None), options.pop("eval_dataset", None)
    args = TDPOConfig(output_dir=str(path), **{**settings, **options})
    return trainer(
        model or make_model("gpt2"),
        ref_model,
        args,
        train_dataset=preferences,
        eval_dataset=preferences.select(range(8)) if evaluation is None else evaluation,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
