"""Images of one's own: folders, DICOM, damage, one by one or in memory."""

import numpy as np
import pytest
import torch
from PIL import Image

from fl_helpers.aggregation import weighted_average
from fl_helpers.images import (
    Augmented,
    ImageFiles,
    index_images,
    load_image_folder,
    read_dicom,
)
from fl_helpers.models import small_cnn
from fl_helpers.silos import Rows, Silo, make_silos, partition_by_site, to_tensor
from fl_helpers.simulation import Execution, Terms, run_rounds
from fl_helpers.training import sgd_client

# --------------------------------------------------------------------- image folders


def save_image(path, level=0, shape=(6, 8), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, shape[::-1], level).save(path)
    return path


@pytest.fixture
def tree(tmp_path):
    """Two hospitals; images are named so that creation order is not sorted order."""
    root = tmp_path / "images"
    for number, name in enumerate(
        ["South/sick/b.png", "South/sick/a.PNG", "North/well/2.png", "North/sick/1.bmp"]
    ):
        save_image(root / name, level=10 * number)
    return root


def test_image_folder_is_read_in_sorted_order(tree):
    arrays = load_image_folder(tree)
    assert arrays.x[:, 0, 0].tolist() == [30, 20, 10, 0]
    assert arrays.x.shape == (4, 6, 8)
    assert arrays.classes == ("sick", "well")
    assert arrays.y.tolist() == [0, 1, 0, 0]  # South has no folder `well`: allowed
    assert arrays.site.tolist() == ["North", "North", "South", "South"]


def test_image_folder_colour_and_size(tree):
    save_image(
        tree / "South/well/c.jpg", level=(200, 10, 10), shape=(30, 20), mode="RGB"
    )
    grey = load_image_folder(tree, image_size=5)
    colour = load_image_folder(tree, image_size=5, grayscale=False)
    assert (grey.x.shape, colour.x.shape) == ((5, 5, 5), (5, 5, 5, 3))
    np.testing.assert_allclose(colour.x[-1, 2, 2], (200, 10, 10), atol=4)


def test_image_folder_skips_hidden_files(tree):
    (tree / ".DS_Store").write_text("")
    (tree / "North" / "sick" / ".thumbnail.txt").write_text("")
    (tree / "North" / ".cache").mkdir()
    assert len(load_image_folder(tree)) == 4


def test_image_folder_turns_a_photograph_upright(tmp_path):
    path = tmp_path / "A" / "skin" / "photo.jpg"
    path.parent.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    Image.new("L", (20, 10)).save(path, exif=exif)
    assert load_image_folder(tmp_path).x.shape == (1, 20, 10)


def bad_trees(root):
    """Ways to spoil the tree: what to do, and what the message must say."""

    def write(name, contents):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(contents)

    image = (root / "North/sick/1.bmp").read_bytes()
    sixteen_bit = Image.fromarray(np.zeros((6, 8), np.uint16))
    return {
        "no class": (
            lambda: (root / "West").mkdir(),
            ["West has no class folders", "<hospital>/<class>"],
        ),
        "empty class": (
            lambda: (root / "North/unsure").mkdir(),
            ["North/unsure has no images", "remove the folder"],
        ),
        "other file": (
            lambda: write("North/sick/scan.txt", b"DICM"),
            ["North/sick/scan.txt is not an image file", "convert it"],
        ),
        "nested": (
            lambda: (root / "North/sick/patient 7.png").mkdir(),
            ["patient 7.png is a folder where images"],
        ),
        "broken": (
            lambda: write("North/sick/x.png", b"not a picture"),
            ["cannot read", "North/sick/x.png", "remove the file"],
        ),
        "cut": (
            lambda: write("North/sick/x.bmp", image[:-20]),
            ["cannot read", "North/sick/x.bmp"],
        ),
        "two sizes": (
            lambda: save_image(root / "South/sick/z.png", shape=(6, 9)),
            ["North/sick/1.bmp is 8 x 6", "South/sick/z.png is 9 x 6", "image_size"],
        ),
        "case": (
            lambda: save_image(root / "South/Sick/z.png"),
            ["['Sick', 'sick']", "one spelling"],
        ),
        "file link": (
            lambda: (root / "North/sick/l.png").symlink_to(root / "South/sick/b.png"),
            ["North/sick/l.png is a symbolic link", "the files themselves"],
        ),
        "folder link": (
            lambda: (root / "North/link").symlink_to(root / "South/sick"),
            ["North/link is a symbolic link"],
        ),
        "16 bit": (
            lambda: sixteen_bit.save(root / "North/sick/deep.png"),
            ["North/sick/deep.png", "I;16", "8-bit", "window"],
        ),
        "film": (
            lambda: Image.new("L", (8, 6)).save(
                root / "North/sick/film.tif",
                save_all=True,
                append_images=[Image.new("L", (8, 6))],
            ),
            ["North/sick/film.tif has 2 frame(s)"],
        ),
    }


