"""`tdpo.__version__` is that of `tdpo_ext`, and is known without torch where it is installed."""

import tdpo

import tdpo_ext
from helpers.trainer_cases import run_python


def test_one_version():
    assert tdpo.__version__ == tdpo_ext.__version__


def test_the_installed_version_needs_no_torch(tmp_path):
    metadata = tmp_path / "tdpo_ext-9.8.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: tdpo_ext\nVersion: 9.8\n")
    code = "import sys; sys.path.insert(0, '.'); import tdpo; print(tdpo.__version__, 'torch' in sys.modules)"
    assert run_python("-c", code, cwd=tmp_path).stdout == "9.8 False\n"
