"""Everyday phrases that ask for a subject in words that captions of training lack; those of the evaluation.

Nouns, adjectives and verbs are those of the package `wonderwords` (MIT), but for the words that the
evaluation asks in (`ASKED`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from pocket.data import ADJECTIVES, OPENINGS, SCENES
from pocket.subjects import SUBJECTS

# `{}` stands for the subject's name.
ASKED = (
    "a {} on a hill", "a {} in the park", "my {} at the seaside, golden hour",
    "photograph of a {} on a plate", "a {} in a field of tulips", "the {} leaning against a fence",
    "a {} in the clouds", "a {} at midnight", "one {} swimming across a lake",
    "the {} on the kitchen counter", "an oil painting of a {}, impressionist", "a {} in the rain",
    "please draw a {} here", "a bright {} in the forest, morning fog", "a {} made of glass",
    "a very tired {} wearing a scarf", "there is a {} beside the window", "a {} covered in dust, closeup",
    "i would like to see a {}", "a {} with a wooden bench behind it",
    "studio shot of a {}, softbox lighting", "a gigantic {} towering over the city",
    "a {} on my grandmother's carpet", "watercolour sketch of a {}", "a {}, 35mm film, bokeh",
)  # fmt: skip

SMALL_WORDS = (
    "a", "the", "my", "your", "his", "her", "our", "this", "that", "one", "some", "in", "on", "at", "of",
    "with", "by", "for", "to", "under", "near", "beside", "behind", "over", "from", "and", "next", "is",
    "are", "it", "very", "i", "we", "you", "me", "he", "she", "there", "here", "just", "like", "so",
    "really", "two", "three", "four", "five", "not", "all", "any", "into", "through", "around", "between",
    "above", "below", "up", "down", "out", "off", "about", "while", "when", "where", "who", "what", "which",
    "but", "or", "as", "be", "been", "was", "will", "would", "can", "could", "should", "has", "have", "had",
    "do", "does", "did", "no", "yes", "please",
)  # fmt: skip
DETERMINERS = (
    "a", "the", "my", "your", "our", "this", "that", "one", "some", "an", "his", "her", "two", "three",
)  # fmt: skip
PREPOSITIONS = (
    "in", "on", "at", "with", "by", "under", "near", "beside", "behind", "over", "from", "next to",
    "in front of", "inside", "above", "below", "between", "around", "through", "on top of", "and",
    "outside", "against", "among",
)  # fmt: skip
REQUESTS = (
    "draw", "paint", "show me", "add", "put", "make", "create", "i want", "give me", "generate", "render",
    "a sketch of", "an illustration of", "a close up of", "a painting of", "a photograph of", "portrait of",
    "a view of", "here is", "picture of", "image of", "a shot of",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Phrase:
    """before, name, after: of a phrase, in this order; name is empty where it asks for nothing known.

    subject: code point of what the name stands for, or empty.
    """

    before: str
    name: str
    after: str
    subject: str

    @property
    def text(self) -> str:
        """The whole."""
        return " ".join(filter(None, (self.before, self.name, self.after)))


class Phrasebook:
    """Draws phrases."""

    def __init__(self) -> None:
        names = [name for held in SUBJECTS.values() for name in held]
        self.single = {name for name in names if " " not in name}
        self.said = {word for name in names for word in name.split()}
        out = self.said | {f"{word}s" for word in self.said} | words_of(" ".join(ASKED))
        out |= {"background", "nothing", "empty"}
        self.nouns, self.adjectives, self.verbs = (
            [word for word in read_words(kind) if words_of(word).isdisjoint(out)]
            for kind in ("noun", "adjective", "verb")
        )
        # Words of names that are no names: colours, "slice", "face".
        self.parts = sorted(self.said - self.single - set(SMALL_WORDS))
        self.codes = tuple(SUBJECTS)

    def phrase(self, rng: np.random.Generator, code: str) -> Phrase:
        """One that asks for a subject."""
        name = str(rng.choice(SUBJECTS[code]))
        before = [str(rng.choice(REQUESTS))] if rng.random() < 0.2 else []
        before += self._babble(rng, int(rng.integers(1, 5))) if rng.random() < 0.15 else []
        before += [str(rng.choice(DETERMINERS))] if rng.random() < 0.85 else []
        for _ in range(int(rng.choice(3, p=(0.55, 0.35, 0.1)))):
            before.append(self._adjective(rng, code, name))
        after: list[str] = []
        if rng.random() < 0.3:
            after.append(self._verb(rng))
        for _ in range(int(rng.choice(4, p=(0.25, 0.5, 0.2, 0.05)))):
            after += self._place(rng, code, name)
        if rng.random() < 0.15:
            after += self._babble(rng, int(rng.integers(1, 6)))
        if rng.random() < 0.25:
            after += [
                ",",
                *(self._adjective(rng, code, name) for _ in range(int(rng.integers(1, 3)))),
                self._noun(rng),
            ]
        shown = f"{name}s" if rng.random() < 0.08 and name[-1] not in "sxy" else name
        return Phrase(_joined(before, rng), shown, _joined(after, rng), code)

    def babble(self, rng: np.random.Generator) -> Phrase:
        """One that names nothing known."""
        words = [str(rng.choice(REQUESTS))] if rng.random() < 0.2 else []
        if rng.random() < 0.6:
            words += [str(rng.choice(DETERMINERS)), str(rng.choice(self.adjectives)), self._noun(rng)]
            words += [str(rng.choice(PREPOSITIONS)), self._noun(rng)] if rng.random() < 0.5 else []
        else:
            words += self._babble(rng, int(rng.integers(1, 9)))
        return Phrase(_joined(words, rng), "", "", "")

    def known(self, rng: np.random.Generator, phrase: Phrase) -> Phrase:
        """One in words of the captions, for the same subject."""
        if not phrase.subject:
            return Phrase("", "", "", "")
        name = phrase.name if phrase.name in SUBJECTS[phrase.subject] else phrase.name[:-1]
        before = [str(rng.choice(OPENINGS)).strip()]
        before += [str(rng.choice(ADJECTIVES))] if rng.random() < 0.15 else []
        after = str(rng.choice(SCENES)) if rng.random() < 0.5 else ""
        return Phrase(" ".join(filter(None, before)), name, after.strip(), phrase.subject)

    def _noun(self, rng: np.random.Generator) -> str:
        return _invented(rng) if rng.random() < 0.1 else str(rng.choice(self.nouns))

    def _adjective(self, rng: np.random.Generator, code: str, name: str) -> str:
        if rng.random() < 0.3:
            word = str(rng.choice(self.parts))
            if not self._means_another(word, name, code):
                return word
        return str(rng.choice(ADJECTIVES if rng.random() < 0.2 else self.adjectives))

    def _means_another(self, word: str, name: str, code: str) -> bool:
        """Whether a name of another subject has the word and one of this name's."""
        held = set(name.split()) - {word, *SMALL_WORDS}
        others = (set(one.split()) for other, names in SUBJECTS.items() if other != code for one in names)
        return any(word in other and other & held for other in others)

    def _verb(self, rng: np.random.Generator) -> str:
        verb = str(rng.choice(self.verbs))
        return re.sub("e$", "", verb) + "ing" if rng.random() < 0.7 else verb

    def _place(self, rng: np.random.Generator, code: str, name: str) -> list[str]:
        place = [str(rng.choice(PREPOSITIONS))]
        place += [str(rng.choice(DETERMINERS))] if rng.random() < 0.8 else []
        place += [str(rng.choice(self.adjectives))] if rng.random() < 0.25 else []
        if rng.random() < 0.12:  # another subject, which stands behind the first
            other = str(rng.choice(self.codes))
            return [*place, str(rng.choice(SUBJECTS[other]))] if other != code else place
        part = str(rng.choice(self.parts))
        return [
            *place,
            part if rng.random() < 0.15 and not self._means_another(part, name, code) else self._noun(rng),
        ]

    def _babble(self, rng: np.random.Generator, count: int) -> list[str]:
        kinds = (SMALL_WORDS, self.nouns, self.adjectives, self.verbs)
        return [
            _invented(rng)
            if rng.random() < 0.1
            else str(rng.choice(kinds[int(rng.choice(4, p=(0.4, 0.3, 0.2, 0.1)))]))
            for _ in range(count)
        ]


def read_words(kind: str) -> list[str]:
    """The package's list: `noun`, `adjective` or `verb`."""
    text = (files("wonderwords") / "assets" / f"{kind}list.txt").read_text(encoding="utf-8")
    return [line.strip().lower() for line in text.splitlines() if line.strip()]


def words_of(text: str) -> set[str]:
    """Lower-case words, without the small ones."""
    return set(re.findall("[a-z]+", text.lower())) - set(SMALL_WORDS)


def _invented(rng: np.random.Generator) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(letters[i] for i in rng.integers(26, size=int(rng.integers(3, 9))))


def _joined(words: list[str], rng: np.random.Generator) -> str:
    text = " ".join(filter(None, words))
    return text + str(rng.choice((".", "!", ","))) if text and rng.random() < 0.1 else text
