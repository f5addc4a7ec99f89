"""What must stay as it is in a database that is only read."""

from __future__ import annotations

from pathlib import Path


def snapshot(place: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file, but of the lock that readers take too."""
    files = [path for path in place.rglob("*") if path.is_file() and path.name != "lock.mdb"]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
