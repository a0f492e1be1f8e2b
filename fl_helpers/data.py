"""Data sets as arrays in memory: MedMNIST, heart disease, your own CSV files.

Each loader returns `Arrays`. Nothing is scaled or imputed here: statistics of rows from
several hospitals would be a use of pooled data. `data/README.md` describes the data
sets; your own images are for `images.py`. Needs numpy; torchvision to download. Copy
this file on its own, and of the project's data folder `medmnist.json` or
`heart_disease.csv` if you want those sets.
"""

from __future__ import annotations

import csv
import hashlib
import http.client
import json
import math
import os
import tempfile
import warnings
import zipfile
import zlib
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Arrays:
    """A data set in memory. Raises ValueError if its parts do not fit together."""

    x: np.ndarray  # images uint8 [N, H, W] or [N, H, W, 3]; tables float32 [N, F]
    y: np.ndarray  # int64 [N], class index
    classes: tuple[str, ...]  # class names, index = y
    site: np.ndarray | None = None  # str [N], for data that come by hospital
    features: tuple[str, ...] = ()  # column names of a table; NaN in x means missing

    def __len__(self) -> int:
        return len(self.y)

    def __post_init__(self) -> None:
        _check_inputs(self.x, self.features)
        if self.y.dtype != np.int64 or self.y.shape != (len(self.x),):
            raise ValueError(
                f"y must be int64 [{len(self.x)}], one class index per row of x, got "
                f"{self.y.dtype} {list(self.y.shape)}"
            )
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must be different names, got {self.classes}")
        if self.y.min() < 0 or self.y.max() >= len(self.classes):
            raise ValueError(
                f"y must lie in 0..{len(self.classes) - 1} for {len(self.classes)} "
                f"classes, got {self.y.min()}..{self.y.max()}; name every class"
            )
        if self.site is not None and (
            self.site.dtype.kind != "U" or self.site.shape != self.y.shape
        ):
            raise ValueError(
                f"site must be str [{len(self.y)}], one hospital per row, got "
                f"{self.site.dtype} {list(self.site.shape)}"
            )


def _check_inputs(x: np.ndarray, features: tuple[str, ...]) -> None:
    grey, colour = x.ndim == 3, x.ndim == 4 and x.shape[-1] == 3
    is_image = x.dtype == np.uint8 and (grey or colour)
    is_table = x.dtype == np.float32 and x.ndim == 2
    if not (is_image or is_table):
        raise ValueError(
            "x must be images, uint8 [N, H, W] or [N, H, W, 3], or a table, float32 "
            f"[N, F], got {x.dtype} {list(x.shape)}"
        )
    if x.size == 0:
        raise ValueError(f"x is empty, shape {list(x.shape)}; give at least one row")
    if len(features) != (x.shape[1] if is_table else 0):
        raise ValueError(
            f"{len(features)} feature names for x of shape {list(x.shape)}; name each "
            "column of a table, and none of an image"
        )
    if is_table and np.isinf(x).any():
        row, column = np.argwhere(np.isinf(x))[0]
        raise ValueError(
            f"x is infinite in row {row}, column {features[column]!r}; use NaN if it "
            "is missing"
        )


def drop_duplicates(arrays: Arrays) -> Arrays:
    """Keep one copy of each distinct row of x; returns new arrays in the same order.

    Rows are equal if every byte is; hospitals are not compared. Of equal rows with one
    label the first stays. Of equal rows with different labels none stays: we cannot
    know which label is right. Do this before dividing images among hospitals, or one
    image may be in the training set here and in the test set there.
    """
    labels: dict[bytes, set[int]] = {}
    first: dict[bytes, int] = {}
    for row, (content, label) in enumerate(zip(arrays.x, arrays.y, strict=True)):
        key = hashlib.sha256(content.tobytes()).digest()
        labels.setdefault(key, set()).add(int(label))
        first.setdefault(key, row)
    kept = np.array([row for key, row in first.items() if len(labels[key]) == 1], int)
    site = None if arrays.site is None else arrays.site[kept]
    return replace(arrays, x=arrays.x[kept], y=arrays.y[kept], site=site)


# --------------------------------------------------------------------------- MedMNIST

_MEDMNIST_URL = "https://zenodo.org/records/10519652/files/{}?download=1"
_MEDMNIST_SIZES = (28, 64, 128, 224)

# {set: {"classes": names, "md5": {pixels: of the published file, medmnist 3.0.2}}}
MEDMNIST_JSON = Path(__file__).resolve().parent.parent / "data" / "medmnist.json"
_SPLITS = ("train", "val", "test")
_NPZ_ERRORS = (  # raised by np.load for empty, cut, altered or other kinds of files
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    zipfile.BadZipFile,
    zlib.error,
)


