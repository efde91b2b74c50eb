"""An emulated machine with a real Linux kernel, driven step by step: ``machine.run("mount /dev/nbd0 /mnt")``.

QEMU without hardware acceleration, so that it runs wherever the tests do.  Two serial ports: the first is the console
(kept in a file, its tail is part of every failure's message), the second carries one line per command to the agent in
the initramfs (:mod:`tests.support.initramfs`) and one line per result back.  The host's 127.0.0.1 is ``HOST`` inside.

Every wait has a deadline; past it the machine counts as lost, and is killed.
"""

from __future__ import annotations

import base64
import select
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.clients import require_client
from tests.support.deadline import Deadline, wait_until
from tests.support.initramfs import build_initramfs, get_kernel

HOST = "10.0.2.2"
"""The host's loopback address, as the machine's user network shows it."""

BOOT_TIMEOUT_S = 120.0
"""Booting takes 3 to 6 seconds on an idle machine, emulated as it is; a loaded one may need many times that."""

COMMAND_TIMEOUT_S = 60.0
CONSOLE_TAIL = 4000


class MachineError(AssertionError):
    """A command failed inside the machine, or the machine is lost."""


class Machine:
    """One emulated machine: a context manager; the machine is gone, without a trace, at its end.

    ``logged_disk``: a disk, and the log of its writes (:mod:`tests.support.writelog`); ``disks`` and
    ``read_only_disks`` follow it as /dev/vda and so on.  ``ports``: of the host's 127.0.0.1, and of the machine, where
    connections to them go.
    """

    def __init__(
        self,
        folder: Path,
        *,
        memory_mib: int = 512,
        disks: Sequence[Path] = (),
        programs: Sequence[str] = (),
        modules: Sequence[str] = (),
        files: dict[str, Path] | None = None,
        read_only_disks: Sequence[Path] = (),
        logged_disk: tuple[Path, Path] | None = None,
        ports: Mapping[int, int] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._memory_mib = memory_mib
        self._disks = [f"file={disk},format=raw,if=virtio,cache=writeback" for disk in disks]
        self._disks += [f"file={disk},format=raw,if=virtio,readonly=on" for disk in read_only_disks]
        self._logged_disk = logged_disk
        self._ports = dict(ports or {})
        self._contents = (programs, modules, files)
        self._process: subprocess.Popen[bytes] | None = None
        self._agent: socket.socket | None = None
        self._received = b""
        self._number = 0

    # --- life ---

    def start(self) -> Machine:
        require_client("qemu-system-x86_64")
        kernel = get_kernel()
        programs, modules, files = self._contents
        initramfs = build_initramfs(self._folder / "initramfs", kernel, programs, modules, files)
        agent = self._folder / "agent.sock"
        agent.unlink(missing_ok=True)
        command: list[str | Path] = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"]
        command += ["-m", str(self._memory_mib), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-kernel", kernel.image, "-initrd", initramfs]
        command += ["-append", "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on no_timer_check"]
        command += ["-serial", f"file:{self._folder / 'console.log'}"]
        command += ["-serial", f"unix:{agent},server=on,wait=off"]
        forwards = [f",hostfwd=tcp:127.0.0.1:{here}-:{there}" for here, there in self._ports.items()]
        command += ["-nic", "user,model=virtio-net-pci" + "".join(forwards)]
        if self._logged_disk is not None:
            disk_path, log_path = self._logged_disk
            log_path.write_bytes(b"")
            command += ["-blockdev", f"driver=file,filename={disk_path},node-name=data"]
            command += ["-blockdev", f"driver=file,filename={log_path},node-name=log"]
            command += ["-blockdev", "driver=blklogwrites,file=data,log=log,node-name=logged"]
            command += ["-device", "virtio-blk-pci,drive=logged,write-cache=on"]
        for disk in self._disks:
            command += ["-drive", disk]
        with (self._folder / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            wait_until(agent.exists, "QEMU's serial port", 10.0)
            self._agent = socket.socket(socket.AF_UNIX)
            self._agent.connect(str(agent))
            line = self._read_line(BOOT_TIMEOUT_S, "the machine to boot")
            if line != "ready":
                raise MachineError(f"the agent said {line!r}\n{self.console()}")
        except BaseException:
            self.kill()
            raise
        return self

    def kill(self) -> None:
        """Cut the machine's power: what its kernel had not written to its disks is gone."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._received = b""

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Machine:
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.kill()

    # --- commands ---

    def run(self, script: str, *, exit_code: int | None = 0, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run a shell script inside; its output, both streams, without the last newline.

        MachineError where it ends with another code than ``exit_code`` (None: any), or does not end in time.
        """
        code, output = self.call(script, timeout_s=timeout_s)
        if exit_code is not None and code != exit_code:
            raise MachineError(f"in the machine: {script}\nexit {code}\n{output}\n{self.console()}")
        return output

    def call(self, script: str, *, timeout_s: float = COMMAND_TIMEOUT_S) -> tuple[int, str]:
        """Exit code and output of a shell script run inside."""
        self._number += 1
        encoded = base64.b64encode(script.encode()).decode()
        assert self._agent is not None, "the machine does not run"
        self._agent.sendall(f"{self._number} {encoded}\n".encode())
        words = self._read_line(timeout_s, script).split(" ")
        if words[0] != str(self._number):
            raise MachineError(f"answer {words[0]} to command {self._number}\n{self.console()}")
        output = base64.b64decode(words[2]).decode(errors="replace") if len(words) > 2 else ""
        return int(words[1]), output.removesuffix("\n")

    def console(self) -> str:
        """The end of what the kernel and process 1 said."""
        log = self._folder / "console.log"
        tail = log.read_text(errors="replace")[-CONSOLE_TAIL:] if log.exists() else ""
        qemu = (self._folder / "qemu.log").read_text(errors="replace")
        return f"--- console ---\n{tail}\n{qemu}"

    def _read_line(self, timeout_s: float, what: str) -> str:
        assert self._agent is not None
        deadline = Deadline(timeout_s)
        while b"\n" not in self._received:
            if not select.select([self._agent], [], [], deadline.remaining())[0]:
                console = self.console()
                self.kill()
                raise MachineError(f"after {timeout_s:g} s still waiting for: {what}\n{console}")
            chunk = self._agent.recv(1 << 16)
            if not chunk:
                console = self.console()
                self.kill()
                raise MachineError(f"the machine ended during: {what}\n{console}")
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        return line.decode().rstrip("\r")
