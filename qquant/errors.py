"""Every error a user can meet, by exit code. Raised where the fact is known, formatted once in `cli`.

A message says what is wrong, where, with which value, and what to do about it.
"""


class QQuantError(Exception):
    """A problem with a known cause; `exit_code` is the process's exit status."""

    exit_code = 1


class UsageError(QQuantError):
    """The command line or the recipe is invalid."""

    exit_code = 2


class GateFailedError(QQuantError):
    """An artifact was built and is worse than its recipe allows."""

    exit_code = 3


class InconclusiveError(QQuantError):
    """A gate could not be decided within its budget."""

    exit_code = 4


class InputError(QQuantError):
    """An input file is corrupt, truncated, unsafe or inconsistent."""

    exit_code = 5


class EnvironmentMissingError(QQuantError):
    """Disk, memory, a GPU or an optional package is missing."""

    exit_code = 6


class ShortMemoryError(EnvironmentMissingError):
    """Memory ran out in the middle of the work; what is finished is kept."""


class NumericalError(QQuantError):
    """NaN or infinity beyond what the recipe allows."""

    exit_code = 7


class PublishError(QQuantError):
    """Publishing failed; nothing half-published is visible."""

    exit_code = 8


class LockedError(QQuantError):
    """Another build is writing to the same output."""

    exit_code = 9


class PartlyPublishedError(QQuantError):
    """What passed is published, and something was refused."""

    exit_code = 10


class StoppedError(QQuantError):
    """Stopped safely by a signal; the same command continues."""

    exit_code = 75
