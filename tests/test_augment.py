"""Area resize against OpenCV's, and the crops of the paper's listings."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_fast._host import area_resize
from dalle_fast.data import augment
from dalle_fast.data.augment import augment_dalle, augment_dvae, center_crop_resize


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose pixels are their coordinates: (row, column, 0)."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], axis=2).astype(np.uint8)


@pytest.fixture
def resized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sides that augmentation resizes to."""
    sides: list[int] = []

    def record(image: np.ndarray, height: int, width: int) -> np.ndarray:
        assert height == width
        sides.append(height)
        return area_resize(image, height, width)

    monkeypatch.setattr(augment, "area_resize", record)
    return sides


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 131), st.integers(1, 131)),
    shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    seed=st.integers(0, 2**32),
)
def test_area_resize_is_opencvs_within_one_level(size, shares, seed) -> None:
    image = noise(*size, seed)
    height, width = (max(1, round(n * share)) for n, share in zip(size, shares, strict=True))
    expected = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    assert np.abs(area_resize(image, height, width).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("size", "out"), [((1001, 777), (256, 255)), ((333, 500), (332, 499)), ((97, 640), (7, 101))])
def test_area_resize_of_photo_sizes(size, out) -> None:
    image = noise(*size)
    expected = cv2.resize(image, out[::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(area_resize(image, *out).astype(int) - expected).max() <= 1


def test_area_resize_by_hand() -> None:
    """3 pixels to 2: each output is one pixel and half of the middle one. 2 to 4: linear between pixel centres."""
    row = np.array([0, 90, 240], dtype=np.uint8).reshape(1, 3, 1)
    assert area_resize(row, 1, 2).ravel().tolist() == [30, 190]
    row = np.array([0, 100], dtype=np.uint8).reshape(1, 2, 1)
    assert area_resize(row, 1, 4).ravel().tolist() == [0, 25, 75, 100]
    assert area_resize(row, 2, 2).tolist() == [row[0].tolist()] * 2


def test_area_resize_takes_any_strides() -> None:
    image = noise(40, 30)
    for view in (image[:, ::-1], image[3:20:2, 1:], image.transpose(1, 0, 2)):
        assert np.array_equal(area_resize(view, 11, 13), area_resize(np.ascontiguousarray(view), 11, 13))


def test_area_resize_refuses_other_input() -> None:
    with pytest.raises(TypeError, match="image: expected dtype uint8, got float32"):
        area_resize(np.zeros((4, 4, 3), np.float32), 2, 2)
    for shape in ((4, 4), (0, 4, 3)):
        with pytest.raises(ValueError, match="image: expected"):
            area_resize(np.zeros(shape, np.uint8), 2, 2)
    with pytest.raises(ValueError, match="height and width: expected 1 or more, got 0 and 2"):
        area_resize(noise(4, 4), 0, 2)


def test_listing_1_resizes_to_nine_to_twelve_eighths(resized: list[int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert augment_dvae(noise(100, 70), 32, rng).shape == (32, 32, 3)
    assert (min(resized), max(resized)) == (36, 48)


def test_listing_2_resizes_to_eight_to_nine_eighths(resized: list[int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert augment_dalle(noise(100, 70), 32, rng).shape == (32, 32, 3)
    assert (min(resized), max(resized)) == (32, 36)


@pytest.mark.parametrize("side", [33, 35, 40])
def test_the_short_side_bounds_the_resize(resized: list[int], side: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        augment_dvae(noise(side, 90), 32, rng)
        augment_dalle(noise(side, 90), 32, rng)
    assert all(32 <= t < side for t in resized)


def test_crops_of_listing_1_are_anywhere_and_flip_half_of_the_time() -> None:
    """32 x 50 with size 32: nothing to resize, so the columns tell where the crop was."""
    rng = np.random.default_rng(0)
    results = [augment_dvae(coordinates(32, 50), 32, rng) for _ in range(400)]
    assert all(np.array_equal(result[:, 0, 0], np.arange(32)) for result in results)
    lefts = {int(result[0, :, 1].min()) for result in results}
    assert lefts == set(range(19))
    flipped = sum(bool(result[0, 0, 1] > result[0, 1, 1]) for result in results)
    assert 160 <= flipped <= 240


@pytest.mark.parametrize(("slack", "expected"), [(16, range(6, 10)), (1, {0}), (2, {0}), (3, {1}), (8, {3, 4})])
def test_crops_of_listing_2_are_near_the_centre_and_never_flip(slack: int, expected) -> None:
    """The offset is an integer in [3/8, 5/8) of the slack, 3/8 itself where that is empty."""
    rng = np.random.default_rng(0)
    results = [augment_dalle(coordinates(32 + slack, 32), 32, rng) for _ in range(200)]
    assert all(np.array_equal(result[0, :, 1], np.arange(32)) for result in results)
    assert {int(result[0, 0, 0]) for result in results} == set(expected)


def test_an_image_of_the_right_size_is_left_as_it_is(resized: list[int]) -> None:
    image = noise(32, 32)
    rng = np.random.default_rng(0)
    assert np.array_equal(augment_dalle(image, 32, rng), image)
    assert np.array_equal(center_crop_resize(image, 32), image)
    for _ in range(10):
        result = augment_dvae(image, 32, rng)
        assert np.array_equal(result, image) or np.array_equal(result, image[:, ::-1])
    assert resized == []


@pytest.mark.parametrize("shape", [(1, 1), (20, 31), (31, 300), (5, 33)])
def test_small_images_are_enlarged(shape) -> None:
    rng = np.random.default_rng(0)
    image = np.full((*shape, 3), 77, np.uint8)
    for result in (augment_dvae(image, 32, rng), augment_dalle(image, 32, rng), center_crop_resize(image, 32)):
        assert result.shape == (32, 32, 3)
        assert (result == 77).all()


def test_center_crop() -> None:
    result = center_crop_resize(coordinates(32, 43), 32)
    assert result[0, 0].tolist() == [0, 5, 0]
    assert result[-1, -1].tolist() == [31, 36, 0]


def test_the_same_generator_gives_the_same_crop() -> None:
    image = noise(90, 120)
    for listing in (augment_dvae, augment_dalle):
        first, second = (listing(image, 32, np.random.default_rng((1, 2))) for _ in range(2))
        assert np.array_equal(first, second)
        assert first.flags.c_contiguous


def test_augmentation_refuses_other_input() -> None:
    with pytest.raises(ValueError, match="image: expected uint8"):
        augment_dvae(np.zeros((40, 40, 4), np.uint8), 32, np.random.default_rng(0))
    with pytest.raises(ValueError, match="size: expected 1 or more, got 0"):
        center_crop_resize(noise(40, 40), 0)
