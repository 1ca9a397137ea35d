"""Notice before a run: which pictures leave this machine, and for which host."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from .config import JudgeConfig
from .endpoint import checked_url, is_this_machine
from .grounding import MAX_BOXES, room_for_boxes
from .templates import SOURCE_KINDS, Template


def transfer_notice(config: JudgeConfig, pictures: int, questions: int) -> str:
    """One sentence: host, number of pictures, their largest side, and whether they leave this machine."""
    host = urlsplit(checked_url(config)).hostname or ""
    about = f"{questions} questions with {pictures} pictures of at most {config.image_max_side} pixels a side"
    if is_this_machine(host):
        return f"judge: {about}, to {host}, which is this machine"
    return f"judge: {about} WILL LEAVE THIS MACHINE for {host}"


def pictures_per_case(template: Template, sources: int, max_images: int, kinds: Sequence[str] = ()) -> tuple[int, int]:
    """Numbers of (questions, pictures) of one case in one pass; the largest possible ones for the grounded mode."""
    crops = min(MAX_BOXES, room_for_boxes(sources, max_images)) * (2 if sources else 1) if template.grounded else 0
    questions = pictures = 0
    for one in template.questions:
        times = sources if one.per_source else 1
        counts = {"sources": sources} | {kind: kinds.count(kind) for kind in SOURCE_KINDS}
        shown = sum(counts.get(role, 1) for role in one.pictures)
        questions, pictures = questions + times, pictures + times * (shown + crops)
    if template.grounded:
        questions, pictures = questions + 1, pictures + 1 + min(1, sources)
    return questions, pictures
