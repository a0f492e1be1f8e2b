"""Data sets: MedMNIST, heart disease."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_helpers import data
from fl_helpers.data import (
    HEART_DISEASE_CSV,
    Arrays,
    drop_duplicates,
    load_heart_disease,
    load_medmnist,
    read_tables,
)

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
CARDS = (ROOT / "data" / "README.md").read_text(encoding="utf-8")


def shared_file(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    return path


# ---------------------------------------------------------------------------- Arrays

GOOD = {
    "x": np.zeros((2, 3), np.float32),
    "y": np.array([0, 1]),
    "classes": ("no", "yes"),
    "site": np.array(["A", "B"]),
    "features": ("a", "b", "c"),
}


def test_arrays_has_a_length_and_takes_grey_colour_and_tables():
    assert len(Arrays(**GOOD)) == 2
    for shape in ((2, 4, 4), (2, 4, 5, 3)):
        image = {"x": np.zeros(shape, np.uint8), "features": ()}
        assert len(Arrays(**{**GOOD, **image, "site": None})) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 3))}, "float32.*got float64"),
        ({"x": np.zeros((2, 4, 4, 4), np.uint8)}, r"got uint8 \[2, 4, 4, 4\]"),
        ({"x": np.zeros((0, 3), np.float32)}, "empty.*at least one row"),
        ({"y": np.array([0])}, r"y must be int64 \[2\].*\[1\]"),
        ({"y": np.array([0, 1], np.int32)}, "int64.*got int32"),
        ({"y": np.array([0, 2])}, "0..1 for 2 classes, got 0..2"),
        ({"y": np.array([-1, 0])}, "got -1..0"),
        ({"classes": ("no", "no")}, "different names"),
        ({"classes": ()}, "different names"),
        ({"site": np.array(["A"])}, r"site must be str \[2\]"),
        ({"site": np.array([1, 2])}, "site must be str.*int64"),
        ({"features": ("a", "b")}, "2 feature names"),
        ({"x": np.array([[0, 0, 0], [0, np.inf, 0]], "f4")}, "row 1, column 'b'"),
    ],
)
def test_arrays_refuses_parts_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        Arrays(**{**GOOD, **change})


def test_drop_duplicates_keeps_the_first_and_no_contradiction():
    rows = np.array([10, 20, 10, 30, 20, 40, 10], np.uint8)
    arrays = Arrays(
        x=np.tile(rows[:, None, None], (1, 2, 2)),
        y=np.array([0, 1, 0, 1, 0, 1, 0]),  # 20 is labelled 1 and 0: both go
        classes=("no", "yes"),
        site=np.array(list("ABCDEFG")),
    )
    kept = drop_duplicates(arrays)
    assert kept.x[:, 0, 0].tolist() == [10, 30, 40]
    assert kept.y.tolist() == [0, 1, 1]
    assert kept.site.tolist() == ["A", "D", "F"]
    assert len(arrays) == 7


def test_drop_duplicates_on_tables_and_radiographs():
    x = np.array([[1, np.nan], [1, np.nan], [2, 0]], np.float32)
    table = Arrays(x, np.array([0, 0, 1]), ("no", "yes"), None, ("a", "b"))
    assert len(drop_duplicates(table)) == 2  # NaN equals NaN: the bytes are the same
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1).repeat(8, 1).repeat(8, 2)
    radiographs = Arrays(images, np.zeros(40, np.int64), ("normal",))
    assert len(drop_duplicates(radiographs)) == 40


# -------------------------------------------------------------------------- MedMNIST


def write_npz(path, *, classes=2, size=28, colour=False, **change):
    """A file in MedMNIST's format: 6 + 3 + 2 images, each as bright as its number."""
    arrays, first = {}, 0
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        number = np.arange(first, first + count, dtype=np.uint8)
        shape = (count, size, size, 3) if colour else (count, size, size)
        images = number.reshape(-1, *[1] * (len(shape) - 1))
        arrays[f"{split}_images"] = np.broadcast_to(images, shape)
        arrays[f"{split}_labels"] = (number % classes)[:, None]
        first += count
    arrays = {key: a for key, a in (arrays | change).items() if a is not None}
    np.savez_compressed(path, **arrays)
    return path


