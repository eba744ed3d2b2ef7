"""Words from text, text from words, and the sentences of an utterance."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from case_fast.data.featurizer import sub_utterances
from case_fast.data.text import CONTRACTIONS, detokenize, is_word, normalize_space, split_sentences, stop_words, tokenize

ANY_TEXT = st.text(st.characters(), max_size=80)  # half surrogate pairs included
TALK = st.lists(
    st.sampled_from(
        ["I", "can't", "it's", "mom's", "well", ".", "!", "?", "...", "?!", ",", "'", '"', "(", ")", " ", "  ", "\n", "I'm",
         "U.S.", "Dr.", "p.m.", "no.", "5", "3.50", "No", "yes", "😀", "’", "…", ":)", "é", "_", "a", "B", "\u2028", "\x1c"]
    ),
    max_size=30,
).map("".join)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # contractions are written out; a possessive stays
        ("I can't, I won't, I shan't!", "i can not , i will not , i shall not !"),
        ("It's fine and he's late, she's not.", "it is fine and he is late , she is not ."),
        ("I'm, you're, we've, they'll, I'd", "i am , you are , we have , they will , i would"),
        ("I wouldn't've gone", "i would not have gone"),
        ("We don't; cannot.", "we do not ; can not ."),
        ("My mom's dog", "my mom 's dog"),
        ("the dogs' food", "the dogs ' food"),
        ("Let's go, y'all", "let us go , you all"),
        ("I do it 'cause I like 'em", "i do it because i like them"),
        ("5 o'clock", "5 oclock"),
        ("I’m “fine”, isn’t it?", 'i am " fine " , is not it ?'),
        ("isn`t", "is not"),
        # ellipses and runs of marks
        ("Well... I don't know...", "well ... i do not know ..."),
        ("Well…no", "well ... no"),
        ("What?! No!!", "what ? ! no ! !"),
        # sentences without a blank between them
        ("I was sad.It was bad.", "i was sad . it was bad ."),
        ("really?yes!good,fine", "really ? yes ! good , fine"),
        ("it was fun. so fun. ", "it was fun . so fun ."),
        # numbers, abbreviations and web addresses keep their points
        ("It cost $3.50, or 1,000 yen", "it cost $ 3.50 , or 1,000 yen"),
        ("50% off", "50 % off"),
        ("at 5 a.m or p.m", "at 5 a.m or p.m"),
        # quotes and brackets
        ('He said "go" (now)', 'he said " go " ( now )'),
        # words of other alphabets, emoji
        ("naïve café, Übung", "naïve café , übung"),
        ("I love it 😀!", "i love it 😀 !"),
        ("数学 は 楽しい", "数学 は 楽しい"),
        ("e-mail and self-care", "e-mail and self-care"),
        ("", ""),
        (" \t\n ", ""),
    ],
)
def test_tokenize_gives_the_words_by_hand(text, words):
    assert tokenize(text) == words.split()


# Marks that are glued to words, or spelt otherwise than on an English keyboard: (text, words)
MARKS = """
died😭 | died 😭
😭died | 😭 died
died😭😭 | died 😭 😭
died😭😂 | died 😭 😂
died.😭 | died . 😭
died😭. | died 😭 .
died!😭! | died ! 😭 !
so😭sad | so 😭 sad
can't😭 | can not 😭
😭can't | 😭 can not
mom's😭 | mom 's 😭
(😭) | ( 😭 )
"😭" | " 😭 "
😭5 | 😭 5
5😭 | 5 😭
love❤\ufe0fyou | love ❤ you
love❤you | love ❤ you
ok☺\ufe0f | ok ☺
ok☺ | ok ☺
ok👍🏽 | ok 👍
👍🏻👍🏿 | 👍 👍
thanks🙏🏾! | thanks 🙏 !
🤷\u200d♀\ufe0fidk | 🤷\u200d♀ idk
🤷🏽\u200d♀\ufe0fidk | 🤷\u200d♀ idk
🤷idk | 🤷 idk
our👨\u200d👩\u200d👧\u200d👦 | our 👨\u200d👩\u200d👧\u200d👦
she👩🏽\u200d💻he | she 👩\u200d💻 he
❤\ufe0f\u200d🔥hot | ❤\u200d🔥 hot
gay🏳\ufe0f\u200d🌈 | gay 🏳\u200d🌈
usa🇺🇸 | usa 🇺🇸
🇺🇸🇨🇦 | 🇺🇸 🇨🇦
no1\ufe0f⃣ | no 1
#\ufe0f⃣tag | # tag
star★ | star ★
sun☀\ufe0f | sun ☀
go→there | go → there
✅done | ✅ done
yes✔ | yes ✔
music♪ | music ♪
wow✨✨ | wow ✨ ✨
🥺pls | 🥺 pls
🫶you | 🫶 you
it- | it -
it-, | it - ,
it-. | it - .
it- was | it - was
it -was | it - was
-it | - it
- it | - it
it - was | it - was
it -- was | it - was
it--was | it - was
it---was | it - was
it – was | it - was
it–was | it - was
it — was | it - was
it—was | it - was
it— | it -
—it | - it
it―was | it - was
it‒was | it - was
it⸺was | it - was
it﹘was | it - was
(it-) | ( it - )
"it-" | " it - "
it-😭 | it - 😭
well\u2010known | well-known
well\u2011known | well-known
well－known | well-known
well\u00adknown | wellknown
well-known | well-known
mother-in-law | mother-in-law
self-care- | self-care -
-5 | -5
−5 | -5
-.5 | -.5
5-6 | 5-6
20-year-old | 20-year-old
hi！ | hi !
hi，you | hi , you
what？ | what ?
what？！ | what ? !
hi：you | hi : you
（hi） | ( hi )
［hi］ | [ hi ]
ｈｉ\u3000ｙｏｕ | hi you
１００％ | 100 %
＄５ | $ 5
5．5 | 5.5
＂hi＂ | " hi "
can＇t | can not
好。好 | 好 . 好
好、好 | 好 , 好
「好」 | " 好 "
hi~ | hi ~
hi～ | hi ~
“hi” | " hi "
‘hi’ | ' hi '
„hi“ | " hi "
«hi» | " hi "
‹hi› | " hi "
‟hi” | " hi "
〝hi〞 | " hi "
said“hi”to | said " hi " to
don’t | do not
don‘t | do not
donʼt | do not
don′t | do not
don‛t | do not
don´t | do not
mom’s | mom 's
5′10″ | 5'10 "
well…no | well ... no
well… | well ...
…well | ... well
wow‼ | wow ! !
wow‼\ufe0f | wow ! !
what⁉\ufe0f | what ! ?
what⁈ | what ? !
¿qué? | ¿ qué ?
¡no! | ¡ no !
5€ | 5 €
£5.50 | £ 5.50
20°c | 20 ° c
lego™ | lego ™
©me | © me
a•b | a • b
§5 | § 5
×2 | × 2
what‽ | what ‽
لا، لا؟ | لا ، لا ؟
his/her | his / her
work/school/life | work / school / life
time/ | time /
/did | / did
24/7 | 24/7
1/2 | 1/2
n/a | n/a
w/o | w/o
wow~ | wow ~
~15 | ~ 15
a|b | a | b
dreams\\ | dreams \\
x=y | x = y
_so_ | _ so _
away_ | away _
___ | ___
worker_2 | worker_2
a__b | a__b
__so__ | __ so __
he\u200bllo | hello
\ufeffhi | hi
hi\u200e | hi
café | café
naïve,so | naïve , so
finally.so | finally . so
fine .lol | fine . lol
"it was so." he said | " it was so . " he said
(like that.) | ( like that . )
𝓱𝓮𝓵𝓵𝓸 | hello
ﬁne | fine
½ cup | ½ cup
1½ cups | 1½ cups
हिन्दी में | हिन्दी में
می\u200cخواهم | می\u200cخواهم
"""
ENGLAND = "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
TABLE = [*(line.split(" | ", 1) for line in MARKS.strip().split("\n")), [f"{ENGLAND}won", f"{ENGLAND} won"]]


def test_the_table_is_long_and_holds_each_text_once():
    assert len(TABLE) >= 150 and len({text for text, _ in TABLE}) == len(TABLE)


@pytest.mark.parametrize(("text", "words"), TABLE)
def test_marks_are_apart_from_words(text, words):
    assert tokenize(text) == words.split()
    assert tokenize(f"so {text} there") == ["so", *words.split(), "there"]
    assert tokenize(text.upper().lower()) == words.split()


@pytest.mark.parametrize(("text", "words"), TABLE)
def test_written_words_are_the_same_words(text, words):
    """A reply of such words is read again as them, whatever the model has learnt to write."""
    assert tokenize(detokenize(words.split())) == words.split()


@pytest.mark.parametrize("text", ["\u200b", "\u2060\ufe0f", "\ufeff \u200e", "\u00ad", "\u202a\u2069"])
def test_what_nobody_sees_is_no_text(text):
    assert tokenize(text) == [] and normalize_space(text) == "" and normalize_space(f"a{text} {text}b") == "a b"


@pytest.mark.parametrize("short", CONTRACTIONS)
def test_every_contraction_is_written_out(short):
    long = CONTRACTIONS[short].split()
    assert tokenize(short.capitalize()) == long
    assert tokenize(f"so {short} now") == ["so", *long, "now"]
    assert tokenize(short.replace("'", "’")) == long


def test_contractions_inside_words_are_left_alone():
    assert tokenize("my edit's fine") == ["my", "edit", "'s", "fine"]  # no "it's"
    assert tokenize("mycannot cannots") == ["mycannot", "cannots"]


@settings(max_examples=500, deadline=None)
@given(st.one_of(ANY_TEXT, TALK))
def test_tokenize_takes_any_text(text):
    words = tokenize(text)
    assert all(word and not any(c in word for c in " \t\n") for word in words)
    assert bool(words) == bool(normalize_space(text))
    assert isinstance(detokenize(words), str)


@pytest.mark.parametrize(
    "text",
    ["x" * 10_000, "é" * 10_000, "." * 10_000, "'" * 10_000, '"' * 10_000, "a'" * 5_000, "a." * 5_000, "ab," * 3_000,
     " " * 10_000, ("x" * 10_000 + " ") * 5, "n't" * 3_000, "?!" * 5_000, "(" * 10_000,
     "1," * 5_000, "Dr. " * 2_500, "a.B. c" * 2_000, "Aa.Bb" * 2_000, "\u2026" * 10_000,
     "-" * 10_000, "a-" * 5_000, "a/b" * 3_000, "ab/" * 3_000, "a" + "_" * 10_000 + "b", "_a" * 5_000, "😭" * 5_000,
     "a😭" * 5_000, "👩\u200d" * 5_000, "👩\U0001f3fd" * 5_000, "🇺" * 9_999, "1\u20e3" * 5_000, "\u200b" * 10_000, "！" * 10_000,
     "a\u0301" * 5_000],
    ids=lambda text: f"{text[:6]}x{len(text)}",
)
def test_long_texts_take_no_time(text):
    began = time.monotonic()
    detokenize(tokenize(text))
    split_sentences(text)
    assert time.monotonic() - began < 1


def test_a_long_word_stays_one_word():
    assert tokenize("so " + "x" * 10_000 + ".") == ["so", "x" * 10_000, "."]


@pytest.mark.parametrize(
    "text",
    [
        "I am so sorry to hear that.",
        "Oh no! What happened?",
        "That is great, congratulations!",
        "I cannot believe it is over.",
        "How old are you? I am 5.",
        "My mom's dog died yesterday.",
        "The dogs' food is gone.",
        "It costs $3.50, that is 50% off!",
        'He said "go away" to me.',
        '"Wow," she said, "that was fun."',
        "Well... I do not know.",
        "I was (a little) scared.",
        "It was 1,000 miles; I drove all night.",
        "What?! You must be so proud!",
        "Yes, I think so; you and I both do.",
        "E-mail me or call me.",
        "Rock 'n' roll is fun.",
        "The naïve man had a café.",
        "I love it 😀!",
        "Did you win? No? I am sorry, too.",
        "Do you wanna go? I am gonna.",
        "Thank you: it means a lot.",
        "I died 😭.",
        "It was his/her dog.",
        "It was fun - so fun!",
        "A well-known self-care book costs £5.",
    ],
)
def test_replies_read_as_written(text):
    assert detokenize(tokenize(text)) == text


def test_detokenize_writes_contractions_long_and_capitals():
    assert detokenize(tokenize("i can't wait. it's here! i'm happy")) == "I cannot wait. It is here! I am happy"
    assert detokenize(tokenize("i think i won, i.e. i am first")) == "I think I won, i.e. I am first"
    assert detokenize([]) == ""


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("I failed.", ["I failed."]),
        ("I failed", ["I failed"]),
        ("I failed. So sad! Why?", ["I failed.", "So sad!", "Why?"]),
        ("I failed.So sad", ["I failed.", "So sad"]),
        ("I love the U.S.A.", ["I love the U.S.A."]),
        ("No way?! I won...", ["No way?!", "I won..."]),
        ("It cost 3.50 dollars. Ok.", ["It cost 3.50 dollars.", "Ok."]),
        ('She said "no." Then she left.', ['She said "no.', "Then she left."]),
        ("I am sad. :( !!", ["I am sad."]),
        ("!!! ...", ["!!! ..."]),
        ("  two \n lines. here ", ["two lines.", "here"]),
        ("I failed！ So sad？ Why…  Well。 ok", ["I failed！", "So sad？", "Why…", "Well。", "ok"]),
        ("She said “no.” Then she left.", ["She said “no.", "Then she left."]),
        ("No way?!” He left", ["No way?!", "He left"]),
        ("I failed. 😭 So sad", ["I failed.", "😭 So sad"]),
        ("", [""]),
        ("   ", [""]),
    ],
)
def test_sentences_are_split_as_by_hand(text, pieces):
    assert split_sentences(text) == pieces


@pytest.mark.parametrize(
    "text",
    [
        # titles and names
        "Dr. Smith called me. | I was scared.",
        "I saw Mr. Bean. | It was fun.",
        "Mrs. Doubtfire is on. | Do you like it?",
        "Ms. Lee taught me. | She was kind.",
        "I had Prof. Jones, Rev. Brown and Sgt. Pepper.",
        "Lt. Dan and Capt. Kirk met Gen. Grant and Col. Mustard.",
        "Gov. Ford, Sen. Gore and Rep. Bush came.",
        "I'll never stop drinking Dr. Pepper",
        "It was Dr. Who. | She was a nerd.",
        "Even the dr. acted like I was a bother.",
        "I went to the dr. | He said I am fine.",
        "i went to the dr. | he said i am fine",
        "mr. bean is fun. | i like him",
        "Her name is mrs. Lee :) Sweetest turtle ever",
        "Robert Downey Jr. was there. | So was his wife.",
        "I met Robert Downey Jr. | It was awesome!",
        "Mr.Robot is great. | Watch it.",
        # places
        "We flew to St. Louis for a weekend. | I lost my bag.",
        "St. Patrick's Day was fun!",
        "She graduated at Ft. Knox. | I cried.",
        "I'm climbing Mt. Elbert. | Wish me luck!",
        "I live on Elm Ave. | It is quiet.",
        "I won a trip to Washington D.C. a few years ago",
        "I was driving across S. Dakota. | Alone.",
        # initials, and letters that are none
        "J. K. Rowling wrote it. | I read it.",
        "I like Samuel L. Jackson. | Do you?",
        "J.K. Rowling wrote it.",
        "So do I. | He left.",
        "So do i. | he left",
        "I got an A. | That made me happy.",
        "Plan B. | Then plan C!",
        "Vitamin C. | It helped.",
        "C.R.E.A.M. baby",
        "I listen to R&B. | Great stuff.",
        # a.m., p.m., U.S.: sentences may end there
        "I woke up at 5 a.m. and left.",
        "I woke up at 5 a.m. | Then I left.",
        "It is 5 p.m. | Time to go!",
        "i woke up at 5 p.m. and left. | so tired",
        "i woke up at 5 p.m. | then i left",
        "I left at 5 P.M. | We ate.",
        "I live in the U.S. and it is big.",
        "I live in the U.S. | It is big.",
        "i live in the u.s. | it is big",
        "He joined the U.S. Army. | I am proud.",
        "I love the U.S.A. | You should come.",
        "I work in I.T. for the government.",
        # other abbreviations
        "I like pets, e.g. dogs. | You?",
        "I lost it all, i.e. my job. | Sad.",
        "It is me vs. him. | Who wins?",
        "Dogs, cats, etc. are fun.",
        "I like dogs, cats, etc. | Pets are fun.",
        "Wake up, go to work, etc. but I was wrong!",
        "I got a raise in Feb. | I was glad.",
        "It was on Dec. 5. | We had snow.",
        "The doctor's appt. that I have is on Monday.",
        "She has a Ph.D. from Yale. | She is smart.",
        "I have a Ph.D. | It was hard.",
        "It is approx. 5 miles. | I ran.",
        # "no" is a word but before a number; these short words are words
        "No. 5 is mine. | Ok.",
        "I am no. 5 in line.",
        "No. | I did not.",
        "He said no. | Turns out he ate it.",
        "no. | i did not",
        "I lost 15 lbs. | i feel great!",
        "I am not as good as I am. | No one is.",
        "i was in. | she was not.",
        "It was in the sun. | Great day.",
        # numbers
        "I gave him a 6.5. | Seriously.",
        "I am 25. | I live alone.",
        "It cost $3.50. | That is cheap.",
        "version 2.0 is out",
        "It's 10,000. | Wow!",
        # an ellipsis ends a sentence, as it does in most of the real texts
        "Well... | I do not know...",
        "what do you mean.. | it just happened",
        "I was so mad... | All my work was lost.",
        "dogs, cats, etc... | i love them",
        # runs of marks, quotes, texts without an end
        "No way?! | I won!!! | Ha",
        "Really?! | When?? | Oh.",
        "the u.s.! | wow",
        "I saw Dr.",
        "We met at 5 p.m.",
        "Dr. | :)",
    ],
)
def test_an_abbreviation_ends_no_sentence_where_the_next_word_opens_none(text):
    pieces = text.split(" | ")
    kept = [piece for piece in pieces if re.search(r"\w", piece)]
    assert split_sentences(" ".join(pieces)) == kept
    assert sub_utterances("  " + "  ".join(pieces)) == [" ".join(pieces), *kept]


@settings(max_examples=500, deadline=None)
@given(st.one_of(ANY_TEXT, TALK))
def test_pieces_hold_all_words_in_order(text):
    pieces = split_sentences(text)
    assert pieces
    assert re.findall(r"\w+", normalize_space(text)) == [word for piece in pieces for word in re.findall(r"\w+", piece)]
    assert all(piece == normalize_space(piece) for piece in pieces)
    if re.search(r"\w", text):
        assert all(re.search(r"\w", piece) for piece in pieces)
    else:
        assert pieces == [normalize_space(text)]


def test_words_that_can_have_concepts():
    assert all(is_word(word) for word in ("dog", "alone", "cry", "e-mail", "é", "5th"))
    assert not any(is_word(word) for word in ("the", "i", "yes", "hello", ".", "...", "5", "", "😀", "'"))
    assert stop_words() == {word.lower() for word in stop_words()}
