"""Write benchmarks/README.md, and the results table of the top README.md, from the JSON files in results/.

    python benchmarks/report.py [--check]

page.md holds the text, with a placeholder such as `{{memory.table}}` wherever a table or a number of a result
belongs. A function of `SECTIONS` fills the placeholders of its name from the JSON files that the benchmarks
wrote. A file with `"transcribed": true` was filled in by hand, from an earlier text about a run whose own
output was not kept. A placeholder without a value, a value without a placeholder and a file that no section
reads are errors. To add a result: put its JSON file into results/, fill a placeholder from it here, write
the placeholder into page.md, and run this program.

In README.md the text between `<!-- results -->` and `<!-- /results -->` is replaced, where both are there.
--check changes nothing: it names each page that differs from what would be written, with exit status 1.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import domain_adaptation
import few_shot
import growth
import label_shift
import model_based
import reproduce
import scaling
import transfer
from rows import ROWS

from jaxmeta.cli.report import plural

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TEMPLATE = HERE / "page.md"
PAGE = HERE / "README.md"
TOP = HERE.parent / "README.md"
MARKED = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)
# Published values of results whose JSON file has none.
CAVIA = "0.19"  # Zintgraf et al. 2019: 10 points, 5 context parameters, one step
TWENTY_WAYS = "96.0"  # Snell et al. 2017: Omniglot, 20-way 1-shot
TO_MNIST = "72"  # Vinyals et al. 2016: from Omniglot to MNIST, 10-way 1-shot

GRADIENT = "omniglot-5way-1shot-amd-epyc-2-cores.json"
METRIC = "omniglot-5way-1shot-metric-based-amd-epyc-2-cores.json"
METANET = "omniglot-5way-1shot-metanet-amd-epyc-2-cores.json"
TRANSFERS = "transfer-intel-xeon-2-cores.json"
EMOJI = "few-shot-emoji-2-cores.json"
ELSEWHERE = "metric-based-amd-epyc-2-cores.json"
SINUSOID = "sinusoid-maml-transcribed.json"
CAVIA_RUN = "cavia-sinusoid-10shot.json"
MEMORIES = "model-based-2-cores.json"

Values = dict[str, str]
_read: set[str] = set()


def read(name: str) -> dict:
    """Return the contents of a file of results, and note that it was read."""
    _read.add(name)
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def percent(found: dict | None, digits: int = 1) -> str:
    """Return a mean in percent with its interval, if it has one; "" if there is no mean."""
    if found is None:
        return ""
    text = f"{100 * found['mean']:.{digits}f}"
    return f"{text} ± {100 * found['ci95']:.{digits}f}" if "ci95" in found else text


def accuracy_cells(accuracy: dict, digits: int = 1) -> list[str]:
    """Return the cells of transductive and inductive accuracy."""
    return [percent(accuracy.get(part), digits) for part in ("transductive", "inductive")]


def minutes(seconds: float, digits: int = 0) -> str:
    return f"{seconds / 60:.{digits}f}"


def machine_of(report: dict) -> str:
    found = report["machine"]
    cpu = re.sub(r"\(R\)| Processor", "", found.get("cpu") or "")
    text = f"{cpu}, {found['cores']} cores" if cpu else f"{found['cores']} CPU cores, model not recorded"
    text += f", {found['note']}" if "note" in found else ""
    return text + (f"; JAX {found['jax']}, Python {found['python']}" if "jax" in found else "")


def origin(name: str, command: str | None = None, report: dict | None = None) -> str:
    """Return the line below a table: how to measure it again, where it was measured, and its file."""
    kept = read(name)
    source = f"[{name}](results/{name})"
    if kept.get("transcribed"):
        source += f" (transcribed from a text of {kept['date']})"
    return (
        f"*Reproduce:* `{command or kept['command']}` · *Machine:* {machine_of(report or kept)} · "
        f"*Data:* {source}"
    )


def sinusoid() -> Values:
    kept = read(SINUSOID)
    steps, published = list(kept["mse_by_step"]), kept["published"]
    low, high = kept["mse_range_of_other_settings"]

    def row(label: str, of: dict) -> list[str]:
        return [f"{label}, α = {of['inner_lr']}", *(f"{of['mse_by_step'][n]:.2f}" for n in steps)]

    return {
        "protocol": kept["protocol"],
        "budget": kept["budget"],
        "low": f"{low:.2f}",
        "high": f"{high:.2f}",
        "table": markdown(
            ["test MSE after", *(f"{n} step{'s' * (n != '1')}" for n in steps)],
            [row(published["source"], published), row("ours", kept)],
        ),
        "origin": origin(SINUSOID),
    }


def cavia() -> Values:
    kept = read(CAVIA_RUN)
    config, found = kept["config"], kept["mse"]
    # The report of a run names no processor.
    ran_on = {"machine": {"cores": kept["devices"], **kept["versions"]}}
    return {
        "context": str(config["learner"]["context"]),
        "shots": str(kept["shots"]),
        "mse": f"{found['mean']:.2f} ± {found['ci95']:.2f}",
        "episodes": str(kept["episodes"]),
        "published": CAVIA,
        "budget": f"{kept['steps']:,} meta-steps of {config['training']['meta_batch']} tasks, "
        f"{minutes(kept['training_s'], 1)} minutes",
        "origin": origin(CAVIA_RUN, "jaxmeta train cavia --tasks sinusoid --shots 10", ran_on),
    }


def omniglot() -> Values:
    gradient, metric, metanet = read(GRADIENT), read(METRIC), read(METANET)
    command = f"python benchmarks/reproduce.py --data DIR --seed {gradient['seed']} --json FILE --rows"
    trained = {*gradient["rows"], *metric["rows"], *metanet["rows"]}
    ahead = metanet["rows"]["metanet"]["minus_maml"]["inductive"]
    twenty = read(ELSEWHERE)["rows"]["prototypical"]["omniglot 20-way 1-shot"]["inductive"]
    gradient_methods = [method for method in gradient["rows"] if method in reproduce.ROWS]
    return {
        "seed": str(gradient["seed"]),
        "gradient": reproduce.table(gradient["rows"]),
        "gradient_origin": origin(GRADIENT, f"{command} {' '.join(gradient_methods)}"),
        "lstm_tasks": str(gradient["rows"]["lstm_meta_learner"]["meta_batch"]),
        "control_rates": str(len(reproduce.CONTROL_RATES)),
        "metric": reproduce.table(metric["rows"]),
        "metric_origin": origin(METRIC, f"{command} {' '.join(metric['rows'])}"),
        "twenty": percent(twenty),
        "twenty_published": TWENTY_WAYS,
        "missing": ", ".join(f"`{name}`" for name in reproduce.ROWS if name not in trained) or "none",
        "metanet": reproduce.table(metanet["rows"]),
        "metanet_origin": origin(
            METANET,
            f"jaxmeta train --preset omniglot-metanet --steps {metanet['rows']['metanet']['steps']} "
            f"--seed {metanet['seed']}",
        ),
        "metanet_ahead": percent(ahead),
    }


def mnist() -> Values:
    rows = {name: row for name, row in read(ELSEWHERE)["rows"].items() if "mnist 10-way 1-shot" in row}

    def cells(method: str, found: dict) -> list[str]:
        label = "nearest pixels" if method == "pixels" else f"`{method}`"
        return [label, *accuracy_cells(found), TO_MNIST if method == "matching" else ""]

    runs = " ".join(f"runs/reproduce/{method}" for method in rows if method != "pixels")
    return {
        "table": markdown(
            ["method", "transductive, %", "inductive, %", "published, %"],
            [cells(method, row["mnist 10-way 1-shot"]) for method, row in rows.items()],
        ),
        "origin": origin(
            ELSEWHERE, f"python benchmarks/metric_based.py --omniglot {runs} --mnist DIR/mnist --json FILE"
        ),
    }


def within() -> Values:
    name = "omniglot-within-alphabet-transcribed.json"
    kept = read(name)

    def cells(row: dict) -> list[str]:
        budget = [] if row["steps"] is None else [f"{row['steps']:,} meta-steps"]
        budget += [f"{row['minutes']} minutes"] if "minutes" in row else []
        return [f"`{row['method']}`", row["images"], *accuracy_cells(row["accuracy"]), ", ".join(budget)]

    head = ["method", "images", "transductive, %", "inductive, %", "budget"]
    return {
        "protocol": kept["protocol"],
        "table": markdown(head, map(cells, kept["rows"])),
        "origin": origin(name),
    }


def alphabet() -> Values:
    name = "omniglot-alphabet-transcribed.json"
    kept = read(name)
    angelic, every = kept["alphabets"]["Angelic"], kept["all_alphabets"]
    (low, least), (high, most) = every["lowest"], every["highest"]
    spread = f"from {100 * least:.0f} ({low}) to {100 * most:.0f} ({high})"
    rows = [
        [
            "Angelic, 20 letters",
            str(angelic["drawings"]),
            f"{100 * angelic['right'] / angelic['drawings']:.1f}",
        ],
        [
            f"the first {every['letters']} letters of each of the {every['alphabets']} alphabets",
            f"{every['drawings']:,}",
            f"{100 * every['accuracy']:.1f}, {spread}",
        ],
    ]
    return {
        "protocol": kept["protocol"],
        "accuracy": percent(kept["accuracy"]["inductive"]),
        "budget": kept["budget"],
        "table": markdown(["alphabet", "drawings", "named correctly, %"], rows),
        "origin": origin(name),
    }


def compare() -> Values:
    name = "compare-maml-fomaml-transcribed.json"
    kept = read(name)
    rows = []
    for learner, row in kept["rows"].items():
        for part, found in row["accuracy"].items():
            minus = row.get("minus_maml", {}).get(part)
            cost = [f"{row['training_s']}", f"{row['steps_per_second']}", f"{row['memory_mb']:,}"]
            rows.append([f"`{learner}`", part, percent(found, 2), percent(minus, 2), *cost])
    head = ["learner", "test", "accuracy, %", "minus maml", "training, s", "steps/s", "memory, MB"]
    return {
        "protocol": kept["protocol"],
        "budget": kept["budget"],
        "table": markdown(head, rows),
        "origin": origin(name),
    }


def glyphs() -> Values:
    name = "glyphs-maml-transcribed.json"
    kept = read(name)
    return {
        "protocol": kept["protocol"],
        "budget": kept["budget"],
        "accuracy": ", ".join(f"{percent(row)} % {part}" for part, row in kept["accuracy"].items()),
        "origin": origin(name),
    }


def zero_shot() -> Values:
    rows = read(ELSEWHERE)["rows"]["zero-shot"]
    command = "jaxmeta train --preset glyphs-zero-shot --out RUN"
    return {
        "table": markdown(
            ["test", "transductive, %", "inductive, %"],
            [[test, *accuracy_cells(row)] for test, row in rows.items()],
        ),
        "origin": origin(
            ELSEWHERE, f"{command} && python benchmarks/metric_based.py --zero-shot RUN --json FILE"
        ),
    }


def mann() -> Values:
    rows = read(MEMORIES)["rows"]
    first = next(iter(rows.values()))
    command = (
        f"python benchmarks/model_based.py --networks {' '.join(rows)} --data DIR --seed {first['seed']} "
        "--json FILE --png FILE"
    )
    return {
        "steps": f"{first['steps']:,}",
        "table": model_based.table(rows),
        "origin": origin(MEMORIES, command, first),
        "guess": f"{100 * model_based.educated_guess(5):.1f}",
    }


def final_losses(cases: dict, names: dict[str, str]) -> str:
    """Return the table of final losses, the lowest of each row in bold."""
    methods = list(next(iter(cases.values()))["rows"])
    rows = []
    for case, label in names.items():
        final = [f"{cases[case]['rows'][method]['final']:.3f}" for method in methods]
        least = min(final, key=float)
        rows.append([label, *(f"**{cell}**" if cell == least else cell for cell in final)])
    return markdown(["", *methods], rows)


def learned() -> Values:
    quadratics, digits = (
        f"learned-optimizer-{problem}-amd-epyc-2-cores.json" for problem in ("quadratics", "digits")
    )
    functions, images = read(quadratics)["cases"], read(digits)["cases"]
    of_functions, of_images = functions["quadratics"], images["digits, 20 units"]
    command = "python benchmarks/learned_optimizer.py --json FILE --plot FILE --problems"
    return {
        "functions": str(of_functions["episodes"]),
        "function_minutes": minutes(of_functions["training_s"]),
        "quadratics": final_losses(
            functions, {"quadratics": "100 steps, as in training", "quadratics, longer": "200 steps"}
        ),
        "quadratics_origin": origin(quadratics, f"{command} quadratics"),
        "runs": str(of_images["episodes"]),
        "digit_minutes": minutes(of_images["training_s"]),
        "digits": final_losses(
            images,
            {
                "digits, 20 units": "20 sigmoid units, 100 steps, as in training",
                "digits, longer": "200 steps",
                "digits, 40 units": "40 units",
                "digits, two layers": "two layers",
                "digits, ReLU": "ReLU",
            },
        ),
        "digits_origin": origin(
            digits, f"{command} digits --runs 100 --episodes {of_images['episodes']} --data DIR"
        ),
    }


def transfers() -> Values:
    recipes = "transfer-recipes-intel-xeon-2-cores.json"
    kept, more = read(recipes), read(TRANSFERS)["results"]
    found, settings = kept["results"]["recipes"], kept["settings"]
    few, ranking = more["few-shot"], more["rank"]
    episodes = few["maml"]["omniglot"]["1"]["episodes"]
    command = "python benchmarks/transfer.py --data DIR --json FILE --what"

    def cells(row: dict) -> list[str]:
        scores = row["scores"]
        return [
            row["name"],
            f"{scores['log_me']:.3f}",
            f"{scores['h_score']:.2f}",
            f"{100 * row['accuracy']:.1f}",
        ]

    return {
        "steps": str(settings["steps"]),
        "batch": str(settings["batch"]),
        "seeds": str(len(found["scratch"]["1"])),
        "recipes": transfer.recipes_table(found),
        "recipes_origin": origin(recipes, f"{command} recipes --png FILE"),
        "rank": markdown(
            ["source", "LogME", "H-score", "accuracy after fine-tuning, %"], map(cells, ranking["rows"])
        ),
        "rank_origin": origin(TRANSFERS, f"{command} rank"),
        **{name: f"{row['kendall']:.1f}" for name, row in ranking["correlations"].items()},
        "episodes": str(episodes),
        "few_shot": transfer.few_shot_table(few),
        "few_shot_origin": origin(TRANSFERS, f"{command} few-shot --episodes {episodes}"),
    }


def emoji() -> Values:
    report = read(EMOJI)
    rows = few_shot.ordered(report["rows"])
    command = "python benchmarks/few_shot.py --data DIR --weights squeezenet1_1.safetensors --train all"

    def cells(source: str, words: dict) -> list[str]:
        return [source, *(percent(words[f"{ways}-way"]) for ways in (5, 20))]

    def budget(training: str) -> list[str]:
        row = rows[training]
        return [
            training,
            row["network"],
            f"{row['size']}",
            f"{row['steps']:,} of {row['meta_batch']} {row['drawn']}",
            minutes(row["training_s"]),
        ]

    def others(target: str) -> Iterable[list[str]]:
        row = report["elsewhere"][target]
        few, more = row["accuracy"]["1-shot"], row["accuracy"]["5-shot"]
        for source in few:
            best = max(more[source], key=lambda head: more[source][head]["mean"])
            yield [
                f"{target.replace('_', '-')}, {row['ways']}-way",
                source,
                percent(few[source]["simple_shot"]),
                percent(more[source]["simple_shot"]),
                f"{percent(more[source][best])} (`{best}`)",
                f"{row['scores'][source]['log_me']:.3f}",
                f"{row['scores'][source]['h_score']:.1f}",
            ]

    return {
        "episodes": f"{report['episodes']:,}",
        "held_out": few_shot.HELD_OUT,
        "five": few_shot.table(rows, 5),
        "twenty": few_shot.table(rows, 20),
        "widest": f"{100 * few_shot.widest(rows):.1f}",
        "zero_shot": markdown(
            ["features", "5-way", "20-way"], (cells(*each) for each in report["zero_shot"].items())
        ),
        "elsewhere": markdown(
            ["data", "features", "1 shot", "5 shots", "5 shots, best head", "LogME", "H-score"],
            (row for target in report["elsewhere"] for row in others(target)),
        ),
        "budgets": markdown(
            ["training", "network", "pixels", "meta-steps", "minutes"],
            (budget(training) for training in rows if "steps" in rows[training]),
        ),
        "origin": origin(EMOJI, f"{command} --words FOLDER --elsewhere --json FILE --figure FILE"),
    }


def rules() -> Values:
    emoji = read(EMOJI)
    rows = emoji["rows"]
    recipes = read("transfer-recipes-intel-xeon-2-cores.json")["results"]["recipes"]
    digits = {method: found["mnist"] for method, found in read(TRANSFERS)["results"]["few-shot"].items()}
    seeds = [name for name in rows if name.startswith("prototypical, seed")]
    sources = {
        "pixels": "pixels",
        "frozen": "SqueezeNet",
        "started": "prototypical from SqueezeNet",
        "classifier": "classifier from SqueezeNet",
        "classifier_scratch": "classifier",
        "matching": "matching",
        "maml": "maml",
    }

    def accuracy(source: str, task: str, head: str = "simple_shot") -> str:
        heads = rows[source]["heads"]
        return percent(heads.get(head, heads.get("own"))[task])

    def scratch(task: str) -> str:
        found = [rows[name]["heads"]["simple_shot"][task]["mean"] for name in seeds]
        return f"{100 * statistics.mean(found):.1f}" + f" (mean of {len(found)} seeds)" * (len(found) > 1)

    def recipe(name: str, labels: str) -> str:
        return f"{100 * statistics.mean(recipes[name][labels]):.1f}"

    def log_me_names_the_best(target: dict) -> bool:
        """Return whether the source with the highest LogME has the highest accuracy."""
        scores, accuracies = target["scores"], target["accuracy"]["1-shot"]
        chosen = max(scores, key=lambda source: scores[source]["log_me"])
        return chosen == max(accuracies, key=lambda source: accuracies[source]["simple_shot"]["mean"])

    elsewhere = list(emoji["elsewhere"].values())
    return {
        "ranked": f"{sum(map(log_me_names_the_best, elsewhere))} of {len(elsewhere)}",
        **{name: accuracy(source, "across 5-way 1-shot") for name, source in sources.items()},
        "scratch": scratch("across 5-way 1-shot"),
        "frozen_twenty": accuracy("SqueezeNet", "across 20-way 1-shot"),
        "started_twenty": accuracy(sources["started"], "across 20-way 1-shot"),
        "scratch_twenty": scratch("across 20-way 1-shot"),
        "frozen_three": accuracy("SqueezeNet", "across 5-way 3-shot"),
        "started_three": accuracy(sources["started"], "across 5-way 3-shot"),
        "refined": accuracy("SqueezeNet", "across 5-way 1-shot", "soft_kmeans"),
        "minutes": minutes(rows[sources["started"]]["training_s"]),
        "words": percent(emoji["zero_shot"]["SqueezeNet"]["5-way"]),
        "lpft": recipe("lp-ft", "5"),
        "full": recipe("full", "5"),
        "random_start": recipe("scratch", "5"),
        "lpft_many": recipe("lp-ft", "20"),
        "random_start_many": recipe("scratch", "20"),
        **{
            f"digits_{name}": percent(digits[method]["1"])
            for name, method in (
                ("prototypical", "prototypical"),
                ("centroid", "nearest centroid of features"),
                ("maml", "maml"),
            )
        },
        "digits_scratch_many": percent(digits["from scratch"]["20"]),
        "digits_prototypical_many": percent(digits["prototypical"]["20"]),
    }


def domains() -> Values:
    name = "domain-adaptation-intel-xeon-2-cores.json"
    kept = read(name)
    return {
        **{key: str(kept["settings"][key]) for key in ("network", "steps", "batch")},
        "seeds": str(len(kept["rows"]["usps-mnist"]["source"])),
        "table": domain_adaptation.table(kept["rows"]),
        "origin": origin(name, "python benchmarks/domain_adaptation.py --data DIR --json FILE --png FILE"),
    }


def label_shifts() -> Values:
    name = "label-shift-intel-xeon-2-cores.json"
    kept = read(name)
    return {
        "seeds": str(len(kept["rows"]["none"])),
        "table": label_shift.table(kept["rows"]),
        "origin": origin(
            name, f"python benchmarks/label_shift.py --data DIR --steps {kept['steps']} --json FILE"
        ),
    }


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms"


def speed() -> Values:
    position = {name: place for place, name in enumerate(ROWS)}
    reports = dict(
        sorted(
            ((path.name, read(path.name)) for path in sorted(RESULTS.glob("throughput-*.json"))),
            key=lambda named: [position[row["row"]] for row in named[1]["rows"]],
        )
    )
    found = [row for report in reports.values() for row in report["rows"]]
    places = [
        f", on {report['machine']['cpu']}, {report['machine']['device']}"
        for report in reports.values()
        for _ in report["rows"]
    ]
    if len({*places}) == 1:
        places = [""] * len(found)
    peers = list(dict.fromkeys(name for row in found for name in row["contenders"] if name != "jaxmeta"))

    def cell(text: str, contender: dict) -> str:
        # Older files lack the time of the first step.
        if (first := contender.get("first_step_s")) is None:
            return text
        return f"{text} ({first:.{0 if first >= 10 else 1}f} s)"

    def cells(row: dict, place: str) -> list[str]:
        of, tasks = row["contenders"], row["setting"]["meta_batch"]
        return [
            f"`{row['row']}`: {ROWS[row['row']].describe()}, {tasks} task{'s' * (tasks > 1)}{place}",
            cell(milliseconds(of["jaxmeta"]["median_s"]), of["jaxmeta"]),
            *(cell(f"{of[peer]['ratio']:.1f} ×", of[peer]) if peer in of else "" for peer in peers),
            f"{100 * row['share_of_matrix_product']:.0f} %",
        ]

    def command(report: dict) -> str:
        settings, rows = report["settings"], report["rows"]
        timed = f"{' '.join(row['row'] for row in rows)}{' --loop' * any('loop' in row for row in rows)}"
        rounds = f"--repeats {settings['repeats']} --seconds {settings['seconds']:g}"
        return f"python benchmarks/throughput.py --rows {timed} {rounds} --json FILE"

    rates = [row["matrix_product_flops"] / 1e9 for row in found]
    return {
        "slowest": f"{min(rates):.0f}",
        "fastest": f"{max(rates):.0f}",
        "table": markdown(["shapes", "ours", *peers, "share of the limit"], map(cells, found, places)),
        "origins": "\n\n".join(origin(name, command(report)) for name, report in reports.items()),
        "loop": ", ".join(f"{100 * row['loop']['ratio']:.0f} %" for row in found if "loop" in row),
    }


def growths() -> Values:
    name = "growth-amd-epyc-2-cores.json"
    kept = read(name)

    def cells(axis: str, found: dict) -> list[str]:
        values, points = list(found["points"]), list(found["points"].values())
        times, sizes = ([point[cost] for point in (points[0], points[-1])] for cost in growth.COSTS)
        return [
            f"{axis}, {values[0]} to {values[-1]}",
            " to ".join(f"{1e3 * seconds:,.{1 if seconds < 0.01 else 0}f}" for seconds in times) + " ms",
            f"{found['exponents']['median_s']:.2f}",
            " to ".join(f"{size / 1e6:,.0f}" for size in sizes) + " MB",
            f"{found['exponents']['memory_bytes']:.2f}",
        ]

    call = kept["first_call"]
    return {
        "table": markdown(
            ["number", "time", "exponent of time", "memory", "exponent of memory"],
            (cells(axis, found) for axis, found in kept["axes"].items()),
        ),
        "call": ", ".join(f"{part} {seconds:.1f} s" for part, seconds in call.items()),
        "whole": f"{sum(call.values()):.0f} s",
        "origin": origin(
            name,
            f"python benchmarks/growth.py --rounds {kept['rounds']} --calls {kept['calls']} --json FILE "
            "--figure FILE",
        ),
    }


def gpu_programs() -> Values:
    name = "gpu-program-h100.json"
    kept = read(name)
    card = kept["card"]

    def cells(row: dict) -> list[str]:
        seconds, launches = row["seconds"], f"{row['launches']:,}"
        if row["loops"]:
            within = row["launches"] - row["entry"]["kernels"]
            launches += f", of which {within:,} in {plural(len(row['loops']), 'loop')}"
        shares = [
            f"`{each['shape']}` {100 * each['traffic_bytes'] / row['traffic_bytes']:.0f} %"
            for each in row["arrays"][:2]
        ]
        times = (seconds[resource] for resource in ("bandwidth", "tf32", "float32", "launches"))
        return [
            f"`{row['row']}`",
            launches,
            f"{row['traffic_bytes'] / 1e9:.2f} GB",
            ", ".join(shares),
            f"{row['temporary_bytes'] / 1e6:,.0f} MB",
            *(f"{1e3 * time:.2f}" for time in times),
            f"**{1e3 * row['step_s']:.2f} ms**",
        ]

    head = ["meta-step", "launches", "traffic", "arrays with most of it", "temporary memory"]
    head += ["traffic, ms", "arithmetic in TF32, ms", "in float32, ms", "launches, ms", "predicted time"]
    rows = " ".join(row["row"] for row in kept["rows"])
    return {
        "card": kept["kind"],
        "bandwidth": f"{card['bandwidth'] / 1e12:.2f} TB/s",
        "tf32": f"{card['tf32'] / 1e12:.0f}",
        "float32": f"{card['float32'] / 1e12:.0f}",
        "launch": f"{1e6 * kept['launch_s']:.0f} µs",
        "table": markdown(head, map(cells, kept["rows"])),
        "origin": origin(name, f"python benchmarks/gpu_program.py {rows} --json FILE"),
    }


def memory() -> Values:
    name = "memory-amd-epyc-2-cores.json"
    kept = read(name)
    settings = kept["settings"]
    modes = {
        "store": '`memory="store"`',
        "recompute": '`"recompute"`',
        "forward_over_reverse": '`"forward_over_reverse"`',
        "first order": '`order="first"`',
        "implicit": '`order="implicit"`',
    }

    def cell(row: dict, mode: str) -> str:
        time = milliseconds(row["median_s"]) if mode == "store" else f"{row['time_ratio']:.2f} ×"
        return f"{row['temp_bytes'] / 1e6:,.0f} MB, {time}"

    return {
        "filters": str(settings["filters"]),
        "image": str(settings["image"]),
        "table": markdown(
            ["inner steps", *modes.values()],
            [[steps, *(cell(row[mode], mode) for mode in modes)] for steps, row in kept["rows"].items()],
        ),
        "origin": origin(name, f"python benchmarks/memory.py --rounds {settings['rounds']} --json FILE"),
    }


def lora() -> Values:
    name = "memory-lora-amd-epyc-2-cores.json"
    kept = read(name)
    settings, rows = kept["settings"], kept["rows"]
    modes = list(next(iter(rows.values())))

    def cell(row: dict, mode: str) -> str:
        time = milliseconds(row["median_s"]) if mode == modes[0] else f"{row['time_ratio']:.2f} ×"
        return f"{row['temp_bytes'] / 1e6:,.0f} MB, {time}"

    first = next(iter(rows.values()))
    sizes = (f"{first[f'{adapted}, store']['adapted_bytes'] / 1e6:.2g} MB" for adapted in ("all", "lora"))
    command = f"--network {settings['network']} --steps {' '.join(rows)} --rounds {settings['rounds']}"
    return {
        **{key: str(settings[key]) for key in ("width", "image", "rank")},
        **dict(zip(("all", "factors"), sizes, strict=True)),
        "table": markdown(
            ["inner steps", *modes],
            [[steps, *(cell(row[mode], mode) for mode in modes)] for steps, row in rows.items()],
        ),
        "origin": origin(name, f"python benchmarks/memory.py {command} --json FILE"),
    }


def streaming() -> Values:
    name = "streaming-amd-epyc-2-cores.json"
    kept = read(name)
    rounds = kept["rounds"]
    labels = {"memory": "the device's memory", "stream": "a stream from disk"}
    command = f"--images {kept['images'] // 64} --steps {kept['steps']} --rounds {len(rounds)}"
    return {
        "images": f"{kept['images']:,}",
        "share": f"{100 * kept['stream / memory']:.0f}",
        "rounds": str(len(rounds)),
        "batch": f"{kept['batch_ms']:.0f}",
        "table": markdown(
            ["images from", "meta-steps per second, median"],
            [
                [label, f"{statistics.median(row[part] for row in rounds):.2f}"]
                for part, label in labels.items()
            ],
        ),
        "origin": origin(name, f"python benchmarks/streaming.py {command} --json FILE"),
    }


def precision() -> Values:
    name = "bfloat16-omniglot-transcribed.json"
    kept = read(name)
    return {
        "protocol": kept["protocol"],
        "budget": kept["budget"],
        "table": markdown(
            ["network computed in", "transductive, %", "inductive, %"],
            [[dtype, *accuracy_cells(found)] for dtype, found in kept["rows"].items()],
        ),
        "origin": origin(name),
    }


def scientific(number: float) -> str:
    power = math.floor(math.log10(number))
    exponent = str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{number / 10**power:.1f} · 10{exponent}"


def scalings() -> Values:
    name = "scaling-virtual-devices.json"
    kept = read(name)
    collectives = [row["collectives"] for row in kept["rows"] if row["devices"] > 1]
    if any([(each["kind"], each["times"]) for each in row] != [("all-reduce", 1)] for row in collectives):
        raise ValueError(f"{name}: page.md says that a step has one all-reduce; a row of the file has others")
    models = {
        "conv4": "MAML, Conv4-64, second order",
        "resnet12": "prototypical, ResNet-12, 84×84",
        "vit-b": "prototypical, ViT-B/16, 224×224",
    }
    h100 = scaling.ACCELERATORS["H100 SXM"].kind
    # A GPU's program is compiled for one device.
    rows = {
        (row["model"], row["kind"]): row for row in kept["rows"] if row["devices"] == 8 or row["kind"] == h100
    }
    predictions = {
        (each["model"], each["accelerator"], each["work"]): {
            point["devices"]: point for point in each["points"]
        }
        for each in kept["predictions"]
    }

    def gigabytes(model: str, kind: str) -> str:
        return f"{rows[model, kind]['memory_bytes'] / 1e9:.2g} GB"

    def efficiency(accelerator: str, work: str) -> list[str]:
        return [
            ", ".join(
                f"{100 * predictions[model, accelerator, work][devices]['efficiency']:.0f}"
                for devices in (8, 64, 256)
            )
            + " %"
            for model in models
        ]

    def all_reduce(model: str, accelerator: str) -> str:
        seconds = predictions[model, accelerator, scaling.ROOFLINE][256]["seconds"]
        return f"{1e3 * (seconds['transfer'] + seconds['latency']):.2g}"

    sized = {model: (scaling.MODELS[model], rows[model, "cpu"]) for model in models}
    table = [
        [
            "tasks per device (5-way 1-shot; queries per class)",
            *(f"{model.tasks} ({model.queries})" for model, _ in sized.values()),
        ],
        [
            "all-reduces per step, size",
            *(f"1, {row['all_reduced_bytes'] / 1e6:.3g} MB" for _, row in sized.values()),
        ],
        ["operations per device and step", *(scientific(row["operations"]) for _, row in sized.values())],
        [
            "memory per device: TPU's program; H100's; a CPU's",
            *("; ".join(gigabytes(model, kind) for kind in ("TPU v5 lite", h100, "cpu")) for model in models),
        ],
        [
            "efficiency on 8, 64, 256 TPU v5e, by its compiler's cycles",
            *efficiency("TPU v5e", scaling.COMPILER),
        ],
        ["the same, by roofline", *efficiency("TPU v5e", scaling.ROOFLINE)],
        ["efficiency on 8, 64, 256 H100, by roofline", *efficiency("H100 SXM", scaling.ROOFLINE)],
        [
            "all-reduce on 256 TPU v5e, H100",
            *(f"{all_reduce(model, 'TPU v5e')}, {all_reduce(model, 'H100 SXM')} ms" for model in models),
        ],
    ]
    return {
        "table": markdown(["", *models.values()], table),
        "bounds": "\n".join(
            f"- {models[each['model']]}, {each['accelerator']}, work by {each['work']}: {each['bound']}"
            for each in kept["predictions"]
        ),
        "origin": origin(
            name, "python benchmarks/scaling.py --topology v5e:2x4 --gpu FILE --json FILE --png FILE"
        ),
    }


def tried() -> Values:
    name = "tried-transcribed.json"
    kept = read(name)
    return {
        "table": markdown(
            ["what was tried", "result"], [[row["what"], row["found"]] for row in kept["rows"]]
        ),
        "origin": f"*Data:* [{name}](results/{name}) (transcribed from texts up to {kept['date']}); the "
        "tables above have the numbers of most rows.",
    }


SECTIONS: dict[str, Callable[[], Values]] = {
    "sinusoid": sinusoid,
    "cavia": cavia,
    "omniglot": omniglot,
    "mnist": mnist,
    "within": within,
    "alphabet": alphabet,
    "compare": compare,
    "glyphs": glyphs,
    "zero_shot": zero_shot,
    "emoji": emoji,
    "mann": mann,
    "learned": learned,
    "transfer": transfers,
    "rules": rules,
    "domains": domains,
    "label_shift": label_shifts,
    "speed": speed,
    "growth": growths,
    "gpu": gpu_programs,
    "memory": memory,
    "lora": lora,
    "streaming": streaming,
    "precision": precision,
    "scaling": scalings,
    "tried": tried,
}


def fill_template(template: str) -> str:
    """Return benchmarks/README.md: the text of page.md with its placeholders filled.

    Raises:
      ValueError: a placeholder has no value, a value has no placeholder, or no section reads a file of
        results.
    """
    values = {
        f"{section}.{name}": value for section, fill in SECTIONS.items() for name, value in fill().items()
    }
    wanted = set(re.findall(r"\{\{([\w.]+)\}\}", template))
    if wanted != {*values}:
        raise ValueError(
            f"page.md and report.py differ: placeholders without a value {sorted(wanted - {*values})}, "
            f"values without a placeholder {sorted({*values} - wanted)}"
        )
    if unread := sorted({path.name for path in RESULTS.glob("*.json")} - _read):
        raise ValueError(
            f"results/: no section of report.py reads {', '.join(unread)}; fill a placeholder from it, or "
            "delete it"
        )
    return re.sub(r"\{\{([\w.]+)\}\}", lambda found: values[found[1]], template)


# Rows of Omniglot in the short table, by the file that has them.
_SHORT = {
    GRADIENT: ("maml", "meta_sgd", "maml_plus_plus", "imaml", "reptile"),
    METRIC: ("prototypical", "matching", "relation"),
    METANET: ("metanet",),
}


def short_table() -> str:
    """Return the results table of the top README, with ours next to the published numbers."""
    maml, cavia_values = read(SINUSOID), cavia()
    rows = [
        [
            "`maml`",
            "sine waves, 5 points, 1 step: MSE",
            f"{maml['published']['mse_by_step']['1']:.2f}",
            f"{maml['mse_by_step']['1']:.2f}",
            maml["budget"],
        ],
        [
            "`cavia`",
            f"sine waves, {cavia_values['shots']} points, 1 step: MSE",
            CAVIA,
            cavia_values["mse"],
            cavia_values["budget"],
        ],
    ]
    for name, methods in _SHORT.items():
        found = read(name)["rows"]
        for method in methods:
            row = found[method]
            # The first of several published values: "97.68 ± 0.04 transductive, …".
            value, part = row["published"].split(",")[0].rsplit(" ", 1)
            rows.append(
                [
                    f"`{method}`",
                    f"Omniglot 5-way 1-shot, {part}: %",
                    value,
                    percent(row["accuracy"][part]),
                    reproduce.budget(row),
                ]
            )
    kept, published = read(MEMORIES)["rows"]["lrua"], model_based.PUBLISHED["lrua"]
    rows.append(
        [
            "`mann`",
            "Omniglot sequences, 2nd and 10th presentation: %",
            f"{100 * published[2]:.1f}, {100 * published[10]:.1f}",
            ", ".join(f"{100 * kept['accuracy_by_instance'][i]:.1f}" for i in ("2", "10")),
            f"{kept['steps']:,} meta-steps of 16 sequences, {minutes(kept['training_s'])} minutes",
        ]
    )
    return markdown(["method", "protocol", "published", "ours", "our budget, 2 CPU cores"], rows)


def pages() -> dict[Path, str]:
    """Return the text of each page that this program writes, by its path."""
    top = TOP.read_text(encoding="utf-8")
    return {
        PAGE: fill_template(TEMPLATE.read_text(encoding="utf-8")),
        TOP: MARKED.sub(lambda found: f"{found[1]}{short_table()}\n{found[2]}", top),
    }


def outdated_pages() -> list[Path]:
    """Return the pages that differ from what would be written."""
    return [
        path
        for path, wanted in pages().items()
        if not path.exists() or path.read_text(encoding="utf-8") != wanted
    ]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page differs")
    if parser.parse_args(argv).check:
        found = outdated_pages()
        for path in found:
            print(f"{path} differs from the results: run python benchmarks/report.py", file=sys.stderr)
        return int(bool(found))
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
