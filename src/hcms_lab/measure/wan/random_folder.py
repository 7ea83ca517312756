"""A folder as `save_pretrained` writes it, with random weights: the examples can be tried on it without a download."""

from __future__ import annotations

from pathlib import Path

from hcms_lab.ground.errors import UsageError


def write_random(folder: Path | str, model_name: str = "wan-tiny", seed: int = 0) -> Path:
    """Write the whole pipeline of a model of conf/model/ with random weights into a new folder; wan-tiny has 160 MB.

    Its frames are noise, but the same noise from the same seed, so that they can be compared.

    Returns the folder.

    Raises:
        UsageError: no such model, or something is in the folder already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already: name a folder that is new or empty")
    import torch

    from hcms_lab.measure.wan.build import random_pipeline
    from hcms_lab.measure.wan.one_gpu import model_config

    try:
        model = model_config(model_name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    random_pipeline(model, torch.device("cpu"), seed).save_pretrained(folder)
    return folder
