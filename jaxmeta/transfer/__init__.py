r"""Transfer learning: apply what a network has learned to another task or domain.

**Choose a method** by what differs between source and target.

| what differs | name | methods |
| --- | --- | --- |
| the input space: size, channels, polarity | heterogeneous transfer | `input_adapter`, or `learned_stem`, as `classifier(…, adapter=…)` |
| the labels | inductive transfer | a new head: `feature_extraction`, `linear_probe_then_fine_tune`, `fine_tune`, `gradual_unfreezing`; `mapped_head` where classes are related |
| P(X), with some target labels | domain shift | `fine_tune`, with `l2_sp` or `discriminative` rates |
| P(X), without target labels, same support | covariate shift | `density_ratio` or `kernel_mean_matching` as `weights=`; check `effective_sample_size` |
| P(X), without target labels, new appearance | unsupervised domain adaptation | `adabn`, `coral_transform`; training on both: `align(…, mmd())`, `coral()`, `dann()` |
| P(Y), with the same P(X\|Y) | label shift | `bbse`, `rlls` or `em_prior` (after `temperature`), then `adjust`, or train again with class weights |
| P(Y\|X) in any other way | concept shift | target labels: it cannot be detected without them |

**Recipes.** The first step pretrains a body on other classes, here ten classes of random blobs;
`load_pretrained("resnet18.safetensors", head=False)` reads a pretrained body from a file.

>>> import jax
>>> import numpy as np
>>> import optax
>>> import jaxmeta as jm
>>> body = jm.nn.MLP(out=16, hidden=(32,), norm=True)
>>> centres = np.random.default_rng(0).normal(0, 3, (10, 8)).astype(np.float32)
>>> labels = np.arange(400) % 10
>>> noise = np.random.default_rng(1).normal(size=(400, 8)).astype(np.float32)
>>> blobs = jax.numpy.asarray(centres[labels] + noise)
>>> source = jm.transfer.classifier(body, classes=10)
>>> learned = jm.transfer.fine_tune(
...     source,
...     source.init(jax.random.key(0), blobs),
...     jm.Batch(blobs, labels),
...     optimizer=optax.adam(1e-2),
...     steps=200,
...     key=jax.random.key(1),
... ).variables
>>> pretrained = {name: jm.transfer.take_subtree(tree, "body") for name, tree in learned.items()}

The second step trains a head for three new classes (blobs 0 to 3, 4 to 7, 8 and 9) from 30 examples: first
the head alone, in closed form on frozen features, then the head and the last layer of the body.

>>> model = jm.transfer.classifier(body, classes=3)
>>> variables = jm.transfer.with_body(model.init(jax.random.key(2), blobs), pretrained)
>>> few = jm.Batch(blobs[:30], labels[:30] // 4)
>>> probed = jm.transfer.feature_extraction(model, variables, few, head="ridge")
>>> tuned = jm.transfer.fine_tune(
...     model,
...     probed,
...     few,
...     train=["head", "body/head"],  # everything else stays unchanged, without optimizer state
...     optimizer=optax.adamw(1e-3),
...     steps=50,
...     key=jax.random.key(3),
... )
>>> bool(jm.transfer.accuracy(model, tuned.variables, jm.Batch(blobs, labels // 4)) > 0.9)
True

**The command line** takes any run as the source, or a file of weights:

```sh
jaxmeta train --preset omniglot-simple-shot --out runs/characters
jaxmeta transfer runs/characters --target mnist --recipe lp-ft --shots 5 --out runs/digits
jaxmeta rank runs/characters runs/digits --target usps --fine-tune
```

The target is a set of images by its name for `--tasks`, or a folder with one subfolder per class
(`folder:photos`). `transfer` learns from some examples of each class and scores all others; if the folder has
parts `train` and `test` with the same classes, it learns from the first and scores the second. It writes a
report with a confidence interval and with what happened to each leaf of the source, a plot of the confusion
matrix, and weights that can serve as a source. With `--keep-statistics` fine-tuning keeps the source's batch
statistics.

**Weights** come from safetensors files and folders of transformers, torchvision and timm (ResNet, SqueezeNet,
ViT, DINOv2 and the image tower of CLIP, whose outputs equal theirs up to rounding), from `flax.serialization`, from Orbax and from runs of this
library, never from a pickle. `load_pretrained(…).input` is the `ImageInput` of the images that they were trained
on: size, mean, deviation, interpolation. `transplant` copies leaves of one tree into another by rules, checks
each, and reports as a table what was taken, what is new and what is left over.

**Scores** compare several sources without training: `leep`, `nce`, `h_score`, `log_me`, and `rank_sources`,
which computes them and ranks the sources by one. `rank` with `--fine-tune` also trains each source briefly, to
show which score agrees with the result.

`benchmarks/README.md` compares recipes, scores, domain adaptation and label shift on real images;
`notebooks/transfer_and_domains.py` explains them.
"""  # noqa: E501

