"""Tests of image files: which files are images, colour by the header, and pixels compared with PIL."""

import io
import struct
import zlib

import numpy as np
import pytest
from draws import png
from PIL import Image, features

from jaxmeta.tasks.archives import SIDE, shrink
from jaxmeta.tasks.images import UnreadableImage, class_files, decode, image_files, in_colour

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (60, 50, 3), np.uint8)
GREYS = COLOURS[..., 0]


def encoded(image, form, **settings):
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


# --- which files ----------------------------------------------------------------------------------------


def test_image_files_are_those_with_the_suffix_of_an_image(tmp_path):
    for name in ("b.PNG", "a.jpeg", "C.TiF", ".hidden.png", "notes.txt", "png", "labels.csv", ".png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere.png")
    assert [path.name for path in image_files(tmp_path)] == ["C.TiF", "a.jpeg", "b.PNG", "lost.png"]


def test_class_files_are_the_images_in_each_subfolder(tmp_path):
    for name in (
        "owl/2.png",
        "owl/10.png",
        "Owl/1.jpg",
        "elk/1.bmp",
        ".git/1.png",
        "loose.png",
        "elk/more/1.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    files = class_files(tmp_path)
    if len(list((tmp_path / "owl").iterdir())) == 3:
        pytest.skip("the file system is not case-sensitive")
    assert list(files) == ["Owl", "elk", "owl"]
    assert [path.name for path in files["owl"]] == ["10.png", "2.png"]
    assert [path.name for path in files["elk"]] == ["1.bmp"]


def test_folders_without_class_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^support: .*none does not exist"):
        class_files(tmp_path / "none", "support")
    with pytest.raises(
        ValueError, match=r"^path: .* has no subfolders; it must have one subfolder per class$"
    ):
        class_files(tmp_path)
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match=r"1\.png is a file"):
        class_files(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"no subfolders.* into which to sort its 1 image$"):
        class_files(tmp_path)
    for name in ("train/owl", "train/elk"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match="'train'; some have subfolders"):
        class_files(tmp_path)
    (tmp_path / "train" / "ox").mkdir()
    (tmp_path / "train" / "ox" / "notes.txt").write_text("none yet")
    with pytest.raises(ValueError, match=r"1 of 3 class folders in .* hold no images \(\.png.*\): 'ox'$"):
        class_files(tmp_path / "train")


@pytest.mark.parametrize(
    ("suffix", "form", "loss"),
    [
        (".ppm", "PPM", 0), (".pgm", "PPM", 0), (".tga", "TGA", 0), (".qoi", "QOI", 0), (".sgi", "SGI", 0),
        (".pcx", "PCX", 0), (".jfif", "JPEG", 60), (".JPE", "JPEG", 60), (".webp", "WEBP", 60),
        (".jp2", "JPEG2000", 60), (".avif", "AVIF", 60), (".ico", "ICO", 60),
    ],
)  # fmt: skip
def test_formats_that_pillow_opens_are_read(tmp_path, suffix, form, loss):
    Image.init()
    if form not in Image.SAVE or (form == "AVIF" and not features.check("avif")):
        pytest.skip(f"this Pillow does not write {form}")
    smooth = np.dstack([np.add.outer(np.arange(32), np.arange(32) * k).astype(np.uint8) for k in (1, 2, 3)])
    image = Image.fromarray(smooth)
    image.convert("L" if suffix == ".pgm" else "RGB").save(tmp_path / f"a{suffix}", form)
    assert [path.name for path in image_files(tmp_path)] == [f"a{suffix}"]
    decoded = decode(tmp_path / f"a{suffix}", "a", channels=3, size=None).astype(int)
    wanted = np.asarray(image.convert("L").convert("RGB")) if suffix == ".pgm" else smooth
    assert np.abs(decoded - wanted).max() <= loss


