"""Write a folder with a random pipeline that a drop-in can be tried on: sizes of a model of conf/model/, no network.

hcms-lab tiny-model FOLDER                    # wan-tiny, about 160 MB
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from hcms_lab.ground.errors import UsageError


def options(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where to write; must be empty or not there yet")
    parser.add_argument("--model", default="wan-tiny", help="a file of conf/model/")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")


def run(arguments: Namespace) -> int:
    from hcms_lab.measure.wan.random_folder import write_random

    try:
        print(f"wrote {write_random(arguments.folder, arguments.model, arguments.seed)}")
    except OSError as error:
        raise UsageError(f"{arguments.folder}: no folder to write to ({error.strerror}); give one") from None
    return 0
