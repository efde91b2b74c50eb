"""Kernel and initramfs for the emulated machine: Debian's cloud kernel, unpacked (not installed), and a tiny user land.

The kernel package is downloaded once, into ``build/kernel`` of this repository (or ``$NBDSNAP_KERNEL_CACHE``); the
initramfs is made anew for each machine from this host's own programs: that takes a fraction of a second, and is never
stale.

The archive is written in the kernel's "newc" cpio format (Documentation/driver-api/early-userspace/buffer-format.rst),
uncompressed: inflating would cost the emulated CPU more than the memory is worth.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support.clients import client_environment, require_client

REPOSITORY = Path(__file__).resolve().parents[2]
KERNEL_PACKAGE = "linux-image-cloud-amd64"
DOWNLOAD_TIMEOUT_S = 300.0

MODULES = ("virtio_pci", "virtio_net", "virtio_blk", "nbd")
"""What the machine loads at boot, each after what it depends on.  Ext4 and serial ports are built in."""

PROGRAMS = ("nbd-client", "mkfs.ext4", "e2fsck")
"""What busybox lacks; copied from this host with the libraries they need."""

BUSYBOX = Path("/bin/busybox")

INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/usr/bin:/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs run /run
for module in $(cat /modules/order); do insmod /modules/$module || echo "insmod $module failed"; done
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
    ip link set eth0 up
    ip address add 10.0.2.15/24 dev eth0
    ip route add default via 10.0.2.2
fi
stty -F /dev/ttyS1 raw -echo
exec </dev/ttyS1 >/dev/ttyS1 2>/dev/console
echo ready
while read -r number command; do
    echo "$command" | base64 -d >/run/command
    sh /run/command </dev/null >/run/output 2>&1
    code=$?
    echo "$number $code $(base64 </run/output | tr -d '\\n')"
done
"""
"""Process 1: an agent on the second serial port: ``NUMBER BASE64-SCRIPT`` in, ``NUMBER CODE BASE64-OUTPUT`` out."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package."""

    image: Path
    modules: Path


def get_kernel() -> Kernel:
    """The kernel, downloaded with apt where the cache lacks it."""
    cache = Path(os.environ.get("NBDSNAP_KERNEL_CACHE", REPOSITORY / "build" / "kernel"))
    if not (cache / "root").exists():
        _download(cache)
    (image,) = (cache / "root" / "boot").glob("vmlinuz-*")
    (modules,) = (cache / "root" / "lib" / "modules").iterdir()
    return Kernel(image, modules)


def _download(cache: Path) -> None:
    require_client("apt-get", "dpkg")
    cache.mkdir(parents=True, exist_ok=True)
    package = _kernel_package_name()
    if package is None:  # a fresh machine has no package lists
        _run("apt-get", "update")
        package = _kernel_package_name()
    assert package is not None, f"no package {KERNEL_PACKAGE} to be had"
    for old in cache.glob("*.deb"):
        old.unlink()
    _run("apt-get", "download", package, cwd=cache)
    (deb,) = cache.glob("*.deb")
    partial = cache / "root.partial"
    shutil.rmtree(partial, ignore_errors=True)
    _run("dpkg", "-x", str(deb), str(partial))
    deb.unlink()
    partial.rename(cache / "root")


def _kernel_package_name() -> str | None:
    """The package that holds today's kernel: the one that the meta package depends on."""
    shown = _run("apt-cache", "show", "--no-all-versions", KERNEL_PACKAGE, check=False)
    match = re.search(r"^Depends: (linux-image-\S+)", shown, re.MULTILINE)
    return None if match is None else match[1]


def _run(*command: str, cwd: Path | None = None, check: bool = True) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, env=client_environment()
    )
    assert not check or done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def build_initramfs(
    target: Path,
    kernel: Kernel,
    programs: Iterable[str] = (),
    modules: Iterable[str] = (),
    files: dict[str, Path] | None = None,
) -> Path:
    """Write the archive: busybox, the agent, PROGRAMS and MODULES, and what the caller adds.

    ``files`` maps paths in the machine to files of this host.
    """
    require_client("busybox", *PROGRAMS)
    archive = _Archive()
    archive.add("init", INIT.encode(), 0o755)
    archive.add_file("bin/busybox", BUSYBOX)
    for folder in ("dev", "proc", "sys", "run", "mnt", "tmp", "modules"):
        archive.add_folder(folder)
    archive.add("etc/mtab", b"")
    archive.add_file("etc/mke2fs.conf", Path("/etc/mke2fs.conf"))
    for program in (*PROGRAMS, *programs):
        found = shutil.which(program, path=client_environment()["PATH"])
        assert found is not None, f"no program {program}"
        archive.add_file(f"usr/sbin/{program}", Path(found))
        for library in _libraries(found):
            archive.add_file(str(library).lstrip("/"), library)
    order = _load_order((*MODULES, *modules), kernel.modules)
    for module in order:
        archive.add_file(f"modules/{module.name}", module)
    archive.add("modules/order", "".join(f"{module.name}\n" for module in order).encode())
    for name, source in (files or {}).items():
        archive.add_file(name.lstrip("/"), source)
    target.write_bytes(archive.finish())
    return target


def _libraries(program: str) -> list[Path]:
    """Shared libraries and the loader of a program, as its loader finds them."""
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", _run("ldd", program))]


def _load_order(names: Iterable[str], root: Path) -> list[Path]:
    """Module files such that each stands after what it depends on."""
    available = {path.stem.replace("-", "_"): path for path in root.rglob("*.ko")}
    order: list[Path] = []

    def visit(name: str) -> None:
        path = available[name.replace("-", "_")]
        if path in order:
            return
        match = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for dependency in match[1].decode().split(",") if match else []:
            if dependency:
                visit(dependency)
        order.append(path)

    for name in names:
        visit(name)
    return order


class _Archive:
    """A cpio archive, format "newc".

    An entry is a magic, thirteen 8-digit hexadecimal fields and the name, padded to 4 bytes; then the content, padded.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def add(self, name: str, content: bytes, mode: int = 0o644) -> None:
        self._entry(name, stat.S_IFREG | mode, content)

    def add_file(self, name: str, source: Path) -> None:
        executable = 0o755 if os.access(source, os.X_OK) else 0o644
        self.add(name, source.read_bytes(), executable)

    def add_folder(self, name: str) -> None:
        self._entry(name, stat.S_IFDIR | 0o755, b"")

    def _entry(self, name: str, mode: int, content: bytes) -> None:
        if name in self._names:
            return
        parent = name.rpartition("/")[0]
        if parent:
            self.add_folder(parent)
        self._names.add(name)
        self._raw(name, mode, content, len(self._names))

    def _raw(self, name: str, mode: int, content: bytes, inode: int) -> None:
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name's length, check
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._parts.append(_padded(header) + _padded(content))

    def finish(self) -> bytes:
        self._raw("TRAILER!!!", 0, b"", 0)
        return b"".join(self._parts)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