def test_documents_videos_and_tables_are_not_images(tmp_path):
    for suffix in (".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".mp4", ".h5", ".wmf", ".csv", ".npy", ".pkl"):
        (tmp_path / f"a{suffix}").write_bytes(b"")
    assert image_files(tmp_path) == []


def test_a_document_with_the_suffix_of_an_image_is_not_opened(monkeypatch):
    # Opening it would start Ghostscript.
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    monkeypatch.setattr("subprocess.check_call", None)
    with pytest.raises(UnreadableImage, match="unknown format"):
        decode(page, "a.png", channels=3, size=None)


def test_a_pgm_of_sixteen_bits_is_rounded_to_eight():
    deep = RNG.integers(0, 65536, (3, 5), np.uint16)
    data = b"P5 5 3 65535\n" + deep.astype(">u2").tobytes()
    expected = np.rint(deep / 65535 * 255)[..., None]
    np.testing.assert_array_equal(decode(data, "x", channels=1, size=None), expected)


# --- the header -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "form", "colour"),
    [
        (Image.fromarray(COLOURS), "PNG", True),
        (Image.fromarray(COLOURS), "JPEG", True),
        (Image.fromarray(COLOURS).convert("RGBA"), "PNG", True),
        (Image.fromarray(COLOURS).convert("CMYK"), "JPEG", True),
        (Image.fromarray(GREYS), "JPEG", False),
        (Image.fromarray(GREYS).convert("1"), "PNG", False),
        (Image.fromarray(GREYS).convert("LA"), "PNG", False),
        (Image.fromarray(GREYS.astype(np.uint16)), "PNG", False),
        (Image.fromarray(GREYS.astype(np.int32)), "TIFF", False),
        (Image.fromarray(GREYS.astype(np.float32)), "TIFF", False),
        *[
            (Image.fromarray(array).convert("RGB").quantize(16), form, colour)
            for array, colour in ((COLOURS, True), (GREYS, False))
            for form in ("PNG", "GIF", "BMP", "TIFF")
        ],
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_colour_images_are_identified_by_their_header(image, form, colour, tmp_path):
    data = encoded(image, form)
    assert in_colour(data) is colour
    (tmp_path / "file").write_bytes(data)
    assert in_colour(tmp_path / "file") is colour


def test_colour_is_read_from_the_header_alone():
    for image in (Image.fromarray(COLOURS), Image.fromarray(COLOURS).quantize(256)):
        data = encoded(image, "PNG")
        cut = data[: data.index(b"IDAT") + 100]
        assert in_colour(cut)
        with pytest.raises(UnreadableImage):
            decode(cut, "cut", channels=3, size=None)


# --- the pixels -----------------------------------------------------------------------------------------


def test_plain_images_are_untouched():
    np.testing.assert_array_equal(decode(png(COLOURS), "x", channels=3, size=None), COLOURS)
    np.testing.assert_array_equal(decode(png(GREYS[:50]), "x", channels=1, size=50), GREYS[:50, :, None])
    np.testing.assert_array_equal(
        decode(png(GREYS), "x", channels=3, size=None), np.repeat(GREYS[:, :, None], 3, axis=2)
    )
    black_or_white = decode(encoded(Image.fromarray(GREYS > 99), "PNG"), "x", channels=1, size=None)
    np.testing.assert_array_equal(black_or_white[..., 0], 255 * (GREYS > 99))


def test_grey_values_are_the_luma_of_rec_601():
    expected = COLOURS @ np.array([0.299, 0.587, 0.114])
    decoded = decode(png(COLOURS), "x", channels=1, size=None)[..., 0]
    assert np.abs(decoded - expected).max() <= 0.51


def test_orientation_is_applied():
    turned = np.rot90(COLOURS)  # a camera's sensor held on its side: 6 says "turn clockwise to view"
    exif = Image.Exif()
    exif[0x0112] = 6
    np.testing.assert_array_equal(decode(png(turned, exif=exif), "x", channels=3, size=None), COLOURS)


def test_transparency_is_composited_over_white():
    alpha = np.linspace(0, 255, GREYS.size).reshape(GREYS.shape).round().astype(np.uint8)
    share = alpha[..., None] / 255
    rgba = decode(png(np.dstack([COLOURS, alpha])), "x", channels=3, size=None)
    assert np.abs(rgba - (share * COLOURS + (1 - share) * 255)).max() <= 1
    la = Image.merge("LA", [Image.fromarray(GREYS), Image.fromarray(alpha)])
    decoded = decode(encoded(la, "PNG"), "x", channels=1, size=None)
    assert np.abs(decoded - (share * GREYS[..., None] + (1 - share) * 255)).max() <= 1


def test_a_transparent_colour_becomes_white():
    steps = (GREYS // 64 * 64).astype(np.uint8)
    expected = np.where(steps == 64, 255, steps)[..., None]
    for image in (Image.fromarray(steps), Image.fromarray(steps).convert("P")):
        data = encoded(image, "PNG", transparency=64)
        np.testing.assert_array_equal(decode(data, "x", channels=1, size=None), expected)
    deep = encoded(Image.fromarray(steps.astype(np.uint16) * 257), "PNG", transparency=64 * 257)
    np.testing.assert_array_equal(decode(deep, "x", channels=1, size=None), expected)
    colours = png(np.dstack([steps] * 3), transparency=(64, 64, 64))
    np.testing.assert_array_equal(decode(colours, "x", channels=1, size=None), expected)


def test_sixteen_bits_are_rounded_to_eight():
    deep = RNG.integers(0, 65536, (9, 7), np.uint16)
    expected = np.rint(deep / 65535 * 255)[..., None]
    for form in ("PNG", "TIFF"):
        data = encoded(Image.fromarray(deep), form)
        np.testing.assert_array_equal(decode(data, "x", channels=1, size=None), expected)
    wide = encoded(Image.fromarray(deep.astype(np.int32)), "TIFF")
    np.testing.assert_array_equal(decode(wide, "x", channels=1, size=None), expected)


def test_cmyk_and_palettes_are_converted_to_rgb():
    cmyk = Image.fromarray(RNG.integers(0, 256, (8, 8, 4), np.uint8), "CMYK")
    expected = np.asarray(cmyk.convert("RGB"))
    np.testing.assert_array_equal(decode(encoded(cmyk, "TIFF"), "x", channels=3, size=None), expected)
    palette = Image.fromarray(COLOURS).quantize(32)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(decode(encoded(palette, "GIF"), "x", channels=3, size=None), expected)


def test_an_animation_gives_its_first_frame():
    frames = [Image.fromarray(np.full((5, 5), value, np.uint8)) for value in (40, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(data, "x", channels=1, size=None), 40)


@pytest.mark.parametrize("size", [28, 20, 105, 110])
def test_an_omniglot_drawing_is_resized_as_in_omniglot(size):
    ink = np.zeros((SIDE, SIDE), bool)
    ink[20:80, 30:34] = ink[50:53, 10:95] = True
    ink[np.arange(60), np.arange(60) + 20] = True
    decoded = decode(encoded(Image.fromarray(~ink), "PNG"), "x", channels=1, size=size)
    assert decoded.shape == (size, size, 1)
    assert np.abs(255 - decoded[..., 0].astype(int) - shrink(ink[None], size)[0]).max() <= 1


def test_an_image_that_is_not_square_is_resized_to_a_square():
    across, down = np.meshgrid(np.linspace(0, 6, 90), np.linspace(0, 5, 40))
    smooth = np.dstack([127 + 100 * np.sin(across), 127 + 100 * np.cos(down), 20 * across + 20 * down])
    image = Image.fromarray(smooth.astype(np.uint8))
    expected = np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(decode(encoded(image, "PNG"), "x", channels=3, size=16) - expected).max() <= 1


# --- unreadable files --------------------------------------------------------------------------------


def oversized_png():
    """Return a PNG file whose header declares 60000 x 60000 pixels."""
    data = png(GREYS)
    head = b"IHDR" + struct.pack(">II", 60_000, 60_000) + data[24:29]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unknown format"),
        (b"<html>404</html>", "unknown format"),
        (png(COLOURS)[:3000], "truncated"),
        (encoded(Image.fromarray(COLOURS), "JPEG")[:1500], "truncated"),
        (oversized_png(), "exceeds limit"),
        (encoded(Image.fromarray(GREYS.astype(np.float32)), "TIFF"), "32-bit samples"),
        (encoded(Image.fromarray(GREYS.astype(np.int32) * 2**20), "TIFF"), "32-bit samples"),
    ],
    ids=["empty", "html", "half a png", "half a jpeg", "bomb", "float", "32 bits"],
)
def test_unreadable_files_raise_errors_that_name_them(data, reason, tmp_path):
    (tmp_path / "1.png").write_bytes(data)
    for source in (data, tmp_path / "1.png"):
        with pytest.raises(UnreadableImage, match=rf"^owl/1\.png: cannot be read .* \(.*{reason}") as error:
            decode(source, "owl/1.png", channels=3, size=8)
        assert "\n" not in str(error.value)
        assert "0x" not in str(error.value)


def test_a_missing_file_is_unreadable(tmp_path):
    with pytest.raises(UnreadableImage, match=r"^owl\.png: .*\(No such file or directory\)$"):
        in_colour(tmp_path / "owl.png")
