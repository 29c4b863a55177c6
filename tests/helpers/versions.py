"""The versions that the tests run on, for tests of what only some versions can do."""

import importlib.metadata


def release(package):
    """(major, minor) of an installed package."""
    return tuple(int(part) for part in importlib.metadata.version(package).split("+")[0].split(".")[:2])
