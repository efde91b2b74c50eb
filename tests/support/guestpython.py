"""A disk for the emulated machine with this Python, nbdsnap and what it imports, at /site: an ext4 image, read-only.

Made from what runs the tests, so there is nothing to download; the machine changes its root into it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from tests.support.clients import client_environment, require_client
from tests.support.initramfs import REPOSITORY

SITE = Path("/site")
PYTHON = f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
"""At the same place as here: it finds its library by that."""

_UNUSED = ("test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "config-*", "site-packages")


def build_python_disk(target: Path) -> Path:
    require_client("mke2fs")
    root = target.with_suffix(".root")
    for folder in ("dev", "proc", "sys", "tmp", "data", "run"):
        (root / folder).mkdir(parents=True)
    library = Path(sysconfig.get_path("stdlib"))
    _copy(Path(PYTHON).resolve(), root)
    if not _below(root, Path(PYTHON)).exists():
        _copy_as(Path(PYTHON).resolve(), _below(root, Path(PYTHON)))
    shutil.copytree(library, _below(root, library), ignore=shutil.ignore_patterns(*_UNUSED), symlinks=True)
    site = _below(root, SITE)
    shutil.copytree(REPOSITORY / "nbdsnap", site / "nbdsnap")
    for package in _imported("nbdsnap"):
        _copy_package(package, site)
    programs = [Path(PYTHON), *_below(root, library).rglob("*.so"), *site.rglob("*.so")]
    for needed in _libraries(programs):
        _copy(needed, root)
    size_kib = sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) * 13 // 10240 + 16384
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", root, target, f"{size_kib}k"],
        check=True,
        env=client_environment(),
        stdout=subprocess.DEVNULL,
    )
    shutil.rmtree(root)
    return target


def _below(root: Path, path: Path) -> Path:
    return root / str(path).lstrip("/")


def _copy(path: Path, root: Path) -> None:
    _copy_as(path, _below(root, path))


def _copy_as(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copy2(path, target)


def _imported(name: str) -> set[str]:
    """The distributions that ``name`` needs, and those that they need."""
    found: set[str] = set()
    todo = [name]
    while todo:
        for requirement in distribution(todo.pop()).requires or ():
            match = re.match(r"[\w.-]+", requirement)
            if match is None or "extra ==" in requirement or match[0].lower() in found:
                continue
            try:
                distribution(match[0])
            except PackageNotFoundError:  # of another Python or system
                continue
            found.add(match[0].lower())
            todo.append(match[0])
    return found


def _copy_package(name: str, site: Path) -> None:
    of = distribution(name)
    for file in of.files or ():
        source = Path(str(of.locate_file(file)))
        if ".." not in file.parts and source.is_file():
            _copy_as(source, site / str(file))


def _libraries(programs: Iterable[Path]) -> set[Path]:
    """Shared libraries of programs, and the loader, as the loader finds them."""
    listed = subprocess.run(["ldd", *programs], capture_output=True, text=True, env=os.environ, check=False).stdout
    return {Path(path) for path in re.findall(r"(/\S+) \(0x", listed)}
