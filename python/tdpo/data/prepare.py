"""The data sets that a command or a trainer is given, as tokens for its models."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..config import TDPOConfig
from ..models.sizes import check_token_ids
from .tokenize import tokenize_rows


@dataclass(frozen=True)
class Tokenization:
    """Tokenizes data sets, and says on stderr what became of their rows.

    Attributes:
        tokenizer: of the policy.
        options: of the rows.
        embedded: how many token ids the models that read the tokens embed, by the names of their arguments.
        token_columns: numbers per response token that the loss reads.
    """

    tokenizer: PreTrainedTokenizerBase
    options: TDPOConfig
    embedded: dict[str, int]
    token_columns: tuple[str, ...] = ()

    def __call__(self, name: str, data: Any) -> Any:
        """A data set as token ids, or every split of a dict of them; None stays None.

        Args:
            name: of the argument.
            data: as `tokenize_preferences` takes it.

        Raises:
            ValueError: as `tokenize_preferences`; or a token id that a model does not embed.
        """
        if isinstance(data, dict):
            return {key: self(f"{name}[{key!r}]", split) for key, split in data.items()}
        if data is None:
            return None
        dataset, summary = tokenize_rows(data, self.tokenizer, self.options, self.token_columns)
        check_token_ids(dataset, self.embedded)
        if self.options.should_save:
            print(f"{name}: {summary}", file=sys.stderr)
        return dataset
