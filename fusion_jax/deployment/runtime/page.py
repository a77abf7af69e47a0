"""The page to talk to a served model: one file, which asks nothing of any other address."""

from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from .host import Served

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline';"
    " style-src 'unsafe-inline'; img-src blob: data:; media-src blob:; connect-src 'self'",
    "cache-control": "no-cache",
}


async def show(_: Request) -> Response:
    """The page itself; its requests show the key, if there is one."""
    return FileResponse(Path(__file__).with_name("page.html"), headers=HEADERS)


def facts(served: Served, body_bytes: int) -> dict[str, Any]:
    """What the page must know: which media the model reads, and how much of them."""
    specs = served.model.inputs
    kinds = {spec["kind"] for spec in specs.values()}
    heard = [s["longest"] / s["rate"] for s in specs.values() if s["kind"] == "audio"]
    return {
        "model": served.artifact.name,
        "about": served.artifact.card.get("about", ""),
        "chats": served.artifact.manifest["kind"] == "generate",
        "image": "image" in kinds,
        "audio_seconds": min(heard, default=0),
        "evidence": getattr(served.model, "scores", False),
        "turns": served.artifact.manifest.get("turns", False),
        "translation": served.artifact.manifest.get("translation"),
        "body_bytes": body_bytes,
        "most_bytes": body_bytes * 3 // 4 - 65536,  # base64 adds a third
    }
