"""``load_pretrained``: Hub, folders with and without weights, incomplete processors; and the command ``look``."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from equipoise.cli.look_command import look as command
from equipoise.cli.look_command import look_parser
from equipoise.errors import ConfigError, DataError, EquipoiseError, MissingExtraError
from equipoise.inspection import load_pretrained, look
from helpers.look import CHAT, QUESTION, build_llama, build_llava, build_processor, saved_llava, tokenizer, wide_image
from helpers.vlms import family


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A folder with a complete LLaVA and an image."""
    index = saved_llava(tmp_path_factory.mktemp("llava"))
    wide_image().save(index / "cat.png")
    return index


@pytest.fixture(scope="module")
def bare_folder(model_folder, tmp_path_factory):
    """A folder like ``folder``, without weights."""
    index = tmp_path_factory.mktemp("bare")
    for path in model_folder.iterdir():
        if path.suffix not in (".safetensors", ".png"):
            shutil.copy(path, index)
    return index


def flat_weights(model):
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


def test_loading_restores_the_saved_folder(model_folder):
    model, result = load_pretrained(model_folder, device="cpu")
    assert type(model) is hf.LlavaForConditionalGeneration
    assert torch.equal(flat_weights(model), flat_weights(build_llava()))
    assert not model.training
    assert result(images=wide_image(), text="<image>", return_tensors="pt")["input_ids"].shape == (1, 9)


def test_random_weights_need_only_a_configuration_and_are_deterministic(model_folder, bare_folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, third = (
        load_pretrained(index, random=True).model for index in (bare_folder, bare_folder, model_folder)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(flat_weights(first), flat_weights(second))
    assert torch.equal(flat_weights(first), flat_weights(third))
    assert not torch.equal(flat_weights(first), flat_weights(build_llava()))
    assert first.dtype == torch.float32
    with pytest.raises(DataError, match=r"look: expected a folder with config.json and model.safetensors.*--random"):
        load_pretrained(bare_folder)


@pytest.mark.parametrize(
    "name",
    ["llava", "blip2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("internvl", "gemma3", "paligemma"))],
)
def test_folder_with_only_a_configuration(name, tmp_path, capsys):
    config = family(name)[0].config
    config.get_text_config().vocab_size = 300
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    loaded = load_pretrained(tmp_path, random=True)
    result = look(*loaded, image=wide_image(), text="what?", answer="cat")
    kinds = [token.modality for token in result.tokens]
    assert kinds == [*["image"] * 4, *["text"] * 8]
    assert "".join(token.text for token in result.tokens[4:]) == "what?cat"
    with pytest.raises(DataError, match="a configuration without weights needs random=True, or --random"):
        load_pretrained(tmp_path)
    wide_image().save(tmp_path / "cat.png")
    asked = ("--random", "--image", tmp_path / "cat.png", "--text", "what?", "--max_new_tokens", 2)
    assert run_command(tmp_path, *asked, "--out", tmp_path / "out") == 0
    assert "every byte of the text is a token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words", "got"),
    [
        ("llava", 97, "a vocabulary of 97 tokens"),
        ("idefics3", 300, "Idefics3ForConditionalGeneration, which splits images into tiles"),
        ("qwen2_vl", 300, "images of any size"),
    ],
)
def test_missing_processor_raises(name, words, got, tmp_path):
    config = family(name)[0].config
    config.get_text_config().vocab_size = words
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"without the files of a tokenizer and processor, got {got}"):
        look(*load_pretrained(tmp_path, random=True), image=wide_image(), text="what?", answer="cat")


def test_dtype_option(model_folder):
    model, result = load_pretrained(model_folder, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    actual = look(model, result, image=wide_image(), text=QUESTION, answer="cat")
    assert actual.views["answer"].share.dtype == torch.float32


def test_text_model_uses_a_tokenizer(tmp_path):
    build_llama().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model, result = load_pretrained(tmp_path)
    assert type(model) is hf.LlamaForCausalLM
    assert look(model, result, text=QUESTION, answer="a cat").answer == "a cat"


def test_processor_without_its_video_part(tmp_path):
    """Without torchvision, transformers has no video processors, so its Qwen-VL processors are incomplete."""
    model, _ = family("qwen2_vl")
    model.config.text_config.vocab_size = 97
    model.save_pretrained(tmp_path)
    words = hf.PreTrainedTokenizerFast(tokenizer_object=qwen_tokenizer(), unk_token="<unk>", pad_token="<pad>")
    words.save_pretrained(tmp_path)
    hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024).save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2_5_VLProcessor"}))
    (tmp_path / "chat_template.jinja").write_text(CHAT.replace("<image>", "<|image_pad|>"))
    loaded = load_pretrained(tmp_path)
    assert type(loaded.processor).__name__ == "Qwen2_5_VLProcessor"
    result = look(*loaded, image=wide_image(32, 24), text="what", answer="cat")
    assert result.prompt == "USER : <|image_pad|> what ASSISTANT :"
    assert result.grid[:3] == (3, 4, True)
    assert "image_grid_thw" in result.grid.why


def qwen_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = {"<pad>": 0, "<unk>": 3, "what": 4, "cat": 5, "<|image_pad|>": 90, "<|video_pad|>": 91}
    inner = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<|image_pad|>", "<|video_pad|>"])
    return inner


