"""Tests of MNIST, Fashion-MNIST and USPS: the real files compared with other readers, and invalid files."""

import gzip
import struct

import numpy as np
import pytest
from configs import config_of
from draws import drawn
from PIL import Image
from support import raises_argument_error

from jaxmeta.cli import main, sources
from jaxmeta.tasks import (
    fashion_mnist,
    fashion_mnist_images,
    labelled,
    mnist,
    mnist_images,
    usps,
    usps_images,
)

# Counts by digit: USPS as in zip.info.txt; MNIST as published.
USPS = {
    "train": [1194, 1005, 731, 658, 652, 556, 664, 645, 542, 644],
    "test": [359, 264, 198, 166, 200, 160, 170, 147, 166, 177],
}
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.fixture(scope="module")
def real(data_folder):
    for name in ("mnist/t10k-images-idx3-ubyte.gz", "usps/zip.train.gz"):
        if not (data_folder / name).is_file():
            pytest.skip(f"no {name} in {data_folder}")
    return data_folder


# --- the real files -----------------------------------------------------------------------------------


def test_mnist_has_the_images_and_labels_of_its_files(real):
    images, labels = mnist_images(real)
    raw = {
        name: np.frombuffer(
            gzip.decompress((real / "mnist" / f"t10k-{name}-ubyte.gz").read_bytes()), np.uint8
        )
        for name in ("images-idx3", "labels-idx1")
    }
    np.testing.assert_array_equal(images.ravel(), raw["images-idx3"][16:])
    np.testing.assert_array_equal(labels, raw["labels-idx1"][8:])
    assert (images.shape, images.dtype, labels.dtype) == ((10_000, 28, 28, 1), np.uint8, np.int32)
    assert (images.min(), images.max()) == (0, 255)
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert np.bincount(labels).tolist() == MNIST_TEST


def test_fashion_mnist_has_the_images_and_labels_of_its_files(data_folder):
    folder = data_folder / "fashion_mnist"
    if not folder.is_dir():
        pytest.skip(f"no fashion_mnist in {data_folder}")
    images, labels = fashion_mnist_images(data_folder)
    raw = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    np.testing.assert_array_equal(images.ravel(), np.frombuffer(raw, np.uint8)[16:])
    assert np.bincount(labels).tolist() == [1000] * 10
    assert labels[:4].tolist() == [9, 2, 1, 1]
    np.testing.assert_array_equal(fashion_mnist_images(folder)[0], images)
    tasks = fashion_mnist(ways=10, shots=1, queries=2, data=data_folder)
    assert (tasks.card.tasks, tasks.card.classes, tasks.card.split_hash) == ("fashion_mnist", 10, None)
    assert tasks.card.protocol.startswith("Fashion-MNIST's 10,000 test images; all ten kinds of clothes in")
    # All images of a task are images of its classes, by the official labels.
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    task = drawn(tasks)
    found = [known[np.rint(255 * image).astype(np.uint8).tobytes()] for image in task.query.x]
    assert found[::2] == found[1::2]
    assert sorted(found[::2]) == list(range(10))


def test_fashion_mnist_prefers_the_folder_of_its_name(tmp_path):
    for folder, value in ((tmp_path, 1), (tmp_path / "fashion_mnist", 2)):
        folder.mkdir(exist_ok=True)
        content = struct.pack(">4i", 0x803, 10, 28, 28) + bytes([value]) * 7840
        (folder / "t10k-images-idx3-ubyte").write_bytes(content)
        (folder / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 10) + bytes(range(10)))
    assert set(fashion_mnist_images(tmp_path)[0].ravel()) == {2}
    assert set(mnist_images(tmp_path)[0].ravel()) == {1}


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("part", ["train", "test"])
def test_usps_has_the_images_and_labels_of_its_files(real, part):
    images, labels = usps_images(real / "usps", part)
    table = np.loadtxt(real / "usps" / f"zip.{part}.gz")
    np.testing.assert_array_equal(labels, table[:, 0])
    assert np.bincount(labels).tolist() == USPS[part]
    assert (images.shape, images.dtype, labels.dtype) == ((len(table), 16, 16, 1), np.uint8, np.int32)
    assert (images.min(), images.max()) == (0, 255)
    # Rounding error of half a grey level, in the units of the file.
    assert np.abs(images.reshape(-1, 256) / 127.5 - 1 - table[:, 1:]).max() <= 0.5 / 127.5 + 1e-9


