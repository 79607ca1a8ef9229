"""The run: what is trained, and how a step happens."""

__version__ = "0.1.0"
