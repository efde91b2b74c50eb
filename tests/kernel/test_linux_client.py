"""A real Linux kernel mounts a file system over nbdsnap, and goes back in time.

Each test is a story as an administrator would live it: commands inside the machine, snapshots from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.clients import read_export, run, sha256_of_file
from tests.support.deadline import wait_until
from tests.support.machine import HOST, Machine
from tests.support.nbdkit import nbdkit
from tests.support.server import Server, Volume

MIB = 1 << 20
VOLUME_SIZE = 96 * MIB

StartServer = Callable[..., Server]


@pytest.fixture
def server(start_server: StartServer, tmp_path: Path) -> Server:
    return start_server([Volume("vol", tmp_path / "vol.img", VOLUME_SIZE)])


def attach(machine: Machine, port: int, export: str, device: str, *options: str, size: int = VOLUME_SIZE) -> None:
    """nbd-client inside the machine; its device has its size when this returns."""
    machine.run(f"nbd-client {HOST} {port} {device} -N {export} {' '.join(options)}")
    assert int(machine.run(f"blockdev --getsize64 {device}")) == size


def detach(machine: Machine, device: str) -> None:
    machine.run(f"nbd-client -d {device}")
    name = Path(device).name
    machine.run(f"while [ -e /sys/block/{name}/pid ]; do usleep 10000; done")


def assert_no_kernel_complaint(machine: Machine) -> None:
    """The kernel logs each failed request, lost connection and file system error; a clean disconnect is not one."""
    complaints = machine.run("dmesg | grep -iE 'i/o error|ext4-fs (error|warning)|nbd.*(fail|error|timed out)' || true")
    assert complaints == ""


def is_sparser_than(path: Path, blocks: int) -> bool:
    return path.stat().st_blocks < blocks


def test_file_system_and_its_snapshot(server: Server, machine: Machine, tmp_path: Path) -> None:
    attach(machine, server.port, "vol", "/dev/nbd0", "-b 4096")
    machine.run("mkfs.ext4 -q -E nodiscard /dev/nbd0 && mount /dev/nbd0 /mnt")

    # files large and small, in folders, with holes, with links
    machine.run(
        "mkdir -p /mnt/folder/deep && cd /mnt\n"
        "for i in $(seq 60); do head -c $((i * 777)) /dev/urandom >folder/small$i; done\n"
        "head -c 4000000 /dev/urandom >large && head -c 1000000 /dev/urandom >folder/deep/middle\n"
        "echo end | dd of=sparse bs=1M seek=4 2>/dev/null\n"
        "ln large hard && ln -s folder/deep/middle soft\n"
        "find . -type f | sort | xargs sha256sum >/tmp/old.sha256\n"
        "fsfreeze --freeze /mnt"
    )
    server.cli("snapshot", "create", "vol@monday")
    machine.run("fsfreeze --unfreeze /mnt")

    # life goes on: change, overwrite in place, delete, create
    machine.run(
        "cd /mnt && rm folder/small1* && mv folder/small2 folder/renamed\n"
        "dd if=/dev/urandom of=large bs=4096 count=500 seek=100 conv=notrunc 2>/dev/null\n"
        "head -c 900000 /dev/urandom >folder/deep/middle && head -c 5000000 /dev/urandom >new\n"
        "rm sparse && sync\n"
        "find . -type f | sort | xargs sha256sum >/tmp/new.sha256"
    )

    # the snapshot is a device of its own, read-only, with the old files; frozen when taken, its journal is empty
    attach(machine, server.port, "vol@monday", "/dev/nbd1")
    assert machine.run("cat /sys/block/nbd1/ro") == "1"
    machine.run("mkdir /tmp/monday && mount -t ext4 -o ro /dev/nbd1 /tmp/monday")
    machine.run("cd /tmp/monday && sha256sum -c -s /tmp/old.sha256 && test -L soft && test large -ef hard")
    assert machine.run("cd /tmp/monday && ls folder | wc -l") == "61"
    code, _ = machine.call("dd if=/dev/zero of=/dev/nbd1 bs=4096 count=1 conv=fsync")
    assert code != 0, "a snapshot must not be writable"

    # both at once, with nothing from the page cache; the live one unchanged by the look back
    machine.run("echo 3 >/proc/sys/vm/drop_caches")
    machine.run("cd /mnt && sha256sum -c -s /tmp/new.sha256")
    machine.run("cd /tmp/monday && sha256sum -c -s /tmp/old.sha256")

    # what is in use is not deleted
    server.cli("snapshot", "delete", "vol@monday", exit_code=5)
    machine.run("umount /tmp/monday && e2fsck -fn /dev/nbd1")
    detach(machine, "/dev/nbd1")

    # deleted files give their space back to the raw file, and the snapshot keeps what it needs
    machine.run("rm /mnt/new /mnt/large /mnt/hard && sync")
    before = (tmp_path / "vol.img").stat().st_blocks
    machine.run("fstrim -v /mnt")
    wait_until(lambda: is_sparser_than(tmp_path / "vol.img", before - 7 * MIB // 512), "the trimmed space to be free")
    machine.run("umount /mnt && e2fsck -fn /dev/nbd0")
    detach(machine, "/dev/nbd0")

    # attached again, with nothing kept in the kernel's memory
    attach(machine, server.port, "vol", "/dev/nbd0")
    attach(machine, server.port, "vol@monday", "/dev/nbd1", "-b 4096")
    machine.run("e2fsck -fn /dev/nbd0 && mount /dev/nbd0 /mnt && mount -t ext4 -o ro /dev/nbd1 /tmp/monday")
    machine.run("cd /tmp/monday && sha256sum -c -s /tmp/old.sha256")
    machine.run("cd /mnt && grep -vE ' ./(new|large|hard)$' /tmp/new.sha256 | sha256sum -c -s")
    machine.run("umount /mnt /tmp/monday")
    assert_no_kernel_complaint(machine)
    detach(machine, "/dev/nbd0")
    detach(machine, "/dev/nbd1")

    # the kernel sent a disconnect: nothing holds the snapshot any more
    server.cli("snapshot", "delete", "vol@monday")
    assert server.json("snapshot", "list") == []


def test_several_connections(server: Server, machine: Machine, tmp_path: Path) -> None:
    """One device over two sockets: what one has written, the other reads, and a flush on one covers both."""
    attach(machine, server.port, "vol", "/dev/nbd0", "-connections 2")
    assert server.connections("vol") == 2
    machine.run("mkfs.ext4 -q /dev/nbd0 && mount -o discard /dev/nbd0 /mnt")
    machine.run(
        "fill() { mkdir /mnt/$1; for j in $(seq 20); do head -c 50000 /dev/urandom >/mnt/$1/$j; done; }\n"
        "for i in 1 2 3 4; do fill $i & done; wait; sync"
    )
    machine.run("cd /mnt && find . -type f | sort | xargs sha256sum >/tmp/files.sha256")
    machine.run("for i in 1 2 3 4; do (rm -r /mnt/$i/1*; head -c 900000 /dev/urandom >/mnt/$i/big; sync) & done; wait")
    server.snapshot("vol@several")
    machine.run("echo 3 >/proc/sys/vm/drop_caches; cd /mnt && grep -vE '/1[0-9]*$' /tmp/files.sha256 | sha256sum -c -s")
    machine.run("umount /mnt")
    detach(machine, "/dev/nbd0")
    attach(machine, server.port, "vol", "/dev/nbd0", "-connections 2", "-b 4096")
    machine.run("e2fsck -fn /dev/nbd0")
    detach(machine, "/dev/nbd0")
    assert_no_kernel_complaint(machine)

    # read by somebody else, the volume holds what the kernel wrote
    image = read_export(server.uri("vol"), tmp_path / "copy.img")
    run("e2fsck", "-fn", image)
    assert sha256_of_file(image) == sha256_of_file(tmp_path / "vol.img")


def test_snapshots_of_a_busy_file_system(server: Server, machine: Machine, tmp_path: Path) -> None:
    """Snapshots without a freeze, under load: each is what a power cut would have left, so its journal makes it clean.

    Files that were synced before a snapshot are in it; and nothing that happens later changes it.
    """
    attach(machine, server.port, "vol", "/dev/nbd0", "-connections 2")
    machine.run("mkfs.ext4 -q /dev/nbd0 && mount /dev/nbd0 /mnt && mkdir /mnt/synced /mnt/churn")
    machine.run(
        "cat >/tmp/churn <<'END'\n"
        "i=0; while [ ! -e /tmp/stop ]; do\n"
        "    i=$((i + 1)); head -c $((i % 7 * 30000 + 1)) /dev/urandom >/mnt/churn/$((i % 25))\n"
        "    rm -f /mnt/churn/$((i % 11))\n"
        "done\n"
        "END\n"
        "sh /tmp/churn >/tmp/churn.log 2>&1 & echo $! >/tmp/churn.pid"
    )
    for number in range(3):
        machine.run(
            f"head -c 500000 /dev/urandom >/mnt/synced/{number} && sync -f /mnt\n"
            f"cd /mnt && sha256sum synced/* >/tmp/{number}.sha256"
        )
        server.snapshot(f"vol@busy{number}")
    machine.run(
        "touch /tmp/stop; while kill -0 $(cat /tmp/churn.pid) 2>/dev/null; do usleep 10000; done; cat /tmp/churn.log"
    )
    machine.run("umount /mnt && e2fsck -fn /dev/nbd0")
    detach(machine, "/dev/nbd0")
    assert_no_kernel_complaint(machine)

    for number in range(3):
        # a copy that may be written replays the journal; a second check then finds nothing to repair
        image = read_export(server.uri(f"vol@busy{number}"), tmp_path / f"busy{number}.img")
        run("e2fsck", "-fy", image, exit_code=None)
        run("e2fsck", "-fn", image)
        # the kernel replays the journal, too, into a throwaway overlay between it and the snapshot
        with nbdkit("--filter=cow", "nbd", f"uri={server.uri(f'vol@busy{number}', 'unix')}") as port:
            attach(machine, port, f"vol@busy{number}", "/dev/nbd1")
            machine.run("mount /dev/nbd1 /mnt")
            machine.run(f"cd /mnt && sha256sum -c -s /tmp/{number}.sha256 && test $(ls synced | wc -l) = {number + 1}")
            machine.run("umount /mnt")
            detach(machine, "/dev/nbd1")
    assert_no_kernel_complaint(machine)


def test_a_volume_that_grows(server: Server, machine: Machine) -> None:
    """The kernel sees the new size when it connects again; a snapshot from before keeps its own."""
    attach(machine, server.port, "vol", "/dev/nbd0", "-b 4096")
    machine.run("yes old | dd of=/dev/nbd0 bs=4096 count=100 conv=fsync 2>/dev/null")
    server.cli("snapshot", "create", "vol@small")
    server.cli("volume", "resize", "vol", str(2 * VOLUME_SIZE))
    machine.run("yes new | dd of=/dev/nbd0 bs=4096 count=1 conv=fsync 2>/dev/null")
    detach(machine, "/dev/nbd0")
    attach(machine, server.port, "vol", "/dev/nbd0", "-b 4096", size=2 * VOLUME_SIZE)
    end = 2 * VOLUME_SIZE // 4096 - 1
    machine.run(f"yes end | dd of=/dev/nbd0 bs=4096 count=1 seek={end} conv=fsync 2>/dev/null")
    assert machine.run(f"dd if=/dev/nbd0 bs=4096 count=1 skip={end} 2>/dev/null | head -c 3") == "end"
    attach(machine, server.port, "vol@small", "/dev/nbd1", "-b 4096")
    assert machine.run("head -c 3 /dev/nbd1") == "old"
    detach(machine, "/dev/nbd0")
    detach(machine, "/dev/nbd1")
    assert_no_kernel_complaint(machine)
