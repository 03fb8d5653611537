"""Replicas over time, policy by policy. Needs matplotlib: pip install -e '.[plot]'."""

from pathlib import Path

import numpy as np

from benchmarks.autoscaling.comparison import EAGER_SERVE, ORACLE, OURS, SERVE, Result

COLOURS = {OURS: "#0b6e4f", SERVE: "#c8553d", EAGER_SERVE: "#e0a458", ORACLE: "#7a7a7a"}
MAX_POINTS = 600  # of a line: a day has 170,000 steps
STYLE = {"svg.hashsalt": "slipstream", "svg.fonttype": "none", "font.size": 8}


def plot(results: list[Result], path: Path) -> None:
    """One panel for each trace, in the format that the path's suffix names."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        _draw(results, path)


def _draw(results: list[Result], path: Path) -> None:
    from matplotlib.figure import Figure

    traces = list(dict.fromkeys(result.trace for result in results))
    figure = Figure(figsize=(8, 2.1 * len(traces)))
    panels = figure.subplots(len(traces), 1, squeeze=False)
    for panel, name in zip(panels[:, 0], traces, strict=True):
        for result in (each for each in results if each.trace == name):
            trace, held = result.outcome.trace, result.outcome.num_held
            stride = max(1, len(held) // MAX_POINTS)
            # The highest of each stretch, so that a short burst of replicas is not lost.
            highest = np.maximum.reduceat(held, np.arange(0, len(held), stride))
            unit_s = 3600 if trace.duration_s > 2 * 3600 else 60
            time = np.arange(len(highest)) * stride * trace.step_s / unit_s
            label = f"{result.policy}: {result.outcome.good_part(result.objective):.0%} in time"
            panel.step(time, highest, where="post", label=label, color=COLOURS.get(result.policy), linewidth=1.1)
        panel.set_title(name, loc="left")
        panel.set_ylabel("replicas")
        panel.set_xlabel("hours" if unit_s == 3600 else "minutes")
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
