"""Our reading of a predictor's source against what Cog itself made of one, and against what it gets wrong."""

import inspect
import json
import textwrap
import typing
from pathlib import Path
from typing import Any

import pytest
from cog import Path as CogPath

from predict import Predictor
from scripts.openapi import add_training, make_schema
from scripts.signatures import SchemaError
from train import train

ROOT = Path(__file__).parent.parent
INPUTS = {name: one for name, one in inspect.signature(Predictor.run).parameters.items() if name != "self"}
COGS = ROOT / "tests" / "fixtures" / "cog-schema"


def make(parameters: str, constants: str = "", returns: str = " -> str") -> dict[str, Any]:
    """The schemas of a predictor with these parameters."""
    source = f"{constants}\n\nclass Predictor(BaseRunner):\n    def run(self, {parameters}){returns}:\n        pass\n"
    return make_schema(source)["components"]["schemas"]


def field(declaration: str, constants: str = "") -> dict[str, Any]:
    """What is said of the input ``x``, less its title and its place."""
    schemas = make(f"x: {declaration}", constants)
    said = schemas["Input"]["properties"]["x"]
    assert said.pop("x-order") == 0
    assert said.pop("title", "X") == "X"
    return said


def test_the_document_is_cog_s_own() -> None:
    """To the order of its keys: it is compared as text."""
    made = make_schema((COGS / "predict.py").read_text())
    assert json.dumps(made) == json.dumps(json.loads((COGS / "openapi.json").read_text()))


def test_what_is_read_of_predict_py_is_what_python_makes_of_it() -> None:
    schemas = make_schema((ROOT / "predict.py").read_text())["components"]["schemas"]
    properties = schemas["Input"]["properties"]
    assert "required" not in schemas["Input"]
    assert list(properties) == list(INPUTS)
    kinds = {str: "string", int: "integer", float: "number", bool: "boolean", CogPath: "string"}
    kinds |= dict.fromkeys((list[CogPath], list[str], list[int], list[float]), "array")
    for order, (name, said) in enumerate(properties.items()):
        parameter, declared = INPUTS[name], INPUTS[name].default
        kind, *rest = typing.get_args(parameter.annotation) or [parameter.annotation]
        assert said["x-order"] == order
        assert said["description"] == declared.description
        assert said["default"] == declared.default
        assert said.get("nullable", False) == bool(rest)
        assert (said.get("minimum"), said.get("maximum")) == (declared.ge, declared.le)
        choices = schemas[name] if "allOf" in said else said
        assert choices["type"] == kinds[kind]
        assert choices.get("enum") == declared.choices
    assert schemas["Output"] == {"items": {"format": "uri", "type": "string"}, "title": "Output", "type": "array"}


@pytest.mark.parametrize(
    ("declaration", "said"),
    [
        ("int", {"type": "integer"}),
        ("int = 3", {"type": "integer", "default": 3}),
        ("int = Input(default=-1)", {"type": "integer", "default": -1}),
        ("int = Input(default=1_000)", {"type": "integer", "default": 1000}),
        ("int = Input(default=0x10)", {"type": "integer", "default": 16}),
        ("int = Input(default=N)", {"type": "integer", "default": 7}),
        ("int = Input(le=4_294_967_295, ge=-1)", {"type": "integer", "minimum": -1, "maximum": 4294967295}),
        (
            "float = Input(default=1.5, ge=.5, le=1e3)",
            {"type": "number", "default": 1.5, "minimum": 0.5, "maximum": 1000},
        ),
        ("bool = Input(default=False)", {"type": "boolean", "default": False}),
        ("str = Input(default='')", {"type": "string", "default": ""}),
        ("str = Input(description=TEXT)", {"type": "string", "description": "words"}),
        ("str = Input(deprecated=False)", {"type": "string"}),
        ("str = Input(deprecated=True)", {"type": "string", "deprecated": True}),
        ("int | None = None", {"type": "integer", "nullable": True, "default": None}),
        ("Optional[Path]", {"type": "string", "format": "uri", "nullable": True}),
        ("list[int] = Input(default=[1, 2])", {"type": "array", "items": {"type": "integer"}, "default": [1, 2]}),
    ],
)
def test_what_is_said_of_an_input(declaration: str, said: dict[str, Any]) -> None:
    assert field(declaration, "N = 7\nTEXT: str = 'words'") == said


