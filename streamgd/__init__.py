"""Linear models of tables larger than memory."""

__version__ = "0.1.0"
