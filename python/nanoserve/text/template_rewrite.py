"""Checks a chat template's syntax tree and routes everything whose cost depends on data through a meter.

A meter is a filter whose name no template can spell in a filter expression (it begins with NUL). One reached through map()
only costs.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer

from nanoserve.text.template_budget import MAX_INT_BITS

COUNTED, SHALLOW, DEEP, CONCAT, STATIC = "\0counted", "\0shallow", "\0deep", "\0concat", "\0static"

_STATEMENTS = (
    nodes.Template, nodes.Output, nodes.If, nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.With,
    nodes.Assign, nodes.AssignBlock, nodes.Break, nodes.Continue, nodes.Scope,
)  # fmt: skip
_NAMES_REFUSED = ("lipsum", "cycler", "joiner", "self", "varargs", "kwargs")


MAX_NODES = 50_000


class TemplateRefused(ValueError):
    """The template uses what the sandbox does not have."""


class GenerationTag(Extension):
    """{% generation %}...{% endgeneration %} marks the assistant's text for training: here just its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def check(tree: nodes.Template, environment: Environment) -> None:
    """Refuses, naming the line, what the environment does not have: at load time, not in the middle of a chat."""
    for count, node in enumerate(tree.find_all(nodes.Node)):
        if count > MAX_NODES:
            raise TemplateRefused(f"more than {MAX_NODES} syntax nodes")
        where = f"line {node.lineno}: "
        if isinstance(node, nodes.Stmt) and not isinstance(node, _STATEMENTS):
            raise TemplateRefused(f"{where}statement {type(node).__name__.lower()} is not supported")
        if isinstance(node, nodes.Filter) and node.name not in environment.filters:
            raise TemplateRefused(f"{where}filter {node.name!r} is not supported")
        if isinstance(node, nodes.Test) and node.name not in environment.tests:
            raise TemplateRefused(f"{where}test {node.name!r} is not supported")
        if (
            isinstance(node, nodes.Const)
            and isinstance(node.value, int)
            and node.value.bit_length() > MAX_INT_BITS
        ):
            raise TemplateRefused(f"{where}a number of more than {MAX_INT_BITS} bits is not supported")
        if isinstance(node, nodes.Name) and node.ctx == "load" and node.name in _NAMES_REFUSED:
            raise TemplateRefused(f"{where}{node.name!r} is not supported")


def with_meters(tree: nodes.Template, environment: Environment) -> nodes.Template:
    """The same template, metered."""
    metered: nodes.Template = _Meters().visit(tree)
    metered.set_environment(environment)
    return metered


class _Meters(NodeTransformer):
    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        node = super().generic_visit(node, *args, **kwargs)  # the children first
        if isinstance(node, nodes.For):
            node.iter = _through(COUNTED, node.iter)
            if node.recursive:  # loop(items) does not pass through `iter`
                node.body.insert(0, _charge_static(node, 0))
        elif isinstance(node, nodes.Output):
            texts = [part.data for part in node.nodes if isinstance(part, nodes.TemplateData)]
            return [_charge_static(node, sum(map(len, texts))), node]
        elif isinstance(node, nodes.Concat):
            return _through(CONCAT, nodes.List(node.nodes, lineno=node.lineno))
        elif isinstance(node, nodes.Compare):
            node.expr = _through(DEEP, node.expr)
            for operand in node.ops:
                operand.expr = _through(DEEP, operand.expr)
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            return _through(SHALLOW, node)
        elif isinstance(node, nodes.List | nodes.Dict) or (
            isinstance(node, nodes.Tuple) and node.ctx == "load"
        ):
            return _through(DEEP, node)
        return node


def _through(meter: str, node: nodes.Node) -> nodes.Expr:
    constant = isinstance(node, nodes.Const) or (
        isinstance(node, nodes.List | nodes.Tuple)
        and all(isinstance(item, nodes.Const) for item in node.items)
    )
    if constant and meter in (DEEP, SHALLOW):
        assert isinstance(node, nodes.Expr)
        return node  # the template's size bounds it
    return nodes.Filter(node, meter, [], [], None, None, lineno=node.lineno)


def _charge_static(node: nodes.Node, chars: int) -> nodes.Stmt:
    return nodes.ExprStmt(_through(STATIC, nodes.Const(chars, lineno=node.lineno)), lineno=node.lineno)
