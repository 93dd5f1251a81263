"""Decorators of learner factories: `@learner` for facts about a method, `@forwards` for its arguments.

The keyword-only parameters of plain type of a factory are its settings, which its docstring describes. Facts
that are not settings, such as the kinds of tasks that the method learns, are arguments of `@learner(...)`,
all with defaults that fit an ordinary method. A factory that passes its keyword arguments on to another one
is decorated by `@forwards(other)`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, ParamSpec, Protocol, TypeVar, Unpack, get_args, get_origin, get_type_hints

from jaxmeta.checks import ArgumentError, check_kind, check_word
from jaxmeta.core import Kind, Learner, with_slot_checks
from jaxmeta.learner_form import normalized

__all__ = ["Facts", "facts_of", "forwards", "learner"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")


class Decorator(Protocol):
    """A decorator that keeps the parameters of the decorated function."""

    def __call__(self, factory: Callable[P, R], /) -> Callable[P, R]:
        """Decorate a function."""


KINDS: tuple[Kind, ...] = get_args(Kind)
_FACTS, _PARENT = "__jaxmeta_facts__", "__jaxmeta_parent__"

# Former names of parameters, each with its possible new names; the first that a factory has is the new one.
RENAMED = {
    "steps": ("inner_steps", "eval_steps"),
    "batch_size": ("inner_batch",),
    "rate": ("inner_lr",),
    "rates": ("inner_lr",),
    "optimizer": ("inner_optimizer",),
    "base_task_weights": ("task_weights",),
}


def _rows() -> Mapping[str, str]:
    return {"transductive": "batch", "inductive": "support"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about a method that are not settings.

    Attributes:
      kinds: kinds of tasks that the method learns: "classification", "regression".
      head: True for a network with one output for each way, False for an embedding.
      rows: rows of a report, each with the `norm` of the learner that it evaluates; without batch statistics
        a report has the inductive one only.
      supervised: True for training on mini-batches of all training classes (`jm.tasks.supervised`) instead
        of episodes.
      zero_shot: True if the method can learn classes from their metadata alone.
      distances: True if outputs are the negative distances between a query and the classes.
      transductive: True if the prediction for a query depends on the other queries by the method itself,
        under every `norm`. Its report has the row "transductive" alone, and `jm.load_classifier` refuses it.
      networks: names of the networks that the method works with; None for all.
      network: function `(build, tasks) -> arguments` that returns the factory's first arguments, as a tuple
        of positional arguments and a dictionary of keyword arguments. `build(out)` makes the chosen network
        with output width `out` (None for an embedding), and `tasks` has the settings of the tasks. None for
        the network alone, with a head as in `head`.
      augment: function `(key, x) -> x` that `--distort` passes to the factory as `augment`; None for
        `distort` of `jaxmeta.tasks.distortions`.
      outer: default outer optimizer.
      train_shots: number of support examples in training for each one of the test protocol.
      training: defaults that replace those of the protocol from which a run starts: a dictionary by names of
        settings, or a function from the dictionary of the protocol's settings to such a dictionary. The
        function's argument has four more keys: "kind", the kind of tasks; "tasks" and "network", their names;
        and "made_for_embeddings", True if the protocol's own method compares embeddings.
    """

    kinds: tuple[Kind, ...] = KINDS
    head: bool = True
    rows: Mapping[str, str] = dataclasses.field(default_factory=_rows)
    supervised: bool = False
    zero_shot: bool = False
    distances: bool = False
    transductive: bool = False
    networks: tuple[str, ...] | None = None
    network: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    augment: Callable[..., Any] | None = None
    outer: str = "adam"
    train_shots: int = 1
    training: Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]] = dataclasses.field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        for kind in self.kinds:
            check_word("kinds", kind, KINDS)
        check_kind("rows", self.rows, Mapping, 'a dictionary such as {"inductive": "support"}')
        if not self.rows:
            raise ArgumentError("rows", "got none; a report has at least one row")
        if self.transductive and self.rows == _rows():
            object.__setattr__(self, "rows", {"transductive": "batch"})
        if self.transductive and list(self.rows) != ["transductive"]:
            raise ArgumentError(
                "rows",
                f"got {', '.join(map(str, self.rows))}; a transductive method has one row, "
                '{"transductive": "batch"} or with another norm',
            )

    def defaults(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """Return the defaults of the method that replace those of the protocol `base`."""
        return dict(self.training(base) if callable(self.training) else self.training)


def _takes(facts: Callable[Q, Facts]) -> Callable[[Callable[..., Decorator]], Callable[Q, Decorator]]:
    """Give a function of `**facts` the parameters of `facts`, for type checkers and for help."""

    def decorate(function: Callable[..., Decorator]) -> Callable[Q, Decorator]:
        defaults = {
            field.name: field.default_factory()
            for field in dataclasses.fields(Facts)
            if field.default_factory is not dataclasses.MISSING
        }
        signature = inspect.signature(facts)
        parameters = [
            each.replace(default=defaults.get(each.name, each.default))
            for each in signature.parameters.values()
        ]
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=parameters, return_annotation=Decorator
        )
        return function

    return decorate