def test_unloadable_models_raise(tmp_path, model_folder, monkeypatch):
    with pytest.raises(DataError, match=r"look: expected a folder with config.json, got"):
        load_pretrained(tmp_path)
    shutil.copytree(model_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(build_llava().state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(DataError, match="pickled weights and code from the hub are not run"):
        load_pretrained(tmp_path / "pickled")
    shutil.copytree(model_folder, tmp_path / "torn")
    full = (tmp_path / "torn" / "model.safetensors").read_bytes()
    (tmp_path / "torn" / "model.safetensors").write_bytes(full[: len(full) // 2])
    with pytest.raises(DataError, match=r"expected a folder with config.json and model.safetensors"):
        load_pretrained(tmp_path / "torn")
    shutil.copytree(model_folder, tmp_path / "broader")
    config = json.loads((model_folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 1
    (tmp_path / "broader" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"expected a folder with config.json and model.safetensors"):
        load_pretrained(tmp_path / "broader")
    shutil.copytree(model_folder, tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (tmp_path / "mute" / name).unlink()
    with pytest.raises(DataError, match="expected a folder with the files of a tokenizer or processor"):
        load_pretrained(tmp_path / "mute")
    family("clip")[0].save_pretrained(tmp_path / "clip")
    with pytest.raises(ConfigError, match=r"expected a generative model.* got model type 'clip'"):
        load_pretrained(tmp_path / "clip")


def test_unknown_hub_name_raises(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"a folder or a name on the hub with config.json.*the connection to the hub"):
        load_pretrained("no-owner/no-such-model")


def test_missing_weights_raise(model_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(model_folder, tmp_path / "less")
    file = tmp_path / "less" / "model.safetensors"
    less = {name: value for name, value in load_file(file).items() if "layers.1.self_attn.q_proj" not in name}
    save_file(less, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"expected all weights of a LlavaForConditionalGeneration.*lacks .*q_proj"):
        load_pretrained(tmp_path / "less")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float3"}, "look dtype: expected auto, float32, bfloat16 or float16, got 'float3'"),
        ({"device": "cuda:99"}, "look device: expected an available device, such as cpu or cuda, got 'cuda:99'"),
        ({"device": "abacus"}, "look device: expected an available device"),
    ],
)
def test_unknown_options_raise(model_folder, options, message):
    with pytest.raises(ConfigError, match=message):
        load_pretrained(model_folder, **options)


def test_missing_transformers_raises(monkeypatch, model_folder):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"look: expected the package 'transformers', got none installed"):
        load_pretrained(model_folder)


def run_command(*arguments):
    return command(look_parser().parse_args([str(argument) for argument in arguments]))


def test_command_writes_results_and_page(model_folder, tmp_path, capsys):
    arguments = (
        model_folder,
        "--image",
        model_folder / "cat.png",
        "--text",
        QUESTION,
        "--max_new_tokens",
        2,
        "--out",
        tmp_path,
    )
    assert run_command(*arguments, "--device", "cpu", "--layers", "*layers.0.*, *layers.2.*", "--exclude_top_k", 1) == 0
    message = capsys.readouterr().out
    content = json.loads((tmp_path / "look.json").read_text())
    assert [site.split(".")[3] for site in content["sites"]] == ["0", "2"]
    assert content["sinks_left_out"] == 1
    assert content["model"] == str(model_folder)
    assert sum(token["part"] == "answer" for token in content["tokens"]) == 2
    assert re.search(r"^ mean( +\d+\.\d %){6}$", message, re.MULTILINE)
    assert re.search(r"In the answer, .* of attention goes to the image", message)
    assert f"report:  {tmp_path / 'report.html'}" in message
    assert "weights are random" not in message
    assert {path.name for path in tmp_path.iterdir()} == {"look.json", "report.html"}


def test_command_reports_random_weights(bare_folder, model_folder, tmp_path, capsys):
    assert (
        run_command(
            bare_folder,
            "--random",
            "--image",
            model_folder / "cat.png",
            "--text",
            QUESTION,
            "--answer",
            "cat",
            "--out",
            tmp_path,
        )
        == 0
    )
    assert "The weights are random" in capsys.readouterr().out
    assert "The weights are random" in (tmp_path / "report.html").read_text()


def test_command_checks_the_image_before_loading_the_model(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"nothing")
    with pytest.raises(EquipoiseError, match=r"look image '.*cat\.png': expected an image"):
        run_command("no-owner/no-such-model", "--image", tmp_path / "cat.png", "--text", QUESTION)


def test_documentation_page_runs(model_folder, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "look.md").read_text(encoding="utf-8")
    for heading in ("What the results mean", "When the results mislead", "Supported models"):
        assert f"\n## {heading}\n" in text
    monkeypatch.chdir(tmp_path)
    shutil.copy(model_folder / "cat.png", tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block.replace("llava-hf/llava-1.5-7b-hf", str(model_folder)), names)
    assert (tmp_path / "look.html").is_file()
    assert re.search(r"mean +\d", capsys.readouterr().out)
    for option in re.findall(r"(--\w+)", text):
        assert option in look_parser().format_help()


def test_test_processor_is_saved_completely(model_folder):
    assert type(load_pretrained(model_folder).processor) is type(build_processor())


def test_errors_name_the_caller(tmp_path):
    with pytest.raises(DataError, match=r"^evaluate: expected a folder with config.json"):
        load_pretrained(tmp_path, who="evaluate")
    with pytest.raises(ConfigError, match=r"^evaluate dtype: "):
        load_pretrained(tmp_path, dtype="float3", who="evaluate")
