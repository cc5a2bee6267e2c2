"""Results in the format of a comparison on AV digits, drawn from a fixed generator: for tests of figures and report."""

import numpy as np

from equipoise.report.results_view import ResultsView
from equipoise.results import result_rows

METHODS = ("audio", "image", "concat", "joint", "joint+rollingq")

# accuracy, accuracy with audio noise, with image noise, noise_attention_r, share of audio, AIR
LEVEL = {
    "audio": (0.40, 0.10, 0.40, None, None, None),
    "image": (0.65, 0.65, 0.10, None, None, None),
    "concat": (0.745, 0.60, 0.36, None, None, None),
    "joint": (0.648, 0.43, 0.38, -0.22, 0.79, 0.41),
    "joint+rollingq": (0.662, 0.545, 0.37, 0.52, 0.48, -0.06),
}


def fake_results(methods=METHODS, seeds=5, fold="A", epochs=15, history=True, rename=None):
    """Returns fake results; ``rename`` maps the name of a method to the stored one."""
    names = rename or {}
    runs = [_run(method, seed, fold, epochs if history else 0, names) for method in methods for seed in range(seeds)]
    protocol = {
        "data": "av_digits",
        "epochs": epochs,
        "methods": [names.get(m, m) for m in methods],
        "folds": [fold],
        "noise_modality": "audio",
        "optimizer": {"name": "AdamW", "lr": 1e-3},
    }
    return result_rows.build_results(runs, protocol)


def _run(method, seed, fold, epochs, names):
    accuracy, audio, image, r, share, air = LEVEL[method]
    # Methods with the same seed share a random offset, so that their results are correlated.
    luck = np.random.default_rng(seed).normal(0, 0.018)
    rng = np.random.default_rng([seed, len(method)])

    def near(level, spread=0.012):
        return float(np.clip(level + luck + rng.normal(0, spread), -1, 1))

    metrics = {"accuracy": near(accuracy), "accuracy_noise/audio": near(audio), "accuracy_noise/image": near(image)}
    run = {"method": names.get(method, method), "seed": seed, "fold": fold, "metrics": metrics}
    if share is not None:
        audio_share = near(share)
        metrics |= {"noise_attention_r": near(r, 0.05), "air": near(air, 0.03)}
        metrics["noise_attention_r_own"] = metrics["noise_attention_r"] / 2
        metrics |= {"share/audio": audio_share, "share/image": 0.97 - audio_share}
        run["shares"] = {"clean": _histogram(rng, 1 - share, 0.07), "noise": _histogram(rng, 1 - share + r / 4, 0.09)}
        run["keys"] = _keys(rng, air, "+" in method)
    metrics |= {"parameters": 105_000 + 9_000 * len(method), "flops": 3.1e6, "seconds_per_epoch": near(2.0, 0.1)}
    if epochs:
        run["history"] = [_epoch(rng, method, epoch, epochs, accuracy, share, air) for epoch in range(1, epochs + 1)]
    return run


def _epoch(rng, method, epoch, epochs, accuracy, share, air):
    way = 1 - np.exp(-epoch / 4)
    entry = {"epoch": epoch, "loss": float(2.3 - 1.6 * way + rng.normal(0, 0.02))}
    entry["val_accuracy"] = float(accuracy * way + rng.normal(0, 0.01))
    if share is not None:
        turned = "+" in method and epoch > 3
        audio = 0.5 + 0.3 * way + rng.normal(0, 0.015) if not turned else share + 0.08 * (epoch / epochs) - 0.13
        entry["share"] = {"audio": float(audio), "image": float(0.97 - audio)}
        entry["air"] = float((0.41 * way if not turned else air - 0.2 / epoch) + rng.normal(0, 0.02))
        entry["rotations"] = int("+" in method and epoch >= 3)
    return entry


def _histogram(rng, mean, spread, low=0.0, high=1.0):
    counts, edges = np.histogram(np.clip(rng.normal(mean, spread, 1000), low, high), bins=40, range=(low, high))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _keys(rng, air, rotated):
    def moment(gap):
        return {
            state: {
                name: {"cosine": _histogram(rng, mean, 0.09, -1.0, 1.0), "cosine_mean": mean, "cosine_std": 0.09,
                       "norm_mean": 6.1, "norm_std": 0.4}
                for name, mean in (("audio", gap / 2 - 0.15 * (state == "noise" and rotated)), ("image", -gap / 2))
            }
            for state in ("clean", "noise")
        }  # fmt: skip

    return {"before": moment(0.41), "after": moment(air)} if rotated else {"after": moment(air)}


def fake_run(method, seed, fold=None, history=(), **metrics):
    return {"method": method, "seed": seed, "fold": fold, "metrics": metrics, "history": list(history)}


def results_view(runs, **protocol):
    return ResultsView({"protocol": protocol, "runs": runs, "summary": []})


def fake_run_with_r(method, seed, destroyed, r=0.5):
    metrics = {"noise_attention_r": r, "share/audio": 0.5, "share/image": 0.5}
    return fake_run(method, seed, **metrics) | {"noise_modality": destroyed}