@pytest.mark.parametrize(
    ("expression", "choices"),
    [
        ("['a', 'b']", ["a", "b"]),
        ("LIST", ["c", "d"]),
        ("TUPLE", ["e", "f"]),
        ("list(DICT.keys())", ["g", "h"]),
        ("list(DICT.keys()) + ['custom'] + LIST", ["g", "h", "custom", "c", "d"]),
    ],
)
def test_choices(expression: str, choices: list[str]) -> None:
    constants = "LIST = ['c', 'd']\nTUPLE = ('e', 'f')\nDICT = {'g': 1, 'h': (2, 3)}"
    schemas = make(f"x: str = Input(choices={expression}, default={choices[-1]!r})", constants)
    assert schemas["x"] == {"description": "An enumeration.", "enum": choices, "title": "x", "type": "string"}
    assert schemas["Input"]["properties"]["x"]["allOf"] == [{"$ref": "#/components/schemas/x"}]


def test_required_inputs_are_those_without_a_default() -> None:
    schemas = make("a: str, b: int | None, c: str = Input(), d: str = '', e: Path = Input(description='E')")
    assert schemas["Input"]["required"] == ["a", "c", "e"]


CONSTANTS = """\
from elsewhere import IMPORTED, Inputs
LIMIT = 5
NAMES = ['a']
TABLE = {'ddpm': Scheduler}
BRACKETED = (2)
"""


@pytest.mark.parametrize(
    ("declaration", "sentence"),
    [
        # Would become required.
        ("int = Input(default=None)", "x has the default None and would be required: its type must be ... | None"),
        ("int = Input(default=IMPORTED)", "IMPORTED is neither a literal nor a constant of this file"),
        ("int = Input(default=LIMIT * 2)", "LIMIT * 2 is neither a literal nor a constant of this file"),
        ("int = Input(default=BRACKETED)", "BRACKETED is neither a literal nor a constant of this file"),
        ("int = Input(default=(3))", "x: an argument of Input() is one value without brackets around it"),
        ("int = Input(default=99999999999999999999)", "99999999999999999999 is neither a literal nor"),
        ("int = Input(3)", "x: in Input(), Cog reads only what is written as name=value"),
        ("int = Input(**LIMITS)", "x: an argument of Input() is one value"),
        # Would have no bounds.
        ("int = Input(ge=LIMIT)", "LIMIT is neither a literal nor a constant of this file"),
        ("int = Input(le=2**32 - 1)", "2 ** 32 - 1 is neither a literal nor a constant of this file"),
        ("int = Input(le=0xFF)", "0xFF: write a bound as one decimal number"),
        ("int = Input(le=0o17)", "0o17: write a bound as one decimal number"),
        ("int = Input(ge=True)", "True: write a bound as one decimal number"),
        ("str = Input(min_length=1.5)", "x: min_length=1.5 is of the wrong kind"),
        # Would have another description, or none.
        ('str = Input(description="a" "b")', '"a" "b": write a text as one literal without prefix or escapes'),
        ('str = Input(description=("a" "b"))', "x: an argument of Input() is one value without brackets around it"),
        ('str = Input(description="a\\n")', "write a text as one literal without prefix or escapes"),
        ("str = Input(description='''a''')", "write a text as one literal without prefix or escapes"),
        ('str = Input(description=f"{LIMIT}")', "is neither a literal nor a constant of this file"),
        ("str = Input(description=5)", "x: description=5 is of the wrong kind"),
        # Would have no choices, or make the build fail.
        ("str = Input(choices=('a', 'b'))", "choices are a list, a constant list of this file, or"),
        ("str = Input(choices=[])", "x has no choices"),
        ("str = Input(choices=sorted(NAMES))", "choices are a list, a constant list of this file, or"),
        ("str = Input(choices=[n for n in NAMES])", "choices are a list, a constant list of this file, or"),
        ("str = Input(choices=NAMES.keys())", "choices are a list, a constant list of this file, or"),
        ("str = Input(choices=list(NAMES))", "choices are a list, a constant list of this file, or"),
        ("str = Input(choices=IMPORTED)", "choices are a list, a constant list of this file, or"),
        ("str = Input(choices=list(TABLE.keys()))", "choices are a list, a constant list of this file, or"),
        ("float = Input(choices=[1.5])", "x: only str and int have choices"),
        # Would be a document that contradicts itself.
        ("int = Input(default=9, le=5)", "x has the default 9, which is out of its range"),
        ("str = Input(default='b', choices=NAMES)", "x has the default 'b', which is none of its choices"),
        # Types that there are not, or that are not read.
        ("Literal['a'] = 'a'", "Literal['a'] is none of the types bool, float, int, Path, str, a list of one, or"),
        ("Kind = 'a'", "Kind is none of the types"),
        ("int | str = 1", "int | str is none of the types"),
        ("list[int | None] = Input(default=[])", "list[int | None] is none of the types"),
        # The rest.
        ("int = Input(default_factory=int)", "x: Input() has no default_factory= here"),
        ("int = Inputs.steps", "Inputs.steps is neither a literal nor a constant of this file"),
        ("int = make_input()", "make_input() is neither a literal nor a constant of this file"),
    ],
)
def test_what_cog_drops_or_garbles_is_refused(declaration: str, sentence: str) -> None:
    with pytest.raises(SchemaError) as caught:
        make(f"x: {declaration}", CONSTANTS)
    line = CONSTANTS.count("\n") + 4
    assert str(caught.value).startswith(f"Line {line}: ")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "returns", "sentence"),
    [
        ("x", " -> str", "x has no type"),
        ("x='a'", " -> str", "x has no type"),
        ("x: str", "", "run() has no return type"),
        ("x: str", " -> str | None", "what run() returns may not be None"),
        ("x: str", " -> str | int", "str | int is none of the types"),
        ("*x: str", " -> str", "run() takes self and plain parameters only"),
        ("*, x: str", " -> str", "run() takes self and plain parameters only"),
        ("**x: str", " -> str", "run() takes self and plain parameters only"),
    ],
)
def test_signatures_that_cog_cannot_read(parameters: str, returns: str, sentence: str) -> None:
    with pytest.raises(SchemaError, match=r"^Line 4: ") as caught:
        make(parameters, returns=returns)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("source", ["", "class Other:\n    def run(self) -> str: ...", "class Predictor:\n    run = 5"])
