"""A small language model and its tokenizer, made on the spot from the texts of pairs.jsonl; nothing is downloaded.

    python examples/tiny/make_model.py        (seconds on a CPU; writes out/tiny/model)

It learns rejected replies twice as often as chosen ones, so it is rude; preferences make it polite.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAIRS = Path(__file__).parent / "pairs.jsonl"
END = "<|end|>"


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def make_model(tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int = 150) -> LlamaForCausalLM:
    """A Llama of two layers that has learned these texts."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        part = torch.randperm(len(texts))[:24]
        loss = model(batch.input_ids[part], attention_mask=batch.attention_mask[part], labels=labels[part]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main(folder: str = "out/tiny/model") -> None:
    """Writes model and tokenizer to a folder."""
    torch.manual_seed(0)
    pairs = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    sides = ("chosen", "rejected", "rejected")
    texts = [pair["prompt"] + pair[side] + END for pair in pairs for side in sides]
    tokenizer = make_tokenizer(texts)
    make_model(tokenizer, texts).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"saved {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
