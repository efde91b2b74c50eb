"""URIs, as clients write them."""

from __future__ import annotations

from tests.interop.conftest import LiveVolume
from tests.support.clients import nbdinfo_json, qemu_img_json


def test_percent_encoded_export_names(volume: LiveVolume) -> None:
    """``@`` may be encoded or not, and so may anything else."""
    snapshot = volume.snapshot("a")
    assert "@" in snapshot
    encoded = snapshot.replace("@", "%40").replace("vol", "%76ol")
    for uri in (snapshot, encoded):
        (export,) = nbdinfo_json(uri)["exports"]
        assert (export["export-name"], export["is_read_only"]) == (f"{volume.name}@a", True)
        assert qemu_img_json("info", uri)["virtual-size"] == volume.size
