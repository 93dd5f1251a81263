"""Pretrained weights: outputs compared with PyTorch's, and leaves that the network does not have."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from weights import (
    assert_same_leaves,
    images,
    outputs,
    outputs_of,
    resnet,
    save_state,
    small_network,
    small_variables,
    vit,
)

import jaxmeta as jm
from jaxmeta.transfer.pretrained import load_pretrained, read_weights, save_pretrained
from jaxmeta.transfer.subtree import transplant

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="pip install safetensors")
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def small():
    return small_variables()


# --- Outputs of other libraries' weights ----------------------------------------------------------


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_a_resnet_of_transformers_keeps_its_outputs(tmp_path, layer_type):
    model = resnet(layer_type=layer_type)
    model.save_pretrained(tmp_path)
    x = images(45, 38)  # feature maps of odd sizes
    loaded = load_pretrained(tmp_path)
    np.testing.assert_allclose(outputs(loaded, x), outputs_of(model, x), atol=1e-4)
    assert (loaded.report.new, loaded.report.left_over) == ((), ())
    assert {row.source.rpartition("/")[2] for row in loaded.report.dropped} == {"num_batches_tracked"}
    features = load_pretrained(tmp_path, head=False)
    expected = outputs_of(model.resnet, x, "pooler_output")[:, :, 0, 0]
    np.testing.assert_allclose(outputs(features, x), expected, atol=1e-4)
    assert features.network.ways is None
    assert {"classifier/1/bias", "classifier/1/weight"} < {row.source for row in features.report.dropped}


@pytest.mark.usefixtures("torch")
def test_weights_of_transformers_classify_images_with_their_own_labels(tmp_path):
    model = resnet(id2label={number: f"kind {number}" for number in range(5)})
    model.save_pretrained(tmp_path)
    x = np.random.default_rng(1).random((4, 40, 40, 3)).astype(np.float32)
    classifier = jm.load_classifier(tmp_path, size=40)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = outputs_of(model, ((x - mean) / deviation).astype(np.float32))
    np.testing.assert_allclose(classifier.predict(x), jax.nn.softmax(expected), atol=1e-4)
    assert classifier.label(x) == [f"kind {number}" for number in expected.argmax(-1)]


@pytest.mark.usefixtures("torch")
@pytest.mark.nightly
def test_a_whole_resnet_18_keeps_its_outputs(tmp_path):
    config = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    model = resnet(config, num_labels=1000)
    model.save_pretrained(tmp_path)
    network = jm.nn.ResNet18(1000)
    loaded = load_pretrained(tmp_path, network)
    assert loaded.network is network
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.variables["params"])) == 11_689_512
    x = images(64, 64)
    np.testing.assert_allclose(outputs(loaded, x), outputs_of(model, x), atol=1e-4)


@pytest.mark.usefixtures("torch")
@pytest.mark.nightly
def test_every_leaf_of_a_whole_resnet_50_is_loaded(tmp_path):
    model = resnet({}, num_labels=1000)
    model.save_pretrained(tmp_path)
    network, variables, report, _ = load_pretrained(tmp_path)
    assert (network.depths, network.channels) == (jm.nn.ResNet50().depths, jm.nn.ResNet50().channels)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 25_557_032
    # 53 convolutions, 53 normalisations of four leaves, and the head.
    assert (len(report.taken), len(report.dropped)) == (53 + 4 * 53 + 2, 53)


def torchvision_name(name):
    name = re.sub(r"^resnet\.", "", name)
    name = re.sub(r"^embedder\.embedder\.convolution", "conv1", name)
    name = re.sub(r"^embedder\.embedder\.normalization", "bn1", name)
    stage = r"^encoder\.stages\.(\d)\.layers\.(\d)\."
    for pattern, replacement in {
        rf"{stage}layer\.(\d)\.convolution": lambda m: f"layer{int(m[1]) + 1}.{m[2]}.conv{int(m[3]) + 1}",
        rf"{stage}layer\.(\d)\.normalization": lambda m: f"layer{int(m[1]) + 1}.{m[2]}.bn{int(m[3]) + 1}",
        rf"{stage}shortcut\.convolution": lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.0",
        rf"{stage}shortcut\.normalization": lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.1",
        r"^classifier\.1": "fc",
    }.items():
        name = re.sub(pattern, replacement, name)
    return name


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_a_resnet_of_torchvision_keeps_its_outputs(tmp_path, layer_type):
    model = resnet(layer_type=layer_type)
    state = save_state(tmp_path / "weights.safetensors", model, torchvision_name)
    assert {"conv1.weight", "bn1.running_var", "layer1.1.conv2.weight", "layer2.0.downsample.1.bias"} < set(
        state
    )
    x = images(45, 38)
    loaded = load_pretrained(tmp_path / "weights.safetensors")
    np.testing.assert_allclose(outputs(loaded, x), outputs_of(model, x), atol=1e-4)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_vit_of_transformers_keeps_its_outputs_under_both_kinds_of_names(tmp_path, in_memory):
    model = vit()
    model.save_pretrained(tmp_path)
    written = safetensors_numpy.load_file(tmp_path / "model.safetensors")
    assert "vit.encoder.layer.0.attention.attention.query.weight" in written
    if in_memory:
        state = save_state(tmp_path / "model.safetensors", model)
        assert state.keys() != written.keys()
    x = images(12, 12)
    loaded = load_pretrained(tmp_path)
    assert (loaded.network.heads, loaded.network.epsilon) == (2, 1e-12)
    np.testing.assert_allclose(outputs(loaded, x), outputs_of(model, x), atol=1e-4)
    assert loaded.variables["batch_stats"] == {}


@pytest.mark.usefixtures("torch")
def test_a_vit_without_head_keeps_its_features_and_leaves_the_pooler_out(tmp_path):
    model = vit("ViTModel", image_size=(8, 16), layer_norm_eps=1e-2, qkv_bias=False)
    model.save_pretrained(tmp_path)
    x = images(8, 16)
    loaded = load_pretrained(tmp_path)
    expected = outputs_of(model, x, "last_hidden_state")[:, 0]
    np.testing.assert_allclose(outputs(loaded, x), expected, atol=1e-4)
    assert [row.source for row in loaded.report.dropped] == ["pooler/dense/bias", "pooler/dense/weight"]


def test_a_vit_can_average_its_patches(tmp_path, torch):
    model = vit("ViTModel")
    model.save_pretrained(tmp_path)
    before = []
    model.layernorm.register_forward_pre_hook(lambda module, inputs: before.append(inputs[0]))
    x = images(12, 12)
    outputs_of(model, x, "last_hidden_state")
    with torch.no_grad():
        expected = model.layernorm(before[0][:, 1:].mean(1)).numpy()
    loaded = load_pretrained(tmp_path)
    mean = loaded.network.clone(pooling="mean")
    np.testing.assert_allclose(jax.jit(mean.apply)(loaded.variables, x), expected, atol=1e-4)


def as_timm(state):
    """Return the tensors of a ViTForImageClassification under timm's names."""
    names = {
        "vit.embeddings.cls_token": "cls_token",
        "vit.embeddings.position_embeddings": "pos_embed",
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "vit.layernorm": "norm",
        "classifier": "head",
    }
    for i in range(2):
        old, new = f"vit.encoder.layer.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            parts = [
                state.pop(f"{old}.attention.attention.{part}.{kind}") for part in ("query", "key", "value")
            ]
            state[f"{new}.attn.qkv.{kind}"] = np.concatenate(parts)
        names |= {
            f"{old}.attention.output.dense": f"{new}.attn.proj",
            f"{old}.layernorm_before": f"{new}.norm1",
            f"{old}.layernorm_after": f"{new}.norm2",
            f"{old}.intermediate.dense": f"{new}.mlp.fc1",
            f"{old}.output.dense": f"{new}.mlp.fc2",
        }
    return renamed(state, names)


