"""What two to eight GPUs can tell, the most valuable first, on their fast link and on a slow one: `make gpu-four`.

Every step is one experiment of run.py at full size: over the cards' own link (`native`), through the host's memory,
which is the paper's regime on the same GPUs (`native-host`), and by copy engines. A step that has ended is not run
again, one that was cut off goes on where it was: call again until all are done. Place what came out with

    hcms-lab contribute outputs/gpu-four/native-host/fig3/latest --variant two-cards-host    # each of the experiments

    hcms-lab gpu-four [--minutes 9] [--list] [key=value ...]    # settings go to every step
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from time import perf_counter

from hcms.hardware import visible_gpus
from hcms_lab.ground.errors import UsageError
from hcms_lab.stepwise import Step, listed, run_steps

LINKS = ("native-host", "native")
EXPERIMENTS = ("fig3", "fig1", "fig5", "table2", "fig4", "fig2", "fig8", "table3", "table5", "fig7")
STEPS = [
    *(Step(name, link, settings=(f"link.kind={link}",)) for name in EXPERIMENTS for link in LINKS),
    Step("fig3", "copy-engine", settings=("link.kind=native", "transport=copy-engine")),
]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for every step")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no step later, cut off the last")
    parser.add_argument("--output", type=lambda given: Path(given).resolve(), default="outputs/gpu-four")
    parser.add_argument("--list", action="store_true", help="show the steps, run nothing")


def run(arguments: Namespace) -> int:
    if arguments.list:
        print(listed(STEPS, arguments.output))
        return 0
    if visible_gpus() < 2:
        raise UsageError(f"{visible_gpus()} GPUs are visible here; this needs 2 at least")
    ends_s = perf_counter() + 60 * arguments.minutes
    return 1 if run_steps(STEPS, arguments.output, ends_s, arguments.settings) else 0
