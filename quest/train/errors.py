"""The one exception for input that the user can correct."""

from __future__ import annotations


class UserError(ValueError):
    """Input that cannot be used; the message is one line that says what, and what would do.

    The command line prints it and ends with status 2. It is raised before anything is written.
    """
