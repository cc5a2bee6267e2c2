"""Plain sentences that say what the numbers say, and how sure they are: the verdict and one text a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np

from .readings import Readings
from .wording import amount, called, change, counted, is_fraction, listed, probability, signed, title, with_spread

SURE = 0.05
"""Two-sided p below which a difference is called one; a convention, and said as such on the page."""


def verdict(readings: Readings) -> list[str]:
    """What the comparison shows, most important first; always at least one sentence.

    Example:
        >>> runs = [{"method": "joint", "seed": seed, "fold": None, "metrics": {"accuracy": 0.5}} for seed in (0, 1)]
        >>> verdict(Readings({"protocol": {}, "runs": runs, "summary": []}))
        ['joint has an accuracy of 50.0 ± 0.0 %, 2 seeds.']
    """
    if not readings.runs:
        return ["No run has finished yet, so there is nothing to say."]
    once = bool(readings.rows) and all(row["n"] < 2 for row in readings.rows.values())
    said = [f"Every method was run on one {readings.unit} only, so any difference below may be luck."] if once else []
    for method in readings.dynamic:
        reference = _reference(readings, method)
        said.append(_eyesight(readings, method))
        if reference is not None and "+" in method:
            said.append(_effects(readings, method, reference))
    said = [sentence for sentence in [*said, *_contest(readings)] if sentence]
    return said or ["No figure is defined for any run, so there is nothing to say."]


def notices(results: Mapping[str, Any]) -> list[str]:
    """What keeps the comparison from being whole: runs that are still to come, and runs that failed.

    Example:
        >>> notices({"complete": False, "runs": []})
        ['Not all planned runs are in yet: the figures may still change.']
    """
    failures = results.get("failures") or []
    said = [
        f"{run.get('method')}, seed {run.get('seed')}" + (f", fold {run['fold']}" if run.get("fold") else "")
        + f" failed and is missing below: {run.get('error')}"
        for run in failures
    ]  # fmt: skip
    if results.get("complete") is False and not failures:
        said.append("Not all planned runs are in yet: the figures may still change.")
    return said


def headline(readings: Readings) -> str:
    """The page's title in a few words, no stronger than its evidence."""
    for method in readings.dynamic:
        row = readings.row(method, "noise_attention_r")
        if "+" in method and row and row["difference"] is not None:
            base = row.get("reference") or "its reference"
            if not _sure(row):
                return f"Whether {method} looks at quality more than {base} is open"
            if max(row["mean"], row["mean"] - row["difference"]) < 0.1:
                return f"Neither {method} nor {base} looks at quality"
            return f"{method} looks at quality {'more' if row['difference'] > 0 else 'less'} than {base}"
    names = readings.methods
    return f"{listed(names)} compared" if len(names) > 1 else f"{names[0]} alone" if names else "No run yet"


def _eyesight(readings: Readings, method: str) -> str:
    """Does attention leave a destroyed modality?"""
    row = readings.row(method, "noise_attention_r")
    if row is None:
        return ""
    r, away = row["mean"], readings.disturbed(method) or "a modality"
    low, high = _interval(row)
    if row["n"] > 1 and low <= 0 <= high:
        claim = f"cannot be said to look at quality: replacing {away} by noise has no steady effect on attention"
    elif abs(r) < 0.1:
        claim = f"does not look at quality: replacing {away} by noise hardly changes attention"
    elif r < 0:
        claim = f"does not look at quality: with {away} replaced by noise, attention moves towards it"
    else:
        much = "looks at quality" if r >= 0.5 else "looks at quality, but weakly"
        claim = f"{much}: with {away} replaced by noise, attention leaves it"
    return f"{method} {claim} ({_spread(readings, row, 'r = ')})."


def _effects(readings: Readings, method: str, reference: str) -> str:
    """What a balancer changed, metric by metric."""
    disturbed = readings.noise_modality
    score, words = readings.score, called(readings.score)
    wanted = {"noise_attention_r": "r", score: words}
    if disturbed:
        wanted[f"{score}_noise/{disturbed}"] = f"{words} with {disturbed} destroyed"
    parts = [text for metric, words in wanted.items() if (text := _effect(readings, method, metric, words))]
    own, its = (readings.row(m, "noise_attention_r") for m in (method, reference))
    if own and its and own["difference"] is None:
        parts.append("r is not compared, since no pair of runs destroyed the same modality")
    return f"Compared with {reference}, {method}: {'; '.join(parts)}." if parts else ""


