"""Tests of image folders: episodes compared with PIL, the cache, races, and invalid folders."""

import os
import shutil
import threading

import jax
import numpy as np
import pytest
from draws import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxmeta.tasks import folder as module
from jaxmeta.tasks.episodes import from_arrays
from jaxmeta.tasks.folder import from_folder, prepare_folder
from jaxmeta.tasks.images import default_side
from jaxmeta.tasks.prepared import from_prepared, prepare
from jaxmeta.tasks.splits import ClassSplit
from jaxmeta.tasks.stream import stream

pytestmark = pytest.mark.usefixtures("cache")
CLASSES = ("ant", "bee", "cow", "doe", "elk", "fox")
EACH = 3


def picture(number, width, height):
    """Return an image that is smooth, so that filters agree, and different for each number."""
    across, down = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 2, height))
    planes = [128 + 100 * np.sin(across + number), 128 + 100 * np.cos(down * number), 14 * number + 20 * down]
    return Image.fromarray(np.dstack(planes).clip(0, 255).astype(np.uint8))


@pytest.fixture
def photos(tmp_path):
    """Write six classes of three images: PNG and JPEG, grey and colour, several sizes, smallest side 9."""
    for i, name in enumerate(CLASSES):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for j in range(EACH):
            image = picture(EACH * i + j, 12 + 3 * i, 9 + 4 * j)
            if j == 1:
                image = image.convert("L")
            image.save(tmp_path / "photos" / name / (f"{j}.JPG" if j == 2 else f"{j}.png"))
    return tmp_path / "photos"


def decoded_by_pil(photos, mode, size):
    paths = sorted(photos.glob("*/*"))
    images = [
        np.asarray(Image.open(path).convert(mode).resize((size, size), Image.Resampling.LANCZOS)).reshape(
            size, size, -1
        )
        for path in paths
    ]
    return np.stack(images), [path.parent.name for path in paths]


def damage(path):
    path.write_bytes(path.read_bytes()[:60])


def redraw(path, later):
    """Replace an image by another one of the same file size, `later` nanoseconds newer."""
    before = path.stat()
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path, "BMP")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + later))
    assert path.stat().st_size == before.st_size


def entries(cache):
    return sorted(path.name for path in cache.iterdir())


# --- episodes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mode", "size"), [(None, "RGB", None), (1, "L", 7)])
def test_episodes_equal_those_of_images_decoded_by_pil(photos, channels, mode, size):
    protocol = {"ways": 2, "shots": 1, "queries": 2, "classes": (0.5, 0.25, 0.25), "split_seed": 3}
    tasks = from_folder(photos, "train", size=size, channels=channels, **protocol)
    expected = from_arrays(*decoded_by_pil(photos, mode, size or 9), **protocol, name="folder:photos")
    assert tasks.card == expected.card
    assert tasks.card.protocol == "random class split (0.5, 0.25, 0.25), seed 3"
    for actual, wanted in zip(drawn(tasks, 1), drawn(expected, 1), strict=True):
        np.testing.assert_array_equal(actual.y, wanted.y)
        # Pillow's filter rounds between its passes.
        np.testing.assert_allclose(actual.x, wanted.x, atol=1.01 / 255)


def test_parts_of_a_split_by_name_are_disjoint(photos):
    split = ClassSplit(train=("ant", "cow", "fox"), validation=("bee",), test=("doe", "elk"))
    images = prepare_folder(photos)
    assert (images.name, images.classes, images.sizes, images.shape) == (
        "folder:photos", CLASSES, (EACH,) * 6, (9, 9, 3)
    )  # fmt: skip
    tasks = from_folder(photos, "test", ways=2, queries=2, classes=split)
    assert (tasks.card.classes, tasks.card.split_hash) == (2, split.hash)
    support, query = drawn(tasks)
    actual = np.concatenate([support.x, query.x]).reshape(6, -1)
    stored = images.read(images.rows_of(split.test)).reshape(6, -1) / np.float32(255)
    np.testing.assert_allclose(actual[np.lexsort(actual.T)], stored[np.lexsort(stored.T)], atol=1e-6)
    assert from_folder(photos, "validation", ways=6, classes=None).card.classes == 6


