"""Damaged files and random command lines, seeded; as a script it prints the outcomes by kind.

``python tests/helpers/fuzzing.py 500`` damages 500 files and runs 500 command lines.
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
import warnings
import wave
from collections import Counter
from pathlib import Path

import yaml
from PIL import Image

from equipoise.cli import run
from equipoise.data import load_dataset as load_data
from equipoise.data.sets.spoken_digits_files import read_wav
from equipoise.diagnostics.suite import Diagnosis
from equipoise.errors import EquipoiseError
from equipoise.training import compare, load, recipes
from equipoise.training.comparison import check_runs, plan_runs
from helpers.runs import recipe, write_recipe
from helpers.search import build_dual_encoder, write_run

os.environ["EQUIPOISE_TRACEBACK"] = "1"
RESULTS = ("ok", "told", "usage")


def nested_json(levels=3000):
    return "[" * levels + "]" * levels


class Damage:
    """Ways to damage a file; each takes the random generator and the path."""

    def truncate(self, rng, path):
        full = path.read_bytes()
        path.write_bytes(full[: rng.randrange(len(full) + 1)])

    def empty(self, rng, path):
        path.write_bytes(b"")

    def flip(self, rng, path):
        content = bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 3, 40))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    def header(self, rng, path):
        content = bytearray(path.read_bytes())
        for _ in range(3):
            content[rng.randrange(min(len(content), 200))] = rng.randrange(256)
        path.write_bytes(content)

    def zeros(self, rng, path):
        content = bytearray(path.read_bytes())
        start = rng.randrange(len(content))
        size = min(rng.choice((4, 300)), len(content) - start)
        content[start : start + size] = bytes(size)
        path.write_bytes(content)

    def noise(self, rng, path):
        path.write_bytes(rng.randbytes(rng.choice((1, 100, 5000))))

    def append(self, rng, path):
        path.write_bytes(path.read_bytes() + rng.choice((b"\0" * 50, b"\xff\xfe", b"}\n{", b"a: 1\na: 2\n")))

    def folder(self, rng, path):
        path.unlink()
        path.mkdir()

    def link(self, rng, path):
        path.unlink()
        path.symlink_to(rng.choice(("nowhere", path.name)))


WRONG = (
    None, True, -1, 0, 7, 2.5, 10**30, -(10**30), float("nan"), float("inf"), "", "x", "../../x", "/x", "\ud800", "[]",
    "$(id)", [], [1], [[]], {}, {"class_path": "this.x"}, {"name": "digits"}, "joint", "1e-3", "a\nb", "\x00",
)  # fmt: skip
"""Values of a wrong type, or invalid values of the right type."""


def nodes(content, where=()):
    yield where
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in parts:
        yield from nodes(value, (*where, key))


def changed(rng, content):
    """Returns the content with one part replaced, removed, renamed or added."""
    index = rng.choice(list(nodes(content)))
    if not index:
        return rng.choice(WRONG)
    parent = content
    for key in index[:-1]:
        parent = parent[key]
    way = rng.choice(("replace", "replace", "replace", "remove", "rename", "add"))
    if way == "remove":
        del parent[index[-1]]
    elif way == "rename" and isinstance(parent, dict):
        parent[rng.choice(("x", "", "class_path", "../x", "__class__", 3))] = parent.pop(index[-1])
    elif way == "add" and isinstance(parent, dict):
        parent[rng.choice(("x", "class_path", "name", "init_args"))] = rng.choice(WRONG)
    else:
        parent[index[-1]] = rng.choice(WRONG)
    return content


class JsonDamage(Damage):
    def structure(self, rng, path):
        content = changed(rng, json.loads(path.read_text()))
        path.write_text(json.dumps(content))

    structure2 = structure3 = structure4 = structure5 = structure6 = structure

    def nest(self, rng, path):
        path.write_text(nested_json(rng.choice((50, 100_000))))

    def huge(self, rng, path):
        path.write_text(path.read_text().replace("0", "9" * 5000, 1))


class YamlDamage(Damage):
    def structure(self, rng, path):
        text = yaml.safe_dump(changed(rng, yaml.safe_load(path.read_text())))
        path.write_text(text, encoding="utf-8", errors="surrogatepass")

    structure2 = structure3 = structure4 = structure5 = structure6 = structure7 = structure8 = structure

    def nest(self, rng, path):
        path.write_text(f"data: {nested_json(rng.choice((50, 3000)))}\n" + path.read_text().replace("data:", "data_:"))

    def bomb(self, rng, path):
        lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
        path.write_text("\n".join(lines) + "\ndata: {name: digits, audio_noise: *a9}\n")

    def cycle(self, rng, path):
        path.write_text("data: &d {name: digits, audio_noise: *d}\nencoders: {}\n")

    def twice(self, rng, path):
        text = path.read_text()
        path.write_text(text + rng.choice(text.splitlines(keepends=True)))

    def tag(self, rng, path):
        tag = rng.choice(("!!python/name:this.x", "!!python/object/apply:os.getcwd []", "!!binary eA==", "2020-01-01"))
        path.write_text(path.read_text().replace("seeds: 1", f"seeds: {tag}"))

    def huge(self, rng, path):
        path.write_text(path.read_text().replace("seeds: 1", "seeds: " + "9" * 5000))


def damage_names(kind):
    return [name for name in dir(kind) if not name.startswith("_")]


class World:
    """A folder with a small valid file of each kind."""

    def __init__(self, folder):
        self.folder = folder
        with suppress_output():
            self.config = Path(write_recipe(folder / "r.yaml", recipe(epochs=1)))
            train = ["train", "--config", str(self.config), "--method", "joint", "--accelerator", "cpu"]
            assert run([*train, "--out", str(folder / "train")]) == 0
            content = compare(recipe(epochs=1), ["audio", "joint"], seeds=1, out=folder / "compare", workers=0)
            assert content["complete"]
            trained = str(folder / "train")
            assert run(["diagnose", trained, "--tests", "cost,noise", "--out", str(folder / "diagnosis")]) == 0
        write_run(folder / "emoji", build_dual_encoder())
        Image.fromarray(load_data("emoji").pictures[3].numpy()).save(folder / "a.png")
        with wave.open(str(folder / "a.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(bytes(range(200)))


@contextlib.contextmanager
def suppress_output():
    streams = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        warnings.simplefilter("ignore")
        yield streams


def outcome(action):
    """Returns "ok", "told", "usage", or the unexpected error and its location."""
    with suppress_output() as (message, errors):
        try:
            status = action()
        except OSError as error:
            # Errors that the program reports in one sentence; functions may raise them if they name the file.
            return "told" if error.filename else "OSError without a file"
        except EquipoiseError as error:
            return "told" if len(str(error)) < 2000 else f"a message of {len(str(error))} characters"
        except SystemExit as left:
            status = left.code
        except (Exception, KeyboardInterrupt) as error:
            ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/equipoise/" in frame.filename]
            index = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "outside"
            return f"{type(error).__name__} in {index}"
    messages = errors.getvalue().strip()
    if "Traceback" in messages + message.getvalue():
        return "a traceback is printed"
    if status in (None, 0):
        return "ok"
    if status == 2:
        return "usage" if "error:" in messages else "status 2 without a word"
    if status != 1:
        return f"status {status}"
    return (
        "told"
        if messages.startswith("equipoise: ") and len(messages.splitlines()) <= 3
        else "status 1 without a sentence"
    )


def damaged(world, seed):
    """Returns (kind of file, damage, outcome) for one damaged file."""
    rng = random.Random(seed)
    subject = rng.choices(list(SUBJECTS), [weight for _, weight in SUBJECTS.values()])[0]
    act, _ = SUBJECTS[subject]
    kind = YamlDamage if subject.endswith("yaml") else JsonDamage if subject.endswith("json") else Damage
    way = rng.choice(damage_names(kind))
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        action = act(world, here, lambda path: getattr(kind(), way)(rng, path))
        return subject, way.rstrip("0123456789"), outcome(action)


def copied(world, name, here):
    target = here / name
    (shutil.copytree if (world.folder / name).is_dir() else shutil.copy)(world.folder / name, target)
    return target


def a_recipe(world, here, damage):
    path = copied(world, "r.yaml", here)
    damage(path)

    def act():
        config = recipes.load_recipe(path)
        check_runs(plan_runs(config, config.methods, config.seeds, config.folds), "cpu")

    return act


def recipe_again(world, here, damage):
    path, out = copied(world, "r.yaml", here), copied(world, "train", here)
    damage(path)
    return lambda: run(["train", "--config", str(path), "--method", "joint", "--accelerator", "cpu", "--resume",
                        "--out", str(out)])  # fmt: skip


def part_of_run(part, command):
    def prepared(world, here, damage):
        out = copied(world, "train", here)
        damage(out / part)
        commands = {
            "load": lambda: load(out) and 0,
            "diagnose": lambda: run(["diagnose", str(out), "--tests", "cost", "--out", str(here / "d")]),
            "report": lambda: run(["report", str(out), "--out", str(here / "page.html")]),
        }
        return commands[command]

    return prepared


def checkpoint(world, here, damage):
    out = copied(world, "train", here)
    (out / "run.json").unlink()
    damage(out / "checkpoints" / "last.ckpt")
    return lambda: run(["train", "--config", str(world.config), "--method", "joint", "--accelerator", "cpu",
                        "--resume", "--out", str(out)])  # fmt: skip


def compared(part):
    def prepared(world, here, damage):
        out = copied(world, "compare", here)
        damage(out / part)
        return lambda: run(["compare", "--config", str(world.config), "--methods", "audio,joint", "--out", str(out),
                            "--workers", "0"])  # fmt: skip

    return prepared


def diagnosis(world, here, damage):
    out = copied(world, "diagnosis", here)
    damage(out / "diagnosis.json")
    return lambda: Diagnosis.load(out).report(here / "page.html") and 0


def searched(part, *words):
    def prepared(world, here, damage):
        out = copied(world, "emoji", here)
        if part == "search.safetensors":
            with suppress_output():
                run(["search", "--model", str(out), "dog"])
        damage(out / part)
        return lambda: run(["search", "--model", str(out), "dog", "--html", str(here / "p.html")])

    return prepared


def picture(world, here, damage):
    path = copied(world, "a.png", here)
    damage(path)
    return lambda: run(["search", "--model", str(world.folder / "emoji"), "--image", str(path)])


def sound(world, here, damage):
    path = copied(world, "a.wav", here)
    damage(path)
    return lambda: read_wav(path) is None


SUBJECTS = {
    "recipe.yaml": (a_recipe, 8), "resumed with another recipe.yaml": (recipe_again, 2),
    "run.json": (part_of_run("run.json", "diagnose"), 4), "loaded run.json": (part_of_run("run.json", "load"), 4),
    "a run's recipe.yaml": (part_of_run("recipe.yaml", "load"), 4),
    "a diagnosed run's recipe.yaml": (part_of_run("recipe.yaml", "diagnose"), 2),
    "model.safetensors": (part_of_run("model.safetensors", "load"), 4),
    "results.json": (part_of_run("results.json", "report"), 8), "last.ckpt": (checkpoint, 3),
    "a compared run.json": (compared("runs/all/joint/seed0/run.json"), 2),
    "a compared results.json": (compared("results.json"), 1), "diagnosis.json": (diagnosis, 5),
    "a searched run.json": (searched("run.json"), 2), "searched weights": (searched("model.safetensors"), 1),
    "search.safetensors": (searched("search.safetensors"), 1), "picture": (picture, 3), "sound": (sound, 3),
}  # fmt: skip
"""Kind of file -> function that uses it, and number of cases."""


VALUES = ("", "-1", "0", "2", "x", "1e400", "nan", "null", "[]", "{}", "{a: {b: 1}}", "[1", "{class_path: this.x}",
          "../x", "\udcff", "é", "a\nb", "joint", "audio", "9" * 5000, "&a *a", "!!python/name:os.x", "--",
          "%d")  # fmt: skip
RECIPE = (
    "--train.learning_rate", "--train.clip", "--train", "--data.audio_noise", "--data", "--data.name", "--encoders",
    "--encoders.audio", "--encoders.audio.dim", "--encoders.audio.x.y", "--fusions.joint.depth", "--fusions",
    "--balancers.rollingq.rho", "--model", "--model.name", "--variants.x.y", "--noise_modality", "--reference",
    "--train.x", "--train.precision", "--train.batch_size", "--train.optimizer", "--train.warmup",
    "--fusions.deep.train",
)  # fmt: skip
ANY = ("--x", "-h", "--version", "--encoders..dim", "--encoders.", "--data.", "--=", "--train=", "--seeds", "--out")
OWN = {
    "compare": (*RECIPE, *RECIPE, "--seeds", "--methods", "--folds", "--accelerator", "--workers"),
    "train": (*RECIPE, *RECIPE, "--seed", "--method", "--fold", "--resume", "--devices", "--strategy", "--num_nodes"),
    "diagnose": ("--tests", "--outside", "--modality", "--seed"),
    "search": ("--top", "--html", "--image", "--images", "--model"),
    "look": ("--image", "--audio", "--exclude_top_k", "--layers", "--dtype", "--device", "--answer", "--random"),
    "evaluate": ("--data", "--level", "--split", "--samples", "--template", "--dtype"),
}
"""Options of each command, and unknown options."""


def random_line(world, rng, here):
    """Returns a command line of a short run that writes only into the folder ``here``."""
    (here / "file").write_text("x")
    (here / "dangling").symlink_to(here / "nowhere")
    places = [here / "o", here / "file", here / "dangling", Path("/dev/null"), here / "file" / "x", here / "\udcff"]
    command = rng.choice(("compare", "compare", "train", "train", "diagnose", "search", "report", "recipes", "look",
                           "evaluate", "demo", "x", "--config", ""))  # fmt: skip
    words = {
        "compare": ["--config", str(world.config), "--workers", rng.choice(("0", "0", "0", "-1", "x"))],
        "train": ["--config", str(world.config), "--accelerator", "cpu"],
        "diagnose": [str(rng.choice((world.folder / "train", here, "nowhere", "\udcff"))), "--tests", "cost"],
        "search": ["--model", str(world.folder / "emoji"), rng.choice(("dog", "", "\udcff", "qqq"))],
        "report": [str(rng.choice((world.folder / "train", here, "nowhere", here / "file", "/dev/null", "\udcff")))],
        "recipes": rng.choice((["ls"], ["cp"], ["cp", "digits", str(rng.choice(places))], ["mv"])),
        "look": [str(here / "nowhere"), "--text", "x"],
        "evaluate": [str(here / "nowhere")],
        "demo": ["--workers", "-1"],
    }.get(command, [])
    words = [command, *words]
    if command in ("compare", "train"):
        words += ["--methods" if command == "compare" else "--method", rng.choice(("audio", "joint"))]
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        option = rng.choice(OWN.get(command, ANY) if rng.random() < 0.85 else ANY)
        value = rng.choice(VALUES)
        words += [f"{option}={value}"] if rng.random() < 0.7 else [option, value]
    if command not in ("recipes", "search", "x", "--config", ""):
        words += ["--out", str(rng.choice([places[0]] * 4 + places))]
    if command == "demo":
        words += ["--workers", "-1"]
    if rng.random() < 0.1:
        rng.shuffle(words)
        words += ["--out", str(places[0]), "--workers", "-1"]
    return words


def random_command(world, seed):
    """Returns (command, arguments, outcome) of one random command line."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        words = random_line(world, rng, here)
        before = Path.cwd()
        os.chdir(here)
        try:
            return words[0], " ".join(words)[:300], outcome(lambda: run(words))
        finally:
            os.chdir(before)


def main(count, first=0):
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for work in (damaged, random_command):
            result = Counter()
            kinds = {}
            for seed in range(first, first + count):
                subject, way, message = work(world, seed)
                result[message if message in RESULTS else "wrong"] += 1
                if message not in RESULTS:
                    kinds.setdefault(message, []).append((seed, subject, way))
            sys.stdout.write(f"{work.__name__}: {dict(result)}\n")
            for message, cases in sorted(kinds.items(), key=lambda item: -len(item[1])):
                sys.stdout.write(f"  {len(cases):3d} {message}: {cases[:2]!a}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
