"""Every error that backprompt-db raises on purpose, and the one base that catches them all.

```
BackpromptError
├── StoreError
│   ├── StoreClosed
│   ├── StoreFull
│   ├── StoreReadOnly
│   ├── StoreCorrupt
│   ├── StoreLocked
│   └── UnsafeLocation
├── FormatError
│   ├── BlobFormat
│   └── FormatTooNew
├── CatalogError
│   └── CatalogTooNew
├── ComputeError
│   ├── UnsupportedModel
│   ├── ContextLengthExceeded
│   └── ModelMismatch
└── PromptError (also a ValueError)
    └── InvalidText
```

A miss is never an error: it is `None`.
"""

from __future__ import annotations


class BackpromptError(Exception):
    """What went wrong, with a one-line hint that says what to do now.

    `str(error)` is the message followed by the hint; `error.message` and `error.hint` are its two halves.
    """

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # The default rebuilds from positional arguments alone, and `hint` is keyword-only.
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(kind: type[BackpromptError], message: str, hint: str) -> BackpromptError:
    return kind(message, hint=hint)


class StoreError(BackpromptError):
    """The store could not do what it was asked."""


class StoreClosed(StoreError):
    """The store, or the database around it, was closed before this call."""


class StoreFull(StoreError):
    """The disk, the quota or the memory map has no room for another part."""


class StoreReadOnly(StoreError):
    """A write was asked of a store that this user or this handle may only read."""


class StoreCorrupt(StoreError):
    """The store's own structure is damaged; single damaged parts are misses, not errors."""


class StoreLocked(StoreError):
    """Another process or thread holds what this call needs, for longer than it may wait."""


class UnsafeLocation(StoreError):
    """The directory is not one that a database can live in: a file, somebody else's, a network filesystem."""


class FormatError(BackpromptError):
    """Bytes do not have the form that their format version prescribes."""


class BlobFormat(FormatError):
    """One stored blob is not what its format prescribes."""


class FormatTooNew(FormatError):
    """The directory was written by a newer version of backprompt-db."""


class CatalogError(BackpromptError):
    """The catalog could not be read or written. No hit depends on it."""


class CatalogTooNew(CatalogError):
    """The catalog's schema is newer than this version of backprompt-db."""


class ComputeError(BackpromptError):
    """A representation could not be computed."""


class UnsupportedModel(ComputeError):
    """This model's representations cannot be cached and stay right; the message says why."""


class ContextLengthExceeded(ComputeError):
    """The prompt needs more positions than the model has."""


class ModelMismatch(ComputeError):
    """The model is not the one that it was taken for, or cannot be identified."""


class PromptError(BackpromptError, ValueError):
    """The prompt itself cannot be run."""


class InvalidText(PromptError):
    """A piece of text cannot be addressed: not a string, or not encodable as UTF-8."""
