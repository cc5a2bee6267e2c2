"""Tests a served model on your questions, with and without their images.

Works with every server that has OpenAI's chat interface: vLLM, llama.cpp, Ollama, SGLang, or a provider. Run

    python examples/blind_served_model.py questions.jsonl --url http://localhost:8000/v1 --model
    Qwen/Qwen2.5-VL-3B-Instruct

with one JSON object per line: {"image": "cat.png", "question": "Is there a cat?", "answer": "yes", "category":
"animals"}. A key is read from the environment variable OPENAI_API_KEY. Replies are kept in journal.jsonl: after an
interruption the same command continues."""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equipoise as eq


def chat_target(url: str, model: str, *, timeout: float = 60.0, max_tokens: int = 32) -> Callable[[Any, str], str]:
    """Returns a function (image, prompt) -> text that asks an endpoint with OpenAI's chat interface."""

    def ask(image: Any, prompt: str) -> str:
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
        for one in image if isinstance(image, list) else [] if image is None else [image]:
            buffer = io.BytesIO()
            one.save(buffer, format="PNG")
            data = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            content.insert(0, {"type": "image_url", "image_url": {"url": data}})
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)["choices"][0]["message"]["content"]

    return ask


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="jsonl file with image, question, answer")
    parser.add_argument("--url", required=True, help="base address of the interface, such as http://localhost:8000/v1")
    parser.add_argument("--model", required=True, help="name of the model on the server")
    parser.add_argument("--out", type=Path, default=Path("blind"), help="folder of results")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for each call")
    parser.add_argument("--wait", type=float, default=1.0, help="seconds before a failed call is repeated")
    parser.add_argument("--workers", type=int, default=4, help="number of calls at a time")
    options = parser.parse_args(arguments)
    samples = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines() if line.strip()]
    result = eq.blind(
        chat_target(options.url, options.model, timeout=options.timeout), samples, root=options.data.parent,
        journal=options.out / "journal.jsonl", workers=options.workers, wait=options.wait, name=options.model,
        progress=lambda done, total: print(f"\r{done} of {total}", end="", file=sys.stderr),
    )  # fmt: skip
    print(file=sys.stderr)
    print(result.table())
    print(f"results: {result.save(options.out)}")


if __name__ == "__main__":
    main()