def test_real_pneumoniamnist_has_the_published_counts():
    arrays = load_medmnist("pneumoniamnist", shared_file("pneumoniamnist.npz"))
    assert arrays.x.shape == (4708 + 524 + 624, 28, 28)
    assert arrays.classes == ("normal", "pneumonia")
    for rows, counts in (  # Yang et al. 2023: train, validation, test
        (slice(0, 4708), [1214, 3494]),
        (slice(4708, 5232), [135, 389]),
        (slice(5232, None), [234, 390]),
    ):
        assert np.bincount(arrays.y[rows]).tolist() == counts
    kept = drop_duplicates(arrays)
    assert (len(arrays) - len(kept), len(kept)) == (29, 5827)
    assert "29" in CARDS and "5,827" in CARDS


def test_medmnist_joins_train_val_test_in_this_order(tmp_path):
    arrays = load_medmnist("breastmnist", write_npz(tmp_path / "mine.npz"))
    assert arrays.x[:, 0, 0].tolist() == list(range(11))
    assert arrays.y.tolist() == [k % 2 for k in range(11)]
    assert (arrays.x.dtype, arrays.y.dtype) == (np.uint8, np.int64)
    assert arrays.classes == ("malignant", "normal, benign")
    assert arrays.site is None


def test_medmnist_reads_colour_and_larger_images(tmp_path):
    path = write_npz(tmp_path / "blood.npz", classes=8, size=64, colour=True)
    assert load_medmnist("bloodmnist", path, size=64).x.shape == (11, 64, 64, 3)


NUM_CLASSES = {  # Yang et al. 2023, table 2
    "pathmnist": 9,
    "dermamnist": 7,
    "octmnist": 4,
    "pneumoniamnist": 2,
    "retinamnist": 5,
    "breastmnist": 2,
    "bloodmnist": 8,
    "tissuemnist": 8,
    "organamnist": 11,
    "organcmnist": 11,
    "organsmnist": 11,
}


@pytest.mark.parametrize("name", NUM_CLASSES)
def test_every_set_has_its_classes_and_a_card(name, tmp_path):
    path = write_npz(tmp_path / "x.npz", classes=min(11, NUM_CLASSES[name]))
    assert len(load_medmnist(name, path).classes) == NUM_CLASSES[name]
    assert re.search(rf"\| {name} \|.*\| {NUM_CLASSES[name]} \|", CARDS)


def test_every_published_md5_is_there_once():
    known = json.loads(data.MEDMNIST_JSON.read_text())
    assert known.keys() == NUM_CLASSES.keys()
    sums = [
        known[name]["md5"][str(size)] for name in known for size in (28, 64, 128, 224)
    ]
    assert len(set(sums)) == 4 * len(NUM_CLASSES)
    assert all(re.fullmatch("[0-9a-f]{32}", m) for m in sums)
    assert "28209eda62fecd6e6a2d98b1501bb15f" in sums  # PneumoniaMNIST, 28 pixels


@pytest.fixture
def downloads(monkeypatch):
    """Replace torchvision's download by a function, and list the calls."""
    from torchvision.datasets import utils

    calls = []

    def install(write):
        def download_url(url, root, filename=None, md5=None):
            calls.append((url, filename, md5))
            write(Path(root, filename))

        monkeypatch.setattr(utils, "download_url", download_url)
        return calls

    return install


def test_medmnist_is_downloaded_once_into_the_folder(tmp_path, downloads, monkeypatch):
    calls = downloads(write_npz)
    cache = tmp_path / "new" / "cache"
    assert len(load_medmnist("pneumoniamnist", cache)) == 11
    url = "https://zenodo.org/records/10519652/files/pneumoniamnist.npz?download=1"
    assert calls == [(url, "pneumoniamnist.npz", "28209eda62fecd6e6a2d98b1501bb15f")]
    assert [p.name for p in cache.iterdir()] == ["pneumoniamnist.npz"]
    with pytest.warns(UserWarning, match="not the published file"):
        load_medmnist("pneumoniamnist", cache)  # read again, not fetched again
    assert len(calls) == 1


def test_medmnist_size_chooses_file_and_md5(tmp_path, downloads):
    calls = downloads(lambda path: write_npz(path, size=64))
    load_medmnist("pneumoniamnist", tmp_path, size=64)
    assert calls[0][1:] == ("pneumoniamnist_64.npz", "8f4eceb4ccffa70c672198ea285246c6")


@pytest.mark.parametrize(
    "error",
    [OSError("no route to host"), RuntimeError("File not found or corrupted.")],
)
def test_a_broken_download_leaves_nothing_behind(tmp_path, downloads, error):
    def half(path):
        path.write_bytes(b"PK half of a file")
        raise error

    downloads(half)
    with pytest.raises(FileNotFoundError) as caught:
        load_medmnist("octmnist", tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "octmnist.npz") in message
    assert "zenodo.org/records/10519652/files/octmnist.npz" in message
    assert str(error) in message and "root=" in message
    assert list(tmp_path.iterdir()) == []


