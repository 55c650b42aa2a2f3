"""The grade that a judge's answer states, or none: an answer counts only if it says one thing.

Judges wrap a grade in words, markup, JSON or thinking, and give reasons with numbers of their own ("4 - because 2
cups are missing"). A number is read as a grade where the text says that it is one; a text that leaves a doubt has
none, and is asked for again, which costs little. A wrong grade would cost a preference.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Tokens = Sequence[tuple[str, Mapping[str, float]]]

_THOUGHT = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratchpad)"
_OPENED = re.compile(rf"<\s*{_THOUGHT}\s*>|\[think\]|◁think▷|<\|begin_of_thought\|>", re.IGNORECASE)
_CLOSED = re.compile(rf"<\s*/\s*{_THOUGHT}\s*>|\[/think\]|◁/think▷|<\|end_of_thought\|>", re.IGNORECASE)
_CHANNEL, _FINAL = "<|channel|>", "<|channel|>final<|message|>"
# What an answer is set in where it is set off from the rest.
_BOXED = re.compile(
    r"<(answer|grade|score|rating|final|result)>(.*?)</\1>|<\|begin_of_box\|>(.*?)<\|end_of_box\|>"
    r"|\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}",
    re.IGNORECASE | re.DOTALL,
)
_TAG = re.compile(r"</?[a-z][\w:]*\s*/?>|<\|[^|<>]{1,40}\|>|\\(?:boxed|text|mathbf)|```[a-z]*", re.IGNORECASE)
_KEYS = ("grade", "score", "rating")
_MARKUP = str.maketrans(
    {
        **dict.fromkeys('*_`#"“”„«»[]{}$|\\\t', " "),
        "’": "'",
        **{chr(c): chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)},
    }
)

_NUMBER = re.compile(
    r"(?<![\w.,])(?:(?<![\w)])[-−+](?=\d))?\d+(?:\.\d+)?(?=[分点星])|(?<![\w.,])(?:(?<![\w)])[-−+](?=\d))?\d+(?:\.\d+)?(?![\w%+]|[.,]\d|\s?%)"
)
_UNITS = r"(?:stars?|points?|pts?|marks?)"
_OF = rf"\s*(?:{_UNITS}\s*)?(?:/|\bout\s+of\b|\bof\b)(?:\s+a\s+(?:possible|maximum(?:\s+of)?))?\s*"
_GAP = r"[\s:=>→(–—-]"
_LABEL = (
    r"(?:(?:grade|score|rating|mark|verdict)(?!\w)"
    r"|评分|得分|分数|打分|оценка|puntuación|calificación|bewertung|評価|点数)"
)
_LINK = (
    r"(?:is|was|of|for|as|be|would|will|should|it|this|that|an?|at|with|to|give|assign"
    r"|the|answer|response|caption|description)"
)
# "Grade: 4", "the score of this answer is a 4", "评分：4": the label, then nothing but links and signs.
_LABELLED = re.compile(rf"(?<!\w){_LABEL}(?:{_GAP}|\)|\b{_LINK}\b){{0,12}}$", re.IGNORECASE)
# "I would give it a 4", "this deserves a 4".
_GIVEN = re.compile(
    r"(?:\bi(?:'d|'ll|\s+would|\s+will|\s+can)?\s+(?:give|assign|award|rate|grade|score|say|choose|pick|go)"
    r"|\b(?:rate|rated|graded|scored|give|assign)\s+(?:it|this|the)|\b(?:answer|response|caption|it|this)\s+(?:deserves|merits|earns|gets))"
    rf"(?:{_GAP}|\b(?:it|this|that|the|an?|as|at|with|answer|response|caption|description|solid|strong|clear|weak|grade|score|rating|of|image)\b){{0,12}}$",
    re.IGNORECASE,
)
# "Answer: 4", "It's a 4": said of grades, but of other things too; counts where nothing else does.
_HINTED = re.compile(
    r"(?:^|[.!\n]\s*|\b(?:so|therefore|thus|hence|overall|final|my)\b[\s,]*)(?:the\s+|my\s+|final\s+)*(?:answer|result|conclusion|overall|final|it's\s+a|it\s+is\s+a|that's\s+a)\s*(?:is\b\s*|[:=]\s*|\s)(?:an?\s+)?$",
    re.IGNORECASE,
)
_WHOLE_MATTER = re.compile(r"\b(?:final|overall|total)\b[^.!?\n,;]*$", re.IGNORECASE)
_SCALE_END = re.compile(
    r"\b(?:highest|lowest|best|worst|maximum|minimum|max|min|top|possible)\b[^.!?\n,;:]*$", re.IGNORECASE
)
_DENIED = re.compile(r"\b(?:not|cannot|never|unable|neither|nor)\b|n't\b", re.IGNORECASE)
_CLAUSE = re.compile(r"[.!?;,\n]")
# Words behind a number that leave it a grade; any other makes it a count ("2 cups").
_GOES_ON = re.compile(
    rf"\s*(?:$|[^\w\s]|\n|{_UNITS}\b|[分点星]"
    r"|(?:because|since|as|for|due|but|given|based|with|while|though|although|so|overall|on|in|or|explanation|reason(?:ing)?|justification|rationale|comments?|and|to|no|the|it|this|that|i)\b)",
    re.IGNORECASE,
)
# What makes a number the name or the count of something else.
_NAMED = re.compile(
    r"\b(?:step|image|picture|figure|fig|photo|question|option|item|part|section|rule|criteri(?:on|a)|number|no\.?|line|table"
    r"|page|example|case|candidate|point|level|version|chapter|room|bus|day)\s*#?\s*$",
    re.IGNORECASE,
)
_COUNTED = re.compile(
    r"\b(?:says?|said|shows?|showing|sees?|see|are|were|counts?|counted|only|has|have|had|contains?|instead\s+of|than|mentions?"
    r"|claims?|states?|lists?|names?|names\s+only|all|these|those|of|of\s+the|about|least|most|exactly|total\s+of)\s+$",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"(?:(?<![-=])[<>≤≥~≈±]|\b(?:at\s+(?:least|most)|less\s+than|more\s+than|under|over|above|below|not(?:\s+an?)?|nearly|almost|about|around|between))\s*$",
    re.IGNORECASE,
)
_NOTHING = re.compile(
    rf"(?<!\w){_LABEL}\s*(?:[:=]|\bis\b)\s*(?:not\b|n\s?/\s?a\b|none\b|null\b|unknown\b|nan\b|undefined\b)",
    re.IGNORECASE,
)
_LISTED = re.compile(r"^[ \t]*(\d+)[.)][ \t]+(?=\S)", re.MULTILINE)


@dataclass(frozen=True)
class Stated:
    """A grade and where it stands in the text; a `start` of −1: nowhere in particular."""

    grade: float
    start: int = -1
    stop: int = -1


def spoken_from(text: str) -> int | None:
    """Where the answer behind a text's thinking begins; None where the thinking has not ended."""
    start = max((tag.end() for tag in _CLOSED.finditer(text)), default=0)
    if _CHANNEL in text:
        final = text.rfind(_FINAL)
        if final < 0:
            return None
        start = max(start, final + len(_FINAL))
    return None if _OPENED.search(text, start) else start


