"""Domains of examples: support and queries from different domains, and domains held out for test.

A domain is how an example was made: the style of a picture, the camera, the writer of a character. A task
across domains gives the support set in some domains and asks for examples of others.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from jaxmeta.checks import ArgumentError, check_kind, check_word, described, format_value, join_names
from jaxmeta.core import SplitName
from jaxmeta.tasks.splits import in_order
from jaxmeta.tasks.subset import ordered_subset

# Domains as given by a user: one name per example.
DomainNames = Sequence[str | int] | np.ndarray


class DomainTable(NamedTuple):
    """The number of examples of each class and domain; the rows of a class are sorted by domain.

    Attributes:
      counts: `(classes, domains)` number of examples.
      held: `(domains,)` whether a domain is held out for the queries; None where any domain may be asked for.
    """

    counts: Int[Array, "classes domains"] | Int[np.ndarray, "classes domains"]
    held: Bool[Array, " domains"] | Bool[np.ndarray, " domains"] | None = None

    def of(self, classes: Sequence[int] | Int[np.ndarray, " n"]) -> "DomainTable":
        """Return the table of some of the classes, in the given order."""
        return self._replace(counts=self.counts[np.asarray(classes, int)])

    def on_device(self) -> "DomainTable":
        """Return the table as arrays of the device."""
        held = None if self.held is None else jnp.asarray(self.held)
        return DomainTable(jnp.asarray(self.counts, jnp.int32), held)

    def remaining(self, shots: int) -> Int[np.ndarray, " classes"]:
        """Return the number of examples from which the queries of each class are drawn, in the worst case.

        The support set takes whole domains in a random order until they have `shots` examples, so the order
        decides how many examples remain. The result is negative where the support set itself lacks examples.
        """
        counts = np.asarray(self.counts)
        if self.held is not None:
            held = np.asarray(self.held)
            available = counts[:, ~held].sum(1)
            return np.where(available >= shots, counts[:, held].sum(1), available - shots)
        cases: dict[tuple[int, ...], int] = {}
        for row in counts.tolist():
            case = tuple(sorted(row))
            if case not in cases:
                total = sum(case)
                cases[case] = total - _most_taken(case, shots) if total >= shots else total - shots
        return np.array([cases[tuple(sorted(row))] for row in counts.tolist()], int)


class PartDomains(NamedTuple):
    """The domains of the examples of one part of a split.

    Attributes:
      rows: `(n,)` index of each example's domain; -1 for examples that the part must not use.
      size: number of domains.
      held: `(domains,)` whether a domain is held out for the queries; None where any domain may be asked for.
      across: whether support and queries are from different domains.
      sentence: description for the protocol card.
    """

    rows: Int[np.ndarray, " n"]
    size: int
    held: Bool[np.ndarray, " domains"] | None
    across: bool
    sentence: str

    def table(self, index: Int[np.ndarray, " n"], classes: int) -> DomainTable:
        """Return the table of classes and domains.

        Args:
          index: `(n,)` class of each example; -1 for examples of no class.
          classes: number of classes.
        """
        kept = (index >= 0) & (self.rows >= 0)
        cells = np.bincount(index[kept] * self.size + self.rows[kept], minlength=classes * self.size)
        return DomainTable(cells.reshape(classes, self.size), self.held)


def part_domains(
    domains: DomainNames | None,
    n: int,
    split: SplitName,
    across: bool,
    test_domains: Sequence[str] | None,
) -> PartDomains | None:
    """Return the domains of the examples of the part `split`; None for examples without domains.

    Args:
      domains: domain of each example; None for examples without domains.
      n: number of examples.
      split: part of the split.
      across: whether support and queries are from different domains.
      test_domains: domains held out for test; None for none.

    Raises:
      ArgumentError: domains of a wrong number or type; an unknown test domain, or no domain left for a part;
        `across` with fewer than two domains; or `across` or `test_domains` without domains.
    """
    check_word("across", across, (True, False))
    if domains is None:
        for name, given in (("across", across), ("test_domains", test_domains is not None)):
            if given:
                raise ArgumentError(name, "the examples have no domains; give the domain of each (domains)")
        return None
    names, rows = _indexed(domains, n)
    if test_domains is None:
        if across:
            _check_across(names, "the examples have")
        return PartDomains(
            rows, len(names), None, across, "support and query from different domains" if across else ""
        )
    chosen = _checked_test_domains(test_domains, names)
    held = np.array([name in chosen for name in names])
    listed = join_names(in_order(chosen, names), len(chosen))
    if split == "test":
        used = np.ones(len(names), bool) if across else held
        sentence = f"{'' if across else 'support and '}queries from {listed}, held out of training"
        if across:
            sentence += ", support from other domains"
    else:
        used = ~held
        sentence = f"without {listed}, held out for test"
        if across:
            left = [name for name in names if name not in chosen]
            _check_across(left, f"without {listed}, which test_domains holds out, the examples have")
            sentence = f"support and query from different domains, {sentence}"
    # Domains of other parts get the index -1, the others are numbered anew.
    new_index = np.where(used, np.cumsum(used) - 1, -1)
    return PartDomains(
        new_index[rows], int(used.sum()), held if across and split == "test" else None, across, sentence
    )


def draw_across(
    table: DomainTable,
    offsets: Int[Array, " ways"],
    classes: Int[Array, " ways"],
    shots: int,
    bits: tuple[UInt32[Array, " domains"], UInt32[Array, " per_class"], UInt32[Array, " ways"]],
) -> Int[Array, "ways per_class"]:
    """Draw the rows of an episode whose support and queries are from different domains.

    A random order of the domains is shared by all classes. The support set of a class is drawn from the first
    domains that together have at least `shots` of its examples, the queries from the other domains, both
    uniformly without replacement.

    The positions in the domains, in their order, are drawn by the same random numbers for all classes, so
    that classes with equally many examples in every domain use the same domains; within a domain the
    positions of each class are shifted by a separate random number, so that its examples do not depend on
    those of the others.

    Args:
      table: examples by class and domain.
      offsets: first row of each drawn class.
      classes: drawn classes.
      shots: support examples per class.
      bits: random numbers of the domains, of the examples of a class, and of the classes.

    Returns:
      Row of each example, the support set first.
    """
    domain_bits, example_bits, shift_bits = bits
    held = None if table.held is None else jnp.asarray(table.held)
    order = jnp.argsort(domain_bits) if held is None else jnp.lexsort((domain_bits, held))

    def rows(
        counts: Int[Array, " domains"], offset: Int[Array, ""], shift: UInt32[Array, ""]
    ) -> Int[Array, " per_class"]:
        ordered = counts[order]
        after = jnp.cumsum(ordered)
        before = after - ordered
        supports = before < shots
        if held is not None:
            supports &= ~held[order]
        taken = jnp.sum(jnp.where(supports, ordered, 0))
        first_query = taken if held is None else jnp.sum(jnp.where(held, 0, counts))
        queries = ordered_subset(example_bits[shots:], after[-1] - first_query)
        positions = first_query + queries
        if shots:
            positions = jnp.concatenate([ordered_subset(example_bits[:shots], taken), positions])
        rank = jnp.sum(after[None, :] <= positions[:, None], 1)
        domain = order[rank]
        size = counts[domain]
        cyclic_shift = (shift % size.astype(jnp.uint32)).astype(jnp.int32)
        within = (positions - before[rank] + cyclic_shift) % size
        return offset + (jnp.cumsum(counts) - counts)[domain] + within

    return jax.vmap(rows)(jnp.asarray(table.counts)[classes], offsets, shift_bits)


def _most_taken(counts: Sequence[int], shots: int) -> int:
    """Return the largest number of examples in the domains that the support set takes, over all orders.

    These are domains with fewer than `shots` examples together, and one more. The numbers of examples that
    such domains can have together are the set bits of an integer.
    """
    most = 0
    below = (1 << shots) - 1
    for last in set(counts):
        others = list(counts)
        others.remove(last)
        sums = 1
        for count in others:
            if count < shots:
                sums |= (sums << count) & below
        most = max(most, last + sums.bit_length() - 1)
    return most if shots else 0


def _indexed(domains: DomainNames, n: int) -> tuple[list[str], Int[np.ndarray, " n"]]:
    """Return the names of the domains in order, and the index of each example's domain."""
    if isinstance(domains, str) or not isinstance(domains, Iterable):
        raise ArgumentError("domains", f"got {described(domains)}; it must be one domain name per example")
    values = np.asarray(domains)
    if values.dtype.kind == "O" and all(isinstance(name, str) for name in values.reshape(-1)):
        values = values.astype(str)
    if values.shape != (n,):
        raise ArgumentError(
            "domains", f"got shape {values.shape}; it must be ({n},), one domain name per example"
        )
    if values.dtype.kind not in "iuU":
        raise ArgumentError("domains", f"got {values.dtype}; it must hold names or integers")
    present, rows = np.unique(values.astype(str), return_inverse=True)
    if "" in present:
        raise ArgumentError("domains", f"domains[{int(np.argmax(values == ''))}] is an empty name")
    names = in_order(present.tolist())
    index = {name: i for i, name in enumerate(names)}
    return names, np.array([index[name] for name in present.tolist()])[rows.reshape(-1)]


def _checked_test_domains(test_domains: Sequence[str], names: Sequence[str]) -> list[str]:
    check_kind("test_domains", test_domains, tuple | list, "a tuple of domain names")
    chosen = [str(name) for name in test_domains]
    if not chosen:
        raise ArgumentError("test_domains", "got no names; give at least one domain, or leave it out")
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise ArgumentError(
            "test_domains",
            f"got {join_names(map(repr, unknown))}; the domains are {join_names(map(repr, names), 20)}",
        )
    if set(chosen) == set(names):
        raise ArgumentError(
            "test_domains",
            f"got {format_value(tuple(chosen))}, which are all domains; training needs another one",
        )
    return list(dict.fromkeys(chosen))


def _check_across(names: Sequence[str], start: str) -> None:
    if len(names) < 2:
        raise ArgumentError(
            "across",
            f"support and queries from different domains need at least two domains; {start} only "
            f"{join_names(map(repr, names))}",
        )
