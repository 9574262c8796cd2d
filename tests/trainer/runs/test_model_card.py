"""The model card: options, names and results."""

import yaml
from peft import LoraConfig

from helpers.model_families import make_model
from helpers.trainer_cases import make_trainer


def test_model_cards(tmp_path):
    sources = {"tdpo2": "2404.11999", "tdpo1": "2404.11999", "dpo": "2305.18290"}
    for variant, own in {"tdpo2": {"alpha": 0.7}, "tdpo1": {}, "dpo": {}}.items():
        trainer = make_trainer(tmp_path, variant=variant, beta=0.2, warmup_steps=3, **own)
        trainer.save_model()
        card = (tmp_path / "README.md").read_text()
        assert f"variant: {variant}\nbeta: 0.2\n" in card
        options = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
        lengths = {"max_length": 40, "max_prompt_length": 16, "max_steps": 6, "per_device_train_batch_size": 4}
        schedule = {"learning_rate": 0.001, "warmup_steps": 3, "optim": "adamw_torch_fused"}
        # Others, such as weight_decay, are at their defaults.
        assert options == {"variant": variant, "beta": 0.2, **own, **schedule, **lengths}
        assert {source for source in sources.values() if source in card} == {sources[variant]}
        assert ("aligned by token-level direct" in card) == variant.startswith("tdpo")
        assert "base_model" not in card
        assert "given in memory` on `preference pairs given in memory` (24 pairs)" in card
    trainer.model.config._name_or_path, trainer.data_name = "some/base", "some/data"
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "base_model: some/base" in card
    assert "from `some/base` on `some/data`" in card


def test_the_card_of_an_objective_of_ones_own(tmp_path):
    trainer = make_trainer(tmp_path, objective=lambda chosen, rejected: rejected.logps - chosen.logps)
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "The loss is an objective that was given in memory." in card
    assert "variant" not in card
    assert "2404.11999" not in card


def rows_of_table(markdown):
    """The cells of every row but the head."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_model_cards_show_results(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path, model=make_model("llama"), peft_config=config, **options)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    names = ["loss", "rewards/accuracies", "rewards/margins", "kl/chosen", "kl/rejected"]
    assert card.count(f"| step | {' | '.join(names)} |") == 2
    for step in (2, 4):
        entry = next(e for e in trainer.state.log_history if e["step"] == step and "eval_loss" in e)
        assert f"| {step} | " + " | ".join(f"{entry['eval_' + name]:.4g}" for name in names) in card
    trained, evaluated = (rows_of_table(part) for part in card.split("Evaluations ("))
    last = [e for e in trainer.state.log_history if "loss" in e][-1]
    assert trained == [["4", *(f"{last[name]:.4g}" for name in names)]]
    assert [row[0] for row in evaluated] == ["2", "4"]
    assert trained[0][1:] != evaluated[1][1:]
    assert "library_name: peft" in card
    assert "adapters: LoraConfig\nrank: 4" in card