def parse_grade(text: str, grades: Sequence[int]) -> float | None:
    """The grade that a text states, None where it states none or several; see `stated_grade`."""
    stated = stated_grade(text, grades)
    return None if stated is None else stated.grade


def stated_grade(text: str, grades: Sequence[int]) -> Stated | None:
    """The one grade that a text states.

    That is the value of ``grade``, ``score`` or ``rating`` of a JSON object, else a number that is labelled as the
    grade, else one that begins the text or stands alone in its last line. "4/5" and "4 out of 5" are 4 where 5 is the
    best grade. Counts ("2 cups"), numbers of steps and images, percentages and the scale itself ("1 to 5") are no
    grades; a further number that could be one ("4, no, 2", "3 or 4") leaves the text without any. A grade lies
    between the worst and the best; one with decimals counts ("3.5"), but not one below 1 where the best grade is
    above 1: it may be a share.
    """
    start = spoken_from(text)
    if start is None or len(text) - start > 20_000:
        return None
    body = " " * start + text[start:]
    in_json, body = _from_json(body, grades)
    if in_json is not None:
        return in_json if _fits(in_json.grade, grades) else None
    boxed = list(_BOXED.finditer(body))
    if not boxed:
        return _from_words(_blank(body, _TAG), grades)
    inner = []
    for match in boxed:
        a, b = match.span(match.lastindex or 0)
        inner.append(_from_words(_blank(" " * a + body[a:b], _TAG), grades))
    values = {None if one is None else one.grade for one in inner}
    return inner[-1] if len(values) == 1 else None


def is_grade_alone(text: str, grades: Sequence[int]) -> bool:
    """Whether a text that was cut is a grade and nothing else, and not the beginning of another grade."""
    start = spoken_from(text)
    if start is None:
        return False
    word = text[start:].translate(_MARKUP).strip()
    names = [str(grade) for grade in grades]
    return word in names and not any(name != word and name.startswith(word) for name in names)


