"""Files: their space, digests and manifests."""

import errno
import os
import tracemalloc

import pytest
from tdpo.files import allocate, digest, file_digest, whole_folder


@pytest.mark.parametrize("way", ["posix_fallocate", "none", "not supported"])
def test_space_is_reserved(way, tmp_path, monkeypatch):
    if way == "none":
        monkeypatch.delattr(os, "posix_fallocate")
    if way == "not supported":

        def unsupported(*arguments):
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    allocate(tmp_path / "file", 3_000_000)
    assert (tmp_path / "file").stat().st_size == 3_000_000
    assert (tmp_path / "file").stat().st_blocks * 512 >= 3_000_000  # a sparse file has none


def test_a_digest_reads_a_file_piece_by_piece(tmp_path):
    content = bytes(range(256)) * 2**16
    (tmp_path / "weights").write_bytes(content)
    tracemalloc.start()
    try:
        found = file_digest(tmp_path / "weights")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == digest(content)
    assert peak < len(content) / 4


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    def write(text, *, fails=False):
        with whole_folder(tmp_path / "model") as folder:
            folder.mkdir()
            (folder / text).write_text(text)
            if fails:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write("half", fails=True)
    assert not (tmp_path / "model").exists()
    write("first")
    with pytest.raises(OSError, match="disk full"):
        write("half", fails=True)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["first"]
    write("second")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
