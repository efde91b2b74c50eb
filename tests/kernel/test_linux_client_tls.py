"""A real Linux kernel over TLS: nbd-client shakes hands, and stays as the kernel's go-between."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path

from nbdsnap import operations
from tests.support.clients import require_client, sha256_of_file
from tests.support.machine import HOST, Machine
from tests.support.server import Server, Volume
from tests.support.tlsfiles import Authority

MIB = 1 << 20
VOLUME_SIZE = 32 * MIB
CERTIFICATES = (
    "-cacertfile /tmp/ca-cert.pem -certfile /tmp/client-cert.pem -keyfile /tmp/client-key.pem -tlshostname localhost"
)


def test_a_file_system_over_tls(start_server: Callable[..., Server], machine: Machine, tmp_path: Path) -> None:
    require_client("openssl")
    authority = Authority(tmp_path / "ca", ["alice"])
    rules = '[[allow]]\ncertificate = ["alice"]\nexports = ["vol", "vol@monday"]\nmode = "rw"\n'
    server = start_server([Volume("vol", tmp_path / "vol.img", VOLUME_SIZE)], sections=authority.toml() + rules)
    for path in (authority.folder / "alice").iterdir():
        machine.run(f"echo {base64.b64encode(path.read_bytes()).decode()} | base64 -d >/tmp/{path.name}")

    machine.run(f"date -u -s @{int(time.time()) + 1}")  # a slow clock takes new certificates for future ones
    code, _ = machine.call(f"nbd-client {HOST} {server.port} /dev/nbd0 -N vol")
    assert code != 0, "served in the clear"
    machine.run(f"nbd-client {HOST} {server.port} /dev/nbd0 -N vol -b 4096 {CERTIFICATES}")
    machine.run(
        "mkfs.ext4 -q -E nodiscard /dev/nbd0 && mount /dev/nbd0 /mnt && cd /mnt\n"
        "for i in $(seq 20); do head -c $((i * 7777)) /dev/urandom >small$i; done\n"
        "head -c 6000000 /dev/urandom >large && sha256sum * 2>/dev/null >/tmp/old.sha256\n"
        "cd / && umount /mnt"
    )
    server.snapshot("vol@monday")
    machine.run("mount /dev/nbd0 /mnt && head -c 6000000 /dev/urandom >/mnt/large && rm /mnt/small1* && umount /mnt")

    machine.run(f"nbd-client {HOST} {server.port} /dev/nbd1 -N vol@monday {CERTIFICATES}")
    machine.run("echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 -o ro /dev/nbd1 /mnt")
    machine.run("cd /mnt && grep -v lost+found /tmp/old.sha256 | sha256sum -c -s && cd / && umount /mnt")
    content = machine.run("e2fsck -fn /dev/nbd0 >/dev/null 2>&1 && sha256sum </dev/nbd0").split()[0]
    for device in ("nbd0", "nbd1"):
        machine.run(f"nbd-client -d /dev/{device}; while [ -e /sys/block/{device}/pid ]; do usleep 10000; done")
    server.manage(operations.STATUS)
    assert sha256_of_file(tmp_path / "vol.img") == content
