"""Test of the list of mutants for tests/mutation.py."""

import subprocess

import mutation
import pytest


def test_the_lines_of_each_mutant_occur_once_in_its_file():
    mutants = mutation.mutants()  # exits where they do not
    assert all(mutant["lines"] for mutant in mutants)


@pytest.mark.parametrize("status", [0, 1])
def test_the_coverage_of_a_suite_that_fails_is_refused(status, tmp_path, monkeypatch):
    monkeypatch.setattr(mutation, "copy_tree", lambda tree, target: target)
    done = subprocess.CompletedProcess([], status)
    monkeypatch.setattr(mutation.subprocess, "run", lambda *arguments, **settings: done)
    if not status:
        mutation.cover(tmp_path, tmp_path)
        return
    with pytest.raises(SystemExit, match="pytest exits with status 1 without a mutant"):
        mutation.cover(tmp_path, tmp_path)