from jaxmeta.transfer.alignment import Aligned, Alignment, align, coral, dann, mmd
from jaxmeta.transfer.classifier import (
    accuracy,
    classifier,
    confusion_matrix,
    extract_features,
    predict_logits,
    with_body,
)
from jaxmeta.transfer.discrepancy import coral_loss, coral_transform, covariance, dan_loss, mmd2
from jaxmeta.transfer.domain_adaptation import (
    adabn,
    dann_rate,
    dann_schedule,
    dann_strength,
    domain_accuracy,
    domain_loss,
    gradient_reversal,
)
from jaxmeta.transfer.fine_tune import (
    Fitted,
    feature_extraction,
    fine_tune,
    fine_tuning_probe,
    gradual_unfreezing,
    linear_probe_then_fine_tune,
)
from jaxmeta.transfer.freezing import discriminative, freeze, frozen_mask, l2_sp, slanted_triangular
from jaxmeta.transfer.heads import logistic_head, mapped_head, ridge_head
from jaxmeta.transfer.importance import density_ratio, effective_sample_size, kernel_mean_matching
from jaxmeta.transfer.inputs import ImageInput, input_adapter, learned_stem
from jaxmeta.transfer.label_shift import adjust, bbse, em_prior, joint_confusion, rlls, temperature
from jaxmeta.transfer.pretrained import Pretrained, load_pretrained, read_weights, save_pretrained
from jaxmeta.transfer.ranking import Candidate, Ranking, rank_sources
from jaxmeta.transfer.scores import h_score, leep, log_me, nce
from jaxmeta.transfer.subtree import (
    leaves_by_path,
    mask,
    matching,
    rename,
    swap_subtree,
    take_subtree,
    transplant,
)

__all__ = [
    "Aligned",
    "Alignment",
    "Candidate",
    "Fitted",
    "ImageInput",
    "Pretrained",
    "Ranking",
    "accuracy",
    "adabn",
    "adjust",
    "align",
    "bbse",
    "classifier",
    "confusion_matrix",
    "coral",
    "coral_loss",
    "coral_transform",
    "covariance",
    "dan_loss",
    "dann",
    "dann_rate",
    "dann_schedule",
    "dann_strength",
    "density_ratio",
    "discriminative",
    "domain_accuracy",
    "domain_loss",
    "effective_sample_size",
    "em_prior",
    "extract_features",
    "feature_extraction",
    "fine_tune",
    "fine_tuning_probe",
    "freeze",
    "frozen_mask",
    "gradient_reversal",
    "gradual_unfreezing",
    "h_score",
    "input_adapter",
    "joint_confusion",
    "kernel_mean_matching",
    "l2_sp",
    "learned_stem",
    "leaves_by_path",
    "leep",
    "linear_probe_then_fine_tune",
    "load_pretrained",
    "log_me",
    "logistic_head",
    "mapped_head",
    "mask",
    "matching",
    "mmd",
    "mmd2",
    "nce",
    "predict_logits",
    "rank_sources",
    "read_weights",
    "rename",
    "ridge_head",
    "rlls",
    "save_pretrained",
    "slanted_triangular",
    "swap_subtree",
    "take_subtree",
    "temperature",
    "transplant",
    "with_body",
]