def as_torchvision(state):
    """Return the tensors of a ViTForImageClassification under torchvision's names."""
    names = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj",
        "norm": "encoder.ln",
        "head": "heads.head",
    }
    for i in range(2):
        old, new = f"blocks.{i}", f"encoder.layers.encoder_layer_{i}"
        names |= {
            f"{old}.attn.qkv.weight": f"{new}.self_attention.in_proj_weight",
            f"{old}.attn.qkv.bias": f"{new}.self_attention.in_proj_bias",
            f"{old}.attn.proj": f"{new}.self_attention.out_proj",
            f"{old}.norm1": f"{new}.ln_1",
            f"{old}.norm2": f"{new}.ln_2",
            f"{old}.mlp.fc1": f"{new}.mlp.0",
            f"{old}.mlp.fc2": f"{new}.mlp.3",
        }
    return renamed(as_timm(state), names)


def renamed(state, names):
    return {
        names[name] if name in names else f"{names.get(layer, layer)}{dot}{tensor}": array
        for name, array in state.items()
        for layer, dot, tensor in [name.rpartition(".")]
    }


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("prefix", ["module.", "model.backbone.", "encoder."])
def test_names_of_wrappers_are_dropped(tmp_path, prefix):
    state = save_state(tmp_path / "bare.safetensors", resnet(layer_type="basic"), torchvision_name)
    wrapped = {prefix + name: np.asarray(leaf) for name, leaf in state.items()}
    safetensors_numpy.save_file(wrapped, tmp_path / "wrapped.safetensors")
    bare, wrapped = (load_pretrained(tmp_path / f"{name}.safetensors") for name in ("bare", "wrapped"))
    assert wrapped.network == bare.network
    jax.tree.map(np.testing.assert_array_equal, wrapped.variables, bare.variables)
    # A prefix that only some of the names have is kept.
    partly = {prefix + name if "conv" in name else name: np.asarray(leaf) for name, leaf in state.items()}
    safetensors_numpy.save_file(partly, tmp_path / "partly.safetensors")
    with pytest.raises(ValueError, match="match no known layout"):
        load_pretrained(tmp_path / "partly.safetensors")


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("renaming", [as_timm, as_torchvision])
def test_a_vit_with_fused_attention_keeps_its_outputs(tmp_path, renaming):
    model = vit(layer_norm_eps=1e-6)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    safetensors_numpy.save_file(renaming(safetensors_numpy.load_file(file)), file)
    x = images(12, 12)
    with pytest.raises(ValueError, match="does not say how many heads its ViT of width 16 has"):
        load_pretrained(file)
    network = jm.nn.ViT(4, 16, 2, 2, 24, 12, 5, epsilon=1e-6)
    loaded = load_pretrained(file, network)
    np.testing.assert_allclose(outputs(loaded, x), outputs_of(model, x), atol=1e-4)
    with pytest.raises(ValueError, match=r"network: got epsilon=1e-12; the network of .* has 1e-06"):
        load_pretrained(file, network.clone(epsilon=1e-12))


