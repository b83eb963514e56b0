"""Reads what a predictor and a training take and return from their source, as Cog's own generator does.

It parses the source and imports or runs nothing. Cog's generator silently drops or garbles some inputs (a bound that is not a
literal, a description in two pieces, a default from another file); this one refuses them with a sentence.
"""

import ast
import contextlib
from typing import Any, NoReturn

from scripts.schemas import KINDS, component, enumerated, in_order, ref, title, titled

RENAMED = {
    "ge": "minimum",
    "le": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "regex": "pattern",
}
LARGEST_INTEGER = 2**63 - 1


class SchemaError(ValueError):
    """Cog's generator would refuse the predictor, or read it wrongly."""


class Signatures:
    """Reads the signatures of a file's functions: what they take, and what they return.

    Args:
        source: the text of the file, in which ``Input`` and ``Path`` are Cog's.

    Raises:
        SyntaxError: the source is not Python. All methods raise a SchemaError if Cog would refuse the file, or leave out part of
            it.
    """

    def __init__(self, source: str) -> None:
        # Columns of a syntax tree count bytes.
        self.lines = source.encode().splitlines(keepends=True)
        self.module = ast.parse(source)
        self.constants: dict[str, Any] = {}
        for statement in self.module.body:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
            if isinstance(target, ast.Name) and statement.value is not None and self.is_bare(statement):
                with contextlib.suppress(SchemaError):
                    self.constants[target.id] = self.literal(statement.value)

    def prediction(self, runner: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The inputs of a class's method ``run``, what it returns, and the enumerations of the inputs' choices."""
        method = self.find_run(runner)
        inputs, enums = self.inputs(method, method.args.args[1:], "Input")
        if method.returns is None:
            self.refuse(method, "run() has no return type")
        output, nullable = self.kind(method.returns)
        if nullable:
            self.refuse(method.returns, "what run() returns may not be None")
        return inputs, in_order({**output, "title": "Output"}), enums

    def training(self, function: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The inputs of a function, the object that it returns, and the enumerations of the inputs' choices."""
        found = [node for node in self.module.body if isinstance(node, ast.FunctionDef) and node.name == function]
        if not found:
            raise SchemaError(f"There is no function {function}.")
        inputs, enums = self.inputs(found[0], found[0].args.args, "TrainingInput")
        return inputs, self.model(found[0]), enums

    def model(self, function: ast.FunctionDef) -> dict[str, Any]:
        """The schema of the `BaseModel` that a function returns."""
        name = function.returns.id if isinstance(function.returns, ast.Name) else ""
        for node in self.module.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
                kinds = {one.target.id: self.kind(one.annotation)[0] for one in fields}
                return component("TrainingOutput", titled(**kinds), required=list(kinds))
        return self.refuse(function, f"{function.name}() returns no BaseModel of this file")

    def inputs(
        self, function: ast.FunctionDef, parameters: list[ast.arg], heading: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The schema of a function's inputs, and the enumerations of their choices."""
        arguments = function.args
        if arguments.posonlyargs or arguments.vararg or arguments.kwonlyargs or arguments.kwarg:
            self.refuse(function, f"{function.name}() takes self and plain parameters only")
        missing = len(parameters) - len(arguments.defaults)
        properties, enums, required = {}, {}, []
        for order, parameter in enumerate(parameters):
            default = arguments.defaults[order - missing] if order >= missing else None
            field, choices = self.field(parameter, default)
            if "default" not in field and "nullable" not in field:
                required.append(parameter.arg)
            if choices is not None:
                enums[parameter.arg] = choices
            properties[parameter.arg] = in_order({**field, "x-order": order})
        needed = {"required": required} if required else {}
        return {"properties": properties, **needed, "title": heading, "type": "object"}, enums

    def find_run(self, runner: str) -> ast.FunctionDef:
        for node in self.module.body:
            if isinstance(node, ast.ClassDef) and node.name == runner:
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and method.name == "run":
                        return method
        raise SchemaError(f"There is no class {runner} with a method run.")

    def field(self, parameter: ast.arg, default: ast.expr | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The schema of one input, and the enumeration of its choices if it has some."""
        name = parameter.arg
        if parameter.annotation is None:
            self.refuse(parameter, f"{name} has no type")
        kind, nullable = self.kind(parameter.annotation)
        field: dict[str, Any] = {"title": title(name), **kind, **({"nullable": True} if nullable else {})}
        enumeration = None
        if isinstance(default, ast.Call) and ast.unparse(default.func) == "Input":
            if default.args:
                self.refuse(default, f"{name}: in Input(), Cog reads only what is written as name=value")
            for keyword in default.keywords:
                if keyword.arg is None or not self.is_bare(keyword):
                    self.refuse(default, f"{name}: an argument of Input() is one value without brackets around it")
                if keyword.arg == "choices":
                    enumeration = self.enumeration(name, kind, keyword.value)
                else:
                    field |= self.property(name, keyword)
        elif default is not None:
            field["default"] = number(self.value(default))
        if enumeration is not None:
            field = {key: value for key, value in field.items() if key not in {"title", *kind}}
            field["allOf"] = [ref(name)]
        if "default" in field:
            self.check_default(parameter, field, enumeration)
        return field, enumeration

    def property(self, name: str, keyword: ast.keyword) -> dict[str, Any]:
        """The part of an input's schema that one argument of Input() becomes."""
        key, node = keyword.arg, keyword.value
        if key == "default":
            return {"default": number(self.value(node))}
        if key == "description":
            value, wanted = self.value(node), str
        elif key in ("ge", "le"):
            value, wanted = self.bound(node), (int, float)
        elif key in ("min_length", "max_length"):
            value, wanted = self.bound(node), int
        elif key in ("regex", "deprecated"):
            value, wanted = self.literal(node), str if key == "regex" else bool
        else:
            self.refuse(node, f"{name}: Input() has no {key}= here")
        if not isinstance(value, wanted):
            self.refuse(node, f"{name}: {key}={value!r} is of the wrong kind")
        return {} if value is False else {RENAMED.get(key, key): number(value)}

    def enumeration(self, name: str, kind: dict[str, Any], node: ast.expr) -> dict[str, Any]:
        if kind not in (KINDS["str"], KINDS["int"]):
            self.refuse(node, f"{name}: only str and int have choices")
        choices = self.choices(node)
        if not choices:
            self.refuse(node, f"{name} has no choices")
        return enumerated(name, choices, kind)

    def choices(self, node: ast.expr) -> list[Any]:
        """A list, a constant that is a list or a tuple, list(CONSTANT.keys()), or a sum of them."""
        match node:
            case ast.List():
                return self.literal(node)
            case ast.Name(id=name) if isinstance(self.constants.get(name), list):
                return self.constants[name]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self.choices(left) + self.choices(right)
            case ast.Call(
                func=ast.Name(id="list"),
                args=[ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="keys"), args=[], keywords=[])],
                keywords=[],
            ) if isinstance(self.constants.get(name), dict):
                return list(self.constants[name])
        return self.refuse(node, "choices are a list, a constant list of this file, or list(CONSTANT.keys())")

    def check_default(self, node: ast.arg, field: dict[str, Any], enumeration: dict[str, Any] | None) -> None:
        name, default = node.arg, field["default"]
        if default is None:
            if "nullable" not in field:
                self.refuse(node, f"{name} has the default None and would be required: its type must be ... | None")
            return
        if enumeration is not None and default not in enumeration["enum"]:
            self.refuse(node, f"{name} has the default {default!r}, which is none of its choices")
        low, high = field.get("minimum", default), field.get("maximum", default)
        if isinstance(default, int | float) and not low <= default <= high:
            self.refuse(node, f"{name} has the default {default!r}, which is out of its range")

    def kind(self, node: ast.expr) -> tuple[dict[str, Any], bool]:
        """The schema of a type, and whether it may be None."""
        match node:
            case ast.Name(id=name) if name in KINDS:
                return KINDS[name], False
            case ast.Subscript(value=ast.Name(id="list"), slice=inner):
                items, nullable = self.kind(inner)
                if not nullable:
                    return {"items": items, "type": "array"}, False
            case ast.BinOp(left=inner, op=ast.BitOr(), right=ast.Constant(value=None)):
                return self.kind(inner)[0], True
            case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
                return self.kind(inner)[0], True
        return self.refuse(
            node, f"{ast.unparse(node)} is none of the types {', '.join(KINDS)}, a list of one, or one of them | None"
        )

    def value(self, node: ast.expr) -> Any:
        """A literal, or the constant of this file that a name stands for."""
        if isinstance(node, ast.Name) and node.id in self.constants:
            return self.constants[node.id]
        return self.literal(node)

    def literal(self, node: ast.expr) -> Any:
        """The value of a literal; tuples become lists."""
        match node:
            case ast.Constant(value=None | bool() | float()):
                return node.value
            case ast.Constant(value=int()) if node.value <= LARGEST_INTEGER:
                return node.value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.Constant(value=str()):
                self.check_plain(node)
                return node.value
            case ast.List() | ast.Tuple():
                return [self.literal(element) for element in node.elts]
            case ast.Dict() if None not in node.keys:
                return {self.literal(k): self.literal(v) for k, v in zip(node.keys, node.values, strict=True)}
        return self.refuse(node, f"{ast.unparse(node)} is neither a literal nor a constant of this file")

    def bound(self, node: ast.expr) -> int | float:
        value, text = self.literal(node), self.text(node)
        try:
            float(text)  # as Cog reads it; refuses 0xFF and - 1
        except ValueError:
            self.refuse(node, f"{text}: write a bound as one decimal number")
        return value

    def check_plain(self, node: ast.Constant) -> None:
        """Refuse a text literal with a prefix, escapes or triple quotes: Cog takes all between first and last quote."""
        text = self.text(node)
        if text[1:-1] != node.value:
            self.refuse(node, f"{text}: write a text as one literal without prefix or escapes")

    def is_bare(self, assignment: ast.stmt | ast.keyword) -> bool:
        """Whether the assigned value has no brackets around it: Cog's generator does not read values in brackets."""
        return self.text(assignment).partition("=")[2].strip() == self.text(assignment.value)

    def text(self, node: ast.expr | ast.stmt | ast.keyword) -> str:
        """The source of a node. `ast.get_source_segment` splits the whole source for each: 0.4 s for predict.py's inputs."""
        lines = self.lines[node.lineno - 1 : node.end_lineno]
        lines[-1] = lines[-1][: node.end_col_offset]
        lines[0] = lines[0][node.col_offset :]
        return b"".join(lines).decode()

    def refuse(self, node: ast.AST, sentence: str) -> NoReturn:
        raise SchemaError(f"Line {node.lineno}: {sentence}.")


def number(value: Any) -> Any:
    """Whole floats as ints, also in lists: Cog's document has 4 for 4.0."""
    if isinstance(value, list):
        return [number(element) for element in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
