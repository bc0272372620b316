"""What an answer says: has it the keywords, is it the reference word for word, does it agree with its facts?

All of them compare strings; none asks a model for its opinion.
"""

import re
from collections.abc import Sequence

Keyword = str | tuple[str, ...]  # a text, or texts any of which will do

_NUMBER_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
_COUNTING_WORDS = (
    "once",
    "twice",
    "half",
    "dozen",
    "hundred",
    "thousand",
    "million",
    "first",
    "second",
    "third",
    "last",
)
_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)

_AMOUNT = re.compile(r"[$€£]?\d+(?:[.,:]\d+)*(?:%|\s?[ap]m\b|[a-z]+)?")  # $300, 5%, 10 am, 1st, 1,700, 9:30
_WORD = re.compile(r"[\w'’-]*\w")
_QUOTED = re.compile(r"`([^`]+)`|\"([^\"]+)\"|“([^”]+)”|(?<!\w)['‘]([^'’]+)['’](?!\w)")
# /tip, a mail address, a link, #channel
_COMMAND = re.compile(r"(?<!\S)/\w+|\S+@\S+\w|\bhttps?://\S+\w|#\w+")
_NEGATION = re.compile(r"\b(?:no|not|never|nobody|nothing|none|neither|cannot|\w+n['’]t)\b")


def has_keywords(keywords: Sequence[Keyword], answer: str) -> bool:
    """Say whether every keyword stands in the answer, in any case; of several alternatives, one.

    "5" does not stand in "50", "15" or "1.5"; "friday" does in "Fridays".
    """
    text = answer.lower()

    def stands(word: str) -> bool:
        return re.search(rf"(?<![\w.]){re.escape(word.lower())}(?!\d)", text) is not None

    return all(any(map(stands, [word] if isinstance(word, str) else word)) for word in keywords)


def is_verbatim(reference: str, answer: str) -> bool:
    """Say whether the two are the same words; only the amount of white space may differ."""
    return answer.split() == reference.split()


def agrees_with(reference: str, answer: str) -> bool:
    """Say whether the answer has every fact of the reference and does not deny it.

    It must hold every fact (see ``find_facts``), begin with the same yes or no, and deny something exactly when
    the reference does. Whether it says the rest too is a matter of likeness, and judged there.
    """
    return (
        not missing_facts(reference, answer)
        and _verdict(answer) == _verdict(reference)
        and _denies(answer) == _denies(reference)
    )


def missing_facts(reference: str, answer: str) -> tuple[str, ...]:
    """Return the facts of the reference that do not stand in the answer, in their order."""
    text = _normalise(answer).lower()
    return tuple(fact for fact in find_facts(reference) if not _stands_in(fact, text))


def find_facts(reference: str) -> tuple[str, ...]:
    """Return what a careless answer gets wrong, lower-cased, in the order of the kinds named here.

    Amounts (digits, with currency, percent, am and pm; "six" counts as 6), counting words (twice, half,
    first), weekdays and months, names (a capital inside a sentence, or two capitals in a word), quoted and
    `code` terms, commands such as /tip, addresses.
    """
    text = _normalise(reference)
    words = _WORD.findall(text)
    facts = [*_AMOUNT.findall(text.lower())]
    facts += [word for word in words if word.lower() in _COUNTING_WORDS]
    facts += [word for word in words if word.lower().rstrip("s") in _WEEKDAYS or word in _MONTHS]
    facts += _find_names(text)
    facts += ["".join(groups) for groups in _QUOTED.findall(text)]
    facts += _COMMAND.findall(text)
    return tuple(dict.fromkeys(fact.lower() for fact in facts))


def _normalise(text: str) -> str:
    """Write number words up to twelve as digits and times as "10 am"."""
    for number, word in enumerate(_NUMBER_WORDS):
        text = re.sub(rf"\b{word}\b", str(number), text, flags=re.IGNORECASE)
    return re.sub(r"(\d)\s?([ap])\.?m\b\.?", r"\1 \2m", text, flags=re.IGNORECASE)


def _find_names(text: str) -> list[str]:
    names = []
    for sentence in re.split(r"(?<=[.!?:])\s+", text):
        for place, word in enumerate(_WORD.findall(sentence)):
            word = re.sub(r"['’]s$", "", word)
            has_capital = word[0].isupper() and word != "I" and not re.match(r"I['’]", word)
            if (has_capital and place > 0) or sum(letter.isupper() for letter in word) > 1:
                names.append(word)
    return names


def _stands_in(fact: str, text: str) -> bool:
    # A plural or a possessive of a name is the name; "5" is not in "50" or "5.5", "$5" or "15".
    after = r"(?![\w%]|[.,:]\d)" if fact[-1].isdigit() else r"(?:['’]?s)?(?!\w)"
    return re.search(rf"(?<![\w$€£])(?<!\d[.,:]){re.escape(fact)}{after}", text) is not None


def _verdict(text: str) -> str | None:
    match = re.match(r"\W*(yes|no)\b", text.lower())
    return match.group(1) if match else None


def _denies(text: str) -> bool:
    return _NEGATION.search(text.lower()) is not None
