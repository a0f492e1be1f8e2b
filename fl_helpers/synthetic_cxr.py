"""Procedural chest radiographs of any number of hospitals, with one difficulty knob.

No patient is behind these images. Every hospital has its own scanner (tone, blur,
noise, field of view, burned-in marker), its own class mix and its own size, so the data
show the ways in which real hospitals differ. Needs only numpy and torch: copy this file
on its own.

Coordinates: u runs to the right and v down, -1..1 across the image, in the patient's
frame. As in a clinical image, the right half (u > 0) is the patient's left side.
Densities run from 0 (air, black) to 1 (metal, white).
"""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

CLASSES = ("normal", "pneumonia", "effusion", "cardiomegaly")

MASKS = ("lungs", "heart", "finding")  # a finding is pneumonia or an effusion

# Size of the findings. Below 1 a small network no longer sees them at 32 x 32 pixels.
SEVERITY = (1.2, 2.1)


@dataclass(frozen=True)
class Scanner:
    """How one hospital acquires its images; the defaults are the neutral scanner.

    Settings are the hospital's mean: each image varies a little around them.
    """

    gamma: float = 1.0  # exponent of the tone curve; > 1 darkens
    contrast: float = 1.0  # gain around middle grey
    brightness: float = 0.0  # added after the gain, 1.0 = black to white
    blur: float = 0.0  # Gaussian sigma, in pixels of a 64 x 64 image
    noise: float = 0.015  # standard deviation, 1.0 = black to white
    zoom: float = 1.0  # < 1 shows a wider field of view
    tilt: float = 0.0  # degrees, counter-clockwise
    shift: float = 0.0  # patient moved down, 1.0 = half an image
    vignette: float = 0.0  # darkening in the corners, as a share
    collimator: float = 0.0  # width of the black frame, 1.0 = half an image
    inverted: float = 0.0  # share of images stored with black and white swapped
    marker: float = 0.0  # share of images with a burned-in side marker
    marker_corner: int = 0  # 0 top left, 1 top right, 2 bottom left, 3 bottom right


# fmt: off
SCANNERS = tuple(Scanner(*row) for row in (  # the columns are Scanner's fields
    (1.00, 1.00,  0.00, 0.0, 0.015, 1.00,  0,  0.00, 0.00, 0.00, 0, 0.0, 0),  # digital
    (1.60, 0.75, -0.03, 0.8, 0.030, 0.90,  0,  0.00, 0.00, 0.00, 0, 0.9, 1),  # film
    (0.65, 0.85,  0.06, 0.0, 0.040, 1.08,  4,  0.00, 0.30, 0.00, 0, 0.0, 0),  # plate
    (1.15, 1.25,  0.00, 0.0, 0.020, 0.95,  0,  0.04, 0.00, 0.00, 0, 0.7, 0),  # hard
    (0.80, 0.70,  0.05, 1.0, 0.050, 0.84, -6,  0.06, 0.00, 0.08, 0, 0.9, 3),  # portable
    (1.35, 1.45,  0.03, 0.0, 0.020, 1.15,  0, -0.05, 0.15, 0.05, 0, 0.0, 0),  # narrow
    (0.75, 1.20,  0.00, 0.5, 0.050, 1.00,  3,  0.00, 0.00, 0.00, 0, 0.5, 2),  # old
    (1.45, 0.90,  0.08, 0.6, 0.035, 0.88, -3,  0.00, 0.25, 0.00, 0, 0.0, 0),  # wide
))
# fmt: on

# Relative frequency of CLASSES at full prevalence shift, in the order of SCANNERS.
CLASS_MIXES = (
    (0.34, 0.33, 0.33, 0.33),
    (0.70, 0.20, 0.10, 0.10),
    (0.15, 0.70, 0.15, 0.10),
    (0.20, 0.15, 0.65, 0.30),
    (0.10, 0.45, 0.45, 0.40),
    (0.75, 0.05, 0.20, 0.10),
    (0.40, 0.50, 0.10, 0.20),
    (0.50, 0.10, 0.40, 0.30),
)


