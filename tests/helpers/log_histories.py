"""Entries of a trainer's log, made up."""


def training(step, *, loss=0.6, margin=1.0, accuracy=0.8, chosen=0.5, kl=(1.0, 1.0)):
    """Means between two logs; `kl` of chosen and rejected responses, or None without a reference."""
    entry = {"step": step, "loss": loss, "rewards/margins": margin, "rewards/accuracies": accuracy}
    entry |= {"rewards/chosen": chosen, "rewards/rejected": chosen - margin}
    return entry if kl is None else entry | {"kl/chosen": kl[0], "kl/rejected": kl[1]}


def evaluation(step, *, prefix="eval_", **values):
    return {name if name == "step" else prefix + name: value for name, value in training(step, **values).items()}