def test_no_predictor(source: str) -> None:
    with pytest.raises(SchemaError, match=r"^There is no class Predictor with a method run\.$"):
        make_schema(source)


def test_another_class_may_be_read() -> None:
    source = textwrap.dedent("""
        class Other:
            def run(self, x: int = 1) -> list[Path]: ...
    """)
    assert make_schema(source, "Other")["components"]["schemas"]["Input"]["properties"]["x"]["default"] == 1


def test_nothing_is_run_or_imported() -> None:
    source = "import no_such_module\nraise SystemExit\nclass Predictor:\n    def run(self, x: int = 1) -> str: ...\n"
    assert make_schema(source)["components"]["schemas"]["Output"]["type"] == "string"


def test_what_is_read_of_train_py_is_what_python_makes_of_it() -> None:
    document = make_schema((ROOT / "predict.py").read_text())
    before = json.loads(json.dumps(document))
    add_training(document, (ROOT / "train.py").read_text())
    schemas = document["components"]["schemas"]
    assert {name: schemas[name] for name in before["components"]["schemas"]} == before["components"]["schemas"]
    trained = inspect.signature(train).parameters
    said = schemas["TrainingInput"]
    assert list(said["properties"]) == list(trained)
    assert said["required"] == ["input_images"]
    for name, one in said["properties"].items():
        declared = trained[name].default
        assert one["description"] == declared.description
        assert (one.get("minimum"), one.get("maximum")) == (declared.ge, declared.le)
        if name != "input_images":
            assert one["default"] == declared.default
    assert schemas["TrainingOutput"]["required"] == ["weights"]
    assert schemas["TrainingRequest"]["properties"]["input"] == {"$ref": "#/components/schemas/TrainingInput"}
    assert {"/trainings", "/trainings/{training_id}/cancel"} <= document["paths"].keys()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("x = 1", "There is no function train"),
        ("def train() -> Path:\n    pass", "returns no BaseModel of this file"),
        (
            "class O(BaseModel):\n    w: Path\ndef train(status: str = Input(default='a', choices=['a'])) -> O:\n    pass",
            "",
        ),
        (
            "class O(BaseModel):\n    w: Path\ndef train(output_format: str = Input(default='a', choices=['a'])) -> O:\n    pass",
            "its name must not be that of another schema",
        ),
    ],
)
def test_a_trainer_that_cog_would_refuse(source: str, sentence: str) -> None:
    document = make_schema((ROOT / "predict.py").read_text())
    if not sentence:
        return add_training(document, source)
    with pytest.raises(SchemaError, match=sentence):
        add_training(document, source)
    return None
