"""``blind``: tests a black box on questions with and without their media."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import ConfigError, DataError
from .answer_scoring import scoring_for
from .call_journal import CallJournal, Reply, call_with_retries
from .media_conditions import CONDITIONS, Media, MediaConditions, digest
from .question_result import QuestionResult
from .question_set import MediaQuestion, check_choice, read_questions

Target = Callable[[Any, str], str]
STOP_AFTER = 20
"""Number of consecutive failed calls after which the test stops."""


def blind(
    target: Target,
    samples: Iterable[Mapping[str, Any]],
    *,
    conditions: Sequence[str] = CONDITIONS,
    metric: str | Callable[[str, Mapping[str, Any]], float] | None = None,
    prompt: Callable[[Mapping[str, Any]], str] | None = None,
    seed: int = 0,
    journal: str | Path | None = None,
    retries: int = 2,
    wait: float = 1.0,
    timeout: float | None = None,
    workers: int = 1,
    root: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    name: str = "",
) -> QuestionResult:
    """Asks each question with its image or sound, with a blank one, with that of another question, and without any.

    The target is a function: a served model, a pipeline, a person. No weights are needed.

    Args:
        target: (media, prompt) -> text. Media is a Pillow image, or an array (sample,) at 16 kHz for files with sound;
            objects other than files are passed as they are; a list for several; a dict {"image", "audio"} for both
            kinds; None without media.
        samples: dicts with "image", "images" or "audio" (a file, a Pillow image, an array), "question", "answer" (a
            text or a list of accepted ones; with "choices" the right one, its letter or index), and optionally
            "choices", "category" and "id".
        conditions: some of "given", "blank" (an image of the mean color of the data, or silence), "other" (the media of
            another question, by a seeded permutation) and "none"; "given" is required.
        metric: "exact"; "normalized" (case, punctuation, articles and number words do not count); "choice" (the letter
            or the text of a choice); or a function (reply, sample) -> number from 0 to 1. By default "choice" for
            questions with choices, and "normalized" for others.
        prompt: sample -> the prompt; by default the question, followed by its choices with letters.
        seed: of the permutation.
        journal: file of replies, one JSON object per line. A later call with the same file asks only what has no reply.
        retries: how often a call that raises, times out or returns no text is repeated, after ``wait``, 2 ``wait``, ...
            seconds. Then the call counts as failed and is not scored, and the next journaled run repeats it.
        timeout: seconds for each call.
        workers: number of calls at a time, in threads.
        root: folder of relative paths.
        progress: called with the number of replies and their total.
        name: of the target, for tables.

    Returns:
        QuestionResult: ``accuracy``, ``interval`` and ``difference`` by condition (McNemar's test, paired bootstrap),
        ``needing``, ``answered_without``, ``as_well``, ``yes_no``, ``by_category``, ``rows``, ``verdict``, ``table()``,
        ``save(folder)``.

    Raises:
        ConfigError: an unknown condition or metric, or a target that is no function. DataError: samples that cannot be
            read; 20 calls failed one after the other, so that the target is considered unreachable. The journal keeps
            all replies.

    Example:
        >>> from PIL import Image
        >>> samples = [{"image": Image.new("RGB", (4, 4), color), "question": "Which color?", "answer": color}
        ...            for color in ("red", "blue") * 10]
        >>> colors = {(255, 0, 0): "red", (0, 0, 255): "blue"}
        >>> def look(image, prompt):
        ...     return "green" if image is None else colors.get(image.getpixel((0, 0)), "?")
        >>> blind(look, samples, conditions=("given", "none")).accuracy
        {'given': 1.0, 'none': 0.0}
    """
    if not callable(target):
        raise ConfigError("blind", expected="a function (media, prompt) -> text", got=type(target).__name__)
    chosen = check_choice("blind", "conditions", conditions, CONDITIONS)
    if chosen[0] != "given":
        if "given" not in chosen:
            raise ConfigError("blind conditions", expected="'given' among them", got=str(list(chosen)))
        chosen = ("given", *(one for one in chosen if one != "given"))
    if retries < 0 or workers < 1:
        raise ConfigError("blind", expected="retries >= 0 and workers >= 1", got=f"{retries} and {workers}")
    questions = read_questions(samples, root=root)
    metric_name, score = scoring_for(metric, questions)
    sources = MediaConditions(questions, seed, other="other" in chosen)

    def ask(calls: list[Call]) -> list[Reply]:
        return [
            call_with_retries(
                lambda one=one: target(as_argument(one.media), one.prompt), retries=retries, wait=wait, timeout=timeout
            ) for one in calls
        ]  # fmt: skip

    replies = ask_all(
        ask, questions, chosen, sources, CallJournal(journal), progress,
        prompt=prompt and (lambda question: prompt(question.sample)), workers=workers,
    )  # fmt: skip
    return result_of(questions, chosen, replies, score, metric=metric_name, name=name)


def result_of(
    questions: Sequence[MediaQuestion],
    conditions: tuple[str, ...],
    replies: Mapping[tuple[str, int], Reply],
    score: Callable[[str, MediaQuestion], float],
    *,
    metric: str,
    name: str,
    extra: dict[str, list[float | None]] | None = None,
) -> QuestionResult:
    """Scores the replies of all questions."""
    texts: dict[str, list[str | None]] = {}
    scores: dict[str, np.ndarray] = {}
    errors = {}
    for condition in conditions:
        condition_replies = [replies[condition, index] for index in range(len(questions))]
        texts[condition] = [reply.text for reply in condition_replies]
        scores[condition] = np.array([
            np.nan if reply.text is None else score(reply.text, question)
            for reply, question in zip(condition_replies, questions, strict=True)
        ], dtype=float)  # fmt: skip
        errors |= {
            (condition, index): reply.error for index, reply in enumerate(condition_replies) if reply.text is None
        }
    return QuestionResult(questions, conditions, texts, scores, errors, metric, name, extra or {})


class Call(NamedTuple):
    """A question to be asked.

    Attributes:
        question: the question.
        condition: name of the condition.
        media: its media under the condition.
        prompt: the text for the target.
    """

    question: MediaQuestion
    condition: str
    media: Media
    prompt: str


def ask_all(
    ask: Callable[[list[Call]], list[Reply]], questions: Sequence[MediaQuestion], conditions: Sequence[str],
    sources: MediaConditions, journal: CallJournal, progress: Callable[[int, int], None], *,
    prompt: Callable[[MediaQuestion], str] | None = None, workers: int = 1, batch_size: int = 1,
    identity: Callable[[MediaQuestion], str] = lambda question: "",
    who: str = "blind", order: Sequence[int] | None = None,
) -> dict[tuple[str, int], Reply]:  # fmt: skip
    """Asks all questions under all conditions for which the journal has no reply.

    Args:
        ask: calls under one condition -> their replies.
        batch_size: number of calls that are asked together.
        identity: what a reply depends on apart from prompt and media, such as the target; other replies in the same
            journal do not count.
        order: the order in which questions are asked, as indices.

    Raises:
        DataError: ``STOP_AFTER`` calls failed one after the other.
    """
    count = len(questions)
    sequence = range(count) if order is None else order
    groups = [
        [(condition, index) for index in sequence[start : start + batch_size]]
        for start in range(0, count, batch_size)
        for condition in conditions
    ]
    failures, done = 0, 0
    error = ""

    def replies_to(group: list[tuple[str, int]]) -> list[Reply]:
        calls = []
        for condition, index in group:
            question = questions[index]
            text = question.prompt if prompt is None else prompt(question)
            calls.append(Call(question, condition, sources.media(question, condition), text))
        keys = [
            journal_key(one.question.index, one.prompt, f"{identity(one.question)}{one.condition}", one.media)
            for one in calls
        ]  # fmt: skip
        known = [journal.get(key) for key in keys]
        missing = [index for index, reply in enumerate(known) if reply is None]
        for index, reply in zip(missing, ask([calls[index] for index in missing]) if missing else (), strict=True):
            journal.add(keys[index], reply)
            known[index] = reply
        return known  # type: ignore[return-value]

    replies: dict[tuple[str, int], Reply] = {}
    with ThreadPoolExecutor(workers) as pool:
        # Calls run in this thread unless several are wanted, so that a target need not be safe for threads.
        results = map(replies_to, groups) if workers == 1 else pool.map(replies_to, groups)
        try:
            for group, group_replies in zip(groups, results, strict=True):
                for task, reply in zip(group, group_replies, strict=True):
                    replies[task] = reply
                    done, failures = done + 1, 0 if reply.text is not None else failures + 1
                    error = reply.error or error
                    progress(done, count * len(conditions))
                if failures >= STOP_AFTER:
                    raise DataError(
                        who,
                        expected="a target that replies",
                        got=f"{failures} failed calls in a row, the last: {error}",
                        fix="Check the target. A journal keeps all replies: run it again.",
                    )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return replies


def journal_key(index: int, prompt: str, condition: str, media: Media) -> str:
    """Returns the key of a call: a digest of the media, the prompt and the position of the question."""
    return hashlib.sha256(
        "\0".join((str(index), condition, prompt, digest(media))).encode("utf-8", "surrogateescape")
    ).hexdigest()


def as_argument(media: Media) -> Any:
    """Returns media in the form in which targets receive them."""
    if not media:
        return None
    groups: dict[str, list[Any]] = {}
    for name, value in media:
        groups.setdefault(name, []).append(value)
    single = {name: values[0] if len(values) == 1 else values for name, values in groups.items()}
    return single if len(single) > 1 else next(iter(single.values()))