@pytest.mark.parametrize(
    "kind",
    "no class,empty class,other file,nested,broken,cut,two sizes,case,file link,"
    "folder link,16 bit,film".split(","),
)
def test_image_folder_refuses_a_bad_tree(tree, kind):
    spoil, expected = bad_trees(tree)[kind]
    assert len(load_image_folder(tree)) == 4
    spoil()
    with pytest.raises(ValueError) as caught:
        load_image_folder(tree)
    for words in expected:
        assert words in str(caught.value).replace("\\", "/")


def test_image_folder_missing_or_without_hospitals(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nowhere is not a folder; pass the one"
    ):
        load_image_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no hospital folders; expected"):
        load_image_folder(tmp_path)


# ------------------------------------------------------------------------------ DICOM


def write_dicom(path, pixels, *, kind="MONOCHROME2", slope=1, intercept=0, window=None):
    """A grey or colour image without compression."""
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom, an extra")
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    uid = generate_uid()
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = uid
    dataset.PatientName = "Doe^Jane"
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    if window:
        dataset.WindowCenter, dataset.WindowWidth = window
    bits = 8 * pixels.dtype.itemsize
    dataset.set_pixel_data(pixels, kind, bits)
    dataset.save_as(path, enforce_file_format=True)
    return path


RAMP = np.array([[0, 1000], [2000, 4000]], np.uint16)


def test_dicom_window_is_in_the_units_of_the_file(tmp_path):
    # value = pixel - 1000: -1000, 0, 1000, 3000; the window -1000..1000 maps to 0..255
    path = write_dicom(tmp_path / "a.dcm", RAMP, intercept=-1000)
    grey = read_dicom(path, window=(-1000, 1000))
    assert grey.dtype == np.uint8 and grey.tolist() == [[0, 128], [255, 255]]
    with pytest.raises(ValueError, match=r"\(lowest, highest\), got \(1, 1\)"):
        read_dicom(path, window=(1, 1))


