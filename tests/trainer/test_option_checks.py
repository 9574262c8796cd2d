"""Options of models, of optimizers and of objectives, checked alone and beside each other."""

from types import SimpleNamespace

import pytest
import torch
from tdpo import TDPOConfig
from tdpo.loss.metrics import preference_metrics
from tdpo.loss.preference_loss import PreferenceOutput
from tdpo.option_checks import _OPTIM_ARGS, EVALUATED, check_best_metric, check_model_options, check_needed
from tdpo.options import ModelOptions

from helpers.device import USE_CPU
from helpers.trainer_cases import make_trainer
from tdpo_ext import TokenDivergence, dpo_loss

OF_TRANSFORMERS = ("loss", "runtime", "samples_per_second", "steps_per_second")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"lora_r": 1.5}, TypeError, "lora_r is 1.5; an integer is needed"),
        ({"lora_alpha": 0}, ValueError, "lora_alpha is 0; it must be at least 1"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout is 1.0; it must be in"),
        ({"dtype": "int8"}, ValueError, "dtype is 'int8'; allowed are"),
        ({"ref_gguf_file": "a.gguf"}, ValueError, "ref_gguf_file is a.gguf, but its folder, ref_model, is missing"),
        ({"gguf_file": "a.gguf", "tp_plan": "auto"}, ValueError, "tp_plan is auto, but gguf_file is a.gguf"),
    ],
)
def test_options_of_models(options, error, said):
    with pytest.raises(error, match=said):
        check_model_options(ModelOptions(model="a/model", **options))


@pytest.mark.parametrize("optim", sorted(_OPTIM_ARGS))
def test_arguments_of_an_optimizer_are_those_that_transformers_reads(optim, tmp_path):
    """And it reads no number of Adam's where it refuses them."""
    if optim in ("adamw_torch_npu_fused", "adamw_torch_xla"):
        pytest.skip("needs torch_npu or torch_xla")

    def optimizer(**options):
        trainer = make_trainer(tmp_path, optim=optim, **options)
        return trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)

    read = {name: "True" if name in ("nesterov", "centered") else "0.25" for name in _OPTIM_ARGS[optim]}
    if read:
        _, given = optimizer(optim_args=",".join(f"{name}={value}" for name, value in read.items()))
        assert {name: str(given[name]) for name in read} == read
    for unread in ("eps_=1", "momentum"):
        with pytest.raises(ValueError, match=rf"^optim_args is '{unread}', but of such arguments optim {optim} reads "):
            optimizer(optim_args=unread)
    for name, value in {"adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 0.5}.items():
        if optim.startswith("adamw"):
            assert value in (optimizer(**{name: value})[1]["eps"], *optimizer(**{name: value})[1]["betas"])
        else:
            with pytest.raises(ValueError, match=rf"^{name} is 0\.5, but optim {optim} does not use it$"):
                optimizer(**{name: value})


def test_the_metrics_by_which_a_model_may_be_chosen_are_those_of_an_evaluation(tmp_path):
    sides = [TokenDivergence.unstack(torch.rand(len(TokenDivergence._fields), 3)) for _ in range(2)]
    output = PreferenceOutput(torch.tensor(0.0), *sides, router_loss=torch.tensor(0.0))
    assert {*preference_metrics(output, beta=0.1), *OF_TRANSFORMERS} == set(EVALUATED)
    measured = make_trainer(tmp_path).evaluate().keys() - {"epoch", "eval_model_preparation_time"}
    assert measured == {f"eval_{name}" for name in EVALUATED if name != "aux_loss"}
    for name in (None, "loss", "eval_loss", "rewards/accuracies"):
        check_best_metric(name)
    with pytest.raises(ValueError, match=r"^metric_for_best_model is accuracy; an evaluation has loss, "):
        check_best_metric("accuracy")


@pytest.mark.parametrize(
    ("option", "value"), [("variant", "dpo"), ("alpha", 0.7), ("label_smoothing", 0.1), ("simpo_gamma", 1.0)]
)
def test_options_of_a_named_loss_beside_an_objective(option, value, tmp_path):
    variant = {"label_smoothing": "dpo", "simpo_gamma": "simpo"}.get(option)
    options = {option: value} if variant is None else {option: value, "variant": variant}
    with pytest.raises(ValueError, match=r"^(variant|alpha) is .*, but objective is given, which does not use it"):
        make_trainer(tmp_path, objective=dpo_loss, **options)


def test_beta_scales_the_rewards_beside_an_objective(tmp_path):
    def rewards(beta):
        trainer = make_trainer(tmp_path, objective=dpo_loss, beta=beta)
        trainer.train()
        return trainer.evaluate()["eval_rewards/margins"]

    assert rewards(0.2) == pytest.approx(2 * rewards(0.1))


@pytest.mark.parametrize(
    ("option", "value", "needed"),
    [
        ("reference_cache", "cache", "precompute_reference"),
        ("reference_dtype", "float8", "precompute_reference"),
    ],
)
def test_options_that_nothing_reads_alone(option, value, needed, tmp_path):
    with pytest.raises(ValueError, match=rf"^{option} is {value}, but {needed} is False: set {needed} too$"):
        make_trainer(tmp_path, **{option: value})
    options = vars(TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU))
    check_needed(SimpleNamespace(**{**options, option: value, needed: 1}))
