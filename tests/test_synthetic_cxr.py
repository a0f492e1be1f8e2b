"""Made-up radiographs: what their seed, scanner and class say, and nothing else."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_helpers.synthetic_cxr import (
    CLASSES,
    SCANNERS,
    Scanner,
    apply_scanner,
    class_mix,
    scanner_for,
    synthetic_cxr,
)

ROOT = Path(__file__).resolve().parents[1]
CARDS = (ROOT / "data" / "README.md").read_text(encoding="utf-8")


def test_same_seed_same_radiographs_whatever_the_threads_and_global_state():
    first = synthetic_cxr([60, 30], heterogeneity=1, seed=4)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        again = synthetic_cxr([60, 30], heterogeneity=1, seed=4)
    finally:
        torch.set_num_threads(1)
    np.testing.assert_array_equal(first.x, again.x)
    np.testing.assert_array_equal(first.y, again.y)
    assert torch.equal(before, torch.get_rng_state())  # no global generator is used


def test_another_seed_other_patients():
    a, b = (synthetic_cxr([40], seed=s) for s in (0, 1))
    assert not (a.x == b.x).all(axis=(1, 2)).any()
    assert not np.array_equal(a.y, b.y)


@pytest.mark.parametrize(
    "others",
    [{}, {"Hospital A": 5}, {"Hospital A": 9, "Hospital C": 4}, {"Elsewhere": 3}],
)
def test_a_hospital_does_not_depend_on_the_others(others):
    alone = synthetic_cxr({"Hospital B": 20}, heterogeneity=1)
    among = synthetic_cxr({**others, "Hospital B": 20}, heterogeneity=1)
    mine = among.site == "Hospital B"
    np.testing.assert_array_equal(among.x[mine], alone.x)
    np.testing.assert_array_equal(among.y[mine], alone.y)


def test_hospitals_have_different_patients():
    arrays = synthetic_cxr([30, 30], heterogeneity=0)  # same scanner, same mix
    a, b = (arrays.x[arrays.site == s] for s in ("Hospital A", "Hospital B"))
    assert not (a == b).all(axis=(1, 2)).any()


def test_sizes_give_names_and_numbers():
    arrays = synthetic_cxr([2] * 27 + [3], image_size=16)
    names, counts = np.unique(arrays.site, return_counts=True)
    assert dict(zip(names, counts, strict=True))["Hospital AB"] == 3
    assert {"Hospital A", "Hospital Z", "Hospital AA"} < set(names)
    assert len(arrays) == 2 * 27 + 3
    named = synthetic_cxr({"North": 3, "South": 2}, image_size=16)
    assert named.site.tolist() == ["North"] * 3 + ["South"] * 2


def test_a_name_of_your_own_takes_the_scanner_of_its_place():
    sizes = {"North": 150, "South": 150}  # South: preset 1, the dark digitised film
    north, south = np.split(synthetic_cxr(sizes, heterogeneity=1).x, 2)
    assert south.mean() < north.mean() - 20


def test_class_counts_at_full_shift_follow_the_hospitals_mix():
    arrays = synthetic_cxr({"Hospital B": 50, "Hospital C": 100}, heterogeneity=1)
    by_site = {s: np.bincount(arrays.y[arrays.site == s]) for s in set(arrays.site)}
    assert by_site["Hospital B"].tolist() == [35, 10, 5]  # 50 * (.70, .20, .10)
    assert by_site["Hospital C"].tolist() == [15, 70, 15]  # 100 * (.15, .70, .15)
    nine = synthetic_cxr({"Hospital D": 9}, heterogeneity=1)  # 1.8, 1.35, 5.85
    assert np.bincount(nine.y).tolist() == [2, 1, 6]  # the largest remainders go up


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 40),
    index=st.integers(0, 7),
    strength=st.floats(0, 1),
    classes=st.permutations(CLASSES).flatmap(
        lambda names: st.integers(1, 4).map(lambda k: tuple(names[:k]))
    ),
)
def test_class_counts_are_exact_to_one_image(count, index, strength, classes):
    name = f"Hospital {'ABCDEFGH'[index]}"
    arrays = synthetic_cxr(
        {name: count}, heterogeneity=strength, image_size=16, classes=classes
    )
    counts = np.bincount(arrays.y, minlength=len(classes))
    assert counts.sum() == count
    assert np.abs(counts - count * class_mix(index, strength, classes)).max() < 1


def test_rows_are_shuffled_within_a_hospital():
    y = synthetic_cxr([90]).y
    assert (np.diff(y) != 0).sum() > 30  # sorted labels would change twice only


def test_heterogeneity_skews_the_class_mix_more_and_more():
    def skew(strength):
        arrays = synthetic_cxr([200] * 6, heterogeneity=strength, image_size=16)
        shares = [
            np.bincount(arrays.y[arrays.site == s]) / 200 for s in set(arrays.site)
        ]
        return np.abs(np.array(shares) - 1 / 3).sum(axis=1).mean()

    skews = [skew(h) for h in (0, 0.25, 0.5, 0.75, 1)]
    assert skews[0] < 0.02  # 200 images in 3 classes: 67 + 67 + 66
    assert (np.diff(skews) > 0.05).all()


def test_heterogeneity_moves_the_scanners_further_apart():
    def distance(strength):
        """Mean gap between each hospital's pixel quantiles and those of hospital A."""
        sizes, options = [150] * 8, {"prevalence_shift": 0.0}
        arrays = synthetic_cxr(sizes, heterogeneity=strength, **options)
        levels = np.linspace(0.02, 0.98, 25)
        q = [np.quantile(x, levels) for x in np.split(arrays.x, 8)]
        return np.abs(np.array(q[1:]) - q[0]).mean()

    distances = [distance(h) for h in (0, 0.25, 0.5, 0.75, 1)]
    assert distances[0] < 4
    assert (np.diff(distances) > 2).all()


