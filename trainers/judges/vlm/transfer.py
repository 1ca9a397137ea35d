"""Notice before a run: which pictures leave this machine, and for which host."""

from __future__ import annotations

from .config import JudgeConfig
from .endpoint import checked_url, is_this_machine
from .templates import Template


def transfer_notice(config: JudgeConfig, pictures: int, questions: int) -> str:
    """One sentence: host, number of pictures, their largest side, and whether they leave this machine."""
    from urllib.parse import urlsplit

    host = urlsplit(checked_url(config.base_url)).hostname or ""
    about = f"{questions} questions with {pictures} pictures of at most {config.image_max_side} pixels a side"
    if is_this_machine(host):
        return f"judge: {about}, to {host}, which is this machine"
    return f"judge: {about} WILL LEAVE THIS MACHINE for {host}"


def pictures_per_case(template: Template, sources: int) -> tuple[int, int]:
    """Numbers of (questions, pictures) of one case in one pass, without crops of the grounded mode."""
    questions = pictures = 0
    for one in template.questions:
        times = sources if one.per_source else 1
        shown = sum(sources if role == "sources" else 1 for role in one.pictures)
        questions, pictures = questions + times, pictures + times * shown
    if template.grounded:
        questions, pictures = questions + 1, pictures + 2
    return questions, pictures
