"""The digests that files carry."""

import tracemalloc

from tdpo.files import digest, file_digest


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
