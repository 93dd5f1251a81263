"""Test of the list of mutants for tests/mutation.py."""

import mutation


def test_the_lines_of_each_mutant_occur_once_in_its_file():
    mutants = mutation.mutants()  # exits where they do not
    assert all(mutant["lines"] for mutant in mutants)
