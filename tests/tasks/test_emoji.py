"""Tests of emoji: packs, classes, rendering, styles as domains, word vectors, licences, and invalid packs."""

import gzip
import importlib.util
import io
import json
import sys
import tarfile
import warnings

import jax
import numpy as np
import pytest
from configs import config_of
from draws import assert_trees_equal, sampled
from support import raises_argument_error

from jaxmeta.checks import MissingPackageError
from jaxmeta.cli import sources
from jaxmeta.tasks import emoji_packs
from jaxmeta.tasks.class_vectors import class_vectors, class_words
from jaxmeta.tasks.emoji import emoji, emoji_images, emoji_licences, split_by_hash
from jaxmeta.tasks.emoji_packs import classes_of_packs, read_packs
from jaxmeta.tasks.splits import PARTS

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(importlib.util.find_spec("resvg_py") is None, reason="resvg-py is not installed"),
]
NAMES = [f"thing-{i:02d}" for i in range(40)]
LICENCE = {"license": {"title": "MIT"}, "author": {"name": "A. Designer"}}


def square(red, green, blue):
    return f'<path fill="rgb({red},{green},{blue})" d="M0 0h16v16H0z"/>'


def pack(prefix, icons, aliases=None, **more):
    return {
        "prefix": prefix,
        "icons": {name: {"body": icon} if isinstance(icon, str) else icon for name, icon in icons.items()},
        "aliases": aliases or {},
        "width": 16,
        "height": 16,
        **more,
    }


