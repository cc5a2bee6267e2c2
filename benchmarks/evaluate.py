"""Cost of ``equipoise evaluate --data`` under all five conditions, relative to the questions as given.

    python benchmarks/evaluate.py                           # a minute
    python benchmarks/evaluate.py --width 512 --layers 8 --rounds 1
    python benchmarks/evaluate.py --choice_tokens 3

A LLaVA with random weights (2 vision layers for 256 patches, by default 4 language layers of width 256), and
24 questions with four choices of one token (or ``--choice_tokens``) and an image of 224 x 224 each. ``plain`` is the
loop without this library: processor, one forward pass for each question (or for each choice of several tokens) and the
log-likelihoods of the choices. ``given`` is ``evaluate_questions`` with
conditions=("given",), which also records the share of attention, ``five`` is the default, and ``five, batches`` runs 4
questions in one forward pass. CPU time of one thread; the variants alternate within each round, medians over rounds.
Memory is the peak allocated memory without weights. Replies of both batch sizes are compared.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile

from equipoise.evaluation import evaluate_questions

COLORS = ("red", "green", "blue", "white")
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "which", "color", "has", "the", "thing", "in", "this", *COLORS)


def model_and_processor(width: int, layers: int) -> tuple[Any, Any]:
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    processor = hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessorPil(), tokenizer=tokenizer, patch_size=14,
        num_additional_image_tokens=1, vision_feature_select_strategy="default",
    )  # fmt: skip
    vision = hf.CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
                                 image_size=224, patch_size=14)  # fmt: skip
    text = hf.LlamaConfig(vocab_size=len(WORDS), hidden_size=width, intermediate_size=3 * width,
                          num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
    torch.manual_seed(0)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=4, vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration(config).eval(), processor


def samples(count: int, tokens: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    choices = [" ".join([*["the"] * (tokens - 1), color]) for color in COLORS]
    return [
        {
            "image": Image.fromarray(random.integers(256, size=(224, 224, 3), dtype=np.uint8)),
            "question": " ".join(["which color has the", *["thing in this"] * (1 + index % 3)]),
            "choices": choices, "answer": choices[index % 4],
        } for index in range(count)
    ]  # fmt: skip


@torch.no_grad()
def plain(model: Any, processor: Any, rows: list[dict[str, Any]]) -> list[str]:
    replies = []
    for row in rows:
        prompt = f"<image>\n{row['question']}"
        inputs = processor(text=[prompt], images=[row["image"]], return_tensors="pt")
        answers = [torch.tensor([[WORDS.index(word) for word in choice.split()]]) for choice in row["choices"]]
        if answers[0].shape[1] == 1:
            logits = model(**inputs).logits[0, -1].log_softmax(dim=-1)
            values = [float(logits[ids[0, 0]]) for ids in answers]
        else:
            values = [likelihood(model, inputs, ids) for ids in answers]
        replies.append(row["choices"][max(range(len(values)), key=values.__getitem__)])
    return replies


def likelihood(model: Any, inputs: dict[str, Any], answer: torch.Tensor) -> float:
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
    likely = logits[0, -answer.shape[1] - 1 : -1].log_softmax(dim=-1).gather(1, answer.T)
    return float(likely.double().mean())


def peak(call: Any) -> float:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 256), ("layers", 4), ("questions", 24), ("rounds", 2), ("choice_tokens", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    hf.logging.set_verbosity_error()
    model, processor = model_and_processor(options.width, options.layers)
    rows = samples(options.questions, options.choice_tokens)
    variants = {
        "plain": lambda: plain(model, processor, rows),
        "given": lambda: evaluate_questions(model, processor, rows, conditions=("given",)),
        "five": lambda: evaluate_questions(model, processor, rows),
        "five, batches": lambda: evaluate_questions(model, processor, rows, batch_size=4),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    results: dict[str, Any] = {}
    for turn in range(options.rounds + 1):
        for name, call in variants.items():
            start = time.process_time()
            results[name] = call()
            if turn:
                times[name].append(time.process_time() - start)
    if results["five"].replies["given"] != results["plain"]:
        raise SystemExit("the replies differ from those of the plain loop")
    if results["five"].rows != results["five, batches"].rows:
        shares = [abs(a["attention_share"] - b["attention_share"]) for a, b in zip(
            results["five"].rows, results["five, batches"].rows, strict=True)]  # fmt: skip
        print(f"largest difference of a share between batch sizes: {max(shares):.1e}")
        if results["five"].replies != results["five, batches"].replies:
            raise SystemExit("the replies depend on the batch size")
    print(f"torch {torch.__version__}, transformers {hf.__version__}, {len(rows)} questions, {options.rounds} rounds")
    print(f"{'':16}{'seconds':>9}{'/ plain':>9}{'/ given':>9}{'peak MB':>9}", flush=True)
    for name, values in times.items():
        against = [
            statistics.median(a / b for a, b in zip(values, times[other], strict=True)) for other in ("plain", "given")
        ]
        print(
            f"{name:16}{statistics.median(values):9.2f}{against[0]:9.2f}{against[1]:9.2f}{peak(variants[name]):9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
