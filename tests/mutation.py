"""Run mutation tests: put small mistakes into a copy of the library, one at a time.

`tests/mutants.toml` lists the mutants: a file, lines of it, and their replacement. Each mutant is put into a
copy of the tree and tested by the tests that run its lines, according to coverage.py's contexts. Tests of the
default run come first and nightly tests after them, and a mutant's run ends with its first failure. Results
are appended to a file as they come; a restarted run skips the mutants in it.

    pip install -e '.[dev]' pytest-cov
    python tests/mutation.py cover runs/mutation          # once: which test runs which line
    python tests/mutation.py run runs/mutation            # in two processes: --part 0/2 and --part 1/2
    python tests/mutation.py report runs/mutation

`--only ID …` runs only these mutants. `--tree FOLDER` measures the suite of another version, with its `tests`
in that folder. With `--most N` a mutant is tested by the N tests of each run nearest to its file, and may
survive where other tests would catch it: the report counts such survivors.
"""

import argparse
import collections
import json
import os
import pathlib
import shutil
import sqlite3
import subprocess
import sys
import time
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Seconds. The limit is many times what the tests take, so a mutant that exceeds it counts as caught.
RUN_TIMEOUT, TIMEOUT_PER_TEST = 120, 5
CAUGHT, SURVIVED = "caught", "survived"


def mutants():
    """Return the listed mutants, each with the changed lines and the new text of its file."""
    listed = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]
    for mutant in listed:
        text = (ROOT / mutant["file"]).read_text()
        if text.count(mutant["old"]) != 1:
            raise SystemExit(f"{mutant['id']}: its lines occur {text.count(mutant['old'])} times, not once")
        mutant["text"] = text.replace(mutant["old"], mutant["new"])
        compile(mutant["text"], mutant["file"], "exec")
        first = text[: text.index(mutant["old"])].count("\n") + 1
        mutant["lines"] = set(range(first, first + mutant["old"].count("\n")))
    counts = collections.Counter(mutant["id"] for mutant in listed)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise SystemExit(f"the id of each mutant must be unique; repeated: {', '.join(repeated)}")
    return listed


