"""Pairs of columns of a table: training a dual encoder, retrieval metrics, search, moved data, frozen backbones."""

import json
import shutil
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from PIL import Image, ImageDraw
from transformers import BertConfig, BertModel, BertTokenizerFast, ViTConfig, ViTModel

import equipoise as eq
from equipoise.cli.entry_point import run
from equipoise.data.sets.manifest import ManifestDataset
from equipoise.errors import ConfigError, DataError
from equipoise.evaluation.search import TableGallery
from equipoise.training import recipes
from equipoise.training.own_data import own_data_recipe
from equipoise.training.run import _load_dataset_cached

COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (230, 210, 40)}
SHAPES = ("circle", "square", "triangle")
SMALL = [
    "--encoders.photo.dim", "16", "--encoders.photo.widths", "[16, 32]", "--encoders.words.dim", "16",
    "--encoders.words.depth", "0", "--model.dim", "16",
]  # fmt: skip
FAST = [*SMALL, "--train.epochs", "1", "--accelerator", "cpu"]


def draw_image(color, shape, random, side=16):
    image = Image.new("RGB", (side, side), "white")
    radius = int(random.integers(4, 7))
    x, y = (int(value) for value in random.integers(radius, side - radius, 2))
    box = (x - radius, y - radius, x + radius, y + radius)
    pencil = ImageDraw.Draw(image)
    if shape == "circle":
        pencil.ellipse(box, fill=COLORS[color])
    elif shape == "square":
        pencil.rectangle(box, fill=COLORS[color])
    else:
        pencil.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=COLORS[color])
    return image


def write_tone(folder, name, hertz):
    soundfile.write(folder / name, 0.3 * np.sin(2 * np.pi * hertz * np.arange(1_200) / 8_000), 8_000)


