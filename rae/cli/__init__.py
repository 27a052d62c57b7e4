"""Command-line programs, and the composition and instantiation of configurations that they share with notebooks."""

from rae.cli.build import Parts, build
from rae.cli.config import ConfigError, compose
from rae.cli.models import load

__all__ = ["ConfigError", "Parts", "build", "compose", "load"]
