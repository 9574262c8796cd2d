"""Makes a virtual environment a machine with a virtual GPU: `python set_up.py ENVIRONMENT`.

The environment holds a CUDA build of torch without NVIDIA's libraries. This

* strikes out torch's requirement of them, so that pip installs other packages without them;
* compiles one library that stands in for all of them: the runtime (runtime/*.cpp), and, for whatever else torch's
  libraries ask for, a function that does nothing and returns success. Links under the libraries' names lie beside
  torch's own, where these look for them;
* installs the Python package `virtual_gpu`, which torch loads whenever it is imported.

Written for torch on Linux, x86-64, from 2.11 on.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
STAND_IN = "libvirtual_gpu.so"
HEADERS = "cuda-include"  # in the environment
# Of NVIDIA's libraries; the others that torch's need are the system's.
_THEIRS = re.compile(r"lib(cu|nv|nccl)\w*\.so\.\d+")
_THEIR_SYMBOLS = re.compile(r"_*(cu|nv|nccl)\w+")
_VERSIONED = re.compile(r"(?P<name>\w+)@+(?P<version>[\w.]+)")


def main(environment: Path) -> None:
    packages = next(environment.glob("lib/python3.*/site-packages"))
    python = environment / "bin/python"
    _strike_out(next(packages.glob("torch-*.dist-info")) / "METADATA")
    _pip(python, "torch", "numpy")  # is there; what else it requires is not
    release = re.search(r"cuda: Optional\[str\] = '(\d+)\.(\d+)'", (packages / "torch/version.py").read_text())
    if release is None:
        raise SystemExit("set_up.py: torch is no CUDA build")
    headers = _headers(python, environment, *release.groups())
    build = environment / "virtual-gpu"
    _make_stand_in(packages / "torch/lib", headers, build)
    shutil.copytree(HERE / "python", build / "python", dirs_exist_ok=True)  # where setuptools may write
    _pip(python, "--no-deps", "--force-reinstall", str(build / "python"))


def _pip(python: Path, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)


def _strike_out(metadata: Path) -> None:
    """Removes the requirements of NVIDIA's packages and of Triton, whose compiler needs a driver."""
    lines = metadata.read_text().splitlines(keepends=True)
    theirs = re.compile(r"Requires-Dist: (nvidia|cuda|triton)")
    metadata.write_text("".join(line for line in lines if not theirs.match(line)))


def _headers(python: Path, environment: Path, major: str, minor: str) -> Path:
    """CUDA's headers, from NVIDIA's packages, whose libraries stay where no one looks; a link to their folder."""
    link = environment / HEADERS
    if link.exists():
        return link
    old = int(major) < 13
    names = ["nvidia-cuda-runtime-cu12", "nvidia-cuda-nvcc-cu12"] if old else ["nvidia-cuda-runtime", "nvidia-cuda-crt"]
    folder = environment / "cuda"
    _pip(python, "--no-deps", "--target", str(folder), *(f"{name}=={major}.{minor}.*" for name in names))
    link.symlink_to(next(folder.rglob("cuda_runtime_api.h")).parent)
    return link


def _symbols(library: Path, *options: str) -> list[str]:
    listed = subprocess.run(["nm", "-D", *options, library], check=True, capture_output=True, text=True).stdout
    return [line.split()[-1] for line in listed.splitlines() if " w " not in line]


def _needed(library: Path) -> list[str]:
    listed = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    return [name for name in re.findall(r"\(NEEDED\)\s+Shared library: \[(.*)\]", listed) if _THEIRS.fullmatch(name)]


def _make_stand_in(libraries: Path, headers: Path, build: Path) -> None:
    """Compiles the stand-in into a folder, and links it under the names of NVIDIA's libraries."""
    of_torch = [path for path in libraries.glob("*.so") if path.name != STAND_IN]
    defined = {name.split("@")[0] for path in of_torch for name in _symbols(path, "--defined-only")}
    wanted: dict[str, str] = {}  # the version of each symbol: the library's name, or nothing
    for path in of_torch:
        for symbol in _symbols(path, "--undefined-only"):
            versioned = _VERSIONED.fullmatch(symbol)
            name, version = (symbol, "") if versioned is None else versioned.group("name", "version")
            if name not in defined and _THEIR_SYMBOLS.fullmatch(name):
                wanted[name] = wanted.get(name) or version
    build.mkdir(exist_ok=True)
    objects = []
    for source in sorted(HERE.glob("runtime/*.cpp")):
        objects.append(build / f"{source.stem}.o")
        flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-isystem", headers]
        _run("c++", *flags, "-c", source, "-o", objects[-1])
    ours = {name for path in objects for name in _symbols_of_object(path)}
    stubs = build / "stubs.c"
    stubs.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(wanted.keys() - ours)))
    script = build / "versions"
    script.write_text(_version_script(wanted))
    _run("cc", "-O1", "-fPIC", "-w", "-c", stubs, "-o", build / "stubs.o")
    stand_in = libraries / STAND_IN
    _run("c++", "-shared", "-o", stand_in, *objects, build / "stubs.o", f"-Wl,--version-script={script}", "-ldl")
    for name in sorted({name for path in of_torch for name in _needed(path)} | {"libcuda.so.1"}):
        link = libraries / name
        link.unlink(missing_ok=True)
        link.symlink_to(STAND_IN)


def _symbols_of_object(path: Path) -> list[str]:
    listed = subprocess.run(["nm", "--defined-only", "-g", path], check=True, capture_output=True, text=True).stdout
    return [line.split()[-1] for line in listed.splitlines()]


def _version_script(wanted: dict[str, str]) -> str:
    """Gives every symbol the version that torch's libraries ask for."""
    by_version: dict[str, list[str]] = {}
    for name, version in sorted(wanted.items()):
        if version:
            by_version.setdefault(version, []).append(name)
    return "".join(f"{version} {{ {'; '.join(names)}; }};\n" for version, names in sorted(by_version.items()))


def _run(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
