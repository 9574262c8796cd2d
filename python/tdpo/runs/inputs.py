"""Evaluation data by name, and counts of tokens, ours and transformers', in batches laid out as ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer


class Inputs(Trainer):
    """A Trainer that names the splits it has, and counts no padding where it should not."""

    _new_tokens = 0  # this process has trained on since the last count

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The batches of an evaluation; `eval_dataset`: data, the name of a split of the trainer's, or None for all.

        Raises:
            ValueError: there is no split of that name; the message names those there are.
        """
        if isinstance(eval_dataset, str):
            self._split("eval_dataset", eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The batches of a prediction; `test_dataset`: data, or the name of a split of the trainer's.

        Raises:
            ValueError: there is no split of that name, or no data are given.
        """
        if test_dataset is None:
            raise ValueError("test_dataset is None; rows or the name of a split are needed")
        if isinstance(test_dataset, str):
            test_dataset = self._split("test_dataset", test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _split(self, argument: str, name: str) -> Any:
        splits = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if name not in splits:
            known = ", ".join(map(repr, splits)) or "none, since eval_dataset is not a dict of them"
            raise ValueError(f"{argument} is {name!r}, which is no split of the trainer's; it has {known}")
        return splits[name]

    def _count_tokens(self) -> None:
        """Counts tokens of prompts and responses that all processes have trained on, unless transformers counts."""
        if self.args.include_num_input_tokens_seen != "no":
            return
        counted = torch.tensor(self._new_tokens, device=self.args.device)
        self._new_tokens = 0
        # The ranks of a tensor-parallel group read the same tokens.
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(counted, "sum")) // self.get_tp_size()

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        super()._track_num_input_tokens({**inputs, "attention_mask": _is_token(inputs)})


def _is_token(inputs: dict[str, Any]) -> Tensor:
    """True where the model's input is no padding, which packed batches have nowhere."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"].bool()
    if "segments" in inputs:
        return inputs["segments"] >= 0
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool)
