"""Memory over time, process by process. Needs matplotlib: pip install -e '.[plot]'."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from loadtest.memory import Sample


def plot_memory(samples: Mapping[str, Sequence[Sample]], warm_up_s: float, path: Path) -> None:
    """One line for each process, in the format that the path's suffix names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for name, of_name in sorted(samples.items()):
        minutes = [at_s / 60 for at_s, _ in of_name]
        axes.plot(minutes, [size / 2**20 for _, size in of_name], label=name.removeprefix("SERVE_"), linewidth=1.1)
    axes.axvspan(0, warm_up_s / 60, color="#eeeeee")
    axes.set_xlabel("minutes")
    axes.set_ylabel("resident memory in MiB")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
