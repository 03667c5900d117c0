"""The one place that states the version: setup.py, CMake and the package read it from here."""

__version__ = "0.1.0.dev0"
