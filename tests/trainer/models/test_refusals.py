"""What the checks refuse, on the command line and in TRL's trainer."""

import pytest
import transformers as t
from datasets import Dataset
from peft import LoraConfig
from tdpo.cli.main import main

from helpers.model_families import make_model, make_tokenizer
from helpers.refused_models import BART, BERT, LORA, OUTSIDE, WRONG, adapted, cut, loaded, tokenizer_with
from helpers.trainer_cases import SETTINGS, make_preferences


@pytest.fixture
def home(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "model")
    make_preferences().to_json(str(tmp_path / "data.jsonl"))
    return tmp_path


def run(home, command, *options, max_length="40"):
    options = [*options, "--model", str(home / "model"), "--dataset", str(home / "data.jsonl"), "--use_cpu"]
    options += ["--output_dir", str(home / "out"), "--max_length", max_length, "--max_prompt_length", "16"]
    return main([command, *options])


def refusal(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tdpo: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("tdpo: ")


@pytest.mark.parametrize("command", ["train", "cache-reference"])
def test_the_command_line_says_it_in_one_line(command, home, capsys):
    def refused(model, **options):
        model.save_pretrained(home / "model")
        assert run(home, command, **options) == 2
        return refusal(capsys)

    assert "earlier tokens see later ones" in refused(t.BertForMaskedLM(t.BertConfig(**BERT)))
    assert "the decoder of BartForConditionalGeneration" in refused(
        t.BartForConditionalGeneration(t.BartConfig(**BART))
    )
    assert refused(make_model("gpt2"), max_length="129").startswith("max_length is 129, but model has 128 positions")
    assert "but model embeds 250 tokens" in refused(cut(make_model("llama"), 250))
    make_model("llama").save_pretrained(home / "model")
    make_model("gpt2", n_positions=32).save_pretrained(home / "reference")
    assert run(home, command, "--ref_model", str(home / "reference")) == 2
    assert refusal(capsys).startswith("max_length is 40, but ref_model has 32 positions")


@pytest.mark.parametrize("command", ["train", "cache-reference"])
def test_the_command_line_says_which_row_has_an_unknown_token(command, home, capsys):
    cut(make_model("llama"), 290).save_pretrained(home / "model")
    tokenizer_with(additional_special_tokens=["<image>"]).save_pretrained(home / "model")
    rows = [*make_preferences(2), {"prompt": "a", "chosen": " good", "rejected": " bad <image>"}]
    Dataset.from_list(rows).to_json(str(home / "data.jsonl"))
    assert run(home, command) == 2
    assert refusal(capsys).startswith("row 2 of the dataset has the token id 290 in 'rejected_ids'")


def trl_trainer(path, model, ref_model=None, *, tokenizer=None, data=None, **options):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from tdpo.trl import TDPOTrainer as TRLTrainer

    settings = {name: value for name, value in SETTINGS.items() if name != "max_prompt_length"}
    args = trl.DPOConfig(output_dir=str(path), bf16=False, **{**settings, "report_to": "none", "max_length": 40})
    data = make_preferences() if data is None else data
    return TRLTrainer(
        model, ref_model, args, train_dataset=data, processing_class=tokenizer or make_tokenizer(), **options
    )


@pytest.mark.parametrize("argument", ["model", "ref_model"])
@pytest.mark.parametrize("kind", ["BART", "BERT", "backbone", "classifier", "needs images"])
def test_trls_trainer_refuses_the_same(kind, argument, tmp_path):
    make, message = WRONG[kind]
    models = {"model": make_model("llama"), "ref_model": make_model("llama"), argument: make()}
    with pytest.raises(ValueError, match=f"^{argument} is .*{message}"):
        trl_trainer(tmp_path, **models)


def test_trls_trainer_checks_models_that_are_named(tmp_path):
    t.BertLMHeadModel(t.BertConfig(**BERT)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"^model is .*earlier tokens see later ones"):
        trl_trainer(tmp_path, str(tmp_path / "bert"), make_model("llama"))


def test_trls_trainer_checks_sizes_adapters_and_references(tmp_path):
    with pytest.raises(ValueError, match=r"^max_length is 40, but model has 32 positions"):
        trl_trainer(tmp_path, make_model("gpt2", n_positions=32), make_model("gpt2"))
    with pytest.raises(ValueError, match=r"^peft_config has adapters of the kind PROMPT_TUNING"):
        trl_trainer(tmp_path, make_model("llama"), peft_config=OUTSIDE["prompt tuning"][0])
    with pytest.raises(ValueError, match=r"^peft_config is given, but model has adapters already"):
        trl_trainer(tmp_path, adapted(), peft_config=LoraConfig(**LORA))
    model, reference = make_model("llama"), make_model("llama", 1)
    reference.lm_head.weight = model.lm_head.weight
    with pytest.raises(ValueError, match=r"^ref_model shares lm_head.weight with model"):
        trl_trainer(tmp_path, model, reference)
    model, reference = make_model("qwen2"), make_model("qwen2", 1)
    reference.model.layers[0].self_attn.q_proj.bias = model.model.layers[0].self_attn.q_proj.bias
    with pytest.raises(ValueError, match=r"^ref_model shares model.layers.0.self_attn.q_proj.bias with model"):
        trl_trainer(tmp_path, model, reference, peft_config=LoraConfig(**LORA, bias="all"))
    with pytest.raises(ValueError, match="no parameter that trains: load its adapters with is_trainable=True"):
        trl_trainer(tmp_path, loaded(tmp_path), make_model("llama"))
    tokenizer = tokenizer_with(additional_special_tokens=["<image>"])
    data = Dataset.from_list([*make_preferences(2), {"prompt": "a", "chosen": " good", "rejected": " bad <image>"}])
    with pytest.raises(ValueError, match="row 2 of the dataset has the token id 290 in 'rejected_ids'"):
        trl_trainer(tmp_path, cut(make_model("llama"), 290), make_model("llama"), tokenizer=tokenizer, data=data)
