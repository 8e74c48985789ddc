"""The version of the package, alone so that nothing needs importing to read it."""

__version__ = "0.1.0"