def test_images_are_light_on_dark(real):
    for images, labels in (mnist_images(real), usps_images(real, "train")):
        assert np.bincount(images.ravel()).argmax() == 0
        assert (images > 127).mean() < 0.3
        # A one is a vertical stroke.
        ones, middle = images[labels == 1], images.shape[1] // 2
        assert ones[:, :, middle - 1 : middle + 1].mean() > 20 * ones[:, :, [0, 1, -2, -1]].mean()


def test_tasks_contain_the_images_of_the_files(real):
    images, labels = usps_images(real, "train")
    known = dict(zip((image.tobytes() for image in images), labels, strict=True))
    tasks = usps("train", ways=10, shots=2, queries=3, data=real, size=16)
    assert "7,291 training images" in tasks.card.protocol
    task = drawn(tasks)
    assert task.query.x.shape == (30, 16, 16, 1)
    assert (float(task.query.x.min()), float(task.query.x.max())) == (0, 1)
    digits = [known[np.rint(255 * image).astype(np.uint8).tobytes()] for batch in task for image in batch.x]
    # Each slot is one digit, in both support and query.
    slots = np.concatenate([task.support.y, task.query.y])
    assert len(set(zip(slots.tolist(), digits, strict=True))) == 10


@pytest.mark.nightly
def test_usps_is_resized_to_the_pixels_of_mnist(real):
    images, labels = usps_images(real)
    order = np.argsort(labels, kind="stable")
    expected = [
        np.asarray(Image.fromarray(image[..., 0]).resize((28, 28), Image.Resampling.LANCZOS))
        for image in images[order]
    ]
    resized = np.rint(255 * np.asarray(labelled(usps(data=real)).x[..., 0]))
    # Pillow also rounds and clips between its passes along rows and columns.
    difference = np.abs(resized - np.stack(expected))
    assert difference.mean() < 1
    assert np.quantile(difference, 0.99) <= 10


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("split", ["test", "train", "validation"])
def test_all_ten_digits_are_in_every_part_and_in_the_card(real, split):
    card = mnist(split, ways=10, data=real).card
    assert (card.tasks, card.split, card.ways, card.classes, card.split_hash) == (
        "mnist",
        split,
        10,
        10,
        None,
    )
    assert card.protocol == (
        "MNIST's 10,000 test images; all ten digits in every part, so not for meta-testing after "
        "meta-training on it"
    )
    card = usps(split, data=real).card
    assert ("7,291 training images" if split == "train" else "2,007 test images") in card.protocol


@pytest.mark.nightly
def test_a_run_on_usps_is_evaluated_on_its_test_images(real, tmp_path, capsys):
    out = str(tmp_path / "run")
    small = ["--steps", "2", "--meta-batch", "2", "--episodes", "4", "--network", "mlp"]
    command = ["train", "prototypical", "--tasks", "usps", "--data", str(real), "--size", "16"]
    assert main([*command, "--out", out, *small]) == 0
    assert main(["evaluate", out, "--ways", "10"]) == 0
    output = capsys.readouterr().out
    assert "no validation classes in this split" in output
    assert "usps test, 10-way" in output


# --- the sources --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "usps"])
def test_a_source_needs_a_folder_with_its_files(name, tmp_path):
    with pytest.raises(ValueError, match=f"data: {name} is read from your own copy; add --data DIR"):
        sources.tasks_of(config_of(tasks=name), "train")
    with pytest.raises(FileNotFoundError, match=r"^data: .* must contain .*https://"):
        sources.tasks_of(config_of({"data": str(tmp_path)}, tasks=name), "train")


