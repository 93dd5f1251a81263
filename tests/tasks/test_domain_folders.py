"""Tests of the domains of image folders and npz files: layouts, the cache, streams and errors."""

import jax
import numpy as np
import pytest
from draws import assert_trees_equal, sampled
from PIL import Image

from jaxmeta.tasks.array_files import from_npz
from jaxmeta.tasks.episodes import from_arrays
from jaxmeta.tasks.folder import from_folder, prepare_folder
from jaxmeta.tasks.prepared import from_prepared
from jaxmeta.tasks.stream import stream

pytestmark = pytest.mark.usefixtures("cache")
CLASSES, DOMAINS, EACH = ("ant", "bee", "cow", "doe"), ("art", "clip", "real"), 2
SETTINGS = {"ways": 3, "shots": 2, "queries": 2, "classes": None}


def write(root, layout):
    """Write images whose three channels are the class, the domain and the number of the image."""
    for c, name in enumerate(CLASSES):
        for d, domain in enumerate(DOMAINS):
            for i in range(EACH):
                path = root / layout.format(c=name, d=domain, i=i)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((6, 6, 3), (c, d, i), np.uint8)).save(path)
    return root


LAYOUTS = {
    "class/domain": "{c}/{d}/{i}.png",
    "domain/class": "{d}/{c}/{i}.png",
    "([a-z]+)_": "{c}/{d}_{i}.png",
}


def numbers(batch):
    """Return `(episode, slot, example, (class, domain, number))` of images."""
    first = np.rint(255 * batch.x[:, :, 0, 0]).astype(int)
    return first.reshape(len(first), batch.ways, -1, 3)


def expected(**settings):
    """Return the tasks of the same images, given as arrays."""
    rows = [(c, d, i) for c in range(4) for d in range(3) for i in range(EACH)]
    x = np.broadcast_to(np.array(rows, np.uint8)[:, None, None], (len(rows), 6, 6, 3))
    y, domains = [CLASSES[c] for c, _, _ in rows], [DOMAINS[d] for _, d, _ in rows]
    return from_arrays(x, y, domains=domains, **SETTINGS | settings)


@pytest.mark.parametrize("domains", LAYOUTS)
@pytest.mark.parametrize(
    "settings",
    [
        {"across": True},
        {"across": True, "split": "test", "test_domains": ("clip",)},
        {"split": "validation", "test_domains": ("clip",)},
    ],
)
def test_folders_give_the_episodes_of_arrays(tmp_path, domains, settings):
    folder = write(tmp_path / "photos", LAYOUTS[domains])
    for _ in range(2):  # the second time from the cache
        tasks = from_folder(folder, domains=domains, **SETTINGS | settings)
        other = expected(**settings)
        assert_trees_equal(sampled(tasks, 10), sampled(other, 10))
        assert tasks.card.protocol == other.card.protocol
    support, query = map(numbers, sampled(tasks, 10))
    if settings.get("across"):
        assert not (support[..., :, None, 1] == query[..., None, :, 1]).any()


@pytest.mark.parametrize("settings", [{"across": True}, {"split": "test", "test_domains": ("art", "real")}])
def test_streams_draw_the_episodes_from_memory(tmp_path, settings):
    images = prepare_folder(write(tmp_path / "photos", "{d}/{c}/{i}.png"), domains="domain/class")
    settings = SETTINGS | settings
    key = jax.random.key(7)
    read = stream(images, key=key, meta_batch=5, for_evaluation=True, **settings)
    tasks = from_prepared(images, **settings)
    assert read.card == tasks.card
    keys = [jax.random.split(jax.random.fold_in(key, i))[0] for i in range(5)]
    for i, episode_key in enumerate(keys):
        task = tasks.sample(episode_key)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-7), tuple(read.at(0)), tuple(task)
        )


def test_streams_have_all_domains_of_the_data_though_a_part_lacks_some(tmp_path):
    folder = write(tmp_path / "photos", "{c}/{d}/{i}.png")
    (folder / "ant" / "real").rename(folder / "ant" / "ink")
    images = prepare_folder(folder, domains="class/domain")
    settings = SETTINGS | {"across": True, "classes": {"train": CLASSES[1:], "test": CLASSES[:1]}}
    key = jax.random.key(7)
    read = stream(images, key=key, meta_batch=2, for_evaluation=True, **settings)
    task = from_prepared(images, **settings).sample(jax.random.split(jax.random.fold_in(key, 0))[0])
    np.testing.assert_allclose(read.at(0).query.x[0], task.query.x, atol=1e-7)


