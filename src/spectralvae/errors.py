"""What can go wrong, by whose hand it is mended.

``assert`` is for our own invariants; these classes are for users.
"""


class SpectralvaeError(Exception):
    """Base class of all errors raised on purpose."""


class UserError(SpectralvaeError):
    """The user can mend it: one line that names file, key, value, limit and remedy; exit code 2."""


class ConfigError(UserError):
    """A key of the config is missing, unknown, or has a value outside its limits."""


class InputError(UserError):
    """A file is missing, damaged, or not what its place in the config asks for."""


class DamagedError(InputError):
    """A file is not what this tool once wrote."""


class RunError(SpectralvaeError):
    """Work that had begun cannot go on (a loss that is not finite, a full disk); exit code 1."""


class PeerError(RunError):
    """Another process of the run failed, and says why on its own stderr."""


class LostPeerError(RunError):
    """Another process of the run is gone, or does not answer: no verdict on the run, which can be started again."""


class NoRoomError(RunError):
    """A disk is full, a quota used up, or a file larger than files may be."""
