"""What a user can mend, and what he is told of it."""

import errno

# Of an OSError: there is no room, or no leave, to write.
STORAGE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})


class UsageError(ValueError):
    """Input that a user can mend: one line saying what, where and what would do. Exit status 2."""