@dataclass(frozen=True)
class Radiographs:
    """Images x uint8 [N, H, W], classes y int64 [N], the hospital of each row [N].

    masks: inside the true outlines, bool [N, len(MASKS), H, W], in the order of MASKS.
    They overlap: the lungs hold the part of the heart in front of them. A finding's is
    empty without one, and in 1-4 % of pneumonias, which are too faint. None unless
    asked for.
    """

    x: np.ndarray
    y: np.ndarray
    classes: tuple[str, ...]  # class names, index = y
    site: np.ndarray  # str [N]
    features: tuple[str, ...] = ()  # always empty: images have no columns
    masks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.y)


def synthetic_cxr(
    sizes: Mapping[str, int] | Sequence[int],
    *,
    heterogeneity: float = 0.25,
    scanner_shift: float | None = None,
    prevalence_shift: float | None = None,
    image_size: int = 32,
    seed: int = 0,
    classes: Sequence[str] = CLASSES[:3],
    masks: bool = False,
) -> Radiographs:
    """Draw the radiographs of several hospitals.

    sizes: {hospital: number of images}, or numbers only, for "Hospital A", "Hospital
        B", ...
    heterogeneity: 0..1, drives two differences at once: the scanner (0 = all neutral,
        1 = each hospital's own preset) and the class mix (0 = uniform, 1 = its own).
    scanner_shift, prevalence_shift: 0..1, set one of the two alone.
    image_size: pixels along each side, at least 16.
    seed: same seed, same images.
    classes: any of CLASSES; y counts in their order.
    masks: whether to return the outlines as well; the images are the same.

    Returns the hospitals one after the other, each shuffled, class counts exact to one
    image. A hospital's draws come from (seed, its name); its scanner and mix follow its
    letter if it is named "Hospital <letter>", else its place, and repeat after eight.
    So "Hospital B" has the same images whichever other hospitals exist. Raises
    ValueError for a setting outside its range.
    """
    named, codes_of = _check_sizes(sizes), _check_classes(classes)
    if image_size < 16 or seed < 0:
        limits = "image_size must be >= 16 and seed >= 0"
        raise ValueError(f"{limits}, got {image_size} and {seed}")
    _check_share("heterogeneity", heterogeneity)
    style = heterogeneity if scanner_shift is None else scanner_shift
    skew = heterogeneity if prevalence_shift is None else prevalence_shift
    x, y, outlines = [], [], []
    for position, (name, count) in enumerate(named.items()):
        index = _preset_index(name, position)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        y.append(_draw_labels(count, class_mix(index, skew, classes), rng))
        codes, scanner = torch.from_numpy(codes_of[y[-1]]), scanner_for(index, style)
        with _one_thread():
            images = _draw_images(codes, scanner, image_size, int(rng.integers(2**62)))
        x.append(images[0])
        outlines.append(images[1] if masks else images[1][:0])
    site = np.repeat(list(named), list(named.values()))
    drawn = Radiographs(np.concatenate(x), np.concatenate(y), tuple(classes), site)
    return replace(drawn, masks=np.concatenate(outlines)) if masks else drawn


