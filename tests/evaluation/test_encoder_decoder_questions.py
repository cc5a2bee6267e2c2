"""Encoder-decoders on questions with and without their media: four families, planted behavior, and bad input."""

import functools
import json

import numpy as np
import pytest
import soundfile
import torch
import transformers as hf
from PIL import Image

import equipoise as eq
from equipoise.cli import run
from equipoise.errors import ConfigError, DataError
from equipoise.evaluation import evaluate_questions
from helpers.encoder_decoders import build
from helpers.look import WORDS, tokenizer

FAMILIES = ("whisper", "moonshine", "pix2struct", "florence2")
# Moonshine and Pix2Struct take the same paths as Whisper.
FAST_FAMILIES = [
    name if name in ("whisper", "florence2") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
]
CHOICES = {"one token": ["cat", "dog", "mat"], "several tokens": ["a cat sits", "dog", "the mat"]}
ALL = ("given", "blank", "other", "hidden", "none")


def build_rows(kind, count=4, choices=None, seed=0):
    """Questions of two lengths about random images, or about sounds of two lengths."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        if kind == "image":
            medium = Image.fromarray(random.integers(256, size=(18, 26, 3), dtype=np.uint8))
        else:
            medium = random.normal(size=2560 - 640 * (index % 2)).astype(np.float32)
        words = ["what", "is", "on", "the", "mat", "?"][: 6 - index % 2]
        answer = {"answer": "cat"} if choices is None else {"choices": choices, "answer": choices[index % 2]}
        rows.append({kind: medium, "question": " ".join(words), **answer})
    return rows


def medium_of(inputs):
    return "audio" if "audio" in inputs else "image"


def encoded(name, processor, row):
    """The inputs of the model for one question, written down for each family."""
    ids = lambda text: torch.tensor([tokenizer()(text, add_special_tokens=False)["input_ids"]])  # noqa: E731
    if name == "florence2":
        inputs = processor(text=[row["question"]], images=[row["image"]], return_tensors="pt")
        return {**inputs, "decoder_input_ids": torch.tensor([[1]])}
    if name == "pix2struct":
        inputs, start = processor.image_processor(row["image"], return_tensors="pt"), 0
    else:
        inputs = processor.feature_extractor(row["audio"], sampling_rate=16000, return_tensors="pt")
        start = 3 if name == "whisper" else 1
    return {**inputs, "decoder_input_ids": torch.cat([torch.tensor([[start]]), ids(row["question"])], dim=1)}


def likelihoods(model, inputs, choices):
    values, start = [], inputs["decoder_input_ids"].shape[1]
    for choice in choices:
        ids = torch.tensor([tokenizer()(choice, add_special_tokens=False)["input_ids"]])
        full = torch.cat([inputs["decoder_input_ids"], ids], dim=1)
        with torch.no_grad():
            logits = model(**{**inputs, "decoder_input_ids": full}).logits[0, start - 1 : -1]
        values.append(float(logits.log_softmax(dim=-1).gather(1, ids.T).mean()))
    return values


# Each family and each kind of choice once; the other pairs are slow tests.
FAST_PAIRS = (("whisper", "one token"), ("florence2", "several tokens"), ("whisper", "generated"))


def pairs(*kinds):
    return [
        (name, kind) if (name, kind) in FAST_PAIRS else pytest.param(name, kind, marks=pytest.mark.slow)
        for name in FAMILIES
        for kind in kinds
    ]


@pytest.mark.parametrize(("name", "tokens"), pairs(*CHOICES))
def test_likelihoods_are_those_of_the_model(name, tokens):
    model, processor, inputs = build(name)
    kind, choices = medium_of(inputs), CHOICES[tokens]
    rows = build_rows(kind, choices=choices)
    result = evaluate_questions(model, processor, rows)
    assert result.failed == 0
    expected = [likelihoods(model, encoded(name, processor, row), choices) for row in rows]
    assert result.replies["given"] == [choices[int(np.argmax(values))] for values in expected]
    right = [values[index % 2] for index, values in enumerate(expected)]
    assert result.extra["log_likelihood"] == pytest.approx(right, abs=1e-4)
    hidden = []
    for row in rows:
        with eq.diagnostics.without_modality(model, kind):
            hidden.append(choices[int(np.argmax(likelihoods(model, encoded(name, processor, row), choices)))])
    assert result.replies["hidden"] == hidden
    blank = (
        {"image": Image.new("RGB", (26, 18), tuple(int(part) for part in mean_color(rows)))} if kind == "image" else {}
    )
    for row, reply in zip(rows, result.replies["blank"], strict=True):
        other = blank or {"audio": np.zeros_like(row["audio"])}
        values = likelihoods(model, encoded(name, processor, {**row, **other}), choices)
        assert reply == choices[int(np.argmax(values))]


def mean_color(rows):
    mean = np.mean([np.asarray(row["image"]).reshape(-1, 3).mean(axis=0) for row in rows], axis=0)
    return tuple(int(part) for part in mean.round())


@pytest.mark.parametrize("name", FAST_FAMILIES)
def test_conditions_that_the_model_has(name):
    model, processor, inputs = build(name)
    kind = medium_of(inputs)
    result = evaluate_questions(model, processor, build_rows(kind, choices=CHOICES["one token"]))
    # Florence-2 encodes the question together with the image.
    assert result.conditions == (ALL if name == "florence2" else ALL[:-1])
    assert ("attention_share" in result.extra) == (name == "florence2")
    if name == "florence2":
        assert result.notes == ()
        with torch.no_grad(), eq.watch(model, queries="last") as record:
            model(**encoded(name, processor, build_rows(kind)[0]))
        layers = [layer for layer in record.layers if "encoder_attn" in layer]
        shares = [record.share(layer)[0, :, record.names.index("image")].mean() for layer in layers]
        assert len(shares) == 2
        assert result.extra["attention_share"][0] == pytest.approx(float(torch.stack(shares).mean()), rel=1e-5)
        return
    assert f"The condition 'none' is not available: {type(model).__name__} does not run without its {kind}." in (
        result.verdict
    )
    assert "is 100 % by construction and is not reported" in result.verdict
    assert result.without in ("blank", "hidden")
    alone = evaluate_questions(
        model, processor, build_rows(kind, choices=CHOICES["one token"]), conditions=("given", "none")
    )
    assert alone.conditions == ("given",)
    assert alone.as_well is None


@pytest.mark.parametrize(
    "name", [name if name == "whisper" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_generated_answers_are_those_of_look(name):
    model, processor, inputs = build(name)
    kind = medium_of(inputs)
    rows = build_rows(kind, count=2)
    result = evaluate_questions(model, processor, rows, max_new_tokens=4)
    assert result.failed == 0
    for row, reply in zip(rows, result.replies["given"], strict=True):
        look = eq.look(model, processor, **{kind: row[kind]}, text=row["question"], max_new_tokens=4)
        assert reply == look.answer
    for row, reply in zip(rows, result.replies["hidden"], strict=True):
        full = encoded(name, processor, row)
        length = full["decoder_input_ids"].shape[1]
        for _ in range(4):
            with torch.no_grad(), eq.diagnostics.without_modality(model, kind):
                chosen = model(**full).logits[:, -1:].argmax(dim=-1)
            full["decoder_input_ids"] = torch.cat([full["decoder_input_ids"], chosen], dim=1)
        ids = full["decoder_input_ids"][0, length:].tolist()
        ids = ids[: ids.index(2)] if 2 in ids else ids
        assert reply == tokenizer().decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize(("name", "tokens"), pairs(*CHOICES, "generated"))
def test_batches_give_the_replies_of_single_questions(name, tokens):
    model, processor, inputs = build(name)
    rows = build_rows(medium_of(inputs), count=6, choices=CHOICES.get(tokens))
    steer = {"steer": (-2, 3)} if name == "florence2" else {}
    results, passes = [], []
    for size in (1, 4):
        count = []
        hook = model.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        results.append(evaluate_questions(model, processor, rows, batch_size=size, max_new_tokens=3, **steer))
        hook.remove()
        passes.append(len(count))
    one, many = results
    assert one.failed == many.failed == 0
    assert one.replies == many.replies
    for key, values in one.extra.items():
        assert values == pytest.approx(many.extra[key], abs=1e-4)
    assert passes[1] < 0.75 * passes[0]


def test_encoder_runs_once_for_equal_sounds():
    model, processor, _ = build("whisper")
    rows = build_rows("audio", count=3, choices=CHOICES["several tokens"])
    passes = []
    model.model.encoder.layers[0].register_forward_hook(lambda *_: passes.append(1))
    result = evaluate_questions(model, processor, rows, conditions=("given", "hidden"))
    assert result.failed == 0
    # Each sound; to record cross-attention; a check for each condition; and to confirm the keys that are hidden.
    assert len(passes) == 3 + 1 + 2 + 1


# Planted behavior.


SOUNDS = {"cat": 300.0, "dog": 1500.0}


def tone(word, random):
    times = np.arange(2560) / 16000
    return (np.sin(2 * np.pi * SOUNDS[word] * times + random.uniform(0, 6)) + 0.1 * random.normal(size=2560)).astype(
        np.float32
    )


@functools.cache
def train_whisper(uses):
    """Trains a Whisper whose answer is the word of the tone, or that of the question."""
    model, processor, _ = build("whisper")
    for weight in model.parameters():
        weight.data /= 8 if weight.ndim > 1 else 1
    random = np.random.default_rng(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        heard, asked = (random.choice(list(SOUNDS), size=16) for _ in range(2))
        sounds = [tone(word, random) for word in heard]
        inputs = processor.feature_extractor(sounds, sampling_rate=16000, return_tensors="pt")
        starts = torch.tensor([[3, WORDS.index("what"), WORDS.index(word)] for word in asked])
        target = torch.tensor([WORDS.index(word) for word in (heard if uses == "audio" else asked)])
        logits = model(**inputs, decoder_input_ids=starts).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), processor


@pytest.mark.parametrize("score", ["likelihood", "generated"])
@pytest.mark.parametrize("uses", ["audio", "text"])
def test_verdict_matches_planted_behavior(uses, score):
    model, processor = train_whisper(uses)
    random = np.random.default_rng(2)
    rows = []
    for _ in range(24):
        word = str(random.choice(list(SOUNDS)))
        row = {"audio": tone(word, random), "question": f"what {word}", "answer": word}
        rows.append({**row, "choices": list(SOUNDS)} if score == "likelihood" else row)
    result = evaluate_questions(model, processor, rows, max_new_tokens=1)
    assert result.failed == 0
    assert result.accuracy["given"] > 0.95
    if uses == "audio":
        assert result.difference("blank")["p"] < 0.01
        assert result.difference("hidden")["p"] < 0.01
        assert result.accuracy["other"] < 0.7
        assert "depend on the audio" in result.verdict or "depend partly on the audio" in result.verdict
    else:
        assert result.as_well > 0.95
        assert "No significant use of the audio" in result.verdict


# Journal, page and errors.


def test_replies_are_cached_per_start_of_the_decoder(tmp_path):
    model, processor, _ = build("whisper")
    rows = build_rows("audio", choices=CHOICES["one token"])
    options = {"conditions": ("given", "hidden"), "journal": tmp_path / "journal.jsonl"}
    first = evaluate_questions(model, processor, rows[:3], **options)
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    again = evaluate_questions(model, processor, rows, **options)
    # One to record the cross-attention, and the fourth question under both conditions.
    assert len(calls) == 3
    hook.remove()
    assert again.rows[:3] == first.rows
    processor.tokenizer.prefix_tokens = [3, 5]
    calls.clear()
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    evaluate_questions(model, processor, rows, **options)
    hook.remove()
    assert len(calls) == 9


def test_steering_needs_keys_of_text(tmp_path):
    model, processor, _ = build("florence2")
    rows = build_rows("image", choices=CHOICES["one token"])
    result = evaluate_questions(model, processor, rows, conditions=("given",), steer=(-4, 4))
    low, middle, high = (row["attention_share"] for row in result.steering)
    assert low < middle < high
    result.save(tmp_path)
    assert "More and less attention to the image" in (tmp_path / "questions.html").read_text()
    model, processor, _ = build("whisper")
    message = "evaluate steer: expected a model whose attention has keys of audio and of text, got WhisperFor"
    with pytest.raises(ConfigError, match=message):
        evaluate_questions(model, processor, build_rows("audio", choices=["cat", "dog"]), steer=(1,))


def test_template_without_the_question():
    model, processor, _ = build("whisper")
    rows = build_rows("audio", choices=CHOICES["one token"])
    result = evaluate_questions(model, processor, rows, template="", conditions=("given",))
    inputs = [{**encoded("whisper", processor, row), "decoder_input_ids": torch.tensor([[3]])} for row in rows]
    right = [likelihoods(model, one, CHOICES["one token"])[index % 2] for index, one in enumerate(inputs)]
    assert result.extra["log_likelihood"] == pytest.approx(right, abs=1e-4)


def test_forced_first_token_of_the_decoder():
    model, processor, _ = build("florence2")
    rows = build_rows("image", choices=CHOICES["one token"])
    model.generation_config.forced_bos_token_id = 3
    result = evaluate_questions(model, processor, rows, conditions=("given",))
    inputs = [{**encoded("florence2", processor, row), "decoder_input_ids": torch.tensor([[1, 3]])} for row in rows]
    right = [likelihoods(model, one, CHOICES["one token"])[index % 2] for index, one in enumerate(inputs)]
    assert result.extra["log_likelihood"] == pytest.approx(right, abs=1e-4)


def test_invalid_questions_raise():
    model, processor, _ = build("whisper")
    (row,) = build_rows("audio", count=1)
    with pytest.raises(ConfigError, match="evaluate sample 0: expected one audio for an encoder-decoder, got 2"):
        evaluate_questions(model, processor, [{**row, "audio": [row["audio"], row["audio"]]}])
    with pytest.raises(ConfigError, match=r"inputs of WhisperForConditionalGeneration: .*audio.*, got image"):
        evaluate_questions(model, processor, [{**row, "audio": None, "image": Image.new("RGB", (4, 4))}])
    with pytest.raises(DataError, match='evaluate sample 0: expected an "image", "images" or "audio"'):
        evaluate_questions(model, processor, [{**row, "audio": None}])
    with pytest.raises(DataError, match="evaluate: expected questions that WhisperForConditionalGeneration can run"):
        evaluate_questions(model, processor, [{**row, "question": "what " * 400}], conditions=("given",))
    bad = {**row, "question": "what " * 400}
    result = evaluate_questions(model, processor, [bad, row], conditions=("given", "blank"), max_new_tokens=2)
    assert result.failed == 2
    assert result.rows[0]["class"] == "failed"


@pytest.mark.parametrize("sound", [
    np.zeros((2560, 2), dtype=np.float32), np.zeros(2560, dtype=np.int16), np.zeros(0, dtype=np.float32),
    {"array": np.zeros(2560, dtype=np.float32), "sampling_rate": 8000},
])  # fmt: skip
def test_sounds_that_a_processor_would_misread_raise(sound):
    """A feature extractor takes (sample, channel) for a batch of sounds, and an empty sound for silence."""
    model, processor, _ = build("whisper")
    rows = build_rows("audio", choices=CHOICES["one token"])
    rows[1]["audio"] = sound
    with pytest.raises(DataError, match=r"evaluate sample 1 audio: expected a (floating array \(sample,\)|sound)"):
        evaluate_questions(model, processor, rows)


def test_choices_with_the_same_tokens_raise():
    model, processor, _ = build("whisper")
    rows = build_rows("audio", choices=["cat", "lion", "tiger"])
    message = "evaluate sample 0: expected choices with different tokens, got 'lion' and 'tiger', which are equal"
    with pytest.raises(DataError, match=message):
        evaluate_questions(model, processor, rows[:1], conditions=("given",))


def whisper_processor():
    """A WhisperProcessor whose tokens are bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [
        *bytes_to_unicode().values(),
        "<|endoftext|>",
        "<|startoftranscript|>",
        "<|startofprev|>",
        "<|notimestamps|>",
    ]
    words = hf.WhisperTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], bos_token="<|startoftranscript|>",
        additional_special_tokens=tokens[-3:],
    )  # fmt: skip
    extractor = hf.WhisperFeatureExtractor(feature_size=5, sampling_rate=16000, chunk_length=1, hop_length=1000)
    return hf.WhisperProcessor(extractor, words)


