"""Helpers for cross-silo federated learning; import from the files, not from here."""

__version__ = "0.1.0"
