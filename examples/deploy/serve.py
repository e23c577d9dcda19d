"""A server for an exported file, with limits on what it takes; `refinedet-runtime`, fastapi, uvicorn, python-multipart.

MODEL=deploy/model-int8.xml uvicorn serve:app
curl -F images=@photo.jpg -F images=@other.jpg 'localhost:8000/detect?threshold=0.5'
"""

import asyncio
import os
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool

from refinedet.errors import RefineDetError
from refinedet.runtime import Runtime

MOST_IMAGES, MOST_BYTES, MOST_PIXELS = 8, 20_000_000, 25_000_000  # of a request; pixels: of an image
model, turn = Runtime(os.environ["MODEL"]), asyncio.Lock()
app = FastAPI()


@app.post("/detect")
async def detect(request: Request, threshold: float = 0.5) -> list[dict[str, Any]]:
    """Detections of each uploaded image, in their order."""
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        raise HTTPException(411, "the length of the request is missing")
    if int(length) > MOST_BYTES:
        raise HTTPException(413, f"at most {MOST_BYTES} bytes")
    async with request.form(max_files=MOST_IMAGES, max_fields=0) as form:
        images = [await upload.read() for upload in form.getlist("images") if not isinstance(upload, str)]
    try:
        async with turn:  # one request at a time uses all threads
            found = await run_in_threadpool(model.predict, images, threshold=threshold, max_pixels=MOST_PIXELS)
    except RefineDetError as error:  # no image, too many pixels, a threshold outside of 0..1
        raise HTTPException(422, str(error)) from None
    return [detections.to_dict() for detections in found]