def load_medmnist(
    name: str, root: str | Path = "data/cache", *, size: int = 28, download: bool = True
) -> Arrays:
    """Load a 2-D MedMNIST v2 set, e.g. "pneumoniamnist" (Yang et al. 2023).

    root: a folder that holds `<name>.npz` (28 pixels) or `<name>_<size>.npz`, to which
    the file is downloaded if it is not there; or the .npz file itself, read as it is.
    A file in a folder is compared with the published MD5; if it differs, a UserWarning
    says so and it is used. size: pixels, 28, 64, 128 or 224.

    Returns all images, training, validation and test rows in this order: hospitals are
    made by dividing them anew. Raises FileNotFoundError if the file is neither there
    nor downloadable, and ValueError if it is damaged or of another set.
    """
    about = _medmnist_set(name)
    if size not in _MEDMNIST_SIZES:
        raise ValueError(f"size must be one of {_MEDMNIST_SIZES}, got {size}")
    path = Path(root)
    file_name = f"{name}.npz" if size == 28 else f"{name}_{size}.npz"
    url = _MEDMNIST_URL.format(file_name)
    if path.suffix != ".npz":
        path = path / file_name
        md5 = about["md5"][str(size)]
        if path.is_file():
            _warn_if_altered(path, md5)
        elif download:
            _download(url, path, md5)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.absolute()} does not exist; save {url} there, or pass a folder and "
            "download=True"
        )
    x, y = _read_medmnist(path, size)
    classes = tuple(about["classes"])
    if y.min() < 0 or y.max() >= len(classes):
        found = f"{path} has labels {y.min()}..{y.max()}"
        raise ValueError(
            f"{found}, but {name} has {len(classes)} classes: another set?"
        )
    return Arrays(x, y, classes)


def _medmnist_set(name: str) -> dict[str, Any]:
    if name == "chestmnist":
        raise ValueError(
            "chestmnist has several labels per image, which class indices cannot hold; "
            "use pneumoniamnist for chest radiographs with one label"
        )
    known = json.loads(MEDMNIST_JSON.read_text(encoding="utf-8"))
    if name not in known:
        raise ValueError(f"unknown set {name!r}; choose from {sorted(known)}")
    return known[name]


def _warn_if_altered(path: Path, md5: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.md5(usedforsecurity=False)
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    if digest.hexdigest() != md5:
        warnings.warn(
            f"{path} is not the published file: MD5 {digest.hexdigest()}, published "
            f"{md5}. It is used as it is; delete it to download it anew",
            stacklevel=3,
        )


def _download(url: str, path: Path, md5: str) -> None:
    """Fetch url to path, or leave nothing there."""
    from torchvision.datasets.utils import download_url

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a folder of its own, so that a broken download never gets the final name.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as part:
            download_url(url, part, filename=path.name, md5=md5)
            os.replace(Path(part, path.name), path)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"{path.absolute()} does not exist and {url} could not be downloaded with "
            f"MD5 {md5} ({error}). Fetch it on a machine with a network and save it "
            "there, or pass root=<the .npz file>"
        ) from error


