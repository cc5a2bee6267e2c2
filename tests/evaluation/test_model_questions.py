"""Models on questions with and without their images: three tiny models with planted behavior, and bad input."""

import json

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import equipoise as eq
from equipoise.cli import run
from equipoise.errors import ConfigError, DataError
from equipoise.evaluation import evaluate_questions
from equipoise.evaluation.questions.model_questions import checked_betas
from helpers.vlms import TEXT, VISION

COLORS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (250, 250, 250)}
THINGS = ("banana", "apple", "sky", "leaf", "sun", "sea", "snow", "rose")
WORDS = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "which",
    "color",
    "has",
    "the",
    "?",
    "dark",
    "yes",
    "no",
    *COLORS,
    *THINGS,
)
NAMES = [*COLORS]


def build_processor():
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    pictures = hf.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return hf.LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=4, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )  # fmt: skip


def build_model():
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), image_token_id=4, vision_feature_layer=-1,
        text_config=hf.LlamaConfig(**{**TEXT, "vocab_size": len(WORDS), "hidden_size": 32, "head_dim": 8}),
        vision_feature_select_strategy="default",
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config).eval()


def build_samples(count=24):
    """Questions whose answer the image shows, and is also what the thing of the question usually has."""
    random = np.random.default_rng(0)
    result = []
    for index in range(count):
        number = int(random.integers(8))
        color = NAMES[number % 4]
        shade = tuple(int(np.clip(part + random.integers(-15, 16), 0, 255)) for part in COLORS[color])
        result.append({
            "image": Image.new("RGB", (8, 8), shade), "question": f"which color has the {THINGS[number]} ?",
            "answer": color, "category": "a" if index % 2 else "b",
        })  # fmt: skip
    return result


def train_model(uses):
    """Trains a model whose answer is the color of the image, or the usual color of the thing."""
    model, encode = build_model(), build_processor()
    random = np.random.default_rng(1)
    parameters = [*model.model.language_model.parameters(), *model.model.multi_modal_projector.parameters(),
                  *model.lm_head.parameters()]  # fmt: skip
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    for _ in range(150):
        things, shown = random.integers(8, size=16), random.integers(4, size=16)
        images = [Image.new("RGB", (8, 8), COLORS[NAMES[n]]) for n in shown]
        texts = [f"<image>\nwhich color has the {THINGS[n]} ?" for n in things]
        if uses == "text":
            # Without an image too, for half of the steps.
            images = images if random.random() < 0.5 else None
            texts = texts if images else [text.removeprefix("<image>\n") for text in texts]
        inputs = encode(text=texts, images=images, return_tensors="pt")
        target = torch.tensor([WORDS.index(NAMES[n % 4]) for n in (shown if uses == "image" else things)])
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits[:, -1], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained_models():
    return {"image": train_model("image"), "text": train_model("text"), "chance": build_model()}


def with_choices(rows):
    return [{**row, "choices": NAMES} for row in rows]


@pytest.mark.parametrize("score", ["likelihood", pytest.param("generated", marks=pytest.mark.slow)])
def test_verdict_matches_planted_behavior(trained_models, score):
    rows = with_choices(build_samples()) if score == "likelihood" else build_samples()
    conditions = ("given", "blank", "other", "hidden", "none") if score == "likelihood" else ("given", "hidden", "none")
    result = {
        uses: evaluate_questions(model, build_processor(), rows, score=score, max_new_tokens=1, conditions=conditions)
        for uses, model in trained_models.items()
    }
    image, text, chance = result["image"], result["text"], result["chance"]
    assert image.failed == text.failed == chance.failed == 0
    assert image.accuracy["given"] > 0.95
    assert max(image.accuracy[name] for name in conditions if name not in ("given", "other")) < 0.6
    assert image.difference("hidden")["p"] < 0.001
    assert len(image.needing) > len(image.answered_without)
    assert "depend on the image" in image.verdict or "depend partly on the image" in image.verdict
    assert text.accuracy["none"] > 0.95
    assert text.as_well > 0.95
    assert "No significant use of the image" in text.verdict
    assert "is not significantly above chance" in chance.verdict
    shares = image.extra["attention_share"]
    assert all(0 < share < 1 for share in shares)
    assert {row["category"] for row in image.rows} == {"a", "b"}
    assert image.to_dict()["means"]["attention_share"] == pytest.approx(sum(shares) / len(shares))


