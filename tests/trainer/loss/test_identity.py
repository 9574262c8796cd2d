"""The name of a user's own objective tells one from another, and is the same in every process."""

import functools
from pathlib import Path

import torch
from tdpo.loss.identity import objective_name

from helpers.trainer_cases import run_python
from tdpo_ext import MarginLoss, per_token


def by_name(chosen, rejected, scale=1.0):
    return scale * (chosen.kl - rejected.kl)


def with_closure(scale):
    def objective(chosen, rejected):
        return scale * (chosen.kl - rejected.kl)

    return objective


def with_helper(scale):
    helper = with_closure(scale)

    def objective(chosen, rejected):
        return helper(chosen, rejected)

    return objective


class Callable:
    def __init__(self, scale):
        self.scale = scale
        self.itself = self

    def __call__(self, chosen, rejected):
        return self.scale * (chosen.kl - rejected.kl)

    def method(self, chosen, rejected):
        return chosen.kl


def link(margins):
    return margins**2


# Each is another objective than all others; the lambdas differ in one operation, one constant, one set.
OTHERS = [
    by_name,
    lambda c, r: c.kl - r.kl,
    lambda c, r: c.kl + r.kl,
    lambda c, r: 2 * c.kl - r.kl,
    lambda c, r, scale=3: scale * c.kl - r.kl,
    lambda c, r, scale=4: scale * c.kl - r.kl,
    lambda c, r: c.kl if "x" in {"a", "b", "c"} else r.kl,
    with_closure(1.0),
    with_closure(2.0),
    with_helper(1.0),
    with_helper(2.0),
    functools.partial(by_name, scale=2.0),
    functools.partial(by_name, scale=3.0),
    functools.partial(with_closure(3.0)),
    Callable(1.0),
    Callable(2.0),
    Callable(1.0).method,
    torch.add,
    torch.sub,
    functools.partial(torch.sub, alpha=2),
    MarginLoss(by_name, link),
    MarginLoss(by_name, torch.exp),
    MarginLoss(by_name, torch.square),
    MarginLoss(with_closure(1.0), link),
    MarginLoss(per_token(with_closure(2.0)), link),
]


def test_every_other_objective_has_another_name():
    names = [objective_name(objective) for objective in OTHERS]
    assert len(set(names)) == len(names)
    assert names[0].startswith(f"{__name__}.by_name(scale=1.0) #")


def test_the_same_in_every_process(tmp_path):
    script = tmp_path / "names.py"
    script.write_text("import sys; sys.path.insert(0, sys.argv[1])\nfrom test_identity import *\n")
    script.write_text(script.read_text() + "print([objective_name(objective) for objective in OTHERS])")
    folder = str(Path(__file__).parent)
    printed = {
        run_python(str(script), folder, cwd=tmp_path, environment={"PYTHONHASHSEED": seed}).stdout for seed in "123"
    }
    assert len(printed) == 1
    assert "by_name" in printed.pop()


def test_defined_again_it_is_the_same():
    assert objective_name(with_helper(1.0)) == objective_name(with_helper(1.0))
    assert objective_name(Callable(1.0)) == objective_name(Callable(1.0))
