"""``nbdsnap demo``: something to try, in a folder of its own.  ``make run`` is this."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from textwrap import dedent

import click

from nbdsnap.addresses import DEFAULT_PORT
from nbdsnap.config import load_config
from nbdsnap.errors import OriginError

DEMO_SIZE = 256 << 20
"""Bytes, sparse: a file system of that size takes some 10 MiB."""

CONFIG = """\
# Written by `nbdsnap demo`, each time it starts: copy it before you change it.
[server]
listen  = ["tcp://127.0.0.1:{port}", "unix://nbd.sock"]
control = "control.sock"

[pool]
path = "pool"

[[volume]]
name   = "vol"
origin = "vol.img"
size   = {size}
"""

HELLO = """\
This file system lies on the volume "vol" of nbdsnap's demo.

Take a snapshot, change this file, and read the old one from the export vol@first.
"""


@click.command(short_help="Serve a small volume to try things on.")
@click.argument("folder", default="demo", type=click.Path(path_type=Path))
@click.option("--port", default=DEFAULT_PORT, show_default=True, type=click.IntRange(1, 65535), help="On 127.0.0.1.")
@click.pass_context
def demo(ctx: click.Context, folder: Path, port: int) -> None:
    """Serve a small volume from FOLDER (./demo), and say what to do with it.

    The folder gets a configuration, a pool and a sparse image of 256 MiB: with an ext4 file system where mkfs.ext4
    exists, else empty. What is already there is used again.

    \b
    Example:
      nbdsnap demo
    """
    from nbdsnap.server.app import run

    config = prepare(folder, port)
    click.echo(instructions(config, port))
    sys.stdout.flush()
    ctx.exit(run(load_config(config)))


def prepare(folder: Path, port: int) -> Path:
    """The demo's configuration file, with the image beside it."""
    config = folder / "nbdsnap.toml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.write_text(CONFIG.format(port=port, size=DEMO_SIZE))
        if not (folder / "vol.img").exists():
            _make_image(folder / "vol.img")
    except OSError as error:
        raise OriginError(f"cannot write the demo into {folder}: {error.strerror}") from None
    return config


def _make_image(image: Path) -> None:
    """Appears under its name when it is whole."""
    partial = image.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with partial.open("wb") as file:
        file.truncate(DEMO_SIZE)
    mkfs = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if mkfs is not None:
        with tempfile.TemporaryDirectory() as content:
            (Path(content) / "hello.txt").write_text(HELLO)
            done = subprocess.run([mkfs, "-q", "-F", "-d", content, partial], capture_output=True, text=True)
        if done.returncode != 0:
            raise OriginError(f"{mkfs} failed: {' '.join(done.stderr.split())}")
    partial.rename(image)


def instructions(config: Path, port: int) -> str:
    """The exact lines to type, each in another terminal."""
    program = f"{_program()} --config {config}"
    uri = f"nbd://127.0.0.1:{port}"
    return dedent(f"""\
        The volume "vol" of {config.parent}/ will be served until Ctrl-C. From another terminal:

          look at it        nbdinfo {uri}/vol
                            qemu-img info {uri}/vol
          attach it         nbd-client -N vol 127.0.0.1 {port} /dev/nbd0    # then: mount /dev/nbd0 /mnt
          take a snapshot   {program} snapshot create vol@first
          see the change    {program} diff vol@first
          read the past     qemu-img convert -O raw {uri}/vol@first first.img
        """)


def _program() -> str:
    """How this program was called, for the same shell."""
    called = sys.argv[0]
    return called if Path(called).name == "nbdsnap" else "nbdsnap"