def _fits(grade: float, grades: Sequence[int]) -> bool:
    low, high = grades[0], grades[-1]
    share = grade != int(grade) and abs(grade) < 1 < high if math.isfinite(grade) else False
    return low <= grade <= high and not share


def _blank(text: str, what: re.Pattern[str]) -> str:
    """`text` with what matches as spaces, so that places stay."""
    return what.sub(lambda match: " " * len(match.group()), text)


def _from_json(text: str, grades: Sequence[int]) -> tuple[Stated | None, str]:
    """(grade of the JSON objects in a text, the text without them); NaN where they state none that is one."""
    decoder, values, place, whole = json.JSONDecoder(), set(), Stated(math.nan), text
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at = text.find("{", at + 1) if text.count("{", at) < 50 else -1
            continue
        text = text[:at] + " " * (end - at) + text[end:] if isinstance(value, dict) else text
        if isinstance(value, dict) and (grade := _of_object(value, grades)) is not None:
            values.add(grade)
            spot = re.compile(rf'"(?:{"|".join(_KEYS)})"\s*:\s*"?\s*(\d+)(?![\d.])', re.IGNORECASE).search(
                whole, at, end
            )
            place = Stated(grade, *spot.span(1)) if spot and float(spot.group(1)) == grade else Stated(grade)
        at = text.find("{", end)
    if not values:
        return None, text
    return (place if len(values) == 1 else Stated(math.nan)), text


def _of_object(value: Mapping[str, Any], grades: Sequence[int]) -> float | None:
    """A JSON object's grade; NaN where it states no number or several, None where it speaks of no grade."""
    named = [inner for key, inner in value.items() if str(key).strip().lower() in _KEYS]
    if not named and len(value) == 1:
        (inner,) = value.values()
        return _of_object(inner, grades) if isinstance(inner, dict) else None
    stated = set()
    for inner in named:
        if isinstance(inner, bool) or not isinstance(inner, (int, float, str)):
            return math.nan
        try:
            stated.add(
                _from_words(inner.translate(_MARKUP), grades) if isinstance(inner, str) else Stated(float(inner))
            )
        except OverflowError:
            return math.nan
    if not named:
        return None
    values = {math.nan if one is None else one.grade for one in stated}
    return values.pop() if len(values) == 1 else math.nan


def _from_words(text: str, grades: Sequence[int]) -> Stated | None:
    text = text.translate(_MARKUP)
    low, high = grades[0], grades[-1]
    scale = re.compile(rf"(?<![\w.,]){low}\s*(?:-|–|—|to|through|and|\.\.+)\s*{high}(?![\w%]|[.,]\d)", re.IGNORECASE)
    text = _blank(text, scale)
    if _NOTHING.search(text):
        return None
    listed = _listed(text)
    best = re.compile(rf"{_OF}{high}(?:\.0+)?(?![\w%/]|[.,]\d)(?=({_GOES_ON.pattern})?)", re.IGNORECASE)
    other = re.compile(rf"{_OF}(?:the\s+)?\d", re.IGNORECASE)
    labelled: list[tuple[Stated, bool]] = []
    bare: list[Stated] = []
    hinted: list[Stated] = []
    end = 0
    for match in _NUMBER.finditer(text):
        if match.start() < end or match.start() in listed:
            continue
        end = match.end()
        before, after = text[max(0, match.start() - 120) : match.start()], text[end : end + 40]
        share = best.match(text, end)
        if share and share.group(1) is not None:
            end, after = share.end(), text[share.end() : share.end() + 40]
        elif (strange := other.match(text, end)) and re.match(r"\s*/|\s*out\b", text[end:]):
            return None  # of another scale: 4/10, 80/100
        elif strange:
            continue  # 1 of 4 things
        if re.match(r"\s*\?", after):
            return None
        one = Stated(float(match.group().replace("−", "-")), *match.span())
        clause = _CLAUSE.split(before)[-1]
        if not _GOES_ON.match(after) or _NAMED.search(before) or _SCALE_END.search(clause):
            continue
        if _HEDGE.search(before):
            return None
        tag = _LABELLED.search(before) or _GIVEN.search(before)
        if tag:
            if _DENIED.search(clause):
                continue
            labelled.append((one, bool(_WHOLE_MATTER.search(before[: tag.start()] + " "))))
        elif not _COUNTED.search(before):
            bare.append(one)
            if _HINTED.search(before):
                hinted.append(one)
    if labelled:
        chosen = [one for one, whole in labelled if whole] or [one for one, _ in labelled]
        last = labelled[-1][0].start
        first = [one for one in bare if not any(letter.isalnum() for letter in text[: one.start])]
        against = [one for one in bare if one.start > last] + first
    else:
        chosen = _alone(text, bare) or hinted
        against = bare
    values = {one.grade for one in (*chosen, *against)}
    if len(values) != 1 or not chosen or not _fits(chosen[-1].grade, grades):
        return None
    return chosen[-1]


