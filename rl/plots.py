"""Pictures of a run and of a comparison, in the colour-blind-safe palette of Okabe and Ito."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from deltarl.rl.errors import UserError
from deltarl.rl.metrics import PHASES, STATUSES, Row, RunRecord, load_run, series

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442",
)  # fmt: skip
INK, MUTED, GRID, GREY = "#1f2933", "#52606d", "#e4e7eb", "#9aa5b1"
Curve = tuple[list[int], list[float]]

ARM_COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, INK)
ARM_LINES = ("-", "--", "-.", ":")
ARM_MARKERS = "osD^vPX"
PHASE_COLOURS = dict(zip(PHASES, (BLUE, SKY, YELLOW, GREEN, PURPLE, RED, GREY), strict=True))
STATUS_COLOURS = dict(zip(STATUSES, (BLUE, ORANGE, GREY, PURPLE, RED, YELLOW, INK), strict=True))
TIME_AXIS_MEDIANS = 3.0  # a step longer than so many medians is cut off

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 2.2,
    "figure.constrained_layout.use": True,
}


def draw_run(run_dir: str | Path) -> list[Path]:
    """Write one PNG per panel that has data, and overview.png with all of them, into the run folder.

    Returns their paths, the overview first; [] for a run without any measurement.
    """
    run = load_run(run_dir)
    panels = [panel for panel in PANELS if panel.has_data(run)]
    if not panels:
        return []
    paths = [_overview(run, panels)]
    for panel in panels:
        with matplotlib.rc_context(STYLE):
            figure = _figure(6.4, 4.0)
            panel.draw(figure.add_subplot(), run)
        paths.append(_save(figure, run.folder / f"{panel.name}.png"))
    return paths


def draw_comparison(arms: Mapping[str, Sequence[str | Path]], out: str | Path) -> Path:
    """Write one picture with the training-accuracy and held-out curves of each arm; `arms` maps name to run folders.

    Lines are means over seeds; bands reach from the lowest to the highest seed.  A step counts when every seed of the
    arm has it.  UserError when no run of any arm has a training step.
    """
    runs = {arm: [load_run(folder) for folder in folders] for arm, folders in arms.items()}
    longest = max((len(run.of("rl")) for group in runs.values() for run in group), default=0)
    if longest == 0:
        raise UserError("nothing to compare: no run has a training step in its metrics.jsonl; train the arms first")
    window = smoothing_window(longest)
    with matplotlib.rc_context(STYLE):
        figure = _figure(11.5, 4.9)
        training, held_out = figure.subplots(1, 2, sharey=True)
        for position, (arm, group) in enumerate(runs.items()):
            look = {
                "color": ARM_COLOURS[position % len(ARM_COLOURS)],
                "linestyle": ARM_LINES[position % len(ARM_LINES)],
                "label": arm_label(arm, group),
            }
            curves = [series(run.of("rl"), "accuracy") for run in group]
            _band(training, [(steps, trailing_mean(values, window)) for steps, values in curves], look)
            curves = [series(run.evals, "accuracy") for run in group]
            _band(held_out, curves, look, marker=ARM_MARKERS[position % len(ARM_MARKERS)])
        mean_of = f", mean of {window} steps" if window > 1 else ""
        _accuracy_axes(training, "Training accuracy", f"samples correct{mean_of}")
        _accuracy_axes(held_out, "Held-out accuracy", "problems solved")
        held_out.tick_params(labelleft=True)
        training.set_ylim(0, _accuracy_top(training, held_out))
        handles, labels = training.get_legend_handles_labels()
        columns = min(len(labels), 3)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3, fontsize=11)
        if any(len(group) > 1 for group in runs.values()):
            note = "line: mean over seeds;  band: lowest to highest seed"
            figure.suptitle(note, x=0.995, ha="right", fontsize=10, color=MUTED)
    return _save(figure, Path(out))


def arm_label(arm: str, runs: Sequence[RunRecord]) -> str:
    """Name, parameter count and number of seeds of an arm, as in a legend: "kda · 2.05 M parameters · 3 seeds"."""
    counts = {run.about["parameters"] for run in runs if run.about.get("parameters")}
    parts = [arm, *(f"{human_count(count)} parameters" for count in sorted(counts))]
    return " · ".join([*parts, f"{len(runs)} seed{'s' * (len(runs) != 1)}"])


def human_count(count: float) -> str:
    """Three significant digits with a unit: 2047360 is "2.05 M"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:g}"


