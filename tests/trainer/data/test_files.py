"""Files are read as they stand: every value keeps its type and its text, and what is malformed is located."""

import bz2
import json
import lzma

import pytest
from datasets import Dataset, Json, List, Value
from datasets.fingerprint import Hasher
from tdpo import load_preferences, tokenize_preferences
from tdpo.data.code import CODE
from tdpo.data.tokenize import RowPairs

from helpers.model_families import make_tokenizer
from helpers.token_rows import message

CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"date": "2024-05-01", "n": 1, "none": None}}}]
ROWS = [
    {"chosen": "2024-05-01", "rejected": "12:30", "n": 1, "score": 1, "calls": CALLS, "ids": [1, 2], "rare": None},
    {"chosen": "2024-05-02", "rejected": "1e5", "n": 1.0, "score": None, "calls": [], "ids": [], "rare": {"a": 1}},
]


def write_lines(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_values_of_json_come_back_as_they_were(streaming, tmp_path):
    read = load_preferences(write_lines(tmp_path / "data.jsonl"), streaming=streaming)
    assert list(read) == ROWS
    assert [type(row["n"]) for row in read] == [int, float]


def test_texts_and_token_ids_have_columns_of_their_own(tmp_path):
    rows = load_preferences(write_lines(tmp_path / "data.jsonl"))
    assert rows.features["chosen"] == Value("string")
    assert rows.features["calls"] == Json()
    ids = load_preferences(write_lines(tmp_path / "ids.jsonl", [{"chosen_ids": [1, 2]}, {"chosen_ids": [3]}]))
    assert ids.features["chosen_ids"] == List(Value("int64"))


def test_dates_in_calls_of_tools_reach_the_template_as_text(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
    )
    called = {"role": "assistant", "content": "", "tool_calls": CALLS}
    row = {
        "prompt": [message("user", "?")],
        "chosen": [called],
        "rejected": [{**called, "tool_calls": [*CALLS, *CALLS]}],
    }
    rows = load_preferences(write_lines(tmp_path / "data.jsonl", [row, row]))
    kept = tokenize_preferences(rows, tokenizer, 900, 400)[0]
    assert '"date": "2024-05-01"' in tokenizer.decode(kept["chosen_ids"])


def test_a_file_that_changes_is_read_again(tmp_path):
    path = write_lines(tmp_path / "data.jsonl")
    assert load_preferences(path)["chosen"] == ["2024-05-01", "2024-05-02"]
    write_lines(tmp_path / "data.jsonl", [{**row, "chosen": "another"} for row in ROWS])
    assert load_preferences(path)["chosen"] == ["another"] * 2


def test_tokens_of_older_code_are_made_again():
    pairs = RowPairs(None, ())
    assert pairs.code == CODE
    assert Hasher.hash(pairs) != Hasher.hash(RowPairs(None, (), code="older"))


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.jsonl.bz2", "a.jsonl.xz", "a[1].jsonl", "a.json"]
)
def test_names(name, tmp_path):
    content = "\n".join(map(json.dumps, ROWS)).encode()
    if name == "a.json":
        content = b"\xef\xbb\xbf " + json.dumps(ROWS, indent=2).encode()
    elif name.endswith("bz2"):
        content = bz2.compress(content)
    elif name.endswith("xz"):
        content = lzma.compress(content)
    (tmp_path / name).write_bytes(content)
    assert load_preferences(str(tmp_path / name)).to_list() == ROWS


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "prompt,chosen,rejected\nParis, France?,a,b\n", "line 2: 4 cells, but the header has 3 (prompt,"),
        ("a.csv", "prompt,chosen,rejected\nq,a\n", "line 2: 2 cells, but the header has 3"),
        ("a.csv", "chosen,chosen\na,b\n", "line 1: two columns have the same name: chosen, chosen"),
        ("a.tsv", 'chosen\trejected\n"a\tb\nc\td\n', "unexpected end of data"),
        ("a.csv", 'chosen,rejected\n"a"b,c\n', "',' expected after '\"'"),
        ("a.jsonl", "[1, 2]\n", "entry 0: a int; a row must be a mapping"),
        ("a.jsonl", '{"a": 1}\n"text"\n', "line 2: a str; a row must be a mapping"),
        ("a.jsonl.xz", "no archive", "Input format not supported"),
    ],
)
def test_what_is_malformed_is_located(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"could not be loaded: ") as raised:
        load_preferences(str(tmp_path / name))
    assert said in str(raised.value)


def test_tables_of_excel_are_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfprompt,chosen,rejected\r\n\r\nq,"a\r\nb",c\r\n')
    assert load_preferences(str(tmp_path / "a.csv")).to_list() == [{"prompt": "q", "chosen": "a\r\nb", "rejected": "c"}]


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("{}set.jsonl", ["train", "test"]),
        ("{}Data.jsonl", ["train", "test"]),
        ("my-test/{}.jsonl", ["train", "test", "dev"]),
    ],
)
def test_names_of_splits(name, splits, tmp_path):
    for split in splits:
        path = tmp_path / name.format(split)
        path.parent.mkdir(exist_ok=True)
        write_lines(path, [{"chosen": split}])
    for split in splits:
        asked = "validation" if split == "dev" else split
        assert load_preferences(str(tmp_path), asked)["chosen"] == [split]


def test_a_name_of_two_splits_is_refused(tmp_path):
    write_lines(tmp_path / "evaluation-train.jsonl")
    with pytest.raises(ValueError, match=r"evaluation-train\.jsonl has the names of several splits: train, test"):
        load_preferences(str(tmp_path))


def test_patterns_reach_every_folder_and_files_alone(tmp_path):
    for name in ("a", "x/b", "x/y/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / f"{name}.jsonl", [{"chosen": name}])
    (tmp_path / "d.jsonl").mkdir()
    assert load_preferences(str(tmp_path / "**/*.jsonl"))["chosen"] == ["a", "x/b", "x/y/c"]
    assert load_preferences(str(tmp_path / "*.jsonl"))["chosen"] == ["a"]


def test_names_with_signs_of_patterns(tmp_path):
    for name in ("a[1]", "a1"):
        Dataset.from_list([{"chosen": name}]).to_parquet(str(tmp_path / f"{name}.parquet"))
    assert load_preferences(str(tmp_path / "a[1].parquet"))["chosen"] == ["a[1]"]
    assert load_preferences(str(tmp_path))["chosen"] == ["a1", "a[1]"]


def test_files_of_other_formats_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"a\.txt is of no format that is read here"):
        load_preferences(str(tmp_path / "a.txt"))