def test_unreadable_images_have_no_row_and_so_no_domain(tmp_path):
    folder = write(tmp_path / "photos", "{c}/{d}_{i}.png")
    (folder / "bee" / "art_1.png").write_bytes(b"no image")
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of 24 images are left out: bee/art_1.png"):
            images = prepare_folder(folder, domains="([a-z]+)_", skip_unreadable=True)
        assert images.domains[6:11] == ("art", "clip", "clip", "real", "real")
        assert len(images.domains) == len(images) == 23
        assert np.array_equal(images.read(range(6, 11))[:, 0, 0, 1], [0, 1, 1, 2, 2])
    plain = prepare_folder(write(tmp_path / "others", "{c}/{d}_{i}.png"))
    assert plain.domains == ()


def test_images_elsewhere_are_reported(tmp_path):
    folder = write(tmp_path / "photos", "{d}/{c}/{i}.png")
    Image.new("L", (6, 6)).save(folder / "art" / "loose.png")
    (folder / "list.txt").write_text("art/ant/0.png 0")
    summary = prepare_folder(folder, domains="domain/class").summary
    assert "by folders domain/class" in str(summary)
    assert "1 image outside the folders domain/class (art/loose.png)" in str(summary)
    assert "1 file that is not an image (list.txt)" in str(summary)


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ("class/domain", "domains: got 'class/domain', but .* has no images in folders of this form; it has"),
        ("([a-z]+", r"domains: got '\(\[a-z\]\+', which is not a regular expression"),
        ("[a-z]+_", "domains: .* a regular expression with 0 groups; it must be 'class/domain', 'domain/cl"),
        ("(art|clip)_", "no domain for 8 of 24 file names, such as 'real_0.png'"),
        ("([A-Z])", "no domain for 24 of 24 file names, such as 'art_0.png'"),
        ("(x?)", "no domain for 24 of 24 file names"),
    ],
)
def test_domains_that_do_not_fit_are_refused(tmp_path, domains, message):
    folder = write(tmp_path / "photos", "{c}/{d}_{i}.png")
    with pytest.raises(ValueError, match=message):
        from_folder(folder, domains=domains, **SETTINGS)
    with pytest.raises(ValueError, match="across: the examples have no domains"):
        from_folder(folder, across=True, **SETTINGS)


def test_npz_files_may_have_domains(tmp_path):
    rows = [(c, d, i) for c in range(4) for d in range(3) for i in range(EACH)]
    x = np.broadcast_to(np.array(rows, np.uint8)[:, None, None], (len(rows), 6, 6, 3))
    y, domain = [CLASSES[c] for c, _, _ in rows], [DOMAINS[d] for _, d, _ in rows]
    path = tmp_path / "images.npz"
    np.savez(path, x=x, y=y, domain=domain)
    settings = {"across": True, "split": "test", "test_domains": ("clip",)}
    assert_trees_equal(sampled(from_npz(path, **SETTINGS | settings), 10), sampled(expected(**settings), 10))
    half = np.arange(len(rows)) % 2 == 0
    parts = {
        "x_train": x[half],
        "y_train": np.array(y)[half],
        "x_test": x[~half],
        "y_test": np.array(y)[~half],
    }
    np.savez(path, **parts, domain_train=np.array(domain)[half], domain_test=np.array(domain)[~half])
    tasks = from_npz(path, **SETTINGS | {"across": True, "shots": 1, "queries": 1})
    support, query = map(numbers, sampled(tasks, 20))
    assert (support[..., 1] != query[..., 1]).all()
    np.savez(path, **parts, domain_train=np.array(domain)[half])
    with pytest.raises(ValueError, match="domains for some of its parts"):
        from_npz(path, **SETTINGS)
    np.savez(path, x=x, y=y, domain=domain[1:])
    with pytest.raises(ValueError, match=r"domain has shape \(23,\) .* must be \(24,\) names"):
        from_npz(path, **SETTINGS)
    np.savez(path, x=x, y=y)
    with pytest.raises(ValueError, match=r"across: .* has no array domain"):
        from_npz(path, across=True, **SETTINGS)