def _read_medmnist(path: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, size, size(, 3)] and labels int64 [N] of all three splits."""
    keys = [f"{s}_{part}" for part in ("images", "labels") for s in _SPLITS]
    try:
        # Opened here, because np.load leaves a broken file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            found = archive.files
            arrays = [archive[key] for key in keys if key in found]
    except _NPZ_ERRORS as error:
        raise ValueError(
            f"{path} is damaged or not an .npz file of plain arrays ({error}); delete "
            "it to download it anew"
        ) from error
    if len(arrays) < len(keys):
        raise ValueError(f"{path} has arrays {found}; a MedMNIST file has {keys}")
    images, labels = arrays[:3], arrays[3:]
    for split, x, y in zip(_SPLITS, images, labels, strict=True):
        _check_split(path, split, x, y, size)
    if len({x.shape[1:] for x in images}) > 1:
        raise ValueError(f"{path} mixes grey and colour: {[x.shape for x in images]}")
    if sum(map(len, images)) == 0:
        raise ValueError(f"{path} holds no image; delete it to download it anew")
    y = np.concatenate([part.reshape(-1) for part in labels])
    return np.concatenate(images), y.astype(np.int64)


def _check_split(
    path: Path, split: str, x: np.ndarray, y: np.ndarray, size: int
) -> None:
    where = f"{path}: {split}_"
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.shape[3:] not in ((), (3,)):
        raise ValueError(
            f"{where}images must be uint8 [N, {size}, {size}] or "
            f"[N, {size}, {size}, 3], got {x.dtype} {list(x.shape)}"
        )
    if x.shape[1:3] != (size, size):
        raise ValueError(
            f"{where}images are {x.shape[1]} x {x.shape[2]} pixels, not {size} x "
            f"{size}; pass size={x.shape[1]} or the right file"
        )
    if y.dtype.kind not in "iu" or y.shape not in ((len(x),), (len(x), 1)):
        raise ValueError(
            f"{where}labels must be integers [{len(x)}, 1], one per image, got "
            f"{y.dtype} {list(y.shape)}"
        )


# ---------------------------------------------------------------------- your own tables


def read_tables(pattern: str) -> dict[str, dict[str, np.ndarray]]:
    """Read a CSV file of numbers per hospital: {file's name: {column: float64 [N]}}.

    pattern: such as "tables/*.csv". Rows with an empty cell are left out. Raises
    ValueError, naming file, row and column, for text and for infinite numbers, for
    other columns than in the first file, and if no file or no whole row is found.
    """
    tables: dict[str, dict[str, np.ndarray]] = {}
    header: list[str] = []
    for path in sorted(map(Path, glob(pattern))):
        with path.open(newline="", encoding="utf-8-sig") as file:
            names, *lines = list(csv.reader(file)) or [[]]
        header = header or names
        if sorted(names) != sorted(header) or len({*names}) != len(names):
            differ = sorted({*names} ^ {*header})
            raise ValueError(f"{path} has columns {names}, others differ in {differ}")
        rows = [_numbers(path, n, names, line) for n, line in enumerate(lines, 2)]
        whole = np.array([row for row in rows if not np.isnan(row).any()])
        if not len(whole):
            raise ValueError(f"{path}: none of {len(rows)} rows is complete")
        columns = dict(zip(names, whole.T, strict=True))
        tables[path.stem] = {name: columns[name] for name in header}
    if not tables:
        raise ValueError(f"no file is named {pattern}")
    return tables


def _numbers(path: Path, row: int, names: list[str], cells: list[str]) -> list[float]:
    if len(cells) != len(names):
        raise ValueError(f"{path}, row {row}: {len(cells)} cells for {len(names)}")
    values = []
    for name, cell in zip(names, cells, strict=True):
        try:
            values.append(float(cell) if cell.strip() else math.nan)
        except ValueError:
            values.append(math.inf)
        if math.isinf(values[-1]):
            raise ValueError(
                f"{path}, row {row}, column {name!r}: not a number; give numbers, a "
                "category as columns of 0 and 1, and leave the cell empty if missing"
            )
    return values


# ---------------------------------------------------------------------- heart disease

HEART_DISEASE_CSV = (
    Path(__file__).resolve().parent.parent / "data" / "heart_disease.csv"
)

_HEART_FEATURES = (
    "age",
    "sex_male",
    "resting_bp",
    "cholesterol",
    "fasting_sugar_high",
    "max_heart_rate",
    "exercise_angina",
    "st_depression",
    "pain_atypical",
    "pain_non_anginal",
    "pain_none",
    "ecg_st_t",
    "ecg_lv_hypertrophy",
)


def load_heart_disease(
    path: str | Path = HEART_DISEASE_CSV, *, complete_only: bool = True
) -> Arrays:
    """Load the heart-disease records of four real hospitals (Janosi et al. 1988).

    complete_only: leave out rows with a missing value, as FLamby does (740 of 920 rows
    stay); False keeps them, with NaN in x. Returns x float32 [N, 13], in the units of
    `data/README.md`, neither scaled nor imputed: learn that inside each hospital, or
    from federated statistics. y: 1 = a coronary artery narrowed by more than half.

    Raises FileNotFoundError for a missing file, ValueError for a bad cell, naming it.
    """
    site, table = _read_heart_table(Path(path))
    if complete_only:
        complete = ~np.isnan(table).any(axis=1)
        if not complete.any():
            raise ValueError(f"{path}: none of {len(table)} rows is complete; check it")
        site, table = site[complete], table[complete]
    return Arrays(
        x=np.ascontiguousarray(table[:, :-1]),
        y=table[:, -1].astype(np.int64),
        classes=("no disease", "disease"),
        site=site,
        features=_HEART_FEATURES,
    )


def _read_heart_table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Hospitals [N], and features and label float32 [N, 14]."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.absolute()} does not exist; pass path=, or copy heart_disease.csv "
            "from the project's data folder (source: UCI, doi 10.24432/C52P4X)"
        )
    # Undecodable bytes become odd letters, which the checks below report.
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        header, *lines = list(csv.reader(file)) or [[]]
    columns = ["site", *_HEART_FEATURES, "disease"]
    if header != columns:
        raise ValueError(f"{path} has columns {header}, expected {columns}")
    if not lines:
        raise ValueError(f"{path} has no rows below its header; copy the file anew")
    rows = [_heart_row(f"{path}, row {n}", line) for n, line in enumerate(lines, 2)]
    return np.array([line[0] for line in lines]), np.array(rows, np.float32)


def _heart_row(where: str, line: list[str]) -> list[float]:
    """Features and label of one line of the table; NaN for an empty cell."""
    if len(line) != len(_HEART_FEATURES) + 2:
        raise ValueError(
            f"{where}: {len(line)} cells, expected {len(_HEART_FEATURES) + 2}; is a "
            "comma missing?"
        )
    site, *cells, disease = line
    if not site.strip():
        raise ValueError(f"{where}, column 'site': empty; name the hospital")
    if disease not in ("0", "1"):
        raise ValueError(f"{where}, column 'disease': {disease!r}; give 0 or 1")
    values = []
    for column, text in zip(_HEART_FEATURES, cells, strict=True):
        try:
            values.append(float(text) if text else math.nan)
        except ValueError:
            values.append(math.inf)
        if math.isinf(values[-1]) or (text and math.isnan(values[-1])):
            raise ValueError(
                f"{where}, column {column!r}: {text!r} is not a number; leave the cell "
                "empty if it is missing"
            )
    return [*values, float(disease)]
