"""The CUDA kernels compile, without warnings or spills, for every architecture they are built for."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from cuda_report import kernel_report


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_kernels_compile_for_every_architecture():
    report = kernel_report()
    assert {row["architecture"] for row in report} == {80, 90, 100}
    assert {"row_state_kernel", "gradient_kernel"} <= {row["kernel"].split("<")[0] for row in report}
    # float64 is for tests, and softcapping calls tanh: these may spill a little.
    spilling = [
        row for row in report if row["spilled"] and "double" not in row["kernel"] and "true" not in row["kernel"]
    ]
    assert not spilling