def _listed(text: str) -> set[int]:
    """Where the numbers of a numbered list stand; a first line "1. Some text" may begin one."""
    marks = list(_LISTED.finditer(text))
    numbers = [int(mark.group(1)) for mark in marks]
    if len(marks) > 1 and any(b == a + 1 for a, b in itertools.pairwise(numbers)):
        return {mark.start(1) for mark in marks}
    return {mark.start(1) for mark, number in zip(marks, numbers, strict=True) if number == 1}


def _alone(text: str, bare: Sequence[Stated]) -> list[Stated]:
    """Numbers that begin the text, or stand alone in its first or last line."""
    lines = [line for line in text.split("\n") if any(letter.isalnum() for letter in line)]
    if not lines:
        return []
    alone = []
    tail = len(text.rstrip()) - len(lines[-1].rstrip())
    for one in bare:
        begins = not any(letter.isalnum() for letter in text[: one.start])
        last = one.start >= tail and re.fullmatch(
            rf"\W*\d+(?:\.\d+)?(?:{_OF}\d+(?:\.0+)?)?\s*(?:{_UNITS})?\W*", lines[-1]
        )
        if begins or last:
            alone.append(one)
    return alone


def expected_grade(text: str, tokens: Tokens, grades: Sequence[int]) -> float | None:
    """The mean of the grades under the log-probs of the tokens that state the grade; None where they do not tell.

    The grade is the one that the text states, however its tokens are cut: where a tokenizer writes a digit a token, a
    grade's probability is the product over its digits and over not going on with another. A token that is a grade as
    well as the beginning of a longer one tells neither, unless it was the one that was said.

    Args:
        text: The answer, which states a grade.
        tokens: Of the answer, perhaps behind others (a server counts thinking in), each with the log-probs of what
            could have stood there, its own among them.
    """
    stated = stated_grade(text, grades)
    if stated is None or stated.start < 0 or stated.grade != int(stated.grade):
        return None
    joined = "".join(token for token, _ in tokens)
    shift = joined.rfind(text)
    if shift < 0 or not text:
        return None
    names = {str(grade): grade for grade in grades}
    weights: dict[str, float] = {}
    unclear, chance, prefix, offset = 0.0, 1.0, "", 0
    wanted = text[stated.start : stated.stop]
    for token, rivals in tokens:
        begin, offset = offset - shift, offset + len(token)
        if offset - shift <= stated.start:
            continue
        inside = begin < stated.stop
        said = token.strip() if not prefix else token
        if inside and not (
            said
            and wanted.startswith(prefix + said)
            and (prefix or begin + len(token) - len(token.lstrip()) == stated.start)
        ):
            return None  # the token holds more than the number
        chances = {rival: math.exp(min(value, 0.0)) for rival, value in rivals.items() if not math.isnan(value)}
        if inside and token not in chances:
            return None
        spelled: dict[str, float] = {}
        for rival, p in chances.items():
            word = prefix + (rival if prefix else rival.strip())
            if inside and word == prefix + said:
                continue
            if word in names and word != prefix:
                spelled[word] = spelled.get(word, 0.0) + chance * p
        for word, p in spelled.items():
            weights[word] = weights.get(word, 0.0) + p
            whole = {*spelled, prefix + said}
            if any(name != word and name.startswith(word) and name not in whole for name in names):
                unclear += p
        ends = 1.0 - sum(p for rival, p in chances.items() if rival[:1].isdigit()) if prefix else 0.0
        if not inside:
            chance *= max(0.0, ends)
            break
        if prefix in names:
            weights[prefix] = weights.get(prefix, 0.0) + chance * max(0.0, ends)
        chance *= sum(p for rival, p in chances.items() if (rival if prefix else rival.strip()) == said)
        prefix += said
    if prefix != wanted or prefix not in names:
        return None
    weights[prefix] = weights.get(prefix, 0.0) + chance
    total = sum(weights.values())
    if not total > 0 or unclear > 0.01 * total:
        return None
    return sum(names[word] * p for word, p in weights.items()) / total
