"""Mirror a run's records to Weights & Biases while they are written.

The plain files of the run's folder are the record; W&B is a copy that may fail without costing a measurement. The
mirror lives in the parent process, so that no rank carries it, and does its slow work before the first case and after
the last one: a logged record costs about a millisecond, and nothing samples the machine meanwhile.

    with Mirror(folder, cfg, env) as mirror:
        ...                                # whenever a case has finished:
        mirror.poll()
        mirror.finish(figures)

Keys: `<exp>/<metric>/<series>` for every case as it finishes, against the step metric of the experiment (`seq_len`,
`comm_ratio`, `world_size` or `chunks`), and at the end `<exp>/best/<metric>/<method>` with each method's fastest cut.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import OmegaConf

from hcms.methods import METHODS
from hcms_lab.ground.checks import one_of
from hcms_lab.ground.config import AXES, WANDB_MODES, BaseConfig
from hcms_lab.ground.private import scrubbed
from hcms_lab.report.published import published

if TYPE_CHECKING:
    import pandas as pd

# Every time, share and speedup that a record holds is logged, and these; shapes and settings are not.
_METRICS = ("hidden_fraction", "peak_mem_gib", "max_abs_err", "bitwise_equal", "ok")
_METRIC_ENDS = ("_ms", "_share", "_speedup", "_vs_ulysses", "_vs_ring")

PENDING = "upload-pending"  # beside the runs of a folder: an online run that W&B has only in part
REACH_TIMEOUT_S = 10.0
FINISH_TIMEOUT_S = 120.0  # an upload that takes longer is left to `make sync`


class Mirror:
    """One W&B run for one run's folder; a context manager that never raises for W&B's sake.

    `poll` may be called from another thread than the rest.

    Args:
        folder: the run's folder; W&B's own files go to `<folder>/wandb/`.
        cfg: the composed configuration; `cfg.wandb.mode` is `offline`, `online` or `disabled`. Disabled imports no
            wandb. Online without a key or a network goes on offline and says so in one line; nothing ever prompts.
        env: what `env.json` holds (`hardware`, `link`, `commit`, `versions`, ...).
        source: what the run's records are; becomes the job type.

    Raises:
        UsageError: another mode.
    """

    def __init__(
        self,
        folder: Path,
        cfg: BaseConfig,
        env: Mapping[str, Any],
        *,
        source: Literal["measured", "predicted"] = "measured",
    ) -> None:
        one_of("wandb.mode", cfg.wandb.mode, WANDB_MODES)
        self.folder = folder
        self.exp = re.sub(r"[^\w.-]+", "-", str(scrubbed(cfg.name)))  # in names, keys and tags
        self._cfg = cfg
        self._env = env
        self._source = source
        self._axis = str(cfg.about.axis)
        self._mirrored: set[bytes] = set()  # lines of records.jsonl
        self._earlier: set[bytes] = set()  # those of a run that is resumed: some of them may yet be measured again
        self._stamp: tuple[int, ...] = ()  # of the file when it was last read
        self._run: Any = None
        self._lock = threading.Lock()
        self._saved_variables: dict[str, str | None] = {}

    def __enter__(self) -> Mirror:
        if self._cfg.wandb.mode != "disabled":
            self._earlier = set(self._lines())
            self._keep_files_in_the_folder()
            with self._not_fatal("could not start"):
                self._run = self._start(self._cfg.wandb.mode)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close(exit_code=0 if kind is None else 1)
        for name, value in self._saved_variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def poll(self, *, earlier: bool = False) -> int:
        """Log the records appended since the last call; returns how many there were.

        Those that were there at the start wait for the end (`earlier`): a resumed run may replace some.
        """
        with self._lock:
            run = self._run
            if run is None:
                return 0
            rows = self._new_rows(earlier)
            with self._not_fatal("could not log"):
                for row in rows:
                    run.log(self._case(row))
            return len(rows)

    def finish(self, figures: Iterable[Path] = ()) -> None:
        """Log what is still missing, the records as a table and an artifact, the figures and the summary; end the run.

        Args:
            figures: the files that the run's figures were written to; PNGs are shown as media as well.
        """
        if self._run is None:
            return
        self.poll(earlier=True)  # `_close` takes the run from a thread that goes on polling
        if self._run is None:  # W&B failed, and that was said
            return
        with self._not_fatal("could not log the results"):
            self._log_results([path for path in figures if path.is_file()])
        self._close(exit_code=0)

    # --- starting and ending -----------------------------------------------------------------------------------------

    def _start(self, mode: str) -> Any:
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        if mode == "online":
            try:
                if wandb.login(prompt=False, verify=False):
                    reach(wandb.setup().settings.base_url)
                    return self._init("online")
                reason = "no key: run `wandb login`"
            except Exception as error:
                reason = _first_line(error)
            _say(f"W&B cannot be reached ({reason}); the run goes on offline, `make sync` uploads it later")
        return self._init("offline")

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        hardware = scrubbed(dict(self._env.get("hardware") or {}))
        slug = str(hardware.get("slug", "unknown"))
        settings = wandb.Settings(
            console="off",
            silent=True,
            host=slug,  # W&B would send the machine's own name
            disable_git=True,  # the commit is in the config, the repository's address is nobody's business
            disable_code=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=30,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
        )
        run = wandb.init(
            mode=mode,
            project=self._cfg.wandb.project,
            entity=self._cfg.wandb.entity,
            dir=self.folder,
            name=f"{self.exp} {slug} {self.folder.name}",
            group=self.exp,
            job_type=self._source,
            tags=[self.exp, slug, self._source],
            config=self._config(hardware),
            settings=settings,
        )
        for name in AXES:
            run.define_metric(name, hidden=True)
        run.define_metric(f"{self.exp}/*", step_metric=self._axis)
        if mode == "online":
            _say(f"W&B: {run.url}")
        return run

    def _close(self, exit_code: int) -> None:
        with self._lock:
            run, self._run = self._run, None
        if run is not None:
            pending = self.folder / "wandb" / PENDING
            if not run.settings._offline:
                pending.touch()
            with self._not_fatal("did not take everything, `make sync` uploads it again"):
                run.finish(exit_code=exit_code)
                pending.unlink(missing_ok=True)

    def _config(self, hardware: dict[str, Any]) -> dict[str, Any]:
        config = {key: self._env.get(key) for key in ("link", "commit", "dirty", "python", "torch", "driver", "cuda")}
        versions = dict(self._env.get("versions") or {})
        return {
            **config,
            "hardware": hardware,
            "versions": versions,
            "exp": self.exp,
            "source": self._source,
            "experiment": published(self._cfg),
        }

    def _keep_files_in_the_folder(self) -> None:
        """Staged artifacts and caches belong to the run's folder too: it can then be uploaded as long as it exists."""
        base = (self.folder / "wandb").resolve()
        wanted = {
            "WANDB_DATA_DIR": str(base / "data"),
            "WANDB_CACHE_DIR": str(base / "cache"),
            "WANDB_ERROR_REPORTING": "false",  # offline means that nothing leaves the machine
        }
        base.mkdir(parents=True, exist_ok=True)
        for name, value in wanted.items():
            self._saved_variables[name] = os.environ.get(name)
            os.environ[name] = value

    @contextmanager
    def _not_fatal(self, what: str) -> Iterator[None]:
        """W&B's troubles end the mirror, never the measurement."""
        try:
            yield
        except Exception as error:
            _say(f"W&B {what} ({_first_line(error)}); the records in {self.folder} are whole")
            self._run = None

    # --- what is logged ----------------------------------------------------------------------------------------------

    def _lines(self) -> list[bytes]:
        """The whole lines of the records; one that is still being written waits for the next poll."""
        file = self.folder / "records.jsonl"
        text = file.read_bytes() if file.is_file() else b""
        return [line for line in text[: text.rfind(b"\n") + 1].splitlines() if line.strip()]

    def _new_rows(self, earlier: bool) -> list[dict[str, Any]]:
        """Records may also be replaced (a resumed run measures a case again), so lines are known by their content."""
        file = self.folder / "records.jsonl"
        if not file.is_file():
            return []
        stat = file.stat()
        stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if stamp == self._stamp and not earlier:
            return []
        self._stamp = stamp
        left_out = self._mirrored if earlier else self._mirrored | self._earlier
        lines = [line for line in self._lines() if line not in left_out]
        self._mirrored.update(lines)
        return [json.loads(line) for line in lines]

    def _case(self, row: Mapping[str, Any]) -> dict[str, float]:
        from hcms_lab.ground.load import plan

        words = [row.get("method"), plan(row.get("cut")), row.get("kernel"), row.get("source")]
        name = " ".join(str(word) for word in words if word)
        return _numbers({f"{self.exp}/{metric}/{name}": value for metric, value in _metrics(row)} | _axes(row))

    def _log_results(self, figures: list[Path]) -> None:
        import wandb

        from hcms_lab.ground.load import frame

        run = self._run
        rows = scrubbed([json.loads(line) for line in self._lines()])
        if rows:
            table = frame(rows)
            for row in best(table, self._axis).to_dict("records"):
                values = {f"{self.exp}/best/{metric}/{row['series']}": value for metric, value in _metrics(row)}
                run.log(_numbers(values | _axes(row)))
            columns = [column for column in table.columns if column != "times_ms"]
            data: list[Any] = [
                [*(_cell(row[column]) for column in columns), json.dumps(row["times_ms"])]
                for row in table.to_dict("records")
            ]
            shown = wandb.Table(columns=[*columns, "times_ms"], data=data, allow_mixed_types=True)
            run.log({"records": shown})
            run.summary.update(summary(table))

        for path in figures:
            if path.suffix == ".png":
                run.log({f"figures/{path.stem}": wandb.Image(str(path))})
        env = scrubbed(dict(self._env))
        artifact = wandb.Artifact(f"{self.exp}-records", type="records", metadata=env)
        for name, text in {
            "records.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
            "env.json": json.dumps(env, indent=2) + "\n",
            "settings.yaml": OmegaConf.to_yaml(published(self._cfg)),
        }.items():
            copy = self.folder / "wandb" / "published" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text, encoding="utf-8")
            artifact.add_file(str(copy), name=name)
        for path in sorted((self.folder / "traces").rglob("*.json")):
            artifact.add_file(str(path), name=path.relative_to(self.folder).as_posix())
        for path in figures:
            artifact.add_file(str(path), name=f"figures/{path.name}")
        run.log_artifact(artifact)


