"""Mutants of Python sources: the syntax tree, with alternatives behind the switch."""

import ast
import builtins
import copy
from collections.abc import Iterator

from .mutant import Choose, next_digit

PAIRS = ((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn), (ast.Is, ast.IsNot))
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {**dict(PAIRS), **{other: one for one, other in PAIRS}}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
SWITCH = ast.parse("from reference.mutants.switch import mutated as _mutated").body[0]


def variants(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Yields what an expression becomes, with the operator that made it so."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and (other := COMPARISONS.get(type(node.ops[0]))):
        yield "comparison", ast.Compare(node.left, [other()], node.comparators)
    elif isinstance(node, ast.BinOp) and (op := ARITHMETIC.get(type(node.op))):
        yield "arithmetic", ast.BinOp(node.left, op(), node.right)
        if isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
            yield "term dropped", node.left
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield "sign" if isinstance(node.op, ast.USub) else "not dropped", node.operand
    elif isinstance(node, ast.BoolOp):
        yield "and, or", ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    elif isinstance(node, ast.Constant):
        yield from constants(node)
    elif isinstance(node, ast.Call):
        yield from calls(node)
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2:
        yield "index swapped", ast.Subscript(node.value, ast.Tuple(node.slice.elts[::-1], ast.Load()), ast.Load())


def constants(node: ast.Constant) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node.value, bool):
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield "constant", ast.Constant(node.value + 1)
    elif isinstance(node.value, float) and (after := next_digit(repr(node.value))):
        yield "constant", ast.Constant(float(after))


def calls(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if isinstance(node.func, ast.Attribute) and name in ("cast", "to", "float", "clone", "contiguous"):
        yield "cast left out", node.func.value
    if name in ("min", "max"):
        func = copy.deepcopy(node.func)
        setattr(func, "attr" if isinstance(func, ast.Attribute) else "id", "max" if name == "min" else "min")
        yield "min, max", ast.Call(func, node.args, node.keywords)
    plain = ast.Name | ast.Attribute | ast.Subscript
    if name != "isinstance" and len(node.args) >= 2 and all(isinstance(arg, plain) for arg in node.args[:2]):
        first, second, *rest = node.args
        if ast.dump(first) != ast.dump(second):
            yield "arguments swapped", ast.Call(node.func, [second, first, *rest], node.keywords)


class Instrumented(ast.NodeTransformer):
    """Puts chosen mutants of a file behind the switch. What is refused, said or only typed stays as it is."""

    def __init__(self, file: str, choose: Choose):
        self.file = file
        self.choose = choose

    def number(self, node: ast.AST, operator: str, after: str) -> int | None:
        return self.choose(self.file, node.lineno, operator, ast.unparse(node), after)  # type: ignore[attr-defined]

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.expr) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            return self.expression(node)
        return super().visit(node)

    def expression(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.JoinedStr) or is_type(node):
            return node
        before = copy.deepcopy(node)
        result = super().visit(node)
        for operator, after in variants(before):
            if number := self.number(before, operator, ast.unparse(after)):
                result = ast.IfExp(asked(number), copy.deepcopy(after), result)
        return result

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if not isinstance(node.value, ast.Call):
            return node
        before = copy.deepcopy(node)
        self.generic_visit(node)
        number = self.number(before, "call skipped", "pass")
        return ast.If(ast.UnaryOp(ast.Not(), asked(number)), [node], []) if number else node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        before = copy.deepcopy(node)
        node.value = self.expression(node.value)
        if op := ARITHMETIC.get(type(node.op)):
            after = ast.AugAssign(before.target, op(), before.value)
            if number := self.number(before, "arithmetic", ast.unparse(after)):
                return ast.If(asked(number), [after], [node])
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        if all(isinstance(statement, ast.Raise) for statement in node.body):
            return node
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.AST) -> ast.AST:
        return node

    visit_Assert = visit_MatchValue = visit_Raise

    def visit_body(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        """Visits neither decorators nor defaults."""
        node.body = [self.visit(statement) for statement in node.body]  # type: ignore[misc]

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value:
            node.value = self.expression(node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if node.name in ("__repr__", "__str__"):
            return node
        self.visit_body(node)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.visit_body(node)
        return node


def is_type(node: ast.expr) -> bool:
    """Tells whether an expression is of a type with parameters, like `dict[str, Tensor]`."""
    name = node.value.id if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) else ""
    return name[:1].isupper() or isinstance(getattr(builtins, name, None), type)


def asked(number: int) -> ast.expr:
    return ast.Call(ast.Name("_mutated", ast.Load()), [ast.Constant(number)], [])


def instrumented(text: str, file: str, choose: Choose) -> str:
    """Returns a source with the mutants that `choose` numbers behind the switch; without one as it was."""
    tree = ast.parse(text)
    before = ast.dump(tree)
    changed = Instrumented(file, choose).visit(tree)
    if ast.dump(changed) == before:
        return text
    first = 1 if ast.get_docstring(tree) else 0
    tree.body.insert(first, SWITCH)
    return ast.unparse(ast.fix_missing_locations(tree))
