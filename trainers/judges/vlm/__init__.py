"""Vision-language judge on an OpenAI-compatible server that the user runs.

``config``: settings; ``client``: requests, over ``endpoint``; ``recording``: record and replay; ``templates``:
versioned question files; ``judge``: ask a template's questions about a case, with ``parse`` for the answers;
``controls``: test of a judge. Nothing here imports the model.

For custom questions: ``client.ask(Question((text, load_picture(path)), schema))`` and a function of ``parse``;
``in_order`` runs many with bounded concurrency; ``Endpoint.post`` reaches other paths of the server.
"""

from .client import Abilities, Asker, Client, in_order, object_schema
from .config import JudgeConfig, ServerConfig, parse_judge, read_judge
from .controls import Fitness, fitness
from .endpoint import Endpoint
from .errors import AnswerError, JudgeError
from .judge import Judgement, Reading, Shown, ask_question, judge_case
from .parse import parse_boxes, parse_lines, parse_object, parse_scores, parse_yes_no
from .pictures import Picture, load_picture, png_of, side_by_side
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
    "ServerConfig",
    "Shown",
    "Template",
    "ask_question",
    "bundled_templates",
    "expected_digit",
    "fitness",
    "in_order",
    "judge_case",
    "load_picture",
    "load_template",
    "object_schema",
    "parse_boxes",
    "parse_judge",
    "parse_lines",
    "parse_object",
    "parse_scores",
    "parse_yes_no",
    "png_of",
    "read_judge",
    "read_lines",
    "side_by_side",
    "transfer_notice",
    "yes_probability",
]
