"""Declare what a method is beside its signature: `@learner` and `@forwards`.

The keyword-only parameters of plain type of a learner factory are its settings, and its docstring describes
them. What is no setting, such as the kinds of tasks that it learns, stands in `@learner(...)` on the factory,
where every line has a default that fits an ordinary method. A factory that hands its keyword arguments on to
another says so by `@forwards(other)`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, ParamSpec, Protocol, TypeVar, Unpack, get_args, get_origin, get_type_hints

from jaxmeta.checks import ArgumentError, check_kind, check_word
from jaxmeta.core import Kind, Learner, checks_slots
from jaxmeta.learner_form import normalized

__all__ = ["Facts", "facts_of", "forwards", "learner"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")


class Decorator(Protocol):
    """A decorator that keeps the parameters of what it decorates."""

    def __call__(self, factory: Callable[P, R], /) -> Callable[P, R]:
        """Decorate a function."""


KINDS: tuple[Kind, ...] = get_args(Kind)
_FACTS, _PARENT = "__jaxmeta_facts__", "__jaxmeta_parent__"

# Former names of parameters, each with what it may be called now: the first one that a factory has.
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
    """Facts about a method that are no settings.

    Attributes:
      kinds: of tasks that it learns: "classification", "regression".
      head: whether its network ends in one output for each way; otherwise it is an embedding.
      rows: of a report, each with the `norm` of the learner that it evaluates.
      supervised: whether it trains on mini-batches of all training classes (`jm.tasks.supervised`), not on
        episodes.
      zero_shot: whether it can learn classes from their metadata alone.
      distances: whether its outputs are minus the distances between a query and the classes.
      networks: names of the networks that it works with; None for all.
      network: `(build, tasks) -> arguments`: what the factory is called with first, as a tuple of positional
        arguments and a dictionary of keyword arguments. `build(out)` makes the chosen network with that
        output width, None for an embedding, and `tasks` has the settings of the tasks. None: the network
        alone, with a head by `head`.
      augment: `(key, x) -> x`, what `--distort` hands to the factory as `augment`; None for `distort` of
        `jaxmeta.tasks.distortions`.
      outer: the outer optimizer by default.
      train_shots: support examples in training for each one of the test protocol.
      training: defaults in place of those of the protocol that a run starts from: a dictionary by the names
        of settings, or a function of that protocol's settings, likewise a dictionary, that returns one.
        The function sees four more keys: "kind" of tasks, "tasks" and "network", their names, and
        "made_for_embeddings", whether the protocol's own method compares embeddings.
    """

    kinds: tuple[Kind, ...] = KINDS
    head: bool = True
    rows: Mapping[str, str] = dataclasses.field(default_factory=_rows)
    supervised: bool = False
    zero_shot: bool = False
    distances: bool = False
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

    def defaults(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """Return the method's own defaults in the place of those of a protocol."""
        return dict(self.training(base) if callable(self.training) else self.training)


def _takes(facts: Callable[Q, Facts]) -> Callable[[Callable[..., Decorator]], Callable[Q, Decorator]]:
    """Give a function of `**facts` the parameters of `facts`, for type checkers and for help."""

    def taking(function: Callable[..., Decorator]) -> Callable[Q, Decorator]:
        made = {
            field.name: field.default_factory()
            for field in dataclasses.fields(Facts)
            if field.default_factory is not dataclasses.MISSING
        }
        found = inspect.signature(facts)
        parameters = [
            each.replace(default=made.get(each.name, each.default)) for each in found.parameters.values()
        ]
        function.__signature__ = found.replace(  # type: ignore[attr-defined]
            parameters=parameters, return_annotation=Decorator
        )
        return function

    return taking


