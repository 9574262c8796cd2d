"""Preference rows from files, folders and parts of them."""

import csv
import gzip
import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tdpo import load_preferences

ROWS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(10)]


def test_splits_of_a_saved_folder(tmp_path):
    splits = {name: Dataset.from_list([{"chosen": name, "rejected": "c"}]) for name in ("train", "other")}
    DatasetDict(splits).save_to_disk(str(tmp_path))
    for name in splits:
        assert load_preferences(str(tmp_path), name)["chosen"] == [name]
    with pytest.raises(
        ValueError,
        match=r"split 'test'\) could not be loaded: there is no split 'test'; it has train, other",
    ):
        load_preferences(str(tmp_path), "test")


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.parquet"])
@pytest.mark.parametrize("content", [b'{"prompt": "a", "chosen"', b"\x00\xff", b""])
def test_malformed_files_are_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_preferences(str(tmp_path / name))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_files(suffix, tmp_path):
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    path = tmp_path / f"data.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows.to_list()))
    else:
        {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](str(path))
    assert load_preferences(str(path)).to_list() == rows.to_list()


def test_saved_folders_and_missing_data(tmp_path):
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    rows.save_to_disk(tmp_path / "saved")
    assert load_preferences(str(tmp_path / "saved")).to_list() == rows.to_list()
    with pytest.raises(ValueError, match="does not exist"):
        load_preferences(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("saved", ["file", "folder", "splits"])
@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train", range(10)),
        ("train[:4]", range(4)),
        ("train[-2:]", range(8, 10)),
        ("train[50%:]", range(5, 10)),
        ("train[:1]+train[9:]", (0, 9)),
        ("test[2:3]", (2,)),
    ],
)
def test_slices(saved, split, rows, tmp_path):
    path, dataset = tmp_path / "data.jsonl", Dataset.from_list(ROWS)
    if saved == "file":
        dataset.to_json(str(path))
    elif saved == "folder":
        dataset.save_to_disk(str(path))
    else:
        DatasetDict({"train": dataset, "test": dataset}).save_to_disk(str(path))
    assert load_preferences(str(path), split).to_list() == [ROWS[row] for row in rows]


@pytest.mark.parametrize("split", ["validation", "train[:x]", "valid[:3]"])
def test_other_splits_of_a_file_are_refused(split, tmp_path):
    Dataset.from_list(ROWS).to_json(str(tmp_path / "data.jsonl"))
    with pytest.raises(
        ValueError, match=r"data.jsonl' \(split '.*'\) could not be loaded: there is no split '.*'; it has train, test"
    ):
        load_preferences(str(tmp_path / "data.jsonl"), split)


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t"), ("csv.gz", ","), ("tsv.gz", "\t")])
def test_cells_are_texts_as_they_stand(suffix, separator, tmp_path):
    rows = [
        {"prompt": "which?", "chosen": "None", "rejected": "NA"},
        {"prompt": "007", "chosen": "1.50", "rejected": "null"},
        {"prompt": "a, b\nand c", "chosen": "true", "rejected": "1e5"},
        {"prompt": "n/a", "chosen": "nan", "rejected": "<NA>"},
    ]
    path = tmp_path / f"data.{suffix}"
    with gzip.open(path, "wt") if suffix.endswith("gz") else open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    assert load_preferences(str(path)).to_list() == rows


def test_compressed_files_and_patterns(tmp_path):
    for number, some in enumerate((ROWS[:3], ROWS[3:])):
        with gzip.open(tmp_path / f"part-{number}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in some)
    assert load_preferences(str(tmp_path / "part-1.jsonl.gz")).to_list() == ROWS[3:]
    assert load_preferences(str(tmp_path / "part-*.jsonl.gz"), "train[2:4]").to_list() == ROWS[2:4]
    with pytest.raises(ValueError, match=r"none-\*.jsonl does not exist"):
        load_preferences(str(tmp_path / "none-*.jsonl"))
    Dataset.from_list(ROWS).to_csv(str(tmp_path / "part-2.csv"))
    with pytest.raises(ValueError, match="the files have different formats"):
        load_preferences(str(tmp_path / "part-*"))


@pytest.mark.parametrize(
    "names",
    [
        {"train": ["train.jsonl"], "test": ["test.jsonl"]},
        {"train": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"], "test": ["data/eval.jsonl"]},
        {"train": ["training/a.jsonl"], "validation": ["dev/a.jsonl"], "test": ["testing/a.jsonl"]},
        {"train": ["my_train.jsonl"], "validation": ["my_val.jsonl"]},
        {"train": ["a.jsonl", "b.jsonl"]},
    ],
)
def test_folders_of_files(names, tmp_path):
    expected = {}
    for split, files in names.items():
        for file in files:
            path = tmp_path / file
            path.parent.mkdir(exist_ok=True)
            rows = [{**row, "prompt": str(file)} for row in ROWS]
            Dataset.from_list(rows).to_json(str(path))
            expected.setdefault(split, []).extend(rows)
    (tmp_path / "README.md").write_text("of training and test")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/test.jsonl").write_text("no JSON")
    for split, rows in expected.items():
        assert load_preferences(str(tmp_path), split).to_list() == rows
        assert load_preferences(str(tmp_path), f"{split}[3:5]").to_list() == rows[3:5]
    if len(names) > 1 and "test" not in names:
        with pytest.raises(ValueError, match="there is no split 'test'; it has train, validation"):
            load_preferences(str(tmp_path), "test")


def test_files_of_a_folder_that_belong_to_no_split_are_named(tmp_path):
    for name in ("train.jsonl", "more.jsonl"):
        Dataset.from_list(ROWS).to_json(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"more\.jsonl, which its name gives to no split"):
        load_preferences(str(tmp_path))


def test_empty_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="could not be loaded: Directory"):
        load_preferences(str(tmp_path))


@pytest.mark.parametrize("form", ["data.jsonl", "data.csv", "data.parquet", "data.tsv.gz", "part-*.jsonl", "folder"])
def test_streams(form, tmp_path):
    rows = Dataset.from_list([{"prompt": "007", "chosen": "None", "rejected": "NA"}, *ROWS])
    rows.save_to_disk(tmp_path / "folder")
    rows.to_json(str(tmp_path / "data.jsonl"))
    rows.to_csv(str(tmp_path / "data.csv"))
    rows.to_csv(str(tmp_path / "data.tsv"), sep="\t")
    (tmp_path / "data.tsv.gz").write_bytes(gzip.compress((tmp_path / "data.tsv").read_bytes()))
    rows.to_parquet(str(tmp_path / "data.parquet"))
    for part in range(2):
        rows.shard(2, part, contiguous=True).to_json(str(tmp_path / f"part-{part}.jsonl"))
    for split in ("train", "test"):
        stream = load_preferences(str(tmp_path / form), split, streaming=True)
        assert isinstance(stream, IterableDataset)
        assert list(stream) == rows.to_list()


def test_slices_are_streamed_of_folders_alone(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "folder")
    Dataset.from_list(ROWS).to_json(str(tmp_path / "data.jsonl"))
    assert list(load_preferences(str(tmp_path / "folder"), "train[2:4]", streaming=True)) == ROWS[2:4]
    for name in (str(tmp_path / "data.jsonl"), "a/hub-name"):
        with pytest.raises(ValueError, match=r"^streaming is True and the split is 'train\[:2\]', but slices"):
            load_preferences(name, "train[:2]", streaming=True)
    with pytest.raises(ValueError, match="there is no split 'validation' of streamed files; it has train, test"):
        load_preferences(str(tmp_path / "data.jsonl"), "validation", streaming=True)
