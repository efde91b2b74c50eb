"""The recorder: runs a program under strace(1) and makes a :class:`Recording` of its trace.

Why at the system calls: the program is the real one with its real file system below it, threads, child processes and
LMDB's C code included, and nothing about it is replaced.  strace stops a thread before the call is executed, and
again when it has been, so each operation's interval in the trace contains the true one, and cause stands before
effect.

What would change a file unseen is refused with :class:`RecordingError` (a writable shared mapping, io_uring,
reflinks, a call that is not known here); and when the run is over, the recorded operations, all applied, must give
exactly the files that are there.  So a recording is complete, or there is none.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.crash.disk import Disk, parent_of
from tests.crash.marks import ATTACHMENTS_SUFFIX, MARKS_VARIABLE, MODIFIED, SITE
from tests.crash.recording import NEVER, Kind, Mark, Operation, Recording

RUN_TIMEOUT_S = 120.0

MAX_CALL_BYTES = 1 << 26
"""Of one call's data in the trace; beyond it strace cuts the text, which is refused."""

WORKING_FOLDER = "/proc/self/cwd"
"""The recorded folder, by a name that is the same wherever it is: programs run, and states are verified, with it as
their working folder.  For paths that lie on the recorded disk."""

_CALLS = [
    "open",
    "openat",
    "openat2",
    "creat",
    "close",
    "dup",
    "dup2",
    "dup3",
    "fcntl",
    "lseek",
    "clone",
    "clone3",
    "fork",
    "vfork",
    "write",
    "writev",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "truncate",
    "ftruncate",
    "fallocate",
    "fsync",
    "fdatasync",
    "sync_file_range",
    "sync",
    "syncfs",
    "msync",
    "mmap",
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
    "link",
    "linkat",
    "symlink",
    "symlinkat",
    "mkdir",
    "mkdirat",
    "rmdir",
    "copy_file_range",
    "sendfile",
    "splice",
    "vmsplice",
    "ioctl",
    "io_uring_setup",
    "io_submit",
]

_SYNC_FLAGS = os.O_DSYNC
RWF_DSYNC, RWF_SYNC, RWF_APPEND = 0x02, 0x04, 0x10
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 0x01, 0x02, 0x10
CLONE_FILES = 0x400
IOCB_CMD_PWRITE = 1
PROT_WRITE, MAP_SHARED, MAP_TYPE = 0x2, 0x01, 0x0F
AT_REMOVEDIR = 0x200
_CLONE_REFLINKS = (0x40049409, 0x4020940D)


_ROOT = str(Path(__file__).parents[2])
"""Where traced programs find the tests' modules."""


class RecordingError(Exception):
    """The run can't be recorded completely, or it failed."""


@dataclass
class _Call:
    """One line of the trace, its two halves joined."""

    thread: int
    start: int
    end: int
    name: str
    arguments: str
    result: int
    """-1 where it failed or never returned."""
    result_path: str


@dataclass
class _Descriptor:
    path: str
    flags: int
    position: int = 0


@dataclass
class _Process:
    descriptors: dict[int, _Descriptor] = field(default_factory=dict)


_CONTENT = (Kind.WRITE, Kind.ZERO, Kind.SIZE, Kind.SYNC)
_LINE = re.compile(r"(\d+) +(.*)", re.DOTALL)
_CALL = re.compile(r"(\w+)\((.*)", re.DOTALL)
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>(.*)", re.DOTALL)
_RESULT = re.compile(r"(.*)\)\s+= (-?(?:0x)?[0-9a-f]+|\?)(?:<((?:\\x[0-9a-f]{2})*)>)?(.*)", re.DOTALL)
_FD = re.compile(r"(-?\d+)(?:<((?:\\x[0-9a-f]{2})*)>)?(\(deleted\))?")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_IOCB = re.compile(
    r"\{aio_data=\w+, aio_lio_opcode=(?P<opcode>\w+), aio_fildes=(?P<fd>\d+)<(?P<path>(?:\\x[0-9a-f]{2})*)>"
    r'(?P<deleted>\(deleted\))?, aio_buf=(?:"(?P<data>(?:\\x[0-9a-f]{2})*)"|\w+), aio_nbytes=(?P<length>\w+), '
    r"aio_offset=(?P<offset>\w+)\}"
)
_CLONE_FLAGS = re.compile(r"flags=(0x[0-9a-f]+|\d+)")
_UNFINISHED = " <unfinished ...>"


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _text(text: str) -> str:
    return _bytes(text).decode()


