r"""The command line: names, flags, output directories and reports.

The library does not import this package.

| command | what it does |
| --- | --- |
| `train` | meta-trains a learner and tests it; `--resume` continues a run |
| `evaluate` | tests a run under another protocol, on other episodes or on other tasks |
| `predict` | classifies images by a few examples of each class, or by the classes of a transfer |
| `compare` | trains learners on the same episodes and makes one table and one figure |
| `plot` | draws learning curves of runs, finished or not |
| `transfer` | applies what a network has learned to other images (`jaxmeta.transfer`) |
| `rank` | ranks sources by their estimated transferability to a target |
| `export` | writes a program of a classifier that JAX alone can run |
| `presets`, `tasks`, `learners`, `networks` | list the names of each kind, or describe one: `jaxmeta learners NAME` |

`jaxmeta train NAME --help` shows the settings of a run. A run leaves a folder with `report.md`,
`report.json`, `curve.png`, `metrics.jsonl`, `tensorboard/`, `episodes.json`, `config.json` and
`checkpoints/`.

**Compare and evaluate.**

```sh
jaxmeta compare maml fomaml --tasks omniglot --steps 2000
jaxmeta plot runs/maml runs/fomaml
jaxmeta evaluate runs/maml --shots 5 --seed 7
```

`evaluate --per-class --confusion confusion.png` lists the accuracy of each class and the most frequent
confusions; in Python, `jm.evaluate_classes`. `evaluate --tasks harmonic` tests the parameters of a run on sine
waves on other tasks. `compare` trains each learner in its own process. Its column "minus maml" is the mean of
the difference within each task, whose 95 % interval tells two methods apart better than two intervals of their
means.

**Learn from a few images, classify others.** Train on Omniglot's background characters, 20 at a time, one drawing
of each, every query classified from the support set alone (`--norm support`):

```sh
for part in background evaluation; do
  curl -L --create-dirs -o omniglot/images_$part.zip \
    https://raw.githubusercontent.com/brendenlake/omniglot/master/python/images_$part.zip
done
jaxmeta train --preset omniglot-alphabet --data omniglot --out runs/alphabet
```

Then take an alphabet of the evaluation set, Angelic with its 20 letters, and of each letter the first of 20
people's drawings as the one example:

```sh
unzip -q omniglot/images_evaluation.zip 'images_evaluation/Angelic/*'
for letter in images_evaluation/Angelic/*; do
  mkdir -p angelic/support/${letter##*/} angelic/query/${letter##*/}
  cp $letter/*.png angelic/query/${letter##*/}
  mv angelic/query/${letter##*/}/*_01.png angelic/support/${letter##*/}
done
jaxmeta predict runs/alphabet --support angelic/support --query angelic/query --json answers.json
```

```
ink       dark on light in --support, light on dark in training: all images are inverted
character01/0965_02.png  character01  99.9 %
character01/0965_03.png  character01  99.6 %
…
character20/0984_20.png  character20  98.4 %
313 of 380 predictions are the class of the image's folder (82.4 %)
```

The subfolders of `--support` name the classes, which need not be among those of the training; each holds any
number of images, and there may be any number of classes up to the ways that MAML was trained with. The images
of `--query` may lie in subfolders or not; where these have the names of classes, as here, the right answers
are counted. An answer depends on the support set and on its own image alone. Omniglot's files have black ink
on white, and its training images light ink on dark: for such images `predict` exchanges dark and light where
the support set asks for it; for others `--invert` does. `answers.json` is a list of `{file, class,
probabilities: {class: p}}`. The probabilities rank classes and are not calibrated.

In Python the classes are learned once, and images classified later. Images are `(n, height, width)` or
`(n, height, width, channels)`, bytes or in [0, 1], or paths of files:

```python
def names_of(source, support, images):
    classifier = jm.load_classifier(source, support=support)
    return [classifier.classes[i] for i in classifier.predict(images).argmax(-1)]
```

The learner of `jm.load_run` classifies each query from the support set alone. With fewer classes than ways,
leave out the outputs of the others before the softmax, as the command does.

**Sources.** A source need not be a run. With weights, images are classified by the nearest class mean of their
features, or by the head that `--learner` names, such as `ridge`; a transfer classifies them by its own classes,
without examples; `export` makes a program of any of them:

```sh
jaxmeta predict resnet50/model.safetensors --support examples --query questions --unknown-above 0.9
jaxmeta predict runs/digits --query drawings --csv answers.csv --confusion confusion.png
jaxmeta export runs/digits --out digits
jaxmeta evaluate runs/digits --tasks omniglot
jaxmeta train prototypical --tasks omniglot --init runs/characters
```

The last two test the features of a transfer on episodes, with a table of all heads, and start meta-training
from an ordinary classifier. `--unknown-above` labels images "unknown" that are further than this from every
class. `predict` prints the distances, which have no fixed scale: compare them with the distances of known
images.

**Names of your own.** A learner is a function that takes a network, then settings by keyword, and returns a
`jm.Learner`. Whatever can be imported is a name on the command line, without registration; keyword-only
parameters of plain type are its flags, with their defaults, choices (`Literal`) and help (`Args:` of the
docstring). With a file `cavia.py` in the current folder:

```sh
jaxmeta train cavia:cavia --context 3
jaxmeta train cavia:cavia --network my_module:Net --tasks my_module:my_tasks --out runs/mine
jaxmeta compare maml cavia:cavia --steps 500
jaxmeta evaluate runs/mine --learner cavia:cavia --network my_module:Net --tasks my_module:my_tasks
pytest tests/test_learner_laws.py --learner cavia:cavia
```

A task function is `f(split, *, ways, shots, queries, …)`. What is not a setting, such as the kinds of tasks
that a method learns, belongs in a decorator on the function, `@jm.learner(kinds=("classification",), …)`. A
run keeps the module's name and its file's hash; code of a folder that someone sends is imported only where
you name it. Tasks with padding need `predict(…, mask=None)` and losses that take `task.query.mask`; schedules
need `loss(…, step=None)`. A loss or a metric of your own, `jm.maml(network, loss=my_loss, metric=my_metric)`
or that of `jm.evaluate`, is a function `(outputs, y, mask) -> scalar`; a metric may return `(sum, count)`.
"""  # noqa: E501

from jaxmeta.cli.main import main, program
from jaxmeta.cli.signals import EXIT_OTHER, EXIT_STOPPED, EXIT_USER

__all__ = ["EXIT_OTHER", "EXIT_STOPPED", "EXIT_USER", "main", "program"]
