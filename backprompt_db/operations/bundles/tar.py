"""A tar file as a stream of plain members: regular files with short names, and nothing else that tar can express.

Headers are made and read by `tarfile`. The stream is walked here, because `tarfile.TarFile` keeps every member in
memory, obeys extension headers of any size, and takes a damaged header for the end of the archive.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

from backprompt_db.errors import FormatError

MAX_MEMBER_NBYTES = (1 << 33) - 1
"""The largest size that the eleven octal digits of a header can express."""

_BLOCK_NBYTES = tarfile.BLOCKSIZE
_PIECE_NBYTES = 1 << 20
"""How much is read at a time: memory is allocated for what has arrived, not for what a member claims to hold."""
_MAX_PADDING_NBYTES = 1 << 20
"""How many zeros may follow the end: writers of tar files fill whole records."""


class Member(NamedTuple):
    """The header of one file."""

    name: str
    nbytes: int


def write_member(stream: BinaryIO, name: str, pieces: Sequence[bytes | memoryview], *, made_at: float) -> None:
    """Write one file whose content is given in pieces. The name has at most 100 ASCII characters."""
    header = tarfile.TarInfo(name)
    header.size = sum(memoryview(piece).nbytes for piece in pieces)
    header.mtime = int(made_at)
    header.mode = 0o600
    for piece in (header.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"), *pieces, bytes(-header.size % _BLOCK_NBYTES)):
        _write(stream, piece)


def write_end(stream: BinaryIO) -> None:
    """Write the zeros that end an archive."""
    _write(stream, bytes(2 * _BLOCK_NBYTES))


def _write(stream: BinaryIO, piece: bytes | memoryview) -> None:
    remaining = memoryview(piece).cast("B")
    while remaining:  # an unbuffered stream writes what it can
        remaining = remaining[stream.write(remaining) :]


class ArchiveReader:
    """Reads the members of an archive, one after the other and each of them entirely.

    Every method raises `FormatError`, for anything but a plain file of an allowed size, and for an early end.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._remaining = 0
        self._padding = 0

    def next(self, *, max_nbytes: int = MAX_MEMBER_NBYTES) -> Member:
        """Return the header of the next member; the one before it must have been read."""
        self._end_member()
        block = bytes(self._take(_BLOCK_NBYTES, bytearray()))
        if not any(block):
            raise ended_early()
        header = _header(block)
        if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or header.linkname:
            raise malformed(f"{header.name!r} is not a regular file")
        if not 0 <= header.size <= max_nbytes:
            raise malformed(f"{header.name!r} claims {header.size:,} bytes, where {max_nbytes:,} are allowed")
        self._remaining, self._padding = header.size, -header.size % _BLOCK_NBYTES
        return Member(header.name, header.size)

    def read(self, nbytes: int, *, into: bytearray | None = None) -> bytearray:
        """Return the next bytes of the member, appended to `into` if that is given."""
        if nbytes > self._remaining:
            raise malformed("a file is shorter than what it begins with says")
        self._remaining -= nbytes
        return self._take(nbytes, bytearray() if into is None else into)

    def finish(self) -> None:
        """Check that nothing but zeros follows the last member."""
        self._end_member()
        num_read = 0
        while piece := self._stream.read(_BLOCK_NBYTES):
            num_read += len(piece)
            if any(piece) or num_read > _MAX_PADDING_NBYTES:
                raise malformed("something follows its end")

    def _end_member(self) -> None:
        if self._remaining or any(self._take(self._padding, bytearray())):
            raise malformed("a file is longer than what it holds")
        self._padding = 0

    def _take(self, nbytes: int, taken: bytearray) -> bytearray:
        goal = len(taken) + nbytes
        while len(taken) < goal:
            piece = self._stream.read(min(goal - len(taken), _PIECE_NBYTES))
            if not piece:
                raise ended_early()
            taken += piece
        return taken


def _header(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise malformed(f"the header of a file is damaged ({error})") from None


def malformed(reason: str) -> FormatError:
    """Return the error for a bundle that breaks a rule of its format."""
    return FormatError(
        f"this is not a valid bundle: {reason}",
        hint="Nothing from there on was stored. Export it again; import only bundles of people whom you trust.",
    )


def ended_early() -> FormatError:
    """Return the error for a bundle whose end is missing."""
    return FormatError(
        "the bundle ends early: something of it is missing",
        hint="Get the whole file and import it again; what came is kept and is not stored twice.",
    )