def test_medmnist_without_file_and_without_download(tmp_path, downloads):
    calls = downloads(write_npz)
    for root in (tmp_path, tmp_path / "octmnist.npz"):
        with pytest.raises(
            FileNotFoundError, match=r"octmnist\.npz does not exist"
        ) as e:
            load_medmnist("octmnist", root, download=root.suffix == ".npz")
        assert "zenodo.org" in str(e.value) and "download=True" in str(e.value)
    assert not calls  # a file named by the user is never fetched


def test_an_altered_file_in_a_folder_is_used_with_a_warning(tmp_path):
    path = write_npz(tmp_path / "pneumoniamnist.npz")
    with pytest.warns(UserWarning) as caught:
        assert len(load_medmnist("pneumoniamnist", tmp_path)) == 11
    message = str(caught[0].message)
    assert str(path) in message and "28209eda62fecd6e6a2d98b1501bb15f" in message
    assert len(re.findall("[0-9a-f]{32}", message)) == 2
    assert "delete it to download it anew" in message
    assert caught[0].filename == __file__
    load_medmnist("pneumoniamnist", path)  # named as a file: no check, no warning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_labels": None}, "has arrays .*val_labels"),
        ({"train_images": np.zeros((6, 28, 28), "f4")}, "train_images must be uint8"),
        ({"val_images": np.zeros((3, 28), np.uint8)}, "val_images must be uint8"),
        (
            {"val_images": np.zeros((3, 28, 28, 4), np.uint8)},
            "val_images must be uint8",
        ),
        ({"val_images": np.zeros((3, 28, 28, 3), np.uint8)}, "mixes grey and colour"),
        ({"test_images": np.zeros((2, 64, 64), np.uint8)}, "64 x 64.*pass size=64"),
        (
            {"test_labels": np.zeros((3, 1), "u1")},
            r"test_labels must be integers \[2, 1",
        ),
        ({"test_labels": np.zeros((2, 14), "u1")}, r"test_labels .*\[2, 14\]"),
        ({"test_labels": np.zeros((2, 1))}, "test_labels must be integers.*float64"),
        ({"test_labels": np.full((2, 1), 2)}, "labels 0..2, but pneumoniamnist has 2"),
        ({"test_labels": np.full((2, 1), -1)}, "labels -1..1"),
        (
            {"test_labels": np.array([[1], [None]])},
            "damaged or not an .npz",
        ),  # a pickle
    ],
)
def test_medmnist_refuses_a_file_with_other_contents(tmp_path, change, message):
    path = write_npz(tmp_path / "wrong.npz", **change)
    with pytest.raises(ValueError, match=message) as caught:
        load_medmnist("pneumoniamnist", path)
    assert str(path) in str(caught.value)


def test_medmnist_refuses_an_empty_set(tmp_path):
    none = {
        f"{s}_images": np.zeros((0, 28, 28), "u1") for s in ("train", "val", "test")
    }
    none |= {f"{s}_labels": np.zeros((0, 1), "u1") for s in ("train", "val", "test")}
    with pytest.raises(ValueError, match="holds no image; delete it"):
        load_medmnist("pneumoniamnist", write_npz(tmp_path / "none.npz", **none))


@pytest.mark.parametrize("kind", ["empty", "text", "half", "flipped", "npy"])
def test_medmnist_refuses_a_damaged_file(tmp_path, kind):
    path = write_npz(tmp_path / "damaged.npz")
    whole = path.read_bytes()
    if kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        middle = whole[:200] + bytes(40) + whole[240:]
        contents = {"empty": b"", "text": b"<html>", "half": whole[:900]}
        path.write_bytes(contents.get(kind, middle))
    with pytest.raises(ValueError, match="is damaged or not.*delete it") as caught:
        load_medmnist("pneumoniamnist", path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "chestmnist"}, "several labels per image.*use pneumoniamnist"),
        (
            {"name": "PneumoniaMNIST"},
            "unknown set 'PneumoniaMNIST'; .*'pneumoniamnist'",
        ),
        ({"name": "octmnist", "size": 32}, r"\(28, 64, 128, 224\), got 32"),
    ],
)
def test_medmnist_refuses_other_names_and_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_medmnist(**arguments, download=False)


# --------------------------------------------------------------------- heart disease

