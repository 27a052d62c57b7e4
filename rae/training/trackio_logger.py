"""Trackio: curves and pictures in a local database, with their own dashboard, ``trackio show``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from rae.io.errors import ConfigError


class TrackioLogger(Logger):
    """One run of a Trackio project; a resumed run continues under the same name.

    Args:
        project: The project's name.
        name: The run's name.
        space_id: ``owner/name`` of a Space to which the curves are also sent; with None, nothing leaves the machine.

    Raises:
        ConfigError: Trackio is not installed.
    """

    def __init__(self, project: str, name: str, space_id: str | None = None) -> None:
        super().__init__()
        try:
            self._trackio: Any = importlib.import_module("trackio")  # optional dependency
        except ImportError as error:
            raise ConfigError(
                'logger=trackio needs Trackio, which is not installed: pip install "rae[trackio]"'
            ) from error
        self._options = {"project": project, "name": name, "space_id": space_id, "resume": "allow", "embed": False}
        self._run: Any = None

    @property
    def name(self) -> str:
        """The project's name."""
        return str(self._options["project"])

    @property
    def version(self) -> str:
        """The run's name."""
        return str(self._options["name"])

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Trackio's run, opened on first use."""
        if self._run is None:
            self._run = self._trackio.init(**self._options)
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the run's folder holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs numbers by name, at a step."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Logs the first of several PIL images, at a step; Trackio takes one per name."""
        self.experiment.log({key: self._trackio.Image(images[0])}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes any remaining data."""
        if self._run is not None:
            self._run.finish()
            self._run = None
