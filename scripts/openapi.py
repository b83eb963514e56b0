"""Makes a predictor's OpenAPI document, by which Cog's server validates inputs and which it serves at /openapi.json.

The document equals that of Cog 0.22 and 0.23 for the same file.
"""

from typing import Any

from scripts.schemas import KINDS, OBJECT, TEXT, TIME, component, enumerated, in_order, ref, titled
from scripts.signatures import SchemaError, Signatures

STATUSES = ("starting", "processing", "succeeded", "canceled", "failed")
Schema = dict[str, Any]


def make_schema(source: str, runner: str = "Predictor") -> Schema:
    """The document of one class, in Cog's order of keys.

    Args:
        source: the text of predict.py, in which ``Input`` and ``Path`` are Cog's.
        runner: the name of a class with a method ``run``.

    Raises:
        SchemaError: Cog would refuse the file, or leave out part of it.
        SyntaxError: the source is not Python.
    """
    inputs, output, enums = Signatures(source).prediction(runner)
    return {
        "components": {"schemas": _schemas(inputs, output, enums)},
        "info": {"title": "Cog", "version": "dev"},
        "openapi": "3.0.2",
        "paths": _paths(),
    }


def add_training(document: Schema, source: str, function: str = "train") -> None:
    """Add what trainings take and answer to the document of a predictor.

    Args:
        document: as `make_schema` returns it.
        source: the text of train.py.
        function: its name. What it returns is a `BaseModel` of that file.

    Raises:
        SchemaError, SyntaxError: see `make_schema`. A choice that has another's name is refused, too.
    """
    inputs, output, enums = Signatures(source).training(function)
    schemas = document["components"]["schemas"]
    for name in enums:
        if name in schemas:
            raise SchemaError(
                f"The input {name} of {function}() has choices, so its name must not be that of another schema."
            )
    answer = schemas["PredictionResponse"]["properties"]
    schemas |= {
        "TrainingInput": inputs,
        "TrainingOutput": output,
        **enums,
        "TrainingRequest": component("TrainingRequest", {**titled(id=TEXT), "input": ref("TrainingInput")}),
        "TrainingResponse": component(
            "TrainingResponse", {**answer, "input": ref("TrainingInput"), "output": ref("TrainingOutput")}
        ),
    }
    document["paths"] |= {
        "/trainings": {"post": _run("Train", "Run a single training on the model", "train_trainings_post", "Training")},
        "/trainings/{training_id}/cancel": {
            "post": _cancel("training_id", "cancel_trainings__training_id__cancel_post")
        },
    }


def _schemas(inputs: Schema, output: Schema, enums: Schema) -> Schema:
    """All schemas. Those besides the inputs and the output are the same for every predictor."""
    prediction = titled(completed_at=TIME, created_at=TIME, error=TEXT, id=TEXT)
    prediction |= {"input": ref("Input"), **titled(logs=TEXT, metrics=OBJECT), "output": ref("Output")}
    prediction |= titled(started_at=TIME, status=TEXT, version=TEXT)
    location = {"items": {"anyOf": [TEXT, KINDS["int"]]}, "title": "Location", "type": "array"}
    problem = {"loc": location, "msg": {"title": "Message", **TEXT}, "type": {"title": "Error Type", **TEXT}}
    problems = {"detail": {"items": ref("ValidationError"), "title": "Detail", "type": "array"}}
    return {
        "Input": inputs,
        "Output": output,
        **enums,
        "PredictionRequest": component("PredictionRequest", {**titled(id=TEXT), "input": ref("Input")}),
        "PredictionResponse": component("PredictionResponse", prediction),
        "Status": enumerated("Status", list(STATUSES), TEXT),
        "HTTPValidationError": component("HTTPValidationError", problems),
        "ValidationError": component("ValidationError", problem, required=list(problem)),
    }


def _paths() -> Schema:
    """The operations of every predictor."""
    said = "Run a single prediction on the model"
    return {
        "/": {"get": _operation("Root", "root__get", {}, validated=False)},
        "/health-check": {"get": _operation("Healthcheck", "healthcheck_health_check_get", {}, validated=False)},
        "/predictions": {"post": _run("Predict", said, "predict_predictions_post", "Prediction")},
        "/predictions/{prediction_id}/cancel": {
            "post": _cancel("prediction_id", "cancel_predictions__prediction_id__cancel_post")
        },
    }


def _run(summary: str, description: str, name: str, what: str) -> Schema:
    """The operation that runs a prediction or a training."""
    body = {"content": _as_json(ref(f"{what}Request"))}
    return _operation(summary, name, ref(f"{what}Response"), description=description, requestBody=body)


def _cancel(parameter: str, name: str) -> Schema:
    """The operation that cancels one, whose id is a parameter of the path."""
    (named,) = titled(**{parameter: TEXT}).values()
    parameters = [{"in": "path", "name": parameter, "required": True, "schema": named}]
    return _operation("Cancel", name, {}, parameters=parameters)


def _operation(summary: str, name: str, answer: Schema, *, validated: bool = True, **more: Any) -> Schema:
    """An operation.

    Args:
        summary: a word.
        name: its id.
        answer: the schema of its answer.
        validated: whether it may also answer that an input is wrong.
        more: further keys.
    """
    described = {"200": ("Successful Response", answer)}
    if validated:
        described["422"] = ("Validation Error", ref("HTTPValidationError"))
    responses = {code: {"content": _as_json(one), "description": text} for code, (text, one) in described.items()}
    return in_order({"operationId": name, "responses": responses, "summary": summary, **more})


def _as_json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}