def best(table: pd.DataFrame, x: str) -> pd.DataFrame:
    """Of each method at each value of `x` the fastest correct case, ordered by `x`.

    Adds `chunks` and `series`: the method, with whatever else tells its cases apart (kernel, ranks, ...).
    """
    table = table[table["ok"].fillna(False) & table["latency_ms"].notna()].copy()
    table["chunks"] = [_axes(row)["chunks"] for row in table.to_dict("records")]
    # Ratios are measured, so cases that were asked for the same one differ in the last digits.
    point = table["link_ratio"].fillna(table["comm_ratio"].round(2)) if x == "comm_ratio" else table[x]
    apart = [
        column
        for column in ("source", "workload", "link", "kernel", "dtype", "world_size", "batch", "seq_len")
        if column != x and table[column].nunique(dropna=True) > 1
    ]
    if x not in ("comm_ratio", "seq_len") and table["link_ratio"].nunique(dropna=True) > 1:
        apart.append("link_ratio")
    names = table[["method", *apart]].astype(object).to_dict("records")
    table["series"] = [
        " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in n.values()) for n in names
    ]
    table = table.assign(_point=point)[point.notna()].sort_values(["_point", "latency_ms"], kind="stable")
    return table.drop_duplicates(["_point", "series"]).drop(columns="_point")


