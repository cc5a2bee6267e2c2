"""Black boxes on questions with and without their images."""

import csv
import http.server
import importlib.util
import json
import math
import threading
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

import equipoise as eq
from equipoise.errors import ConfigError, DataError
from equipoise.evaluation.questions.answer_scoring import chosen, normalize, yes_or_no

COLORS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
EXAMPLE = Path(__file__).parents[2] / "examples" / "blind_served_model.py"


def build_samples(count=40, choices=False):
    result = []
    for index in range(count):
        color = [*COLORS][(index * 7 + index // 4) % 4]
        sample = {
            "image": Image.new("RGB", (4, 4 + index % 3), COLORS[color]), "question": f"Which color has thing {index}?",
            "answer": color, "category": "odd" if index % 2 else "even",
        }  # fmt: skip
        result.append(sample | ({"choices": [*COLORS]} if choices else {}))
    return result


def answer_from_image(image, prompt):
    if image is None:
        return "I see no image."
    return {value: name for name, value in COLORS.items()}.get(image.getpixel((0, 0)), "gray")


def answer_from_text(data):
    answers = {sample["question"]: sample["answer"] for sample in data}
    return lambda image, prompt: answers[prompt.splitlines()[0]].upper()


def answer_at_random(image, prompt):
    seed = sum(map(ord, prompt)) + (0 if image is None else sum(image.getpixel((0, 0))) + image.height)
    return [*COLORS][np.random.default_rng(seed).integers(4)]


@pytest.mark.parametrize("choices", [False, True])
def test_verdict_names_the_modality_in_use(choices):
    data = build_samples(choices=choices)
    image, text, chance = (
        eq.blind(target, data) for target in (answer_from_image, answer_from_text(data), answer_at_random)
    )
    assert {name: value for name, value in image.accuracy.items() if name != "other"} == {
        "given": 1.0, "blank": 0.0, "none": 0.0
    }  # fmt: skip
    assert image.accuracy["other"] < 0.5
    assert image.needing == list(range(40))
    assert image.answered_without == []
    assert image.verdict.startswith("0 % of these questions are answered as well without the image (accuracy 100.0 %")
    assert "The answers depend on the image" in image.verdict
    assert text.accuracy == dict.fromkeys(("given", "blank", "other", "none"), 1.0)
    assert text.as_well == 1.0
    assert text.answered_without == list(range(40))
    assert text.verdict.startswith("100 % of these questions are answered as well without the image")
    assert "No significant use of the image" in text.verdict
    assert "is not significantly above chance" in chance.verdict
    assert image.chance == pytest.approx(0.25, abs=0.05)
    assert image.by_category["odd"]["questions"] == 20


def test_scores_of_a_mixed_target():
    data = build_samples(30)
    easy = {sample["question"] for sample in data[:20]}
    answers = answer_from_text(data)
    result = eq.blind(
        lambda image, prompt: answers(image, prompt) if prompt in easy else answer_from_image(image, prompt), data
    )
    assert result.accuracy["none"] == pytest.approx(2 / 3)
    assert result.answered_without == list(range(20))
    assert result.needing == list(range(20, 30))
    assert result.as_well == pytest.approx(2 / 3)
    change = result.difference("none")
    assert change["difference"] == pytest.approx(1 / 3)
    low, high = change["interval"]
    assert low < 1 / 3 < high
    # McNemar's mid-p of 10 against 0.
    assert change["p"] == pytest.approx(0.5**10, rel=1e-6)
    assert (
        "The answers depend partly on the image: 10 questions need it, and 20 are answered without it" in result.verdict
    )
    table = result.table().splitlines()
    assert table[0].split() == ["image", "accuracy", "95", "%", "interval", "difference", "p"]
    assert table[1].split()[:4] == ["as", "given", "100.0", "%"]
    assert "-33.3" in table[4]
    assert table[4].endswith("<.001")


def test_media_of_each_condition():
    data, seen = build_samples(12), []

    def target(image, prompt):
        seen.append(image)
        return "red"

    eq.blind(target, data)
    given, blank, other, none = seen[0::4], seen[1::4], seen[2::4], seen[3::4]
    assert [image.getpixel((0, 0)) for image in given] == [COLORS[sample["answer"]] for sample in data]
    assert len({image.getpixel((0, 0)) for image in blank}) == 1
    assert [image.size for image in blank] == [image.size for image in given]
    assert all(a.tobytes() != b.tobytes() for a, b in zip(given, other, strict=True))
    assert none == [None] * 12
    again, seen[:] = list(seen), []
    eq.blind(target, data)
    assert [image.tobytes() for image in seen[2::4]] == [image.tobytes() for image in again[2::4]]


def test_arrays_audio_and_several_media():
    rows = [
        {"audio": np.full(50, value, dtype=np.float32), "question": "How loud?", "answer": str(value)}
        for value in (1, 2)
    ]
    seen = []
    result = eq.blind(lambda sound, prompt: seen.append(sound) or "1", rows)
    assert result.medium == "audio"
    assert "without the audio" in result.verdict
    assert [None if sound is None else float(sound[0]) for sound in seen] == [1, 0, 2, None, 2, 0, 1, None]
    pair = [{"images": [Image.new("RGB", (2, 2), c), Image.new("RGB", (3, 3), c)], "question": "?", "answer": c}
            for c in ("red", "blue")]  # fmt: skip
    seen.clear()
    eq.blind(lambda media, prompt: seen.append(media) or "x", pair, conditions=("given", "blank"))
    assert [[image.size for image in media] for media in seen] == [[(2, 2), (3, 3)]] * 4
    both = [{"image": np.zeros((2, 2, 3)) + n, "audio": np.ones(3) * n, "question": "?", "answer": "a"} for n in (1, 2)]
    seen.clear()
    eq.blind(lambda media, prompt: seen.append(media) or "x", both, conditions=("given", "blank"))
    assert {name: value.shape for name, value in seen[0].items()} == {"image": (2, 2, 3), "audio": (3,)}
    assert float(seen[1]["image"][0, 0, 0]) == 1.5
    assert float(seen[1]["audio"].sum()) == 0


def test_failed_calls_are_retried(tmp_path):
    data, calls = build_samples(6), []

    def target(image, prompt):
        calls.append(prompt)
        if "thing 2" in prompt:
            raise ConnectionError("refused")
        if "thing 4" in prompt:
            return 7
        return answer_from_image(image, prompt)

    journal = tmp_path / "deep" / "journal.jsonl"
    result = eq.blind(target, data, journal=journal, retries=1, wait=0.0, conditions=("given", "none"))
    assert result.failed == 4
    assert calls.count("Which color has thing 2?") == 4
    assert result.errors["given", 2] == "ConnectionError: refused"
    assert result.errors["none", 4] == "expected a text, got int"
    assert math.isnan(result.scores["given"][2])
    assert result.accuracy["given"] == 1.0
    assert "4 of 12 calls failed and are not scored; the first: ConnectionError: refused." in result.verdict
    assert result.rows[2]["class"] == "failed"
    # A power failure in the middle of a line.
    journal.write_bytes(journal.read_bytes() + b'{"key": "abc", "te')
    calls.clear()
    again = eq.blind(
        lambda image, prompt: calls.append(prompt) or answer_from_image(image, prompt),
        data,
        journal=journal,
        conditions=("given", "none"),
    )
    assert calls == ["Which color has thing 2?"] * 2 + ["Which color has thing 4?"] * 2
    assert again.failed == 0
    assert again.accuracy == {"given": 1.0, "none": 0.0}


def test_replies_are_kept_after_an_interruption(tmp_path):
    data, calls = build_samples(5), []

    def target(image, prompt):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(prompt)
        return answer_from_image(image, prompt)

    journal = tmp_path / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        eq.blind(target, data, journal=journal, conditions=("given", "none"))
    assert len(journal.read_text().splitlines()) == 3
    rest = []
    eq.blind(lambda *asked: rest.append(asked) or "x", data, journal=journal, conditions=("given", "none"))
    assert len(rest) == 7
    # Another prompt or image is another question.
    eq.blind(lambda *asked: rest.append(asked) or "x", data, journal=journal, conditions=("given", "none"),
             prompt=lambda sample: sample["question"] + " One word.")  # fmt: skip
    assert len(rest) == 17


def test_target_timeouts_and_empty_replies(tmp_path):
    stop = threading.Event()

    def hangs(image, prompt):
        stop.wait(60)
        return "late"

    try:
        result = eq.blind(hangs, build_samples(2), conditions=("given",), timeout=0.05, retries=0)
    finally:
        stop.set()
    assert result.errors["given", 0] == "TimeoutError: no reply within 0.05 s"
    assert result.verdict == (
        "No question was answered: every call failed; the first: TimeoutError: no reply within 0.05 s."
    )
    assert result.save(tmp_path)

    def refuses(image, prompt):
        raise OSError("down")

    with pytest.raises(
        DataError, match="blind: expected a target that replies, got 20 failed calls in a row, the last: OSE"
    ):
        eq.blind(refuses, build_samples(30), retries=0, journal=tmp_path / "j")


def test_several_workers_give_the_same_result():
    data = build_samples(20)

    def slow(image, prompt):
        time.sleep(0.001)
        return answer_from_image(image, prompt)

    one, many = eq.blind(answer_from_image, data), eq.blind(slow, data, workers=4)
    assert one.rows == many.rows


def test_yes_bias_is_reported():
    data = [
        {"image": Image.new("RGB", (2, 2), (n, 0, 0)), "question": f"Is it {n}?", "answer": "yes" if n % 2 else "no"}
        for n in range(20)
    ]
    result = eq.blind(lambda image, prompt: "Yes, it is.", data)
    assert result.yes_no["given"] == pytest.approx(
        {"questions": 20, "yes_answers": 0.5, "yes_replies": 1.0, "precision": 0.5, "recall": 1.0, "f1": 2 / 3}
    )
    assert "There is a bias to yes: it is the reply to 100 % of the yes-or-no questions, and the answer to 50 %." in (
        result.verdict
    )


def test_files_and_saving(tmp_path):
    for name, color in COLORS.items():
        Image.new("RGB", (4, 4), color).save(tmp_path / f"{name}.png")
    data = [{"image": f"{name}.png", "question": "Color?", "answer": [name, "x"], "id": f"q-{name}"} for name in COLORS]
    result = eq.blind(answer_from_image, data, root=tmp_path, name="mine <b>")
    assert result.accuracy["given"] == 1.0
    folder = result.save(tmp_path / "out")
    content = json.loads((folder / "questions.json").read_text())
    assert content["conditions"]["given"]["accuracy"] == 1.0
    assert content["conditions"]["none"]["difference"] == 1.0
    assert content["verdict"] == result.verdict
    with open(folder / "questions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"q-{name}" for name in COLORS]
    assert [row["given"] for row in rows] == ["1.0"] * 4
    page = (folder / "questions.html").read_text()
    assert "mine &lt;b&gt;" in page
    assert "answered as well without the image" in page
    with pytest.raises(DataError, match=r"blind sample 1: expected an existing image file, got '.*missing.png'"):
        eq.blind(answer_from_image, [data[0], {**data[1], "image": "missing.png"}], root=tmp_path)


@pytest.mark.parametrize(
    ("reply", "index"),
    [("B", 1), ("b", 1), ("(C)", 2), ("C.", 2), ("B: dog", 1), ("**A**", 0), ("The answer is B.", 1), ("Answer: C", 2),
     ("dog", 1), ("It is a dog.", 1), ("A dog is running", 1), ("a school bus", 2), ("bus", 3), ("cat or dog", None),
     ("none of them", None), ("", None), ("D) bus\nbecause", 3), ("I don't know", None), ("Because it barks", None)],
)  # fmt: skip
def test_choices_in_replies(reply, index):
    assert chosen(reply, ("cat", "dog", "school bus", "bus")) == index


def test_normalization():
    assert normalize("  The Two, cats! ") == "2 cats"
    assert normalize("1,000") == normalize("1000")
    assert normalize("A") == "a"
    assert yes_or_no("Yes.") == "yes"
    assert yes_or_no("Perhaps yes") is None


def test_metrics():
    data = [{**sample, "answer": "Red"} for sample in build_samples(4)]
    for metric, reply, value in (
        ("exact", "red", 0.0),
        ("exact", " Red\n", 1.0),
        ("normalized", "It's red", 0.0),
        ("normalized", "a red.", 1.0),
        (lambda reply, sample: "red" in reply, "reddish", 1.0),
    ):
        result = eq.blind(lambda image, prompt, reply=reply: reply, data, metric=metric, conditions=("given",))
        assert result.accuracy == {"given": value}


IMAGE = Image.new("RGB", (2, 2))
GOOD = {"image": IMAGE, "question": "What?", "answer": "x"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "blind sample 1: expected a text \"question\", got ' '"),
        ({"answer": None}, 'blind sample 1: expected an "answer", got none. Remove questions without an answer'),
        ({"answer": []}, 'blind sample 1: expected an "answer"'),
        ({"image": None}, 'blind sample 1: expected an "image", "images" or "audio"'),
        ({"image": 3}, "blind sample 1: expected image as a file, a Pillow image or an array, got 3"),
        (
            {"choices": ["x", 1]},
            'blind sample 1: expected "choices" that are all texts, or all numbers, got number, str',
        ),
        ({"choices": ["x", "x"]}, "blind sample 1: expected from 2 to 26 different choices"),
        ({"choices": ["y", "z"]}, r"blind sample 1: expected an answer among the choices \['y', 'z'\], got 'x'"),
    ],
)
def test_invalid_samples_raise(change, message):
    with pytest.raises(DataError, match=message):
        eq.blind(answer_from_image, [GOOD, {**GOOD, **change}])


def test_invalid_arguments_raise(tmp_path):
    for options, message in (
        ({"conditions": ("blank",)}, "blind conditions: expected 'given' among them"),
        ({"conditions": ("given", "black")}, "blind conditions: expected some of given, blank, other, none"),
        ({"metric": "bleu"}, "blind: expected a known metric, got 'bleu'"),
        ({"metric": "choice"}, "blind metric: expected questions with choices"),
        ({"metric": lambda reply, sample: 2}, "blind metric: expected a number from 0 to 1, got 2"),
        ({}, "blind conditions: expected questions with different media for the condition 'other'"),
    ):
        with pytest.raises(ConfigError, match=message):
            eq.blind(
                answer_from_image, [GOOD, GOOD], **({"conditions": ("given", "none")} | options if options else {})
            )
    with pytest.raises(ConfigError, match=r"blind: expected a function \(media, prompt\) -> text, got str"):
        eq.blind("gpt", [GOOD])
    with pytest.raises(DataError, match="blind: expected at least one question, got none"):
        eq.blind(answer_from_image, [])
    (tmp_path / "journal").write_text("no journal\n")
    with pytest.raises(DataError, match=r"journal '.*': expected lines of"):
        eq.blind(answer_from_image, [GOOD], conditions=("given",), journal=tmp_path / "journal")


# The example, against a server.


class Server(http.server.BaseHTTPRequestHandler):
    """An endpoint with OpenAI's chat interface that says yes to images, and fails for each third question once."""

    requests: ClassVar[list[str]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = json.dumps(body)
        first = key not in self.requests
        self.requests.append(key)
        if first and len(set(self.requests)) % 3 == 0:
            self.send_error(503)
            return
        kinds = [part["type"] for part in body["messages"][0]["content"]]
        content = {"choices": [{"message": {"content": "yes" if "image_url" in kinds else "no"}}]}
        answer = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Server.requests = []
    result = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=result.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{result.server_address[1]}/v1"
    result.shutdown()
    result.server_close()
    thread.join()


def test_served_model_example(server, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("blind_served_model", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rows = []
    for n in range(4):
        Image.new("RGB", (2, 2), (n, 0, 0)).save(tmp_path / f"{n}.png")
        rows.append(json.dumps({"image": f"{n}.png", "question": f"Is there image {n}?", "answer": "yes"}))
    (tmp_path / "questions.jsonl").write_text("\n".join(rows))
    arguments = [str(tmp_path / "questions.jsonl"), "--url", server, "--model", "tiny", "--out", str(tmp_path / "out"),
                 "--wait", "0"]  # fmt: skip
    example.main(arguments)
    output = capsys.readouterr().out
    assert "as given                   100.0 %" in output
    assert "text only                    0.0 %" in output
    asked = len(Server.requests)
    assert asked > 16
    assert json.loads(Server.requests[0])["model"] == "tiny"
    assert (tmp_path / "out" / "questions.html").exists()
    example.main(arguments)
    assert len(Server.requests) == asked
