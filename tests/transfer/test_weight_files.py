"""Weight files: every format is read back, and every damaged file and pickle is rejected."""

import json
import pickle
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, serialization
from weights import assert_same_leaves, filled, images, small_network, small_variables, vit

import jaxmeta as jm
from jaxmeta.cli import main
from jaxmeta.nn.norm import from_moments
from jaxmeta.transfer import weight_files
from jaxmeta.transfer.architectures import described
from jaxmeta.transfer.pretrained import load_pretrained, save_pretrained
from jaxmeta.transfer.subtree import leaves_by_path

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="pip install safetensors")
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def small():
    return small_variables()


# --- Files of jaxmeta -------------------------------------------------------------------------------


def test_a_saved_file_keeps_every_bit_and_dtype(tmp_path):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(3, 4)).astype(np.float32)
    variables = {
        "params": {
            "float32": jnp.asarray(matrix),
            "transposed": matrix.T,
            "bfloat16": jnp.asarray(matrix, jnp.bfloat16),
            "float16": jnp.asarray(matrix, jnp.float16),
            "int8": jnp.arange(5, dtype=jnp.int8),
            "int64": np.array([2**40, -1]),
            "float64": rng.normal(size=2),
            "bool": np.array([True, False]),
            "scalar": np.float32(np.nan),
            "empty": np.zeros((0, 3), np.float32),
            "nested.dots": {"in": {"deep": jnp.ones((1, 1, 2))}},
        },
        "batch_stats": {"norm": {"mean": jnp.ones(2), "var": jnp.ones(2)}},
    }
    file = tmp_path / "new" / "weights.safetensors"
    save_pretrained(file, variables)
    loaded = load_pretrained(file)
    assert loaded.network is None
    assert_same_leaves(loaded.variables, variables)
    assert isinstance(loaded.variables["params"]["bfloat16"], jax.Array)
    # The safetensors library reads the same.
    np.testing.assert_array_equal(safetensors_numpy.load_file(file)["params/transposed"], matrix.T)
    assert [path.name for path in file.parent.iterdir()] == ["weights.safetensors"]
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_pretrained(file, variables)


@pytest.mark.parametrize(
    "network",
    [
        small_network(),
        jm.nn.ViT(4, 8, 1, 4, 16, (8, 4), ways=3, pooling="mean", epsilon=1e-6),
        jm.nn.Conv4(ways=3, filters=4),
        jm.nn.MLP(out=2, hidden=(3,)),
    ],
)
def test_a_saved_file_describes_its_network(tmp_path, network):
    x = images(8, 4) if isinstance(network, jm.nn.ViT) else images(16, 16)
    variables = filled(jax.eval_shape(network.init, KEY, x))
    save_pretrained(tmp_path / "weights.safetensors", variables, network=network)
    loaded = load_pretrained(tmp_path / "weights.safetensors")
    assert loaded.network == network
    assert_same_leaves(loaded.variables, {**variables, "batch_stats": {}})


def test_only_networks_that_a_reader_can_build_are_described(tmp_path, small):
    class UserNetwork(linen.Module):
        pass

    file = tmp_path / "weights.safetensors"
    with pytest.raises(ValueError, match=r"network: got UserNetwork; it must be a network of jaxmeta\.nn"):
        save_pretrained(file, small, network=UserNetwork())
    with pytest.raises(ValueError, match="network: an attribute of MLP cannot be written"):
        save_pretrained(file, small, network=jm.nn.MLP(out=2, activation=jnp.tanh))
    for text in (
        "[",
        "{}",
        '{"class": "as_model", "attributes": {}}',
        '{"class": "ViT", "attributes": {"x": 1}}',
    ):
        safetensors_numpy.save_file({"params/a": np.ones(1)}, file, {"network": text})
        with pytest.raises(ValueError, match=r"does not describe a network of jaxmeta\.nn"):
            load_pretrained(file)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"kernel": np.ones(2)}, r"variables: got \['kernel'\]; they must be a dict with"),
        ({"params": np.ones(2)}, r"variables: got \['params'\]"),
        ({"params": {"a/b": np.ones(2)}}, "got the key 'a/b'"),
        ({"params": {1: np.ones(2)}}, "got the key 1"),
        ({"params": {"a": [np.ones(2)]}}, 'got list at "params/a"'),
        ({"params": {"a": "text"}}, 'got str at "params/a"'),
    ],
)
def test_only_nested_dicts_of_arrays_are_saved(tmp_path, variables, message):
    with pytest.raises(ValueError, match=message):
        save_pretrained(tmp_path / "weights.safetensors", variables)
    assert not list(tmp_path.iterdir())


