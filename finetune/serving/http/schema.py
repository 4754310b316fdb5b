"""The OpenAPI description of the server: what its endpoints take."""

from collections.abc import Sequence

from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from finetune.common.version import VERSION
from finetune.serving.http.protocol import ApiRequest, ChatRequest, HeadRequest, JsonObject

REF = "#/components/schemas/{model}"


def body_of(kind: type[ApiRequest]) -> JsonObject:
    """`openapi_extra` of an endpoint, which reads its body itself: within limits, before it is parsed."""
    schema = {"$ref": REF.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def openapi(routes: Sequence[BaseRoute]) -> JsonObject:
    """Version 3.1, as JSON."""
    _, definitions = models_json_schema([(ChatRequest, "validation"), (HeadRequest, "validation")], ref_template=REF)
    content = get_openapi(title="finetune", version=VERSION, routes=routes)
    schemas = {**content["components"]["schemas"], **definitions["$defs"]}
    return {**content, "components": {"schemas": schemas}}
