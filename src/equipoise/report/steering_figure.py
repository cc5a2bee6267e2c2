"""Figures of accuracy and log-likelihood over the number that is added to the attention logits of the media."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .plot_style import ACCENT, MODALITY, MUTED, new_axes, percent, set_title, style_context, to_svg
from .text_format import MINUS


def steering_figures(rows: Sequence[Mapping[str, Any]], medium: str) -> list[tuple[str, str]]:
    """Returns SVG and caption of the curves: accuracy with the share of attention, and log-likelihood.

    Args:
        rows: ``QuestionResult.steering``.
        medium: "image", "audio" or "media".
    """
    figures = []
    curves = (("accuracy", "interval", "Accuracy"),
              ("log_likelihood", "log_likelihood_interval", "Log-likelihood of the right choice"))  # fmt: skip
    for name, interval, title in curves:
        known = [row for row in rows if row[name] is not None]
        if not known:
            continue
        betas, values = [row["beta"] for row in known], [row[name] for row in known]
        bounds = [row[interval] or [row[name], row[name]] for row in known]
        with style_context():
            figure, axes = new_axes(height=2.9)
            low, high = ([bound[side] for bound in bounds] for side in (0, 1))
            axes.fill_between(betas, low, high, color=MODALITY[0], alpha=0.18, linewidth=0)
            axes.plot(betas, values, color=MODALITY[0], marker="o", markersize=4, label=title.lower())
            if name == "accuracy":
                shares = [(row["beta"], row["attention_share"]) for row in rows if row["attention_share"] is not None]
                if shares:
                    label = f"share of attention on the {medium}"
                    axes.plot(*zip(*shares, strict=True), color=ACCENT, linestyle="--", label=label)
                axes.set(ylim=(0, 1.28))
                axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
                percent(axes.yaxis)
                axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=2, handlelength=1.8, columnspacing=1.1)
            else:
                axes.set(ylabel="nats per token")
            axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=":")
            axes.set_xticks(betas, [f"{beta:+g}".replace("-", MINUS) if beta else "0" for beta in betas])
            axes.set(xlabel=f"added to the attention logits of the {medium}")
            set_title(figure, title)
            listed = ", ".join(f"{beta:g}: {value:.3g}" for beta, value in zip(betas, values, strict=True))
            svg = to_svg(figure, f"steering-{name}", f"{title} by added number. {listed}.")
        best = max(known, key=lambda row: (row[name], row["beta"] == 0))
        where = "the questions as given" if best["beta"] == 0 else f"{best['beta']:+g}".replace("-", MINUS)
        shown = f"{100 * best[name]:.1f} %" if name == "accuracy" else f"{best[name]:.2f}".replace("-", MINUS)
        figures.append((svg, f"The highest value is {shown}, for {where}."))
    return figures
