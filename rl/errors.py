"""The errors whose messages are meant for the person at the terminal."""


class UserError(Exception):
    """A problem the user can fix.  The message is one line naming cause and fix; the CLI prints it and exits 2."""


class Diverged(Exception):
    """A run was stopped because its losses or gradients were not finite any more.  One line; the CLI exits 3."""