def archive(folder, values, info=None):
    """Write a pack as the archive that npm packs."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"iconify-json-{values['prefix']}-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as file:
        for name, content in (("icons", values), ("info", LICENCE if info is None else info)):
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def unpacked(folder, values):
    (folder / values["prefix"]).mkdir(parents=True)
    (folder / values["prefix"] / "icons.json").write_text(json.dumps(values))
    (folder / values["prefix"] / "info.json").write_text(json.dumps(LICENCE))


def single(folder, values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{values['prefix']}.json").write_text(json.dumps(values | {"info": LICENCE}))


def three_styles(folder, write=archive):
    """Write three packs whose picture of thing i is a square of the colour (5 · i, 10 · pack, 0)."""
    for number, style in enumerate(("ink", "oil", "wax")):
        write(folder, pack(style, {name: square(5 * i, 10 * number, 0) for i, name in enumerate(NAMES)}))
    return folder


def thing_and_style(batch):
    """Return `(episode, slot, example)` things and styles of the squares."""
    colours = np.rint(255 * batch.x[:, :, 0, 0]).astype(int).reshape(len(batch.x), batch.ways, -1, 3)
    return colours[..., 0] // 5, colours[..., 1] // 10


@pytest.mark.parametrize("write", [archive, unpacked, single])
def test_pictures_of_a_class_are_those_of_its_name_in_every_style(tmp_path, write):
    three_styles(tmp_path / "emoji", write)
    seen = set()
    for split in PARTS:
        tasks = emoji(split, ways=3, shots=1, queries=2, data=tmp_path, size=6)
        task = sampled(tasks, 100)
        assert task.query.x.shape == (100, 6, 6, 6, 3)
        things, styles = (np.concatenate(each, 2) for each in zip(*map(thing_and_style, task), strict=True))
        assert (things == things[:, :, :1]).all()
        assert (np.sort(styles, 2) == [0, 1, 2]).all()
        names = {NAMES[thing] for thing in set(things.ravel().tolist())}
        assert names == set(getattr(split_by_hash(tuple(NAMES)), split)) == set(tasks.classes)
        assert not seen & names
        seen |= names
        assert tasks.card.tasks == "emoji"
        assert "emoji in 3 styles (ink: MIT, A. Designer; oil: MIT, A. Designer; " in tasks.card.protocol
        assert tasks.card.protocol.endswith("classes split by a hash of their names")
    assert seen == set(NAMES)
    assert emoji_licences(tmp_path) == dict.fromkeys(("ink", "oil", "wax"), "MIT, A. Designer")


def test_styles_are_domains(tmp_path):
    three_styles(tmp_path)
    settings = {"ways": 3, "shots": 1, "queries": 1, "data": tmp_path, "size": 4, "across": True}
    support, query = map(thing_and_style, sampled(emoji(**settings), 100))
    assert (support[1] != query[1]).all()
    assert (support[1] == support[1][:, :1]).all()
    held = {"test_styles": ("oil",)}
    support, query = map(thing_and_style, sampled(emoji(**settings, **held), 100))
    assert set(support[1].ravel()) | set(query[1].ravel()) == {0, 2}
    tasks = emoji("test", **settings, **held)
    support, query = map(thing_and_style, sampled(tasks, 100))
    assert set(query[1].ravel()) == {1}
    assert set(support[1].ravel()) == {0, 2}
    assert tasks.card.protocol.endswith("queries from oil, held out of training, support from other domains")
    two = sampled(emoji(**settings, styles=("wax", "ink"), min_styles=2), 100)
    support, query = map(thing_and_style, two)
    assert set((support[1] + query[1]).ravel()) == {2}


@pytest.mark.parametrize("streamed", [False, True])
def test_command_line_tasks_from_memory_and_from_disk_are_those_of_the_library(tmp_path, streamed):
    three_styles(tmp_path)
    settings = {"ways": 3, "queries": 1, "size": 4, "across": True, "test_styles": ("oil",)}
    flags = settings | {"shots": 1, "data": str(tmp_path), "stream": streamed}
    key = jax.random.key(3)
    tasks = sources.tasks_of(config_of(flags, tasks="emoji"), "test", key)
    other = emoji("test", data=tmp_path, **settings)
    assert tasks.card == other.card
    if streamed:
        task = tasks.at(0)
        one = other.sample(jax.random.split(jax.random.fold_in(key, 0))[0])
        np.testing.assert_allclose(task.query.x[0], one.query.x, atol=1e-6)
        np.testing.assert_allclose(task.support.x[0], one.support.x, atol=1e-6)
    else:
        assert_trees_equal(sampled(tasks, 5), sampled(other, 5))


def test_zero_shot_tasks_of_the_command_line_need_word_vectors(tmp_path):
    three_styles(tmp_path)
    flags = {"ways": 3, "queries": 1, "size": 4, "shots": 0, "train_shots": 0, "data": str(tmp_path)}
    chosen = {"tasks": "emoji", "learner": "prototypical"}
    with pytest.raises(ValueError, match=r"word_vectors: zero-shot tasks .* need a file"):
        sources.tasks_of(config_of(flags, **chosen), "train")
    flags["word_vectors"] = str(write_vectors(tmp_path / "vectors.txt"))
    tasks = sources.tasks_of(config_of(flags, **chosen), "train")
    assert sampled(tasks, 2).support.x.shape == (2, 3, 2)


def test_the_part_of_a_class_depends_on_its_name_only(tmp_path):
    three_styles(tmp_path)
    settings = {"ways": 2, "queries": 1, "data": tmp_path, "size": 4}
    one = emoji("test", **settings)
    archive(tmp_path, pack("pen", {name: square(1, 2, 3) for name in [*NAMES[::2], "new-thing"]}))
    other = emoji("test", **settings)
    assert set(one.classes) == set(other.classes)
    chosen = emoji("test", **settings, styles=("oil", "pen"), min_styles=2)
    assert set(chosen.classes) == set(one.classes) & set(NAMES[::2])
    names = [f"name-{i}" for i in range(4000)]
    np.testing.assert_allclose(
        np.array(split_by_hash(tuple(names)).sizes) / 4000, (0.64, 0.16, 0.2), atol=0.03
    )


def test_a_class_split_may_be_given(tmp_path):
    three_styles(tmp_path)
    split = {"train": NAMES[:30], "test": NAMES[30:]}
    tasks = emoji("test", ways=5, data=tmp_path, size=4, classes=split)
    assert set(tasks.classes) == set(NAMES[30:])
    sizes = [
        emoji(part, ways=2, data=tmp_path, size=4, classes=(0.5, 0.25, 0.25)).card.classes for part in PARTS
    ]
    assert sizes == [20, 10, 10]


def classes(*packs):
    """Return the classes of packs given as `{own name: aliases}`."""
    made = [
        emoji_packs.Pack(
            f"p{number}",
            {},
            {own: frozenset({own, *aliases.split()}) for own, aliases in names.items()},
            "",
            {},
        )
        for number, names in enumerate(packs)
    ]
    return {name: list(own.values()) for name, own in classes_of_packs(made).items()}


def test_aliases_join_the_names_of_one_thing():
    # No pack has both "hound" and "pooch"; "dog", a name of either, joins them.
    assert classes({"dog": "hound"}, {"hound": ""}, {"pooch": "dog"}, {"cat": ""}) == {
        "cat": ["cat"],
        "dog": ["dog", "hound", "pooch"],
    }
    # An alias does not join what another pack draws as two things.
    assert classes({"cricket-game": "cricket"}, {"cricket-game": "", "cricket": ""}, {"cricket": ""}) == {
        "cricket": ["cricket", "cricket"],
        "cricket-game": ["cricket-game", "cricket-game"],
    }
    # A class takes its most common name, or the shortest of equally common ones.
    assert set(classes({"heavy-sign": "sign"}, {"sign": "heavy-sign"}, {"heavy-sign": ""})) == {"heavy-sign"}
    assert set(classes({"heavy-sign": "sign"}, {"sign": "heavy-sign"})) == {"sign"}


def test_no_picture_is_in_two_classes():
    generator = np.random.default_rng(0)
    for _ in range(200):
        packs = []
        for _ in range(3):
            names = [str(name) for name in generator.permutation(6)]
            cut = generator.integers(1, 7)
            owners = generator.integers(0, cut, 6)
            packs.append({names[i]: " ".join(n for n, o in zip(names[cut:], owners, strict=False) if o == i)
                          for i in range(cut)})  # fmt: skip
        found = classes(*packs)
        assert sum(map(len, found.values())) == sum(map(len, packs))


def test_aliases_may_be_flipped_and_turned(tmp_path):
    corner = '<path fill="#f00" d="M0 0h8v8H0z"/><path fill="#00f" d="M8 8h8v8H8z"/>'
    turns = {
        "flipped": {"parent": "corner", "hFlip": True},
        "upside-down": {"parent": "corner", "vFlip": True},
        "turned": {"parent": "corner", "rotate": 1},
        "both": {"parent": "flipped", "rotate": 1},
        "half-turn": {"parent": "flipped", "vFlip": True},
        "same": {"parent": "corner"},
        "same-again": {"parent": "flipped", "hFlip": True},
    }
    archive(tmp_path, pack("one", {"corner": corner}, turns))
    images = emoji_images(
        tmp_path, size=8, styles=None, test_styles=None, min_styles=1, classes=None, word_vectors=None
    ).prepared
    assert set(images.classes) == {"same", "flipped", "upside-down", "turned", "both", "half-turn"}
    read = read_packs(tmp_path)["one"]
    rendered = {
        name: emoji_packs.render("one", own, read.pictures[own], 8)
        for own, names in read.names.items()
        for name in names
    }
    upright = rendered["corner"]
    assert (upright[:4, :4] == (255, 0, 0)).all()
    assert (upright[4:, 4:] == (0, 0, 255)).all()
    assert (upright[:4, 4:] == 255).all()
    np.testing.assert_array_equal(rendered["flipped"], upright[:, ::-1])
    np.testing.assert_array_equal(rendered["upside-down"], upright[::-1])
    np.testing.assert_array_equal(rendered["turned"], np.rot90(upright, -1))
    np.testing.assert_array_equal(rendered["both"], np.rot90(upright[:, ::-1], -1))
    np.testing.assert_array_equal(rendered["half-turn"], upright[::-1, ::-1])
    assert {"corner", "same", "same-again"} in map(set, read.names.values())


def test_pictures_are_in_the_middle_of_a_square_over_white(tmp_path):
    tall = {"body": '<path fill="#0f0" d="M0 0h8v16H0z"/>', "width": 8}
    half = '<path fill="#000" fill-opacity=".5" d="M0 0h16v16H0z"/>'
    archive(tmp_path, pack("one", {"tall": tall, "half": half}))
    read = read_packs(tmp_path)["one"]
    image = emoji_packs.render("one", "tall", read.pictures["tall"], 8)
    assert (image[:, 2:6] == (0, 255, 0)).all()
    assert (image[:, [0, 1, 6, 7]] == 255).all()
    grey = emoji_packs.render("one", "half", read.pictures["half"], 8)
    assert np.ptp(grey) <= 1
    assert abs(int(grey[0, 0, 0]) - 127) <= 1


def test_variants_flags_letters_and_hidden_icons_are_left_out(tmp_path):
    body = square(1, 2, 3)
    kept = ["wave", "traffic-light", "black-flag", "lamp-light"]
    tones = ["wave-dark-skin-tone", "boy-tone3", *(f"nod{tone}" for tone in ("-light", "-medium", "-dark"))]
    names = [
        *kept,
        *tones,
        "nod",
        "nod-medium-dark",
        "flag-chad",
        "keycap-1",
        "regional-indicator-a",
        "dark-skin-tone",
    ]
    icons = dict.fromkeys(names, body) | {"ghost": {"body": body, "hidden": True}}
    archive(tmp_path, pack("one", icons, {"spirit": {"parent": "ghost"}, "chad": {"parent": "flag-chad"}}))
    found = read_packs(tmp_path)["one"]
    assert set(found.pictures) == {*kept, "nod"}
    assert set(found.left_out) == {"skin tone", "flag", "keycap or letter", "hidden icon"}
    assert sum(map(len, found.left_out.values())) == 7 + 1 + 2 + 1
    assert str(emoji_packs.left_out_of([found])[0]) == "1 flag (one:flag-chad)"


def test_class_names_are_split_into_lower_case_words():
    assert class_words("Man-With_2 hats") == ("man", "with", "2", "hats")


def write_vectors(path, header=False):
    """Write vectors of "thing", of its numbers below 30, and of the whole name "thing-39"."""
    lines = ["thing 1.0 0.0", "Thing 9 9", *(f"{i:02d} 0 {i}" for i in range(30)), "thing-39 7 7"]
    path.write_text("\n".join((["33 2"] if header else []) + lines) + "\n")
    return path


@pytest.mark.parametrize("header", [False, True])
def test_zero_shot_support_is_the_vector_of_the_name(tmp_path, header):
    three_styles(tmp_path)
    table = write_vectors(tmp_path / "vectors.txt", header)
    tasks = emoji(ways=3, shots=0, queries=2, data=tmp_path, size=4, word_vectors=table)
    task = sampled(tasks, 100)
    things = thing_and_style(task.query)[0][:, :, 0]
    expected = np.stack([np.full(things.shape, 0.5), np.where(things < 30, things / 2, 0)], -1)
    expected = np.where((things < 30)[..., None], expected, (1.0, 0.0))  # "thing" alone is known
    expected = np.where((things == 39)[..., None], (7.0, 7.0), expected)
    np.testing.assert_allclose(task.support.x, expected)
    few = emoji(ways=3, shots=1, data=tmp_path, size=4, word_vectors=table)
    assert few.classes == tasks.classes
    assert few.card.split_hash == tasks.card.split_hash


def test_classes_without_a_known_word_are_left_out(tmp_path):
    three_styles(tmp_path)
    table = tmp_path / "vectors.txt"
    table.write_text("\n".join(f"{i:02d} 0 {i}" for i in range(25)))
    with pytest.warns(UserWarning, match="no word of 15 of 40 classes, which are left out: thing-25, "):
        tasks = emoji(ways=3, shots=0, data=tmp_path, size=4, word_vectors=table)
    assert set(tasks.classes) == set(split_by_hash(tuple(NAMES[:25])).train)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat 1 2\ndog 1\n", "line 2 of .* has 1 numbers, earlier lines 2"),
        ("cat 1 x\n", "line 1 of .* must hold a word and finite numbers, .* starts with 'cat 1 x'"),
        ("cat\n", "line 1 of .* must hold a word and finite numbers"),
        ("cat nan\n", "line 1 of .* must hold a word and finite numbers"),
        ("owl 1 2\n", "has none of the words of 2 classes: 'cat', 'dog'"),
    ],
)
def test_invalid_word_vectors_are_refused(tmp_path, text, message):
    (tmp_path / "vectors.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        class_vectors(tmp_path / "vectors.txt", ["cat", "dog"])
    with pytest.raises(FileNotFoundError, match=r"path: .* is not a file"):
        class_vectors(tmp_path / "none.txt", ["cat"])


GOOD = pack("good", {"cat": square(1, 2, 3)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pack("bad", {}), "the pack 'bad' has no icons"),
        (pack("bad", {"cat": "text"}), "the pack 'bad' has no SVG for 1 of 1 icons: cat"),
        (pack("bad", {"cat": {"width": 3}}), "the pack 'bad' has no SVG for 1 of 1 icons: cat"),
        (pack("bad", {"cat": square(1, 2, 3)}, {"dog": {"parent": "owl"}}), "alias 'dog' .* no icon: 'owl'"),
        (
            pack("bad", {"cat": square(1, 2, 3)}, {"a": {"parent": "b"}, "b": {"parent": "a"}}),
            "alias 'a' of the pack 'bad' refers to no icon",
        ),
        (pack("bad", {"cat": square(1, 2, 3)}, {"dog": "cat"}), "'bad' has aliases that are not objects"),
        (pack("bad", {"a-b": square(1, 2, 3), "a_b": square(3, 2, 1)}), "one name twice: 'a-b', 'a_b'"),
        (pack("bad", {"cat": "<path"}), "the picture 'cat' of the pack 'bad' cannot be rendered"),
        (pack("bad", {"cat": "<g></g>"}), "the picture 'cat' of the pack 'bad' is blank"),
        ({"prefix": "bad", "icons": []}, "the pack 'bad' has no icons"),
    ],
)
def test_damaged_packs_are_refused(tmp_path, values, message):
    archive(tmp_path, values)
    archive(tmp_path, GOOD)
    with pytest.raises(ValueError, match=f"data: .*{message}"):
        emoji(data=tmp_path, min_styles=1)


def test_damaged_archives_and_wrong_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data: .* is not a folder"):
        emoji(data=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"data: .* must contain packs .*npm pack @iconify-json/noto"):
        emoji(data=tmp_path)
    path = archive(tmp_path, GOOD)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"data: .*iconify-json-good-1.0.0.tgz is damaged or incomplete"):
        emoji(data=tmp_path)
    path.write_bytes(gzip.compress(b"no archive"))
    with pytest.raises(ValueError, match=r"data: .*iconify-json-good-1.0.0.tgz is damaged or incomplete"):
        emoji(data=tmp_path)
    path.unlink()
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "icons.json").write_text("{")
    with pytest.raises(ValueError, match=r"data: .*icons.json is damaged: it is not JSON"):
        emoji(data=tmp_path)
    (tmp_path / "good" / "icons.json").write_text("[]")
    with pytest.raises(ValueError, match=r"icons.json is not a pack of Iconify"):
        emoji(data=tmp_path)
    (tmp_path / "good" / "icons.json").write_text(json.dumps(GOOD))
    (tmp_path / "package.json").write_text("{}")  # another file of npm
    archive(tmp_path, GOOD)
    with pytest.raises(ValueError, match="are both the pack 'good'; keep one of them"):
        emoji(data=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"styles": ("ink", "pen")}, "styles: got 'pen'; the packs are 'ink', 'oil', 'wax'"),
        ({"styles": ()}, "styles: got no names"),
        ({"styles": "ink"}, "styles: got 'ink' .str.; it must be a tuple"),
        ({"test_styles": ("pen",)}, "test_styles: got 'pen'; the packs are"),
        ({"test_styles": ("wax", "oil", "ink")}, "test_styles: got all styles"),
        ({"styles": ("ink", "oil"), "test_styles": ("wax",), "min_styles": 1}, "test_styles: got 'wax'"),
        ({"styles": ("ink",), "min_styles": 1, "across": True}, "across: .* at least two domains"),
        ({"min_styles": 4}, "min_styles: got 4; it must be at most the number of styles, 3"),
        ({"min_styles": 0}, "min_styles: got 0"),
        ({"size": 0}, "size: got 0"),
        ({"shots": 0}, "word_vectors: zero-shot tasks .* need a file"),
        ({"queries": 3}, r"shots \+ queries = 1 \+ 3 = 4 examples are needed per class"),
        ({"split": "val"}, "split: got 'val'"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, settings, message):
    three_styles(tmp_path)
    with raises_argument_error(message):
        emoji(**{"ways": 2, "data": tmp_path, "size": 4} | settings)


def test_a_missing_renderer_is_reported(tmp_path, monkeypatch):
    three_styles(tmp_path)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'jaxmeta\[emoji\]'"):
        emoji(ways=2, data=tmp_path, size=4)


@pytest.fixture
def real(data_folder):
    if not (data_folder / "emoji").is_dir():
        pytest.skip(f"no emoji in {data_folder}")
    return data_folder


@pytest.mark.nightly
def test_real_packs_share_most_of_their_names(real):
    packs = list(read_packs(real).values())
    found = classes_of_packs(packs)
    counts = np.bincount([len(own) for own in found.values()], minlength=7)
    assert counts[6] >= 1044
    assert counts[3:].sum() >= 1600
    pictures = [(style, picture) for own in found.values() for style, picture in own.items()]
    assert len(set(pictures)) == len(pictures) == sum(len(each.pictures) for each in packs)
    assert found["bear"]["emojione"] == "bear-face"
    assert found["cricket"].keys() == {"fluent-emoji-flat", "noto", "openmoji", "twemoji"}
    assert emoji_licences(real)["openmoji"] == "CC BY-SA 4.0, OpenMoji"


@pytest.mark.nightly
def test_real_packs_render_in_colour(real):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tasks = emoji("test", ways=5, shots=1, queries=2, data=real, size=16, across=True)
    assert tasks.card.classes > 300
    task = sampled(tasks, 20)
    assert (np.ptp(task.query.x, axis=-1).reshape(20 * 10, -1).max(1) > 0.2).mean() > 0.8
    assert_trees_equal(
        task, sampled(emoji("test", ways=5, shots=1, queries=2, data=real, size=16, across=True), 20)
    )
    assert 0.5 < task.query.x.max() <= 1
