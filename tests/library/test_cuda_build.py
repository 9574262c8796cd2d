"""The CUDA half without a GPU: what compiles, and what ptxas makes of it."""

import shutil
import subprocess
from pathlib import Path

import machine_code
import pytest
import torch
from cuda_report import build_kernels, parse_resources

ROOT = Path(__file__).parents[2]


def test_operators_compile():
    """Against torch's stable ABI, in a CPU build too, and a stub of the CUDA runtime's header."""
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    include = Path(torch.__file__).parent / "include"
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-fvisibility=hidden", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # torch 2.11
    command += ["-I", ROOT / "tests/cpp/stubs", "-isystem", include, ROOT / "csrc/cuda/operators.cpp"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The folder of a build of the kernels for the default architectures, and the resources of each kernel."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("cuda")
    return folder, parse_resources(build_kernels(folder, ()))


@pytest.mark.slow
def test_kernels_compile_for_every_architecture(build):
    _, resources = build
    architectures = {row["architecture"] for row in resources}
    assert {80, 90} <= architectures <= {80, 90, 100}  # nvcc before 12.8 does not know 100
    assert {"row_state_kernel", "gradient_kernel"} <= {row["kernel"].split("<")[0] for row in resources}
    assert not [row for row in resources if row["spilled"] and "double" not in row["kernel"]]  # float64 is for tests


# Instructions an entry and registers in the machine code for sm_90, by nvcc 13.0, and a tenth more. The last two of a
# kernel's flags are softcap and reverse KL.
BUDGETS = {
    "row_state_kernel<bf16, float, false, false, 256>": (26.9, 80),
    "row_state_kernel<float, float, false, false, 256>": (28.8, 80),
    "row_state_kernel<bf16, float, true, false, 256>": (54.8, 80),
    "row_state_kernel<float, float, true, false, 256>": (58.8, 80),
    "row_state_kernel<bf16, float, false, true, 256>": (26.9, 80),
    "row_state_kernel<float, float, false, true, 256>": (28.6, 80),
    "gradient_kernel<bf16, float, bf16, false, false, 256>": (10.1, 80),
    "gradient_kernel<float, float, float, false, false, 256>": (9.1, 80),
    "gradient_kernel<float, float, bf16, false, false, 256>": (9.8, 80),
    "gradient_kernel<bf16, float, bf16, true, false, 256>": (39.2, 128),
    "gradient_kernel<float, float, bf16, true, false, 256>": (39.1, 128),
    "gradient_kernel<bf16, float, bf16, false, true, 256>": (15.1, 80),
    "gradient_kernel<float, float, bf16, false, true, 256>": (14.8, 80),
    "scale_kernel<bf16, float>": (4.1, 40),
}


@pytest.mark.slow
def test_machine_code_keeps_its_budgets(build):
    if machine_code.find_disassembler() is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    folder, resources = build
    loops = {row["kernel"]: row for row in machine_code.hot_loops(folder, 90, resources)}
    for kernel, (instructions, most_registers) in BUDGETS.items():
        assert loops[kernel]["instructions_per_entry"] <= 1.1 * instructions, kernel
        assert loops[kernel]["registers"] <= most_registers, kernel
        wanted = 1 if kernel.startswith("scale") else 4  # two packs of both rows before the first is used
        assert loops[kernel]["wide_loads"] == wanted, kernel
    late = {kernel for kernel, row in loops.items() if row["loads_after_first_use"] and "double" not in kernel}
    # The compiler moves one of four loads there: 16-bit logits with a softcap, reverse KL.
    assert late <= {
        f"gradient_kernel<{dtype}, float, {dtype}, true, true, {group}>"
        for dtype in ("bf16", "f16")
        for group in (32, 256)
    }


LISTING = """
.text._Z4loopv:
        /*0000*/                   MOV R1, RZ ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @P1  BRA `(.L_x_2) ;
        /*0030*/                   FADD R20, R21, R22 ;
        /*0040*/                   FADD R20, R20, R22 ;
.L_x_2:
        /*0050*/                   {first} ;
        /*0060*/                   {second} ;
        /*0070*/              @!P0 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("first", "second", "late"),
    [
        ("LDG.E.128 R8, desc[UR4][R2.64+0x10]", "FADD R6, R7, R9", 0),
        ("FADD R30, R7, R9", "LDG.E.128 R8, desc[UR4][R2.64+0x10]", 1),
        ("FADD R30, R8, R9", "LDG.E.128 R8, desc[UR4][R2.64+0x10]", 0),
    ],
)
def test_the_counts_themselves(first, second, late):
    """A rare block is not counted, and a load after the first use of another is."""
    (kernel,) = machine_code.parse(LISTING.format(first=first, second=second))
    loop = kernel.hot_loop
    assert len(loop.path) == 5
    assert loop.wide_loads == 2
    assert loop.loads_after_first_use == late
