"""Models and adapters that the loss doesn't understand, and models for which data are too long or have other tokens."""

import peft
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from tdpo import TDPOConfig
from tdpo.models.checks import check_models

from helpers.model_families import SMALL, make_model, make_tokenizer
from helpers.trainer_cases import SETTINGS

LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
BERT = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BERT |= {"max_position_embeddings": 128}
BART = {"vocab_size": 300, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 128}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48}


def checked(model, ref_model=None, *, max_length=40, tokenizer=None, peft_config=None):
    args = TDPOConfig(output_dir="out", **{**SETTINGS, "max_length": max_length, "max_prompt_length": max_length - 1})
    check_models(model, ref_model, args, tokenizer or make_tokenizer(), peft_config)


def tokenizer_with(**tokens):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(tokens)
    return tokenizer


def cut(model, rows):
    model.resize_token_embeddings(rows)
    return model


def adapted(**changes):
    return get_peft_model(make_model("llama"), LoraConfig(**{**LORA, **changes}))


def loaded(tmp_path, **options):
    adapted().save_pretrained(tmp_path / "adapters")
    return PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "adapters"), **options)


def vision_model(**changes):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 8, "patch_size": 4}
    text = {**SMALL, "vocab_size": 310}
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(vision_config=t.CLIPVisionConfig(**vision), text_config=t.LlamaConfig(**text), image_token_id=305)
    )


def decoder_of_bart():
    model = t.BartForCausalLM(t.BartConfig(**BART))
    model.config.architectures = ["BartForConditionalGeneration"]  # as it is loaded from such a checkpoint
    return model


def blind_without_images():
    model = make_model("llama")
    forward = model.forward

    def looks(pixel_values=None, **inputs):
        return forward(**inputs, inputs_embeds=pixel_values.mean())

    model.forward = looks
    return model


def looks_one_token_ahead():
    """A causal model but for its last layer, which mixes neighbours."""
    model = make_model("llama")
    norm = model.model.norm.forward
    model.model.norm.forward = lambda hidden: norm(hidden + 0.001 * hidden.roll(-1, dims=1))
    return model


def uncausal_attention():
    model = t.LlamaForCausalLM(t.LlamaConfig(**SMALL))
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


WRONG = {
    "BART": (lambda: t.BartForConditionalGeneration(t.BartConfig(**BART)), "an encoder-decoder"),
    "T5": (
        lambda: t.T5ForConditionalGeneration(t.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=1)),
        "an encoder-decoder",
    ),
    "decoder of BART": (decoder_of_bart, "the decoder of BartForConditionalGeneration without its encoder"),
    "masked BERT": (lambda: t.BertForMaskedLM(t.BertConfig(**BERT)), "earlier tokens see later ones"),
    "BERT": (lambda: t.BertLMHeadModel(t.BertConfig(**BERT)), "one with is_decoder=True"),
    "RoBERTa": (lambda: t.RobertaForCausalLM(t.RobertaConfig(**BERT)), "earlier tokens see later ones"),
    "ModernBERT": (
        lambda: t.ModernBertForMaskedLM(
            t.ModernBertConfig(**BERT, **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0))
        ),
        "earlier tokens see later ones",
    ),
    "XLNet": (
        lambda: t.XLNetLMHeadModel(t.XLNetConfig(vocab_size=300, d_model=32, n_layer=2, n_head=4, d_inner=48)),
        "earlier tokens see later ones",
    ),
    "Gemma for embeddings": (
        lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SMALL, head_dim=8, use_bidirectional_attention=True)),
        "earlier tokens see later ones",
    ),
    "one token ahead": (looks_one_token_ahead, "earlier tokens see later ones"),
    "attention that isn't causal": (uncausal_attention, "earlier tokens see later ones"),
    "backbone": (lambda: t.LlamaModel(t.LlamaConfig(**SMALL)), "LlamaModel, which has no language-model head"),
    "GPT-2's backbone": (lambda: make_model("gpt2").transformer, "no language-model head"),
    "encoder": (lambda: t.BertModel(t.BertConfig(**BERT)), "no language-model head"),
    "classifier": (lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**SMALL)), "no language-model head"),
    "token classifier": (lambda: t.Qwen2ForTokenClassification(t.Qwen2Config(**SMALL)), "no language-model head"),
    "question answering": (lambda: t.LlamaForQuestionAnswering(t.LlamaConfig(**SMALL)), "no language-model head"),
    "needs images": (blind_without_images, "can't be run on text alone"),
}


SOFT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
OUTSIDE = {
    "prompt tuning": (peft.PromptTuningConfig(**SOFT), "PROMPT_TUNING, which puts tokens or states"),
    "prefix tuning": (peft.PrefixTuningConfig(**SOFT), "PREFIX_TUNING, which puts tokens or states"),
    "p-tuning": (peft.PromptEncoderConfig(**SOFT, encoder_hidden_size=8), "P_TUNING, which puts tokens or states"),
    "multitask": (
        peft.MultitaskPromptTuningConfig(**SOFT, num_tasks=2),
        "MULTITASK_PROMPT_TUNING, which puts tokens or states",
    ),
    "CPT": (
        peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
        "CPT, which puts tokens or states",
    ),
    "AdaLoRA": (
        peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10),
        "ADALORA, which must be told of every step",
    ),
    "Poly": (
        peft.PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, n_tasks=2, n_skills=2),
        "POLY, which works in peft's own forward",
    ),
    "activated LoRA": (LoraConfig(**LORA, alora_invocation_tokens=[5, 6]), "activated LoRA, which begins at a token"),
}
