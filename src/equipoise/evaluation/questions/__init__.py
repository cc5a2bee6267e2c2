"""Questions with and without their images and sounds: ``blind`` for black boxes, ``evaluate_questions`` for models."""

from .blind_test import blind as blind
from .model_questions import evaluate_questions as evaluate_questions
from .question_result import QuestionResult as QuestionResult
