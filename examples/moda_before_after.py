"""Attention of a vision-language model before and after training with MODA: moda_before_after.py [FOLDER] [STEPS]."""

import sys

import matplotlib.pyplot as plt
import torch
import transformers as hf
from PIL import Image

import equipoise as eq
from equipoise.diagnostics.modality_link_test import read_modality_links
from equipoise.inspection.dummy_processor import DummyProcessor
from equipoise.inspection.pretrained_loading import load_pretrained
from equipoise.inspection.prompt_inputs import complete_inputs, placeholders, prepare_prompt, tokenizer_of

FOLDER = next((word for word in sys.argv[1:] if not word.isdigit()), None)
STEPS = next((int(word) for word in sys.argv[1:] if word.isdigit()), 100)
COLORS = ("red", "green", "blue", "white", "black", "orange", "purple", "yellow")

torch.manual_seed(0)
if FOLDER:
    model, processor = load_pretrained(FOLDER)
else:  # a tiny model with random weights
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision = hf.CLIPVisionConfig(**sizes, image_size=16, patch_size=4)
    text = hf.LlamaConfig(**sizes, vocab_size=300, pad_token_id=0, initializer_range=0.3)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=299)
    model = hf.LlavaForConditionalGeneration(config)
    processor = DummyProcessor(model.eval())
model.set_attn_implementation("eager")
questions, answers = [], []
for color in COLORS:
    questions.append(prepare_prompt(model, processor, "What color is it?", Image.new("RGB", (64, 64), color)).inputs)
    if not FOLDER:  # DummyProcessor puts the image first, where its tokens cannot attend to text
        questions[-1]["input_ids"] = questions[-1]["input_ids"].roll(5, dims=1)
    answers.append(tokenizer_of(processor)(color, add_special_tokens=False, return_tensors="pt")["input_ids"])
ids = torch.cat([inputs["input_ids"] for inputs in questions]).cpu()
labels = torch.isin(ids, torch.tensor(placeholders(model.config))).long()

before, moda = read_modality_links(model, questions, labels), eq.hf.apply_moda(model)
optimizer = torch.optim.AdamW(moda.parameters(), lr=3e-3)
for step in range(STEPS):
    inputs, answer = questions[step % 8], answers[step % 8].to(model.device)
    ignored = torch.full_like(inputs["input_ids"], -100)
    full_inputs = complete_inputs(inputs, answer, model.config.model_type)
    loss = model(**full_inputs, labels=torch.cat([ignored, answer], dim=1)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
after = read_modality_links(model, questions, labels)
for metric, value in before.rows(("text", "image")).items():
    print(f"{metric:24s} before {value:9.3f}   after {after.rows(('text', 'image'))[metric]:9.3f}")
for links, name in ((before, "before"), (after, "after MODA")):
    plt.plot(range(1, len(links.share) + 1), links.share[:, 0, 1], label=name)
plt.gca().set(xlabel="layer", ylabel="attention of text to the image")
plt.legend()
plt.savefig("moda_before_after.png", dpi=150)
