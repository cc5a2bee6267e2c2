"""Questions about images and sounds, with and without them: ``blind`` for black boxes."""

from .blind_test import blind as blind
from .question_result import QuestionResult as QuestionResult
