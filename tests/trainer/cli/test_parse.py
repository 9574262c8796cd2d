"""Every option takes its values as people write them in YAML, or refuses them in one sentence."""

import json
import os
import warnings
from dataclasses import fields

import pytest
import yaml
from tdpo.cli.known import known_options
from tdpo.cli.parse import read_options
from tdpo.config import TDPOConfig
from tdpo.options import DataOptions, ModelOptions, TDPOOptions

KNOWN = known_options((ModelOptions, DataOptions, TDPOOptions))
OWN = {item.name: group for group in (ModelOptions, DataOptions) for item in fields(group)}
# Natural values: of a type, or of an option whose values are not any of its type.
BY_KIND = {
    bool: [True, False],
    int: [3],
    float: [0.25, 1, 1e-05],
    str: ["a_name"],
    list: [["a", "b"], ["a"], []],
    dict: [{"a": 1e-06, "b": [1, 2], "c": False}],
}
BY_NAME = {
    "log_level": ["info"],
    "log_level_replica": ["info"],
    "max_length": [2000],
    "max_prompt_length": [7],
    "accelerator_config": [{"even_batches": False, "split_batches": False}],
    "fsdp_config": [{"min_num_params": 3}],
    "deepspeed": [{"zero_optimization": {"stage": 2}}],
    "label_smoothing_factor": [0.0],
    "columns": [{"prompt": "question", "system": None}, "prompt=question"],
    "lora_dropout": [0.25],
    "resume_from_checkpoint": [True, False, "a_folder"],
    "tf32": [False],
    "trackio_static_space_id": [False, "a/space"],
    "debug": ["underflow_overflow", ["underflow_overflow"]],
    "simpo_gamma": [0.5],  # of another loss than the default one
    "label_smoothing": [0.0],
    "use_liger_kernel": [False],
    "report_to": [[], "none", ["tensorboard"]],
    "logging_steps": [3, 0.25],
    "learning_rate": [1e-05, 1],
}
PYTHON_ONLY = {"parallelism_config"}


def natural_values():
    for name, option in KNOWN.items():
        values = BY_NAME.get(name) or [
            value
            for kind, values in BY_KIND.items()
            if kind in option.kinds and not (kind is str and dict in option.kinds)  # where a text is JSON
            for value in option.choices or values
        ]
        yield from (pytest.param(name, value, id=f"{name}-{value}") for value in dict.fromkeys(map(json.dumps, values)))


