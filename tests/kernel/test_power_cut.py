"""Power cuts of a real kernel: the server and its pool inside the emulated machine, on ext4 on a disk with a write
cache, and clients outside, which know what they were told.

A round: the machine boots on what the last cut has left, the server starts, everything is compared, and load begins; in
the midst of it the machine is gone.  ``NBDSNAP_TEST_PROFILE=long`` makes it more rounds.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdsnap import operations
from nbdsnap.client import RemoteClient
from tests.model import profiles
from tests.support import load
from tests.support.clients import client_environment, require_client
from tests.support.device import flush, read
from tests.support.expectation import Expectation
from tests.support.guestpython import PYTHON, SITE, build_python_disk
from tests.support.machine import Machine
from tests.support.nbddevice import NbdDevice
from tests.support.relay import UnixRelay
from tests.support.replicas import free_port
from tests.support.writelog import cut

CUTS = {"quick": 1, "default": 2, "long": 25}
SIZES = {"a": 1 << 20, "b": 300 * 1024 + 5}
DISK_MIB = 64
START_TIMEOUT_S = 240.0
"""The server's start takes 6 seconds on an idle machine, emulated as it is."""

MIN_OPERATIONS = 60
MAX_DELAY_S = 4.0
MANY = 100_000

_CONFIG = """\
[server]
listen = ["tcp://0.0.0.0:10809"]
control = "/run/control.sock"
insecure = true
[pool]
path = "/data/pool"
log_size = "256KiB"
""" + "".join(
    f'[[volume]]\nname = "{name}"\norigin = "/data/{name}.img"\nsize = {size}\n' for name, size in SIZES.items()
)

_START = f"""\
mkdir -p /root
mount -t ext4 -o ro /dev/vdb /root || exit 1
mount -t ext4 /dev/vda /root/data || exit 1
mount -o bind /dev /root/dev
mount -o bind /proc /root/proc
mount -t tmpfs run /root/run
cat >/root/run/nbdsnap.toml <<'END'
{_CONFIG}END
cp /relay.py /root/run/relay.py
export PYTHONPATH={SITE}
chroot /root {PYTHON} -c 'from nbdsnap.cli.main import main; main()' serve --config /run/nbdsnap.toml >/run/out 2>&1 &
server=$!
chroot /root {PYTHON} /run/relay.py 10810 /run/control.sock >/run/relay 2>&1 &
while ! grep -q ^ready /run/out; do usleep 50000; kill -0 $server || {{ cat /run/out; exit 1; }}; done
"""


class GuestTarget:
    """What the load needs, of the server in the machine."""

    def __init__(self, port: int, control: RemoteClient) -> None:
        self._port = port
        self._control = control
        self._number = 0
        self._lock = threading.Lock()

    def open(self, name: str) -> NbdDevice:
        with self._lock:
            self._number += 1
            kind = "extended" if self._number % 2 else "structured"
        return NbdDevice(("127.0.0.1", self._port), name, kind)

    def close(self, device: NbdDevice) -> None:
        device.close()

    def snapshot_create(self, names: Sequence[str]) -> object:
        return self._control.call(operations.SNAPSHOT_CREATE, operations.SnapshotCreate(names=list(names)))

    def snapshot_delete(self, names: Sequence[str]) -> object:
        return self._control.call(operations.SNAPSHOT_DELETE, operations.SnapshotDelete(names=list(names)))

    def snapshots(self) -> set[str]:
        listed = self._control.call(operations.SNAPSHOT_LIST, operations.SnapshotList())
        return {f"{info.volume}@{info.name}" for info in listed}

    def problems(self) -> object:
        return self._control.call(operations.CHECK, operations.CheckScope(data=True)).problems

    def read_all(self, name: str) -> bytes:
        device = self.open(name)
        content = read(device, 0, device.size)
        if "@" not in name:
            flush(device)  # from here on it is the past, which nothing may take away
        device.close()
        return content


class Past:
    """What the pool held when it was last compared, and what happened since."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._volumes = {name: bytes(size) for name, size in SIZES.items()}
        self._images: dict[str, bytes] = {}
        self.journal = load.MemoryJournal()

    def compare(self, target: GuestTarget) -> None:
        events = self.journal.timed()
        now = len(events)
        expected = Expectation(self._volumes, events, self.journal.images, self._seed)
        expected.check_instants()
        found = target.snapshots()
        doomed = {name for _, fields in events if fields["event"] == "delete" for name in fields["names"]}
        old = {name for name in found if name not in expected.snapshots.create}
        assert self._images.keys() - doomed <= old <= self._images.keys(), "a snapshot of an earlier round is lost"
        expected.snapshots.check(found - old, now)
        for name, history in expected.volumes.items():
            self._volumes[name] = target.read_all(name)
            history.check_after_power_cut(self._volumes[name], now)
        known = {**self._images, **self.journal.images}
        self._images = {name: target.read_all(name) for name in found}
        for name, image in self._images.items():
            assert image == known.get(name, image), f"{name} has changed"
        assert target.problems() == []
        self.journal = load.MemoryJournal()


@contextmanager
def serving(scratch: Path, disk: Path, log: Path, python: Path) -> Iterator[tuple[Machine, GuestTarget]]:
    nbd_port, control_port = free_port(), free_port()
    relay_source = Path(__file__).parents[1] / "support" / "relay.py"
    machine = Machine(
        scratch / "vm",
        logged_disk=(disk, log),
        read_only_disks=[python],
        ports={nbd_port: 10809, control_port: 10810},
        files={"relay.py": relay_source},
    )
    path = scratch / "control.sock"
    path.unlink(missing_ok=True)
    relay = UnixRelay(path, control_port)
    try:
        with machine:
            machine.run(_START, timeout_s=START_TIMEOUT_S)
            with RemoteClient(path) as control:
                yield machine, GuestTarget(nbd_port, control)
    finally:
        relay.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_power_cuts_of_a_kernel(tmp_path: Path) -> None:
    require_client("mke2fs", "qemu-system-x86_64")
    python = build_python_disk(tmp_path / "python.img")
    disk, before, log = (tmp_path / name for name in ("disk.img", "before.img", "log.img"))
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", disk, f"{DISK_MIB}m"],
        check=True,
        env=client_environment(),
        stdout=subprocess.DEVNULL,
    )
    rng = random.Random(profiles.seed())
    past = Past(profiles.seed())
    cuts = CUTS[profiles.name()]
    for number in range(cuts + 1):
        shutil.copyfile(disk, before)
        with serving(tmp_path, disk, log, python) as (machine, target):
            past.compare(target)
            if number == cuts:
                return
            plan = load.Plan(SIZES, profiles.seed(), MANY, first=(number + 1) * MANY, prefix=f"r{number}-")
            _load_and_cut(machine, target, past.journal, plan, rng.random() * MAX_DELAY_S)
        writes, unflushed = cut(before, log, disk, rng.getrandbits(32))
        print(f"cut {number + 1}: {writes} writes and flushes, {unflushed} since the last flush")


def _load_and_cut(
    machine: Machine, target: GuestTarget, journal: load.MemoryJournal, plan: load.Plan, delay_s: float
) -> None:
    work = load.Load(target, journal, plan, readers=1)
    work.start()
    work.wait_for(MIN_OPERATIONS)
    threading.Event().wait(delay_s)  # the moment of the cut is what this test is about
    machine.kill()
    work.abort()