# Hospital: rows of the UCI files, rows without a missing value (du Terrail et al. 2022,
# Fed-Heart-Disease).
PUBLISHED = {
    "Cleveland": (303, 303),
    "Hungary": (294, 261),
    "Switzerland": (123, 46),
    "VA Long Beach": (200, 130),
}


def test_heart_disease_has_the_published_rows():
    complete, every = load_heart_disease(), load_heart_disease(complete_only=False)
    for site, (rows, complete_rows) in PUBLISHED.items():
        assert (every.site == site).sum() == rows
        assert (complete.site == site).sum() == complete_rows
    assert (complete.x.shape, every.x.shape) == ((740, 13), (920, 13))
    assert set(every.site) == set(PUBLISHED)
    assert not np.isnan(complete.x).any() and np.isnan(every.x).any()
    assert len(complete.features) == 13 and complete.x.dtype == np.float32


def test_heart_disease_values_are_in_clinical_units():
    arrays = load_heart_disease(complete_only=False)
    column = dict(zip(arrays.features, arrays.x.T, strict=True))
    for name in ("sex_male", "fasting_sugar_high", "exercise_angina", "ecg_st_t"):
        assert set(np.unique(column[name][~np.isnan(column[name])])) == {0, 1}
    assert (28, 77) == (column["age"].min(), column["age"].max())
    pain = sum(column[f"pain_{k}"] for k in ("atypical", "non_anginal", "none"))
    assert set(pain) == {0, 1}  # one kind at most; typical angina is the reference
    assert np.nanmax(column["max_heart_rate"]) < 220  # not scaled
    assert (column["cholesterol"][arrays.site == "Switzerland"] == 0).all()


def test_card_of_heart_disease_shows_the_true_label_mix():
    complete, every = load_heart_disease(), load_heart_disease(complete_only=False)
    for site in PUBLISHED:
        cells = [site]
        for arrays in (every, complete):
            y = arrays.y[arrays.site == site]
            cells += [str(len(y)), f"{y.sum()} ({100 * y.mean():.0f} %)"]
        assert f"| {' | '.join(cells)} |" in CARDS


def clean_heart_disease(path):
    """The steps of data/README.md, written out: rows of the committed table."""
    flags = {"True": "1", "TRUE": "1", "False": "0", "FALSE": "0", "": ""}
    with path.open(newline="") as file:
        patients = sorted(csv.DictReader(file), key=lambda r: int(r["id"]))
    for p in patients:
        p["dataset"] = "Hungary" if p["id"] == "304" else p["dataset"]
    for p in sorted(patients, key=lambda r: r["dataset"]):
        numbers = [p[k] for k in ("trestbps", "chol")] + [flags[p["fbs"]], p["thalch"]]
        numbers += [flags[p["exang"]], p["oldpeak"]]
        pain = [
            p["cp"] == k for k in ("atypical angina", "non-anginal", "asymptomatic")
        ]
        ecg = [p["restecg"] == k for k in ("st-t abnormality", "lv hypertrophy")]
        ecg = [str(int(e)) if p["restecg"] else "" for e in ecg]
        row = [p["age"], str(int(p["sex"] == "Male")), *numbers, *map(int, pain), *ecg]
        row.append(int(int(p["num"]) > 0))
        yield p["dataset"], [float(v) if v != "" else None for v in row]


def test_committed_table_follows_from_the_source_by_the_documented_steps():
    expected = list(clean_heart_disease(shared_file("heart_disease_uci.csv")))
    with HEART_DISEASE_CSV.open(newline="") as file:
        _, *lines = csv.reader(file)
    found = [(s, [float(v) if v else None for v in rest]) for s, *rest in lines]
    assert found == expected