def copy_tree(tree, target):
    """Copy a tree's library and tests, so that mutants never change the original."""
    shutil.rmtree(target, ignore_errors=True)
    for name in ("jaxmeta", "tests", "benchmarks", "notebooks", ".ci"):
        shutil.copytree(tree / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in tree.iterdir():
        if file.is_file():
            shutil.copy(file, target / file.name)
    return target


def environment(tree, **variables):
    """Return variables for pytest, by which a tree's library takes precedence over an installed one."""
    defaults = {"JAXMETA_DATA": str(ROOT.parent / "shared" / "data"), "MPLBACKEND": "Agg"}
    return defaults | os.environ | variables | {"PYTHONPATH": str(tree)}


def pytest(tree, *arguments, timeout=None, **variables):
    """Run pytest in a tree, without parallel processes, and return the completed process."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=tree,
        env=environment(tree, **variables),
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def cover(tree, work):
    """Run the complete suite once and record which test runs which line."""
    target = copy_tree(tree, work / "cover")
    (work / "settings.ini").write_text("[run]\nsource = jaxmeta\nparallel = true\n")
    arguments = ["-n", "auto", "-m", "not slow", "--cov=jaxmeta", "--cov-context=test", "--cov-report="]
    command = [sys.executable, "-m", "pytest", "-q", *arguments, f"--cov-config={work / 'settings.ini'}"]
    variables = environment(target, COVERAGE_FILE=str(work / "coverage"))
    status = subprocess.run(command, cwd=target, env=variables).returncode
    if status:
        # A test that fails without a mutant would catch all mutants of its lines.
        raise SystemExit(f"pytest exits with status {status} without a mutant; all tests must pass")


def lines_of(bits):
    """Return the line numbers in a bit field of coverage.py."""
    return {8 * i + j for i, byte in enumerate(bits) for j in range(8) if byte & (1 << j)}


def tests_by_line(work):
    """Return the tests that run each line, by file and line number."""
    tests = collections.defaultdict(lambda: collections.defaultdict(set))
    with sqlite3.connect(work / "coverage") as database:
        query = (
            "select file.path, context.context, line_bits.numbits from line_bits "
            "join file on file.id = file_id join context on context.id = context_id"
        )
        for path, context, bits in database.execute(query):
            name = "jaxmeta/" + path.rpartition("/jaxmeta/")[2]
            test = context.partition("|")[0].partition("@")[0]
            for line in lines_of(bits) if test else ():
                tests[name][line].add(test)
    return tests


def collected(tree, *arguments):
    """Return the names of the tests that pytest collects."""
    listed = pytest(tree, "--collect-only", *arguments).stdout.decode().splitlines()
    return {line.strip() for line in listed if line.startswith("tests/") and "::" in line}


def tests_of(mutant, coverage, complete):
    """Return the tests for a mutant, those named after its file first.

    They are the tests that run its lines, and tests of the same file and parameters, with which they share
    compiled programs: only the first test of a program traces its lines. A mutant may also name a test file
    that runs its lines in separate processes, or on more devices than the recorded run had.
    """

    def kind(test):
        file, _, name = test.partition("::")
        return file, name.partition("[")[2]

    direct = set().union(*(coverage[mutant["file"]][line] for line in mutant["lines"]))
    if "tests" in mutant:
        direct |= {test for test in complete if test.startswith(mutant["tests"])}
    kinds = {kind(test) for test in direct}
    stem, folder = pathlib.PurePath(mutant["file"]).stem, pathlib.PurePath(mutant["file"]).parent.name

    def distance(test):
        return stem not in test.partition("::")[0], folder not in test, test not in direct, test

    return sorted((test for test in complete if test in direct or kind(test) in kinds), key=distance)


def run_tests(tree, tests, devices, cache, *markers):
    """Run tests up to the first failure; return the outcome and the failed test."""
    arguments = tree / "arguments.txt"
    arguments.write_text("\n".join(tests) + "\n")
    try:
        variables = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_NUM_CPU_DEVICES": str(devices)}
        timeout = RUN_TIMEOUT + TIMEOUT_PER_TEST * len(tests)
        done = pytest(tree, "-x", "--tb=line", *markers, f"@{arguments}", timeout=timeout, **variables)
    except subprocess.TimeoutExpired:
        return CAUGHT, "timed out"
    output = done.stdout.decode()
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode == 0:
        return SURVIVED, ""
    if not failed:
        raise RuntimeError(output[-2000:])
    return CAUGHT, failed[0].split(" - ")[0].split()[-1]


def run(tree, work, part, num_parts, most, only):
    target = copy_tree(tree, work / f"tree-{part}")
    coverage, default, complete = tests_by_line(work), collected(target), collected(target, "-m", "not slow")
    results = work / "results.jsonl"
    done = (
        {json.loads(line)["id"] for line in results.read_text().splitlines()} if results.exists() else set()
    )
    for number, mutant in enumerate(mutants()):
        if number % num_parts != part or mutant["id"] in done or (only and mutant["id"] not in only):
            continue
        tests = tests_of(mutant, coverage, complete)
        quick = [test for test in tests if test in default][:most]
        nightly = [test for test in tests if test not in default][:most]
        row = {"id": mutant["id"], "tests": len(quick) + len(nightly), "default_tests": len(quick)}
        row["left_out"] = len(tests) - row["tests"]
        devices = mutant.get("devices", 2)
        started = time.monotonic()
        original = (target / mutant["file"]).read_text()
        (target / mutant["file"]).write_text(mutant["text"])
        try:
            row["default"], row["by"] = SURVIVED, ""
            if quick:
                row["default"], row["by"] = run_tests(target, quick, devices, work / "cache")
            row["complete"] = row["default"]
            if row["default"] == SURVIVED and tests:
                # The default tests again, because the complete run also checks annotations.
                complete_run = ("-m", "not slow")
                row["complete"], row["by"] = run_tests(
                    target, [*nightly, *quick], devices, work / "cache", *complete_run
                )
        finally:
            (target / mutant["file"]).write_text(original)
        row["seconds"] = round(time.monotonic() - started)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def report(work):
    rows = {json.loads(line)["id"]: json.loads(line) for line in (work / "results.jsonl").open()}
    listed = [mutant for mutant in mutants() if mutant["id"] in rows]
    print(f"{'mutant':22} {'kind':24} {'default':9} {'complete':9} first failure, or why it is equivalent")
    for mutant in listed:
        row = rows[mutant["id"]]
        reason = mutant.get("equivalent") or row["by"]
        print(f"{mutant['id']:22} {mutant['kind']:24} {row['default']:9} {row['complete']:9} {reason}")
    real = [rows[mutant["id"]] for mutant in listed if "equivalent" not in mutant]
    complete = sum(row["complete"] == CAUGHT for row in real)
    default = sum(row["default"] == CAUGHT for row in real)
    print(f"{len(real)} mutants, {len(listed) - len(real)} equivalent ones left out")
    print(f"complete run: {complete} caught; default run: {default}")
    capped = sum(row["complete"] == SURVIVED and row.get("left_out", 0) > 0 for row in real)
    if capped:
        print(f"{capped} survivors ran only the tests nearest to their file (--most)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["cover", "run", "report"])
    parser.add_argument("work", type=pathlib.Path, help="folder for coverage, copies and results")
    parser.add_argument("--tree", type=pathlib.Path, default=ROOT, help="source tree to measure")
    parser.add_argument("--part", default="0/1", help="index and number of processes, such as 0/2")
    parser.add_argument("--most", type=int, help="limit on tests per run, nearest to the file first")
    parser.add_argument("--only", nargs="+", metavar="ID", help="run only these mutants")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if arguments.command == "cover":
        cover(arguments.tree.resolve(), work)
    elif arguments.command == "run":
        part, num_parts = map(int, arguments.part.split("/"))
        run(arguments.tree.resolve(), work, part, num_parts, arguments.most, arguments.only)
    else:
        report(work)


if __name__ == "__main__":
    main()