def _run(command: Sequence[str | Path], cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """To its end; past the time limit, the tracer ends, and the traced with it."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=RUN_TIMEOUT_S)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def record(
    command: Sequence[str | Path],
    folder: Path,
    scratch: Path,
    *,
    environment: Mapping[str, str] | None = None,
    mapped: Iterable[str] = (),
    ended: Callable[[int], bool] = lambda code: code == 0,
) -> Recording:
    """Run ``command`` and record what it does below ``folder``.  ``scratch``, a new folder, keeps the trace.

    ``mapped``: patterns of files (relative to ``folder``) that may be changed through a shared mapping, because what
    they hold means nothing after a reboot; they start empty in every disk state.
    """
    require_strace()
    folder = folder.resolve()
    scratch.mkdir(parents=True)
    log, marks = scratch / "trace", scratch / "marks"
    attachments = scratch / ("marks" + ATTACHMENTS_SUFFIX)
    before = contents_of(folder, mapped)
    process = _run(
        [
            *("strace", "-f", "--seccomp-bpf", "-qq", "-y", "-xx", "-X", "raw", "-s", str(MAX_CALL_BYTES), "-o", log),
            *("-e", "signal=none", "-e", "trace=" + ",".join(_CALLS), "--", *command),
        ],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": _ROOT,
            **(environment or {}),
            MARKS_VARIABLE: str(marks),
            "UV_USE_IO_URING": "0",
        },
    )
    if not ended(process.returncode):
        raise RecordingError(f"{command}: exit {process.returncode}\n{process.stdout}\n{process.stderr}")
    recording = _Parser(folder, marks, tuple(mapped), before).parse(log)
    _verify_complete(recording, folder, mapped)
    if attachments.exists():
        recording.attachments = {path.name: path.read_bytes() for path in attachments.iterdir()}
    return recording


def require_strace() -> None:
    if shutil.which("strace") is None:
        raise RecordingError("strace is not installed")


@dataclass
class Contents:
    """Of a folder, by path."""

    files: dict[str, bytes] = field(default_factory=dict)
    modified: dict[str, int] = field(default_factory=dict)
    directories: list[str] = field(default_factory=list)


def contents_of(folder: Path, mapped: Iterable[str] = ()) -> Contents:
    contents = Contents()
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            contents.directories.append(name)
        elif path.is_file():  # a socket holds nothing
            contents.files[name] = b"" if _matches(name, mapped) else path.read_bytes()
            contents.modified[name] = path.stat().st_mtime_ns
    return contents


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _verify_complete(recording: Recording, folder: Path, mapped: Iterable[str]) -> None:
    disk = Disk(recording)
    disk.advance(recording.end)
    recorded = disk.latest()
    found = contents_of(folder, mapped)
    if sorted(recorded.directories) != sorted(found.directories):
        raise RecordingError(f"the folder has directories {found.directories}, the recording {recorded.directories}")
    if recorded.files.keys() != found.files.keys():
        raise RecordingError(f"the folder has files {sorted(found.files)}, the recording {sorted(recorded.files)}")
    for name, content in found.files.items():
        if bytes(recorded.files[name]) != content:
            raise RecordingError(f"{name} was changed by something that the recording does not have")


class _Parser:
    def __init__(self, folder: Path, marks: Path, mapped: tuple[str, ...], before: Contents) -> None:
        self._folder = str(folder)
        self._marks = str(marks)
        self._mapped = mapped
        inodes = {name: number for number, name in enumerate(before.files, 1)}
        self._recording = Recording(before.files, before.directories, inodes, before.modified)
        self._inodes = dict(inodes)
        self._sizes = {inodes[name]: len(content) for name, content in before.files.items()}
        self._directories = {"", *before.directories}
        self._next_inode = len(inodes) + 1
        self._processes: dict[int, _Process] = {}
        self._parents: dict[int, tuple[int, bool]] = {}
        self._sites: dict[int, str] = {}

    def parse(self, log: Path) -> Recording:
        calls = sorted(self._calls(log), key=lambda call: call.start)
        for call in calls:
            if call.name in ("clone", "clone3", "fork", "vfork") and call.result > 0:
                flags = _CLONE_FLAGS.search(call.arguments)
                shared = flags is not None and bool(int(flags[1], 0) & CLONE_FILES)
                self._parents[call.result] = (call.thread, shared)
        for call in calls:
            self._handle(call)
        return self._recording

    def _calls(self, log: Path) -> Iterator[_Call]:
        pending: dict[int, tuple[int, str]] = {}
        time = 0
        with log.open() as lines:
            for time, line in enumerate(lines, 1):
                match = _LINE.match(line.rstrip("\n"))
                if match is None:
                    raise RecordingError(f"line {time} of the trace is not understood: {line[:200]}")
                thread, rest = int(match[1]), match[2]
                start = 2 * time
                if rest.startswith(("+++", "---")):
                    continue
                resumed = _RESUMED.match(rest)
                if resumed is not None:
                    if thread not in pending:
                        raise RecordingError(f"line {time} of the trace resumes what was not begun")
                    start, begun = pending.pop(thread)
                    rest = begun + resumed[2]
                if rest.endswith(_UNFINISHED):
                    pending[thread] = start, rest.removesuffix(_UNFINISHED)
                    continue
                yield self._call(thread, start, 2 * time + 1, rest)
        self._recording.end = 2 * time + 2
        for thread, (start, begun) in pending.items():
            yield self._call(thread, start, NEVER, begun + ") = ?")

    def _call(self, thread: int, start: int, end: int, text: str) -> _Call:
        call = _CALL.fullmatch(text)
        result = None if call is None else _RESULT.fullmatch(call[2])
        if call is None or result is None:
            raise RecordingError(f"a call in the trace is not understood: {text[:300]}")
        died = result[2] == "?"
        value = -1 if died else int(result[2], 0)
        return _Call(thread, start, NEVER if died else end, call[1], result[1], value, _text(result[3] or ""))

    # --- descriptors ---

    def _process(self, thread: int) -> _Process:
        process = self._processes.get(thread)
        if process is None:
            if thread in self._parents:
                parent, shared = self._parents[thread]
                inherited = self._process(parent)
                process = inherited if shared else _Process(dict(inherited.descriptors))
            else:
                process = _Process()
            self._processes[thread] = process
        return process

    def _descriptor(self, call: _Call) -> tuple[_Descriptor | None, str]:
        """The first argument's descriptor, where it is on a watched file, and the arguments after it."""
        match = _FD.match(call.arguments)
        if match is None:
            raise RecordingError(f"{call.name}({call.arguments[:100]}: no descriptor")
        rest = call.arguments[match.end() :].removeprefix(", ")
        path = _text(match[2] or "")
        if not self._watched(path) and path != self._marks:
            return None, rest
        if match[3]:
            raise RecordingError(f"{call.name} on the deleted file {path}: not modelled")
        known = self._process(call.thread).descriptors.get(int(match[1]))
        if known is None:
            raise RecordingError(f"{call.name} on {path}, whose opening was not seen")
        known.path = path
        return known, rest

    def _watched(self, path: str) -> bool:
        return path == self._folder or path.startswith(self._folder + "/")

    def _relative(self, path: str) -> str:
        return path[len(self._folder) + 1 :]

    def _inode(self, descriptor: _Descriptor) -> int:
        return self._inodes[self._relative(descriptor.path)]

    # --- calls ---

    def _handle(self, call: _Call) -> None:
        handler = getattr(self, f"_on_{call.name}", None)
        if handler is not None:
            handler(call)
            return
        paths = [_text(match[1]) for match in _STRING.finditer(call.arguments)]
        paths += [_text(match[2] or "") for match in _FD.finditer(call.arguments)]
        if any(self._watched(path) for path in paths) and call.result >= 0:
            raise RecordingError(f"{call.name} on {paths}: not modelled")

    def _add(self, call: _Call, kind: Kind, path: str, **fields: Any) -> None:
        site = self._sites.pop(call.thread, "")
        if kind in _CONTENT and _matches(path, self._mapped):
            return
        self._recording.operations.append(Operation(kind, call.start, call.end, path, site=site, **fields))

    def _on_open(self, call: _Call) -> None:
        """open, openat, creat: a new file is a LINK; O_TRUNC of an old one is a SIZE."""
        if call.result < 0:
            if call.end == NEVER and self._watched(self._path_argument(call)):
                raise RecordingError("the process died while it opened a file: not modelled")
            return
        path = call.result_path
        flags = self._open_flags(call)
        self._process(call.thread).descriptors[call.result] = _Descriptor(path, flags)
        if not self._watched(path):
            return
        name = self._relative(path)
        if name in self._directories:
            return
        if name not in self._inodes:
            if not flags & os.O_CREAT:
                return  # a socket, or a device
            self._inodes[name] = self._next_inode
            self._sizes[self._next_inode] = 0
            self._next_inode += 1
            self._add(call, Kind.LINK, name, inode=self._inodes[name])
        elif flags & os.O_TRUNC and self._sizes[self._inodes[name]]:
            self._resize(call, name, 0)

    _on_openat = _on_open
    _on_openat2 = _on_open
    _on_creat = _on_open

    def _open_flags(self, call: _Call) -> int:
        if call.name == "creat":
            return os.O_CREAT | os.O_TRUNC | os.O_WRONLY
        tail = call.arguments[call.arguments.rindex('"') + 1 :]
        match = re.search(r"0x[0-9a-f]+|\d+", tail)
        return int(match[0], 0) if match else 0

    def _path_argument(self, call: _Call) -> str:
        match = _STRING.search(call.arguments)
        return _text(match[1]) if match else ""

    def _on_close(self, call: _Call) -> None:
        match = _FD.match(call.arguments)
        if match is not None:
            self._process(call.thread).descriptors.pop(int(match[1]), None)

    def _on_dup(self, call: _Call) -> None:
        match = _FD.match(call.arguments)
        if match is not None and call.result >= 0:
            descriptors = self._process(call.thread).descriptors
            known = descriptors.get(int(match[1]))
            if known is not None:
                descriptors[call.result] = known

    _on_dup2 = _on_dup
    _on_dup3 = _on_dup

    def _on_fcntl(self, call: _Call) -> None:
        command = call.arguments.split(", ")[1]
        if int(command, 0) in (0, 1030):  # F_DUPFD, F_DUPFD_CLOEXEC
            self._on_dup(call)

    def _on_lseek(self, call: _Call) -> None:
        descriptor, _ = self._descriptor(call)
        if descriptor is not None and call.result >= 0:
            descriptor.position = call.result

    def _on_write(self, call: _Call) -> None:
        descriptor, rest = self._descriptor(call)
        if descriptor is None:
            return
        if descriptor.path == self._marks:
            self._mark(call, rest)
            return
        if descriptor.flags & os.O_APPEND:
            descriptor.position = self._sizes[self._inode(descriptor)]
        self._write(call, descriptor, self._payload(call, rest), descriptor.position)
        descriptor.position += max(call.result, 0)

    _on_writev = _on_write

    def _on_pwrite64(self, call: _Call) -> None:
        descriptor, rest = self._descriptor(call)
        if descriptor is None:
            return
        tail = rest[rest.rindex('"') :] if '"' in rest else rest
        numbers = [int(text, 0) for text in re.findall(r"(?<![\w.])(?:0x[0-9a-f]+|\d+)(?!\w)", tail.split("}]")[-1])]
        offset, flags = numbers[1], numbers[2] if call.name == "pwritev2" else 0
        if flags & RWF_APPEND:
            raise RecordingError("RWF_APPEND: not modelled")
        self._write(call, descriptor, self._payload(call, rest), offset, flags)

    _on_pwritev = _on_pwrite64
    _on_pwritev2 = _on_pwrite64

    def _payload(self, call: _Call, text: str) -> bytes:
        parts = []
        for match in _STRING.finditer(text):
            if match[2]:
                raise RecordingError(f"{call.name} of more than {MAX_CALL_BYTES} bytes: not modelled")
            parts.append(_bytes(match[1]))
        data = b"".join(parts)
        return data if call.end == NEVER else data[: max(call.result, 0)]

    def _write(self, call: _Call, descriptor: _Descriptor, data: bytes, offset: int, flags: int = 0) -> None:
        if not data:
            return
        inode = self._inode(descriptor)
        durable = bool(descriptor.flags & _SYNC_FLAGS or flags & (RWF_DSYNC | RWF_SYNC)) and call.end != NEVER
        size = max(self._sizes[inode], offset + len(data))
        self._sizes[inode] = size
        name = self._relative(descriptor.path)
        self._add(call, Kind.WRITE, name, inode=inode, offset=offset, data=data, size=size, durable=durable)

    def _mark(self, call: _Call, text: str) -> None:
        fields = json.loads(self._payload(call, text))
        if SITE in fields:
            self._sites[call.thread] = fields[SITE]
        elif MODIFIED in fields:
            self._recording.observed.append((call.start, fields[MODIFIED], fields["ns"]))
        else:
            self._recording.marks.append(Mark(call.start, fields))

    def _on_ftruncate(self, call: _Call) -> None:
        descriptor, rest = self._descriptor(call)
        if descriptor is not None and (call.result == 0 or call.end == NEVER):
            self._resize(call, self._relative(descriptor.path), int(rest, 0))

    def _resize(self, call: _Call, name: str, size: int) -> None:
        inode = self._inodes[name]
        self._sizes[inode] = size
        self._add(call, Kind.SIZE, name, inode=inode, size=size)

    def _on_fallocate(self, call: _Call) -> None:
        descriptor, rest = self._descriptor(call)
        if descriptor is None or (call.result != 0 and call.end != NEVER):
            return
        mode, offset, length = (int(number, 0) for number in rest.split(", "))
        inode = self._inode(descriptor)
        name = self._relative(descriptor.path)
        if mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE):
            raise RecordingError(f"fallocate with mode {mode:#x}: not modelled")
        size = self._sizes[inode]
        if not mode & FALLOC_FL_KEEP_SIZE and offset + length > size:
            size = self._sizes[inode] = offset + length
            if not mode & FALLOC_FL_ZERO_RANGE:
                self._add(call, Kind.SIZE, name, inode=inode, size=size)
        if mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE):
            self._add(call, Kind.ZERO, name, inode=inode, offset=offset, length=length, size=size)

    def _on_fdatasync(self, call: _Call) -> None:
        descriptor, _ = self._descriptor(call)
        if descriptor is None or call.result != 0:
            self._sites.pop(call.thread, None)
            return
        name = self._relative(descriptor.path)
        if name in self._directories:
            self._add(call, Kind.SYNC_DIRECTORY, name)
        else:
            self._add(call, Kind.SYNC, name, inode=self._inode(descriptor), metadata=call.name == "fsync")

    _on_fsync = _on_fdatasync

    def _on_sync_file_range(self, call: _Call) -> None:
        """No promise: neither metadata nor the disk's own cache are flushed."""

    def _on_sync(self, call: _Call) -> None:
        if call.end != NEVER:
            self._add(call, Kind.SYNC_ALL, "")

    def _on_syncfs(self, call: _Call) -> None:
        if call.result == 0:
            self._add(call, Kind.SYNC_ALL, "")

    def _on_mmap(self, call: _Call) -> None:
        arguments = call.arguments.split(", ")
        protection, flags = int(arguments[2], 0), int(arguments[3], 0)
        match = _FD.match(arguments[4])
        path = _text(match[2] or "") if match else ""
        if protection & PROT_WRITE and flags & MAP_TYPE & MAP_SHARED and self._watched(path):
            name = self._relative(path)
            if not _matches(name, self._mapped):
                raise RecordingError(f"{name} is mapped shared and writable: its changes can't be seen")

    def _on_msync(self, call: _Call) -> None:
        """Only of a mapping, and those were looked at when they were made."""

    def _on_ioctl(self, call: _Call) -> None:
        arguments = call.arguments.split(", ")
        if int(arguments[1], 0) in _CLONE_REFLINKS and self._descriptor(call)[0] is not None:
            raise RecordingError("a reflink: not modelled")

    def _on_clone(self, call: _Call) -> None:
        """Looked at before all others."""

    _on_clone3 = _on_clone
    _on_fork = _on_clone
    _on_vfork = _on_clone

    def _on_io_uring_setup(self, call: _Call) -> None:
        if call.result >= 0:
            raise RecordingError("io_uring: what is done through it can't be seen")

    def _on_io_submit(self, call: _Call) -> None:
        """Buffered reads and writes, done when the call returns."""
        requests = list(_IOCB.finditer(call.arguments))
        if call.arguments.count("aio_fildes=") != len(requests):
            raise RecordingError(f"a call in the trace is not understood: {call.arguments[:300]}")
        for request in requests if call.end == NEVER else requests[: max(call.result, 0)]:
            path = _text(request["path"])
            if int(request["opcode"], 0) != IOCB_CMD_PWRITE or not self._watched(path):
                continue
            descriptor = self._process(call.thread).descriptors.get(int(request["fd"]))
            if descriptor is None or request["deleted"] or request["data"] is None:
                raise RecordingError(f"io_submit on {path}: not modelled")
            data = _bytes(request["data"])
            if len(data) != int(request["length"], 0):
                raise RecordingError(f"{call.name} of more than {MAX_CALL_BYTES} bytes: not modelled")
            self._write(call, descriptor, data, int(request["offset"], 0))

    def _names(self, call: _Call) -> list[str]:
        """The watched paths of a call that changes directories; relative ones are below an open directory, or ours."""
        names = []
        for match in re.finditer(r'(?:(-?\d+)<((?:\\x[0-9a-f]{2})*)>, )?"((?:\\x[0-9a-f]{2})*)"', call.arguments):
            folder = _text(match[2]) if match[2] else self._folder
            path = os.path.normpath(Path(folder) / _text(match[3]).replace(WORKING_FOLDER, self._folder))
            if self._watched(path):
                names.append(self._relative(path))
        return names

    def _on_mkdir(self, call: _Call) -> None:
        for name in self._names(call):
            if call.result == 0:
                self._directories.add(name)
                self._add(call, Kind.LINK, name)

    _on_mkdirat = _on_mkdir

    def _on_unlink(self, call: _Call) -> None:
        for name in self._names(call):
            if call.result == 0 and (name in self._inodes or name in self._directories):
                self._inodes.pop(name, None)
                self._directories.discard(name)
                self._add(call, Kind.UNLINK, name)

    _on_unlinkat = _on_unlink
    _on_rmdir = _on_unlink

    def _on_link(self, call: _Call) -> None:
        names = self._names(call)
        if not names or call.result != 0:
            return
        if len(names) != 2:
            raise RecordingError(f"link {names}: only of recorded files is modelled")
        self._inodes[names[1]] = self._inodes[names[0]]
        self._add(call, Kind.LINK, names[1], inode=self._inodes[names[1]])

    _on_linkat = _on_link

    def _on_rename(self, call: _Call) -> None:
        names = self._names(call)
        if not names or call.result != 0:
            return
        if len(names) != 2 or parent_of(names[0]) != parent_of(names[1]) or names[0] in self._directories:
            raise RecordingError(f"rename {names}: only of files inside one directory is modelled")
        self._inodes[names[1]] = self._inodes.pop(names[0])
        self._add(call, Kind.RENAME, names[0], target=names[1], inode=self._inodes[names[1]])

    _on_renameat = _on_rename
    _on_renameat2 = _on_rename
