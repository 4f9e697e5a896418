"""The version, written once: the build, the plans and ``pyrobc doctor`` read it here."""

__version__ = "0.1.0"
