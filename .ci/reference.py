"""Build the reference from the docstrings: `python .ci/reference.py FOLDER`. A warning is an error.

pdoc prints annotations as their values, in which `Key` is a union of three subscripted types, and defaults as
their `repr`. Here it prints both as the source has them, and leaves out what a reader has no use for.
"""

import ast
import builtins
import inspect
import re
import sys
import types
import typing
import warnings
from pathlib import Path

import pdoc
import pdoc.doc
import pdoc.doc_ast
import pdoc.render_helpers
from flax import linen

import jaxmeta
from jaxmeta.declare import parent_of

# The function `jaxmeta.nn.conv` hides the module of the same name, which gets no page.
PAGES = ("jaxmeta", r"!jaxmeta\.\w+\.", "jaxmeta.declare")


class Source(str):
    """Source text, as the value of an annotation or of a default; it is printed as it is."""

    __repr__ = str.__str__


def public_names():
    """Return the public name of each public class and function, by its identity."""
    modules = [getattr(jaxmeta, name) for name in jaxmeta.__all__]
    modules = [module for module in modules if isinstance(module, types.ModuleType)]
    names = {}
    for module in [*modules, jaxmeta]:
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            if getattr(value, "__module__", "").startswith("jaxmeta"):
                names[id(value)] = f"{module.__name__}.{name}"
    return names


class Qualified(ast.NodeTransformer):
    """Give public classes and functions their full names, from which pdoc makes links; spell out choices."""

    def __init__(self, scope):
        self.scope = scope

    def _named(self, node):
        try:
            value = eval(ast.unparse(node), dict(self.scope))
        except (NameError, AttributeError):
            return node
        if typing.get_origin(value) is typing.Literal:
            return ast.parse(repr(value).removeprefix("typing."), mode="eval").body
        return ast.Name(PUBLIC[id(value)]) if id(value) in PUBLIC else node

    visit_Name = visit_Attribute = _named


def source(node, scope):
    """Return the text of an expression; quotes around a type are removed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in scope:
        node = ast.Name(node.value)
    return Source(ast.unparse(Qualified(scope).visit(node)))


def of_function(function):
    """Return `{parameter or "return": (annotation, default)}` of a function, as nodes with their scope."""
    parent = parent_of(function)
    parts = of_function(parent) if parent else {}
    function = inspect.unwrap(function)
    node, scope = pdoc.doc_ast.parse(function), getattr(function, "__globals__", {})
    arguments = node.args
    if not hasattr(arguments, "args"):  # a generated constructor has no source
        return {}
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    pairs = [*zip(positional, defaults, strict=True)]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    pairs += [(each, None) for each in (arguments.vararg, arguments.kwarg) if each]
    parts |= {each.arg: (each.annotation, default, scope) for each, default in pairs}
    return parts | {"return": (node.returns, None, scope)}


def of_class(owner):
    """Return the same for the fields of a class, which are the parameters of its generated constructor."""
    parts = {}
    for each in reversed(owner.__mro__):
        scope = vars(sys.modules.get(each.__module__, builtins))
        for node in pdoc.doc_ast.parse(each).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                # `dataclasses.field(…)` describes a default and is not one.
                called = isinstance(node.value, ast.Call) and ast.unparse(node.value.func)
                default = None if called and called.endswith("field") else node.value
                parts[node.target.id] = (node.annotation, default, scope)
    return parts


def signature(documented):
    """Return the signature of a function or constructor, annotations and defaults as in the source."""
    function = getattr(documented.wrapped, "__func__", documented.wrapped)  # of a class method
    parts = of_function(function)
    left_out = set()
    if documented.name == "__init__":
        owner = vars(sys.modules[documented.modulename])[documented.qualname.partition(".")[0]]
        parts = parts or of_class(owner)
        if issubclass(owner, linen.Module):
            left_out = {"parent", "name"}
    shown = inspect.signature(function)
    parameters = []
    for name, parameter in shown.parameters.items():
        annotation, default, scope = parts.get(name, (None, None, {}))
        if annotation is not None:
            parameter = parameter.replace(annotation=source(annotation, scope))
        if default is not None and parameter.default is not parameter.empty:
            parameter = parameter.replace(default=source(default, scope))
        if name not in left_out:
            parameters.append(parameter)
    returns, _, scope = parts.get("return", (None, None, {}))
    if returns is None or documented.name == "__init__":
        returned = inspect.Signature.empty
    else:
        returned = source(returns, scope)
    return pdoc.doc._PrettySignature(parameters, return_annotation=returned)


def as_jaxmeta(function):
    """Have pdoc find `jm.maml` as `jaxmeta.maml`."""

    def full(argument):
        return re.sub(r"^jm\.", "jaxmeta.", argument) if isinstance(argument, str) else argument

    return lambda *arguments: function(*map(full, arguments))


def without_fields(own_members):
    """Leave out the fields of classes: their signatures have them, and "Attributes:" describes them."""
    return lambda documented: [each for each in own_members(documented) if each.kind != "variable"]


def without_boilerplate(docstring):
    """Leave out the docstring that Python gives to the constructor of a named tuple."""

    def text(documented):
        content = docstring(documented)
        return "" if content.startswith("Create new instance of") else content

    return text


if __name__ == "__main__":
    warnings.simplefilter("error")
    for name in jaxmeta.__all__:  # those that `__getattr__` imports, too
        setattr(jaxmeta, name, getattr(jaxmeta, name))
    PUBLIC = public_names()
    pdoc.doc.Function.signature = property(signature)
    pdoc.doc.Function.decorators = property(lambda documented: [])
    pdoc.doc.Class._var_annotations = property(lambda documented: {})
    pdoc.doc.Class.own_members = property(without_fields(pdoc.doc.Class.own_members.func))
    pdoc.doc.Function.docstring = property(without_boilerplate(pdoc.doc.Function.docstring.func))
    pdoc.render_helpers.possible_sources = as_jaxmeta(pdoc.render_helpers.possible_sources)
    pdoc.render_helpers.module_candidates = as_jaxmeta(pdoc.render_helpers.module_candidates)
    pdoc.render.configure(docformat="google", math=True, show_source=False)
    pdoc.pdoc(*PAGES, output_directory=Path(sys.argv[1]))