def check_prepared_images(sizes, ways, shots, seed):
    """Assert that prepared images (class, index) give the same episodes as arrays."""
    names = ["a", "b", "c"]
    pixels = [(c, i) for c, size in enumerate(sizes) for i in range(size)]
    x = np.array(pixels, np.uint8).reshape(-1, 2, 1, 1)
    y = [names[c] for c, _ in pixels]
    images = prepare("images", f"{sizes}", (2, 1, 1), zip(y, x, strict=True), expected=len(y))
    order = np.random.default_rng(seed).permutation(len(x))
    np.testing.assert_array_equal(images.read(order), x[order])
    assert [pixels[row][0] for row in images.rows_of(["c", "a"])] == [2] * sizes[2] + [0] * sizes[0]

    protocol = {"ways": ways, "shots": shots, "queries": 1, "classes": None}
    task = drawn(from_prepared(images, **protocol), seed)
    expected = drawn(from_arrays(x, y, **protocol), seed)
    for actual, wanted in zip(task, expected, strict=True):
        np.testing.assert_array_equal(actual.x, wanted.x)
        np.testing.assert_array_equal(actual.y, wanted.y)
    rows = np.rint(np.concatenate([task.support.x, task.query.x])[:, :, 0, 0] * 255).astype(int)
    assert len({tuple(row) for row in rows.tolist()}) == ways * (shots + 1)
    slots = np.concatenate([task.support.y, task.query.y])
    assert len({(slot, c) for slot, c in zip(slots.tolist(), rows[:, 0].tolist(), strict=True)}) == ways


def test_prepared_images_give_the_episodes_of_arrays():
    check_prepared_images([3, 5, 4], 2, 2, 7)


@pytest.mark.nightly
@given(
    sizes=st.lists(st.integers(3, 5), min_size=3, max_size=3),
    ways=st.sampled_from([2, 3]),
    shots=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=8, deadline=None)
def test_prepared_images_give_the_episodes_of_arrays_for_random_sizes(sizes, ways, shots, seed):
    check_prepared_images(sizes, ways, shots, seed)


# --- the cache ------------------------------------------------------------------------------------------


def test_the_second_call_opens_no_image(photos, monkeypatch):
    damage(photos / "ant" / "0.png")
    with pytest.warns(UserWarning, match="1 of 18 images are left out: ant/0.png"):
        first = prepare_folder(photos, skip_unreadable=True)

    def refuse(*_, **__):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.warns(UserWarning, match="1 of 18 images are left out: ant/0.png"):
        assert prepare_folder(photos, skip_unreadable=True) == first
    with pytest.raises(ValueError, match=r"18 of 18 .*an image was opened"):
        prepare_folder(photos)


@pytest.mark.parametrize("change", ["content", "added", "removed", "settings", "elsewhere"])
def test_a_changed_folder_or_setting_is_prepared_again(photos, change):
    file, settings = photos / "bee" / "1.png", {}
    Image.open(file).save(file, "BMP")  # uncompressed, so that its size does not depend on the pixels
    first = prepare_folder(photos)
    if change == "content":
        redraw(file, 1)
    elif change == "added":
        shutil.copy(file, photos / "bee" / "3.png")
    elif change == "removed":
        file.unlink()
    elif change == "settings":
        settings = {"channels": 1}
    else:
        photos = shutil.copytree(photos, photos.parent / "others" / "photos")
        redraw(photos / "bee" / "1.png", 0)
    second = prepare_folder(photos, **settings)
    assert second.folder != first.folder
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(second.read(range(len(second))), first.read(range(len(first))))