def test_a_source_reads_its_files(tmp_path):
    for part in ("train", "test"):
        lines = [usps_line(number % 10, np.full(256, number / 20)) for number in range(20)]
        (tmp_path / f"zip.{part}").write_text("".join(lines))
    flags = {"ways": 10, "queries": 1, "size": 16, "data": str(tmp_path)}
    card = sources.tasks_of(config_of(flags, tasks="usps"), "test").card
    assert (card.tasks, card.split, card.ways, card.queries) == ("usps", "test", 10, 1)


# --- synthetic files ----------------------------------------------------------------------------------


def idx(array, magic=None):
    array = np.asarray(array, np.uint8)
    header = struct.pack(">I", 0x800 + array.ndim if magic is None else magic)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def digits(count, side=28):
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, side, side), dtype=np.uint8), np.arange(count) % 10


def write_mnist(folder, images, labels, part="t10k", ending=""):
    folder.mkdir(exist_ok=True)
    for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
        if ending:
            content = gzip.compress(content)
        (folder / f"{part}-{kind}-ubyte{ending}").write_bytes(content)


def usps_line(label, values):
    return " ".join([f"{label:.4f}", *(f"{value:.4f}" for value in values)]) + " \n"


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("subfolder", ["", "mnist"])
def test_mnist_is_read_plain_or_compressed_and_from_a_subfolder(tmp_path, ending, subfolder):
    images, labels = digits(30)
    write_mnist(tmp_path / subfolder, idx(images), idx(labels), ending=ending)
    read_images, read_labels = mnist_images(str(tmp_path))
    np.testing.assert_array_equal(read_images[..., 0], images)
    np.testing.assert_array_equal(read_labels, labels)


def test_training_tasks_use_the_training_images_if_present(tmp_path):
    images, labels = digits(30)
    write_mnist(tmp_path, idx(images), idx(labels))
    assert mnist("train", queries=1, data=tmp_path).card.protocol.startswith("MNIST's 30 test images")
    more, numbers = digits(40)
    write_mnist(tmp_path, idx(more), idx(numbers), part="train")
    settings = {"queries": 1, "data": tmp_path}
    assert mnist("train", **settings).card.protocol.startswith("MNIST's 40 training images")
    assert mnist("validation", **settings).card.protocol.startswith("MNIST's 30 test images")
    assert mnist("train", part="test", **settings).card.protocol.startswith("MNIST's 30 test images")
    assert mnist("test", part="train", **settings).card.protocol.startswith("MNIST's 40 training images")
    # An incomplete part is an error; the other part is not used instead.
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        mnist("train", **settings)