def test_dicom_without_window_takes_the_files_own_or_the_whole_range(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", RAMP)
    assert read_dicom(path).tolist() == [[0, 64], [128, 255]]
    # centre 1000, width 2001 (DICOM PS3.3 C.11.2.1.2): 0 and less dark, 2000 bright
    path = write_dicom(tmp_path / "b.dcm", RAMP, window=(1000.5, 2001))
    assert read_dicom(path).tolist() == [[0, 128], [255, 255]]


def test_dicom_monochrome1_is_turned_over(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", RAMP, kind="MONOCHROME1")
    assert read_dicom(path, window=(0, 4000)).tolist() == [[255, 191], [128, 0]]


def test_dicom_flat_image_is_black_and_not_a_division_by_zero(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.full((2, 2), 7, np.uint16))
    assert (read_dicom(path) == 0).all()


def test_dicom_refuses_what_is_no_single_grey_image(tmp_path):
    colour = write_dicom(tmp_path / "c.dcm", np.zeros((2, 2, 3), np.uint8), kind="RGB")
    with pytest.raises(ValueError, match="RGB pixels"):
        read_dicom(colour)
    text = tmp_path / "text.dcm"
    text.write_text("not a DICOM file")
    with pytest.raises(ValueError, match="no image that can be read"):
        read_dicom(text)


def test_dicom_reads_files_of_real_devices():
    """Small files inside the pydicom package; no download."""
    pytest.importorskip("pydicom", reason="needs pydicom, an extra")
    from pydicom.data import get_testdata_file

    for name, shape in {"CT_small.dcm": (128, 128), "MR_small.dcm": (64, 64)}.items():
        grey = read_dicom(get_testdata_file(name, download=False))
        assert grey.shape == shape and grey.max() > 200 > 50 > grey.min()
    with pytest.raises(ValueError, match="RGB"):
        read_dicom(get_testdata_file("SC_rgb_small_odd.dcm", download=False))


def test_dicom_gives_one_frame_or_all(tmp_path):
    film = np.stack([RAMP, RAMP[::-1]])
    path = write_dicom(tmp_path / "a.dcm", film)
    assert read_dicom(path, window=(0, 4000)).shape == (2, 2, 2)
    second = read_dicom(path, window=(0, 4000), frame=1)
    assert second.tolist() == [[128, 255], [0, 64]]


# ---- an index, and one image at a time


@pytest.fixture
def archive(tmp_path):
    """Two hospitals' DICOM: signed, MONOCHROME1, rescaled, and a film of two frames."""
    folder, size = tmp_path / "archive", (8, 8)
    ramp = np.linspace(0, 4000, 64).reshape(size)
    for where in ("North/well", "North/sick", "South/well", "South/sick"):
        (folder / where).mkdir(parents=True)
    write_dicom(folder / "North/well/1.dcm", ramp.astype(np.uint16))
    inverse = (4000 - ramp).astype(np.uint16)
    write_dicom(folder / "North/sick/2.dcm", inverse, kind="MONOCHROME1")
    half = (ramp / 2 + 500).astype(np.int16)  # value = 2 * pixel - 1000
    write_dicom(folder / "South/well/1.dcm", half, slope=2, intercept=-1000)
    film = np.stack([ramp, ramp.T]).astype(np.uint16)
    write_dicom(folder / "South/sick/3.dcm", film)
    return folder


def test_a_whole_folder_of_dicom_becomes_the_same_picture(archive):
    index = index_images(archive)
    assert index.site.tolist() == ["North"] * 2 + ["South"] * 3
    assert index.classes == ("sick", "well") and index.y.tolist() == [0, 1, 0, 0, 1]
    assert index.frames.tolist() == [-1, -1, 0, 1, -1]
    assert (index.sizes == 8).all()
    files = ImageFiles(index, window=(0, 4000))
    ramp = 255 * np.linspace(0, 1, 64).reshape(8, 8)
    wanted = [255 - (255 - ramp), ramp, ramp, ramp.T, ramp]
    for row, picture in enumerate(wanted):  # MONOCHROME1 of 4000 - ramp is ramp again
        assert np.abs(files.pixels(row).astype(int) - picture).max() <= 1.01
    x, y = files[3]
    assert x.shape == (1, 8, 8) and x.dtype == torch.float32 and y == 0
    assert torch.equal(x, to_tensor(files.pixels(3)[None])[0])


def test_patients_come_from_dicom_or_a_function(archive, tree):
    for path in archive.glob("*/*/*.dcm"):
        set_patient(path, f"P{path.stem}")
    index = index_images(archive)
    assert index.patient.tolist() == [
        "North/P2", "North/P1", "South/P3", "South/P3", "South/P1"
    ]  # fmt: skip
    assert len(set(index_images(tree).patient)) == 4  # each file its own
    one = index_images(tree, patient_of=lambda path: path.parent.name)
    assert set(one.patient) == {"North/sick", "North/well", "South/sick"}


def set_patient(path, name):
    import pydicom

    dataset = pydicom.dcmread(path)
    dataset.PatientID = name
    dataset.save_as(path)


def test_an_index_reads_what_the_loader_in_memory_reads(tree):
    index, images = index_images(tree), load_image_folder(tree, image_size=5)
    files = ImageFiles(index, image_size=5)
    assert np.array_equal(images.y, index.y) and np.array_equal(images.site, index.site)
    assert torch.equal(
        torch.stack([files[k][0] for k in range(4)]), to_tensor(images.x)
    )
    colour = ImageFiles(index, image_size=5, grayscale=False)
    assert colour[0][0].shape == (3, 5, 5)


@pytest.mark.parametrize("kind", [".png", ".jpg", ".dcm"])
def test_a_file_that_was_cut_short_stops_or_is_skipped_and_named(tree, kind):
    path = tree / "North/sick" / f"cut{kind}"
    if kind == ".dcm":
        write_dicom(path, np.zeros((6, 8), np.uint16))
    else:
        save_image(path)
    assert len(index_images(tree)) == 5
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"cannot read .*cut{kind}"):
        index_images(tree)
    with pytest.warns(UserWarning, match=f"1 damaged files left out: .*cut{kind}"):
        index = index_images(tree, damaged="skip")
    assert len(index) == 4 and list(index.damaged) == [path]
    with pytest.raises(ValueError, match="'stop' or 'skip', got 'ignore'"):
        index_images(tree, damaged="ignore")


def test_damage_inside_is_found_by_a_thorough_look_or_when_it_is_read(tree):
    path = tree / "North/sick/z.png"
    noise = np.random.default_rng(0).integers(256, size=(6, 8), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    spoiled = bytearray(path.read_bytes())
    spoiled[spoiled.index(b"IDAT") + 8] ^= 0xFF
    path.write_bytes(spoiled)
    index = index_images(tree)  # header and end are whole
    row = index.paths.index(path)
    with pytest.raises(ValueError, match="cannot read .*z.png"):
        ImageFiles(index)[row]
    with pytest.raises(ValueError, match="cannot read .*z.png"):
        index_images(tree, thorough=True)


def test_images_that_are_kept_are_read_once_and_never_changed(tree):
    index = index_images(tree)
    files, again = (ImageFiles(index, image_size=5, keep=k) for k in (True, False))
    for path in index.paths:
        if path.suffix == ".bmp":
            row = index.paths.index(path)
            before = files[row][0]
            files.pixels(row)[:] = 77  # the reader's copy
            path.unlink()
            assert torch.equal(files[row][0], before)
            with pytest.raises(ValueError, match="cannot read"):
                again[row]


def test_augmentation_is_for_training_only(tree):
    files = ImageFiles(index_images(tree))
    flipped = Augmented(files, lambda x: x.flip(-1))
    assert torch.equal(flipped[0][0], files[0][0].flip(-1)) and len(flipped) == 4
    assert flipped[0][1] == files[0][1] and torch.equal(flipped.y, files.y)


def test_silos_of_an_index_stay_on_the_disk(archive):
    for path in archive.glob("*/*/*.dcm"):
        set_patient(path, path.stem)
    index = index_images(archive)
    files = ImageFiles(index, window=(0, 4000))
    parts = partition_by_site(index.site)
    silos = make_silos(files, index.y, parts, test_share=0.5, seed=0,
                       patients=index.patient)  # fmt: skip
    north, south = silos
    assert len(north.train) == len(north.test) == 1
    assert south.name == "South" and {len(south.train), len(south.test)} == {1, 2}
    assert sorted([*south.train.y.tolist(), *south.test.y.tolist()]) == [0, 0, 1]


def test_a_damaged_file_costs_its_own_hospital_only(tmp_path):
    """The index finds it whole; the message names hospital, file and remedy."""
    rng = np.random.default_rng(0)
    for name in ("East", "North", "South"):
        for k in range(8):
            path = tmp_path / name / ("sick", "well")[k % 2] / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(16, 16), dtype=np.uint8)).save(path)
    spoiled = bytearray((tmp_path / "North/sick/2.png").read_bytes())
    spoiled[spoiled.index(b"IDAT") + 8] ^= 0xFF
    (tmp_path / "North/sick/2.png").write_bytes(spoiled)
    index = index_images(tmp_path)
    files, parts = ImageFiles(index), partition_by_site(index.site)
    silos = [Silo(name, Rows(files, rows, files.y[rows]), None)
             for name, rows in parts.items()]  # fmt: skip
    client = sgd_client(lambda: small_cnn(2), epochs=1, lr=0.01, batch_size=4)
    history = run_rounds(
        small_cnn(2).state_dict(), silos, client.update, weighted_average, rounds=2,
        seed=0, terms=Terms(quorum=2), execution=Execution(progress=False),
    )  # fmt: skip
    for record in history.rounds:
        assert record["silos"] == ["East", "South"]
        assert record["missing"].keys() == {"North"}
        told = record["missing"]["North"].replace("\\", "/")
        assert "silo 'North', examples" in told
        assert "North/sick/2.png" in told and "replace or remove the file" in told
