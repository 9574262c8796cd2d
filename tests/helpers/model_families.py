"""Tiny random models of several families, and a tokenizer for them, made offline."""

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = ["the film was great and the acting superb", "a bad movie with an awful plot", "good fun, boring end"]


def make_tokenizer(eos="<|end|>"):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [eos] if eos else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

FAMILIES = {
    "gpt2": lambda: t.GPT2Config(
        vocab_size=300, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    ),
    "llama": lambda: t.LlamaConfig(**SMALL),
    "qwen2": lambda: t.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": lambda: t.Qwen3Config(**SMALL, head_dim=8),
    "gemma2": lambda: t.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0),
    "phi": lambda: t.PhiConfig(**{**SMALL, "num_key_value_heads": 4}),
    "mistral": lambda: t.MistralConfig(**SMALL),
    "cohere": lambda: t.CohereConfig(**SMALL, logit_scale=0.25),
    "granite": lambda: t.GraniteConfig(**SMALL, logits_scaling=4.0),
}


def make_model(family, seed=0, **sizes):
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    for name, size in sizes.items():
        assert hasattr(config, name), name
        setattr(config, name, size)
    model = t.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    with torch.no_grad():  # sharper predictions than at initialisation, so that errors would show
        head.weight.mul_(10)
        if head.bias is not None:
            head.bias.normal_()
    return model
