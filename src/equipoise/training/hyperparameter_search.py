"""Searches options of a method with Optuna: choice on the validation split, one evaluation on the test split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..errors import ConfigError, require_extra
from ..io.atomic_files import atomic_write, check_folder
from ..results import ComparisonResults, result_rows
from .comparison import exclusive_folder, run_protocol
from .method_study import MethodStudy, TrialListener
from .recipes import Recipe, dump_recipe
from .run import single_thread
from .search_space import WHO, SearchedOption

FOLDER = "search"
"""Folder of the studies, in the output folder."""


def search(
    recipe: Recipe,
    names: Sequence[str],
    options: Sequence[SearchedOption],
    *,
    trials: int,
    out: Path,
    seed: int = 0,
    fold: str | None = None,
    title: str = "",
    accelerator: str = "cpu",
    listener: TrialListener | None = None,
) -> ComparisonResults:
    """Searches options of each method, and evaluates the best trial of each on the test split, once.

    Options are drawn by Optuna's TPE sampler; a trial is pruned after an epoch if its validation metric is worse than
    the median of earlier trials at this epoch. The trial with the best metric on the validation split after the last
    epoch is chosen; no other trial is evaluated on the test split. All trials have the same seed.

    The study of a method is the file ``search/METHOD/study.journal``; a call with the same arguments resumes it, with
    the interrupted trial at its last complete epoch. Each random choice depends on the seed, the number of the trial
    and the option only, so that the result is that of a search without interruption. ``trials`` may be larger than
    before.

    Args:
        recipe: recipe of all trials.
        names: methods.
        options: options to search; those without effect on a method are left out for it.
        trials: trials of each method.
        out: output folder: ``results.json`` with the best trial of each method, ``best/METHOD.yaml``, and in
            ``search/METHOD`` the study, ``trials.csv`` and the folder of the best trial.
        seed: seed of the trials and of the search.
        fold: fold of the data.
        title: name of the recipe in the protocol of ``results.json``.
        accelerator: accelerator of Lightning.
        listener: called after each trial.

    Raises:
        ConfigError: an unknown option or method, no option with an effect on a method, a method that needs teachers,
            another search in the folder, or no trial without error. MissingExtraError: Optuna is not installed.
    """
    with require_extra(WHO):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if trials < 1:
        raise ConfigError(WHO, expected="trials >= 1", got=f"{trials}")
    check_folder(out, "compare")
    studies = [
        MethodStudy(recipe, name, options, seed, fold, accelerator, out / FOLDER) for name in dict.fromkeys(names)
    ]
    runs, best = [], {}
    with exclusive_folder(out), single_thread():
        for study in studies:
            runs.append(study.run(trials, listener))
            best[study.method] = study.best_options
            atomic_write(out / "best" / f"{study.method}.yaml", dump_recipe(study.best.recipe))
        plan = [study.best for study in studies]
        protocol = run_protocol(recipe, plan, title) | {
            "search": {option.name: asdict(option) for option in options},
            "trials": trials,
            "best": best,
            "selection": f"best of {trials} trials by {studies[0].metric} of the last epoch; "
            "the test split was evaluated once, for the best trial of each method",
        }
        content = result_rows.build_results(runs, protocol)
        content["failures"], content["complete"] = [], True
        result_rows.write_results(out / "results.json", content)
        content.write_csv(out / "results.csv")
    return content
