"""DINOv2 and CLIP: outputs compared with transformers' on random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import raises_argument_error
from test_pretrained import renamed
from weights import images, outputs, outputs_of, randomised, save_state

import jaxmeta as jm
from jaxmeta.transfer.pretrained import load_pretrained

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="pip install safetensors")
pytestmark = pytest.mark.usefixtures("torch")

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}


def model_of(kind, config, **settings):
    """Return a model of transformers with random weights, every one of which affects the outputs."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = randomised(getattr(transformers, kind)(getattr(transformers, config)(**{**SIZES, **settings})))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name or "register" in name or "embedding" in name or "token" in name:
                parameter.normal_()
    return model


def dinov2(registers=False, **settings):
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    more = {"num_register_tokens": 3} if registers else {}
    return model_of(f"{name}Model", f"{name}Config", **{"mlp_ratio": 2, **more, **settings})


def clip(kind="CLIPVisionModel", **settings):
    return model_of(kind, "CLIPVisionConfig", **{"intermediate_size": 24, "projection_dim": 8, **settings})


def as_released(state):
    """Return the tensors of a Dinov2Model under the names of DINOv2's release."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.register_tokens": "register_tokens",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
    }
    for i in range(2):
        old, new = f"encoder.layer.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            parts = [
                state.pop(f"{old}.attention.attention.{part}.{kind}") for part in ("query", "key", "value")
            ]
            state[f"{new}.attn.qkv.{kind}"] = np.concatenate(parts)
        names |= {
            f"{old}.norm1": f"{new}.norm1",
            f"{old}.attention.output.dense": f"{new}.attn.proj",
            f"{old}.layer_scale1.lambda1": f"{new}.ls1.gamma",
            f"{old}.norm2": f"{new}.norm2",
            f"{old}.mlp.fc1": f"{new}.mlp.fc1",
            f"{old}.mlp.fc2": f"{new}.mlp.fc2",
            f"{old}.layer_scale2.lambda1": f"{new}.ls2.gamma",
        }
    return renamed(state, names)


# --- DINOv2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["written", "in memory", "released"])
@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_keeps_its_features_under_the_names_of_all_its_files(tmp_path, registers, names):
    model = dinov2(registers)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if names == "in memory":
        written = safetensors_numpy.load_file(file)
        assert save_state(file, model).keys() != written.keys()
    if names == "released":
        safetensors_numpy.save_file(as_released(safetensors_numpy.load_file(file)), file)
        (tmp_path / "config.json").unlink()
        with pytest.raises(ValueError, match="does not say how many heads"):
            load_pretrained(file)
        settings = {"layer_scale": 1e-5, "epsilon": 1e-6, "registers": 3 if registers else 0}
        loaded = load_pretrained(file, jm.nn.ViT(4, 16, 2, 2, 32, 12, **settings))
    else:
        loaded = load_pretrained(tmp_path)
    x = images(12, 12)
    expected = outputs_of(model, x, "pooler_output")
    np.testing.assert_allclose(outputs(loaded, x), expected, atol=1e-5)
    assert (loaded.report.new, loaded.report.left_over) == ((), ())
    assert [row.source.rpartition("/")[2] for row in loaded.report.dropped] == ["mask_token"]
    assert loaded.network.registers == (3 if registers else 0)


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("sides", [(20, 20), (8, 16)])
def test_dinov2_takes_images_of_another_size_as_transformers_does(tmp_path, registers, sides):
    model = dinov2(registers)
    model.save_pretrained(tmp_path)
    x = images(*sides)
    loaded = load_pretrained(tmp_path, image_size=sides)
    np.testing.assert_allclose(outputs(loaded, x), outputs_of(model, x, "pooler_output"), atol=1e-5)


@pytest.mark.parametrize("grid", [(16, 16), (5, 12)])
def test_positions_of_the_release_of_dinov2_are_interpolated_with_its_offset(torch, grid):
    positions = np.random.default_rng(0).normal(size=(1, 1 + 9 * 9, 5)).astype(np.float32)
    old = torch.tensor(positions[:, 1:]).reshape(1, 9, 9, 5).permute(0, 3, 1, 2)
    # As in `interpolate_pos_encoding` of the release.
    ratios = [(side + 0.1) / 9 for side in grid]
    new = torch.nn.functional.interpolate(old, scale_factor=ratios, mode="bicubic")
    assert new.shape[2:] == grid
    resized = jm.nn.resize_positions(jnp.asarray(positions), grid, method="offset")
    np.testing.assert_allclose(resized[:, 1:], new.permute(0, 2, 3, 1).reshape(1, -1, 5), atol=1e-5)
    with raises_argument_error("method: got 'linear'; it must be one of 'antialiased', 'bicubic'"):
        jm.nn.resize_positions(jnp.asarray(positions), grid, method="linear")


@pytest.mark.parametrize("registers", [False, True])
def test_the_giant_model_of_dinov2_is_refused_for_its_swiglu_layers(tmp_path, registers):
    model = dinov2(registers, use_swiglu_ffn=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"use_swiglu_ffn is True .* DINOv2 has False"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="SwiGLU layers of DINOv2's giant"):
        load_pretrained(tmp_path / "model.safetensors")


# --- CLIP -----------------------------------------------------------------------------------------


def test_the_image_tower_of_clip_keeps_its_features(tmp_path):
    model = clip()
    model.save_pretrained(tmp_path)
    x = images(12, 12)
    loaded = load_pretrained(tmp_path)
    np.testing.assert_allclose(outputs(loaded, x), outputs_of(model, x, "pooler_output"), atol=1e-5)
    network = loaded.network
    assert (network.activation, network.epsilon, network.projection) == ("quick_gelu", 1e-5, None)
    assert network.pre_norm
    assert not network.patch_bias
    assert (loaded.report.new, loaded.report.left_over, loaded.report.dropped) == ((), (), ())
    with pytest.raises(
        ValueError, match=r"network: got activation='gelu'; the network of .* has 'quick_gelu'"
    ):
        load_pretrained(tmp_path, network.clone(activation="gelu"))


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_the_image_tower_of_clip_keeps_its_projected_features(tmp_path, hidden_act):
    model = clip("CLIPVisionModelWithProjection", hidden_act=hidden_act)
    model.save_pretrained(tmp_path)
    x = images(12, 12)
    loaded = load_pretrained(tmp_path)
    np.testing.assert_allclose(outputs(loaded, x), outputs_of(model, x, "image_embeds"), atol=1e-5)
    assert outputs(loaded, x).shape == (2, 8)


def test_the_image_tower_is_taken_from_a_whole_clip_model(tmp_path):
    import torch
    import transformers

    text = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    text |= {"intermediate_size": 24, "vocab_size": 50, "max_position_embeddings": 8}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**SIZES, "intermediate_size": 24}, projection_dim=8
    )
    model = randomised(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    x = images(12, 12)
    loaded = load_pretrained(tmp_path)
    with torch.no_grad():
        features = model.get_image_features(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)).pooler_output
    np.testing.assert_allclose(outputs(loaded, x), features.numpy(), atol=1e-5)
    dropped = {row.source.partition("/")[0] for row in loaded.report.dropped}
    assert dropped == {"text_model", "text_projection", "logit_scale"}


def test_clip_takes_images_of_another_size_as_transformers_does(tmp_path):
    import torch

    model = clip()
    model.save_pretrained(tmp_path)
    x = images(20, 8)
    with torch.no_grad():
        pixels = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)
        expected = model(pixels, interpolate_pos_encoding=True).pooler_output.numpy()
    loaded = load_pretrained(tmp_path, image_size=(20, 8))
    np.testing.assert_allclose(outputs(loaded, x), expected, atol=1e-5)


def test_another_activation_of_clip_is_refused(tmp_path):
    clip().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "relu"}))
    with pytest.raises(ValueError, match=r"hidden_act is 'relu' .* CLIP has 'quick_gelu' or 'gelu'"):
        load_pretrained(tmp_path)


# --- The network ----------------------------------------------------------------------------------


def test_an_unknown_activation_is_refused():
    network = jm.nn.ViT(patch=4, width=8, depth=1, heads=2, mlp=16, image_size=8, activation="relu")
    with pytest.raises(ValueError, match="activation: got 'relu'; it must be one of 'gelu', 'quick_gelu'"):
        network.init(jax.random.key(0), images(8, 8))


def test_registers_are_left_out_of_the_mean_of_patches():
    settings = {"patch": 4, "width": 8, "depth": 0, "heads": 2, "mlp": 16, "image_size": 8, "pooling": "mean"}
    x = images(8, 8)
    network = jm.nn.ViT(**settings, registers=2)
    variables = jax.jit(network.init)(jax.random.key(0), x)
    bare = {name: leaf for name, leaf in variables["params"].items() if name != "register_tokens"}
    expected = jm.nn.ViT(**settings).apply({"params": bare}, x)
    np.testing.assert_allclose(network.apply(variables, x), expected, atol=1e-6)