def smoothing_window(steps: int) -> int:
    """Steps in the trailing mean of a noisy curve: a twentieth of the run, at most 10."""
    return max(1, min(10, steps // 20))


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values up to each position; the first ones average over what there is."""
    sums = [0.0, *accumulate(values)]
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]


@dataclass(frozen=True)
class Panel:
    """A picture of one quantity; `keys` under rows of `kind` are what it needs at least one number of."""

    name: str
    kind: str
    keys: tuple[str, ...]
    draw: Callable[[Axes, RunRecord], None]

    def has_data(self, run: RunRecord) -> bool:
        rows = run.evals if self.kind == "eval" else run.of(self.kind)
        return any(row.get(key) not in (None, {}) for row in rows for key in self.keys)


def _training_accuracy(axes: Axes, run: RunRecord) -> None:
    steps, values = series(run.of("rl"), "accuracy")
    window = smoothing_window(len(values))
    if window > 1:
        axes.plot(steps, values, color=BLUE, linewidth=1.0, alpha=0.4, label="each step")
    mark = "o" if len(values) == 1 else None
    axes.plot(steps, trailing_mean(values, window), color=BLUE, marker=mark, label=f"mean of {window} steps")
    _accuracy_axes(axes, "Training accuracy", "samples correct")
    if window > 1:
        axes.legend(loc="lower right")


def _held_out_accuracy(axes: Axes, run: RunRecord) -> None:
    rows = [row for row in run.evals if row.get("accuracy") is not None]
    steps, values = series(rows, "accuracy")
    errors = [row.get("stderr") or 0.0 for row in rows]
    axes.errorbar(steps, values, yerr=errors, color=GREEN, marker="o", markersize=6, capsize=4, elinewidth=1.4)
    rising = values[-1] >= values[0]
    for index, above in {0: not rising, len(rows) - 1: rising}.items():
        tip = values[index] + errors[index] * (1 if above else -1)
        axes.annotate(f"{values[index]:.1%}", (steps[index], tip), (0, 6 if above else -6), textcoords="offset points",
                      ha="center", va="bottom" if above else "top", fontweight="bold", color=INK)  # fmt: skip
    sizes = {row["n"] for row in rows if row.get("n")}
    problems = f"{min(sizes)} problems" if len(sizes) == 1 else "problems"
    _accuracy_axes(axes, "Held-out accuracy", f"{problems} solved (± 1 s.e.)")
    axes.margins(x=0.09)


def _response_length(axes: Axes, run: RunRecord) -> None:
    rows = run.of("rl")
    axes.plot(*series(rows, "length_max"), color=SKY, linewidth=1.2, label="longest")
    axes.plot(*series(rows, "length_mean"), color=BLUE, label="mean")
    axes.set_ylim(bottom=0)
    _describe(axes, "Response length", "tokens")
    axes.legend(loc="best", ncols=2)


def _entropy(axes: Axes, run: RunRecord) -> None:
    _line(axes, run.of("rl"), "entropy", PURPLE)
    axes.set_ylim(bottom=0)
    _describe(axes, "Entropy of the policy", "nats per token")


def _kl(axes: Axes, run: RunRecord) -> None:
    _line(axes, run.of("rl"), "kl", RED)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _describe(axes, "KL to the policy before RL", "nats per token (k3)")


def _logprob_gap(axes: Axes, run: RunRecord) -> None:
    rows = run.of("rl")
    for key, colour, width, label in (("logp_gap_max", ORANGE, 1.2, "largest"), ("logp_gap_mean", RED, 2.2, "mean")):
        steps, values = series(rows, key)
        drawable = [value if value > 0 else np.nan for value in values]
        axes.plot(steps, drawable, color=colour, linewidth=width, label=label)
    if any(np.nanmax(line.get_ydata(), initial=0.0) > 0 for line in axes.get_lines()):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.25)
    _describe(axes, "Logprob gap, trainer to engine", "|Δ log p| per token (nats)")
    axes.legend(loc="upper right", ncols=2)


def _time_per_phase(axes: Axes, run: RunRecord) -> None:
    rows = run.of("rl")
    _stacked(axes, rows, "time", PHASE_COLOURS, share=False)
    totals = np.array([sum(row["time"].values()) for row in rows if row.get("time")])
    usual = TIME_AXIS_MEDIANS * np.median(totals)
    if totals.max() > usual:  # compilation after a start or a resume
        axes.set_ylim(0, usual * (1.0 + 0.13 * 2))
        axes.text(0.02, 0.70, f"cut: longest step {totals.max():.0f} s", transform=axes.transAxes, fontsize=9)
    _describe(axes, "Time per step", "seconds")


def _verdicts(axes: Axes, run: RunRecord) -> None:
    _stacked(axes, run.of("rl"), "verdicts", STATUS_COLOURS, share=True)
    axes.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _describe(axes, "Verdicts", "share of samples")


def _sft_loss(axes: Axes, run: RunRecord) -> None:
    _line(axes, run.of("sft"), "loss", ORANGE)
    axes.set_ylim(bottom=0)
    _describe(axes, "SFT loss", "nats per token", x_label="SFT step")


PANELS = (
    Panel("sft_loss", "sft", ("loss",), _sft_loss),
    Panel("training_accuracy", "rl", ("accuracy",), _training_accuracy),
    Panel("held_out_accuracy", "eval", ("accuracy",), _held_out_accuracy),
    Panel("response_length", "rl", ("length_mean", "length_max"), _response_length),
    Panel("entropy", "rl", ("entropy",), _entropy),
    Panel("kl", "rl", ("kl",), _kl),
    Panel("logprob_gap", "rl", ("logp_gap_mean", "logp_gap_max"), _logprob_gap),
    Panel("time_per_phase", "rl", ("time",), _time_per_phase),
    Panel("verdicts", "rl", ("verdicts",), _verdicts),
)


def _overview(run: RunRecord, panels: Sequence[Panel]) -> Path:
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = _figure(4.6 * columns, 3.4 * rows)
        figure.get_layout_engine().set(w_pad=0.14, h_pad=0.14)
        for position, panel in enumerate(panels, start=1):
            panel.draw(figure.add_subplot(rows, columns, position), run)
    return _save(figure, run.folder / "overview.png")


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=150, facecolor="white")
    temporary.replace(path)
    return path


def _describe(axes: Axes, title: str, y_label: str, x_label: str = "RL step") -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))


def _accuracy_axes(axes: Axes, title: str, y_label: str) -> None:
    axes.set_ylim(0, _accuracy_top(axes))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _describe(axes, title, y_label)


def _accuracy_top(*panels: Axes) -> float:
    """Upper end of the accuracy axis: the highest line and a quarter of it as headroom, at most a little over 100 %."""
    highest = max((np.max(line.get_ydata()) for axes in panels for line in axes.get_lines()), default=1.0)
    return min(1.02, max(0.1, highest * 1.25))


def _line(axes: Axes, rows: Sequence[Row], key: str, colour: str) -> None:
    steps, values = series(rows, key)
    axes.plot(steps, values, color=colour, marker="o" if len(values) == 1 else None)


def _stacked(axes: Axes, rows: Sequence[Row], key: str, colours: Mapping[str, str], *, share: bool) -> None:
    """Bars per step with `row[key]` from the bottom up in the order of `colours`; long runs in bins of some steps."""
    rows = [row for row in rows if row.get(key)]
    names = [name for name in colours if any(row[key].get(name) for row in rows)]
    bins = np.array_split(np.arange(len(rows)), min(len(rows), 60))
    values = np.array([[row[key].get(name) or 0.0 for name in names] for row in rows])
    heights = np.array([values[chosen].mean(axis=0) for chosen in bins])
    if share:
        heights = heights / heights.sum(axis=1, keepdims=True).clip(min=1e-12)
    edges = [*(rows[chosen[0]]["step"] - 0.5 for chosen in bins), rows[-1]["step"] + 0.5]
    bottom = np.zeros(len(bins))
    for position, name in enumerate(names):
        top = bottom + heights[:, position]
        axes.stairs(top, edges, baseline=bottom, fill=True, color=colours[name], label=name)
        bottom = top
    axes.set_xlim(edges[0], edges[-1])
    legend_rows = -(-len(names) // 3)
    axes.set_ylim(0, bottom.max() * (1.06 + 0.13 * legend_rows))
    axes.legend(loc="upper center", ncols=3, handlelength=1, handleheight=1, columnspacing=1.2, borderaxespad=0.2)


def _band(axes: Axes, curves: Sequence[Curve], look: Mapping[str, str], marker: str = "") -> None:
    tables = [dict(zip(*curve, strict=True)) for curve in curves]
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    if not steps:
        return
    values = np.array([[table[step] for step in steps] for table in tables])
    if len(tables) > 1:
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.18, linewidth=0)
    axes.plot(steps, values.mean(axis=0), marker=marker, markersize=6, **look)
