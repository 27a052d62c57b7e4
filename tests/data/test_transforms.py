"""Opening, cropping and flipping of images."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rae.data.transforms import ImageTransform, flip_of, open_for, random_corner, resize_shorter, resized_crop
from rae.image import center_crop, open_rgb, to_float, to_tensor
from rae.rng import uniform


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


def test_random_crops_cover_all_positions_evenly():
    for top in range(2):
        for left in range(3):
            assert random_corner((10, 9), 8, (top + 0.999) / 2, left / 3 + 1e-6) == (left, top)
    with pytest.raises(ValueError, match="size 11 is larger than the image, 10×9"):
        random_corner((10, 9), 11, 0, 0)


# --- resizing no more than the crop ------------------------------------------------------------------------------


def photo(width, height, seed=0):
    """Smooth colours with some noise, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (max(2, height // 40), max(2, width // 40), 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int64)
    return Image.fromarray(np.clip(smooth + rng.integers(-30, 31, smooth.shape), 0, 255).astype(np.uint8))


SIZES = [
    (500, 375),
    (375, 500),
    (333, 500),
    (64, 64),
    (63, 65),
    (70, 1000),
    (1301, 877),
    (9, 11),
    (1, 3),
    (64, 200),
    (96, 97),
]


@pytest.mark.parametrize("mode", ["center_crop", "random_crop"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", [noise, photo])
def test_fast_pixels_are_within_two_grey_levels(make, size, mode):
    image = make(*size)
    fast, exact = (ImageTransform(64, mode, flip=True, exact=exact) for exact in (False, True))
    for seed in range(6):
        difference = fast(image, seed).int() - exact(image, seed).int()
        assert difference.abs().max() <= 2
        assert difference.abs().double().mean() < 0.1


def test_resized_crop_at_the_edges():
    image = noise(50, 40)
    whole = image.resize((70, 40), Image.Resampling.BICUBIC).resize((70, 60), Image.Resampling.BICUBIC)
    whole = to_tensor(whole).int()
    for left, top in ((0, 0), (6, 0), (0, 44), (54, 44), (30, 20)):
        crop = resized_crop(image, 70, 60, left, top, 16)
        assert (crop.int() - whole[:, top : top + 16, left : left + 16]).abs().max() <= 2


def test_exact_is_pillows_to_the_last_bit():
    image = noise(130, 77)
    assert torch.equal(ImageTransform(16, "center_crop", exact=True)(image, 3), to_tensor(center_crop(image, 16)))
    u_top, u_left, u_flip = uniform([3], (3,))[0].tolist()
    left, top = random_corner((40, 24), 16, u_top, u_left)
    resized = image.resize((40, 24), Image.Resampling.BICUBIC)
    expected = to_tensor(resized.crop((left, top, left + 16, top + 16)))
    assert torch.equal(
        ImageTransform(16, flip=True, exact=True)(image, 3), expected.flip(-1) if u_flip < 0.5 else expected
    )


def test_tall_images_are_resized_rows_first_whatever_pillow_prefers():
    image = noise(10, 100)
    wide = image.resize((8, 100), Image.Resampling.BICUBIC)  # one direction alone leaves Pillow no choice
    assert np.array_equal(resize_shorter(image, 8), wide.resize((8, 80), Image.Resampling.BICUBIC))


def test_fast_decode_reduces_large_jpegs_alone():
    file = io.BytesIO()
    photo(1000, 700).save(file, format="JPEG", quality=95)
    png = io.BytesIO()
    noise(1000, 700).save(png, format="PNG")
    wanted = {16: (125, 88), 100: (250, 175), 200: (500, 350), 400: (1000, 700)}
    for size, expected in wanted.items():
        transform = ImageTransform(size, "center_crop", fast_decode=True)
        assert open_for(transform, io.BytesIO(file.getvalue())).size == expected
        assert open_for(transform, io.BytesIO(png.getvalue())).size == (1000, 700)
        assert open_for(ImageTransform(size, "center_crop"), io.BytesIO(file.getvalue())).size == (1000, 700)
    transform = ImageTransform(100, "random_crop", fast_decode=True)  # of a shorter side of 150
    assert open_for(transform, file).size == (250, 175)


def test_reduced_jpegs_look_the_same():
    file = io.BytesIO()
    photo(1000, 700).save(file, format="JPEG", quality=95)
    fast, whole = (ImageTransform(100, "center_crop", fast_decode=fast) for fast in (True, False))
    difference = fast(open_for(fast, io.BytesIO(file.getvalue())), 0).int() - whole(open_for(whole, file), 0).int()
    assert 0 < difference.abs().double().mean() < 4


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


def test_flip_of_a_seed_is_what_the_transform_does():
    image = noise(50, 40)
    plain, flipping = ImageTransform(16, flip=False), ImageTransform(16, flip=True)
    for seed in range(50):
        assert flip_of(seed) is not torch.equal(plain(image, seed), flipping(image, seed))


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