def spoiled(tmp_path, **cells):
    """A copy of the table's first rows with cells of row 3 (a line number) replaced."""
    header, *lines = HEART_DISEASE_CSV.read_text().splitlines()[:6]
    row = dict(zip(header.split(","), lines[1].split(","), strict=True)) | cells
    lines[1] = ",".join(row.values())
    path = tmp_path / "heart.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_heart_disease_reads_another_file_and_leaves_out_incomplete_rows(tmp_path):
    path = spoiled(tmp_path, cholesterol="")
    assert len(load_heart_disease(path)) == 4
    kept = load_heart_disease(path, complete_only=False)
    assert np.argwhere(np.isnan(kept.x)).tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"age": "old"}, "row 3, column 'age': 'old' is not a number; .*empty"),
        ({"st_depression": "nan"}, "row 3, column 'st_depression': 'nan'"),
        ({"st_depression": "inf"}, "row 3, column 'st_depression': 'inf'"),
        ({"disease": ""}, "row 3, column 'disease': ''; give 0 or 1"),
        ({"disease": "2"}, "row 3, column 'disease': '2'"),
        ({"site": " "}, "row 3, column 'site': empty; name the hospital"),
        ({"age": "1,2"}, "row 3: 16 cells, expected 15"),
    ],
)
def test_heart_disease_names_the_bad_cell(tmp_path, cells, message):
    path = spoiled(tmp_path, **cells)
    with pytest.raises(ValueError, match=message) as caught:
        load_heart_disease(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "has columns .*expected"),
        (b"age;sex\n1;2\n", "has columns .*age;sex.*expected"),
        (b"PK\x03\x04\xff\xfe", "has columns .*expected"),
    ],
)
def test_heart_disease_refuses_other_files(tmp_path, contents, message):
    path = tmp_path / "other.csv"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=message) as caught:
        load_heart_disease(path)
    assert str(path) in str(caught.value)


def test_heart_disease_without_rows(tmp_path):
    header, first, *_ = HEART_DISEASE_CSV.read_text().splitlines()
    path = tmp_path / "short.csv"
    path.write_text(header + "\n")
    with pytest.raises(ValueError, match="short.csv has no rows.*copy the file anew"):
        load_heart_disease(path)
    path.write_text(header + "\n" + first.replace(",233,", ",,") + "\n")
    with pytest.raises(ValueError, match="short.csv: none of 1 rows is complete"):
        load_heart_disease(path)


def test_heart_disease_missing_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"heart\.csv does not exist") as caught:
        load_heart_disease(tmp_path / "heart.csv")
    assert "10.24432/C52P4X" in str(caught.value) and "path=" in str(caught.value)


# ------------------------------------------------------------------------ copied alone


@pytest.mark.parametrize("name", ["data", "synthetic_cxr"])
def test_a_copied_file_works_alone(tmp_path, name):
    source = (ROOT / "fl_helpers" / f"{name}.py").read_text(encoding="utf-8")
    (tmp_path / f"copied_{name}.py").write_text(source, encoding="utf-8")
    use = {
        "data": "import sys, copied_data as d\n"
        "assert not {'torch', 'torchvision', 'PIL'} & set(sys.modules)\n"
        "try: d.load_heart_disease()\n"
        "except FileNotFoundError as e: assert 'copy heart_disease.csv' in str(e)\n"
        "else: raise SystemExit('found a table that is not there')",
        "synthetic_cxr": "import copied_synthetic_cxr as s\n"
        "assert len(s.synthetic_cxr([3, 2])) == 5",
    }[name]
    subprocess.run([sys.executable, "-c", use], cwd=tmp_path, check=True, timeout=120)


def write_tables(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.csv").write_text(text)
    return str(folder / "*.csv")


def test_a_readers_own_tables_are_read_without_incomplete_rows(tmp_path):
    files = write_tables(
        tmp_path, north="time,event\n3,1\n,0\n5.5,0\n", south="event,time\n1,7\n"
    )
    found = read_tables(files)
    assert [*found] == ["north", "south"]
    assert {k: v.tolist() for k, v in found["north"].items()} == {
        "time": [3, 5.5],
        "event": [1, 0],
    }
    assert [*found["south"]] == ["time", "event"]  # in the first file's order
    assert found["south"]["time"].tolist() == [7]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "no file is named"),
        ({"a": "x,y\n1,Smith\n"}, r"a.csv, row 2, column 'y': not a number"),
        ({"a": "x,y\n1,inf\n"}, r"row 2, column 'y'"),
        (
            {"a": "x,y\n1,2\n", "b": "x,z\n1,2\n"},
            r"b.csv .* in \['y', 'z'\]",
        ),
        ({"a": "x,y\n1,2\n", "b": "x\n1\n"}, r"differ in \['y'\]"),
        ({"a": "x,x\n1,2\n"}, "a.csv has columns"),
        ({"a": "x,y\n1\n"}, "row 2: 1 cells for 2"),
        ({"a": "x,y\n1,\n"}, "none of 1 rows is complete"),
        ({"a": ""}, "none of 0 rows"),
    ],
)
def test_bad_tables_are_named_with_file_row_and_column(tmp_path, texts, message):
    with pytest.raises(ValueError, match=message) as error:
        read_tables(write_tables(tmp_path, **texts))
    assert "Smith" not in str(error.value)
