"""Streams of preference rows: the pairs of a dataset, read one by one, again and again where a training reads them."""

import logging
import pickle
from itertools import islice

import pytest
from datasets import Dataset, IterableDataset, IterableDatasetDict
from datasets.distributed import split_dataset_by_node
from tdpo import TDPOConfig, load_preferences
from tdpo.data.stream import SHUFFLED_ROWS, Training, is_stream, tokenize_stream
from tdpo.data.tokenize import tokenize_rows
from tdpo.option_checks import check_stream_options
from tdpo.options import RowOptions
from torch.utils.data import DataLoader

from helpers.model_families import make_tokenizer
from helpers.trainer_cases import make_preferences

LIMITS = RowOptions(max_length=40, max_prompt_length=16)
GOOD = {"prompt": "the film was", "chosen": " great", "rejected": " bad"}
EMPTY = {**GOOD, "chosen": ""}
SEQUENTIAL = Training(seed=None)


def stream_of(rows, read=None):
    """A stream that notes in the list `read` every row that it has given."""

    def rows_one_by_one():
        for row in rows:
            if read is not None:
                read.append(row)
            yield row

    return IterableDataset.from_generator(rows_one_by_one)


def numbers(pairs, length=None):
    return [pair["dataset_row"] for pair in islice(pairs, length)]


