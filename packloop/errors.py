"""The errors a user can cause, each with the exit code the command line gives it."""


class InputError(ValueError):
    """Something the user gave cannot be used: one line with what, given, needed, remedy. Exit code 1.

    Of this class itself: what settings and options name, such as rows, a model's files, a GPU, the Hub or a disk.
    """

    exit_code = 1


class ConfigError(InputError):
    """What was written has to change: a setting, an option or the name of something that is not there. Exit code 2."""

    exit_code = 2


class OutOfMemoryError(InputError):
    """The device's memory did not suffice; the message says where it went. Exit code 3."""

    exit_code = 3