def test_two_threads_can_prepare_one_folder_concurrently(photos, cache, monkeypatch):
    barrier = threading.Barrier(2, timeout=60)
    per_thread = threading.local()
    decode = module.decode

    def decode_together(*arguments, **settings):
        if not hasattr(per_thread, "started"):
            barrier.wait()
            per_thread.started = True
        return decode(*arguments, **settings)

    monkeypatch.setattr(module, "decode", decode_together)
    results = []
    threads = [threading.Thread(target=lambda: results.append(prepare_folder(photos))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0] == results[1]
    assert len(results[0].read(range(18))) == 18
    assert len(entries(cache)) == 2  # the images and the scan of the folder, nothing unfinished


def test_an_interrupted_preparation_leaves_no_files(photos, cache, monkeypatch):
    decode = module.decode

    def interrupted(file, name, **settings):
        if name == "cow/1.png":
            raise KeyboardInterrupt
        return decode(file, name, **settings)

    monkeypatch.setattr(module, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_folder(photos)
    assert entries(cache) == []
    monkeypatch.setattr(module, "decode", decode)
    assert len(prepare_folder(photos)) == 18


def test_damaged_records_are_detected(photos):
    images = prepare_folder(photos)
    [records] = images.folder.glob("*.array_record")
    whole = bytearray(records.read_bytes())
    whole[1000] ^= 255
    records.write_bytes(whole)
    with pytest.raises(ValueError, match=r"cannot be read .*remove its folder to prepare the images again"):
        images.read(range(18))


def test_prepare_refuses_invalid_images(cache):
    image = np.zeros((2, 2, 1), np.uint8)
    for images, message in (
        ([], "zoo: it has no images"),
        ([("b", image), ("a", image)], "sorted by class, got 'a' after 'b'"),
        ([("a", image), ("b", image[:1])], r"must be uint8 \(2, 2, 1\), got uint8 \(1, 2, 1\) in 'b'"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare("zoo", "x", (2, 2, 1), images, expected=2)
    assert entries(cache) == []


# --- what was read --------------------------------------------------------------------------------------


def test_the_summary_reports_read_and_skipped_files_also_from_the_cache(photos, monkeypatch):
    damage(photos / "fox" / "2.JPG")
    (photos / "bee" / "notes.txt").write_text("no image")
    (photos / "bee" / "old").mkdir()
    picture(1, 9, 9).save(photos / "bee" / "old" / "1.png")
    picture(1, 9, 9).save(photos / "loose.png")
    with pytest.warns(UserWarning, match="1 of 18 images are left out"):
        first = prepare_folder(photos, skip_unreadable=True).summary
    assert (first.images, first.classes, first.smallest) == (17, 6, ("ant/0.png", 12, 9))
    assert {entry.reason: (entry.number, entry.examples) for entry in first.left_out} == {
        "image outside the class folders": (1, ("loose.png",)),
        "image in a subfolder of a class folder": (1, ("bee/old/1.png",)),
        "file that is not an image": (1, ("bee/notes.txt",)),
        "image that cannot be read": (1, ("fox/2.JPG",)),
    }
    assert str(first).startswith(
        "17 images of 6 classes, by one folder per class; the smallest is 12 × 9 (ant/0.png); left out: "
        "1 image outside"
    )
    monkeypatch.setattr(Image, "open", None)
    with pytest.warns(UserWarning, match="1 of 18 images are left out"):
        assert prepare_folder(photos, skip_unreadable=True).summary == first
    # Skipped files do not affect the fingerprint, so they are listed again on every call.
    (photos / "bee" / "more.txt").write_text("no image")
    with pytest.warns(UserWarning, match="1 of 18 images are left out"):
        again = prepare_folder(photos, skip_unreadable=True)
    assert again.summary.left_out[2].number == 2


def test_a_removed_scan_is_rebuilt(photos, cache):
    first = prepare_folder(photos)
    for scan in cache.glob("folder-*.json"):
        scan.unlink()
    assert prepare_folder(photos) == first


@pytest.mark.parametrize("shape", [(1, 1), (40, 4), (3, 300)])
def test_a_far_smaller_image_does_not_shrink_the_others_and_is_reported(photos, shape):
    picture(2, *shape).save(photos / "elk" / "tiny.png")
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=rf"1 of 19 .* enlarged to 9 × 9: elk/tiny\.png \({shape[0]} × {shape[1]}\)$"
        ):
            images = prepare_folder(photos)
    assert images.shape == (9, 9, 3)
    assert images.summary.smallest == ("elk/tiny.png", *shape)
    # The default size given explicitly hits the same cache entry; an explicit size gives no warning.
    assert prepare_folder(photos, size=9, channels=3).folder == images.folder
    assert prepare_folder(photos, size=5).shape == (5, 5, 3)


def test_the_default_side_is_the_smallest_of_at_least_half_the_median():
    assert default_side([28] * 9) == 28
    assert default_side([84, 500, 90, 1200]) == 84
    assert default_side([84, 42, 500]) == 42
    assert default_side([84, 41, 500]) == 84
    assert default_side([20, 30, 10, 9]) == 9  # the median is 15
    assert default_side([20, 30, 10, 7]) == 10
    assert default_side([]) == 84


def streamed(images, **settings):
    return stream(images, key=jax.random.key(0), meta_batch=2, **settings)


@pytest.mark.parametrize("source", ["memory", "disk"])
def test_classes_with_too_few_images_can_be_skipped(photos, source):
    for name, left in (("bee", 2), ("cow", 1)):
        for number in range(left, EACH):
            next((photos / name).glob(f"{number}.*")).unlink()
    images = prepare_folder(photos)
    split = ClassSplit(train=("ant", "bee", "cow"), test=("doe", "elk", "fox"))
    settings = {"ways": 1, "shots": 1, "queries": 2, "classes": split, "skip_small_classes": True}
    with pytest.raises(
        ValueError, match=r"2 of 3 classes have fewer: bee \(2\), cow \(1\); .*skip_small_classes"
    ):
        from_prepared(images, **settings | {"skip_small_classes": False})
    small = r"2 of 3 classes of split='train' have fewer than 3 .*bee \(2\), cow \(1\)"
    with pytest.warns(UserWarning, match=small):
        tasks = from_folder(photos, **settings) if source == "memory" else streamed(images, **settings)
    assert tasks.card.classes == 1
    # Skipped classes depend on the shape of the tasks and must not change the split.
    assert tasks.card.split_hash == split.hash
    settings |= {"ways": 3}
    with (
        pytest.warns(UserWarning, match=small),
        pytest.raises(ValueError, match="classes of split='train': 1"),
    ):
        from_folder(photos, **settings)


def test_the_error_for_too_few_classes_suggests_transfer(photos):
    for name in CLASSES[2:]:
        shutil.rmtree(photos / name)
    with pytest.raises(ValueError, match=r"ways=5 is more .* use `jaxmeta transfer` or `predict`"):
        from_folder(photos)


# --- invalid folders and settings -----------------------------------------------------------------------


def test_class_names_that_differ_only_in_case_give_a_warning(photos):
    try:
        (photos / "Bee").mkdir()
    except FileExistsError:
        pytest.skip("the file system is not case-sensitive")
    picture(40, 12, 12).save(photos / "Bee" / "0.png")
    for _ in range(2):
        with pytest.warns(UserWarning, match="'Bee' and 'bee' differ only in case; they are two classes"):
            images = prepare_folder(photos)
    assert images.classes == ("Bee", *CLASSES)
    assert images.sizes == (1, *(EACH,) * 6)


def test_unreadable_images_raise_an_error_or_are_skipped(photos):
    (photos / "ant" / "1.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"1 of 18 .*ant/1\.png: .*unknown format.*skip_unreadable=True"):
        prepare_folder(photos)
    (photos / "ant" / "1.png").unlink()
    for name in CLASSES:  # complete headers, half the pixels
        path = photos / name / "2.JPG"
        path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"6 of 17 .*ant/2\.JPG: .*truncated.*elk/2\.JPG.*; …; repair"):
        prepare_folder(photos)
    with pytest.warns(UserWarning, match=r"folder:photos: 6 of 17 images are left out: ant/2\.JPG.*; …$"):
        images = prepare_folder(photos, skip_unreadable=True)
    assert images.sizes == (1, 2, 2, 2, 2, 2)
    damage(photos / "ant" / "0.png")
    with pytest.raises(ValueError, match=r"none of the images of class 'ant' in .* can be read"):
        prepare_folder(photos, skip_unreadable=True)


def test_a_folder_without_readable_images_is_refused(photos):
    for file in photos.glob("*/*"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the images of class .* can be read"):
        prepare_folder(photos, skip_unreadable=True)


def test_too_few_images_or_classes_are_refused(photos):
    (photos / "doe" / "0.png").unlink()
    (photos / "doe" / "1.png").unlink()
    with pytest.raises(
        ValueError, match=r"1 \+ 1 = 2 examples are needed .*1 of 6 classes have fewer: doe \(1\)"
    ):
        from_folder(photos, classes=None)
    with pytest.raises(ValueError, match="ways=7 is more than the classes of split='test': 6"):
        from_folder(photos, "test", ways=7, classes=None)
    with pytest.raises(ValueError, match=r"1 of \d+ classes of split='test' have no examples: 'yak'"):
        from_folder(photos, "test", ways=2, classes=ClassSplit(test=("yak", "ant")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size: got 0; it must be at least 1"),
        ({"size": True}, "size: got True; it must be a whole number"),
        ({"channels": 2}, "channels: got 2; it must be one of 1, 3, None"),
    ],
)
def test_invalid_settings_are_refused(photos, settings, message):
    with pytest.raises(ValueError, match=message):
        from_folder(photos, **settings)


def test_missing_folders_and_folders_without_class_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: .*nowhere does not exist"):
        from_folder(tmp_path / "nowhere")
    (tmp_path / "loose").mkdir()
    picture(1, 9, 9).save(tmp_path / "loose" / "1.png")
    with pytest.raises(ValueError, match="no subfolders"):
        from_folder(str(tmp_path / "loose"))
