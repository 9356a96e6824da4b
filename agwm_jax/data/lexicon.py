"""The word lists of the generated acceptability task: each split has nouns and verbs of its own."""

from typing import NamedTuple


class Noun(NamedTuple):
    """A count noun."""

    singular: str
    plural: str


class Verb(NamedTuple):
    """The five forms of a verb."""

    base: str
    third: str
    past: str
    participle: str
    progressive: str


class Lexicon(NamedTuple):
    """The open-class words of one split; no noun or verb occurs in two splits.

    `people` have no grammatical gender, `men` and `women` fix the reflexive. `acts` are intransitive, `deeds` take a
    person as object, `handlings` take a thing. Verbs with a ditransitive or benefactive use are left out of
    `handlings`, for "is bought the lamps" must be unacceptable. `reports` are past forms that take a that-clause.
    """

    people: tuple[Noun, ...]
    men: tuple[Noun, ...]
    women: tuple[Noun, ...]
    things: tuple[Noun, ...]
    acts: tuple[Verb, ...]
    deeds: tuple[Verb, ...]
    handlings: tuple[Verb, ...]
    reports: tuple[str, ...]


def _with_s(word: str) -> str:
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def _nouns(words: str) -> tuple[Noun, ...]:
    """Nouns from "doctor lady/ladies": an irregular plural is spelt out."""
    return tuple(Noun(*(word.split("/") if "/" in word else (word, _with_s(word)))) for word in words.split())


def _verbs(words: str) -> tuple[Verb, ...]:
    """Verbs from "laugh smile hide/hides/hid/hidden/hiding": irregular ones are spelt out."""

    def regular(word: str) -> Verb:
        stem = word.removesuffix("e")
        return Verb(word, _with_s(word), f"{stem}ed", f"{stem}ed", f"{stem}ing")

    return tuple(Verb(*word.split("/")) if "/" in word else regular(word) for word in words.split())


LEXICONS = {
    "train": Lexicon(
        people=_nouns(
            "doctor teacher student lawyer guard senator nurse driver farmer baker tourist dentist pilot judge banker "
            "chef author librarian"
        ),
        men=_nouns("king uncle boy father prince waiter husband grandfather monk wizard"),
        women=_nouns("queen aunt girl mother princess waitress wife/wives grandmother nun witch"),
        things=_nouns("plate bottle lamp mirror clock basket spoon jar bowl umbrella toy guitar helmet vase"),
        acts=_verbs(
            "laugh complain cough shout work wait pray smile sleep/sleeps/slept/slept/sleeping dance travel joke"
        ),
        deeds=_verbs("defend protect interview thank watch admire blame praise describe imitate"),
        handlings=_verbs(
            "clean wash break/breaks/broke/broken/breaking hide/hides/hid/hidden/hiding "
            "steal/steals/stole/stolen/stealing carry/carries/carried/carried/carrying "
            "drop/drops/dropped/dropped/dropping move"
        ),
        reports=("said", "knew"),
    ),
    "validation": Lexicon(
        people=_nouns("singer poet plumber cyclist surgeon mayor engineer reporter"),
        men=_nouns("brother nephew duke gentleman/gentlemen fisherman/fishermen"),
        women=_nouns("sister niece duchess lady/ladies actress"),
        things=_nouns("cup pot kettle pillow candle hammer drum"),
        acts=_verbs("whisper relax swim/swims/swam/swum/swimming cry/cries/cried/cried/crying hesitate gamble"),
        deeds=_verbs("support question criticize injure hurt/hurts/hurt/hurt/hurting"),
        handlings=_verbs("repair lift polish forget/forgets/forgot/forgotten/forgetting burn"),
        reports=("claimed", "thought"),
    ),
    "test": Lexicon(
        people=_nouns(
            "scientist journalist soldier gardener artist manager detective neighbor customer sailor musician "
            "professor clerk"
        ),
        men=_nouns("man/men son grandson policeman/policemen groom stepfather landlord"),
        women=_nouns("woman/women daughter granddaughter policewoman/policewomen bride stepmother landlady/landladies"),
        things=_nouns("carpet suitcase bucket blanket doll statue trophy/trophies shield crate barrel"),
        acts=_verbs("talk jump wander sing/sings/sang/sung/singing argue sneeze exercise apologize"),
        deeds=_verbs(
            "comfort mock photograph punish amuse accuse encourage forgive/forgives/forgave/forgiven/forgiving"
        ),
        handlings=_verbs(
            "collect inspect destroy shake/shakes/shook/shaken/shaking lose/loses/lost/lost/losing "
            "keep/keeps/kept/kept/keeping hold/holds/held/held/holding examine remove"
        ),
        reports=("believed", "noticed"),
    ),
}
