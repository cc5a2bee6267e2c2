"""What the page of a diagnosis says of each test: the question, what the picture shows, when it misleads."""

from __future__ import annotations

from typing import NamedTuple


class TestTexts(NamedTuple):
    """The fixed text of one test."""

    question: str
    shows: str
    misleads: str


WORDS: dict[str, TestTexts] = {
    "score": TestTexts(
        "How good is it, and what does each modality alone reach?",
        "The score on these samples, beside what each modality reaches alone. Lines are 95 % intervals; the "
        "dotted line is the best constant answer. No multimodal model should be worse than "
        "its best single modality.",
        "Alone means a model of that modality where one was given, and otherwise the model's own unimodal head. A "
        "head that only watches (a probe) reads features made for the fusion, so it is a floor: a model trained for "
        "that modality may reach more.",
    ),
    "noise": TestTexts(
        "What is left when a modality is replaced by noise?",
        "Every sample again, with one modality as Gaussian noise of the data's own mean and spread. A model that "
        "uses a modality loses something; one that falls back gracefully keeps what the others are worth.",
        "A model that has never met noise may be thrown by its strangeness and not by the loss of information, so a "
        "fall proves dependence, not benefit.",
    ),
    "masking": TestTexts(
        "What is left when a modality is taken away?",
        "The tokens of one modality are gone from every layer of the fusion, as in a batch that lacks it. The drop "
        "is what the model owes to it, given that it has the others.",
        "Two modalities that say the same can each be spared without a drop: the Shapley values below divide what "
        "they share. A model that never met a missing modality is surprised, and part of the drop is its surprise.",
    ),
    "response": TestTexts(
        "Does attention leave a modality that is destroyed?",
        "The same samples twice, whole and with one modality as noise. Attention that looks at quality moves to the "
        "right. r is the correlation of “was replaced” with the attention that goes to the others: +1 leaves "
        "always, 0 does not notice, below 0 is drawn to the noise.",
        "It speaks of attention, not of use. Attention may leave while the answer still suffers, and r hangs on how "
        "alike samples are: a tiny shift of very even attention gives a large r. Look at the distance as well. The "
        "modality should be chosen on validation data.",
    ),
    "attention": TestTexts(
        "Where does attention go?",
        "Attention of each layer, as a mean over queries, heads and samples; what is missing to 100 % goes to "
        "special tokens such as the class token. A share that never changes from sample to sample is static fusion "
        "in all but name.",
        "Attention is not proof of use. It tells how much of a mixture comes from a modality's tokens, not what "
        "they say: values may be small, cancel, or carry what earlier layers mixed into them. An even division is "
        "no aim in itself.",
    ),
    "corruption": TestTexts(
        "How does it fall as a modality is damaged by degrees?",
        "Noise is added to one modality, from none to as much as the data's own spread, at test time alone. A good "
        "model falls slowly and ends at what the others are worth; attention that looks at quality falls with it.",
        "All levels share the same random numbers, so the curve is smoother than its points are sure. At full level "
        "the input is still in there, under noise of its own size: this is milder than replacing it.",
    ),
    "shapley": TestTexts(
        "What is each modality owed?",
        "What each adds to the score, as a mean over all orders in which they may come. The values sum to the score "
        "minus that of a constant answer. A negative one says that the model would be better without.",
        "Sets of modalities that the model was never trained on are in the mean: one may get credit for what the "
        "others, alone, make wrong.",
    ),
    "quag": TestTexts(
        "Does it need which token reads which?",
        "Attention is averaged inside blocks of modalities, so that each still gets as much and only the choice "
        "among its tokens is lost. Crossmodal: tokens of one modality that read another. A modality's name: "
        "everybody who reads it.",
        "No drop says that the mean of a modality's tokens does as well, not that the modality is not used. In a "
        "fusion of one layer where only a class token reads, unimodal and crossmodal have nothing to average.",
    ),
    "keys": TestTexts(
        "Why does attention prefer a modality?",
        "Attention follows the angle between the query and the keys. A modality whose keys lie closer is preferred "
        "whatever it says; if noise leaves its cosines where they were, the query cannot tell content from noise.",
        "A mean key says nothing of single keys: one close to the query may get everything while the mean points away.",
    ),
    "gap": TestTexts(
        "Do tokens read their own modality or the others?",
        "0 % says that tokens of a modality give as much to their own as to all others, 100 % that one side gets "
        "everything. Which one, the explorer of attention tells.",
        "A gap may be right: where one modality has nothing to say, no one should read it. Modalities of many "
        "tokens get much by their number alone.",
    ),
    "consistency": TestTexts(
        "Does attention between modalities agree with itself?",
        "If a sound goes to a picture and that to a word, the sound should go to the word. Each block holds what the "
        "tokens of one modality (rows) give to those of another (columns), as parts of 1; the layer that contradicts "
        "itself most is drawn, as a mean over samples. The score is 1 for hard maps that agree and 0 for none. Maps "
        "that agree have one large singular value for each shared concept, as large as there are modalities.",
        "Soft maps hide contradictions: even attention contradicts nothing, and what it scores stands beside the "
        "score. Two modalities have no way round, and only the error of going there and back tells. Unequal numbers of "
        "tokens cannot reach 1. A mean over samples is one of places: where a place means something else in each "
        "sample, the picture is even. Agreement is not truth: maps may agree on the wrong concepts.",
    ),
    "collapse": TestTexts(
        "Do the tokens become alike with depth?",
        "The part of a layer that is not its mean token. A fall to nearly 0 says that depth has made all tokens the "
        "same.",
        "It is small, too, where all tokens carry one large common vector beside small different ones, as language "
        "models do, and nothing is wrong.",
    ),
    "gradients": TestTexts(
        "Whom does the loss still teach?",
        "Norm of the gradient of the fused loss at the output of each encoder, without balancers or heads. A "
        "modality with hardly any is hardly trained by the fusion.",
        "A small norm may also mean that nothing is left to learn. Norms shrink as batches grow, so compare at one "
        "batch size.",
    ),
    "ood": TestTexts(
        "Does it notice inputs of an unknown kind?",
        "Confidence (generalized entropy) of known and of unknown inputs. AUROC is the probability that a known one "
        "is met with more confidence: 0.5 is chance.",
        "It speaks of these unknown inputs alone. A difference of recording is found as easily as one of content, "
        "and pure noise is the easiest of all.",
    ),
    "cost": TestTexts(
        "What does it cost?",
        "Parameters and operations of one sample. In full: everything, attention included. As tables count: modules "
        "with a rule alone, as published tables have it.",
        "Operations say little about time: a fused kernel may be many times faster than its parts.",
    ),
}