@pytest.fixture(scope="module")
def pair_table(tmp_path_factory):
    """96 images of colored shapes with captions and tones; 4 captions are missing."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    rows = []
    for i in range(96):
        color, shape = list(COLORS)[i % 4], SHAPES[i // 4 % 3]
        draw_image(color, shape, random).save(folder / "images" / f"{i}.png")
        write_tone(folder, f"{i}.wav", 300 * (1 + i % 4))
        caption = "" if i % 24 == 5 else [f"{color} {shape}", f"{color.title()} {shape}!"][i % 2]
        rows.append(
            {"photo": f"images/{i}.png", "words": caption, "sound": f"{i}.wav", "price": i, "maker": f"m{i % 9}"}
        )
    pd.DataFrame(rows).to_csv(folder / "products.csv", index=False)
    return folder / "products.csv"


@pytest.fixture(scope="module")
def trained_run(pair_table, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "products"
    words = [
        "train",
        "--config",
        "dual_encoder",
        "--data",
        str(pair_table),
        "--pair",
        "photo,words",
        "--out",
        str(out),
        *SMALL,
    ]
    assert (
        run(
            [
                *words,
                "--train.epochs",
                "24",
                "--train.batch_size",
                "16",
                "--train.learning_rate",
                "0.01",
                "--accelerator",
                "cpu",
            ]
        )
        == 0
    )
    return out


def normalize_spaces(text):
    return " ".join(text.split())


def test_retrieval_is_learned_and_reported(trained_run):
    (row,) = json.loads((trained_run / "results.json").read_text())["runs"]
    metrics = row["metrics"]
    assert metrics["chance/recall@1"] < 0.2
    assert metrics["words_to_photo/recall@1"] > 0.5
    assert metrics["photo_to_words/recall@1"] > 0.5
    assert {"words_to_photo_among_all/recall@1", "modality_gap/photo-words", "median_rank"} <= set(metrics)
    assert "recall" in (trained_run / "report.html").read_text(encoding="utf-8")
    recipe = recipes.load_recipe(trained_run / "recipe.yaml")
    assert recipe.data["pair"] == ["photo", "words"]
    assert recipe.data["modalities"]["words"]["kind"] == "text"
    again = eq.load(trained_run).evaluate(ManifestDataset(**{k: v for k, v in recipe.data.items() if k != "name"}))[
        "metrics"
    ]
    assert {name: metrics[name] for name in again} == pytest.approx(again, rel=1e-4, abs=1e-5)


def test_text_and_image_queries(trained_run, capfd, tmp_path):
    page = tmp_path / "gallery.html"
    model = ["search", "--model", str(trained_run)]
    assert run([*model, "blue circle", "--top", "3", "--html", str(page)]) == 0
    text = capfd.readouterr().out
    assert "3 of 92" in text
    result = [int(line.split("images/")[1].split(".")[0]) for line in text.splitlines() if "images/" in line]
    assert sum(i % 4 == 2 for i in result) >= 2
    html = page.read_text(encoding="utf-8")
    assert html.count('class="card"') == 3
    assert html.count('<img src="data:image/png') == 3
    assert "Also called" in html
    assert "3 nearest images of 92" in html
    assert run([*model, "--image", str(trained_run.parent / "gone.png")]) == 1
    assert "expected an image, got no such file" in normalize_spaces(capfd.readouterr().err)
    draw_image("red", "square", np.random.default_rng(5)).save(tmp_path / "query.png")
    assert run([*model, "--image", str(tmp_path / "query.png"), "--top", "1", "--html", str(page)]) == 0
    assert "red" in capfd.readouterr().out.casefold()
    assert "1 nearest caption of " in page.read_text(encoding="utf-8")


def test_search_split_and_unknown_words(trained_run, capfd):
    model = ["search", "--model", str(trained_run)]
    assert run([*model, "bluish circle", "--split", "test", "--top", "2"]) == 0
    text = capfd.readouterr().out
    rows = recipes.load_recipe(trained_run / "recipe.yaml").data
    test = len(ManifestDataset(**{key: value for key, value in rows.items() if key != "name"}).test)
    assert f"2 of {test}" in text
    assert text.count("new") >= 2
    assert "Not in the training captions: “bluish”." in text
    for words, message in [
        ([*model, "circle", "--split", "tst"], "expected a known split, got 'tst'"),
        ([*model, "?!"], "expected a text with a word in it"),
        ([*model, "qqqq"], "expected a known word, got 'qqqq'"),
        ([*model, "red " * 40], "expected a text of at most 32 words, got 40"),
        (
            [*model, "--audio", "x.wav"],
            "expected a model with a column of kind audio, got one of image (photo) and text",
        ),
    ]:
        assert run(words) == 1
        assert message in normalize_spaces(capfd.readouterr().err)


def test_search_in_a_folder_of_images(trained_run, capfd, tmp_path):
    (tmp_path / "mine").mkdir()
    draw_image("green", "circle", np.random.default_rng(1), side=40).save(tmp_path / "mine" / "leaf.png")
    draw_image("red", "square", np.random.default_rng(2), side=40).save(tmp_path / "mine" / "brick.png")
    (tmp_path / "mine" / "bad.png").write_bytes(b"\x89PNG")
    words = [
        "search",
        "--model",
        str(trained_run),
        "--images",
        str(tmp_path / "mine"),
        "--html",
        str(tmp_path / "g.html"),
    ]
    assert run([*words, "green circle"]) == 0
    text = capfd.readouterr().out
    assert text.index("leaf.png") < text.index("brick.png")
    assert "2 of 2" in text
    assert "Skipped: image" in text
    assert (tmp_path / "g.html").read_text(encoding="utf-8").count('<img src="data:image/png') == 2


def test_moved_data_are_reported_and_relocated(pair_table, trained_run, tmp_path, capfd):
    folder, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(pair_table.parent, folder)
    words = ["train", "--data", str(folder / "products.csv"), "--pair", "photo,words", "--out", str(out), *FAST]
    assert run(words) == 0
    folder.rename(tmp_path / "moved")
    _load_dataset_cached.cache_clear()
    with pytest.raises(DataError, match=r"products.csv': expected an existing file or folder, got none"):
        eq.load(out)
    moved = tmp_path / "moved" / "products.csv"
    assert eq.load(out, data=moved).names == ("photo", "words")
    capfd.readouterr()
    assert run(["search", "--model", str(out), "red circle"]) == 1
    assert "give its new location with --data" in normalize_spaces(capfd.readouterr().err)
    assert run(["search", "--model", str(out), "red circle", "--data", str(moved)]) == 0


def test_inferred_columns_are_reported(pair_table):
    recipe, lines = own_data_recipe(str(pair_table), options={"pair": ["photo", "words"], "group": "maker"})
    assert "pairs: 92 of 96 rows; 4 lack photo or words and are left out" in lines
    text = "\n".join(lines)
    assert "different pairs: 12; rows with the same text (case and punctuation aside) or the same file match" in text
    assert "not used: sound, price" in text
    assert "groups of 'maker'" in text
    assert recipe.methods == ["siglip", "info_nce"]
    # The number of rows decides; options of the recipe are kept.
    assert (recipe.train.learning_rate, recipe.train.batch_size) == (0.002, 8)


def test_rows_with_equal_text_or_file_share_a_target(tmp_path):
    names = "abcdefghij"
    for name in names:
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    rows = [(f"{name}.png", f"{name} number {i}") for name in names for i in range(3)]
    rows += [("a.png", "Same text"), ("b.png", "same, text!"), ("c.png", "...")]
    pd.DataFrame(rows, columns=["photo", "caption"]).to_csv(tmp_path / "t.csv", index=False)
    data = ManifestDataset(str(tmp_path / "t.csv"), pair=["photo", "caption"])
    ids = data.manifest.target.tolist()
    assert len(set(ids[:6])) == 1
    # Images a and b share a text, so all of their rows match.
    assert ids[30] == ids[31] == ids[0]
    assert ids[32] == ids[6] != ids[0]
    assert len(set(ids)) == len(names) - 1 == data.num_outputs
    assert data.task == "retrieval"
    files = [{rows[row][0] for row in part} for part in data.rows.values()]
    assert all(not one & other for one, other in combinations(files, 2))


@pytest.fixture(scope="module")
def short_table(pair_table):
    """The first 24 rows of the table, since recordings take longer to read."""
    pd.read_csv(pair_table)[:24].to_csv(pair_table.parent / "short.csv", index=False)
    return pair_table.parent / "short.csv"


@pytest.mark.parametrize("pair", [["sound", "words"], ["photo", "sound"], ["photo", "sound", "words"]])
def test_audio_in_a_pair(short_table, pair, tmp_path, capfd):
    out = tmp_path / "run"
    words = [
        "train",
        "--data",
        str(short_table),
        "--pair",
        ",".join(pair),
        "--out",
        str(out),
        "--train.epochs",
        "1",
        "--encoders.sound.dim",
        "16",
        "--encoders.sound.depth",
        "1",
        "--model.dim",
        "16",
        "--accelerator",
        "cpu",
    ]
    assert run(words) == 0
    metrics = json.loads((out / "results.json").read_text())["runs"][0]["metrics"]
    assert f"{pair[0]}_to_{pair[1]}/recall@1" in metrics
    query = ["red circle"] if "words" in pair else ["--image", str(short_table.parent / "images" / "3.png")]
    capfd.readouterr()
    assert run(["search", "--model", str(out), *query, "--top", "2"]) == 0
    assert (".png" if pair[0] == "photo" and "words" in pair else ".wav") in capfd.readouterr().out
    assert run(["search", "--model", str(out), "--audio", str(short_table.parent / "3.wav"), "--top", "2"]) == 0


def test_padding_and_missing_samples_are_excluded(short_table):
    recipe, _ = own_data_recipe(str(short_table), options={"pair": ["sound", "words"]})
    data = ManifestDataset(**{key: value for key, value in recipe.data.items() if key != "name"})
    encoder = eq.encoders.SequenceEncoder(40, max_length=data.shapes["sound"][0], dim=8, depth=1, heads=2)
    model = eq.models.DualEncoder({"sound": encoder, "words": eq.encoders.TextEncoder(
        data.vocabulary["words"], max_length=32, dim=8, depth=0)}, dim=6).eval()  # fmt: skip
    batch = data.batch("test", torch.arange(4), seed=0, epoch=0, train=False)
    alone = model.embed(batch)["sound"]
    longer = torch.cat([batch["sound"], torch.full_like(batch["sound"][:, :2], 7.0)], dim=1)[
        :, : data.shapes["sound"][0]
    ]
    mask = torch.nn.functional.pad(batch["mask"]["sound"], (0, longer.shape[1] - batch["sound"].shape[1]))
    padded = model.embed({"sound": longer, "mask": {"sound": mask}})["sound"]
    torch.testing.assert_close(padded, alone)
    mask = mask.clone()
    mask[1] = False
    assert model.embed({"sound": longer, "mask": {"sound": mask}})["sound"].any(dim=1).tolist() == [
        True,
        False,
        True,
        True,
    ]
    full = torch.tensor([True, True, False, True])
    assert model.embed({"words": batch["words"], "mask": {"words": full}})["words"].any(dim=1).tolist() == full.tolist()


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Folders of a tiny vision model and a tiny text model with its tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    pieces = list("abcdefghijklmnopqrstuvwxyz")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COLORS, *SHAPES, *pieces, *(f"##{one}" for one in pieces)]
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **size)).save_pretrained(folder / "text")
    (folder / "text" / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "text" / "vocab.txt")).save_pretrained(folder / "text")
    ViTModel(ViTConfig(image_size=24, patch_size=8, **size)).save_pretrained(folder / "image")
    (folder / "image" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2]}'
    )
    return folder


def test_frozen_backbones(pair_table, backbones, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(backbones)
    out = tmp_path / "run"
    words = [
        "train",
        "--config",
        "dual_encoder",
        "--data",
        str(pair_table),
        "--pair",
        "photo,words",
        "--out",
        str(out),
        "--encoders.photo.name",
        "Backbone",
        "--encoders.photo.model",
        "image",
        "--encoders.words.name",
        "Backbone",
        "--encoders.words.model",
        "text",
        "--train.epochs",
        "2",
        "--accelerator",
        "cpu",
    ]
    assert run([*words, "--data.modalities.words.tokenizer", "text"]) == 0
    monkeypatch.chdir(tmp_path)
    data = recipes.load_recipe(out / "recipe.yaml").data["modalities"]
    assert data["words"]["tokenizer"] == str(backbones / "text")
    assert (data["photo"]["size"], data["photo"]["mean"]) == (24, [0.4, 0.5, 0.6])
    model = eq.load(out)
    trainable = {name.split(".")[0] for name, one in model.named_parameters() if one.requires_grad}
    assert trainable == {"heads", "loss"}
    pretrained = BertModel.from_pretrained(backbones / "text").eval()
    tokenizer = BertTokenizerFast.from_pretrained(backbones / "text")
    tokens = tokenizer(["red circle", "a big blue square"], return_tensors="pt", padding=True)
    hidden = pretrained(**tokens).last_hidden_state
    valid = tokens["attention_mask"][..., None]
    expected = (hidden * valid).sum(1) / valid.sum(1)
    expected = torch.nn.functional.normalize(model.heads["words"](expected), dim=-1)
    source = ManifestDataset(**{k: v for k, v in recipes.load_recipe(out / "recipe.yaml").data.items() if k != "name"})
    ids = TableGallery(source).encode(["red circle", "a big blue square"], "search")
    torch.testing.assert_close(model.embed({"words": ids})["words"], expected, atol=1e-5, rtol=1e-4)
    capfd.readouterr()
    assert run(["search", "--model", str(out), "reddish circle", "--top", "2"]) == 0
    assert "by their word pieces only" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoders.words.model", "image"], "encoder 'words': expected the tokenizer of its model, got none in"),
        (["--encoders.words.model", "gone"], "expected the tokenizer of its model, got none in 'gone'"),
        (["--encoders.words.model", "text", "--data.modalities.words.tokenizer", "gone"],
         "modality 'words': expected a folder with a tokenizer"),
        (["--encoders.words.model", "text", "--data.modalities.wrds.tokenizer", "text"], "expected a known modality, "
                                                                                         "got 'wrds'"),
    ],
)  # fmt: skip
def test_backbones_without_tokenizer(pair_table, backbones, monkeypatch, capfd, options, message):
    monkeypatch.chdir(backbones)
    words = ["train", "--data", str(pair_table), "--pair", "photo,words", "--encoders.words.name", "Backbone", *options]
    assert run([*words, "--out", str(backbones / "run")]) == 1
    assert message in normalize_spaces(capfd.readouterr().err)
    assert not (backbones / "run").exists()


def test_kinds_splits_and_damaged_files(pair_table, tmp_path, capfd):
    folder = tmp_path / "data"
    shutil.copytree(pair_table.parent, folder)
    (folder / "images" / "7.png").write_bytes(b"damaged")
    rows = pd.read_csv(folder / "products.csv")
    rows["part"] = ["train" if i < 64 else "dev" if i < 80 else "test" for i in range(len(rows))]
    rows.to_csv(folder / "products.csv", index=False)
    out = tmp_path / "run"
    words = ["train", "--data", str(folder / "products.csv"), "--pair", "photo,words", "--split", "part", "--kind",
             "words=text", "--out", str(out), *FAST]  # fmt: skip
    assert run(words) == 1
    assert "got 1 rows that cannot be read: [7] photo, row 7" in normalize_spaces(capfd.readouterr().err)
    assert run([*words, "--skip-bad"]) == 0
    assert "rows: train 60, val 15, test 16 (split by column 'part')" in capfd.readouterr().out
    assert recipes.load_recipe(out / "recipe.yaml").data["skip"] == [7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pair", "photo"], "pair: expected two or more different columns, got photo"),
        (["--pair", "photo,photo"], "expected two or more different columns, got photo, photo"),
        (["--pair", "photo,wrds"], "pair: expected a known column, got 'wrds'. Did you mean 'words'"),
        (["--pair", "photo,words", "--target", "price"], "expected --target or --pair, got both"),
        (["--pair", "photo,words", "--group", "photo"], "pair: expected columns without another use, got 'photo'"),
        (
            ["--pair", "photo,words", "--task", "regression"],
            "expected a task only with a target, got task = 'regression'",
        ),
        (["--pair", "photo,words", "--kind", "wrds=text"], "expected a known column, got 'wrds'"),
        (
            ["--pair", "photo,words", "--config", "digits"],
            "--pair: expected a recipe with a model, such as dual_encoder",
        ),
        (["--pair", "photo,empty"], "column 'empty': expected values in some rows, got empty cells only"),
        (
            ["--pair", "photo,odd"],
            "expected rows with both photo and odd, got none of 4 rows ('photo' in 2, 'odd' in 2)",
        ),
        (["--pair", "photo,same"], "expected two or more different pairs in the training rows, got the same text"),
        ([], "expected the column of the target, or a pair of columns, got none. Add --target COLUMN, or --pair"),
        (["--config", "dual_encoder"], "data: expected the path of a table, got none"),
    ],
)
def test_invalid_pairs_raise_one_error(tmp_path, capfd, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("a", "b", "c", "d"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "data" / f"{name}.png")
    rows = {"photo": ["a.png", "b.png", "", ""], "words": ["one dog", "two cats", "x", "y"], "empty": [""] * 4,
            "odd": ["", "", "one dog", "two cats"], "same": ["one dog"] * 4, "price": [1, 2, 3, 4]}  # fmt: skip
    if "photo,same" in options or "digits" in options:
        rows["photo"] = ["a.png", "b.png", "c.png", "d.png"]
    pd.DataFrame(rows).to_csv(tmp_path / "data" / "t.csv", index=False)
    where = [] if options == ["--config", "dual_encoder"] else ["--data", "data/t.csv"]
    assert run(["train", *where, *options]) == 1
    assert message in normalize_spaces(capfd.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_target_and_pair_are_mutually_exclusive(pair_table):
    with pytest.raises(ConfigError, match="expected a target, or a pair of columns without one, got neither"):
        eq.data.Manifest(pair_table)
    with pytest.raises(ConfigError, match="got both, price and photo, words"):
        eq.data.Manifest(pair_table, target="price", pair=["photo", "words"])
