"""The laboratory: runs experiments on ranks, checks and records what they give, and draws it.

Rooms, each of which imports from those before it only: `ground` (configuration, errors, records), then `measure`
(launch, time, check) and `report` (figures, tables, pages, W&B), which do not know each other.
"""

from importlib.util import find_spec


def needs(*modules: str) -> None:
    """Say in one line what the laboratory has to have here beside the library.

    Each room asks for its own: a GPU machine that only measures has no use for the packages that draw.

    Raises:
        ImportError: one of these is not installed.
    """
    if missing := [name for name in modules if find_spec(name) is None]:
        raise ImportError(f"hcms_lab needs {', '.join(missing)}, not installed here: pip install hcms[lab]")


needs("numpy")
