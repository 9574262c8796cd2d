"""The learning rate of a resumed run."""

from __future__ import annotations

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer


class ScheduledRates(Trainer):
    """A Trainer whose resumed runs take every step at the rate that their own schedule has there.

    A checkpoint holds the rate of its run's schedule. Where the run is extended, the schedule is another one: the first
    step would be taken at the old schedule's rate, which is 0 at its end.
    """

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if checkpoint is None or not isinstance(schedule, LambdaLR):
            return
        rates = [base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
        schedule._last_lr = rates
        for group, rate in zip(schedule.optimizer.param_groups, rates):
            group["lr"] = rate
