"""Task sources: pure samplers `sample(key) -> Task`, each with a protocol card.

| source | command line | Python |
| --- | --- | --- |
| drawn characters; sine waves; sums of sine waves; quadratic functions | `--tasks glyphs`, `sinusoid`, `harmonic`, `quadratics` | `glyphs` `sinusoid` `harmonic` `quadratics` |
| Omniglot, from its two official archives | `--tasks omniglot` | `omniglot` |
| a folder of images | `--tasks folder:PATH` | `from_folder` |
| any image classification set of [tensorflow-datasets](https://www.tensorflow.org/datasets) | `--tasks tfds:NAME` | `from_tfds` |
| mini-ImageNet, CIFAR-FS and CUB by their published class splits, from your copy of the images | `--tasks mini_imagenet --data DIR`, … | `mini_imagenet` `cifar_fs` `cub` |
| MNIST and USPS digits and Fashion-MNIST, from your copy of the files | `--tasks mnist --data DIR`, `fashion_mnist`, `usps` | `mnist` `fashion_mnist` `usps` |
| emoji: 1,600 things in the styles of several designers, from packs of Iconify | `--tasks emoji --data DIR` | `emoji` |
| labelled arrays | `--tasks arrays:FILE.npz` with `x` and `y` | `from_arrays` `from_npz` |
| regression examples of many tasks | `--tasks table:FILE.csv` with columns `task`, `x…`, `y…` | `from_regression` `from_table` |
| records on disk, larger than the device's memory | `--stream` | `prepare_folder` or `prepare_tfds`, then `stream` |

`sequences` turns the tasks of any of these into sequences for memory-augmented networks, `supervised` into
mini-batches of all training classes at once; `embedded` puts a fixed network's features in place of images.
`jaxmeta tasks` lists the sources; `--tasks my_module:my_tasks`
takes your own function `f(split, *, ways, shots, queries, …)`.

**Folders of images.** A folder has one subfolder per class, with images of every format that Pillow opens,
grey or colour, of any size:

```sh
jaxmeta train --tasks folder:photos --ways 5 --shots 1
```

The classes are divided at random into 64 % for training, 16 % for validation and 20 % for testing, so that
none is in two parts; the report holds the split's hash. Each part needs as many classes as there are ways, 27
classes in all at 5 ways. With fewer, do without validation (`--classes 0.5,0,0.5`) or ask for `--ways 2`.
Each class needs 6 images, 1 to learn from and 5 to be tested on (`--queries 2` makes it 3);
`--skip-small-classes` leaves out smaller ones.

- The split may be given: by folders `train`, `val` and `test` of such subfolders; by lists such as
  `train.csv` with columns `filename` and `label`, or `base.json`; or by `--classes split.json`, a JSON file
  with lists of names under `train`, `validation` and `test`, which in Python may also be a dictionary or a
  `ClassSplit`. `--split-seed` draws another random split.
- Images are resized to squares once and kept in the cache folder: as large as the smallest image (not
  counting a few that are far smaller than the others), at most 84 pixels a side, or `--size N`.
- Where images have domains, such as styles or cameras, `--domains` says how they are found: `class/domain`,
  `domain/class`, or a pattern of file names such as `([a-z]+)_`. With `--across` the support set and the
  queries of a class are from different domains; `--test-domains real` holds domains out of training.
- An image that cannot be read is an error that names it; `--skip-unreadable` leaves such images out. One line
  states what was read, and what was left out and why.

**Arrays.** Examples are images or feature vectors, uint8 or floating point; labels are integers or names.

>>> import numpy as np
>>> import jaxmeta as jm
>>> images = np.random.default_rng(0).integers(0, 256, (400, 28, 28, 1), np.uint8)
>>> labels = np.repeat(np.arange(20), 20)
>>> split = (0.6, 0.2, 0.2)  # of the classes, for train, validation and test
>>> tasks = jm.tasks.from_arrays(images, labels, ways=3, shots=1, queries=5, split="train", classes=split)
>>> tasks.card.classes, len(tasks.card.split_hash)  # what a published row must state
(12, 64)

The documentation of `from_npz` and `from_table` states the names of arrays and columns.

**tensorflow-datasets.** Sets are read without TensorFlow once they are prepared as ArrayRecord files;
preparing most of the stock ones needs TensorFlow.

**Omniglot.** The two official archives come from
[brendenlake/omniglot](https://github.com/brendenlake/omniglot) at first use, with their MD5 sums checked, or
from your own folder with `--data DIR`. Every drawing is verified, decoded once and kept as one array in the
cache folder: `$JAXMETA_CACHE`, else `jaxmeta` in the platform's cache folder (on Linux `~/.cache/jaxmeta`).

**Emoji.** One name is a class, one designer's set a style, that is a domain: `--across` asks for things in
styles other than those they were shown in, `--test-styles openmoji` holds styles out for test. Sets are packs of
[Iconify](https://iconify.design) (`npm pack @iconify-json/noto`), rendered once by `pip install
'jaxmeta[emoji]'`; the read summary and `emoji_licences` state the licence of each.

**Zero-shot tasks.** With `shots=0` a support set holds one vector of metadata for each class in place of
images: the strokes of `glyphs(shots=0)`, the 312 attributes of `cub(shots=0)` from the official archive,
word vectors for `emoji(shots=0, word_vectors="glove.6B.50d.txt")` (`class_vectors`), or those of any arrays, `from_arrays(features, labels, shots=0, metadata={class: vector})`.

**Data larger than the device.** Tasks are drawn on the device, which holds the images as bytes. Where they do
not fit, `--stream` reads the images of each meta-step from disk while the device computes the previous one.
The episodes for a seed are the same, and a run can be resumed at any step; `benchmarks/README.md` has the
speed.

>>> def train_from_disk(learner, folder, optimizer, key):
...     prepared = jm.tasks.prepare_folder(folder)
...     tasks = jm.tasks.stream(prepared, key=key, meta_batch=4, ways=5, shots=1, queries=5)
...     return jm.train(learner, tasks, optimizer, steps=100, meta_batch=4, key=key)

A loader of your own is a stream, too: `jm.TaskStream(at=my_batch_of_tasks, card=card)`, where `at(step)` is a
`Task` whose leaves have a leading axis of `meta_batch` tasks. A stream gives each process of several hosts
its share of every batch.

All images of your own are first converted to one format (`jaxmeta/tasks/prepared.py`): records of one shape,
grouped by class. An episode is a pure function of (key, step, index): it is the same on one device and on
eight, from memory and from a stream.
"""  # noqa: E501

from jaxmeta.tasks.array_files import from_npz
from jaxmeta.tasks.attributes import cub_attributes
from jaxmeta.tasks.class_names import classes_of
from jaxmeta.tasks.class_vectors import class_vectors, class_words
from jaxmeta.tasks.digits import (
    fashion_mnist,
    fashion_mnist_images,
    mnist,
    mnist_images,
    usps,
    usps_images,
)
from jaxmeta.tasks.distortions import distort
from jaxmeta.tasks.embedded import embedded
from jaxmeta.tasks.emoji import emoji, emoji_licences
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
    "class_vectors",
    "class_words",
    "classes_of",
    "cub",
    "cub_attributes",
    "cub_split",
    "distort",
    "embedded",
    "emoji",
    "emoji_licences",
    "fashion_mnist",
    "fashion_mnist_images",
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
