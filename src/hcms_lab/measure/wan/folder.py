"""What a folder or the hub holds of a pipeline, told before anything is loaded. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.model_config import ModelConfig, check_model

PIPELINES = {"WanPipeline": "t2v", "WanImageToVideoPipeline": "i2v"}  # diffusers' name, our task
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


def as_saved(model: ModelConfig, folder: Path) -> ModelConfig:
    """The model that a folder holds, by its own configuration files.

    Raises:
        UsageError: no whole pipeline, another one than Wan's, or files that say nothing a model could be built of.
    """
    if why := refusal(folder):
        raise UsageError(f"weights_path={folder}: {why}")
    index = json.loads((folder / "model_index.json").read_text())
    if index["_class_name"] not in PIPELINES:
        raise UsageError(
            f"weights_path={folder}: it holds a {index['_class_name']}; give one of {', '.join(PIPELINES)}"
        )

    def part(name: str) -> dict[str, Any]:
        saved = json.loads((folder / name / "config.json").read_text())
        return {k: v for k, v in saved.items() if not k.startswith("_")}

    try:
        second = (index.get("transformer_2") or [None])[0] is not None
        found = replace(
            model,
            task=PIPELINES[index["_class_name"]],
            experts=2 if second else 1,
            boundary_ratio=index.get("boundary_ratio"),
            expand_timesteps=bool(index.get("expand_timesteps", False)),
            transformer=part("transformer"),
            vae=part("vae"),
        )
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise UsageError(f"weights_path={folder}: its configuration files cannot be read ({error})") from None
    check_model(found)
    return found


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