def test_only_safetensors_files_are_written(tmp_path, small):
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save_pretrained(tmp_path / "weights.bin", small)
    assert not list(tmp_path.iterdir())


@pytest.mark.nightly_rows(after=5)
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("msgpack", "training state"),
        ("msgpack", "parameters"),
        ("jm.save", "variables"),
        ("orbax", "training state"),
        ("orbax step", "variables"),
        ("msgpack", "variables"),
        ("jm.save", "parameters"),
        ("jm.save", "training state"),
        ("orbax", "variables"),
        ("orbax", "parameters"),
        ("orbax step", "parameters"),
        ("orbax step", "training state"),
    ],
)
def test_files_of_flax_and_orbax_are_read(tmp_path, small, kind, content):
    tree = {
        "variables": small,
        "parameters": small["params"],
        "training state": {**small, "step": jnp.int32(3), "opt_state": {"0": {"mu": jnp.ones(2)}}},
    }[content]
    path = tmp_path / "weights"
    if kind == "msgpack":
        path = tmp_path / "weights.msgpack"
        path.write_bytes(serialization.to_bytes(tree))
    elif kind == "jm.save":
        jm.save(path, tree)
    else:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path / "default" if kind == "orbax step" else path, tree)
    loaded = load_pretrained(path, small_network())
    expected = {"params": small["params"], "batch_stats": {}} if content == "parameters" else small
    assert_same_leaves(loaded.variables, expected)
    dropped = {"step", "opt_state/0/mu"} if content == "training state" else set()
    assert {row.source for row in loaded.report.dropped} == dropped