@pytest.mark.usefixtures("torch")
def test_half_precision_is_cast_to_the_dtypes_of_a_passed_network(tmp_path):
    model = resnet().half()
    model.save_pretrained(tmp_path)
    built = load_pretrained(tmp_path)
    assert built.variables["params"]["head"]["kernel"].dtype == jnp.float16
    loaded = load_pretrained(tmp_path, built.network)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.variables)} == {jnp.dtype("float32")}
    assert len(loaded.report.cast) == len(loaded.report.taken)
    assert_same_leaves(jax.tree.map(lambda leaf: leaf.astype(jnp.float16), loaded.variables), built.variables)


@pytest.mark.usefixtures("torch")
def test_positions_are_interpolated_only_on_request(tmp_path):
    vit().save_pretrained(tmp_path)
    plain, resized = load_pretrained(tmp_path), load_pretrained(tmp_path, image_size=(16, 8))
    name = "position_embedding"
    expected = jm.nn.resize_positions(plain.variables["params"][name], (4, 2))
    np.testing.assert_allclose(resized.variables["params"][name], expected, atol=1e-6)
    assert outputs(resized, images(16, 8)).shape == (2, 5)
    network = plain.network.clone(image_size=(16, 8))
    assert_same_leaves(load_pretrained(tmp_path, network, image_size=(16, 8)).variables, resized.variables)
    with pytest.raises(
        ValueError, match=rf'"params/{name}".*\(1, 10, 16\); it must be \(1, 9, 16\); image_size='
    ):
        load_pretrained(tmp_path, network)
    with pytest.raises(ValueError, match=r"image_size: got 20; the passed network is for \(16, 8\)"):
        load_pretrained(tmp_path, network, image_size=20)


