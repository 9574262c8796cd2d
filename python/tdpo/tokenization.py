"""The data sets that a command or a trainer is given, as tokens for its models."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .config import TDPOConfig
from .data.stream import PreferenceStream, Training, is_stream, tokenize_stream
from .data.tokenize import tokenize_rows
from .models.sizes import check_pair, check_token_ids
from .progress import library_bars, shows_bars


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

    def __call__(self, name: str, data: Any, *, trains: bool = False) -> Any:
        """A data set as token ids, or every split of a dict of them; None stays None.

        Args:
            name: of the argument.
            data: as `tokenize_preferences` takes it, or a stream.
            trains: it is for training, which reads a stream again and again.

        Raises:
            ValueError: as `tokenize_preferences`; or a token id that a model does not embed.
        """
        if isinstance(data, dict):
            return {key: self(f"{name}[{key!r}]", split) for key, split in data.items()}
        if data is None:
            return None
        if is_stream(data):
            training = Training.of(self.options) if trains else None
            stream = tokenize_stream(data, self.tokenizer, self.options, self.token_columns, training)
            stream.check = functools.partial(check_pair, self.embedded)
            self._say(f"{name}: a stream, tokenized while it is read")
            return stream
        with library_bars(shown=shows_bars(self.options)):
            dataset, summary = tokenize_rows(data, self.tokenizer, self.options, self.token_columns)
        check_token_ids(dataset, self.embedded)
        self._say(f"{name}: {summary}")
        return dataset

    def unless_tokenized(self, data: Any) -> Any:
        """Data as token ids, which they may be already."""
        if isinstance(data, PreferenceStream) or (isinstance(data, Dataset) and "token_row" in data.column_names):
            return data
        return self("the dataset", data)

    def _say(self, line: str) -> None:
        if self.options.should_save:
            print(line, file=sys.stderr)
