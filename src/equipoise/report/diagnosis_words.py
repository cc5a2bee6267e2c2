"""Fixed text of the page of a diagnosis: title, description and limitations of each test."""

from __future__ import annotations

from typing import NamedTuple


class TestTexts(NamedTuple):
    """The fixed text of one test.

    Attributes:
        title: heading of the section.
        shows: what is measured and shown in the figure.
        misleads: limitations of the measurement.
    """

    title: str
    shows: str
    misleads: str


WORDS: dict[str, TestTexts] = {
    "score": TestTexts(
        "Score and unimodal baselines",
        "Score on the evaluated samples, compared with the score of each modality alone. Error bars are 95 % "
        "confidence intervals; the dotted line is the best constant prediction. A multimodal model should not be worse "
        "than its best unimodal baseline.",
        "The unimodal baseline is a separate unimodal model if one was provided, and otherwise the unimodal head of "
        "the model. A linear probe uses features that were trained for the fusion, so it is a lower bound: a model "
        "trained on that modality alone may reach more.",
    ),
    "noise": TestTexts(
        "Score with a modality replaced by noise",
        "Score with one modality replaced by Gaussian noise of the mean and standard deviation of the data. The score "
        "of a model that uses the modality drops; a robust model keeps the score that the other modalities reach.",
        "The noise is out of distribution for a model trained without it, so part of a drop may be due to the "
        "distribution shift rather than to the missing information. A drop shows dependence, not benefit.",
    ),
    "masking": TestTexts(
        "Score with a modality masked",
        "Score with the tokens of one modality masked in every layer of the fusion, as in a batch that lacks it. The "
        "drop is the contribution of the modality given the others.",
        "Masking one of two redundant modalities causes no drop; the Shapley values below divide the shared "
        "contribution. If the model was trained without missing modalities, part of the drop is due to the "
        "distribution shift.",
    ),
    "response": TestTexts(
        "Response of attention to noise",
        "Attention on the same samples, clean and with one modality replaced by noise. Attention that responds to "
        "input quality moves to the right. r is the correlation between the replacement (0 or 1) and the attention to "
        "the other modalities: at +1 attention moves away from the noise in every sample, at 0 it does not respond, "
        "below 0 it moves toward the noise.",
        "The test measures attention, not use: attention may change while the prediction still suffers. r depends on "
        "the variation between samples: if attention is nearly constant, a very small shift gives a large r, so the "
        "size of the shift should be reported as well. The modality should be selected on validation data.",
    ),
    "attention": TestTexts(
        "Attention shares",
        "Attention share of each modality by layer, averaged over queries, heads and samples; the remainder goes to "
        "special tokens such as the class token. A share that is constant across samples indicates a fusion that is "
        "effectively static.",
        "Attention is not evidence of use. A share is the weight of the tokens of a modality, not the information "
        "that they carry: values may be small, cancel, or contain content that earlier layers mixed in. Uniform "
        "shares are not a goal in themselves.",
    ),
    "corruption": TestTexts(
        "Score under increasing corruption",
        "Score with noise added to one modality at test time, from none to the standard deviation of the data. The "
        "score of a robust model does not fall below that of the other modalities alone; if attention responds to "
        "input quality, the share of the corrupted modality decreases.",
        "All levels use the same random numbers, so the curve is smoother than the uncertainty of its points. The "
        "input is still present at the highest level, with noise of the same magnitude: this is a milder corruption "
        "than replacement.",
    ),
    "robustness": TestTexts(
        "Score under each kind of damage",
        "Score with one modality damaged in each way of the catalog, mean (dot) and range (bar) over severities 1, 3 "
        "and 5. The dashed line is the score without damage, the solid line that of the best modality that is still "
        "intact: a robust fusion does not fall below it.",
        "Severities of different corruptions are not equally hard. For damage that was part of the training, the test "
        "does not measure generalization.",
    ),
    "information": TestTexts(
        "Information of the modalities: the data or the model",
        "Information on the target, in bits, in the outputs of the encoders, estimated by small networks on samples "
        "that they were not trained on. Redundant information is in both modalities, unique information in one, "
        "synergy in both together only. Fusion can add what all modalities have beyond the best one. Information that "
        "the encoders have and the predictions lack is lost by the fusion.",
        "Encoders of the model may have lost information of their inputs. The networks miss information if samples "
        "are few. Redundancy depends on its measure: two independent modalities of equal information count as "
        "redundant and synergistic.",
    ),
    "shapley": TestTexts(
        "Contribution of each modality (Shapley values)",
        "Contribution of each modality to the score, averaged over all orders in which the modalities can be added. "
        "The values sum to the score minus that of a constant prediction. A negative value means that the modality "
        "reduces the score.",
        "The average includes subsets of modalities on which the model was never trained: the value of a "
        "modality may be too large because of errors that the model makes on the others alone.",
    ),
    "quag": TestTexts(
        "Score with averaged attention (QUAG)",
        "Score with attention averaged within blocks of modalities, so that the attention share of each modality is "
        "preserved and only the selection among its tokens is lost. Crossmodal: queries of one modality and keys of "
        "another. Name of a modality: all queries and the keys of that modality.",
        "If there is no drop, the mean of the tokens of a modality is sufficient; this does not mean that the "
        "modality is unused. In a fusion of one layer in which only a class token attends, the unimodal and "
        "crossmodal operators have no effect.",
    ),
    "keys": TestTexts(
        "Query–key geometry",
        "Attention logits depend on the angle between the query and the keys. A modality whose keys have a larger "
        "cosine with the query receives more attention regardless of its content; if noise does not change its "
        "cosines, the query does not distinguish content from noise.",
        "The mean key does not describe single keys: one key close to the query may receive all attention although the "
        "mean key is far from it.",
    ),
    "gap": TestTexts(
        "Attention within and between modalities",
        "At 0 %, the tokens of a modality attend equally to their own and to all other modalities; at 100 %, all "
        "attention goes to one of the two. The attention explorer shows to which one.",
        "A gap may be appropriate if one modality is not informative. Modalities with many tokens receive more "
        "attention because of their number of tokens.",
    ),
    "consistency": TestTexts(
        "Consistency of attention between modalities",
        "If an audio token attends to an image token and that one to a text token, the audio token should attend to "
        "the text token. Each block contains the attention of the tokens of one modality (rows) to those of another "
        "(columns), with rows that sum to 1. The figure shows the layer with the largest cycle error, averaged over "
        "samples. The score is 1 for consistent one-to-one maps and 0 for inconsistent ones. Consistent maps have one "
        "large singular value for each shared concept, equal to the number of modalities.",
        "Soft maps hide inconsistencies: uniform attention has none, and its score is listed for comparison. Two "
        "modalities have no cycles, only the error of a round trip. With unequal numbers of tokens the score cannot "
        "reach 1. The average over samples is taken by position: if positions have a different meaning in each sample, "
        "the average is uniform. Consistent maps may still be wrong.",
    ),
    "collapse": TestTexts(
        "Rank collapse of the token representations",
        "Norm of each layer after subtracting the mean token, relative to its full norm. A value near 0 means that all "
        "tokens of the layer are nearly identical.",
        "The value is also small if all tokens share one large common component, as in many language models, without "
        "any loss of information.",
    ),
    "gradients": TestTexts(
        "Gradient norms of the encoders",
        "Norm of the gradient of the fused loss at the output of each encoder, without balancing methods and auxiliary "
        "heads. The fused loss hardly trains an encoder with a small norm.",
        "A small norm may also mean that the loss of this modality has converged. Norms decrease with the batch size "
        "and should be compared at the same batch size.",
    ),
    "ood": TestTexts(
        "Out-of-distribution detection",
        "Confidence (generalized entropy) on in-distribution and out-of-distribution inputs. The AUROC is the "
        "probability that an in-distribution input has the higher confidence; 0.5 is chance.",
        "The result holds for this set of out-of-distribution inputs only. Differences in recording conditions are "
        "detected as easily as differences in content, and pure noise is the easiest case.",
    ),
    "cost": TestTexts(
        "Computational cost",
        "Parameters and floating-point operations (FLOPs) for one sample. The full count includes attention; the thop "
        "count includes only modules with a counting rule, as in published tables.",
        "FLOPs are a weak predictor of run time: fused kernels may be several times faster than separate operations.",
    ),
}
