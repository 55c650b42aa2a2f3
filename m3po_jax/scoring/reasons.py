"""Why a candidate has no score, as the column ``abstained``, the counts and a drop's detail say it."""

from __future__ import annotations

NO_IMAGE, NO_REFERENCE = "no_image", "no_reference"
NO_GRADE = "no_grade"  # the judge states no grade, or several
CUT_AT = "cut_at_"  # and the limit of tokens at which the answer was cut, again and again
REFUSED = "refused"  # by a server, perhaps with its status
NO_ANSWER, MALFORMED = (
    "no_answer",
    "malformed_response",
)  # the server's fault, which may be over when it is asked again
UNANSWERABLE = "unanswerable"  # several commands got no answer to it while they got others
DISAGREEMENT = "disagreement"  # of an ensemble's members
ABSTAINED = "abstained"  # a backend says no more

OUTAGES = frozenset({NO_ANSWER, MALFORMED})


def is_asked_again(reason: str | None, answer_limit: int) -> bool:
    """Whether the same command asks again where this stands for a score.

    Args:
        answer_limit: The most tokens that an answer may have now.
    """
    if reason is None:
        return False
    if reason.startswith(CUT_AT):
        return answer_limit > int(reason.removeprefix(CUT_AT))
    return reason in OUTAGES
