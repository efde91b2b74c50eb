"""A clone of a mounted volume's snapshot: checked, mounted and written by a real Linux kernel, while the volume goes
on; and a thin volume that gives its space back."""

from __future__ import annotations

from pathlib import Path

from tests.kernel.test_linux_client import StartServer, assert_no_kernel_complaint, attach, detach
from tests.support.deadline import wait_until
from tests.support.machine import Machine
from tests.support.server import Volume

MIB = 1 << 20
VOLUME_SIZE = 96 * MIB


def test_a_clone_beside_its_volume(start_server: StartServer, machine: Machine, tmp_path: Path) -> None:
    server = start_server([Volume("vol", tmp_path / "vol.img", VOLUME_SIZE)])
    attach(machine, server.port, "vol", "/dev/nbd0", "-b 4096")
    machine.run("mkfs.ext4 -q /dev/nbd0 && mount /dev/nbd0 /mnt && mkdir /mnt/old /mnt/churn /tmp/trial /tmp/again")
    machine.run(
        "cd /mnt && for i in $(seq 30); do head -c $((i * 7777)) /dev/urandom >old/$i; done\n"
        "sync -f /mnt && find old -type f | sort | xargs sha256sum >/tmp/old.sha256\n"
        "cat >/tmp/churn.sh <<'END'\n"
        "i=0; while [ ! -e /tmp/stop ]; do\n"
        "    i=$((i + 1)); head -c $((i % 7 * 30000 + 1)) /dev/urandom >/mnt/churn/$((i % 25))\n"
        "    [ $i = 40 ] && touch /tmp/churning\n"
        "done\n"
        "END\n"
        "sh /tmp/churn.sh >/tmp/churn.log 2>&1 & echo $! >/tmp/churn.pid"
    )

    # taken under load, without a freeze: the clone's journal makes it clean, and that is written to the clone
    server.snapshot("vol@busy")
    server.cli("clone", "vol@busy", "trial")
    attach(machine, server.port, "trial", "/dev/nbd1", "-b 4096")
    code, said = machine.call("e2fsck -fy /dev/nbd1")
    assert code in (0, 1), said
    machine.run("e2fsck -fn /dev/nbd1 && mount /dev/nbd1 /tmp/trial")
    machine.run("cd /tmp/trial && sha256sum -c -s /tmp/old.sha256")
    machine.run(
        "cd /tmp/trial && rm -r old/1* churn && head -c 3000000 /dev/urandom >new && sync -f .\n"
        "find . -type f | sort | xargs sha256sum >/tmp/trial.sha256"
    )

    # a clone of the clone, while both go on
    server.snapshot("trial@once")
    server.cli("clone", "trial@once", "again")
    attach(machine, server.port, "again", "/dev/nbd2", "-b 4096")
    code, said = machine.call("e2fsck -fy /dev/nbd2")
    assert code in (0, 1), said
    machine.run(
        "mount /dev/nbd2 /tmp/again && cd /tmp/again && sha256sum -c -s /tmp/trial.sha256 && rm -r old && sync -f ."
    )

    # the volume has not noticed
    machine.run("while [ ! -e /tmp/churning ]; do usleep 10000; done")
    machine.run(
        "touch /tmp/stop; while kill -0 $(cat /tmp/churn.pid) 2>/dev/null; do usleep 10000; done; cat /tmp/churn.log"
    )
    machine.run("echo 3 >/proc/sys/vm/drop_caches")
    machine.run("cd /mnt && sha256sum -c -s /tmp/old.sha256")
    machine.run("cd /tmp/trial && sha256sum -c -s /tmp/trial.sha256")
    server.cli("snapshot", "delete", "vol@busy", exit_code=5)
    machine.run("umount /tmp/again /tmp/trial /mnt")
    for device in ("/dev/nbd0", "/dev/nbd1", "/dev/nbd2"):
        machine.run(f"e2fsck -fn {device}")
        detach(machine, device)
    assert_no_kernel_complaint(machine)

    # freed from the volume, it is as it was
    server.cli("volume", "flatten", "trial")
    server.cli("snapshot", "delete", "vol@busy")
    attach(machine, server.port, "trial", "/dev/nbd0", "-b 4096")
    machine.run("e2fsck -fn /dev/nbd0 && mount /dev/nbd0 /mnt && cd /mnt && sha256sum -c -s /tmp/trial.sha256")
    machine.run("umount /mnt")
    detach(machine, "/dev/nbd0")
    server.cli("volume", "delete", "again")
    server.cli("volume", "delete", "trial", "--snapshots")
    assert server.json("status")["store"]["used_bytes"] == 0


def test_a_thin_volume_gives_back_what_is_trimmed(start_server: StartServer, machine: Machine, tmp_path: Path) -> None:
    server = start_server([Volume("vol", tmp_path / "vol.img", VOLUME_SIZE)])
    server.cli("volume", "create", "thin", "--thin", "--size", str(VOLUME_SIZE))
    attach(machine, server.port, "thin", "/dev/nbd0", "-b 4096")
    machine.run(
        "mkfs.ext4 -q -E lazy_itable_init=0 /dev/nbd0 && mount /dev/nbd0 /mnt"
        " && head -c 30000000 /dev/urandom >/mnt/large && sync"
    )
    store = server.json("status")["store"]
    assert 30_000_000 < store["used_bytes"] < 60_000_000
    machine.run("rm /mnt/large && sync && fstrim -v /mnt")
    wait_until(
        lambda: server.json("status")["store"]["allocated_bytes"] < store["allocated_bytes"] - 20_000_000,
        "the trimmed space to be free",
    )
    machine.run("umount /mnt && e2fsck -fn /dev/nbd0")
    detach(machine, "/dev/nbd0")
    assert_no_kernel_complaint(machine)
