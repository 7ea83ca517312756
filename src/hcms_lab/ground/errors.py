"""What a user can mend, and what he is told of it."""

import errno

# Of an OSError: there is no room, or no leave, to write.
STORAGE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})


class UsageError(ValueError):
    """Input that a user can mend: one line saying what, where and what would do. Exit status 2."""


def one_line(error: UsageError) -> str:
    """What is printed of it: a line, whatever characters the input had."""
    return "error: " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))


def storage_line(error: OSError) -> str:
    """Which file could not be written, where that is known, and why."""
    return ": ".join(str(x) for x in (error.filename, error.strerror) if x)
