"""The one error type whose message is meant for the person at the terminal."""


class UserError(Exception):
    """A problem the user can fix.  The message is one line naming cause and fix; the CLI prints it and exits 2."""
