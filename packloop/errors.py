"""The errors a user can cause, each with the exit code the command line gives it."""


class InputError(ValueError):
    """Something the user gave cannot be used: one line with what, given, needed, remedy. Exit code 1."""

    exit_code = 1


class ConfigError(InputError):
    """A setting is unknown, of the wrong type or at odds with another. Exit code 2."""

    exit_code = 2


class OutOfMemoryError(InputError):
    """The device's memory did not suffice; the message says where it went. Exit code 3."""

    exit_code = 3
