"""No circle of imports, between files or between folders: what a type checker or a function imports counts too."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"tdpo_ext": ROOT / "tdpo_ext", "tdpo": ROOT / "python" / "tdpo"}


def modules_of(package: str, folder: Path) -> dict[str, Path]:
    """The modules of a package, by their dotted names; a folder's name stands for its `__init__`."""
    modules = {}
    for path in folder.rglob("*.py"):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imported(name: str, path: Path, modules: Iterable[str]) -> Iterator[str]:
    """The modules that one imports, wherever in its file."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            targets = [f"{source}.{alias.name}" for alias in node.names]
            targets = [target if target in modules else source for target in targets]
        else:
            continue
        yield from (target for target in targets if target in modules and target != name)


def imports_between_files(package: str, folder: Path) -> dict[str, set[str]]:
    modules = modules_of(package, folder)
    # The lazy names of `tdpo` are for its users: inside, everything is imported from where it is defined.
    return {name: set(imported(name, path, modules)) if name != package else set() for name, path in modules.items()}


def imports_between_folders(files: dict[str, set[str]], folders: set[str]) -> dict[str, set[str]]:
    """The same between the folders of a package; its own modules, which lie in no folder, are left out."""

    def folder_of(name: str) -> str:
        return name if name in folders else name.rpartition(".")[0]

    between: dict[str, set[str]] = {folder: set() for folder in folders}
    for name, targets in files.items():
        between[folder_of(name)] |= {folder_of(target) for target in targets} - {folder_of(name)}
    return between


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A circle of arrows, or nothing."""
    done: set[str] = set()

    def search(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for target in sorted(arrows[name]):
            found = search(target, [*way, name])
            if found:
                return found
        done.add(name)
        return []

    return next(filter(None, (search(name, []) for name in sorted(arrows))), [])


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle(package):
    files = imports_between_files(package, PACKAGES[package])
    assert sum(map(len, files.values())) > len(files)  # the walk has found the imports
    assert not circle(files)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_between_folders(package):
    folder = PACKAGES[package]
    names = {name for name, path in modules_of(package, folder).items() if path.name == "__init__.py"}
    between = imports_between_folders(imports_between_files(package, folder), names)
    between.pop(package)
    assert not circle({name: targets - {package} for name, targets in between.items()})
