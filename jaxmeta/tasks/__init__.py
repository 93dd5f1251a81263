"""Where tasks come from: pure samplers with a protocol card."""

from jaxmeta.tasks.array_files import from_npz
from jaxmeta.tasks.attributes import cub_attributes
from jaxmeta.tasks.class_names import classes_of
from jaxmeta.tasks.digits import mnist, mnist_images, usps, usps_images
from jaxmeta.tasks.distortions import distort
from jaxmeta.tasks.episodes import from_arrays
from jaxmeta.tasks.folder import from_folder, prepare_folder
from jaxmeta.tasks.glyphs import glyph_metadata, glyphs
from jaxmeta.tasks.harmonic import harmonic
from jaxmeta.tasks.labelled import LabelledImages, labelled, split_per_class
from jaxmeta.tasks.official import (
    cifar_fs,
    cifar_fs_split,
    cub,
    cub_split,
    mini_imagenet,
    mini_imagenet_split,
)
from jaxmeta.tasks.omniglot import omniglot, omniglot_split
from jaxmeta.tasks.prepared import Prepared, ReadSummary, from_prepared
from jaxmeta.tasks.quadratics import quadratics
from jaxmeta.tasks.regression import from_regression, from_table
from jaxmeta.tasks.sequences import sequences, with_ways
from jaxmeta.tasks.sinusoid import sinusoid
from jaxmeta.tasks.splits import ClassSplit
from jaxmeta.tasks.stream import stream
from jaxmeta.tasks.supervised import supervised
from jaxmeta.tasks.tfds import from_tfds, prepare_tfds

__all__ = [
    "ClassSplit",
    "LabelledImages",
    "Prepared",
    "ReadSummary",
    "cifar_fs",
    "cifar_fs_split",
    "classes_of",
    "cub",
    "cub_attributes",
    "cub_split",
    "distort",
    "from_arrays",
    "from_folder",
    "from_npz",
    "from_prepared",
    "from_regression",
    "from_table",
    "from_tfds",
    "glyph_metadata",
    "glyphs",
    "harmonic",
    "labelled",
    "mini_imagenet",
    "mini_imagenet_split",
    "mnist",
    "mnist_images",
    "omniglot",
    "omniglot_split",
    "prepare_folder",
    "prepare_tfds",
    "quadratics",
    "sequences",
    "sinusoid",
    "split_per_class",
    "stream",
    "supervised",
    "usps",
    "usps_images",
    "with_ways",
]