# --- Networks that differ from the file's ---------------------------------------------------------


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu' .* ViT has 'gelu'"),
        ({"model_type": "deit"}, "model_type is 'deit'"),
        ({"num_attention_heads": "many"}, "has heads='many'"),
        ({"num_attention_heads": 5}, "heads: got 5; it must divide"),
        ({"image_size": [1, 2, 3]}, r"has image_size=\[1, 2, 3\]"),
        ({"model_type": None, "architecture": "vit_relpos_small"}, "model_type is None"),
    ],
)
def test_a_configuration_with_another_forward_pass_is_rejected(tmp_path, change, message):
    vit().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.usefixtures("torch")
def test_networks_with_known_names_and_another_forward_pass_are_rejected(tmp_path):
    model = resnet(layer_type="bottleneck", downsample_in_bottleneck=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="downsample_in_bottleneck is True"):
        load_pretrained(tmp_path)
    save_state(tmp_path / "model.safetensors", model, torchvision_name)
    for architecture, fits in {"resnet50": True, "resnetblur50": False, "resnet50.a1_in1k": True}.items():
        (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}))
        if fits:
            assert load_pretrained(tmp_path).network.bottleneck
        else:
            with pytest.raises(ValueError, match="architecture is 'resnetblur50'"):
                load_pretrained(tmp_path)


@pytest.mark.usefixtures("torch")
def test_a_passed_network_must_have_the_number_of_heads_of_the_file(tmp_path):
    vit().save_pretrained(tmp_path)
    network = load_pretrained(tmp_path).network.clone(heads=4)
    with pytest.raises(ValueError, match=r"network: got heads=4; the network of .* has 2"):
        load_pretrained(tmp_path, network)