def test_prompt_and_choices_of_whisper():
    """The question is text before the start of the transcript, and choices begin with a space, as transcripts do."""
    processor = whisper_processor()
    config = build("whisper")[0].config
    config.update({"vocab_size": 264, "eos_token_id": 256, "decoder_start_token_id": 257})
    torch.manual_seed(0)
    model = hf.WhisperForConditionalGeneration(config).eval()
    rows = build_rows("audio", count=2, choices=["a", "bc"])
    result = evaluate_questions(model, processor, rows)
    assert result.failed == 0
    byte = processor.tokenizer.get_vocab()
    ids = lambda text: [byte[character.replace(" ", "Ġ")] for character in text]  # noqa: E731
    special = [byte[f"<|{name}|>"] for name in ("startofprev", "startoftranscript", "notimestamps")]
    for index, row in enumerate(rows):
        features = processor.feature_extractor(row["audio"], sampling_rate=16000, return_tensors="pt")
        start = [special[0], *ids(f" {row['question']}"), *special[1:]]
        answer = ids(f" {row['answer']}")
        with torch.no_grad():
            logits = model(**features, decoder_input_ids=torch.tensor([start + answer])).logits[0, len(start) - 1 : -1]
        value = logits.log_softmax(dim=-1).gather(1, torch.tensor([answer]).T).mean()
        assert result.extra["log_likelihood"][index] == pytest.approx(float(value), abs=1e-4)


