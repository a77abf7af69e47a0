"""The OpenAPI document of the server."""

from typing import Any

from . import chat_protocol, inference_protocol, occlusion

ERRORS = {
    "400": "Not a request that this model can take",
    "401": "Without the server's key",
    "404": "No such model",
    "408": "The body did not arrive in time",
    "413": "Too large",
    "429": "Too many requests wait: try again later",
    "500": "The model failed",
    "503": "Shutting down, or holding too many connections",
    "504": "Not answered before the deadline",
}


def document(model: str) -> dict[str, Any]:
    """OpenAPI 3.1, with the name of the model that is served."""
    schemas: dict[str, Any] = {}

    def schema(kind: Any) -> dict[str, str]:
        made = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(made.pop("$defs", {}))
        if "model" in made["properties"]:
            made["properties"]["model"] |= {"enum": [model]}
        schemas[kind.__name__] = made
        return {"$ref": f"#/components/schemas/{kind.__name__}"}

    def operation(summary: str, *, body: Any = None, names: tuple[str, ...] = ()) -> dict[str, Any]:
        answer = {"description": summary, "content": {"application/json": {"schema": {}}}}
        if body is not None:
            answer["content"] |= {"text/event-stream": {}, "application/octet-stream": {}}
        failures = {
            code: {"description": text, "content": {"application/json": {"schema": {}}}}
            for code, text in ERRORS.items()
        }
        found: dict[str, Any] = {"summary": summary, "responses": {"200": answer} | failures}
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
        if "model" in names:
            found["parameters"][0]["schema"] |= {"enum": [model]}
        if body is not None:
            content = {"application/json": {"schema": schema(body)}}
            found["requestBody"] = {"required": True, "content": content}
        return found

    paths: dict[str, Any] = {
        "/v2/health/live": {"get": operation("Whether the server runs")},
        "/v2/health/ready": {"get": operation("Whether it takes requests")},
        "/v2": {"get": operation("About the server")},
        "/v1/models": {"get": operation("The model, for OpenAI's clients")},
        "/v1/chat/completions": {
            "post": operation("An answer, whole or streaming", body=chat_protocol.ChatRequest)
        },
        "/v1/occlusion": {
            "post": operation("Which input an answer rests on", body=occlusion.OcclusionRequest)
        },
        "/v1/page": {"get": operation("What the page must know of the model")},
        "/openapi.json": {"get": operation("This document")},
    }
    for prefix, names in (
        ("/v2/models/{model}", ("model",)),
        ("/v2/models/{model}/versions/{version}", ("model", "version")),
    ):
        paths[prefix] = {"get": operation("Inputs and outputs", names=names)}
        paths[f"{prefix}/ready"] = {"get": operation("Whether the model is ready", names=names)}
        infer = operation("Predict", body=inference_protocol.InferRequest, names=names)
        paths[f"{prefix}/infer"] = {"post": infer}
    metrics = operation("Prometheus metrics")
    metrics["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    paths["/metrics"] = {"get": metrics}
    key = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"fusion_jax: {model}", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": key},
    }
