"""English normalisation for retrieval: an ATOMIC event and a first-person utterance about it become the same terms."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise

from nltk.stem.snowball import SnowballStemmer
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

# Raise when a change here, or of what counts as an inference, changes any result: cached inferences of the older rules are
# then no longer used.
NORMALISATION = 2

# scikit-learn lists these as stop words, but they are what many events are about.
_CONTENT = frozenset("alone bill call cry describe empty fill fire interest move serious sincere system together".split())

# Talk, not events; and the names that stand for people in ATOMIC's files.
_FILLERS = frozenset(
    """
    yeah yea yes yep ok okay oh ah hmm hey hi hello wow haha lol xd omg lot lots thing things stuff kind sort bit
    little right guess suppose really just actually literally basically definitely absolutely certainly completely
    totally pretty quite super maybe probably today tonight yesterday tomorrow recently lately ago later soon finally
    another every everyone everything anyone anything someone something somebody anybody everybody gonna wanna gotta im
    ive thats theres did does doing am guy guys sure john tom person personx persony personz
    """.split()
)

# Too common to be an event, yet part of many ("break down", "not sleep", "get job"): they count in pairs alone,
# and particles only with the word before them.
_PARTICLES = frozenset("up down out off away over back under around through".split())
_LIGHT_WORDS = """
    not no never nothing without nobody
    feel get go take make put give see come keep let use try turn start begin end stop become seem look
    say tell ask think know want need like find show decide happen mean able
    day night week month year time way first last next long much many good well better best whole full
""".split()

# The stemmer cannot know irregular forms, and people tell what happened in the past tense. Each line: one form for all.
_IRREGULAR_FORMS = """
be am is are was were been being
have has had having
do did does done doing
go goes went gone
get got gotten
become became
begin began begun
bite bit bitten
blow blew blown
break broke broken
bring brought
build built
burn burnt
buy bought
catch caught
choose chose chosen
come came
deal dealt
die died dying
dig dug
draw drew drawn
dream dreamt
drink drank drunk
drive drove driven
eat ate eaten
fall fell fallen
feed fed
feel felt
fight fought
find found
fly flew flown
forget forgot forgotten
forgive forgave forgiven
freeze froze frozen
give gave given
grow grew grown
hang hung
hear heard
hide hid hidden
hold held
keep kept
know knew known
lay laid
lead led
leave left
lend lent
lie lied lying
lose lost loss
make made
mean meant
meet met
pay paid
ride rode ridden
ring rang rung
rise rose risen
run ran
say said
see saw seen
seek sought
sell sold
send sent
shake shook shaken
shoot shot
show shown
sing sang sung
sink sank sunk
sit sat
sleep slept
speak spoke spoken
spend spent
stand stood
steal stole stolen
stick stuck
strike struck
swim swam swum
take took taken
teach taught
tear tore torn
tell told
think thought
throw threw thrown
understand understood
wake woke woken
wear wore worn
win won
write wrote written
fail failure
marry marriage
grieve grief
divorce divorced divorcing
child children kid kids
mother mom mum mommy
father dad daddy
man men
woman women
foot feet
tooth teeth
promote promotion promoted
graduate graduation graduated graduating
"""

_NEGATION = re.compile(
    r"\b(?:ca|can|do|did|does|wo|is|was|could|would|should|are|were|have|has|had|ai)\s?n\s?'?\s?t\b|\bcan'?t\b|\bcannot\b"
)
_CLITIC = re.compile(r"\s?'(?:s|m|re|ve|d|ll)\b")
_WORD = re.compile(r"[a-z]+")

_stem = SnowballStemmer("english").stem
_LIGHT = frozenset(map(_stem, _LIGHT_WORDS)) | _PARTICLES
_STOP = (ENGLISH_STOP_WORDS - _CONTENT - _PARTICLES - set(_LIGHT_WORDS)) | _FILLERS
_AUXILIARIES = ("be", "have", "do")
_IRREGULAR = {form: base for base, *forms in map(str.split, _IRREGULAR_FORMS.strip().splitlines()) for form in forms}


@lru_cache(maxsize=1 << 17)
def _token(word: str) -> str | None:
    """The stem of a word, or None if it says nothing about an event (pronouns, auxiliaries, placeholders, fillers)."""
    base = _IRREGULAR.get(word, word)
    return None if len(word) == 1 or word in _STOP or base in _AUXILIARIES else _stem(base)


def event_terms(text: str) -> list[str]:
    """The terms of an event or utterance: stems of content words, then pairs of neighbours ("break", "break down")."""
    text = _NEGATION.sub(" not ", text.lower().replace("’", "'").replace("_", " "))
    tokens = [token for word in _WORD.findall(_CLITIC.sub(" ", text)) if (token := _token(word))]
    words = [token for token in tokens if token not in _LIGHT]
    return words + [f"{left} {right}" for left, right in pairwise(tokens) if left not in _PARTICLES]
