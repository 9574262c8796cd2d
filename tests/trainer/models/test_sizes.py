"""Positions against max_length, and token ids against embeddings."""

import logging

import pytest
import torch
import transformers as t
from datasets import Dataset
from tdpo import TDPOConfig, TDPOTrainer
from tdpo.models.sizes import check_token_ids, embedded_ids, position_table

from helpers.model_families import make_model, make_tokenizer
from helpers.refused_models import BART, BERT, checked, cut, tokenizer_with, vision_model
from helpers.trainer_cases import SETTINGS, make_preferences, make_trainer

DECODERS = {
    "GPT-2": lambda: make_model("gpt2"),
    "OPT": lambda: t.OPTForCausalLM(
        t.OPTConfig(
            vocab_size=300, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=1,
            num_attention_heads=4, max_position_embeddings=128,
        )
    ),
    "GPT-J": lambda: t.GPTJForCausalLM(
        t.GPTJConfig(vocab_size=300, n_positions=128, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    ),
    "CTRL": lambda: t.CTRLLMHeadModel(
        t.CTRLConfig(vocab_size=300, n_positions=128, n_embd=32, dff=48, n_layer=1, n_head=4)
    ),
    "MPT": lambda: t.MptForCausalLM(t.MptConfig(vocab_size=300, max_seq_len=128, d_model=32, n_layers=1, n_heads=4)),
    "GPT-Neo": lambda: t.GPTNeoForCausalLM(
        t.GPTNeoConfig(
            vocab_size=300, max_position_embeddings=128, hidden_size=32, num_layers=1, num_heads=4,
            attention_types=[[["global"], 1]],
        )
    ),
    "BioGPT": lambda: t.BioGptForCausalLM(t.BioGptConfig(**BERT)),
    "OpenAI GPT": lambda: t.OpenAIGPTLMHeadModel(
        t.OpenAIGPTConfig(vocab_size=300, n_positions=128, n_embd=32, n_layer=1, n_head=4)
    ),
    "BART's decoder": lambda: t.BartForCausalLM(t.BartConfig(**BART)),
    "RoBERTa as a decoder": lambda: t.RobertaForCausalLM(
        t.RobertaConfig(**{**BERT, "max_position_embeddings": 130}, is_decoder=True, pad_token_id=1)
    ),
    "a table that outgrew its configuration": lambda: grown("gpt2", 64),
    "a configuration that outgrew its table": lambda: grown("gpt2", 4096),
}  # fmt: skip


def grown(family, said):
    model = make_model(family)
    model.config.n_positions = said
    return model


@torch.no_grad()
def runs(model, length):
    tokens = torch.arange(length)[None] % 299 + 2
    try:
        model.eval()(input_ids=tokens % 300, attention_mask=torch.ones_like(tokens), use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("family", DECODERS)
def test_lengths_beyond_a_table_of_positions_are_refused(family):
    model = DECODERS[family]()
    assert runs(model, 128)
    assert not runs(model, 129)
    checked(model, max_length=128)
    for argument, models in {"model": [model], "ref_model": [make_model("llama"), model]}.items():
        message = f"^max_length is 129, but {argument} has 128 positions: set max_length to 128 or less$"
        with pytest.raises(ValueError, match=message):
            checked(*models, max_length=129)


def test_samples_that_run_out_of_positions_are_refused(tmp_path):
    options = {"max_length": 40, "max_prompt_length": 30, "eval_samples": 2, "eval_sample_tokens": 20}
    message = r"^max_prompt_length \+ eval_sample_tokens is 50, but model has 48 positions"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model=make_model("gpt2", n_positions=48), **options)
    make_trainer(tmp_path, model=make_model("gpt2", n_positions=48), **{**options, "eval_samples": 0})
    make_trainer(tmp_path, model=make_model("gpt2", n_positions=50), **options)


def told(model, length):
    model.config.max_seq_len = length
    return model


OPEN_ENDED = {
    "llama": lambda: make_model("llama"),
    "llama that tells a length": lambda: told(make_model("llama"), 16),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=4)),
    "falcon with alibi": lambda: t.FalconForCausalLM(
        t.FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True)
    ),
    "xglm": lambda: t.XGLMForCausalLM(
        t.XGLMConfig(
            vocab_size=300, max_position_embeddings=128, d_model=32, ffn_dim=48, num_layers=1, attention_heads=4
        )
    ),
    "images beside it": vision_model,
}


