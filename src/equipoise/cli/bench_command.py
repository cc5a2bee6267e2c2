"""``equipoise bench``: what a run would cost, from its first steps."""

from __future__ import annotations

import json
from argparse import Namespace
from datetime import timedelta
from typing import TYPE_CHECKING

from ..io.atomic_files import atomic_write, check_file
from .command_line import Parser, described, path, whole, with_recipe_options
from .data_options import add_data_options, chosen_recipe

if TYPE_CHECKING:
    from ..training.run_cost import RunCost

UNITS = ("", "k", "M", "G", "T", "P", "E")


def bench_parser() -> Parser:
    parser = described(
        "Trains the first steps of a run and prints what the whole run would cost: parameters, FLOPs, memory and time. "
        "Nothing is kept. The options are those of train.",
        "equipoise bench --config digits --method joint+rollingq",
        "equipoise bench --config av_digits --method concat+mmpareto --train.batch_size 256",
        "equipoise bench --data people.csv --target label --steps 50",
        "equipoise bench --config cremad --accelerator gpu --out cost.json",
    )
    add_data_options(parser)
    parser.add_argument("--method", default=None, help="by default the last one of the recipe")
    parser.add_argument("--fold", default=None, help="fold of the data set; by default the first one of the recipe")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--steps", type=whole, default=20, help="optimizer steps to time")
    parser.add_argument("--accelerator", default="auto", help="accelerator of Lightning: auto, cpu, gpu; one device")
    parser.add_argument("--out", type=path, default=None, help="also write the figures to this JSON file")
    return with_recipe_options(parser)


def bench(options: Namespace) -> int:
    from ..training.run_cost import predict_cost
    from ..training.run_spec import RunSpec
    from .console import out

    if options.out is not None:
        check_file(options.out, "bench --out")
    recipe, title = chosen_recipe(options)
    fold = options.fold or (recipe.folds[0] if recipe.folds else None)
    job = RunSpec(recipe, options.method or recipe.methods[-1], options.seed, fold)
    with out.status("training the first steps"):
        cost = predict_cost(job, steps=options.steps, trainer_options={"accelerator": options.accelerator})
    for name, value in cost_lines(cost, title):
        out.print(f"{name:<22}{value}", soft_wrap=True, highlight=False, markup=False)
    if options.out is not None:
        atomic_write(options.out, json.dumps(cost.to_dict(), indent=1))
    return 0


def cost_lines(cost: RunCost, title: str) -> list[tuple[str, str]]:
    """Returns (name, value) of each line that ``bench`` prints."""
    frozen = cost.parameters - cost.trained_parameters
    lines = [
        ("run", f"{cost.method} on {title}, device {cost.device}"),
        ("parameters", f"{cost.parameters:,}" + (f", {frozen:,} of them frozen" if frozen else "")),
        ("steps", f"{cost.steps:,} of {cost.batch_size} samples ({cost.epochs} epochs of {cost.samples:,} samples)"),
        ("FLOPs per step", f"{scaled(cost.flops_per_step)}FLOP, forward and backward"),
        (f"time of {cost.measured_steps} steps", f"{cost.measured_seconds:.2f} s"),
        ("peak memory", f"{cost.process_bytes / 2**20:,.0f} MiB of the process"
         + (f", {cost.device_bytes / 2**20:,.0f} MiB on the device" if cost.device_bytes is not None else "")),
    ]  # fmt: skip
    if cost.teachers:
        names = ", ".join(teacher.method for teacher in cost.teachers)
        seconds = sum(teacher.seconds for teacher in cost.teachers)
        lines.append(("teachers", f"{names}, trained before, {duration(seconds)}"))
    lines += [
        ("predicted FLOPs", f"{scaled(cost.flops)}FLOP"),
        ("predicted time", f"{duration(cost.seconds)}: training {duration(cost.training_seconds)}, validation "
         f"{duration(cost.validation_seconds)}, test {duration(cost.evaluation_seconds)}"),
    ]  # fmt: skip
    return lines


def scaled(value: float) -> str:
    """Returns a number with a prefix of the SI, and a space.

    Example:
        >>> scaled(12_345_678)
        '12.3 M'
    """
    power = 0
    while value >= 1000 and power < len(UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {UNITS[power]}"


def duration(seconds: float) -> str:
    """Returns a duration: seconds below two minutes, else hours, minutes and seconds.

    Example:
        >>> duration(3.21), duration(3661)
        ('3.2 s', '1:01:01')
    """
    return f"{seconds:.1f} s" if seconds < 120 else str(timedelta(seconds=round(seconds)))
