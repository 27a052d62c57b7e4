"""The judge of generated scenes: it knows the pictograms as rendered, and nothing that the models learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae.data.pictures import BACKGROUNDS, PicturesDataset, places, read_caption, sprite, things

_REACH = 2  # search range around a thing's place, in pixels


class PictureScores:
    """Whether samples show what their prompts say: both things, each in its place, and the background's colour.

    In each quarter of the picture, the judge picks the thing whose rendered picture, on the detected background colour and
    shifted by up to two pixels, has the smallest squared distance; "nothing" is one choice. Two quarters must hold the prompt's
    things in its relation, the other two nothing. The background is the colour nearest to the median of the edge.

    Args:
        image_size: Side of the samples, in pixels.
        real: Number of real scenes of held-out triples on which the judge itself is tested.
    """

    takes_originals = False
    takes_prompts = True

    def __init__(self, image_size: int = 48, real: int = 200) -> None:
        self.image_size = image_size
        self.real = real
        self.names = [*things(), ""]
        size = image_size // 2
        sprites = [*(sprite(name, size) for name in things()), np.zeros((size, size, 4), np.uint8)]
        self._sprites = torch.from_numpy(np.stack(sprites)).float()
        self._colours = torch.tensor(list(BACKGROUNDS.values())).float()
        self.reset()

    def reset(self) -> None:
        """Discards all samples."""
        self._found: list[dict[str, bool]] = []

    def update(
        self, images: Tensor, labels: Any = None, index: Tensor | None = None, prompts: Sequence[str] | None = None
    ) -> None:
        """Adds samples uint8 B×3×H×W, H = W = ``image_size``, with their prompts.

        Raises:
            ValueError: The images have a wrong type or shape, or a prompt is missing or not a caption of a scene.
        """
        side = self.image_size
        if prompts is None:
            raise ValueError(
                "samples without prompts cannot be judged: give what rae-sample prompts=… wrote, or a model"
            )
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"images must be uint8 B×3×{side}×{side}, got {images.dtype} {tuple(images.shape)}")
        for image, prompt in zip(images.cpu(), prompts, strict=True):
            scene = read_caption(prompt)
            quarters, background = self.look(image.permute(1, 2, 0).float())
            seen = {name for row in quarters for name in row} - {""}
            self._found.append(
                {
                    "held_out": scene.held_out,
                    "things": seen == {scene.first, scene.second},
                    "right": self.read(quarters, scene.relation) == (scene.first, scene.second),
                    "background": background == scene.background,
                }
            )

    def look(self, image: Tensor) -> tuple[list[list[str]], str]:
        """What a picture H×W×3 shows: the thing in each quarter, row by row ("" for none), and the background."""
        edge = torch.cat([image[0], image[-1], image[:, 0], image[:, -1]])
        colour = edge.median(0).values
        background = list(BACKGROUNDS)[int((self._colours - colour).square().sum(1).argmin())]
        alpha = self._sprites[..., 3:] / 255
        wanted = (alpha * self._sprites[..., :3] + (1 - alpha) * colour).flatten(1)  # things × values
        return [[self._thing(image, wanted, row, column) for column in (0, 1)] for row in (0, 1)], background

    def _thing(self, image: Tensor, wanted: Tensor, row: int, column: int) -> str:
        """Name of the thing in a quarter."""
        size, moves = self.image_size // 2, range(-_REACH, _REACH + 1)
        corners = {
            tuple(min(max(place * size + move, 0), size) for place, move in ((row, dy), (column, dx)))
            for dy in moves
            for dx in moves
        }
        seen = torch.stack([image[top : top + size, left : left + size] for top, left in corners]).flatten(1)
        return self.names[int(torch.cdist(wanted, seen).amin(1).argmin())]

    @staticmethod
    def read(quarters: Sequence[Sequence[str]], relation: str) -> tuple[str, str] | None:
        """The two things in the given relation; None if there are none, or if there are others too."""
        for lane in (0, 1):
            pair = [quarters[row][column] for row, column in places(relation, lane)]
            others = [quarters[row][column] for row, column in places(relation, 1 - lane)]
            if all(pair) and not any(others):
                return pair[0], pair[1]
        return None

    def compute(self) -> dict[str, float]:
        """Fractions of correct samples: of all, and of those whose triple was held out from training or was not.

        Returns:
            ``right`` (both things, each in its place), ``things`` (both, in any place), ``background``; the first also as
            ``right_held_out`` and ``right_trained``; ``judge`` (the judge's accuracy on real scenes), and ``samples``.

        Raises:
            ValueError: No samples were added.
        """
        if not self._found:
            raise ValueError("no sample was given to the scores; call update first")

        def share(key: str, rows: Sequence[dict[str, bool]]) -> float:
            return sum(row[key] for row in rows) / len(rows) if rows else float("nan")

        held = [row for row in self._found if row["held_out"]]
        trained = [row for row in self._found if not row["held_out"]]
        scores = {key: share(key, self._found) for key in ("right", "things", "background")}
        scores |= {"right_held_out": share("right", held), "right_trained": share("right", trained)}
        return {**scores, "judge": self._of_real(), "samples": float(len(self._found))}

    def _of_real(self) -> float:
        """Fraction of real scenes that the judge reads correctly."""
        scenes = PicturesDataset(self.real, self.image_size, True, 1)
        right = 0
        for number in range(self.real):
            scene, image = scenes.scene(number), scenes[number]["image"]
            quarters, background = self.look(image.permute(1, 2, 0).float())
            found = self.read(quarters, scene.relation)
            right += found == (scene.first, scene.second) and background == scene.background
        return right / self.real
