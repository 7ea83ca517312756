"""What a user can mend, and what he is told of it."""


class UsageError(ValueError):
    """Input that a user can mend: one line saying what, where and what would do. Exit status 2."""