@pytest.mark.parametrize("family", OPEN_ENDED)
def test_positions_that_go_on_are_not(family, caplog):
    model = OPEN_ENDED[family]()
    assert position_table(model) is None
    assert runs(model, 300)
    with caplog.at_level(logging.WARNING, "tdpo"):
        checked(model, max_length=128)
        assert not caplog.records
        checked(model, max_length=300)
    warned = [record.getMessage() for record in caplog.records]
    rotary = "llama" in family or family == "images beside it"
    assert (
        warned
        == ["max_length is 300, but model was made for 128 positions: what it says of longer texts may be poor"]
        * rotary
    )


def test_special_tokens_beyond_the_embedding_are_refused(tokenizer):
    """The tokenizer has 290 tokens and the models 300 embeddings."""
    small = make_model("llama")
    small.resize_token_embeddings(290)
    checked(small, tokenizer=tokenizer)
    message = "has the id 290, but model embeds 290 tokens: use the model's own tokenizer, or resize"
    padded = {"pad_token": "<|end|>"}
    for name, said in {"pad_token": "padding token", "eos_token": "eos_token", "bos_token": "bos_token"}.items():
        other = tokenizer_with(**{**padded, name: "<new>"})
        with pytest.raises(ValueError, match=f"the tokenizer's {said} {message}"):
            checked(small, tokenizer=other)
        with pytest.raises(ValueError, match="but ref_model embeds 290 tokens"):
            checked(make_model("llama"), small, tokenizer=other)
    with pytest.raises(ValueError, match=f"the tokenizer's padding token {message}"):  # which is the end's
        checked(small, tokenizer=tokenizer_with(eos_token="<new>"))


def test_words_beyond_the_embedding_are_refused():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<word {i}>" for i in range(11)])
    with pytest.raises(ValueError, match="tokenizer's token '<word 10>' has the id 300, but model embeds 300 tokens"):
        checked(make_model("llama"), tokenizer=tokenizer)


def test_a_head_that_is_smaller_than_the_embedding_counts():
    model = make_model("llama")
    model.lm_head = torch.nn.Linear(32, 280, bias=False)
    with pytest.raises(ValueError, match="but model embeds 280 tokens"):
        checked(model)


def test_special_tokens_that_text_does_not_use_may_have_no_embedding(tmp_path):
    """Families share tokenizers with members that see images; data that use such a token are refused."""
    small = make_model("gpt2")
    small.resize_token_embeddings(290)
    rows = make_preferences(4)
    used = Dataset.from_list([*rows, {"prompt": "the film", "chosen": " bad", "rejected": " good <image>"}])

    def trainer(data, evaluated=None):
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        args = TDPOConfig(output_dir=str(tmp_path), **SETTINGS)
        return TDPOTrainer(small, args=args, train_dataset=data, eval_dataset=evaluated, processing_class=tokenizer)

    trainer(rows)
    message = "^row 4 of the dataset has the token id 290 in 'rejected_ids', but model embeds 290 tokens"
    with pytest.raises(ValueError, match=message):
        trainer(used)
    with pytest.raises(ValueError, match=message):  # of streams, when the row is read
        trainer(used.to_iterable_dataset()).train()
    with pytest.raises(ValueError, match=message):
        trainer(rows, {"a": rows, "b": used.to_iterable_dataset()}).evaluate()


@pytest.mark.parametrize("split", ["train_dataset", "eval_dataset"])
def test_token_ids_beyond_an_embedding_are_refused(split, tmp_path):
    """Of rows of token ids: those that the tokenizer has."""
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 9], "rejected_ids": [8, 9]}
    tokenizer = make_tokenizer()
    data = Dataset.from_list([row, row, {**row, "chosen_ids": [len(tokenizer), 7]}])
    with pytest.raises(ValueError, match=f"row 2 of the dataset: 'chosen_ids' holds {len(tokenizer)}"):
        make_trainer(tmp_path, **{split: data})
    with pytest.raises(
        ValueError, match=r"row 2 of the dataset has the token id 290 in .chosen_ids., but ref_model embeds"
    ):
        check_token_ids({split: data}, embedded_ids(model=make_model("gpt2"), ref_model=cut(make_model("gpt2"), 280)))
    check_token_ids({split: data}, embedded_ids(model=make_model("gpt2"), ref_model=cut(make_model("gpt2"), 300)))


def test_negative_token_ids_are_refused(tmp_path):
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 9], "rejected_ids": [-1, 9]}
    with pytest.raises(ValueError, match="'rejected_ids' holds -1"):
        make_trainer(tmp_path, train_dataset=Dataset.from_list([row]))