def summary(table: pd.DataFrame) -> dict[str, float | int | str]:
    """The headline of a run: best speedups of HCMS with the cut that reached them, and how many cases failed."""
    good = table[table["ok"].fillna(False)]
    headline: dict[str, float | int | str] = {
        "cases": len(table),
        "failed": len(table) - len(good),
        "refused": int((table["status"] == "refused").sum()),
    }
    ours = good[good["method"].isin([method.name for method in METHODS.values() if method.cuts and method.overlaps])]
    for metric in ("speedup_vs_ulysses", "speedup_vs_ring", "hidden_fraction"):
        values = ours[metric].dropna()
        if len(values):
            headline[f"best_{metric}"] = float(values.max())
            headline[f"best_{metric}_cut"] = str(ours["cut"].tolist()[ours[metric].argmax()])
    if good["comm_ratio"].notna().any():
        headline["comm_ratio"] = float(good["comm_ratio"].median())
    return headline


def _axes(row: Mapping[Any, Any]) -> dict[str, Any]:
    from hcms_lab.ground.cuts import chunks

    return {name: row.get(name) for name in AXES if name != "chunks"} | {"chunks": chunks(row.get("cut"))}


def _metrics(row: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in row.items() if key in _METRICS or str(key).endswith(_METRIC_ENDS))


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """What W&B can plot: numbers and truth values, without what is missing."""
    return {
        key: float(value) for key, value in values.items() if isinstance(value, int | float) and not math.isnan(value)
    }


def _cell(value: Any) -> Any:
    """A cell as W&B's tables take it: None for what is missing."""
    if isinstance(value, list | dict):
        return json.dumps(value)
    return None if value is None or value != value else value


def reach(url: str) -> None:
    """Any answer will do; W&B's own client would retry for minutes before it gave up.

    Raises:
        OSError: nothing answers, and why.
    """
    try:
        urllib.request.urlopen(url, timeout=REACH_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return
    except urllib.error.URLError as error:
        raise OSError(f"{url}: {error.reason}") from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