def parse(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    return read_options("train", "", [str(tmp_path / "config.yaml")]).options()


@pytest.fixture
def same_environment(monkeypatch):
    """Options of engines set variables."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("same_environment")
@pytest.mark.parametrize(("name", "value"), natural_values())
def test_a_value_of_yaml_is_that_of_python(name, value, tmp_path):
    value, group = json.loads(value), OWN.get(name, TDPOConfig)
    base = {"output_dir": str(tmp_path / "out"), "use_cpu": True}
    given = {**(base if group is TDPOConfig else {}), name: value}
    expected, refused = outcome(lambda: getattr(group(**given), name))
    options, said = outcome(lambda: parse(tmp_path, yaml.safe_dump({**base, name: value})))
    assert (refused is None) == (said is None), said
    if refused is not None:  # because of other options, or of a package
        assert str(refused) in str(said)
        return
    found = {ModelOptions: options.models, DataOptions: options.data, TDPOConfig: options.training}[group]
    assert getattr(found, name) == expected


def outcome(function):
    """What a function returns, and what it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(), None
        except (TypeError, ValueError, ImportError) as error:
            return None, error


def test_every_option_has_natural_values():
    named = {parameter.values[0] for parameter in natural_values()}
    assert named == KNOWN.keys() - PYTHON_ONLY


@pytest.mark.parametrize(
    ("line", "name", "expected"),
    [
        ("learning_rate: 1e-5", "learning_rate", 1e-5),
        ("learning_rate: '1e-5'", "learning_rate", 1e-5),
        ("beta: 1.0e0", "beta", 1.0),
        ("optim: sgd\noptim_args: {momentum: 0.9, dampening: 0}", "optim_args", "momentum=0.9,dampening=0"),
        ("lr_scheduler_kwargs: {min_lr: 1e-6}", "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        ("lr_scheduler_kwargs: '{\"min_lr\": 1.0e-6}'", "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        ("report_to: off", "report_to", []),
        ("report_to: no", "report_to", []),
        ("report_to: tensorboard", "report_to", ["tensorboard"]),
        ("save_strategy: no", "save_strategy", "no"),
        ("eval_strategy: off", "eval_strategy", "no"),
        ("bf16: yes", "bf16", True),
        ("bf16: 1", "bf16", True),
        ("disable_dropout: off", "disable_dropout", False),
        ("max_steps: 1_000", "max_steps", 1000),
        ("run_name: no", "run_name", "no"),
        ("run_name: 2024-01-01", "run_name", "2024-01-01"),
        ("hub_revision: 0123", "hub_revision", "0123"),
        ("hub_revision: 12e4567", "hub_revision", "12e4567"),
        ("token_columns: [1, no]", "token_columns", ["1", "no"]),
        ("token_columns: weight", "token_columns", ["weight"]),
        ("seed: null", "seed", 42),
        ("seed:", "seed", 42),
        ("seed: ~", "seed", 42),
    ],
)
def test_lines_of_a_file(line, name, expected, tmp_path):
    assert getattr(parse(tmp_path, f"use_cpu: true\noutput_dir: {tmp_path}\n{line}\n").training, name) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("seed: 1.0", "seed is 1.0; an integer is needed"),
        ("max_steps: many", "max_steps is many; an integer is needed"),
        ("bf16: 2", "bf16 is 2; true or false is needed"),
        ("lr_scheduler_kwargs: fast", "lr_scheduler_kwargs is 'fast'; a mapping is needed"),
        ("lr_scheduler_kwargs: '{a'", "lr_scheduler_kwargs is '{a', which is not valid JSON"),
        ("optim_args: {rank: [1]}", "optim_args is {'rank': [1]}; names and plain values are needed"),
        ("token_columns: [[a]]", "token_columns is [['a']]; a list of texts is needed"),
        ("token_columns: [null]", "token_columns is [None]; a list of texts is needed"),
        ("token_columns: {a: b}", "token_columns is {'a': 'b'}, a mapping, which it does not take; a list is needed"),
        ("parallelism_config: {tp_size: 2}", "parallelism_config is {'tp_size': 2}; its values can be made in Python"),
        ("optim: adamw_trch", "optim is 'adamw_trch'; allowed are adamw_torch, "),
    ],
)
def test_what_does_not_fit_is_refused_with_file_and_option(line, said, tmp_path):
    with pytest.raises(ValueError) as raised:
        parse(tmp_path, f"{line}\n")
    assert str(raised.value).startswith(f"{tmp_path / 'config.yaml'}: {said}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "name", "expected"),
    [
        (["--learning_rate", "1e-5"], "learning_rate", 1e-5),
        (["--learning-rate=1e-5"], "learning_rate", 1e-5),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--resume_anyway"], "resume_anyway", True),
        (["--resume_anyway", "no"], "resume_anyway", False),
        (["--no_disable_dropout"], "disable_dropout", False),
        (["--no-disable-dropout"], "disable_dropout", False),
        (["--token_columns", "a", "b"], "token_columns", ["a", "b"]),
        (["--token_columns", "a"], "token_columns", ["a"]),
        (["--report_to", "tensorboard"], "report_to", ["tensorboard"]),
        (["--report_to", "tensorboard", "wandb"], "report_to", ["tensorboard", "wandb"]),
        (["--lr_scheduler_kwargs", '{"min_lr": 1e-6}'], "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        (["--resume_from_checkpoint"], "resume_from_checkpoint", True),
        (["--resume_from_checkpoint", "false"], "resume_from_checkpoint", False),
        (["--resume_from_checkpoint", "out/1"], "resume_from_checkpoint", "out/1"),
    ],
)
def test_flags(flags, name, expected, tmp_path):
    args = read_options("train", "", ["--use_cpu", "--output_dir", str(tmp_path), *flags]).options().training
    assert getattr(args, name) == expected


def test_flags_override_the_file(tmp_path):
    (tmp_path / "config.yaml").write_text(f"seed: 3\nbeta: -1\nuse_cpu: true\noutput_dir: {tmp_path}\n")
    args = read_options("train", "", [str(tmp_path / "config.yaml"), "--beta", "0.3"]).options().training
    assert (args.seed, args.beta) == (3, 0.3)
    with pytest.raises(ValueError, match=r"^beta is -2"):  # which is not the file's
        read_options("train", "", [str(tmp_path / "config.yaml"), "--beta", "-2"]).options()
