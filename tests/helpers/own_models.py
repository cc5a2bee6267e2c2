"""Models as users write them, without any type of equipoise."""

import re
import warnings
from pathlib import Path

import torch
from torch import nn

from helpers.foreign import TimmAttention
from helpers.vlms import IMAGE, llava

PAGE = Path(__file__).parents[2] / "docs" / "own_models.md"

NAMES = ("audio", "image")
OUTPUTS = 3


def batch(seed=0, size=6):
    random = torch.Generator().manual_seed(seed)
    return {
        "audio": torch.randn(size, 4, 5, generator=random),
        "image": torch.randn(size, 3, 7, generator=random),
        "target": torch.randint(0, OUTPUTS, (size,), generator=random),
    }


class MultiheadNet(nn.Module):
    """A class token attends to the tokens of both modalities; keyword arguments, a tensor as result."""

    def __init__(self, dim=8):
        super().__init__()
        self.audio, self.image = nn.Linear(5, dim), nn.Linear(7, dim)
        self.cls = nn.Parameter(torch.randn(dim))
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, OUTPUTS)

    def forward(self, audio, image):
        tokens = torch.cat([self.cls.expand(len(audio), 1, -1), self.audio(audio), self.image(image)], dim=1)
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        return self.head(self.norm(tokens[:, 0]))


class EncoderNet(nn.Module):
    """Two tensors by position, two encoder layers, modalities in another order in the sequence; a tuple as result."""

    def __init__(self, dim=8):
        super().__init__()
        self.wave = nn.Sequential(nn.Linear(5, dim), nn.GELU(), nn.Linear(dim, dim))
        self.pixels = nn.Linear(7, dim)
        layer = nn.TransformerEncoderLayer(dim, 2, 16, dropout=0.0, batch_first=True)
        self.fusion = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(dim, OUTPUTS)

    def forward(self, x, y):
        hidden = self.fusion(torch.cat([self.pixels(y), self.wave(x)], dim=1))
        return self.classifier(hidden.mean(dim=1)), hidden


class Tower(nn.Module):
    """An encoder as in timm: attention with one projection, and a pooled vector."""

    def __init__(self, inputs, dim):
        super().__init__()
        self.embed, self.attn, self.norm = nn.Linear(inputs, dim), TimmAttention(dim, 2), nn.LayerNorm(dim)

    def forward(self, x):
        x = self.embed(x)
        return self.norm(x + self.attn(x)).mean(dim=1)


class TwoTowers(nn.Module):
    """One dict as argument and result; the towers meet in the head alone."""

    def __init__(self, dim=8):
        super().__init__()
        self.towers = nn.ModuleDict({"audio": Tower(5, dim), "image": Tower(7, dim)})
        self.head = nn.Linear(2 * dim, OUTPUTS)

    def forward(self, batch):
        return {"logits": self.head(torch.cat([self.towers[name](batch[name]) for name in NAMES], dim=1)), "aux": None}


class BertNet(nn.Module):
    """BERT of Hugging Face reads the features of both modalities."""

    def __init__(self, dim=8):
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(
            hidden_size=dim, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=9
        )
        self.audio, self.image, self.bert = nn.Linear(5, dim), nn.Linear(7, dim), BertModel(config)
        self.classifier = nn.Linear(dim, OUTPUTS)

    def forward(self, audio, image):
        tokens = torch.cat([self.audio(audio), self.image(image)], dim=1)
        return self.classifier(self.bert(inputs_embeds=tokens).last_hidden_state[:, 0])


LLAVA = "vlm.base_model.model.model."
"""Name of the LLaVA model inside of ``LlavaNet``."""


class LlavaNet(nn.Module):
    """A tiny LLaVA with LoRA on the attention of its language model and a trained projector; a head on the last
    token.
    """

    def __init__(self):
        super().__init__()
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", modules_to_save=["multi_modal_projector"]
        )
        with warnings.catch_warnings():
            # peft asks transformers by a deprecated name.
            warnings.simplefilter("ignore", FutureWarning)
            self.vlm = get_peft_model(llava()[0], config)
        self.head = nn.Linear(16, OUTPUTS)

    def forward(self, pixel_values, input_ids):
        out = self.vlm(pixel_values=pixel_values, input_ids=input_ids, output_hidden_states=True)
        return self.head(out.hidden_states[-1][:, -1])


def llava_batch(seed=0, size=6):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 80, (size, 9), generator=random)
    ids[:, 2:6] = IMAGE
    pixels = torch.randn(size, 3, 8, 8, generator=random)
    target = torch.randint(0, OUTPUTS, (size,), generator=random)
    return {"pixel_values": pixels, "input_ids": ids, "target": target}


def matrix():
    """kind of model -> method -> cell of the table in docs/own_models.md."""
    table = re.search(r"<!-- matrix -->\n(.*?)\n\n", PAGE.read_text(encoding="utf-8"), re.DOTALL).group(1).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[2:]}