def test_shares_match_watch_and_without_modality(trained_models):
    rows = with_choices(build_samples(2))
    model, encode = trained_models["image"], build_processor()
    result = evaluate_questions(model, encode, rows, conditions=("given", "hidden"))
    prompt = f"<image>\n{rows[0]['question']}"
    inputs = encode(text=[prompt], images=[rows[0]["image"]], return_tensors="pt")
    ids = torch.tensor([WORDS.index(name) for name in NAMES])
    with torch.no_grad(), eq.watch(model, queries="last") as record:
        model(**inputs)
    shares = torch.stack([record.share(layer)[0, :, record.names.index("image")].mean() for layer in record.layers])
    assert result.extra["attention_share"][0] == pytest.approx(float(shares.mean()), rel=1e-5)
    with torch.no_grad(), eq.diagnostics.without_modality(model, "image"):
        logits = model(**inputs).logits[0, -1]
    assert result.replies["hidden"][0] == NAMES[int(logits[ids].argmax())]


@pytest.mark.parametrize("score", ["likelihood", "generated"])
def test_steering_curve(trained_models, score, tmp_path):
    rows = with_choices(build_samples(8)) if score == "likelihood" else build_samples(8)
    model, encode = trained_models["image"], build_processor()
    options = {"score": score, "max_new_tokens": 1, "conditions": ("given",)}
    result = evaluate_questions(model, encode, rows, steer=(2, -4, 0), journal=tmp_path / "journal.jsonl", **options)
    assert [row["beta"] for row in result.steering] == [-4, 0, 2]
    low, middle, high = result.steering
    assert middle["accuracy"] == result.accuracy["given"] > 0.9 > low["accuracy"]
    assert low["attention_share"] < middle["attention_share"] < high["attention_share"]
    plain = evaluate_questions(model, encode, rows, **options)
    assert plain.rows[0] == {name: value for name, value in result.rows[0].items() if "steer" not in name}
    assert plain.steering == []
    if score == "likelihood":
        prompt = f"<image>\n{rows[0]['question']}"
        inputs = encode(text=[prompt], images=[rows[0]["image"]], return_tensors="pt")
        with torch.no_grad(), eq.steer(model, image=-4.0):
            likely = model(**inputs).logits[0, -1].log_softmax(dim=-1)[WORDS.index(rows[0]["answer"])]
        assert result.rows[0]["steer -4 log_likelihood"] == pytest.approx(float(likely), abs=1e-5)
    else:
        assert low["log_likelihood"] is None
    result.save(tmp_path)
    header = (tmp_path / "questions.csv").read_text().splitlines()[0].split(",")
    assert {"steer -4", "steer 2", "steer 2 attention_share"} <= set(header)
    assert "More and less attention to the image" in (tmp_path / "questions.html").read_text()
    assert "steered by -4" in result.table()
    for wrong in ((1000,), ("1",), "12", 5, (float("nan"),)):
        with pytest.raises(ConfigError, match="numbers from -100 to 100"):
            evaluate_questions(model, encode, rows, steer=wrong)


def test_steer_merges_numbers_with_one_name():
    assert checked_betas(np.float32([1, 1.0000001, -2])) == (-2.0, 0.0, 1.0)


def test_inference_mode_and_equal_media(trained_models):
    rows, model, encode = with_choices(build_samples(2)), trained_models["image"], build_processor()
    with torch.inference_mode():
        result = evaluate_questions(model, encode, rows)
    plain = evaluate_questions(model, encode, rows)
    assert result.failed == 0
    assert result.rows == plain.rows
    with pytest.raises(ConfigError, match="evaluate conditions: expected questions with different media"):
        evaluate_questions(model, encode, rows[:1])


@pytest.mark.parametrize("kind", ["one token", "several tokens", "generated"])
def test_batches_give_the_results_of_single_questions(trained_models, kind):
    rows = build_samples(7)
    for index, row in enumerate(rows):
        # Questions of different lengths are padded, and one has two images.
        row["question"] = " ".join([row["question"], *["dark"] * (index % 3)])
    rows[4] = {**rows[4], "images": [rows[4]["image"], Image.new("RGB", (8, 8))], "image": None}
    if kind == "one token":
        rows = with_choices(rows)
    elif kind == "several tokens":
        choices = [f"the {name}" for name in NAMES] + ["no"]
        rows = [{**row, "choices": choices, "answer": f"the {row['answer']}"} for row in rows]
    passes = []
    model = trained_models["image"]
    results = []
    for size in (1, 4):
        count = []
        hook = model.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        results.append(evaluate_questions(model, build_processor(), rows, batch_size=size, max_new_tokens=3))
        hook.remove()
        passes.append(len(count))
    one, many = results
    assert one.failed == many.failed == 0
    assert one.replies == many.replies
    assert one.extra["attention_share"] == pytest.approx(many.extra["attention_share"], abs=1e-5)
    # Five choices of several tokens take five passes after that of the question, or two in batches.
    assert passes[1] < passes[0] * (0.6 if kind == "several tokens" else 0.5)


