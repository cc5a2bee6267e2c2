"""``equipoise search``: terminal output, gallery, cached embeddings, and errors in one sentence."""

import json
import time

import pytest
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from equipoise.cli import run
from equipoise.data import load_dataset
from equipoise.evaluation.search.embedding_cache import NAME
from equipoise.evaluation.search.terminal_image import HALF
from equipoise.training import RunSpec, execute_run
from equipoise.training import load as load_run
from helpers.search import build_dual_encoder, recipe, write_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "emoji", build_dual_encoder())


def error_message(capsys, *arguments):
    assert run(["search", *map(str, arguments)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("equipoise: ")
    assert "Traceback" not in message
    return " ".join(message.split())


def test_text_query_returns_images(run_folder, capsys):
    assert run(["search", "--model", str(run_folder), "blue heart", "--top", "7"]) == 0
    message = capsys.readouterr().out
    assert message.count("0.") >= 7
    assert "7 of 3395" in message
    assert HALF not in message
    assert (run_folder / NAME).is_file()


def test_second_search_uses_cached_embeddings(run_folder, capsys):
    run(["search", "--model", str(run_folder), "dog"])
    start = time.process_time()
    assert run(["search", "--model", str(run_folder), "dog"]) == 0
    assert time.process_time() - start < 2.0


def test_image_query_returns_captions(run_folder, capsys, tmp_path):
    Image.fromarray(load_dataset("emoji").pictures[3].numpy()).save(tmp_path / "unknown.png")
    assert run(["search", "--model", str(run_folder), "--image", str(tmp_path / "unknown.png"), "--top", "3"]) == 0
    assert f"3 of {len(load_file(run_folder / NAME)['text'])}" in capsys.readouterr().out


def test_search_in_user_folder(run_folder, capsys, tmp_path):
    Image.new("RGB", (30, 30), "blue").save(tmp_path / "sky.png")
    (tmp_path / "half.png").write_bytes(b"\x89PNG")
    assert run(["search", "--model", str(run_folder), "blue", "--images", str(tmp_path)]) == 0
    message = capsys.readouterr().out
    assert "sky.png" in message
    assert "1 of 1" in message
    assert "Skipped: image" in message
    assert "new" not in message.replace("sky.png", "")


def test_unknown_words_are_reported(run_folder, capsys):
    assert run(["search", "--model", str(run_folder), "bluish heart", "--top", "2"]) == 0
    assert "Not in the training captions: “bluish”." in capsys.readouterr().out


def test_images_in_color_terminals(run_folder, monkeypatch):
    console = Console(force_terminal=True, color_system="truecolor", width=60, legacy_windows=False)
    monkeypatch.setattr("equipoise.cli.console.out", console)
    with console.capture() as seen:
        assert run(["search", "--model", str(run_folder), "dog", "--top", "4"]) == 0
    message = seen.get()
    assert message.count(HALF) == 4 * 16 * 8
    assert "38;2;" in message


def test_gallery_page_is_written(run_folder, capsys, tmp_path):
    page = tmp_path / "new" / "gallery.html"
    assert run(["search", "--model", str(run_folder), "red heart", "--html", str(page)]) == 0
    assert f"gallery: {page}" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").count('class="card"') == 10


def test_invalid_query_raises(run_folder, capsys, tmp_path):
    model = ("--model", run_folder)
    assert "search: expected a text, an image after --image, or a recording after --audio, got none" in error_message(
        capsys, *model
    )
    assert "got several" in error_message(capsys, *model, "dog", "--image", tmp_path / "dog.png")
    assert "search: expected a text with a word in it, got ' '" in error_message(capsys, *model, " ")
    assert "search: expected a text with a word in it, got '?!'" in error_message(capsys, *model, "?!")
    assert "search: expected --top of 1 or more, got 0" in error_message(capsys, *model, "dog", "--top", "0")
    message = error_message(capsys, *model, "qqqq")
    assert "expected a known word, got 'qqqq'. Choose one of: 0, 00, 1" in message
    assert "in all)" in message
    assert len(message) < 400
    assert "of at most 24 words, got 30" in error_message(capsys, *model, "dog " * 30)


def test_invalid_images_and_folders_raise(run_folder, capsys, tmp_path):
    model = ("--model", run_folder)
    assert "expected an image, got no such file" in error_message(capsys, *model, "--image", tmp_path / "none.png")
    Image.new("F", (20, 20)).save(tmp_path / "depth.tif")
    assert "got mode F, of unknown range" in error_message(capsys, *model, "--image", tmp_path / "depth.tif")
    assert "which is not a folder" in error_message(capsys, *model, "dog", "--images", tmp_path / "none")


def test_folder_without_run_raises(run_folder, capsys, tmp_path):
    assert "expected the folder of a finished run" in error_message(capsys, "--model", tmp_path / "none", "dog")
    broken = write_run(tmp_path / "broken", build_dual_encoder())
    (broken / "model.safetensors").write_bytes(b"half")
    assert "model.safetensors" in error_message(capsys, "--model", broken, "dog")
    other = write_run(tmp_path / "other", build_dual_encoder())
    text = (other / "run.json").read_text().replace("info_nce", "clip")
    (other / "run.json").write_text(text)
    assert "expected a known variant, got 'clip'" in error_message(capsys, "--model", other, "dog")


def test_search_with_a_newly_trained_run(tmp_path):
    config = recipe().with_train(epochs=1, batch_size=512)
    job, folder = RunSpec(config, "siglip", seed=0), tmp_path / "run"
    run_row = execute_run(job, folder, trainer_options={"limit_train_batches": 2, "limit_val_batches": 1})
    metrics = run_row["metrics"]
    assert 0 <= metrics["recall@1"] <= metrics["recall@5"] <= 1
    assert metrics["chance/recall@1"] == pytest.approx(1 / 276)
    assert {"compositionality/image", "modality_gap/image-text", "text_to_image_among_all/recall@1"} <= set(metrics)
    again = load_run(folder).evaluate(load_dataset("emoji"))["metrics"]
    assert {name: metrics[name] for name in again} == pytest.approx(again, rel=1e-4, abs=1e-5)
    assert json.loads((folder / "run.json").read_text())["run"]["method"] == "siglip"