def test_other_encoder_decoders_raise():
    from helpers.vlms import family

    model, _ = family("bart")
    with pytest.raises(ConfigError, match="evaluate: expected a generative model with images or audio"):
        evaluate_questions(model, tokenizer(), build_rows("audio"))
    model, processor, _ = build("whisper")
    with pytest.raises(ConfigError, match="expected a generative model, got WhisperModel, which has no language"):
        evaluate_questions(model.model, processor, build_rows("audio"))


def test_command(tmp_path, capsys):
    model, processor, _ = build("moonshine")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = []
    for index, row in enumerate(build_rows("audio", choices=["cat", "dog"])):
        soundfile.write(tmp_path / f"{index}.wav", row["audio"], 16000)
        rows.append(json.dumps({**row, "audio": f"{index}.wav"}))
    (tmp_path / "questions.jsonl").write_text("\n".join(rows))
    arguments = ["evaluate", str(tmp_path / "model"), "--data", str(tmp_path / "questions.jsonl"), "--device", "cpu",
                 "--template", "", "--out", str(tmp_path / "out")]  # fmt: skip
    assert run(arguments) == 0
    assert "The condition 'none' is not available" in " ".join(capsys.readouterr().out.split())
    content = json.loads((tmp_path / "out" / "questions.json").read_text())
    assert list(content["conditions"]) == ["given", "blank", "other", "hidden"]
    assert "does not run without its audio" in (tmp_path / "out" / "questions.html").read_text()
    assert run([*arguments, "--steer=1"]) != 0
    assert "evaluate steer" in capsys.readouterr().err