def test_missing_unknown_and_misshapen_leaves_are_named_and_initialised_on_request(tmp_path, small):
    file = tmp_path / "weights.safetensors"
    params = {**small["params"], "extra": {"kernel": jnp.ones(2)}}
    params["stem_conv"] = {"kernel": jnp.ones((5, 7, 3, 4))}
    del params["stage1_block0"]
    save_pretrained(file, {**small, "params": params})
    with pytest.raises(ValueError, match=re.escape(str(file))) as refused:
        load_pretrained(file, small_network())
    for line in (
        '"params/stage1_block0/layer0_conv/kernel" is missing',
        '"params/extra/kernel" is unknown to the network',
        '"params/stem_conv/kernel" has shape (5, 7, 3, 4); it must be (7, 7, 3, 4)',
    ):
        assert line in str(refused.value)
    with pytest.raises(ValueError, match='"params/stage1_block0/layer0_conv/kernel" is missing'):
        load_pretrained(file, small_network(), head=False)
    params["stem_conv"] = small["params"]["stem_conv"]
    save_pretrained(file, {**small, "params": params}, overwrite=True)
    with pytest.raises(
        ValueError, match=r"key: got None, and .* does not fill params/stage1_block0/layer0_conv"
    ):
        load_pretrained(file, small_network(), strict=False)
    loaded = load_pretrained(file, small_network(), strict=False, key=KEY)
    assert all(row.target.split("/")[1] == "stage1_block0" for row in loaded.report.new)
    left_over = {row.source for row in loaded.report.left_over}
    assert left_over == {"params/extra/kernel"}
    initial = jax.jit(small_network().init)(KEY, images(32, 32))["params"]
    new = loaded.variables["params"]["stage1_block0"]["layer0_conv"]["kernel"]
    np.testing.assert_allclose(new, initial["stage1_block0"]["layer0_conv"]["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(
        loaded.variables["params"]["stem_conv"]["kernel"], params["stem_conv"]["kernel"]
    )


@pytest.mark.usefixtures("torch")
def test_a_batch_norm_of_torch_without_statistics_is_rejected(tmp_path):
    state = save_state(tmp_path / "all.safetensors", resnet(layer_type="basic"), torchvision_name)
    incomplete = {name: array for name, array in state.items() if "running" not in name}
    safetensors_numpy.save_file(incomplete, tmp_path / "incomplete.safetensors")
    with pytest.raises(ValueError, match='"batch_stats/stem_norm/mean" is missing'):
        load_pretrained(tmp_path / "incomplete.safetensors")


def test_a_head_with_other_classes_is_initialised_on_request(tmp_path, small):
    file = tmp_path / "weights.safetensors"
    save_pretrained(file, small)
    with pytest.raises(ValueError, match=r'"params/head/kernel" has shape \(8, 5\); .*\(8, 3\); head=False'):
        load_pretrained(file, small_network(3))
    with pytest.raises(ValueError, match="key: got None"):
        load_pretrained(file, small_network(3), head=False)
    loaded = load_pretrained(file, small_network(3), head=False, key=KEY)
    assert loaded.variables["params"]["head"]["kernel"].shape == (8, 3)
    assert {row.target for row in loaded.report.new} == {"params/head/bias", "params/head/kernel"}
    # A network without a head drops it by itself.
    features = load_pretrained(file, small_network(None))
    assert {row.source for row in features.report.dropped} == {"params/head/bias", "params/head/kernel"}


def test_names_of_no_known_layout_can_be_mapped_by_hand(tmp_path, torch):
    class Perceptron(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(2, name="out")(linen.relu(linen.Dense(3, name="hidden")(x)))

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    file = tmp_path / "mlp.safetensors"
    save_state(file, model)
    with pytest.raises(ValueError, match=r"0/bias, 0/weight, 2/bias.*huggingface-vit.*read_weights"):
        load_pretrained(file)
    with pytest.raises(ValueError, match="layout: got 'tf'"):
        load_pretrained(file, layout="tf")
    weights = jax.tree.map(np.transpose, read_weights(file))
    x = images(2, 2)[:, 0, 0, :].repeat(2, 1)[:, :4]
    params = jax.eval_shape(Perceptron().init, KEY, x)["params"]
    rules = [("0/weight", "hidden/kernel"), ("2/weight", "out/kernel"), ("0", "hidden"), ("2", "out")]
    params, _ = transplant(weights, params, rules=rules)
    with torch.no_grad():
        expected = model(torch.tensor(np.asarray(x))).numpy()
    np.testing.assert_allclose(Perceptron().apply({"params": params}, x), expected, atol=1e-5)


# --- SqueezeNet -----------------------------------------------------------------------------------


def torch_squeezenet(state, x):
    """Return features and logits of SqueezeNet 1.1 by torch's functions."""
    import torch
    from torch.nn.functional import conv2d, max_pool2d, relu

    state = {name: torch.tensor(np.asarray(leaf)) for name, leaf in state.items()}

    def conv(name, x, **settings):
        return relu(conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **settings))

    x = conv("features.0", torch.tensor(np.asarray(x, np.float32)).permute(0, 3, 1, 2), stride=2)
    for i in range(2, 13):
        if i in (2, 5, 8):
            x = max_pool2d(x, 3, 2, ceil_mode=True)
            continue
        x = conv(f"features.{i}.squeeze", x)
        wide = conv(f"features.{i}.expand3x3", x, padding=1)
        x = torch.cat([conv(f"features.{i}.expand1x1", x), wide], 1)
    return x.mean((2, 3)).numpy(), conv("classifier.1", x).mean((2, 3)).numpy()


def squeezenet_state(ways):
    """Return random tensors of torchvision's squeezenet1_1 under its names."""
    rng = np.random.default_rng(0)
    shapes = {"features.0": (64, 3, 3, 3), "classifier.1": (ways, 512, 1, 1)}
    channels = 64
    fires = {3: (16, 64), 4: (16, 64), 6: (32, 128), 7: (32, 128)}
    fires |= {9: (48, 192), 10: (48, 192), 11: (64, 256), 12: (64, 256)}
    for i, (squeeze, expand) in fires.items():
        shapes[f"features.{i}.squeeze"] = (squeeze, channels, 1, 1)
        shapes[f"features.{i}.expand1x1"] = (expand, squeeze, 1, 1)
        shapes[f"features.{i}.expand3x3"] = (expand, squeeze, 3, 3)
        channels = 2 * expand
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        state[f"{name}.bias"] = rng.normal(0, 0.1, shape[0])
    return {name: leaf.astype(np.float32) for name, leaf in state.items()}


@pytest.mark.usefixtures("torch")
@pytest.mark.nightly
def test_a_squeezenet_of_torchvision_keeps_its_outputs_and_features(tmp_path):
    state = squeezenet_state(5)
    file = tmp_path / "weights.safetensors"
    safetensors_numpy.save_file(state, file)
    x = images(37, 50)  # maps of odd and of even sizes
    features, logits = torch_squeezenet(state, x)
    loaded = load_pretrained(file)
    assert loaded.network == jm.nn.SqueezeNet(5, classifier="convolution")
    np.testing.assert_allclose(outputs(loaded, x), logits, rtol=1e-5, atol=1e-5)
    assert (logits > 0).any()
    headless = load_pretrained(file, head=False)
    assert headless.network == jm.nn.SqueezeNet()
    np.testing.assert_allclose(outputs(headless, x), features, rtol=1e-5, atol=1e-5)
    assert [row.source for row in headless.report.dropped] == ["classifier/1/bias", "classifier/1/weight"]
    new = load_pretrained(file, jm.nn.SqueezeNet(3), head=False, key=KEY)
    assert new.variables["params"]["head"]["kernel"].shape == (512, 3)
    # A saved file describes the classifier.
    save_pretrained(tmp_path / "saved.safetensors", loaded.variables, network=loaded.network)
    again = load_pretrained(tmp_path / "saved.safetensors")
    assert again.network == loaded.network
    assert_same_leaves(again.variables, loaded.variables)


@pytest.mark.usefixtures("torch")
def test_weights_of_imagenet_keep_their_outputs(data_folder):
    file = data_folder / "weights" / "squeezenet1_1.safetensors"
    x = images(64, 75)
    features, logits = torch_squeezenet(safetensors_numpy.load_file(file), x)
    np.testing.assert_allclose(outputs(load_pretrained(file), x), logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs(load_pretrained(file, head=False), x), features, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("torch")
def test_a_classifier_with_the_head_of_squeezenet_has_its_probabilities(data_folder):
    file = data_folder / "weights" / "squeezenet1_1.safetensors"
    x = np.random.default_rng(1).random((2, 64, 64, 3)).astype(np.float32)
    classifier = jm.load_classifier(file, size=64)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    logits = torch_squeezenet(safetensors_numpy.load_file(file), (x - mean) / deviation)[1]
    np.testing.assert_allclose(classifier.predict(x), jax.nn.softmax(logits), rtol=1e-4, atol=1e-6)
    assert len(classifier.classes) == 1000
