"""Your own images, from a folder per hospital: an index first, pixels when needed.

`index_images` looks at each file once, without decoding it; `ImageFiles` is a Dataset
that reads one image at a time, so that a data set may be larger than memory. PNG, JPEG
and the like, and DICOM. Needs numpy, torch and Pillow; pydicom for DICOM (an extra:
`pip install pydicom`). Copy this file on its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

Window = tuple[float, float]

_TYPES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".dcm")
_ENDS = {  # the last bytes of a file that was not cut short
    ".png": b"IEND\xaeB`\x82",
    ".jpg": b"\xff\xd9",
    ".jpeg": b"\xff\xd9",
}


@dataclass(frozen=True, eq=False)
class ImageIndex:
    """Which images there are: one row for each file, or each frame of a DICOM file."""

    paths: list[Path]
    frames: np.ndarray  # int64 [N], which frame of the file; -1 if it has only one
    y: np.ndarray  # int64 [N], class index
    classes: tuple[str, ...]  # class names, index = y
    site: np.ndarray  # str [N], hospital
    patient: np.ndarray  # str [N], "<hospital>/<patient>"
    sizes: np.ndarray  # int64 [N, 2], height and width
    damaged: dict[Path, str] = field(default_factory=dict)  # skipped files, and why

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Images:
    """Images in memory: x uint8 [N, H, W] or [N, H, W, 3]; the rest as in the index."""

    x: np.ndarray
    y: np.ndarray
    classes: tuple[str, ...]
    site: np.ndarray
    patient: np.ndarray

    def __len__(self) -> int:
        return len(self.y)


def index_images(
    root: str | Path,
    *,
    patient_of: Callable[[Path], str] | None = None,
    damaged: Literal["stop", "skip"] = "stop",
    thorough: bool = False,
) -> ImageIndex:
    """Look at `root/<hospital>/<class>/<file>` once, in sorted order.

    patient_of: from the path of a file to the patient, unique within a hospital; None
        takes DICOM's PatientID, and each other file for a patient of its own.
    damaged: what to do with a file that cannot be read: "stop" raises and names it,
        "skip" leaves it out, with a warning, and keeps it in `ImageIndex.damaged`.
    thorough: decode each file, too, which finds all damage and takes long; else only
        headers are read, and whether the file ends as it should.

    A hospital may lack a class; the classes are those of all hospitals. Hidden files
    are skipped; symbolic links are refused, since they could lead from one hospital's
    folder into another's. Raises FileNotFoundError for a missing folder, ValueError for
    a tree or file that does not fit, naming it.
    """
    if damaged not in ("stop", "skip"):
        raise ValueError(f"damaged must be 'stop' or 'skip', got {damaged!r}")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root.absolute()} is not a folder; pass the one that holds "
            "<hospital>/<class>/*.png"
        )
    rows, bad = [], {}
    for path in _list_images(root):
        try:
            size, frames, patient = _look(path)
            if thorough:
                _decode(path, -1, None)
        except ValueError as error:
            if damaged == "stop":
                raise
            bad[path] = str(error)
            continue
        who = patient_of(path) if patient_of else patient or path.name
        numbers = [-1] if frames == 1 else range(frames)
        rows += [(path, number, f"{path.parts[-3]}/{who}", size) for number in numbers]
    if bad:
        named = ", ".join(map(str, list(bad)[:3]))
        warnings.warn(f"{len(bad)} damaged files left out: {named} ...", stacklevel=2)
    if not rows:
        raise ValueError(
            f"{root} has no file that can be read: {list(bad.items())[:1]}"
        )
    return _as_index(root, rows, bad)


class ImageFiles(Dataset):
    """The images of an index, read one at a time: (x float32 [C, H, W], class index).

    image_size: resize to this many pixels squared (the aspect ratio is not kept); None
        requires that all images have one size.
    grayscale: one channel, else three.
    window: (lowest, highest) value of DICOM files, see `read_dicom`.
    keep: keep each image in memory, as resized, once it was read: one byte per pixel
        and channel, and no decoding in later epochs. For small images that are many.

    Grey levels are scaled by the same constants everywhere, (pixel / 255 - 0.5) / 0.25,
    as in `silos.to_tensor`. y: the class indices, int64 [N]. An error names the file.
    """

    def __init__(
        self,
        index: ImageIndex,
        *,
        image_size: int | None = None,
        grayscale: bool = True,
        window: Window | None = None,
        keep: bool = False,
    ) -> None:
        if image_size is None:
            _check_sizes(index)
        self.index, self.image_size = index, image_size
        self.grayscale, self.window = grayscale, window
        self.kept: dict[int, np.ndarray] | None = {} if keep else None
        self.y = torch.from_numpy(index.y)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        pixels = torch.from_numpy(self.pixels(row))
        pixels = pixels[None] if self.grayscale else pixels.permute(2, 0, 1)
        x = pixels.float().div_(255).sub_(0.5).div_(0.25)
        return x.contiguous(), int(self.y[row])

    def pixels(self, row: int) -> np.ndarray:
        """One image, uint8 [H, W], or [H, W, 3] in colour; a copy."""
        if self.kept is None:
            return self._read(row)
        if row not in self.kept:
            self.kept[row] = self._read(row)
        return self.kept[row].copy()

    def _read(self, row: int) -> np.ndarray:
        path, frame = self.index.paths[row], int(self.index.frames[row])
        image = _decode(path, frame, self.window)
        image = image.convert("L" if self.grayscale else "RGB")
        if self.image_size is not None:
            size = (self.image_size, self.image_size)
            image = image.resize(size, Image.Resampling.BILINEAR)
        return np.array(image, dtype=np.uint8)


class Augmented(Dataset):
    """A Dataset with transform(x) instead of x, for training. y: as of the Dataset.

    What transform draws comes from the silo's generator in `training.train_locally`.
    """

    def __init__(self, examples: Any, transform: Callable[[Tensor], Tensor]) -> None:
        self.examples, self.transform = examples, transform
        self.y = examples.y

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        x, y = self.examples[row]
        return self.transform(x), y


def load_image_folder(
    root: str | Path, *, image_size: int | None = None, grayscale: bool = True
) -> Images:
    """All images of a folder in memory: `index_images`, read as by `ImageFiles`."""
    index = index_images(root)
    files = ImageFiles(index, image_size=image_size, grayscale=grayscale)
    x = np.stack([files.pixels(row) for row in range(len(files))])
    return Images(x, index.y, index.classes, index.site, index.patient)


def read_dicom(
    path: str | Path, *, window: Window | None = None, frame: int | None = None
) -> np.ndarray:
    """Read a DICOM image as grey levels; bright is dense.

    window: (lowest, highest) value to show, after the file's own slope and intercept
        (Hounsfield units for CT); the same in every hospital, because it becomes part
        of the model. None: the window or table that the file proposes, which differs by
        device, else the whole range.
    frame: the number of one frame, from 0; None is all.

    Returns uint8 [H, W], or [frames, H, W] for all frames of a file with several.
    Pixels only: no name, date or other element of the file is returned, but what is
    burned into the pixels stays. Needs pydicom, and one of its plug-ins for compressed
    files. Raises ValueError for a file that holds no grey image.
    """
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

    if window is not None and not window[0] < window[1]:
        raise ValueError(f"window must be (lowest, highest), got {window}")
    try:
        head = pydicom.dcmread(path, stop_before_pixels=True)
        kind = head.PhotometricInterpretation
        pixels = pixel_array(path, index=frame)
    except _dicom_errors() as error:
        raise ValueError(
            f"{path} has no image that can be read ({error}); leave it out, or install "
            "pydicom's plug-in for its compression"
        ) from error
    if not kind.startswith("MONOCHROME") or pixels.ndim not in (2, 3):
        raise ValueError(
            f"{path} holds {kind} pixels {list(pixels.shape)}; only grey images are "
            "read: convert colour first"
        )
    values = apply_modality_lut(pixels, head)
    if window is None:
        values = apply_voi_lut(values, head)
    values = values.astype(np.float64)
    low, high = window or (values.min(), values.max())
    grey = ((values - low) / max(high - low, 1e-12)).clip(0, 1)
    if kind == "MONOCHROME1":  # its low values are bright
        grey = 1 - grey
    return (255 * grey).round().astype(np.uint8)


def _as_index(root: Path, rows: list[Any], bad: dict[Path, str]) -> ImageIndex:
    paths, frames, patients, sizes = zip(*rows, strict=True)
    classes = sorted({path.parent.name for path in paths})
    folded = [name.casefold() for name in classes]
    twins = [name for name in classes if folded.count(name.casefold()) > 1]
    if twins:
        raise ValueError(
            f"{root} has class folders that differ only in upper and lower case: "
            f"{twins}; give them one spelling"
        )
    return ImageIndex(
        paths=list(paths),
        frames=np.array(frames, np.int64),
        y=np.array([classes.index(path.parent.name) for path in paths], np.int64),
        classes=tuple(classes),
        site=np.array([path.parts[-3] for path in paths]),
        patient=np.array(patients),
        sizes=np.array(sizes, np.int64),
        damaged=bad,
    )


def _list_images(root: Path) -> Iterator[Path]:
    """Image files of the tree, hospital by hospital, class by class."""
    for hospital in _subfolders(root, "hospital"):
        for class_folder in _subfolders(hospital, "class"):
            entries = _visible(class_folder)
            for path in entries:
                if path.is_dir():
                    raise ValueError(
                        f"{path} is a folder where images should lie; expected "
                        "<hospital>/<class>/*.png below the folder you pass"
                    )
                if path.suffix.lower() not in _TYPES or not path.is_file():
                    raise ValueError(
                        f"{path} is not an image file ({', '.join(_TYPES)}); "
                        "convert it or move it out of the class folder"
                    )
            if not entries:
                raise ValueError(
                    f"{class_folder} has no images; add some or remove the folder"
                )
            yield from entries


def _subfolders(folder: Path, level: str) -> list[Path]:
    found = [path for path in _visible(folder) if path.is_dir()]
    if not found:
        raise ValueError(
            f"{folder} has no {level} folders; expected <hospital>/<class>/*.png below "
            "the folder you pass"
        )
    return found


def _visible(folder: Path) -> list[Path]:
    """Entries by name, without hidden ones; links are an error."""
    entries = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    for path in entries:
        if path.is_symlink():
            raise ValueError(
                f"{path} is a symbolic link; put the files themselves there"
            )
    return entries


def _look(path: Path) -> tuple[tuple[int, int], int, str | None]:
    """Height and width, number of frames, and the patient if the file says so."""
    if path.suffix.lower() == ".dcm":
        return _look_at_dicom(path)
    end = _ENDS.get(path.suffix.lower(), b"")
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 64))  # some devices add a few bytes
        whole = end in file.read()
    with _opened(path) as image:
        frames, mode = getattr(image, "n_frames", 1), image.mode
        width, height = image.size
        # To look for a PNG's orientation, Pillow would decode all of it.
        exif = {} if path.suffix.lower() == ".png" else image.getexif()
    if frames > 1 or mode[0] in "IF":
        raise ValueError(
            f"{path} has {frames} frame(s) of mode {mode}; save one 8-bit image per "
            "file (for 16-bit radiographs, choose the grey-level window yourself)"
        )
    if not whole:
        raise ValueError(f"cannot read {path} (cut short); replace or remove the file")
    turned = exif.get(0x0112, 1) >= 5
    return ((width, height) if turned else (height, width)), 1, None


def _look_at_dicom(path: Path) -> tuple[tuple[int, int], int, str | None]:
    import pydicom

    tags = ["Rows", "Columns", "NumberOfFrames", "PatientID", "BitsAllocated"]
    try:
        with path.open("rb") as file:
            head = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
            start, size_of_file = file.tell(), file.seek(0, 2)
        size, frames = (head.Rows, head.Columns), int(head.get("NumberOfFrames", 1))
        packed = head.file_meta.TransferSyntaxUID.is_compressed
        needed = size[0] * size[1] * frames * head.BitsAllocated // 8
    except _dicom_errors() as error:
        raise ValueError(
            f"cannot read {path} ({error}); replace or remove the file"
        ) from error
    if not packed and size_of_file < start + needed:
        raise ValueError(f"cannot read {path} (cut short); replace or remove the file")
    return size, frames, head.get("PatientID") or None


def _dicom_errors() -> tuple[type[Exception], ...]:
    """What pydicom raises for files that are damaged or of another kind."""
    from pydicom.errors import InvalidDicomError

    kinds = (AttributeError, RuntimeError, ValueError, OSError, EOFError, KeyError)
    return (InvalidDicomError, *kinds, NotImplementedError)


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"cannot read {path} ({error}); replace or remove the file"
        ) from error


def _decode(path: Path, frame: int, window: Window | None) -> Image.Image:
    """One image or frame, upright."""
    if path.suffix.lower() == ".dcm":
        pixels = read_dicom(path, window=window, frame=None if frame < 0 else frame)
        return Image.fromarray(pixels if pixels.ndim == 2 else pixels[0])
    with _opened(path) as image:
        try:
            return ImageOps.exif_transpose(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"cannot read {path} ({error}); replace or remove the file"
            ) from error


def _check_sizes(index: ImageIndex) -> None:
    differ = np.flatnonzero((index.sizes != index.sizes[0]).any(axis=1))
    if len(differ):
        (height, width), (other_height, other_width) = index.sizes[[0, differ[0]]]
        raise ValueError(
            f"{index.paths[0]} is {width} x {height} pixels but "
            f"{index.paths[differ[0]]} is {other_width} x {other_height} pixels; pass "
            "image_size to resize all images"
        )