def test_the_two_shifts_can_be_set_apart():
    neutral = synthetic_cxr({"Hospital D": 60}, heterogeneity=0)
    both_off = synthetic_cxr(
        {"Hospital D": 60}, heterogeneity=1, scanner_shift=0, prevalence_shift=0
    )
    np.testing.assert_array_equal(neutral.x, both_off.x)
    scanner_only = synthetic_cxr({"Hospital D": 60}, heterogeneity=0, scanner_shift=1)
    np.testing.assert_array_equal(neutral.y, scanner_only.y)
    assert not np.array_equal(neutral.x, scanner_only.x)
    mix_only = synthetic_cxr({"Hospital D": 60}, heterogeneity=0, prevalence_shift=1)
    assert np.bincount(mix_only.y).tolist() == [12, 9, 39]  # 60 * (.20, .15, .65)


@pytest.mark.parametrize("size", [16, 33, 64])
def test_images_are_uint8_of_the_size_asked_and_use_the_grey_scale(size):
    arrays = synthetic_cxr([12] * 8, heterogeneity=1, image_size=size, classes=CLASSES)
    assert (arrays.x.shape, arrays.x.dtype) == ((96, size, size), np.uint8)
    assert (arrays.y.dtype, arrays.classes) == (np.int64, CLASSES)
    spread = arrays.x.reshape(96, -1).std(axis=1)
    assert spread.min() > 15  # nowhere blank
    assert arrays.x.min() < 10 and arrays.x.max() > 245


def test_findings_show_where_a_radiologist_looks_for_them():
    def mean_image(name):
        sizes = {"Hospital A": 300}
        return synthetic_cxr(sizes, heterogeneity=0, classes=[name], seed=2).x.mean(0)

    normal, pneumonia, effusion, heart = map(mean_image, CLASSES)
    base_of_lungs = np.s_[19:23, [4, 5, 26, 27]]  # above the lateral diaphragm
    assert (effusion - normal)[base_of_lungs].mean() > 15
    assert (effusion - normal)[4:10].mean() < 5
    mid_lungs = np.s_[10:20, [6, 7, 8, 9, 22, 23, 24, 25]]
    assert (pneumonia - normal)[mid_lungs].mean() > 4
    left_of_midline = np.s_[12:20, 20:25]  # the patient's left: right in the image
    assert (heart - normal)[left_of_midline].mean() > 25


