"""What a build says: what it does, and, where it cannot go on, one sentence that names what is missing."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import build_cuda
import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import build_backend; build_backend.build_wheel({folder!r})"


@pytest.fixture(scope="module")
def setup():
    """The functions of setup.py."""
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build needs of the source tree."""
    copy = tmp_path / "tree"
    for name in ("csrc", "tools", "tdpo_ext", "python"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_built_with.py")
        )
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def hook(tree, code, *prefix, python=sys.executable, path="/usr/bin:/bin", **environment):
    """Runs the build backend as pip does, without isolation, where it fails; returns the lines of its output."""
    environment = {"PATH": path, "PYTHONPATH": str(tree / "tools"), "TDPO_CUDA": "0", **environment}
    command = [*prefix, python, "-c", code.format(folder=str(tree.parent))]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    return (done.stdout + done.stderr).strip().splitlines()


def test_no_compiler(tree):
    lines = hook(tree, BUILD, path=str(tree.parent))
    assert re.match(r"tdpo_ext: there is no C\+\+ compiler; run `apt-get install g\+\+`", lines[-1])
    assert len(lines) <= 3


def test_a_compiler_that_is_named(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, value in (("CXX", "g++"), ("CMAKE_ARGS", "-DCMAKE_CXX_COMPILER=g++")):
        monkeypatch.setenv(name, value)
        setup["check_compiler"]()
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit, match="or name one in CXX"):
        setup["check_compiler"]()


def test_an_old_torch(tree, tmp_path):
    """Said when the front end asks for requirements: before anything is downloaded."""
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "version.py").write_text("__version__ = '2.9.1+cu128'\ncuda = '12.8'\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import build_backend; "
    assert hook(tree, code + "build_backend.get_requires_for_build_wheel()") == [
        "tdpo_ext: torch 2.9.1+cu128 is installed here, and 2.11 or newer is needed: "
        "run `pip install 'torch>=2.11'` first."
    ]


def test_no_torch(tree, tmp_path):
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    (line,) = hook(tree, BUILD, python=str(home / "bin/python"))
    assert line.startswith("tdpo_ext: this build cannot find an installed torch. Install torch first")


def test_a_failing_compiler(tree):
    lines = hook(tree, BUILD, CXX="/bin/false")
    assert re.search(r"tdpo_ext: building for torch .*, CPU only \(TDPO_CUDA=0\); about .* min on \d+ cores", lines[-2])
    message, log = re.fullmatch(r"tdpo_ext: the build failed: (.*) \(all output: (.*)\)", lines[-1]).groups()
    assert message.startswith('The C++ compiler "/bin/false" is not able to compile a simple test program.')
    assert "-DTDPO_TORCH_VERSION=" in Path(log).read_text()
    assert len(lines) <= 4


def mounted(tree, mount):
    """The start of a command line that runs another one with something else mounted: `mount`, where $0 is the tree."""
    script = f'{mount} && cd "$0" && exec "$@"'
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(tree)]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("no mount namespaces")
    return prefix


@pytest.fixture
def read_only(tree):
    return mounted(tree, 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"')


@pytest.fixture
def full_disk(tree):
    (tree / "build").mkdir()
    return mounted(tree, 'mount -t tmpfs -o size=200k none "$0/build"')


def test_a_read_only_tree(tree, read_only):
    """The build gets as far as in any other tree, and the log of a failure is kept."""
    *_, line = hook(tree, BUILD, *read_only, CXX="/bin/false")
    log = Path(re.fullmatch(r"tdpo_ext: the build failed: The C\+\+ compiler .* \(all output: (.*)\)", line)[1])
    assert "-DTDPO_TORCH_VERSION=" in log.read_text()
    shutil.rmtree(log.parents[1])
    code = "import build_backend; build_backend.build_editable({folder!r})"
    *_, line = hook(tree, code, *read_only)
    assert line == f"tdpo_ext: an editable build writes into {tree}, which is read-only; run `pip install .`"


def test_no_space(tree, full_disk):
    assert hook(tree, BUILD, *full_disk)[-1].endswith("No space left on device")


GCC = """[1/9] Building CXX object CMakeFiles/operators.dir/csrc/ops.cpp.o
FAILED: CMakeFiles/operators.dir/csrc/ops.cpp.o
/usr/bin/c++ -DTORCH_TARGET_VERSION=0x20b000000000000 -o ops.cpp.o -c csrc/ops.cpp
{line}
compilation terminated.
ninja: build stopped: subcommand failed.
"""


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("csrc/ops.cpp:3:10: fatal error: torch/csrc/stable/library.h: No such file or directory", ""),
        ("/tmp/ccX.s: error: writing to /tmp/ccX.s: No space left on device", ""),
        (
            "c++: fatal error: Killed signal terminated program cc1plus",
            "; with little memory, set CMAKE_BUILD_PARALLEL_LEVEL=1",
        ),
    ],
)
def test_the_first_error_of_a_log(setup, tmp_path, line, hint):
    log = tmp_path / "log.txt"
    log.write_text("error: of an earlier command\n")
    (tmp_path / "output").write_text(GCC.format(line=line))
    with pytest.raises(SystemExit) as failed:
        setup["run"](["sh", "-c", f"cat {tmp_path}/output; exit 1"], log)
    assert str(failed.value) == f"tdpo_ext: the build failed: {line}{hint} (all output: {log})"


def test_a_failure_without_an_error(setup, tmp_path):
    log = tmp_path / "log.txt"
    with pytest.raises(SystemExit, match="the last words"):
        setup["run"](["sh", "-c", "echo first; echo the last words; exit 1"], log)


def test_expected_times(setup, monkeypatch):
    """More architectures take longer, and more cores help only the C++ files."""
    compiler = build_cuda.Compiler(Path("nvcc"))
    choices = [
        build_cuda.Choice("no GPU"),
        build_cuda.Choice(archs="90", compiler=compiler),
        build_cuda.Choice(archs="80;90;100", compiler=compiler),
    ]

    def minutes(choice, cores):
        monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
        said = re.fullmatch(r"about ([\d.]+) min on (\d+) cores the first time", setup["expected_time"](choice))
        assert int(said[2]) == cores
        return float(said[1])

    for cores in (1, 2):
        times = [minutes(choice, cores) for choice in choices]
        assert times == sorted(set(times))
    assert minutes(choices[0], 8) == 0.5
    assert minutes(choices[2], 8) == minutes(build_cuda.Choice(compiler=compiler), 64) == 2
