"""Airflow provider for moegen."""

__version__ = "0.1.0"
