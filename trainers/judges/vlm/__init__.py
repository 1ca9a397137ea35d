"""A vision-language judge behind an OpenAI-compatible server that the user runs.

``config`` its settings; ``client`` asks, over ``endpoint``; ``recording`` records and replays; ``templates`` are files
with a version; ``judge`` asks a template's questions of a case and ``parse`` reads the answers; ``controls`` tests
whether a judge can be trusted. Nothing here imports the model.

For one's own questions: ``client.ask(Question((text, load_picture(path)), schema))`` and a function of ``parse``;
``in_order`` runs many at a bounded concurrency; ``Endpoint.post`` reaches other paths of the same server.
"""

from .client import Abilities, Asker, Client, in_order, object_schema
from .config import JudgeConfig, parse_judge, read_judge
from .controls import Fitness, fitness
from .endpoint import Endpoint, key_from_environment
from .errors import AnswerError, JudgeError
from .judge import Judgement, Reading, Shown, judge_case
from .parse import parse_boxes, parse_lines, parse_object, parse_scores, parse_yes_no
from .pictures import Picture, load_picture, side_by_side
from .probabilities import expected_digit, yes_probability
from .question import Answer, Question
from .recording import LineFile, Recorder, Replay, read_lines
from .templates import Template, bundled_templates, load_template
from .transfer import transfer_notice

__all__ = [
    "Abilities",
    "Answer",
    "AnswerError",
    "Asker",
    "Client",
    "Endpoint",
    "Fitness",
    "JudgeConfig",
    "JudgeError",
    "Judgement",
    "LineFile",
    "Picture",
    "Question",
    "Reading",
    "Recorder",
    "Replay",
    "Shown",
    "Template",
    "bundled_templates",
    "expected_digit",
    "fitness",
    "in_order",
    "judge_case",
    "key_from_environment",
    "load_picture",
    "load_template",
    "object_schema",
    "parse_boxes",
    "parse_judge",
    "parse_lines",
    "parse_object",
    "parse_scores",
    "parse_yes_no",
    "read_judge",
    "read_lines",
    "side_by_side",
    "transfer_notice",
    "yes_probability",
]