GOOD = [idx(part) for part in digits(20)]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (GOOD[1], GOOD[1], r"t10k-images-idx3-ubyte is not an IDX file .*; it starts with 0x00000801"),
        (GOOD[0], GOOD[0], r"t10k-labels-idx1-ubyte is not an IDX file .*; it starts with 0x00000803"),
        (b"<html>not found</html>", GOOD[1], "images-idx3-ubyte is not an IDX file"),
        (b"", GOOD[1], "images-idx3-ubyte is not an IDX file"),
        (GOOD[0][:10], GOOD[1], "images-idx3-ubyte is not an IDX file"),
        (GOOD[0][:-1], GOOD[1], "images-idx3-ubyte holds 15679 bytes after its header.* 20 x 28 x 28"),
        (GOOD[0] + b"\0", GOOD[1], "images-idx3-ubyte holds 15681 bytes"),
        (gzip.compress(GOOD[0])[:-9], GOOD[1], "images-idx3-ubyte is damaged or incomplete"),
        (gzip.compress(GOOD[0])[:-8] + b"\0" * 8, GOOD[1], "damaged or incomplete"),
        (gzip.compress(GOOD[0]), GOOD[1][:-3], "labels-idx1-ubyte holds 17 bytes"),
        (idx(digits(20, 16)[0]), GOOD[1], "must hold images of 28x28 pixels, got 16x16"),
        (idx(digits(21)[0]), GOOD[1], "holds 21 images and .*labels-idx1-ubyte 20 labels"),
        (idx(digits(2)[0]), idx([3, 10]), "labels-idx1-ubyte must hold digits .* label 2 is 10"),
        (idx(digits(0)[0]), idx([]), "labels-idx1-ubyte is empty"),
    ],
)
def test_bad_mnist_files_are_refused(tmp_path, images, labels, message):
    write_mnist(tmp_path, images, labels)
    with pytest.raises(ValueError, match=message):
        mnist_images(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (usps_line(3, [0.0] * 255), "line 1 of .*zip.test has 256 columns; it must have 257"),
        (usps_line(3, [0.0] * 256) + usps_line(3, [0.0] * 257), "line 2 of .*zip.test has 258 columns"),
        (usps_line(3, [0.0] * 256) + "\n", "line 2 of .*zip.test has 0 columns"),
        (usps_line(3, [0.0] * 256).replace("0.0000", "x", 1), "line 1 of .*zip.test must hold numbers only"),
        (usps_line(3, [0.0] * 256) + usps_line(10, [0.0] * 256), "label 2 is 10"),
        (usps_line(2.5, [0.0] * 256), "label 1 is 2.5"),
        (usps_line(3, [1.5] + [0.0] * 255), r"line 1 of .*zip.test has grey values outside \[-1, 1\]"),
        (usps_line(3, [float("nan")] + [0.0] * 255), "line 1 of .* outside"),
        ("", "zip.test is empty"),
    ],
)
def test_bad_usps_files_are_refused(tmp_path, content, message):
    (tmp_path / "zip.test").write_text(content)
    with pytest.raises(ValueError, match=message):
        usps_images(tmp_path)


def test_grey_values_of_usps_are_rounded_to_uint8(tmp_path):
    values = np.linspace(-1, 1, 256)
    (tmp_path / "zip.test").write_text(usps_line(7, values))
    images, labels = usps_images(tmp_path)
    np.testing.assert_array_equal(images.ravel(), np.arange(256))
    assert labels.tolist() == [7]


def test_a_truncated_usps_file_is_refused(tmp_path):
    compressed = gzip.compress(usps_line(3, np.linspace(-1, 1, 256)).encode())
    (tmp_path / "zip.train.gz").write_bytes(compressed[: len(compressed) // 2])
    with pytest.raises(ValueError, match=r"zip.train.gz is damaged or incomplete"):
        usps_images(tmp_path, "train")


def test_missing_files_raise_errors_that_name_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data: .*nowhere is not a folder"):
        mnist_images(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError,
        match=r"must contain t10k-images-idx3-ubyte\[.gz\] and t10k-labels-idx1-ubyte\[.gz\], directly or",
    ):
        mnist(data=tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"must contain zip.train\[.gz\], .* Elements of Statistical Learn"
    ):
        usps_images(tmp_path, "train")


def test_invalid_arguments_are_refused(tmp_path):
    for part in ("validation", None):
        with raises_argument_error(rf"part: got {part!r}; it must be one of 'train', 'test'$"):
            mnist_images(tmp_path, part)
    with pytest.raises(ValueError, match=r"part: got 'validation'; it must be one of 'train', 'test', None"):
        mnist(data=tmp_path, part="validation")
    with pytest.raises(ValueError, match="split: got 'val'"):
        mnist("val", data=tmp_path)
    with pytest.raises(ValueError, match="size: got 0; it must be at least 1"):
        usps(data=tmp_path, size=0)
    write_mnist(tmp_path, idx(digits(9)[0]), idx(range(9)))
    with pytest.raises(ValueError, match=r"1 of \d+ classes .* have no examples: '9'"):
        mnist(data=tmp_path)
