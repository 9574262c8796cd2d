"""Refuses, before data are tokenized, what the loss can't train or what would be lost later: one function per check.

Every refusal is one sentence that names the argument and says what to do.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from .adapters import check_active, check_adapters, check_new_adapters, has_adapters
from .causal_lm import CausalLM, unwrap_peft
from .loading import keep_quantized_weights_unpacked
from .noise import evaluation_mode
from .sharding import is_sharded, is_tensor_parallel
from .sizes import check_positions, check_vocabulary
from .stand_ins import stand_in

_TOKENS, _KEPT = 8, 2  # tokens that a model is tried on; those that stay where the others change


def check_models(
    model: nn.Module,
    ref_model: nn.Module | None,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: Any = None,
    *,
    trains: bool = True,
) -> None:
    """Policy and reference as they were given, before adapters are added, which change a model in place.

    Args:
        model, ref_model: the models; ref_model may be None.
        args, tokenizer: as in `check_model`.
        peft_config: of adapters that will be added to `model`, or None.
        trains: as in `check_policy`.

    Raises:
        TypeError, ValueError: one isn't a causal language model that this loss can train.
    """
    if ref_model is not None and unwrap_peft(ref_model) is unwrap_peft(model):
        raise ValueError("ref_model is model itself, which trains: leave ref_model out, or give a model of its own")
    for name, given in {"model": model, "ref_model": ref_model}.items():
        if given is not None:
            check_model(name, given, args, tokenizer)
    if peft_config is None:
        check_policy(model, ref_model, tokenizer, trains=trains)
    else:
        check_new_adapters(model, peft_config)


def check_model(name: str, model: nn.Module, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """One model, as it was given.

    Args:
        name: of the argument.
        model: with or without adapters.
        args: the options, `max_length` among them, which may be None. The model is moved to their device if training
            will move it: to try it elsewhere would be slow, and some attentions run there alone.
        tokenizer: what makes its token ids.

    Raises:
        TypeError, ValueError: it isn't a causal language model that this loss can read.
    """
    causal_lm = unwrap_peft(model)
    _check_decoder(name, causal_lm)
    _check_head(name, causal_lm)
    check_positions(name, causal_lm, "max_length", args.max_length)  # type: ignore[attr-defined]
    if getattr(args, "eval_samples", 0):
        continued = args.max_prompt_length + args.eval_sample_tokens  # type: ignore[attr-defined]
        check_positions(name, causal_lm, "max_prompt_length + eval_sample_tokens", continued)
    check_vocabulary(name, causal_lm, tokenizer)
    check_adapters(name, model)
    if _may_be_moved(causal_lm, args):
        model.to(args.device)
    keep_quantized_weights_unpacked(causal_lm)  # before anything is evaluated
    _check_passes(name, CausalLM(stand_in(causal_lm) if is_sharded(causal_lm) else causal_lm))


def check_policy(
    policy: nn.Module, ref_model: nn.Module | None, tokenizer: PreTrainedTokenizerBase, *, trains: bool
) -> None:
    """The policy as it will train, with its adapters.

    Args:
        policy: with its adapters.
        ref_model: the reference as it was given, or None.
        tokenizer: its special tokens become the model's when training begins.
        trains: it will be trained, not only evaluated.

    Raises:
        ValueError: nothing of it can train, the reference would train with it, its adapters need more than the model
            inside them, or it couldn't be saved.
    """
    if trains:
        check_active(policy)
        _check_trainable(policy)
        _check_saves(policy, tokenizer)
    if ref_model is not None:
        _check_nothing_shared(policy, ref_model)
    _check_wrapper(policy)


# ---- what kind of model it is ----


def _check_decoder(name: str, model: Any) -> None:
    """Refuses encoder-decoders, and a decoder that was loaded from the checkpoint of one."""
    kind, config = type(model).__name__, getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings") or not hasattr(config, "get_text_config"):
        raise TypeError(
            f"{name} is {kind}, which is no model of transformers: give a causal language model as "
            "AutoModelForCausalLM.from_pretrained loads it, not wrapped"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is {kind}, an encoder-decoder, whose encoder would read the responses: give a decoder-only model"
        )
    made_as = getattr(config, "architectures", None) or [kind]
    if getattr(type(config), "is_encoder_decoder", False) and kind not in made_as:
        raise ValueError(
            f"{name} is {kind}, the decoder of {made_as[0]} without its encoder: give a model that is decoder-only"
        )


def _check_head(name: str, model: Any) -> None:
    """Refuses backbones, classifiers and reward models."""
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{name} is {type(model).__name__}, which has no language-model head: load it with AutoModelForCausalLM"
        )


def _check_passes(name: str, model: CausalLM) -> None:
    """Refuses what text alone can't run, what draws random numbers, and what lets earlier tokens see later ones."""
    causal_lm: Any = model.model
    kind, tokens = type(causal_lm).__name__, model.first_tokens(_TOKENS)
    others = {**tokens, "input_ids": tokens["input_ids"].clone()}
    others["input_ids"][:, _KEPT:] += _TOKENS
    others["input_ids"] %= model.vocab_size
    try:
        with torch.no_grad():
            if causal_lm.config.get_text_config() is not causal_lm.config:  # which may want images to train
                model.logits(**tokens)
        with evaluation_mode(causal_lm):
            with torch.no_grad():
                first, second, changed = (model.logits(**inputs).float() for inputs in (tokens, tokens, others))
            if first.shape[:2] != (1, _TOKENS):
                raise ValueError(f"its logits of {_TOKENS} tokens have the shape {tuple(first.shape)}")
            noise = _change(first, second)
            seen = _change(first[:, :_KEPT], changed[:, :_KEPT])
            # A small change may be rounding, as in experts whose batch has other tokens: gradients tell.
            causal = seen <= 1e-6 or (seen <= 0.05 and not _sees_later_tokens(model, tokens))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises without its images
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{name} is {kind}, which can't be run on text alone ({reason}): give a model that is a decoder of text"
        ) from error
    if noise > (0.02 if model.low_precision else 1e-5):
        raise ValueError(
            f"two passes of {name}, {kind}, differ by {noise:.2g} of its logits although it is in evaluation mode: it, "
            "or a hook on it, draws random numbers; take them out"
        )
    if not causal:
        raise ValueError(
            f"{name} is {kind}, whose earlier tokens see later ones, so it can't predict them: give a causal model (of "
            "BERT's kind: one with is_decoder=True in its configuration)"
        )