def test_an_easy_rule_does_not_solve_the_task():
    arrays = synthetic_cxr([900], heterogeneity=0, seed=5)
    train, test = slice(0, 600), slice(600, 900)
    centres = [arrays.x[train][arrays.y[train] == k].mean(0) for k in range(3)]
    gaps = [((arrays.x[test] - c) ** 2).sum((1, 2)) for c in centres]
    accuracy = (np.argmin(gaps, axis=0) == arrays.y[test]).mean()
    assert 0.38 < accuracy < 0.75  # there is a signal, and it is not in the mean image


def test_scanner_presets_are_reached_step_by_step():
    assert scanner_for(5, 0) == Scanner(marker_corner=SCANNERS[5].marker_corner)
    assert scanner_for(4, 1) == SCANNERS[4] == scanner_for(12, 1)  # repeats after eight
    assert scanner_for(1, 0.5).gamma == pytest.approx((1 + 1.6) / 2)


def grey_images(level=128, count=20, size=32):
    return np.full((count, size, size), level, np.uint8)


def test_apply_scanner_leaves_its_input_and_follows_its_seed():
    images = synthetic_cxr([70], heterogeneity=0).x
    original = images.copy()
    out = [apply_scanner(images, SCANNERS[4], seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(images, original)
    np.testing.assert_array_equal(out[0], out[1])
    assert not np.array_equal(out[0], out[2])
    assert (out[0].shape, out[0].dtype) == (images.shape, np.uint8)


def test_apply_scanner_keeps_the_picture_and_changes_it_more_at_full_strength():
    images = synthetic_cxr([200], heterogeneity=0).x
    quantiles = np.linspace(0.05, 0.95, 19)

    def shift(strength):
        out = apply_scanner(images, scanner_for(1, strength), seed=0)
        gap = np.quantile(out, quantiles) - np.quantile(images, quantiles)
        return np.abs(gap).mean(), np.corrcoef(out.ravel(), images.ravel())[0, 1]

    shifts, alike = zip(*(shift(s) for s in (0, 0.5, 1)), strict=True)
    assert shifts[0] < 8 and (np.diff(shifts) > 8).all()
    assert alike[0] > 0.85 and alike[2] > 0.5


def test_each_scanner_setting_does_what_it_says():
    def mean(images=None, **setting):
        given = grey_images() if images is None else images
        return apply_scanner(given, Scanner(**setting), seed=3).astype(float)

    plain = mean()
    assert mean(gamma=2.0).mean() < plain.mean() - 40
    assert mean(brightness=0.2).mean() - plain.mean() == pytest.approx(51, abs=3)
    bright = grey_images(level=180)
    assert mean(bright, contrast=0.5).mean() < mean(bright).mean() - 20
    assert mean(noise=0.1).std(axis=(1, 2)).mean() == pytest.approx(25.5, abs=3)
    vignetted = mean(vignette=0.5)
    assert vignetted[:, 0, 0].mean() < vignetted[:, 16, 16].mean() - 40
    assert mean(bright, inverted=1.0).mean() < 90
    framed = mean(collimator=0.2)
    assert framed[:, 0].max() == 0 and framed[:, 16, 16].min() > 60


@pytest.mark.parametrize("corner", range(4))
def test_marker_is_burned_into_its_corner_only(corner):
    scanner = Scanner(marker=0.5, marker_corner=corner)
    images = apply_scanner(grey_images(count=200), scanner, seed=3)
    quarters = [images[:, r : r + 16, c : c + 16] for r in (0, 16) for c in (0, 16)]
    marked = [(quarter.max(axis=(1, 2)) > 240).mean() for quarter in quarters]
    assert marked.pop(corner) == pytest.approx(0.5, abs=0.12)  # about half of 200
    assert marked == [0, 0, 0]


def test_blur_tilt_zoom_and_shift_move_the_pixels():
    spot = grey_images(level=0, count=60)
    spot[:, 4:8, 14:18] = 255  # a light above the centre
    still = Scanner(noise=0.0)
    centre = apply_scanner(spot, still, 0).mean(0)

    def position(**setting):
        image = apply_scanner(spot, Scanner(noise=0.0, **setting), 0).mean(0)
        image = image - image.min()
        grid = np.mgrid[:32, :32]
        return (grid * image).sum(axis=(1, 2)) / image.sum()

    down, right = position()
    assert position(shift=0.2)[0] == pytest.approx(down + 3.2, abs=0.6)  # .2 * 16 px
    assert position(zoom=0.7)[0] > down + 2  # wider field: nearer to the centre
    assert position(tilt=20)[1] != pytest.approx(right, abs=1)
    assert apply_scanner(spot, Scanner(noise=0.0, blur=3.0), 0).mean(0).max() < (
        0.8 * centre.max()
    )


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 9), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((2, 8, 8), np.float32),
    ],
)
def test_apply_scanner_refuses_other_arrays(images):
    with pytest.raises(ValueError, match=r"uint8 \[N, S, S\].*resize first"):
        apply_scanner(images, Scanner(), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": []}, "at least one hospital"),
        ({"sizes": {"North": 0}}, "'North' has size 0.*>= 1"),
        ({"sizes": [10, 2.5]}, "'Hospital B' has size 2.5.*whole number"),
        ({"heterogeneity": 1.2}, "heterogeneity must lie in 0..1, got 1.2"),
        ({"heterogeneity": float("nan")}, "heterogeneity must lie in 0..1, got nan"),
        ({"scanner_shift": -0.1}, "scanner shift must lie in 0..1, got -0.1"),
        ({"prevalence_shift": 2}, "prevalence shift must lie in 0..1, got 2"),
        ({"image_size": 8}, "image_size must be >= 16.* 8 "),
        ({"seed": -1}, "seed >= 0, got 32 and -1"),
        ({"classes": ["normal", "hernia"]}, "cardiomegaly.*got .*hernia"),
        ({"classes": ["normal", "normal"]}, "different names"),
        ({"classes": []}, "different names"),
    ],
)
def test_synthetic_cxr_refuses_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic_cxr(**{"sizes": [3], **arguments})