def test_failed_batch_is_repeated_one_by_one(trained_models):
    model, encode = trained_models["image"], build_processor()
    original, sizes = model.forward, []

    def forward(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if len(inputs["input_ids"]) > 1:
            raise RuntimeError("out of memory")
        return original(**inputs)

    rows, options = with_choices(build_samples(3)), {"conditions": ("given", "none")}
    expected = evaluate_questions(model, encode, rows, **options)
    model.forward = forward
    try:
        result = evaluate_questions(model, encode, rows, batch_size=3, **options)
    finally:
        del model.forward
    assert sizes == [3, 1, 1, 1] * 2
    assert result.replies == expected.replies


def test_replies_are_cached_per_model(trained_models, tmp_path):
    rows, calls = with_choices(build_samples(4)), []
    model = trained_models["image"]
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    options = {"conditions": ("given", "none"), "journal": tmp_path / "journal.jsonl"}
    try:
        first = evaluate_questions(model, build_processor(), rows[:3], **options)
        count = len(calls)
        again = evaluate_questions(model, build_processor(), rows, **options)
        assert 0 < len(calls) - count < count
    finally:
        hook.remove()
    assert again.rows[:3] == first.rows
    other = evaluate_questions(trained_models["text"], build_processor(), rows, **options)
    assert (
        other.replies
        == evaluate_questions(trained_models["text"], build_processor(), rows, conditions=("given", "none")).replies
    )
    changed = [{**row, "choices": ["yes", "no"], "answer": "no"} for row in rows]
    fresh = evaluate_questions(model, build_processor(), changed, conditions=("given", "none"))
    edited = evaluate_questions(model, build_processor(), changed, **options)
    assert (edited.replies, edited.extra) == (fresh.replies, fresh.extra)


def test_several_images(trained_models):
    rows = [{**row, "images": [row.pop("image"), Image.new("RGB", (8, 8))]} for row in build_samples(3)]
    result = evaluate_questions(trained_models["image"], build_processor(), rows, max_new_tokens=2)
    assert result.failed == 0
    assert result.extra["attention_share"][0] > 0


def build_audio_model():
    """A tiny audio-language model with its processor."""
    words = ("<pad>", "<s>", "</s>", "<unk>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "which", "?", "yes", "no")
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=list(words[4:7]),
    )  # fmt: skip
    extractor = hf.WhisperFeatureExtractor(feature_size=5, chunk_length=1, sampling_rate=16000)
    template = (
        "{% for message in messages %}{% for part in message.content %}{% if part.type == 'audio' %}<|audio_bos|> "
        "<|AUDIO|> "
        "<|audio_eos|> {% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    encode = hf.Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=tokenizer, chat_template=template)
    audio = hf.Qwen2AudioEncoderConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=20, num_mel_bins=5,
        max_source_positions=50,
    )  # fmt: skip
    text = hf.Qwen2Config(**{**TEXT, "vocab_size": len(words)})
    torch.manual_seed(0)
    config = hf.Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=4)
    return hf.Qwen2AudioForConditionalGeneration(config).eval(), encode


