"""What a run over whole clips shows in the terminal when it is done."""

from __future__ import annotations

from typing import Any

from rich.table import Table

_SHOWN_PARTS = {
    "text": ("text_encoder_ms",),
    "attention": ("self_attention_ms",),
    "around it": ("self_projections_ms",),
    "cross": ("cross_attention_ms",),
    "ffn": ("feed_forward_ms",),
    "rest": ("transformer_rest_ms", "scheduler_ms"),
    "VAE": ("vae_encode_ms", "vae_decode_ms"),
    "other": ("other_ms",),
}


def clip_tables(records: list[dict[str, Any]], title: str) -> list[Table]:
    """The terminal's tables, two a clip length: speedups with their checks, and where the time goes."""
    shown: list[Table] = []
    points = {(r["world_size"], r["link_ratio"], r["num_frames"]): r for r in records}
    for point, one in points.items():
        rho = "" if one["comm_ratio"] is None else f", rho {one['comm_ratio']:.2f} in the pipeline"
        where = f"{one['num_frames']} frames, {one['seq_len']:,} tokens, {one['world_size']} ranks{rho}"
        if one["composed"]:
            where += (
                f"\ncomposed of {one['n']} timed steps a method, with {one['layers_timed']} of {one['layers']} "
                f"layers, and of text encoder and VAE"
            )
        speed = Table(
            title=f"{title}\n{where}", caption="Amdahl: of the clip, from the attention's; ! off the interval"
        )
        parts = Table(title=f"where a clip's time goes, s: {where}")
        for name in ("method", "cut"):
            speed.add_column(name)
        for name in ("clip s", "± IQR", "vs ulysses", "attention", "Amdahl", "max err"):
            speed.add_column(name, justify="right")
        for name in ("bitwise", "check"):
            speed.add_column(name)
        parts.add_column("method")
        for name in (*_SHOWN_PARTS, "named"):
            parts.add_column(name, justify="right")
        for r in (r for r in records if (r["world_size"], r["link_ratio"], r["num_frames"]) == point):
            speed.add_row(
                r["method"],
                r["cut"] or "-",
                f"{r['latency_ms'] / 1e3:.2f}",
                f"{r['latency_iqr_ms'] / 1e3:.2f}",
                f"{r['speedup_vs_ulysses']:.3f}",
                f"{r['attention_speedup_vs_ulysses']:.3f}",
                f"{r['amdahl_speedup']:.3f}" + ("" if r["amdahl_agrees"] else "!"),
                "-" if r["max_abs_err"] is None else f"{r['max_abs_err']:.0e}",
                "yes" if r["bitwise_equal"] else "no",
                "ok" if r["ok"] else r["error"],
            )
            parts.add_row(
                r["method"],
                *(f"{sum(r[k] for k in keys) / 1e3:.2f}" for keys in _SHOWN_PARTS.values()),
                f"{100 * r['named_share']:.1f} %",
            )
        shown += [speed, parts]
    return shown
