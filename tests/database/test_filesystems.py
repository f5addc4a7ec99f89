"""A database is refused on a network filesystem, wherever in the tree that is mounted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from backprompt_db.database.location import require_local
from backprompt_db.errors import UnsafeLocation
from backprompt_db.system import platform
from backprompt_db.system.platform import UNKNOWN, filesystem_of
from tests.support.faults import ROOT

ROOT_LINE = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw"


class Table:
    """A table of mounts. Each is mounted on the root, or on what `on` is the number of."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.file.write_text(f"{ROOT_LINE}\n")
        self._last = 22

    def mount(self, place: str | Path, kind: str, *, on: int = 22, options: str = "shared:2 master:1") -> int:
        self._last += 1
        with self.file.open("ab") as file:
            begin, end = f"{self._last} {on} 0:44 / ", f" rw,relatime {options} - {kind} server:/a - b rw,hard\n"
            file.write(begin.encode() + bytes_of(place) + end.encode())
        return self._last


def bytes_of(place: str | Path) -> bytes:
    """As the kernel writes it."""
    raw = str(place).encode(errors="surrogateescape")
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes([byte]) for byte in raw)


@pytest.fixture
def table(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Table:
    table = Table(tmp_path_factory.mktemp("table") / "mountinfo")
    monkeypatch.setattr(platform, "MOUNTS", table.file)
    return table


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "lustre", "gpfs", "fuse.sshfs", "fuse.s3fs"]
)
def test_a_network_filesystem_is_refused_with_its_type_and_the_way_out(table: Table, tmp_path: Path, kind: str) -> None:
    table.mount(tmp_path, kind)
    with pytest.raises(UnsafeLocation) as caught:
        require_local(tmp_path / "db")
    assert f"{tmp_path / 'db'} is on a network filesystem ({kind})" in caught.value.message
    for way in ("local disk", "`backprompt-db export`", "`import`", "`merge`", "`bp.open(private, base=...)`"):
        assert way in caught.value.hint


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "fuse.ntfs-3g", "virtiofs"])
def test_a_local_filesystem_is_accepted(table: Table, tmp_path: Path, kind: str) -> None:
    table.mount(tmp_path, kind)
    require_local(tmp_path / "db")
    assert filesystem_of(tmp_path / "db") == kind


def test_a_directory_that_does_not_exist_yet_is_where_its_nearest_ancestor_is(table: Table, tmp_path: Path) -> None:
    table.mount(tmp_path, "nfs4")
    with pytest.raises(UnsafeLocation):
        require_local(tmp_path / "not" / "yet" / "there")
    assert list(tmp_path.iterdir()) == []


def test_a_symbolic_link_is_where_it_leads(table: Table, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "near").symlink_to(tmp_path / "far")
    table.mount(tmp_path / "far", "nfs4")
    with pytest.raises(UnsafeLocation):
        require_local(tmp_path / "near" / "db")
    require_local(tmp_path / "db")


def test_a_name_that_only_begins_alike_is_another_directory(table: Table, tmp_path: Path) -> None:
    table.mount(tmp_path / "data", "nfs4")
    assert filesystem_of(tmp_path / "database") == "ext4"
    assert filesystem_of(tmp_path / "data") == "nfs4"


@pytest.mark.parametrize("name", ["with space", "tab\tline\nend", "back\\slash", "\\040", "#1", "é", "\udcff"])
def test_names_are_compared_as_the_kernel_writes_them(table: Table, tmp_path: Path, name: str) -> None:
    table.mount(tmp_path / name, "cifs")
    assert filesystem_of(tmp_path / name / "db") == "cifs"
    assert filesystem_of(tmp_path / "other") == "ext4"


def test_of_mounts_inside_each_other_the_innermost_counts(table: Table, tmp_path: Path) -> None:
    home = table.mount(tmp_path / "home", "nfs4")
    local = table.mount(tmp_path / "home" / "me" / "scratch", "xfs", on=home)
    table.mount(tmp_path / "home" / "me" / "scratch" / "share", "cifs", on=local)
    require_local(tmp_path / "home" / "me" / "scratch" / "db")
    for place in ("home/db", "home/me", "home/me/scratch/share/db"):
        with pytest.raises(UnsafeLocation):
            require_local(tmp_path / place)


def test_what_is_mounted_over_something_hides_it(table: Table, tmp_path: Path) -> None:
    table.mount(tmp_path / "a" / "b", "nfs4")
    above = table.mount(tmp_path / "a", "xfs")
    assert filesystem_of(tmp_path / "a" / "b" / "db") == "xfs"
    table.mount(tmp_path / "a", "tmpfs", on=above)
    assert filesystem_of(tmp_path / "a" / "b" / "db") == "tmpfs"


def test_what_is_mounted_while_the_process_runs_counts(table: Table, tmp_path: Path) -> None:
    require_local(tmp_path)
    table.mount(tmp_path, "nfs4")
    with pytest.raises(UnsafeLocation):
        require_local(tmp_path)


def test_below_a_changed_root_the_table_lacks_the_outermost_mount(table: Table, tmp_path: Path) -> None:
    table.file.write_text("")
    table.mount(tmp_path, "nfs4", on=7)
    assert filesystem_of(tmp_path / "db") == "nfs4"
    assert filesystem_of(tmp_path.parent) == UNKNOWN


@pytest.mark.parametrize("content", ["", "\n\n", "22 1", "garbage without an end", "22 1 8:1 / /", "1 1 8:1 / / rw - "])
def test_a_table_that_cannot_be_understood_refuses_nothing(table: Table, tmp_path: Path, content: str) -> None:
    table.file.write_text(content)
    require_local(tmp_path)


def test_a_table_that_cannot_be_read_refuses_nothing(table: Table, tmp_path: Path) -> None:
    table.file.unlink()
    require_local(tmp_path)
    assert filesystem_of(tmp_path) == UNKNOWN


def test_a_mount_that_lies_on_itself_is_no_endless_way(table: Table, tmp_path: Path) -> None:
    table.file.write_text("22 22 8:1 / / rw - ext4 /dev/sda1 rw\n")
    table.mount(tmp_path, "nfs4")
    assert filesystem_of(tmp_path) == "nfs4"


@pytest.mark.skipif(shutil.which("findmnt") is None, reason="findmnt is not installed")
@pytest.mark.parametrize("place", ["/", "/proc/self", "/dev/pts", "/sys", "."])
def test_the_real_table_says_what_findmnt_says(place: str) -> None:
    command = ["findmnt", "--noheadings", "--first-only", "--output", "FSTYPE", "--target", place]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert filesystem_of(Path(place)) == found.stdout.strip()


HIDING = """
import sys
from pathlib import Path
from subprocess import check_call
from backprompt_db.system.platform import filesystem_of
place = Path(sys.argv[1])
for inner in (place / "a b", place):
    inner.mkdir(exist_ok=True)
    check_call(["mount", "-t", "ramfs" if inner == place else "tmpfs", "none", str(inner)])
    print(filesystem_of(place / "a b" / "db"), flush=True)
"""


def test_real_mounts_that_hide_each_other(tmp_path: Path) -> None:
    apart = ["unshare", "--mount"]
    if subprocess.run([*apart, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not make a mount namespace")
    (tmp_path / "place").mkdir()
    command = [*apart, sys.executable, "-c", HIDING, str(tmp_path / "place")]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert found.stdout.split() == ["tmpfs", "ramfs"]
