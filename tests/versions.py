"""Which versions the tests run on, for what only some of them can do."""

import importlib.metadata


def release(package):
    """(major, minor) of an installed package."""
    return tuple(int(part) for part in importlib.metadata.version(package).split("+")[0].split(".")[:2])