def test_card_of_synthetic_cxr_shows_the_true_mixes():
    for index, letter in enumerate("ABCDEFGH"):
        shares = " | ".join(f"{100 * s:.0f}" for s in class_mix(index, 1.0))
        assert re.search(rf"\| {letter} \|.*\| {re.escape(shares)} \|", CARDS), shares


def test_masks_are_the_outlines_of_what_is_drawn_and_change_no_image():
    sizes = {"a": 60, "b": 60}
    drawn = synthetic_cxr(sizes, image_size=64, heterogeneity=0.0, masks=True)
    without = synthetic_cxr(sizes, image_size=64, heterogeneity=0.0)
    assert without.masks is None and np.array_equal(drawn.x, without.x)
    assert drawn.masks.shape == (120, 3, 64, 64) and drawn.masks.dtype == bool
    lungs, heart, finding = drawn.masks.transpose(1, 0, 2, 3)
    effusion = drawn.y == drawn.classes.index("effusion")
    normal = drawn.y == drawn.classes.index("normal")
    assert not finding[normal].any() and finding[effusion].any(axis=(1, 2)).all()
    assert lungs.any(axis=(1, 2)).all() and heart.any(axis=(1, 2)).all()
    assert not (finding & ~lungs).any()  # pneumonia and effusion fill air
    # Air is dark; the heart, and fluid in a lung, are as bright as soft tissue.
    air = lungs & ~heart & ~finding
    bright, dark = drawn.x[finding].mean(), drawn.x[air].mean()
    assert bright > dark + 40 and drawn.x[heart].mean() > dark + 40
