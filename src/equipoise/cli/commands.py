"""The commands of the program."""

from __future__ import annotations

from .bench_command import bench, bench_parser
from .command_line import Command
from .compare_command import compare, compare_parser
from .data_command import data_parser, manage_data
from .demo_command import demo, demo_parser
from .diagnose_command import diagnose, diagnose_parser
from .evaluate_command import evaluate, evaluate_parser
from .look_command import look, look_parser
from .recipes_command import manage_recipes, recipes_parser
from .report_command import report, report_parser
from .search_command import search, search_parser
from .train_command import train, train_parser

COMMANDS = {
    "demo": Command("bundled data, a few minutes -> table and report.html", demo_parser, demo),
    "compare": Command("methods x seeds x folds, with paired statistics", compare_parser, compare),
    "train": Command("one method, with checkpoints and --resume", train_parser, train),
    "bench": Command("what a run would cost: parameters, FLOPs, memory, time", bench_parser, bench),
    "diagnose": Command("trained runs -> verdicts, diagnosis.json and report.html", diagnose_parser, diagnose),
    "look": Command("a Hugging Face model and an image -> attention, look.json, report.html", look_parser, look),
    "evaluate": Command(
        "a pretrained model on emoji, scenes or your questions -> retrieval, answers, use of the image",
        evaluate_parser,
        evaluate,
    ),
    "search": Command("text -> images or image -> texts, in a trained dual encoder", search_parser, search),
    "report": Command("results.json -> one self-contained HTML page", report_parser, report),
    "data": Command("list, prepare and verify published data sets", data_parser, manage_data),
    "recipes": Command("list or copy the packaged recipes", recipes_parser, manage_recipes),
}