def _effect(readings: Readings, method: str, metric: str, words: str) -> str:
    row = readings.row(method, metric)
    if row is None or row["difference"] is None:
        return ""
    pairs = readings.pairs(method, row.get("reference"), metric)
    if pairs:
        after, before = (fmean(side) for side in zip(*pairs, strict=True))
    else:
        after, before = row["mean"], row["mean"] - row["difference"]
    course = f"from {amount(metric, before)} to {amount(metric, after)}"
    proof = _proof(readings, row)
    if after == before:
        return f"{words} stays at {amount(metric, after)}"
    if row.get("pairs", row["n"]) < 2:
        return f"{words} goes {course} ({proof})"
    if row["p"] is not None and not _sure(row):
        return f"{words} goes {course}, a change that chance alone could bring ({proof})"
    return f"{words} {'rises' if after > before else 'falls'} {course} ({proof})"


def _proof(readings: Readings, row: Mapping[str, Any]) -> str:
    """How many pairs agree, and the p-value where there is one."""
    differences = readings.differences(row["method"], row.get("reference"), row["metric"])
    parts = [change(row["metric"], row["difference"])]
    if row.get("pairs", row["n"]) < 2:
        return f"{parts[0]}, one {readings.unit} only"
    if differences:
        agree = sum(d * row["difference"] > 0 for d in differences)
        parts.append(f"on {agree} of {counted(len(differences), readings.unit)}")
    if row["p"] is not None:
        parts.append(probability(row["p"]))
    return ", ".join(parts)


def _contest(readings: Readings) -> list[str]:
    """The golden rule: no fusion below its best single modality; and who is ahead."""
    score, words = readings.score, called(readings.score)
    means = {m: row["mean"] for m in readings.methods if (row := readings.row(m, score))}
    fusions = [m for m in means if m not in readings.single]
    singles = [m for m in means if m in readings.single]
    said = []
    if len(means) > 1:
        best = max(means, key=lambda m: means[m])
        said.append(f"{best} has the highest mean {words}: {_mean(readings, best)}.")
    elif means:
        alone, article = next(iter(means)), "an" if words[0] in "aeiou" else "a"
        said.append(f"{alone} has {article} {words} of {_mean(readings, alone)}.")
    if singles and fusions:
        best = max(singles, key=lambda m: means[m])
        below = [f"{m} ({amount(score, means[m])})" for m in fusions if means[m] < means[best]]
        rule = f"The best single modality is {best} with {_mean(readings, best)}"
        said.append(f"{rule}; below it: {listed(below)}." if below else f"{rule}; no fusion is below it.")
    return said


def scores_text(readings: Readings, metric: str) -> str:
    """What ``figures.scores`` shows."""
    means = {m: fmean(values) for m in readings.methods if (values := readings.values(m, metric))}
    ranked = sorted(means, key=lambda m: -means[m])
    order = listed([f"{m} {amount(metric, means[m])}" for m in ranked])
    return f"{title(metric)}: {order}."


def share_text(readings: Readings, method: str) -> str:
    """What ``figures.attention_share`` shows."""
    curves = {name: readings.curve(method, "share", name) for name in readings.modalities}
    moves = [
        f"{name} goes from {100 * curve.mean[0]:.0f} % (epoch {curve.epochs[0]}) "
        f"to {100 * curve.mean[-1]:.0f} % (epoch {curve.epochs[-1]})"
        for name, curve in curves.items()
        if curve is not None
    ]
    turned, runs = readings.rotation_epochs(method), len(readings.of(method))
    text = f"Attention in {method}: {listed(moves)}."
    if turned:
        when = listed([f"{epoch} (in {n} of {counted(runs, 'run')})" for epoch, n in sorted(turned.items())])
        text += f" Dotted: the query was rotated after epoch {when}."
    elif readings.curve(method, "rotations") is not None and "+" in method:
        text += " The query was never rotated."
    return text


