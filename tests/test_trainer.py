"""The trainer on tiny models: the fused path against logits, resume, metrics, and bad input."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from model_families import FAMILIES, make_model, make_tokenizer
from tdpo import LanguageModelHead, PreferenceCollator, TDPOConfig, TDPOTrainer, tokenize_preferences

from tdpo_ext import reference


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def preferences():
    rows = [
        {"prompt": "the film was", "chosen": " great" + " good" * (i % 4), "rejected": " bad" + " awful" * (i % 3)}
        for i in range(24)
    ]
    return Dataset.from_list(rows)


def make_trainer(path, tokenizer, preferences, model=None, ref_model=None, **options):
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
    args = TDPOConfig(output_dir=str(path), **{**settings, **options})
    return TDPOTrainer(
        model or make_model("gpt2"),
        ref_model,
        args,
        train_dataset=preferences,
        eval_dataset=preferences.select(range(8)),
        processing_class=tokenizer,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_loss_equals_the_logits_path(family, tmp_path, tokenizer, preferences):
    trainer = make_trainer(tmp_path, tokenizer, preferences, make_model(family, 0), make_model(family, 1))
    assert trainer.loss.obstacle is None
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    fused = trainer.model(preference=batch)
    fused.loss.backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    trainer.loss.obstacle = "for this test"
    plain = trainer.model(preference=batch)
    plain.loss.backward()
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused.chosen.kl, plain.chosen.kl, rtol=1e-4, atol=1e-5)
    assert torch.equal(fused.correct, plain.correct)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_logits_path_equals_the_oracle(tmp_path, tokenizer, preferences):
    trainer = make_trainer(tmp_path, tokenizer, preferences, make_model("gpt2", 0), make_model("gpt2", 1))
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.model(preference=batch).loss
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = torch.full_like(batch["input_ids"], -100)
    labels.view(-1)[batch["rows"]] = batch["targets"]
    divergence = reference.token_divergence(
        trainer.model(**inputs).logits.double(), trainer.ref_model(**inputs).logits.double(), labels
    )
    expected = trainer.args.objective()(*divergence.per_sequence().chunk(2)).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


class ScaledHead(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return 2 * self.head(hidden)


def test_unknown_heads_fall_back_with_one_warning(tmp_path, tokenizer, preferences):
    model = make_model("llama")
    model.lm_head = ScaledHead(model.lm_head)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tmp_path, tokenizer, preferences, model)
    ours = [str(warning.message) for warning in caught if "fused" in str(warning.message)]
    assert len(ours) == 1
    assert "ScaledHead" in ours[0]
    trainer.train()
    assert len(losses(trainer)) == 6


def test_scaled_logits_are_noticed():
    model = make_model("llama")
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 1.5 * output.logits
        return output

    model.forward = scaled
    assert "not a linear" in LanguageModelHead.of(model).obstacle


@pytest.mark.parametrize("variant", ["tdpo2", "tdpo1", "dpo"])
def test_training_raises_margins(variant, tmp_path, tokenizer, preferences):
    trainer = make_trainer(tmp_path, tokenizer, preferences, variant=variant, max_steps=12)
    trainer.train()
    first, last = (entry for entry in (trainer.state.log_history[0], trainer.state.log_history[11]))
    assert last["rewards/margins"] > first["rewards/margins"] + 0.05
    assert last["loss"] < first["loss"]


def test_metrics_have_their_names(tmp_path, tokenizer, preferences):
    trainer = make_trainer(tmp_path, tokenizer, preferences, max_steps=2)
    trainer.train()
    wanted = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
    wanted |= {"kl/chosen", "kl/rejected", "kl/margin", "logps/chosen", "logps/rejected"}
    wanted |= {"entropy", "mean_token_accuracy"}
    assert wanted <= set(trainer.state.log_history[0])
    evaluated = trainer.evaluate()
    assert {f"eval_{name}" for name in wanted} <= set(evaluated)
    log = trainer.state.log_history[0]
    assert log["kl/margin"] == pytest.approx(log["kl/rejected"] - log["kl/chosen"], abs=1e-6)
    assert log["rewards/chosen"] == pytest.approx(0, abs=1e-4)  # the first step starts at the reference


def test_the_reference_is_frozen(tmp_path, tokenizer, preferences):
    trainer = make_trainer(tmp_path, tokenizer, preferences, max_steps=2)
    before = {name: value.clone() for name, value in trainer.ref_model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.ref_model.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_resume_is_exact(tmp_path, tokenizer, preferences):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}
    unbroken = make_trainer(tmp_path / "a", tokenizer, preferences, **options)
    unbroken.train()
    resumed = make_trainer(tmp_path / "b", tokenizer, preferences, ref_model=make_model("gpt2"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(resumed) == losses(unbroken)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, unbroken.model.state_dict()[name]), name


def test_gradient_accumulation(tmp_path, tokenizer, preferences):
    whole = make_trainer(tmp_path, tokenizer, preferences, max_steps=2, optim="sgd")
    whole.train()
    parts = make_trainer(
        *(tmp_path, tokenizer, preferences),
        max_steps=2,
        optim="sgd",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    for name, value in parts.model.state_dict().items():
        torch.testing.assert_close(value, whole.model.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_tokenization(tokenizer):
    rows = Dataset.from_list([{"prompt": "the film was great", "chosen": " good fun", "rejected": " bad" * 50}])
    row = tokenize_preferences(rows, tokenizer, max_length=12, max_prompt_length=3)[0]
    prompt = tokenizer("the film was great")["input_ids"]
    assert row["prompt_ids"] == prompt[-3:]
    assert row["chosen_ids"] == [*tokenizer(" good fun")["input_ids"], tokenizer.eos_token_id]
    assert len(row["rejected_ids"]) == 9
    assert row["rejected_ids"][-1] == tokenizer.eos_token_id


def test_collator_puts_chosen_first():
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 9], "rejected_ids": [4, 5, 9]},
        {"prompt_ids": [], "chosen_ids": [7, 9], "rejected_ids": [8, 9]},
    ]
    batch = PreferenceCollator(pad_token_id=0)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 0], [7, 9, 0, 0, 0], [1, 2, 4, 5, 9], [8, 9, 0, 0, 0]]
    assert batch["attention_mask"].sum(-1).tolist() == [4, 2, 5, 2]
    assert batch["cu_seqlens"].tolist() == [0, 2, 3, 6, 7]
    assert batch["rows"].tolist() == [1, 2, 5, 11, 12, 13, 15]
    assert batch["targets"].tolist() == [3, 9, 9, 4, 5, 9, 9]
    packed = PreferenceCollator(pad_token_id=0, padding_free=True)(rows)
    assert packed["input_ids"].tolist() == [[1, 2, 3, 9, 7, 9, 1, 2, 4, 5, 9, 8, 9]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 0, 1]]
    assert packed["targets"].tolist() == batch["targets"].tolist()
    assert packed["rows"].tolist() == [1, 2, 4, 7, 8, 9, 11]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b"}], "rejected"),
        ([{"prompt": "a", "chosen": "", "rejected": "c"}], "chosen"),
    ],
)
def test_bad_data_is_named(rows, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        tokenize_preferences(Dataset.from_list(rows), tokenizer, 20, 10)


def test_tokenizer_without_an_end():
    with pytest.raises(ValueError, match="eos_token"):
        tokenize_preferences(
            Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]), make_tokenizer(eos=None), 20, 10
        )


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"beta": 0.0}, "beta"),
        ({"variant": "ipo"}, "variant"),
        ({"alpha": -1.0}, "alpha"),
        ({"max_prompt_length": 40}, "max_prompt_length"),
    ],
)
def test_bad_config_is_named(options, name, tmp_path):
    with pytest.raises(ValueError, match=name):
        TDPOConfig(output_dir=str(tmp_path), **{"max_length": 40, "max_prompt_length": 8, **options})


def test_reference_with_another_vocabulary(tmp_path, tokenizer, preferences):
    other = make_model("gpt2")
    other.resize_token_embeddings(310)
    with pytest.raises(ValueError, match="ref_model"):
        make_trainer(tmp_path, tokenizer, preferences, ref_model=other)


SMALL_DEMO = [
    *("--reviews", "600"),
    *("--pretrain-steps", "5", "--prompts", "24", "--eval-prompts", "8", "--steps", "4", "--eval-every", "2"),
    *("--response-tokens", "6", "--batch-pairs", "4"),
]


def demo(*arguments):
    code = "import sys; from tdpo.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)


@pytest.mark.slow
def test_demo_runs_resumes_and_refuses_other_settings(tmp_path):
    out = tmp_path / "demo"
    first = demo("--out", str(out), *SMALL_DEMO, "--methods", "dpo")
    assert first.returncode == 0, first.stderr
    base = (out / "base" / "model.safetensors").stat().st_mtime
    curve = json.loads((out / "dpo" / "frontier.json").read_text())
    assert [point["step"] for point in curve] == [0, 2, 4]
    assert curve[0]["kl"] == pytest.approx(0, abs=1e-5)
    second = demo("--out", str(out), *SMALL_DEMO, "--methods", "dpo", "tdpo2")
    assert second.returncode == 0, second.stderr
    assert (out / "base" / "model.safetensors").stat().st_mtime == base
    assert json.loads((out / "dpo" / "frontier.json").read_text()) == curve
    assert (out / "frontier.png").stat().st_size > 5000
    assert "matched KL" in second.stdout
    assert demo("--out", str(out), *SMALL_DEMO, "--seed", "1").returncode == 2


def test_demo_help_documents_its_knobs():
    shown = demo("--help").stdout
    for knob in ("--beta", "--methods", "--eval-every", "--seed"):
        assert knob in shown


def test_demo_rejects_unknown_methods():
    refused = demo("--methods", "ppo")
    assert refused.returncode == 2
    assert "ppo" in refused.stderr
