"""Opening, cropping and flipping of images."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rae.data.transforms import (
    ImageTransform,
    center_crop,
    open_rgb,
    random_crop,
    random_flip,
    resize_shorter,
    to_float,
    to_tensor,
)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reopened(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=form, **options)
    file.seek(0)
    return open_rgb(file)


# --- opening -----------------------------------------------------------------------------------------------------


def test_rgb_is_unchanged():
    image = noise(9, 7)
    assert np.array_equal(reopened(image), image)


def test_transparent_pixels_are_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert list(reopened(image).getdata()) == [(255, 0, 0), (255, 255, 255)]


def test_transparent_palette_entry_is_white():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([0, 0, 255, 9, 9, 9])
    image.putpixel((1, 0), 1)
    assert list(reopened(image, transparency=1).getdata()) == [(0, 0, 255), (255, 255, 255)]


def test_grey_fills_all_colours():
    assert list(reopened(Image.new("L", (1, 1), 77)).getdata()) == [(77, 77, 77)]


def test_sixteen_bit_grey_is_scaled_not_clipped():
    image = Image.fromarray(np.array([[0, 0x1234, 0x80FF, 0xFFFF]], dtype=np.uint16))
    assert [pixel[0] for pixel in reopened(image).getdata()] == [0, 0x12, 0x80, 0xFF]


def test_cmyk_becomes_rgb():
    image = reopened(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    red, green, blue = image.getpixel((4, 4))
    assert red > 250
    assert max(green, blue) < 5


def test_exif_orientation_is_applied():
    image = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    assert np.array_equal(reopened(image, exif=exif), image.transpose(Image.Transpose.ROTATE_270))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    assert set(reopened(frames[0], "GIF", save_all=True, append_images=frames[1:]).getdata()) == {(255, 0, 0)}


def test_unknown_ranges_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        reopened(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "TIFF")
    with pytest.raises(ValueError, match="more than 16 bits"):
        reopened(Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)), "TIFF")


def test_truncated_files_are_refused():
    file = io.BytesIO()
    noise(64, 64).save(file, format="JPEG")
    with pytest.raises(OSError, match="truncated"):
        open_rgb(io.BytesIO(file.getvalue()[:-800]))


# --- cropping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 9), (16, 16), (40, 33), (300, 64)])
def test_center_crop_has_the_size(size):
    assert center_crop(noise(*size), 16).size == (16, 16)


def test_center_crop_without_resizing_is_the_middle():
    image = noise(20, 16)
    assert np.array_equal(center_crop(image, 16), np.array(image)[:, 2:18])


def test_resize_shorter_truncates_the_longer_side():
    assert resize_shorter(noise(7, 11), 16).size == (16, 25)
    assert resize_shorter(noise(11, 7), 16).size == (25, 16)


def test_random_crop_covers_all_positions_evenly():
    image = noise(10, 9)
    pixels = np.array(image)
    for top in range(2):
        for left in range(3):
            crop = random_crop(image, 8, (top + 0.999) / 2, left / 3 + 1e-6)
            assert np.array_equal(crop, pixels[top : top + 8, left : left + 8])
    with pytest.raises(ValueError, match="size 11 is larger than the image, 10×9"):
        random_crop(image, 11, 0, 0)


def test_flip_mirrors_below_one_half():
    image = noise(4, 3)
    assert np.array_equal(random_flip(image, 0.49), np.array(image)[:, ::-1])
    assert random_flip(image, 0.5) is image


# --- the whole ---------------------------------------------------------------------------------------------------


def test_transform_depends_on_its_seed_alone():
    transform = ImageTransform(16, "random_crop", flip=True)
    image = noise(50, 40)
    results = [transform(image, seed) for seed in range(40)]
    assert all(torch.equal(transform(image, seed), result) for seed, result in reversed(list(enumerate(results))))
    assert len({result.numpy().tobytes() for result in results}) > 30
    assert results[0].shape == (3, 16, 16)
    assert results[0].dtype == torch.uint8


def test_flip_does_not_move_the_crop_and_happens_half_of_the_time():
    image = noise(50, 40)
    plain, flipping = ImageTransform(16, flip=False), ImageTransform(16, flip=True)
    flips = 0
    for seed in range(200):
        straight, result = plain(image, seed), flipping(image, seed)
        flips += not torch.equal(straight, result)
        assert torch.equal(result, straight) or torch.equal(result, straight.flip(-1))
    assert 70 < flips < 130


def test_center_crop_mode_is_the_centre_crop():
    image = noise(50, 40)
    assert torch.equal(ImageTransform(16, "center_crop")(image, 3), to_tensor(center_crop(image, 16)))


def test_default_resize_is_that_of_the_paper():
    assert ImageTransform(256).resize == 384
    assert ImageTransform(512).resize == 768


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="mode 'crop' is unknown; choose one of"):
        ImageTransform(16, "crop")
    with pytest.raises(ValueError, match="resize 8 is smaller than image_size 16"):
        ImageTransform(16, resize=8)
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        ImageTransform(0)


def test_to_float():
    assert torch.equal(to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)), torch.tensor([0, 51 / 255, 1]))
    floats = torch.rand(3)
    assert to_float(floats) is floats
    with pytest.raises(TypeError, match=r"torch\.int64"):
        to_float(torch.zeros(1, dtype=torch.int64))
