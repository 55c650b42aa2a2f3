"""Which option of a multiple-choice question an answer gives, by rule."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

Options = Mapping[str, str]  # letter -> text

_QUOTES = r"[\s*_\"'“”‘’`]"
# What announces a letter, and the letter: a capital one, or a small one that a mark or the end follows.
_CUE = re.compile(
    r"""(?ix) \b (?: (?:answer|option|choice|letter|response) s? \b (?: \s+ (?:here|to\s+(?:the|this)\s+question))?
        (?: \s* [:=] | \s+ (?:is|was|would\s+be|should\s+be|will\s+be|must\s+be) \b \s* :? )?
      | (?: choose | select | pick | chose | selected | picked | go\s+with | going\s+with ) \b
        (?: \s+ (?:the\s+)? (?:answer|option|choice|letter) )?
      | (?: it | this | that ) \s* (?: ['’]s | \s is | \s must\s+be | \s would\s+be | \s should\s+be ) \b )
    [\s*_"'“”‘’`(\[{]* (?: (?:answer|option|choice|letter) \s+ )? [\s*_"'“”‘’`(\[{]* 
    (?: (?-i:([A-Z])) (?![\w'’]) | ([a-z]) (?= [\s)\]}*"'”’]* (?:$|[.,;:!?)]) ) )""",
)
_NAMED = re.compile(r"(?:option|choice|letter)[\s*_\"'“‘`(\[{]*$", re.I)  # "option A" has no article
_BOXED = re.compile(
    r"\\boxed\s*\{\s*(?:\\text\s*\{\s*)?\(?([A-Za-z])\)?\s*\}|<answer>\s*\(?([A-Za-z])\)?\s*</answer>", re.I
)
_ALONE = re.compile(rf"{_QUOTES}*[(\[{{]?{_QUOTES}*([A-Za-z]){_QUOTES}*[)\]}}]?{_QUOTES}*[.,:;!]*{_QUOTES}*")
_LEADING = re.compile(
    rf"{_QUOTES}*(?:[(\[{{]{_QUOTES}*([A-Za-z]){_QUOTES}*[)\]}}]|([A-Za-z]){_QUOTES}*[).\]:](?![A-Za-z]\.))"
)
_BRACKETED = re.compile(r"[(\[{]\s*([A-Z])\s*[)\]}]|\*\*\s*([A-Z])\s*[.):]?\s*\*\*")
_BARE = re.compile(r"(?<![\w'’.-])([A-Z])(?![\w'’-])(?!\.[A-Za-z])")
_DENIED = re.compile(
    r"\b(?:not|never|neither|nor|isn['’]?t|n['’]t|than|except)\s*(?:the\s+)?(?:option|answer|choice)?[\s(\[*\"']*$",
    re.I,
)
_MORE = re.compile(r"[\s)\]}*.,]*(?:\bor\b|\band\b|/|,|&)[\s(\[{*]*(?:option\s+)?([A-Z])(?![\w'’])")
# After a capital A, or I, as a word of its own: what shows that it is the letter and not the article or the pronoun.
_LETTER_ENDS = re.compile(
    r"[)\]}*\"'”’]*\s*(?:$|[.,;:!?)\]}*]|\n|(?:because|since|as|for|due|given|but|which|and|or|is\s+(?:the\s+)?"
    r"(?:right|correct|true|best|my|answer)|seems|would\s+be|should\s+be|matches|fits)\b)"
)


def stated(text: str, options: Options) -> str | None:
    """The letter that an answer states, else the option whose text it repeats; None for none or several.

    In this order, the first that yields letters decides, and decides nothing where it yields several: the whole
    answer is a letter; ``\\boxed{B}`` or ``<answer>B</answer>``; a letter leads it ("B. a dog", "b) a dog"); a phrase
    announces it ("the answer is B", "I think it is C because A is …"); a letter in brackets or bold; a capital letter
    that is a word. Every letter is read alike, except that a capital A (or I) is only then no article (or pronoun)
    where a mark, the end or a word like "because" follows. Letters that are denied ("not A") do not count.
    """
    options = {letter.upper(): option for letter, option in options.items()}
    for find in (_alone, _boxed, _leading, _announced, _bracketed, _bare):
        letters = {letter for letter in find(text) if letter in options}
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return repeated(text, options)


def _alone(text: str) -> list[str]:
    whole = _ALONE.fullmatch(text.strip())
    return [whole.group(1).upper()] if whole else []


def _boxed(text: str) -> list[str]:
    return [(match.group(1) or match.group(2)).upper() for match in _BOXED.finditer(text)][-1:]


def _leading(text: str) -> list[str]:
    match = _LEADING.match(text)
    if not match:
        return []
    more = _MORE.match(text, match.end())
    return [(match.group(1) or match.group(2)).upper(), *(more.groups() if more else ())]


def _announced(text: str) -> list[str]:
    letters = []
    for match in _CUE.finditer(text):
        named = _NAMED.search(text, match.start(), match.end() - 1) or match.group(2)
        if (named or _is_letter(text, match)) and not _DENIED.search(text, 0, match.start()):
            more = _MORE.match(text, match.end())
            letters += [(match.group(1) or match.group(2)).upper(), *(more.groups() if more else ())]
    return letters


def _bracketed(text: str) -> list[str]:
    return [m.group(1) or m.group(2) for m in _BRACKETED.finditer(text) if not _DENIED.search(text, 0, m.start())]


def _bare(text: str) -> list[str]:
    return [
        match.group(1)
        for match in _BARE.finditer(text)
        if _is_letter(text, match) and not _DENIED.search(text, 0, match.start())
    ]


def _is_letter(text: str, match: re.Match[str]) -> bool:
    """Whether the capital that a match ends with is a letter: A and I are also words."""
    return match.group(1) not in "AI" or _LETTER_ENDS.match(text, match.end()) is not None


def repeated(text: str, options: Options) -> str | None:
    """The one option whose text the answer has, as whole words; an option within another's place does not count."""
    places = {}
    for letter, option in options.items():
        if option.strip():
            pattern = rf"(?<!\w){re.escape(option.strip().rstrip('.'))}(?!\w)"
            spans = [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]
            if spans:
                places[letter] = spans

    def within(span: tuple[int, int], letter: str) -> bool:
        return any(
            low <= span[0] and span[1] <= high and high - low > span[1] - span[0]
            for other, spans in places.items()
            if other != letter
            for low, high in spans
        )

    outer = [letter for letter, spans in places.items() if not all(within(span, letter) for span in spans)]
    return outer[0] if len(outer) == 1 else None


def vlmevalkit(text: str, options: Options) -> str | None:
    """VLMEvalKit's `can_infer` (2025), without its judge: what it leaves open is None.

    One option letter among the words, within the last five of them, else one option's text in an answer that is not
    twice as long as all options. "A" in a sentence is taken for the letter.
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


RULES: dict[str, Callable[[str, Options], str | None]] = {"stated": stated, "vlmevalkit": vlmevalkit}