def noise_text(readings: Readings, method: str) -> str:
    """What ``figures.share_on_noise`` shows."""
    clean, noise = (readings.histogram(method, "shares", state) for state in ("clean", "noise"))
    if clean is None or noise is None:
        return ""
    away = readings.disturbed(method) or "the modality"
    row = readings.row(method, "noise_attention_r")
    if abs(noise.mean - clean.mean) < 0.02:
        moral = f"attention hardly notices that {away} is gone"
    else:
        moral = f"attention {'leaves' if noise.mean > clean.mean else 'moves towards'} the destroyed {away}"
    spread = "" if row is None else f" ({_spread(readings, row, 'r = ')})"
    return (
        f"{method}: about {100 * clean.mean:.0f} % of attention goes elsewhere while {away} is whole, and "
        f"{100 * noise.mean:.0f} % once it is noise: {moral}{spread}."
    )


def keys_text(readings: Readings, method: str, moment: str) -> str:
    """What ``figures.key_cosines`` shows."""
    parts = {name: readings.histogram(method, "keys", moment, "clean", name, "cosine") for name in readings.modalities}
    means = {name: part.mean for name, part in parts.items() if part is not None}
    ahead = max(means, key=lambda name: means[name])
    when = "just before the first rotation" if moment == "before" else "at the end of training"
    gap = max(means.values()) - min(means.values())
    text = f"{method}, {when}: the query stands closest to the keys of {ahead}; mean cosines "
    text += f"{listed([f'{name} {signed(mean)}' for name, mean in means.items()])}, {gap:.2f} apart."
    disturbed = readings.replaced(method, moment) or ""
    noise = readings.histogram(method, "keys", moment, "noise", disturbed, "cosine")
    if noise is not None and disturbed in means:
        text += f" As noise, {disturbed} stands at {signed(noise.mean)} ({signed(noise.mean - means[disturbed])})."
    return text


def imbalance_text(readings: Readings) -> str:
    """What ``figures.imbalance`` shows."""
    curves = {method: readings.curve(method, "air") for method in readings.dynamic}
    parts = []
    for method, curve in curves.items():
        if curve is not None:
            peak = int(np.nanargmax(np.abs(curve.mean)))
            widest = f"{signed(curve.mean[peak])} at epoch {curve.epochs[peak]}"
            parts.append(f"{method} ends at {signed(curve.mean[-1])} (furthest from zero: {widest})")
    meaning = "The attention imbalance rate tells how much closer the query stands to one modality's keys; 0 is even."
    return f"{meaning} {'. '.join(parts)}."


def rotations_text(readings: Readings) -> str:
    """What ``figures.rotations`` shows."""
    curves = {method: readings.curve(method, "rotations") for method in readings.dynamic}
    ends = {method: curve.mean[-1] for method, curve in curves.items() if curve is not None}
    counts = [f"{method} {mean:.3g}" for method, mean in ends.items() if mean > 0]
    return f"Rotations of the query in all, mean over runs: {listed(counts)}."


def differences_text(readings: Readings, metric: str) -> str:
    """What ``figures.paired_differences`` shows."""
    rows = [row for m in readings.methods if (row := readings.row(m, metric)) and row["difference"] is not None]
    told = [f"{r['method']} against {r.get('reference')}: {_proof(readings, r)}" for r in rows]
    return f"{'; '.join(told)}."


def _reference(readings: Readings, method: str) -> str | None:
    names = [row.get("reference") for (m, _), row in readings.rows.items() if m == method]
    return next((name for name in names if name), None)


def _sure(row: Mapping[str, Any]) -> bool:
    return row["p"] is not None and row["p"] < SURE


def _mean(readings: Readings, method: str) -> str:
    row = readings.rows[method, readings.score]
    return _spread(readings, row, "")


def _spread(readings: Readings, row: Mapping[str, Any], prefix: str) -> str:
    metric = row["metric"]
    sd = row["sd"] if row["n"] > 1 else None
    text = prefix + with_spread(metric, row["mean"], sd) + (" %" if is_fraction(metric) else "")
    return text if sd is None else f"{text}, {counted(row['n'], readings.unit)}"


def _interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """95 % interval of a mean; the mean itself where there is one run."""
    if row["n"] < 2 or not row["sd"]:
        return row["mean"], row["mean"]
    from scipy import stats

    reach = float(stats.t.ppf(0.975, row["n"] - 1)) * row["sd"] / math.sqrt(row["n"])
    return row["mean"] - reach, row["mean"] + reach
