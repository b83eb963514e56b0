"""Pieces of JSON schemas, in the form and the order of keys that Cog gives them."""

from typing import Any

# The schemas of the types that inputs may have.
KINDS = {
    "bool": {"type": "boolean"},
    "float": {"type": "number"},
    "int": {"type": "integer"},
    "Path": {"format": "uri", "type": "string"},
    "str": {"type": "string"},
}
TEXT, OBJECT, TIME = KINDS["str"], {"type": "object"}, {"format": "date-time", "type": "string"}


def title(name: str) -> str:
    return " ".join(word[:1].upper() + word[1:] for word in name.split("_"))


def in_order(schema: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(schema.items()))


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def component(name: str, properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"properties": properties, **more, "title": name, "type": "object"}


def enumerated(name: str, values: list[Any], kind: dict[str, Any]) -> dict[str, Any]:
    return {"description": "An enumeration.", "enum": values, "title": name, **kind}


def titled(**kinds: dict[str, Any]) -> dict[str, Any]:
    return {name: in_order({**kind, "title": title(name)}) for name, kind in kinds.items()}
