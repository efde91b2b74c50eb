"""One emulated machine for all tests of this folder: booting costs more than any of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.machine import Machine


@pytest.fixture(scope="session")
def booted_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with Machine(tmp_path_factory.mktemp("machine")) as machine:
        yield machine


@pytest.fixture
def machine(booted_machine: Machine) -> Iterator[Machine]:
    """The machine with nothing mounted or attached, before and after each test."""
    booted_machine.run("dmesg -c >/dev/null; rm -rf /mnt /tmp; mkdir /mnt /tmp")
    yield booted_machine
    if booted_machine.alive():
        booted_machine.run(
            "awk '$1 ~ /nbd/ {print $2}' /proc/mounts | sort -r | xargs -r -n1 umount -l\n"
            "for pid in /sys/block/nbd*/pid; do\n"
            "    [ -e $pid ] && nbd-client -d /dev/$(basename $(dirname $pid))\n"
            "done; true"
        )
