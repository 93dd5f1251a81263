"""Networks and weights that the tests save, load and compare."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxmeta as jm
from jaxmeta.transfer.subtree import leaves_by_path

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 1], "num_labels": 5}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 12,
    "patch_size": 4,
    "num_labels": 5,
}


def randomised(model):
    """Randomise weights and statistics so strongly that each of them affects the outputs."""
    import torch

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
                module.weight.uniform_(-1, 1.5)
                module.bias.normal_(0, 0.5)
            elif isinstance(module, torch.nn.Linear):
                for parameter in module.parameters():
                    parameter.normal_(0, module.in_features**-0.5)
        for name, parameter in model.named_parameters():
            if name.endswith(("cls_token", "position_embeddings")):
                parameter.normal_()
    return model.eval()


def resnet(config=RESNET, **more):
    import torch
    import transformers

    torch.manual_seed(0)
    return randomised(transformers.ResNetForImageClassification(transformers.ResNetConfig(**config, **more)))


def vit(kind="ViTForImageClassification", **more):
    import torch
    import transformers

    torch.manual_seed(0)
    return randomised(getattr(transformers, kind)(transformers.ViTConfig(**{**VIT, **more})))


def images(height, width):
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, height, width, 3)))


def outputs_of(model, x, attribute="logits"):
    """Return the outputs of a PyTorch model."""
    import torch

    with torch.no_grad():
        return getattr(model(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)), attribute).numpy()


def outputs(loaded, x):
    """Return the outputs of a loaded network."""
    return jax.jit(loaded.network.apply)(loaded.variables, x)


def save_state(path, model, rename=lambda name: name):
    """Save a model's tensors as safetensors under other names, and return them by these names."""
    from safetensors.numpy import save_file

    state = {rename(name): tensor.numpy() for name, tensor in model.state_dict().items()}
    save_file(state, path)
    return state


def small_network(ways=5):
    return jm.nn.ResNet(ways, depths=(1, 1), channels=(4, 8), stem=4)


def small_variables():
    """Return random variables of a small network, with statistics."""
    params = jax.eval_shape(small_network().init, jax.random.key(0), images(32, 32))["params"]
    apply = partial(small_network().apply, mutable=["batch_stats"])
    _, state = jax.eval_shape(apply, {"params": params}, images(32, 32))
    return filled({"params": params, **state})


def filled(shapes, seed=0):
    """Return positive random arrays of these shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.1, 1, leaf.shape), leaf.dtype), shapes)


def assert_same_leaves(left, right):
    left, right = leaves_by_path(left), leaves_by_path(right)
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        assert leaf.dtype == right[path].dtype, path
        np.testing.assert_array_equal(leaf, right[path], err_msg=path)
