"""What a folder or the hub holds of a pipeline, told before anything is loaded. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

PARTS = ("transformer", "vae", "text_encoder")


def refusal(folder: Path) -> str | None:
    """Why a folder holds no pipeline that could be loaded; None if it looks whole."""
    if not (folder / "model_index.json").is_file():
        return "no model_index.json there; give a folder that a pipeline's save_pretrained wrote"
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except ValueError:
        index = None
    if not isinstance(index, dict) or "_class_name" not in index:
        return "its model_index.json does not say which pipeline it is"
    for part in PARTS:
        if not any((folder / part).glob("*.safetensors")) and not any((folder / part).glob("*.bin")):
            return f"{part}/ holds no weights (*.safetensors)"
        if not (folder / part / "config.json").is_file():
            return f"{part}/ holds no config.json"
    return None


def hub_refusal(name: str) -> str | None:
    """Why the hub does not give a pipeline of that name, in a few words; asks the local cache first, then once."""
    from huggingface_hub import file_exists, try_to_load_from_cache

    index = "model_index.json"
    if isinstance(try_to_load_from_cache(name, index), str):
        return None
    try:
        return None if file_exists(name, index) else f"no {index} under that name"
    except Exception as error:  # huggingface_hub's own, or one of the HTTP client that its release stands on
        return str(error).splitlines()[0]