@_takes(Facts)
def learner(**facts: Any) -> Decorator:
    """Decorate a learner factory with the facts about its method (see `Facts`).

    The decorated factory raises an error with the new name of a keyword argument that was renamed, and its
    learner refuses invalid class slots (see `Batch`).

    Raises:
      ValueError: an unknown fact, or a value that is not allowed.

    Examples:
      >>> @learner(kinds=("regression",), rows={"inductive": "support"})
      ... def my_method(network, *, rate: float = 0.1):
      ...     ...
      >>> facts_of(my_method).kinds
      ('regression',)
    """
    known = [field.name for field in dataclasses.fields(Facts)]
    for name in facts:
        check_word("fact", name, known)
    declared_facts = Facts(**facts)

    def decorate(factory: Callable[P, R]) -> Callable[P, R]:
        checked = _checked(factory, inspect.signature(factory))
        setattr(checked, _FACTS, declared_facts)
        return checked

    return decorate


def _checked(factory: Callable[P, R], signature: inspect.Signature) -> Callable[P, R]:
    """Return `factory` with an error for keyword arguments that are not in `signature`."""
    known = signature.parameters.values()
    keywords = [each.name for each in known if each.kind is each.KEYWORD_ONLY]
    takes_all = any(each.kind is each.VAR_KEYWORD for each in known)

    @functools.wraps(factory)
    def checked(*arguments: Any, **settings: Any) -> Any:
        for name in settings:
            if name in signature.parameters or takes_all:
                continue
            new_name = next((new for new in RENAMED.get(name, ()) if new in keywords), None)
            hint = f"it takes {', '.join(keywords)}" if new_name is None else f"it is called {new_name}"
            raise TypeError(f"{factory.__name__}() has no argument {name!r}; {hint}")
        result = factory(*arguments, **settings)
        return with_slot_checks(normalized(result)) if isinstance(result, Learner) else result

    checked.__signature__ = signature  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]


def facts_of(factory: Callable[..., Any]) -> Facts:
    """Return the facts about a method; a method that declares none has the defaults of `Facts`.

    A factory that forwards to another one has the facts of that one, unless it declares its own.
    """
    if hasattr(factory, _FACTS):
        return getattr(factory, _FACTS)
    parent = parent_of(factory)
    if parent is not None:
        return facts_of(parent)
    # A method that does not choose statistics has one row.
    chooses = "norm" in inspect.signature(factory).parameters
    return Facts() if chooses else Facts(rows={"inductive": "none"})


def forwards(parent: Callable[..., Any], *, without: Iterable[str] = ()) -> Decorator:
    """Decorate a factory that passes keyword arguments on to `parent`.

    In the signature of the decorated factory, its `**settings` are replaced by the keyword-only parameters of
    `parent`, except those in `without` and those that the factory has itself. Settings, defaults and help are
    read from this signature. If the settings are typed as `**settings: Unpack[Settings]`, with a
    `typing.TypedDict`, only the names of that type are added, which editors and type checkers know, too.

    Args:
      parent: factory to which the keyword arguments are passed.
      without: names of keyword-only parameters of `parent` that the factory does not take.

    Raises:
      TypeError: the type of the settings has a name that `parent` does not have or has with another type, or
        that is in `without` or among the factory's own parameters.

    Examples:
      >>> def parent(network, *, rate: float = 0.1, order: str = "second"):
      ...     return rate, order
      >>> @forwards(parent, without=("order",))
      ... def first(network, **settings):
      ...     return parent(network, order="first", **settings)
      >>> print(inspect.signature(first))
      (network, *, rate: float = 0.1)
      >>> first(None, order="second")
      Traceback (most recent call last):
      TypeError: first() has no argument 'order'; it takes rate
    """
    excluded = set(without)

    def decorate(factory: Callable[P, R]) -> Callable[P, R]:
        # Evaluate the annotations, because the parent may be defined in another module.
        declared = inspect.signature(factory, eval_str=True)
        kept = [each for each in declared.parameters.values() if each.kind is not each.VAR_KEYWORD]
        known = inspect.signature(parent, eval_str=True).parameters.values()
        offered = {each.name: each for each in known if each.kind is each.KEYWORD_ONLY}
        names = _typed_settings(factory, declared, parent, offered, excluded)
        if names is None:
            names = offered.keys() - excluded - {each.name for each in kept}
        added = [each for name, each in offered.items() if name in names]
        signature = declared.replace(parameters=[*kept, *added])
        checked = _checked(factory, signature)
        setattr(checked, _PARENT, parent)
        return checked

    return decorate


def _typed_settings(
    factory: Callable[..., Any],
    declared: inspect.Signature,
    parent: Callable[..., Any],
    offered: Mapping[str, inspect.Parameter],
    excluded: Set[str],
) -> Set[str] | None:
    """Return the names in the type of `**settings`, checked against `parent`; None where it is not typed."""
    hints = (each.annotation for each in declared.parameters.values() if each.kind is each.VAR_KEYWORD)
    kinds = [get_args(hint)[0] for hint in hints if get_origin(hint) is Unpack]
    if not kinds:
        return None
    settings = get_type_hints(kinds[0])
    for name, hint in settings.items():
        if name not in offered:
            problem = f"has no keyword-only parameter {name!r}"
        elif hint != offered[name].annotation:
            problem = f"has {name!r} as {offered[name].annotation}, not as {hint}"
        else:
            continue
        raise TypeError(f"{factory.__name__}() takes {kinds[0].__name__}, but {parent.__name__}() {problem}")
    twice = sorted(settings.keys() & (excluded | declared.parameters.keys()))
    if twice:
        raise TypeError(
            f"{factory.__name__}() takes {kinds[0].__name__}, whose {twice[0]!r} is also excluded by "
            "without= or a parameter of its own; remove it from one of the two"
        )
    return settings.keys()


def parent_of(factory: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the factory to which this one forwards, or None."""
    return getattr(factory, _PARENT, None)