def _change(before: Tensor, after: Tensor) -> float:
    """The largest difference of logits, divided by the largest logit."""
    scale, change = (values.nan_to_num(0, 0, 0).abs().max() for values in (before, before - after))
    return (change / scale.clamp(min=torch.finfo(torch.float32).tiny)).item()


@torch.enable_grad()
def _sees_later_tokens(model: CausalLM, tokens: dict[str, Tensor]) -> bool:
    """Whether a later token's embedding has any gradient from earlier logits, exactly, whatever the precision."""
    embedded: list[Tensor] = []
    embedding: Any = model.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, inputs, output: embedded.append(output.requires_grad_()))
    try:
        logits = model.logits(**tokens)[:, :_KEPT]
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(logits.float().sum(), embedded[:1])
    return bool(gradient.reshape(_TOKENS, -1)[_KEPT:].any())  # some families put tokens before the batch


def _may_be_moved(model: Any, args: TrainingArguments) -> bool:
    """Whether the trainer would move a model to its device: engines and quantization place weights themselves."""
    engines = args.fsdp, args.deepspeed, *(os.environ.get(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
    placed = any(engines) or is_sharded(model) or is_tensor_parallel(model) or hasattr(model, "hf_device_map")
    return not placed and not getattr(model, "is_quantized", False)


# ---- adapters, training and saving ----


@torch.no_grad()
def _check_wrapper(policy: Any) -> None:
    """Refuses adapters that act outside the model inside peft's, which is all that the loss runs."""
    inner = unwrap_peft(policy)
    if inner is policy or is_sharded(inner):
        return
    model = CausalLM(inner)
    tokens = model.first_tokens(_TOKENS)
    with evaluation_mode(policy):
        outside, inside = policy(**tokens, use_cache=False).logits, model.logits(**tokens)
    if outside.shape != inside.shape or not torch.allclose(outside, inside, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(
            f"model is {type(policy).__name__}, whose logits are not those of the model with adapters inside it: use "
            "LoRA or another kind of adapters inside layers"
        )


def _check_trainable(policy: nn.Module) -> None:
    """Refuses a policy that nothing can change: all is frozen, or what isn't takes no part in its logits."""
    adapted = has_adapters(policy)
    advice = (
        "load its adapters with is_trainable=True, or merge them (merge_and_unload) and give peft_config"
        if adapted
        else "call model.requires_grad_(True), or give peft_config"
    )
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError(f"model has no parameter that trains: {advice}")
    model = CausalLM(unwrap_peft(policy))
    if is_sharded(model.model):
        return
    with evaluation_mode(policy), torch.enable_grad():
        moves = model.logits(**model.first_tokens(_TOKENS)).requires_grad
    if not moves:
        raise ValueError(
            "model has parameters that train, but none of them takes part in its logits: "
            + ("make the adapters that train the active ones (set_adapter)" if adapted else advice)
        )


def _check_nothing_shared(policy: nn.Module, ref_model: nn.Module) -> None:
    trained = set(chain.from_iterable(_identities(p) for p in policy.parameters() if p.requires_grad))
    for name, parameter in ref_model.named_parameters():
        if trained & set(_identities(parameter)):
            raise ValueError(
                f"ref_model shares {name} with model, which trains it: leave ref_model out, or give a model of its own"
            )


def _identities(parameter: Tensor) -> tuple[Any, ...]:
    """What two names of one parameter have in common: the object, and its memory where it has any here."""
    try:
        memory = parameter.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # of tensors without a storage
        memory = 0
    return (id(parameter), ("memory", parameter.device, memory)) if memory else (id(parameter),)


def _check_saves(policy: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a generation configuration that `save_pretrained` would refuse once the work is done."""
    if hasattr(policy, "get_base_model") or getattr(policy, "generation_config", None) is None:
        return
    from transformers.trainer_utils import align_special_tokens

    generation = copy.deepcopy(policy.generation_config)
    trained = SimpleNamespace(config=copy.deepcopy(policy.config), generation_config=generation)
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        align_special_tokens(trained, tokenizer)  # as training does; a changed configuration is checked more strictly
        with tempfile.TemporaryDirectory() as folder:
            generation.save_pretrained(folder)
    except ValueError as error:
        raise ValueError(
            f"model.generation_config can't be saved, and the model with it: {' '.join(str(error).split())}"
        ) from error
    finally:
        logging.getLogger("transformers").setLevel(level)