def test_a_custom_flax_network_is_loaded_with_an_example_input(tmp_path):
    class UserNetwork(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.BatchNorm(use_running_average=not train)(linen.Dense(3)(x))
            return linen.Dense(2, name="head")(linen.Dropout(0.5, deterministic=not train)(x))

    x = jnp.ones((2, 4))
    variables = filled(jax.eval_shape(lambda x: UserNetwork().init(KEY, x, False), x))
    file = tmp_path / "weights.safetensors"
    save_pretrained(file, variables)
    with pytest.raises(ValueError, match="x: got None; UserNetwork needs an example input"):
        load_pretrained(file, UserNetwork())
    for example in (x, jax.ShapeDtypeStruct(x.shape, x.dtype), x.shape):
        assert_same_leaves(load_pretrained(file, UserNetwork(), x=example).variables, variables)
    save_pretrained(file, {"params": variables["params"]}, overwrite=True)
    with pytest.raises(ValueError, match='"batch_stats/BatchNorm_0/mean" is missing'):
        load_pretrained(file, UserNetwork(), x=x)


def test_variables_of_a_run_are_its_model_and_the_statistics_of_its_population(tmp_path, monkeypatch):
    network = jm.nn.MLP(out=None, hidden=(3,), norm=True)
    model = filled(jax.eval_shape(network.init, KEY, np.ones((1, 2), np.float32))["params"])
    mean, var = np.float32([1, 2, 3]), np.float32([0.5, 1, 2])
    population = {"model": {"BatchNorm_0": {"mean": mean, "mean_of_squares": var + mean**2}}}
    params = {"model": model, "population": population}
    (tmp_path / "checkpoints").mkdir()
    config = {
        "format": 4,
        "learner": {"name": "simple_shot"},
        "network": {"name": "mlp"},
        "run": {"seed": 0},
        "model": described(network),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(weight_files, "load_params", lambda folder, config: params)
    loaded = load_pretrained(tmp_path)
    assert loaded.network == network
    assert_same_leaves(loaded.variables["params"], model)
    assert_same_leaves(loaded.variables["batch_stats"], {"BatchNorm_0": {"mean": mean, "var": var}})
    for other in ({"per_step": {}, **params}, {"networks": model}):
        params = other
        with pytest.raises(
            ValueError, match="is a run of simple_shot, whose parameters are not those of a single network: "
        ):
            load_pretrained(tmp_path)


@pytest.mark.nightly
def test_a_run_is_loaded_with_its_network_and_statistics(tmp_path):
    run, again = tmp_path / "run", tmp_path / "again.safetensors"
    flags = ["--tasks", "glyphs", "--ways", "2", "--queries", "1", "--steps", "2", "--meta-batch", "2"]
    flags += ["--episodes", "4", "--network", "mlp", "--hidden", "8", "--out", str(run)]
    assert main(["train", "simple_shot", *flags]) == 0
    _, params = jm.load_run(run)
    loaded = load_pretrained(run)
    assert (loaded.network.out, loaded.network.hidden) == (None, (8,))
    assert_same_leaves(loaded.variables["params"], params["model"])
    statistics = from_moments(params["population"])["model"]
    assert leaves_by_path(statistics).keys() == {"BatchNorm_0/mean", "BatchNorm_0/var"}
    assert_same_leaves(loaded.variables["batch_stats"], statistics)
    # A network with a function among its attributes has no description; the caller passes it.
    save_pretrained(again, loaded.variables)
    start = jax.nn.initializers.lecun_normal()
    network = jm.nn.MLP(out=None, hidden=(8,), norm=True, kernel_init=start)
    reloaded = load_pretrained(again, network, x=(1, 28, 28, 1))
    assert_same_leaves(reloaded.variables, loaded.variables)


@pytest.mark.usefixtures("torch")
def test_shards_are_assembled_and_bad_indices_rejected(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole, shards = load_pretrained(tmp_path / "whole"), load_pretrained(tmp_path / "shards")
    assert_same_leaves(shards.variables, whole.variables)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    for target, message in {
        "../whole/model.safetensors": "points to '../whole/model.safetensors'; it must be a safetensors file",
        "model-9.safetensors": "points to model-9.safetensors, which does not exist",
    }.items():
        index.write_text(json.dumps({"weight_map": {**content["weight_map"], name: target}}))
        with pytest.raises(ValueError, match=message):
            load_pretrained(tmp_path / "shards")
    index.write_text(
        json.dumps({"weight_map": {**content["weight_map"], "vit.other": content["weight_map"][name]}})
    )
    with pytest.raises(ValueError, match="lists vit/other, which none of its files contains"):
        load_pretrained(tmp_path / "shards")


# --- Bad files -----------------------------------------------------------------------------------


def header(content, length=None, data=b"\0" * 8):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


GOOD = {"params/a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "short": b"\x01\x02",
        "header longer than the file": header(GOOD, 10**6),
        "header longer than any memory": header(GOOD, 2**63),
        "not JSON": header(b"{not json}"),
        "not UTF-8": header(b'{"\xff\xfe": 1}'),
        "a list": header([1, 2]),
        "deeply nested": header(b"[" * 10**5),
        "truncated": header(GOOD, data=b"\0\0"),
        "trailing data": header(GOOD, data=b"\0" * 100),
        "beyond the end": header({"params/a": {"dtype": "F32", "shape": [1], "data_offsets": [100, 104]}}),
        "negative": header({"params/a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
        "huge": header({"params/a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 8]}}),
        "overlapping": header(
            {
                "params/a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "params/b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            }
        ),
        "unknown dtype": header({"params/a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 8]}}),
        "no offsets": header({"params/a": {"dtype": "F32", "shape": [2]}}),
        "a pickle": pickle.dumps({"params/a": np.ones(3)}),
        "a zip": b"PK\x03\x04" + b"\0" * 60,
        "two leaves as one": header(
            {
                "params/a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "params/a/b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            }
        ),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_damaged_or_hostile_safetensors_file_is_rejected(tmp_path, content):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content[1])
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        load_pretrained(file)


def test_a_safetensors_file_cut_anywhere_is_rejected(tmp_path, small):
    file = tmp_path / "weights.safetensors"
    save_pretrained(file, small)
    content = file.read_bytes()
    for length in np.random.default_rng(0).integers(0, len(content), 20):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"weights\.safetensors cannot be read as safetensors"):
            load_pretrained(file)


@pytest.mark.parametrize(
    "name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "model.npy"]
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_pickle_is_never_opened(tmp_path, name, in_folder):
    class Payload:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    (tmp_path / name).write_bytes(pickle.dumps(Payload()))
    advice = "allow_pickle=False" if name.endswith(".npy") else "weights_only=True"
    with pytest.raises(ValueError, match=rf"{name} may hold a pickle.*{advice}"):
        load_pretrained(tmp_path if in_folder else tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.msgpack", b"\xc1", "cannot be read as Flax's msgpack"),
        ("a.msgpack", b"", "cannot be read as Flax's msgpack"),
        ("a.msgpack", serialization.msgpack_serialize([1, 2]), "it holds a list"),
        ("a.msgpack", serialization.msgpack_serialize({"params": {"a": "text"}}), 'has str at "params/a"'),
        ("a.h5", b"", "format is unknown; it must be a .safetensors"),
        ("_METADATA", b"{}", "cannot be read as an Orbax checkpoint"),
        ("model.safetensors.index.json", b"[]", "cannot be read as JSON"),
        ("model.safetensors.index.json", b"{}", 'has no "weight_map"'),
        ("readme.txt", b"", "has no weights of a known format"),
    ],
)
def test_a_damaged_or_foreign_file_of_another_format_is_rejected(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / name if name.startswith("a.") else tmp_path)


def test_a_folder_with_several_files_of_weights_is_rejected(tmp_path, small):
    for name in ("a", "b"):
        save_pretrained(tmp_path / f"{name}.safetensors", small)
    with pytest.raises(ValueError, match=r"several files of weights: a\.safetensors, b\.safetensors"):
        load_pretrained(tmp_path)


# --- The Hub -------------------------------------------------------------------------------------


def test_a_missing_path_that_may_be_on_the_hub_raises_an_error_with_its_name_there():
    with pytest.raises(FileNotFoundError, match='use "hf:microsoft/resnet-18"'):
        load_pretrained("microsoft/resnet-18")
    with pytest.raises(ValueError, match="revision: got 'main'"):
        load_pretrained("microsoft/resnet-18", revision="main")


@pytest.mark.usefixtures("torch")
def test_only_safetensors_and_their_json_are_fetched_from_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.utils import filter_repo_objects

    requested = {}

    def fetch(repository, *, revision, allow_patterns):
        requested.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    with pytest.raises(ValueError, match=r"hf:someone/vit has no model\.safetensors"):
        load_pretrained("hf:someone/vit")
    vit().save_pretrained(tmp_path)
    loaded = load_pretrained("hf:someone/vit", revision="v2")
    assert (requested["repository"], requested["revision"]) == ("someone/vit", "v2")
    assert loaded.network.heads == 2
    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
    ]
    unwanted = ["pytorch_model.bin", "model.pkl", "tf_model.h5", "optimizer.pt", "modeling.py"]
    assert list(filter_repo_objects([*wanted, *unwanted], allow_patterns=requested["patterns"])) == wanted


def test_errors_of_the_hub_name_a_missing_connection_or_package(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"hf:nobody/nothing cannot be fetched .* without a network"):
        load_pretrained("hf:nobody/nothing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxmeta\[hub\]'"):
        load_pretrained("hf:nobody/nothing")


def test_errors_of_safetensors_name_the_missing_package(tmp_path, small, monkeypatch):
    file = tmp_path / "weights.safetensors"
    save_pretrained(file, small)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        load_pretrained(file)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_pretrained(file, small, overwrite=True)
