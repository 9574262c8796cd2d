"""Small GGUF files of a Llama and a byte-level tokenizer, as llama.cpp's converter writes them."""

import json

import gguf
import numpy as np
from gguf import GGMLQuantizationType

TENSORS = {  # of a layer, by transformers' names
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path, model, tokenizer):
    """Writes a Llama with its matrices in 8 bits, and its tokenizer."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config, tokenizer)
    for name, values in model.state_dict().items():
        _add_tensor(writer, config, name, values.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer, config, tokenizer):
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    names = {token: text for text, token in tokenizer.get_vocab().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([names.get(token, f"<unused{token}>") for token in range(config.vocab_size)])
    special = {tokenizer.eos_token_id} | {token for token in range(config.vocab_size) if token not in names}
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds[token in special] for token in range(config.vocab_size)])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)


def _add_tensor(writer, config, name, values):
    kind = name.removesuffix(".weight").removeprefix("model.")
    if kind.startswith("layers."):
        _, layer, kind = kind.split(".", 2)
        if kind in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in kind else config.num_key_value_heads
            values = _interleaved(values, heads)
        stored = f"blk.{layer}.{TENSORS[kind]}.weight"
    else:
        stored = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[kind] + ".weight"
    if values.ndim == 1 or values.shape[-1] % 32:  # a block has 32 entries
        writer.add_tensor(stored, values)
        return
    packed = gguf.quants.quantize(values, GGMLQuantizationType.Q8_0)
    writer.add_tensor(stored, packed, raw_dtype=GGMLQuantizationType.Q8_0)


def _interleaved(values, heads):
    """Rotary pairs next to each other, where transformers has them half a head apart."""
    halves = values.reshape(heads, 2, -1, values.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
