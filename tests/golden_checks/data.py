"""Golden checks of the image transforms."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rae.data.transforms import resize_shorter
from rae.image import center_crop
from tests.golden_checks import Case, Check


def check_center_crop(case: Case) -> dict[str, Tensor]:
    """Centre crop and resize of every input image."""
    computed = {}
    for key, values in case.inputs.items():
        image = Image.fromarray(values.numpy().astype(np.uint8))
        size = key.removeprefix("image_")
        for name, result in (
            ("crop", center_crop(image, case.config["crop_size"])),
            ("resize", resize_shorter(image, case.config["resize_shorter_side"])),
        ):
            computed[f"outputs/{name}_{size}"] = torch.from_numpy(np.array(result)).float()
    return computed


CHECKS: dict[str, Check] = {"center_crop": check_center_crop}
