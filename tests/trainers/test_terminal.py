"""Exit codes of the trainers' commands: one sentence on stderr."""

import errno

import pytest

from trainers.terminal import exit_code


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left"), 2, "error: No space left; free some space and run again\n"),
        (OSError(errno.ENOSPC, "No space left", "a.png"), 2, "error: a.png: No space left; free some space and run"),
        (OSError(errno.EACCES, "Permission denied", "a.png"), 2, "error: a.png: Permission denied; check the path\n"),
        (ValueError("expected\n a, got b"), 2, "error: expected a, got b\n"),
        (KeyboardInterrupt(), 130, "interrupted; run again\n"),
    ],
)
def test_an_error_is_one_sentence_and_says_what_to_do(capsys, error, code, words):
    def fail() -> None:
        raise error

    assert exit_code(fail, "run again") == code
    said = capsys.readouterr().err
    assert said.startswith(words)
    assert said.count("\n") == 1
