"""Tests of image folder layouts: classes and parts of files, and errors that name the line of a list."""

import csv
import io
import json
import os

import numpy as np
import pytest
from draws import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxmeta.tasks.file_layouts import list_images, part_of
from jaxmeta.tasks.folder import from_folder, prepare_folder
from jaxmeta.tasks.splits import ClassSplit, split_of_parts

pytestmark = pytest.mark.usefixtures("cache")


def put(root, *names):
    """Write 4 x 4 images whose grey level is their index in `names`."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(root / name, "PNG")


def write(path, header, *rows, delimiter=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])


def layout_of(path, **settings):
    """Return {class: {part: file names}}."""
    listing = list_images(path, **settings)
    return {
        name: {
            part: [file.relative_to(listing.folder).as_posix() for file in files]
            for part, files in parts.items()
        }
        for name, parts in listing.classes.items()
    }


def skipped(path, **settings):
    """Return the descriptions of the skipped files."""
    return [str(entry) for entry in list_images(path, **settings).left_out]


# --- folders of parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Train", "VALID", "Test"), ("base", "validation", "novel")]
)
def test_folders_named_after_parts_form_the_class_split(tmp_path, names):
    first, second, third = names
    put(tmp_path, *(f"{first}/ant/{i}.png" for i in range(3)), *(f"{first}/bee/{i}.png" for i in range(3)))
    put(tmp_path, f"{second}/cow/0.png", f"{second}/doe/0.png", f"{third}/elk/0.png", f"{third}/fox/a b.png")
    put(tmp_path, f"{first}/loose.png", f"{third}/fox/deep/1.png", "beside.png")
    (tmp_path / third / "fox" / "notes.txt").write_text("no image")
    assert layout_of(tmp_path)["ant"] == {"train": [f"{first}/ant/{i}.png" for i in range(3)]}
    assert sorted(skipped(tmp_path)) == [
        f"1 file that is not an image ({third}/fox/notes.txt)",
        f"1 image in a subfolder of a class folder ({third}/fox/deep/1.png)",
        f"1 image outside the class folders ({first}/loose.png)",
        "1 image outside the folders (beside.png)",
    ]
    prepared = prepare_folder(tmp_path)
    assert prepared.split == ClassSplit(("ant", "bee"), ("cow", "doe"), ("elk", "fox"))
    tasks = from_folder(tmp_path, "train", ways=2, queries=2)
    assert (tasks.card.classes, tasks.card.split_hash) == (2, prepared.split.hash)
    assert tasks.card.protocol == "class split by the data's parts train, validation, test"
    with pytest.raises(ValueError, match="split_seed: a class split by names needs none"):
        from_folder(tmp_path, "train", ways=2, split_seed=3)
    other = from_folder(tmp_path, "test", ways=1, classes=ClassSplit(test=("ant", "bee")))
    assert other.card.classes == 2


def test_parts_that_share_classes_are_pooled_for_few_shot_tasks(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        put(
            tmp_path,
            *(f"{part}/{name}/{part}{i}.png" for name in ("ant", "bee", "cow") for i in range(count)),
        )
    prepared = prepare_folder(tmp_path)
    assert prepared.split is None
    assert prepared.sizes == (5, 5, 5)
    assert prepared.parts == (("train", (3, 3, 3)), ("test", (2, 2, 2)))
    with pytest.warns(UserWarning, match=r"train, test share classes, .* are pooled"):
        tasks = from_folder(tmp_path, "train", ways=2, shots=2, queries=3)
    assert tasks.card.protocol == "random class split (0.64, 0.16, 0.2), seed 0"
    assert tasks.card.classes == 2
    # Within a class the training images come first; the grey level of an image is its index in `put`.
    levels = prepared.read(prepared.rows_of(["bee"]))[:, 0, 0, 0].tolist()
    assert levels == [3, 4, 5, 2, 3]


def test_classes_may_be_named_like_parts(tmp_path):
    put(tmp_path, "test/1.png", "train/1.png", "bus/1.png")
    assert set(layout_of(tmp_path)) == {"test", "train", "bus"}
    put(tmp_path / "deeper", "test/a/1.png", "train/a/1.png", "bus/1.png")
    with pytest.raises(ValueError, match=r"2 of 3 class folders .*'test', 'train'; some have subfolders"):
        list_images(tmp_path / "deeper")
    put(tmp_path / "two", "train/1.png", "test/1.png", "test/2.png")
    assert set(layout_of(tmp_path / "two")) == {"train", "test"}


def test_a_single_part_is_ignored(tmp_path):
    put(tmp_path, "train/ant/1.png", "train/bee/1.png")
    assert layout_of(tmp_path) == {"ant": {"": ["train/ant/1.png"]}, "bee": {"": ["train/bee/1.png"]}}


def test_two_folders_for_one_part_are_refused(tmp_path):
    put(tmp_path, "val/ant/1.png", "valid/bee/1.png", "train/cow/1.png")
    with pytest.raises(
        ValueError, match=r"path: .*val and .*valid are both for validation; keep one of them"
    ):
        list_images(tmp_path)


def test_folders_named_images_are_not_classes(tmp_path):
    put(tmp_path, "train/ant/images/1.png", "train/bee/images/1.png", "val/images/1.png", "test/images/1.png")
    with pytest.raises(ValueError, match=r"give the folder whose subfolders are the classes"):
        list_images(tmp_path)
    assert layout_of(tmp_path / "train")["ant"] == {"": ["ant/images/1.png"]}


def test_images_in_subfolders_of_a_class_are_reported_and_skipped(tmp_path):
    put(
        tmp_path,
        "ant/1.png",
        "ant/more/2.png",
        "ant/most/of/3.png",
        "bee/1.png",
        ".git/x.png",
        "__MACOSX/ant/1.png",
    )
    assert layout_of(tmp_path)["ant"] == {"": ["ant/1.png"]}
    assert skipped(tmp_path) == [
        "2 images in subfolders of a class folder (ant/more/2.png, ant/most/of/3.png)"
    ]
    put(tmp_path / "other", "ant/one/1.png", "ant/two/1.png", "bee/1.png")
    with pytest.raises(
        ValueError, match=r"1 of 2 class folders .* hold no images .*'ant'; some have subfolders"
    ):
        list_images(tmp_path / "other")


# --- lists ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "split", "splits"])
@pytest.mark.parametrize(
    ("header", "delimiter"),
    [(("filename", "label"), ","), (("Path", "Class Name"), ";"), (("id", "image", "class"), "\t")],
)
def test_lists_named_after_parts_form_the_class_split(tmp_path, place, header, delimiter):
    put(tmp_path / "images", *(f"{i}.png" for i in range(7)))
    rows = {"train": [("0.png", "ant"), ("1.png", "bee"), ("2.png", "ant")], "val": [("3.png", "cow")]}
    rows["test"] = [("5.png", "elk"), ("4.png", "elk")]
    for part, lines in rows.items():
        lines = [(7, *line) for line in lines] if len(header) == 3 else lines
        write(tmp_path / place / f"{part}.csv", header, *lines, delimiter=delimiter)
    assert layout_of(tmp_path) == {
        "ant": {"train": ["images/0.png", "images/2.png"]},
        "bee": {"train": ["images/1.png"]},
        "cow": {"validation": ["images/3.png"]},
        "elk": {"test": ["images/4.png", "images/5.png"]},
    }
    assert skipped(tmp_path) == ["1 image that is not listed (images/6.png)"]
    assert set(layout_of(tmp_path / place / "train.csv")) == {"ant", "bee"}
    assert prepare_folder(tmp_path).split == ClassSplit(("ant", "bee"), ("cow",), ("elk",))
    task = drawn(from_folder(tmp_path, "test", ways=1, shots=1, queries=1))
    levels = np.rint(255 * np.concatenate([task.support.x, task.query.x])[:, 0, 0, 0])
    assert sorted(levels.tolist()) == [4, 5]


def test_a_column_of_splits_assigns_the_images_of_one_list_to_parts(tmp_path):
    put(tmp_path / "photos", "a.png", "b.png", "c.png")
    rows = [("photos/a.png", "0", "train"), ("photos/b.png", "1", "Test"), ("photos/c.png", "0", "train")]
    write(tmp_path / "labels.csv", ("file", "label", "split"), *rows)
    expected = {"0": {"train": ["photos/a.png", "photos/c.png"]}, "1": {"test": ["photos/b.png"]}}
    assert layout_of(tmp_path) == expected
    assert layout_of(tmp_path / "labels.csv") == expected
    write(tmp_path / "labels.csv", ("file", "label"), *(row[:2] for row in rows))
    assert layout_of(tmp_path) == {"0": {"": ["photos/a.png", "photos/c.png"]}, "1": {"": ["photos/b.png"]}}
    write(tmp_path / "more.csv", ("file", "label"), *(row[:2] for row in rows[:1]))
    assert layout_of(tmp_path / "more.csv") == {"0": {"": ["photos/a.png"]}}


def test_a_table_next_to_class_folders_is_ignored(tmp_path):
    put(tmp_path, "ant/1.png", "bee/1.png")
    write(tmp_path / "labels.csv", ("file", "label"), ("ant/1.png", "x"))
    write(tmp_path / "train.csv", ("id", "text"), ("1", "x"))
    write(tmp_path / "test.csv", ("id", "text"), ("1", "x"))
    assert layout_of(tmp_path) == {"ant": {"": ["ant/1.png"]}, "bee": {"": ["bee/1.png"]}}


def json_list(names, files, labels):
    return json.dumps({"label_names": names, "image_names": files, "image_labels": labels})


def test_json_lists_of_published_few_shot_code_are_read(tmp_path):
    put(tmp_path / "CUB" / "images", "001.ant/a.jpg", "001.ant/b.jpg", "002.bee/a.jpg", "003.cow/a.jpg")
    prefix = "/home/other/filelists/CUB/images/"
    names = ["001.ant", "002.bee", "003.cow"]
    for part, files, labels in (
        ("base", ["001.ant/a.jpg", "001.ant/b.jpg"], [0, 0]),
        ("val", ["002.bee/a.jpg"], [1]),
        ("novel", ["003.cow/a.jpg"], [2]),
    ):
        (tmp_path / "CUB" / f"{part}.json").write_text(
            json_list(names, [prefix + file for file in files], labels)
        )
    assert layout_of(tmp_path / "CUB") == {
        "001.ant": {"train": ["images/001.ant/a.jpg", "images/001.ant/b.jpg"]},
        "002.bee": {"validation": ["images/002.bee/a.jpg"]},
        "003.cow": {"test": ["images/003.cow/a.jpg"]},
    }
    (tmp_path / "CUB" / "val.json").write_text(json_list(names, [prefix + "002.bee/a.jpg"], [3]))
    with pytest.raises(ValueError, match=r"val\.json, image_labels\[0\]: got 3; it must be below 3"):
        list_images(tmp_path / "CUB")


def test_json_lists_of_class_folders_are_read(tmp_path):
    put(tmp_path, "data/a/1.png", "data/a/2.png", "data/b/1.png")
    (tmp_path / "set.json").write_text(
        json.dumps({"class_names": ["x", "y"], "class_roots": ["data/a", "data/b"]})
    )
    assert layout_of(tmp_path / "set.json") == {
        "x": {"": ["data/a/1.png", "data/a/2.png"]},
        "y": {"": ["data/b/1.png"]},
    }
    (tmp_path / "set.json").write_text(json.dumps({"class_names": ["x"], "class_roots": ["../other"]}))
    with pytest.raises(ValueError, match=r"class_roots\[0\]: '../other' lies outside of"):
        list_images(tmp_path / "set.json")
    for text, message in (
        ("{", "is not a list of images in JSON"),
        ('{"image_names": ["a"], "image_labels": []}', "got 1 image_names and 0 image_labels"),
        (
            '{"image_names": ["a"], "image_labels": [1.5]}',
            r"image_labels\[0\]: got 1.5; it must be a number or a name",
        ),
        ('{"image_names": [1], "image_labels": [1]}', "must hold image_names"),
        ('{"image_names": [], "image_labels": []}', "lists no images"),
    ):
        (tmp_path / "set.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            list_images(tmp_path / "set.json")


# --- file names in lists --------------------------------------------------------------------------------


def listed(root, text):
    (root / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return [
        file
        for parts in layout_of(root / "labels.csv").values()
        for files in parts.values()
        for file in files
    ]


def is_plain(name):
    return "/" not in name and name.strip(".") and name.strip()


ODD = [
    "one, two.png",
    'a "quoted" one.png',
    "sp ace.png",
    "ünï.png",
    "..png",
    "semi;colon.png",
    "new\nline.png",
]


@pytest.mark.parametrize("name", ODD)
def test_file_names_may_have_special_characters(tmp_path, name):
    put(tmp_path, name)
    quoted = '"' + name.replace('"', '""') + '"'
    assert listed(tmp_path, f"file,label\r\n{quoted},x\r\n") == [name]


@pytest.mark.nightly
@given(
    names=st.sets(
        st.text(" ab,;\t\"'\n\\ä.中*/", min_size=1, max_size=9).filter(is_plain), min_size=1, max_size=5
    ),
    delimiter=st.sampled_from(",;\t"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
@settings(max_examples=150, deadline=None)
def test_random_file_names_are_found_in_every_dialect(tmp_path_factory, names, delimiter, encoding):
    root = tmp_path_factory.mktemp("names")
    for name in names:
        (root / name).write_bytes(b"")
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows([("file", "label"), *((name, "x") for name in names)])
    assert set(listed(root, text.getvalue().encode(encoding))) == names


@pytest.mark.parametrize(
    "text",
    [
        "\ufefffile,label\nants/1.png,x\n",
        "file,label\r\nants/1.png,x\r\n\r\n",
        " file , label \n ants/1.png , x \n",
        "file,label\nants\\1.png,x\n",
        "file,label\n./ants/../ants/1.png,x\n",
        "file,label,,\nants/1.png,x,,\n",
        "file,label\nC:\\photos\\ants\\1.png,x\n",
        "file,label\n/mnt/photos/ants/1.png,x\n",
        "file;label\nants/1.png;x\n",
        "file,label\nants/1.png,x\nants/1.png,x\n",
        "file,label\nants/1.png,x\n".encode("utf-16"),
    ],
)
def test_lists_are_read_in_several_dialects(tmp_path, text):
    put(tmp_path, "ants/1.png")
    assert listed(tmp_path, text) == ["ants/1.png"]


def test_absolute_paths_inside_the_folder_are_found(tmp_path):
    put(tmp_path, "ants/1.png")
    assert listed(tmp_path, f"file,label\n{tmp_path}/ants/1.png,x\n") == ["ants/1.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file,label\n1.png,x\n../secret.png,x\n",
            r"labels\.csv, line 3: '\.\./secret\.png' lies outside of",
        ),
        ("file,label\n1.png,x\n..\\secret.png,x\n", r"line 3: .* lies outside of"),
        ("file,label\n/etc/passwd,x\n", r"line 2: '/etc/passwd' lies outside of"),
        ("file,label\n/somewhere/else/1.png,x\n", r"line 2: '/somewhere/else/1.png' lies outside of"),
        ("file,label\n1.png,x\n\n2.png,\n", r"line 4: the label is empty"),
        ("file,label\n ,x\n", r"line 2: the file is empty"),
        ("file,label\n1.png,x\n.,x\n", r"line 3: '\.' is a folder; it must be an image"),
        ("file,label\n1.png,x\n2.png\n", r"line 3: expected 2 cells, got 1"),
        ("file,label\n1, 2.png,x\n", r"line 2: expected 2 cells, got 3"),
        (
            "file,label\n1.png,x\n1.png,y\n",
            r"line 3: '1.png' has the class 'y', but the class 'x' in labels.csv, line 2",
        ),
        (
            "file,label,split\n1.png,x,train\n1.png,x,test\n",
            r"line 3: .* has the class 'x' in test, but .* in train",
        ),
        (
            "file,label,split\n1.png,x,holdout\n",
            r"line 2: got the split 'holdout'; it must be train, val or test",
        ),
        ("file,label,split\n1.png,x,\n", r"line 2: got the split ''; it must be"),
        (
            "file,label\n1.png,x\n9.png,x\n",
            r"1 of 2 listed images do not exist .*: line 3: '9.png'",
        ),
        (
            "file,colour\n1.png,x\n",
            r"has the columns 'file', 'colour' and no column for the label of an image",
        ),
        ("file,label\n", "lists no images"),
        ("", "no column for the file and the label"),
        ('file,label\n"1.png,x\n', "line 2: cannot be read as csv"),
        (b"file,label\n1.png,x\n\xff.png,x\n", r"line 3: not UTF-8; save the file as UTF-8"),
        (b"file,label\n1\x00.png,x\n", r"line 2: .*(zero byte|csv)"),
    ],
)
def test_invalid_rows_raise_errors_that_name_the_line(tmp_path, text, message):
    put(tmp_path / "set", "1.png", "2.png")
    put(tmp_path, "secret.png")
    with pytest.raises(ValueError, match=message) as caught:
        listed(tmp_path / "set", text)
    assert "\n" not in str(caught.value)


def test_missing_listed_images_can_be_skipped(tmp_path):
    put(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "labels.csv").write_text("file,label\n1.png,x\n9.png,x\n2.png,y\n1.png,x\n")
    assert layout_of(tmp_path, skip_missing=True) == {"x": {"": ["1.png"]}, "y": {"": ["2.png"]}}
    assert skipped(tmp_path, skip_missing=True) == [
        "1 listed image that does not exist (labels.csv, line 3: '9.png')",
        "1 duplicate row (labels.csv, line 5)",
        "1 image that is not listed (3.png)",
    ]


def test_links_to_images_are_read(tmp_path):
    put(tmp_path, "elsewhere/1.png")
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "elsewhere" / "1.png", tmp_path / "set" / "1.png")
    assert listed(tmp_path / "set", "file,label\n1.png,x\n") == ["1.png"]


def test_unprintable_file_names_are_escaped(tmp_path):
    names = [os.fsdecode(b"ant/\xff.png"), "ant/a\nb.png", "bee/1.png", "bee/\x1b[31m.txt"]
    put(tmp_path, *names)
    summary = prepare_folder(tmp_path, size=4).summary
    assert (summary.images, summary.smallest[0]) == (3, "ant/a\nb.png")
    assert "\n" not in str(summary)
    str(summary).encode("utf-8")
    assert r"bee/\x1b[31m.txt" in str(summary)


def test_cyclic_links_are_not_followed(tmp_path):
    put(tmp_path, "train/ant/1.png", "train/bee/1.png", "test/cow/1.png")
    for name in ("train/ant/back", "test/back"):
        os.symlink(tmp_path, tmp_path / name)
    assert set(layout_of(tmp_path)) == {"ant", "bee", "cow"}


@pytest.mark.parametrize("folders", [["images"], ["train", "test"]])
def test_several_lists_are_ambiguous(tmp_path, folders):
    put(tmp_path, *(f"{folder}/{i}.png" for folder in folders for i in range(2)))
    for name in ("train.csv", "submission.csv"):
        write(tmp_path / name, ("file", "label"), ("0.png", "x"), ("1.png", "y"))
    with pytest.raises(
        ValueError, match=r"has 2 lists of images \(submission\.csv, train\.csv\); give the path of one"
    ):
        list_images(tmp_path)
    assert layout_of(tmp_path / "train.csv") == {
        "x": {"": [f"{folders[0]}/0.png"]},
        "y": {"": [f"{folders[0]}/1.png"]},
    }


# --- folders of other files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "mini-imagenet-cache-train.pkl",
            r"holds pickles and no images; .*pickle\.load.*numpy\.savez.*arrays:data\.npz",
        ),
        ("images.npz", r"holds arrays and no images; use arrays:images\.npz"),
        ("images.npy", r"holds arrays and no images; .*numpy\.savez.* and use arrays:data\.npz"),
        ("images.zip", "holds archives and no images; unpack it, and give the folder"),
    ],
)
def test_errors_for_folders_of_other_files_give_advice(tmp_path, file, message):
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        list_images(tmp_path)
    with pytest.raises(NotADirectoryError, match=message.partition("; ")[2]):
        list_images(tmp_path / file)


def test_parts_are_recognised_by_their_common_names():
    assert [part_of(name) for name in ("Train", "meta_val", " NOVEL ", "held-out")] == [
        "train", "validation", "test", None
    ]  # fmt: skip
    assert split_of_parts({"train": ["a"], "validation": [], "test": []}) is None