@contextmanager
def _one_thread() -> Iterator[None]:
    """Hold torch to one thread: on small images, more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def scanner_for(index: int, strength: float) -> Scanner:
    """Scanner of hospital `index`, between neutral (strength 0) and its preset (1)."""
    _check_share("scanner shift", strength)
    neutral, preset = Scanner(), SCANNERS[index % len(SCANNERS)]
    between = {
        f.name: (1 - strength) * getattr(neutral, f.name)
        + strength * getattr(preset, f.name)
        for f in fields(Scanner)
    }
    return Scanner(**{**between, "marker_corner": preset.marker_corner})


def class_mix(
    index: int, strength: float, classes: Sequence[str] = CLASSES[:3]
) -> np.ndarray:
    """Class shares of hospital `index`, between uniform (0) and its own mix (1)."""
    _check_share("prevalence shift", strength)
    own = np.array(CLASS_MIXES[index % len(CLASS_MIXES)])[_check_classes(classes)]
    return (1 - strength) / len(own) + strength * own / own.sum()


def apply_scanner(images: np.ndarray, scanner: Scanner, seed: int) -> np.ndarray:
    """Make real images look as if this scanner had taken them.

    images: grey values uint8 [N, S, S]; not modified. Returns uint8 [N, S, S]: moved,
    toned, blurred, noisy. The neutral scanner too adds its small variation; to leave a
    hospital's images as they are, do not call it. Raises ValueError for other arrays.
    """
    if images.ndim != 3 or images.dtype != np.uint8 or len(set(images.shape[1:])) > 1:
        raise ValueError(
            f"expected square grey images, uint8 [N, S, S], got {images.dtype} "
            f"{images.shape}; convert colour to grey and resize first"
        )
    rng = torch.Generator().manual_seed(seed)
    out = np.empty_like(images)
    for part in _batches(len(images), images.shape[1]):
        batch = torch.from_numpy(images[part].astype(np.float32) / 255)
        draw = _Draws(len(batch), rng)
        u, v = _patient_axes(draw, scanner, images.shape[1])
        batch = torch.nn.functional.grid_sample(
            batch[:, None],
            torch.stack([u, v], dim=-1),
            padding_mode="border",
            align_corners=False,
        )
        out[part] = _acquire(batch[:, 0], draw, scanner, middle_grey=0.5)
    return out


# ---------------------------------------------------------------- one batch of images


class _Draws:
    """Random numbers for a batch: one per image, shaped [N, 1, 1] to broadcast."""

    def __init__(self, count: int, rng: torch.Generator) -> None:
        self.count, self.rng = count, rng

    def uniform(self, low: float, high: float) -> Tensor:
        return torch.rand(self.count, 1, 1, generator=self.rng) * (high - low) + low

    def normal(self, sd: float) -> Tensor:
        return torch.randn(self.count, 1, 1, generator=self.rng) * sd

    def chance(self, share: float) -> Tensor:
        """1.0 for about this share of the images, else 0.0."""
        return (torch.rand(self.count, 1, 1, generator=self.rng) < share).float()

    def side(self, share_right: float) -> Tensor:
        """-1.0 (the patient's right lung) for about this share, else +1.0."""
        return 1 - 2 * self.chance(share_right)

    def texture(self, bank: Tensor) -> Tensor:
        """A texture per image, rolled and mirrored alike within the batch."""
        size = bank.shape[-1]
        picked = torch.randint(len(bank), (self.count,), generator=self.rng)
        down, right, mirror = torch.randint(size, (3,), generator=self.rng).tolist()
        rolled = bank[picked].roll((down, right), dims=(1, 2))
        return rolled.flip(2) if mirror % 2 else rolled


@dataclass(frozen=True)
class _Chest:
    """Shape of each patient of a batch; every tensor starts with N."""

    u: Tensor  # [N, S, S] position to the right, in the patient's frame
    v: Tensor  # [N, S, S] position downwards
    lateral: Tensor  # [N, S, S] distance from the midline, |u|
    side: Tensor  # [N, S, S] +1 in the right half of the image, else -1
    coarse: Tensor  # [N, S, S] slow texture, sd 1
    fine: Tensor  # [N, S, S] texture without the slowest waves, sd 1
    body: Tensor  # [N, S, S] 1 inside the patient
    lungs: Tensor  # [N, S, S] 1 inside the lungs, the heart over them included
    heart: Tensor  # [N, S, S] 1 inside the heart
    air: Tensor  # [N, S, S] visible lung: lungs less the heart
    rim: Tensor  # [N, S, S] distance of the lung's outer edge from the midline
    base: Tensor  # [N, S, S] height of the diaphragm
    top: Tensor  # [N, 1, 1] height of the lung's apex
    floor: Tensor  # [N, S, S] height of the lung's lowest point, per side

    def rows(self, chosen: Tensor) -> _Chest:
        return _Chest(*(getattr(self, f.name)[chosen] for f in fields(self)))


@torch.no_grad()
def _draw_images(
    codes: Tensor, scanner: Scanner, size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, size, size] for class codes [N], an index into CLASSES, and
    their masks bool [N, len(MASKS), size, size]."""
    rng = torch.Generator().manual_seed(seed)
    out = np.empty((len(codes), size, size), np.uint8)
    masks = np.zeros((len(codes), len(MASKS), size, size), bool)
    for part in _batches(len(codes), size):
        code = codes[part]
        draw = _Draws(len(code), rng)
        chest = _draw_chest(draw, scanner, size, code == CLASSES.index("cardiomegaly"))
        image = _soft_tissue(draw, chest)
        image += _bones(draw, chest)
        image += _vessels_and_skin(draw, chest)
        for name, finding in (("pneumonia", _pneumonia), ("effusion", _effusion)):
            has_it = torch.nonzero(code == CLASSES.index(name)).flatten()
            if len(has_it):
                some = _Draws(len(has_it), rng)
                where, density = finding(some, chest.rows(has_it), image[has_it])
                image[has_it] += density
                masks[part][has_it.numpy(), 2] = (where > 0.5).numpy()
        masks[part][:, 0] = (chest.lungs > 0.5).numpy()
        masks[part][:, 1] = (chest.heart > 0.5).numpy()
        out[part] = _acquire(image.clamp_(0, 1), draw, scanner, middle_grey=0.4)
    return out, masks


def _batches(count: int, size: int) -> list[slice]:
    # Intermediate images of a batch (0.5 MB each) stay in the processor's cache.
    step = max(16, 2**17 // size**2)
    return [slice(start, start + step) for start in range(0, count, step)]


def _edge(distance: Tensor, softness: float) -> Tensor:
    """Soft step from 0 (outside) to 1 (inside) over 4 * softness around distance 0."""
    return (distance * (0.25 / softness)).add_(0.5).clamp_(0, 1)


def _bump(distance: Tensor) -> Tensor:
    """Gaussian bell, exp(-distance ** 2)."""
    return distance.square().neg_().exp_()


def _wave(phase: Tensor, sharpness: float) -> Tensor:
    """Thin bright bands at every whole number of `phase`."""
    return _bump((phase - phase.round()).mul_(sharpness))


# ---------------------------------------------------------------------------- anatomy


def _patient_axes(draw: _Draws, scanner: Scanner, size: int) -> tuple[Tensor, Tensor]:
    """Patient's u and v [N, S, S] at every pixel: field of view, tilt, position."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    angle = (scanner.tilt + draw.normal(2.0)) * (math.pi / 180)
    zoom = scanner.zoom * (1 + draw.normal(0.035))
    right = axis[None, None, :] - draw.normal(0.03)
    down = axis[None, :, None] - (scanner.shift + draw.normal(0.03))
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    return cos * right + sin * down, cos * down - sin * right


def _draw_chest(draw: _Draws, scanner: Scanner, size: int, enlarged: Tensor) -> _Chest:
    """Outlines of body, lungs and heart; enlarged: bool [N], an enlarged heart."""
    u, v = _patient_axes(draw, scanner, size)
    lateral = u.abs()
    side = torch.where(u >= 0, 1.0, -1.0)
    width = draw.uniform(0.80, 0.97)
    shoulders = 1 - 0.58 * _edge(-0.80 - v, 1 / 14)  # narrower above: the neck
    body = _edge(width * shoulders + 0.05 * v - lateral, 0.025)
    chest_width = width * draw.uniform(0.80, 0.87)
    top, bottom = draw.uniform(-0.80, -0.70), draw.uniform(0.42, 0.62)
    dome = draw.uniform(0.10, 0.22)
    height = ((v - top) / (bottom - top)).clamp_(0, 1)  # 0 at the apex, 1 at the base
    rim = chest_width * (1 - 0.72 * (1 - height) ** 2.6)
    floor = bottom + 0.05 * side  # the liver lifts the patient's right diaphragm
    across = (lateral - 0.48 * chest_width) / (0.5 * chest_width)
    base = floor - dome + (dome + 0.14) * across.square()
    lungs = _edge(lateral - draw.uniform(0.085, 0.12), 0.02)
    lungs *= (
        _edge(rim - lateral, 0.025) * _edge(v - top, 0.035) * _edge(base - v, 0.022)
    )
    heart = _heart(draw, u, v, bottom - dome, enlarged.float().view(-1, 1, 1))
    coarse, fine = map(draw.texture, _texture_banks(size))
    air = lungs * (1 - 0.9 * heart)
    return _Chest(
        u,
        v,
        lateral,
        side,
        coarse,
        fine,
        body,
        lungs,
        heart,
        air,
        rim,
        base,
        top,
        floor,
    )


def _heart(
    draw: _Draws, u: Tensor, v: Tensor, rests_on: Tensor, enlarged: Tensor
) -> Tensor:
    """Tilted ellipse [N, S, S] on the diaphragm, left of the patient's midline."""
    growth = 1 + enlarged * (0.18 + 0.42 * draw.uniform(*SEVERITY))
    half_width = draw.uniform(0.25, 0.33) * growth
    half_height = half_width * draw.uniform(0.82, 1.0)
    across = u - (draw.uniform(0.05, 0.11) + 0.05 * enlarged)
    along = v - (rests_on - half_height * draw.uniform(0.55, 0.75) + 0.10)
    radius = ((across + 0.35 * along) / half_width).square()
    radius += ((along - 0.25 * across) / half_height).square()
    return _edge(1 - radius, 0.2)


def _soft_tissue(draw: _Draws, chest: _Chest) -> Tensor:
    """Density [N, S, S] of the trunk, lungs, heart, spine and aortic knob."""
    image = chest.body * draw.uniform(0.58, 0.66)
    image -= chest.lungs * draw.uniform(0.34, 0.42)
    image += chest.heart * chest.lungs * draw.uniform(0.25, 0.32)
    image += chest.body * _edge(chest.v - chest.base, 0.03) * 0.10  # abdomen
    vertebrae = torch.cos(chest.v * (2 * math.pi / 0.17) + draw.uniform(0, 6))
    spine = _bump(chest.u / draw.uniform(0.09, 0.12)) * chest.body
    image += spine * vertebrae.mul_(0.025).add_(0.13)
    image += 0.10 * _bump((chest.u - 0.13) / 0.07) * _bump((chest.v + 0.33) / 0.09)
    return image


def _bones(draw: _Draws, chest: _Chest) -> Tensor:
    """Density [N, S, S] of the back and front ribs and of the clavicles."""
    u, v, rim = chest.lateral, chest.v, chest.rim
    cage = _edge(rim + 0.03 - u, 0.02) * _edge(u - 0.08, 0.02)
    cage *= _edge(chest.base + 0.05 - v, 0.05) * _edge(v - chest.top + 0.05, 0.03)
    spacing, phase = draw.uniform(0.155, 0.185), draw.uniform(0, 1)
    back = (v - draw.uniform(0.30, 0.50) * u**1.6) / spacing + phase
    front = (v + draw.uniform(0.45, 0.70) * (u - rim)) / (1.15 * spacing) + phase / 2
    bones = draw.uniform(0.035, 0.075) * _wave(back, 4.2)
    bones += draw.uniform(0.01, 0.035) * _wave(front, 4.5) * _edge(u - 0.25, 0.06)
    bones *= cage
    clavicle = draw.uniform(-0.62, -0.55) - 0.30 * (u - 0.08) + 0.18 * (u - 0.3) ** 2
    bright = draw.uniform(0.05, 0.10) * _bump((v - clavicle) / 0.035)
    return bones + bright * _edge(u - 0.07, 0.02) * _edge(0.66 - u, 0.03)


def _vessels_and_skin(draw: _Draws, chest: _Chest) -> Tensor:
    """Density [N, S, S] of hila, vessels, breasts and fat; stomach gas is negative."""
    u, v = chest.lateral, chest.v
    hila = _bump((u - 0.19) / 0.09) * _bump((v + 0.02 - 0.04 * chest.side) / 0.15)
    vessels = 0.05 * _bump((u - 0.15) / 0.35) * _bump(v / 0.5) + 0.030
    vessels = vessels * chest.fine * draw.uniform(0.6, 1.3)
    out = chest.air * (hila * (0.09 + 0.05 * chest.fine) + vessels)
    density = draw.chance(0.5) * draw.uniform(0.02, 0.11)
    breast = ((u - draw.uniform(0.42, 0.52)) / 0.26).square()
    breast += ((v - draw.uniform(0.18, 0.32)) / 0.24).square()
    skin = density * _bump(breast) + 0.022 * chest.coarse
    gas = _bump((chest.u - 0.36) / 0.13) * _bump((v - chest.base - 0.16) / 0.08)
    return out + chest.body * (skin - 0.18 * draw.chance(0.45) * gas)


@functools.lru_cache(maxsize=4)
def _texture_banks(size: int, count: int = 192) -> tuple[Tensor, Tensor]:
    """Coarse and fine cloud textures, [count, size, size] each, mean 0 and sd 1.

    One fixed bank serves all hospitals and seeds: spectra are costly to draw anew.
    """
    rng = torch.Generator().manual_seed(1234)
    spectrum = torch.fft.rfft2(torch.randn(count, size, size, generator=rng))
    radius = _frequencies(size).sqrt()
    radius[0, 0] = math.inf  # no constant part
    filters = radius**-1.6, radius**-1.2 * (radius > 2)
    banks = [torch.fft.irfft2(spectrum * f, s=(size, size)) for f in filters]
    coarse, fine = (b / b.std(dim=(1, 2), keepdim=True) for b in banks)
    return coarse, fine


def _frequencies(size: int) -> Tensor:
    """Squared spatial frequency, in cycles per image, as rfft2 orders it."""
    down = torch.fft.fftfreq(size)[:, None] * size
    right = torch.fft.rfftfreq(size)[None, :] * size
    return down.square() + right.square()


# --------------------------------------------------------------------------- findings


def _pneumonia(draw: _Draws, chest: _Chest, image: Tensor) -> tuple[Tensor, Tensor]:
    """One or two cloudy patches that fill the airspace up to soft-tissue density: where
    they are, 0..1, and what they add to the image."""
    patch = torch.zeros_like(image)
    for present in (1.0, draw.chance(0.35)):
        across = chest.u - draw.side(0.55) * draw.uniform(0.22, 0.58)
        along = chest.v - draw.uniform(-0.42, 0.40)
        radius = (across / draw.uniform(0.11, 0.24)).square()
        radius += (along / draw.uniform(0.11, 0.24)).square()
        focus = _edge(1 - radius + 0.55 * chest.coarse, 1 / 3.2)
        patch = torch.maximum(patch, present * focus)
    filled = (0.45 * draw.uniform(*SEVERITY)).clamp_(max=0.92)
    where = chest.air * patch
    return where, where * filled * (0.64 + 0.05 * chest.fine - image).clamp_(min=0)


def _effusion(draw: _Draws, chest: _Chest, image: Tensor) -> tuple[Tensor, Tensor]:
    """Fluid in one lung, from the floor up to a meniscus that climbs along the ribs:
    where it is, 0..1, and what it adds to the image."""
    depth = 0.10 + 0.34 * draw.uniform(*SEVERITY)
    climb = 0.45 + 0.75 * (chest.lateral / chest.rim) ** 3
    fluid = _edge(chest.v - (chest.floor + 0.10 - depth * climb), 0.03)
    fluid *= _edge(draw.side(0.5) * chest.u, 0.02)
    filled = draw.uniform(0.75, 0.95)
    where = chest.air * fluid
    return where, where * filled * (draw.uniform(0.58, 0.66) - image).clamp_(min=0)


# ---------------------------------------------------------------------------- scanner


def _acquire(
    image: Tensor, draw: _Draws, scanner: Scanner, *, middle_grey: float
) -> np.ndarray:
    """Pass densities [N, S, S] in 0..1 through the scanner; returns uint8 [N, S, S]."""
    size = image.shape[-1]
    image = _tone(image, draw, scanner, middle_grey)
    if scanner.blur > 0.05:
        decay = 2 * (math.pi * scanner.blur / 64) ** 2
        spectrum = torch.fft.rfft2(image) * torch.exp(-decay * _frequencies(size))
        image = torch.fft.irfft2(spectrum, s=(size, size))
    image += torch.randn(image.shape, generator=draw.rng) * scanner.noise
    image.clamp_(0, 1)
    if scanner.inverted > 0:
        image = (draw.chance(scanner.inverted) - image).abs_()
    if scanner.collimator > 0:
        axis = ((torch.arange(size) + 0.5) / size * 2 - 1).abs()
        open_to = 1 - scanner.collimator * draw.uniform(0.6, 1.4)
        image *= (axis[:, None] < open_to) & (axis[None, :] < open_to)
    if scanner.marker > 0:
        _burn_in_marker(image, draw.chance(scanner.marker), scanner.marker_corner)
    return (image * 255).round_().to(torch.uint8).numpy()


def _tone(image: Tensor, draw: _Draws, scanner: Scanner, middle_grey: float) -> Tensor:
    """Vignette, tone curve, contrast and brightness; may leave 0..1."""
    axis = (torch.arange(image.shape[-1]) + 0.5) / image.shape[-1] * 2 - 1
    off_centre = (
        axis[:, None].square() + axis[None, :].square()
    ) / 2  # 1 in the corner
    image = (image * (1 - scanner.vignette * off_centre)).clamp_(1e-4, 1)
    image = image ** (scanner.gamma * draw.normal(0.10).exp())
    gain = scanner.contrast * draw.normal(0.08).exp()
    return (image - middle_grey) * gain + (
        middle_grey + scanner.brightness + draw.normal(0.02)
    )


_LETTERS = {
    "L": ("100", "100", "100", "100", "111"),
    "R": ("110", "101", "110", "101", "101"),
}


def _burn_in_marker(image: Tensor, present: Tensor, corner: int) -> None:
    """Write R (left corners) or L (right corners) into images [N, S, S], in place."""
    size = image.shape[-1]
    at_right, at_bottom = corner % 2, corner // 2
    bits = [[int(bit) for bit in row] for row in _LETTERS["L" if at_right else "R"]]
    stroke, border = max(1, round(size / 32)), max(1, size // 16)
    glyph = torch.tensor(bits).repeat_interleave(stroke, 0).repeat_interleave(stroke, 1)
    height, width = glyph.shape
    top = size - border - height if at_bottom else border
    left = size - border - width if at_right else border
    patch = image[:, top : top + height, left : left + width]
    torch.maximum(patch, 0.97 * present * glyph, out=patch)


# ----------------------------------------------------------------------------- checks


def _check_sizes(sizes: Mapping[str, int] | Sequence[int]) -> dict[str, int]:
    """{hospital: number of images}, in the order given."""
    if not isinstance(sizes, Mapping):
        sizes = {f"Hospital {_letters(k)}": n for k, n in enumerate(sizes)}
    if not sizes:
        raise ValueError("sizes is empty; give at least one hospital")
    for name, count in sizes.items():
        if int(count) != count or count < 1:
            raise ValueError(f"{name!r} has size {count}; give a whole number >= 1")
    return {name: int(count) for name, count in sizes.items()}


def _check_classes(classes: Sequence[str]) -> np.ndarray:
    """Index into CLASSES of each chosen class."""
    unknown = [name for name in classes if name not in CLASSES]
    if unknown or not classes or len(set(classes)) < len(classes):
        raise ValueError(
            f"classes must be different names out of {CLASSES}, got {tuple(classes)}"
        )
    return np.array([CLASSES.index(name) for name in classes])


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in 0..1, got {value}")


def _letters(index: int) -> str:
    """0, 1, ... as A, B, ..., Z, AA, AB, ..."""
    letters, index = "", index + 1
    while index:
        index, digit = divmod(index - 1, 26)
        letters = chr(ord("A") + digit) + letters
    return letters


def _preset_index(name: str, position: int) -> int:
    """Place in SCANNERS: the inverse of `_letters` for default names, else position."""
    default = re.fullmatch(r"Hospital ([A-Z]{1,2})", name)
    if not default:
        return position
    return functools.reduce(lambda n, c: 26 * n + ord(c) - 64, default[1], 0) - 1


def _draw_labels(
    count: int, shares: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Shuffled class indices int64 [count], in these shares to within one image."""
    classes = np.arange(len(shares), dtype=np.int64)
    return rng.permutation(np.repeat(classes, _apportion(count, shares)))


def _apportion(count: int, shares: np.ndarray) -> np.ndarray:
    """Whole numbers that sum to count, by largest remainder; ties go to the first."""
    quota = count * shares
    whole = np.floor(quota + 1e-9).astype(int)
    largest = np.argsort(whole - quota, kind="stable")[: count - whole.sum()]
    whole[largest] += 1
    return whole