@pytest.mark.parametrize("mode", ["I;16", "LA"])
def test_pillow_images_are_read_as_their_files(tmp_path, mode):
    random = np.random.default_rng(0)
    rows: dict[str, list] = {"image": [], "file": []}
    for index in range(3):
        values = random.integers(65_536, size=(9, 9), dtype=np.uint16)
        image = Image.fromarray(values if mode == "I;16" else (values // 257).astype(np.uint8))
        if mode == "LA":
            image.putalpha(Image.fromarray(random.integers(256, size=(9, 9), dtype=np.uint8)))
        image.save(file := tmp_path / f"{index}.png")
        for kind, medium in (("image", image), ("file", file)):
            rows[kind].append({"image": medium, "question": "which color ?", "choices": NAMES, "answer": "red"})
    model, processor = build_model(), build_processor()
    results = [
        evaluate_questions(model, processor, part, conditions=("given", "blank"), steer=(1,)) for part in rows.values()
    ]
    assert results[0].failed == 0
    assert results[0].extra == results[1].extra
    assert results[0].replies == results[1].replies


def test_audio(tmp_path):
    import soundfile

    model, encode = build_audio_model()
    rows = []
    for number in range(3):
        sound = np.random.default_rng(number).normal(size=4000 + 1000 * number).astype(np.float32) / 10
        soundfile.write(tmp_path / f"{number}.wav", sound, 8000)
        answer = ("yes", "no")[number % 2]
        rows.append({"audio": f"{number}.wav", "question": "which ?", "answer": answer, "choices": ["yes", "no"]})
    result = evaluate_questions(model, encode, rows, root=tmp_path)
    assert result.failed == 0
    assert result.medium == "audio"
    assert "without the audio" in result.verdict
    assert all(0 < share < 1 for share in result.extra["attention_share"])
    generated = evaluate_questions(
        model, encode, rows, root=tmp_path, score="generated", conditions=("given", "hidden")
    )
    assert generated.failed == 0
    message = "evaluate sample 0: expected inputs of Qwen2AudioForConditionalGeneration: text and audio, got image"
    with pytest.raises(ConfigError, match=message):
        evaluate_questions(model, encode, [{**rows[0], "audio": None, "image": Image.new("RGB", (2, 2))}])


def test_text_only_model_raises():
    from helpers.look import build_llama

    with pytest.raises(ConfigError, match=r"evaluate: expected a generative model with images or audio.*Llama.*text"):
        evaluate_questions(build_llama(), build_processor(), build_samples(2))


def test_invalid_arguments_raise(trained_models):
    model, rows = trained_models["chance"], build_samples(2)
    for options, message in (
        ({"score": "bleu"}, "evaluate: expected a known score, got 'bleu'"),
        ({"conditions": ("none",)}, "evaluate conditions: expected 'given' among them"),
        ({"template": "x"}, "evaluate template: expected a text with"),
        ({"limit": 0}, "evaluate limit: expected at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate_questions(model, build_processor(), rows, **options)
    with pytest.raises(DataError, match='evaluate sample 0: expected "choices" for score="likelihood", got none'):
        evaluate_questions(model, build_processor(), rows, score="likelihood")


# The command.


@pytest.fixture(scope="module")
def saved_models(trained_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    trained_models["image"].save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


def write_samples(folder, rows, kind="jsonl"):
    (folder / "images").mkdir()
    for index, row in enumerate(rows):
        row["image"].save(folder / "images" / f"{index}.png")
        row["image"] = f"images/{index}.png"
    path = folder / f"questions.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif kind == "csv":
        lines = [f"{row['image']},{row['question']},{row['answer']},{'|'.join(row['choices'])}" for row in rows]
        path.write_text("image,question,answer,choices\n" + "\n".join(lines))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_command(saved_models, tmp_path, capsys, kind):
    path = write_samples(tmp_path, with_choices(build_samples(12)), kind)
    out = tmp_path / "out"
    arguments = [
        "evaluate",
        str(saved_models),
        "--data",
        str(path),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--limit",
        "10",
    ]
    assert run(arguments) == 0
    message = capsys.readouterr().out
    assert "as given" in message
    assert "answered as well without the image" in message
    content = json.loads((out / "questions.json").read_text())
    assert content["questions"] == 10
    assert content["conditions"]["given"]["accuracy"] > 0.9
    assert len((out / "questions.csv").read_text().splitlines()) == 11
    assert "hidden from attention" in (out / "questions.html").read_text()
    assert run(arguments) == 0
    assert json.loads((out / "questions.json").read_text()) == content


def test_command_errors(saved_models, tmp_path, capsys):
    good = {"image": "a.png", "question": "which ?", "answer": "red", "choices": ["red", "blue"]}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for rows, message in (
        ([good, {**good, "image": "b.png"}], "evaluate sample 1: expected an existing image file, got"),
        ([good, {**good, "answer": None}], 'evaluate sample 1: expected an "answer", got none'),
        ([good, {**good, "choices": ["red", 1]}], "questions.jsonl"),
    ):
        (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert (
            run(
                [
                    "evaluate",
                    str(saved_models),
                    "--data",
                    str(tmp_path / "questions.jsonl"),
                    "--out",
                    str(tmp_path / "o"),
                ]
            )
            == 1
        )
        assert message in " ".join(capsys.readouterr().err.split())
    assert run(["evaluate", str(saved_models), "--data", "emojis", "--out", str(tmp_path / "o")]) == 1
    assert "table 'emojis': expected an existing file or folder" in capsys.readouterr().err