@_takes(Facts)
def learner(**facts: Any) -> Decorator:
    """Decorate a learner factory with the facts about its method (see `Facts`).

    The factory then says of a keyword argument that has been renamed what it is called now, and its learner
    refuses class slots that do not exist (see `Batch`).

    Raises:
      ValueError: a fact that there is none of, or a value that it cannot have.

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
    found = Facts(**facts)

    def declared(factory: Callable[P, R]) -> Callable[P, R]:
        checked = _checked(factory, inspect.signature(factory))
        setattr(checked, _FACTS, found)
        return checked

    return declared


def _checked(factory: Callable[P, R], signature: inspect.Signature) -> Callable[P, R]:
    """Return `factory`, which refuses keyword arguments that are not in `signature`."""
    known = signature.parameters.values()
    keywords = [each.name for each in known if each.kind is each.KEYWORD_ONLY]
    takes_all = any(each.kind is each.VAR_KEYWORD for each in known)

    @functools.wraps(factory)
    def checked(*arguments: Any, **settings: Any) -> Any:
        for name in settings:
            if name in signature.parameters or takes_all:
                continue
            now = next((new for new in RENAMED.get(name, ()) if new in keywords), None)
            said = f"it takes {', '.join(keywords)}" if now is None else f"it is called {now}"
            raise TypeError(f"{factory.__name__}() has no argument {name!r}; {said}")
        made = factory(*arguments, **settings)
        return checks_slots(normalized(made)) if isinstance(made, Learner) else made

    checked.__signature__ = signature  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]


def facts_of(factory: Callable[..., Any]) -> Facts:
    """Return the facts about a method, those of an ordinary one where nothing is declared.

    A factory that forwards to another has the facts of that one, unless it declares its own.
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
    """Decorate a factory that hands keyword arguments on to `parent`.

    Its signature then has the keyword-only parameters of `parent` in the place of its `**settings`, save
    those of its own and those `without`; settings, defaults and descriptions are read from there. Where the
    settings are typed, as `**settings: Unpack[Settings]` with a `typing.TypedDict`, it has those of this type
    alone, and editors and type checkers know them too.

    Args:
      parent: what the keyword arguments are handed on to.
      without: names of keyword-only parameters of `parent` that the factory does not take.

    Raises:
      TypeError: the type of the settings has one that `parent` has not, or has of another type.

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
    left_out = set(without)

    def forwarding(factory: Callable[P, R]) -> Callable[P, R]:
        # With annotations as values: those of the parent come from another module.
        own = inspect.signature(factory, eval_str=True)
        mine = [each for each in own.parameters.values() if each.kind is not each.VAR_KEYWORD]
        known = inspect.signature(parent, eval_str=True).parameters.values()
        offered = {each.name: each for each in known if each.kind is each.KEYWORD_ONLY}
        names = _typed_settings(factory, own, parent, offered)
        if names is None:
            names = offered.keys() - left_out - {each.name for each in mine}
        theirs = [each for name, each in offered.items() if name in names]
        signature = own.replace(parameters=[*mine, *theirs])
        checked = _checked(factory, signature)
        setattr(checked, _PARENT, parent)
        return checked

    return forwarding


def _typed_settings(
    factory: Callable[..., Any],
    own: inspect.Signature,
    parent: Callable[..., Any],
    offered: Mapping[str, inspect.Parameter],
) -> Set[str] | None:
    """Return the names in the type of `**settings`, after a comparison with `parent`; None where untyped."""
    hints = (each.annotation for each in own.parameters.values() if each.kind is each.VAR_KEYWORD)
    kinds = [get_args(hint)[0] for hint in hints if get_origin(hint) is Unpack]
    if not kinds:
        return None
    found = get_type_hints(kinds[0])
    for name, hint in found.items():
        if name not in offered:
            problem = f"has no keyword-only parameter {name!r}"
        elif hint != offered[name].annotation:
            problem = f"has {name!r} as {offered[name].annotation}, not as {hint}"
        else:
            continue
        raise TypeError(f"{factory.__name__}() takes {kinds[0].__name__}, but {parent.__name__}() {problem}")
    return found.keys()


def parent_of(factory: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the factory that this one forwards to; None where it forwards to none."""
    return getattr(factory, _PARENT, None)