@pytest.mark.parametrize("form", [None, "numpy", "torch", "arrow", "pandas"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_pairs_are_those_of_a_dataset(shards, form, tokenizer):
    rows = Dataset.from_list([EMPTY, *make_preferences(7).to_list(), EMPTY, GOOD])
    expected, _ = tokenize_rows(rows, tokenizer, LIMITS)
    pairs = tokenize_stream(rows.to_iterable_dataset(num_shards=shards).with_format(form), tokenizer, LIMITS)
    assert list(pairs) == expected.to_list()
    assert list(pairs) == expected.to_list()  # read again


def test_the_pairs_of_ranked_rows_are_those_of_a_dataset(tokenizer):
    responses = [[" great", " good", " bad"], [" good", " good"], [" bad", " awful"]]
    scores = [[3, 2, 1], [1, 1], [2, 1]]
    rows = Dataset.from_dict({"prompt": 3 * ["the film was"], "responses": responses, "scores": scores})
    limits = RowOptions(max_length=40, max_prompt_length=16, pairing="all")
    expected, _ = tokenize_rows(rows, tokenizer, limits)
    assert expected["dataset_row"] == [0, 0, 0, 2]
    assert list(tokenize_stream(rows.to_iterable_dataset(), tokenizer, limits)) == expected.to_list()


def test_token_ids_and_their_columns(tokenizer):
    row = {
        "prompt_ids": [5],
        "chosen_ids": [6, 7],
        "rejected_ids": [8],
        "chosen_weight": [1, 2],
        "rejected_weight": [3],
    }
    rows = Dataset.from_list([row])
    expected, _ = tokenize_rows(rows, tokenizer, LIMITS, ("weight",))
    assert list(tokenize_stream(rows.to_iterable_dataset(), tokenizer, LIMITS, ("weight",))) == expected.to_list()


def test_rows_are_read_when_their_pairs_are_asked_for(tokenizer):
    read = []
    pairs = tokenize_stream(stream_of([GOOD] * 10, read), tokenizer, LIMITS)
    assert len(read) == 1
    read.clear()
    next(iter(pairs))
    assert len(read) == 1
    read.clear()
    list(islice(pairs, 4))
    assert len(read) == 4


def test_columns_that_later_rows_lack_are_null(tokenizer):
    unprompted = {"chosen": "the film was great", "rejected": "the film was bad"}
    rows = [GOOD, {"prompt": "a", "chosen": " b"}, unprompted]
    expected, _ = tokenize_rows(Dataset.from_list(rows), tokenizer, LIMITS)
    assert list(tokenize_stream(stream_of(rows), tokenizer, LIMITS)) == expected.to_list()
    assert expected["dataset_row"] == [0, 2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "^the dataset is empty"),
        ([{"prompt": "a", "chosen": "b"}], "^the dataset lacks rejected; it has prompt, chosen"),
    ],
)
def test_a_bad_first_row_is_refused_at_once(rows, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        tokenize_stream(stream_of(rows), tokenizer, LIMITS)


def test_a_tokenizer_without_an_end_is_refused_at_once():
    with pytest.raises(ValueError, match="eos_token"):
        tokenize_stream(stream_of([GOOD]), make_tokenizer(eos=None), LIMITS)


def test_a_share_of_a_stream_is_refused(tokenizer):
    share = split_dataset_by_node(stream_of([GOOD] * 4), rank=0, world_size=2)
    with pytest.raises(ValueError, match="the dataset is one process's share"):
        tokenize_stream(share, tokenizer, LIMITS)


@pytest.mark.parametrize("training", [None, SEQUENTIAL, Training(seed=0)])
def test_a_pass_that_leaves_nothing_is_an_error(training, tokenizer):
    pairs = tokenize_stream(stream_of([EMPTY] * 3), tokenizer, LIMITS, training=training)
    with pytest.raises(
        ValueError, match=r"no row of the dataset is left: of 3 rows, 3 with an empty 'chosen' response"
    ):
        next(iter(pairs))


@pytest.mark.parametrize("training", [None, SEQUENTIAL, Training(seed=0)])
def test_malformed_rows_are_named(training, tokenizer):
    pairs = tokenize_stream(stream_of([GOOD, GOOD, {**GOOD, "chosen": 5}]), tokenizer, LIMITS, training=training)
    with pytest.raises(ValueError, match=r"^row 2 of the dataset: 'chosen' is 5"):
        list(islice(pairs, 3))


def test_rows_that_can_not_be_read_are_named(tmp_path, tokenizer):
    path = tmp_path / "data.csv"
    path.write_text("prompt,chosen,rejected\na,b,c\n" + "a,b\n" * 2 + "a,b,c,d\n")
    rows = IterableDataset.from_csv(str(path), chunksize=1)
    with pytest.raises(ValueError, match=r"^the dataset could not be read on behind 3 rows: .*Expected 3 fields"):
        list(tokenize_stream(rows, tokenizer, LIMITS))


def test_a_first_row_that_can_not_be_read_is_named(tmp_path, tokenizer):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "cho')
    with pytest.raises(
        ValueError, match=r"^the dataset could not be read on behind 0 rows: line 1, column 17: Unterminated"
    ):
        tokenize_stream(load_preferences(str(tmp_path / "data.jsonl"), streaming=True), tokenizer, LIMITS)


def test_dropped_rows_are_told_at_powers_of_ten(tokenizer, caplog):
    caplog.set_level(logging.WARNING)
    pairs = tokenize_stream(stream_of([GOOD, *[EMPTY] * 60, *[{**GOOD, "rejected": ""}] * 50]), tokenizer, LIMITS)
    reason = "with an empty 'chosen' response"
    expected = [
        f"dropped 1 of the first 2 rows read: 1 {reason}",
        f"dropped 10 of the first 11 rows read: 10 {reason}",
        f"dropped 100 of the first 101 rows read: 60 {reason}, 40 with an empty 'rejected' response",
    ]
    for _ in range(2):  # each once, however often the stream is read
        assert len(list(pairs)) == 1
        assert caplog.messages == expected


@pytest.mark.parametrize("shards", [1, 3])
def test_a_training_reads_a_stream_again_and_again(shards, tokenizer):
    rows = Dataset.from_list([GOOD, EMPTY, GOOD, GOOD]).to_iterable_dataset(num_shards=shards)
    read = list(islice(tokenize_stream(rows, tokenizer, LIMITS, training=SEQUENTIAL), 8))
    assert [pair["dataset_row"] for pair in read] == [0, 2, 3, 0, 2, 3, 0, 2]
    assert [pair["token_row"] for pair in read] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert numbers(tokenize_stream(rows, tokenizer, LIMITS)) == [0, 2, 3]  # an evaluation ends


@pytest.mark.parametrize("shards", [1, 3])
def test_a_training_shuffles_its_rows(shards, tokenizer):
    """Anew in every pass, and by its seed alone; every pair once in every pass."""
    rows = make_preferences(12).map(lambda row, place: {"prompt": f"film {place}"}, with_indices=True)
    stream = rows.to_iterable_dataset(num_shards=shards)
    expected = {tuple(pair["prompt_ids"]): pair for pair in tokenize_stream(stream, tokenizer, LIMITS)}
    orders = []
    for seed in (1, 2):
        pairs = tokenize_stream(stream, tokenizer, LIMITS, training=Training(seed))
        order = [tuple(pair["prompt_ids"]) for pair in islice(pairs, 36)]
        passes = [order[first : first + 12] for first in (0, 12, 24)]
        assert all(set(one) == set(expected) for one in passes)
        assert len({tuple(one) for one in [*passes, expected]}) == 4
        assert [tuple(pair["prompt_ids"]) for pair in islice(pairs, 36)] == order
        orders.append(order)
        for place, pair in enumerate(islice(pairs, 12)):
            assert pair["token_row"] == place
            unshuffled = expected[tuple(pair["prompt_ids"])]
            number = unshuffled["dataset_row"] if shards == 1 else place
            assert pair == {**unshuffled, "token_row": place, "dataset_row": number}
    assert orders[0] != orders[1]


def test_the_shuffle_holds_a_buffer_of_rows(tokenizer):
    read = []
    pairs = tokenize_stream(stream_of([GOOD] * (3 * SHUFFLED_ROWS), read), tokenizer, LIMITS, training=Training(0))
    read.clear()
    next(iter(pairs))
    assert SHUFFLED_ROWS <= len(read) <= SHUFFLED_ROWS + 5


def test_iterations_at_the_same_time_do_not_disturb_each_other(tokenizer):
    """As of an audit, which reads the beginning while a training is in a later pass."""
    pairs = tokenize_stream(make_preferences(8).to_iterable_dataset(), tokenizer, LIMITS, training=Training(0))
    alone = numbers(pairs, 24)
    first = iter(pairs)
    read = numbers(first, 12)
    assert numbers(pairs, 3) == alone[:3]
    assert read + numbers(first, 12) == alone


def test_a_worker_reads_the_stream(tokenizer):
    pairs = tokenize_stream(make_preferences(8).to_iterable_dataset(), tokenizer, LIMITS, training=Training(0))
    loader = DataLoader(pairs, batch_size=4, num_workers=1, collate_fn=numbers)
    assert sum(islice(loader, 5), []) == numbers(pairs, 20)  # noqa: RUF017
    assert numbers(pickle.loads(pickle.dumps(pairs)), 20) == numbers(pairs, 20)


@pytest.mark.parametrize(("options", "seed"), [({}, 42), ({"data_seed": 3}, 3), ({"seed": 5}, 5)])
def test_the_seed_of_the_order(options, seed):
    assert Training.of(TDPOConfig(output_dir="out", **options)) == Training(seed)
    assert Training.of(TDPOConfig(output_dir="out", train_sampling_strategy="sequential", **options)) == SEQUENTIAL


def test_what_a_stream_is():
    stream, data = stream_of([GOOD]), make_preferences(2)
    assert is_stream(stream)
    assert is_stream({"a": data, "b": stream})
    assert is_stream(IterableDatasetDict({"a": stream}))
    assert not any(map(is_stream, (data, {"a": data}, None)))


OF_ALL = [
    ("precompute_reference", True),
    ("dataset_num_proc", 2),
    ("dataloader_num_workers", 2),
    ("dataloader_drop_last", True),
]
OF_TRAINING = [
    ("train_sampling_strategy", "group_by_length"),
    ("eval_strategy", "epoch"),
    ("save_strategy", "epoch"),
    ("logging_strategy", "epoch"),
    ("max_steps", -1),
]


@pytest.mark.parametrize(("name", "value"), [*OF_ALL, *OF_TRAINING])
def test_options_that_streams_can_not_follow(name, value):
    args = TDPOConfig(output_dir="out", **{"max_steps": 4, name: value})
    message = rf"^{name} is (not set|{value}), but the (training )?data are a stream, .*: (set|leave)"
    with pytest.raises(ValueError, match=message):
        check_stream_options(args, trains=True)
    if (name, value) in OF_TRAINING:
        check_stream_options(args, trains=False)
    else:
        with pytest.raises(ValueError, match=message):
            check_stream_options(args, trains=False)


def test_options_that_streams_follow():
    options = {"dataloader_num_workers": 1, "train_sampling_strategy": "sequential", "eval_strategy": "steps"}
    check_stream_options(TDPOConfig(output_dir="out", max_steps=4, **options), trains=True)
