"""The images that pretrained weights were trained on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dinov2_and_clip import clip, dinov2
from test_pretrained import squeezenet_state
from weights import images, outputs, outputs_of, resnet, small_network, small_variables, vit

import jaxmeta as jm
from jaxmeta.transfer import ImageInput, load_pretrained, save_pretrained

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="pip install safetensors")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (resnet, ImageInput(224, MEAN, STD)),
        (vit, ImageInput(12, (0.5,) * 3, (0.5,) * 3)),
        (dinov2, ImageInput(12, MEAN, STD, "cubic")),
    ],
)
def test_a_layout_without_a_description_has_its_usual_preprocessing(tmp_path, model, expected):
    model().save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).input == expected


@pytest.mark.usefixtures("torch")
def test_clip_has_the_preprocessing_of_its_image_processor(tmp_path):
    import transformers

    clip().save_pretrained(tmp_path)
    usual = load_pretrained(tmp_path).input
    processor = transformers.CLIPImageProcessorPil()
    assert (usual.mean, usual.std) == (tuple(processor.image_mean), tuple(processor.image_std))
    assert usual.method == "cubic"
    processor.save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).input == usual


def test_squeezenet_has_its_usual_preprocessing_and_flax_variables_have_none(tmp_path):
    file = tmp_path / "weights.safetensors"
    safetensors_numpy.save_file(squeezenet_state(2), file)
    assert load_pretrained(file).input == ImageInput(224, MEAN, STD)
    save_pretrained(file, small_variables(), network=small_network(), overwrite=True)
    assert load_pretrained(file).input is None


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "preprocessor_config.json",
            {
                "image_mean": [0, 0.1, 0.2],
                "image_std": [1, 2, 3],
                "resample": 3,
                "size": {"shortest_edge": 64},
            },
            ImageInput(64, (0.0, 0.1, 0.2), (1.0, 2.0, 3.0), "cubic"),
        ),
        (
            "preprocessor_config.json",
            {"size": {"shortest_edge": 64}, "crop_size": {"height": 48, "width": 48}, "do_normalize": False},
            ImageInput(48),
        ),
        (
            "preprocessor_config.json",
            {"image_mean": "grey", "image_std": [0, 1, 1], "resample": [], "size": {"height": 3, "width": 4}},
            ImageInput(224, MEAN, STD),
        ),
        (
            "config.json",
            {
                "architecture": "resnet18",
                "pretrained_cfg": {
                    "mean": [0.1] * 3,
                    "std": [0.2] * 3,
                    "interpolation": "bicubic",
                    "input_size": [3, 96, 96],
                },
            },
            ImageInput(96, (0.1,) * 3, (0.2,) * 3, "cubic"),
        ),
    ],
)
def test_files_next_to_the_weights_take_precedence(tmp_path, name, content, expected):
    resnet().save_pretrained(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert load_pretrained(tmp_path).input == expected


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(("size", "expected"), [({"shortest_edge": 14}, 12), (None, 20)])
def test_dinov2_is_built_for_the_images_it_is_used_with(tmp_path, size, expected):
    # The file's position embeddings are for 20 pixels.
    model = dinov2(image_size=20)
    model.save_pretrained(tmp_path)
    if size is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": size}))
    loaded = load_pretrained(tmp_path)
    assert (loaded.network.sides, loaded.input.size) == ((expected, expected), expected)
    x = images(expected, expected)
    np.testing.assert_allclose(outputs(loaded, x), outputs_of(model, x, "pooler_output"), atol=1e-5)
    assert load_pretrained(tmp_path, image_size=16).input.size == 16


def test_the_adapter_resizes_and_normalises():
    x = np.random.default_rng(0).random((2, 10, 10, 3)).astype(np.float32)
    adapted = ImageInput(16, MEAN, STD, "cubic").adapter().apply({}, jnp.asarray(x))
    resized = np.asarray(jax.image.resize(x, (2, 16, 16, 3), "cubic"))
    np.testing.assert_allclose(adapted, (resized - np.array(MEAN)) / np.array(STD), atol=1e-5)
    assert str(ImageInput()) == "in [0, 1]"
    assert str(jm.transfer.ImageInput(8, (0.5,), (0.25,), "cubic")) == (
        "(x − mean) / std, mean 0.5, std 0.25, resized by cubic interpolation"
    )
