"""Benchmark of label-shift estimators on USPS digits whose class proportions change.

    python benchmarks/label_shift.py --data DIR [--seeds N] [--steps N] [--json FILE]

A Conv4 with 32 channels is trained on 5,291 of USPS's 7,291 training images; the other 2,000 calibrate it
(one temperature) and give the confusion matrix. The target is 2,000 images drawn from the 2,007 test images
with class proportions from Dirichlet(1), one draw for each seed: P(X|Y) stays and P(Y) changes, the
definition of label shift. The error of an estimate is its root mean squared difference from the true weights
P_t(y) / P_s(y), weighted by P_s(y). The accuracy is that of the classifier with outputs corrected by the
estimated weights.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
import optax
from machine import describe_machine

import jaxmeta as jm

HELD_OUT, TARGETS = 2000, 2000


def estimates(probs, labels, target_probs, source_prior) -> dict[str, np.ndarray]:
    """Return each method's weights, from calibrated probabilities of held-out source and target examples."""
    transfer = jm.transfer
    hard = transfer.joint_confusion(probs.argmax(1), labels, 10)
    soft = transfer.joint_confusion(probs, labels, 10)
    # The penalty of the code that its authors released, for 10 classes; see `rlls`.
    n, log_term = len(labels), np.log(40 * 10)
    penalty = 0.03 * (2 * log_term / (3 * n) + np.sqrt(2 * log_term / n))
    prior, _ = transfer.em_prior(target_probs, source_prior)
    return {
        "none": np.ones(10),
        "BBSE": transfer.bbse(hard, target_probs.argmax(1)),
        "BBSE, soft": transfer.bbse(soft, target_probs),
        "RLLS": transfer.rlls(hard, target_probs.argmax(1), penalty=penalty),
        "EM": np.asarray(prior) / source_prior,
    }


def table(rows: dict) -> str:
    lines = ["| class weights | error of the weights | accuracy on the target, % |", "| --- | --- | --- |"]
    for name, results in rows.items():
        errors, accuracies = (np.array([row[key] for row in results]) for key in ("error", "accuracy"))
        cells = [
            f"{each.mean():.{digits}f} ± {each.std(ddof=1):.{digits}f}"
            for each, digits in ((errors, 3), (100 * accuracies, 2))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with usps/")
    add("--seeds", type=int, default=5)
    add("--steps", type=int, default=300)
    add("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds: got {args.seeds}; it must be at least 2, for a standard deviation")
    (x, y), (x_test, y_test) = (jm.tasks.usps_images(args.data, part) for part in ("train", "test"))
    model = jm.transfer.classifier(jm.nn.Conv4(filters=32), 10)
    optimizer = optax.adam(1e-3)
    rows: dict = {}
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(y))
        held_out, train = order[:HELD_OUT], order[HELD_OUT:]
        key = jax.random.key(seed)
        fitted = jm.transfer.fine_tune(
            model,
            model.init(key, x[:1].astype(np.float32)),
            jm.Batch(x[train], y[train]),
            optimizer=optimizer,
            steps=args.steps,
            key=key,
        )

        def logits(images, variables=fitted.variables):
            return np.asarray(jm.transfer.predict_logits(model, variables, images), np.float64)

        t = jm.transfer.temperature(logits(x[held_out]), y[held_out])
        probs = np.asarray(jax.nn.softmax(logits(x[held_out]) / t))
        source_prior = np.bincount(y[held_out], minlength=10) / HELD_OUT
        proportions = rng.dirichlet(np.ones(10))
        digits = rng.choice(10, TARGETS, p=proportions)
        drawn = np.array([rng.choice(np.flatnonzero(y_test == digit)) for digit in digits])
        true = np.bincount(y_test[drawn], minlength=10) / TARGETS / source_prior
        target_probs = np.asarray(jax.nn.softmax(logits(x_test[drawn]) / t))
        for name, weights in {
            **estimates(probs, y[held_out], target_probs, source_prior),
            "true": true,
        }.items():
            weights = np.asarray(weights, np.float64)
            adjusted = np.asarray(jm.transfer.adjust(target_probs, weights))
            rows.setdefault(name, []).append(
                {
                    "error": float(np.sqrt((source_prior * (weights - true) ** 2).sum())),
                    "accuracy": float((adjusted.argmax(1) == y_test[drawn]).mean()),
                    "weights": weights.round(4).tolist(),
                }
            )
    print(table(rows))
    if args.json:
        report = {
            "machine": describe_machine(jax.local_devices()),
            "jaxmeta": jm.__version__,
            "steps": args.steps,
            "rows": rows,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
