"""Errors for users to read: the fault, its place, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class TropdError(Exception):
    """A failure with an explanation. ``exit_code`` is what the command line returns for it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message


class ConfigError(TropdError):
    """The configuration or the command line is wrong; nothing was started."""

    exit_code = 2


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> ConfigError:
    """The refusal of a name that is none of its kind: it names a close one and lists all."""
    names = list(valid)
    return ConfigError(f"unknown {kind} {name!r}", hint=f"{closest(name, names)}one of: {', '.join(names)}")


def closest(name: str, candidates: Sequence[str]) -> str:
    """``did you mean …? ``, if one of the candidates is like the name; else nothing."""
    close = difflib.get_close_matches(name[:100], candidates, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


class DataError(TropdError):
    """An input file (prompts, trajectories) is missing or malformed."""


class DamagedShardError(TropdError):
    """A stored file does not have the content that its manifest promises."""


class FingerprintMismatchError(TropdError):
    """A stage was started with other settings or inputs than the ones given now."""


class StageLockedError(TropdError):
    """Another process is writing the same stage."""


class DiskError(TropdError):
    """The disk failed, refused, or is not writable; finished output is untouched."""


class DiskFullError(DiskError):
    """No room (or no quota) is left for a file."""


class MemoryFullError(TropdError):
    """Main memory, a GPU's memory or the system's threads do not suffice; finished output is untouched."""


class WorkspaceVersionError(TropdError):
    """The workspace was written by a version of tropd with another layout."""


class InterruptedStageError(TropdError):
    """A stage was stopped on request; it can be resumed."""

    exit_code = 130
