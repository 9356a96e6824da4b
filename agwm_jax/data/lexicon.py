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


def _nouns(words: str) -> tuple[Noun, ...]:
    """Nouns from "doctor lady/ladies": a plural is spelt out where it is not the singular and s."""
    return tuple(Noun(*(word.split("/") if "/" in word else (word, word + "s"))) for word in words.split())


def _verbs(words: str) -> tuple[Verb, ...]:
    """Verbs from "blame/blames/blamed/blamed/blaming laugh": forms are spelt out where they are not stem + ending."""
    return tuple(
        Verb(*word.split("/")) if "/" in word else Verb(word, word + "s", word + "ed", word + "ed", word + "ing")
        for word in words.split()
    )


LEXICONS = {
    "train": Lexicon(
        people=_nouns(
            "doctor teacher student lawyer guard senator nurse driver farmer baker tourist dentist pilot judge banker "
            "chef author librarian"
        ),
        men=_nouns("king uncle boy father prince waiter husband grandfather monk wizard"),
        women=_nouns(
            "queen aunt girl mother princess/princesses waitress/waitresses wife/wives grandmother nun witch/witches"
        ),
        things=_nouns("plate bottle lamp mirror clock basket spoon jar bowl umbrella toy guitar helmet vase"),
        acts=_verbs(
            "laugh complain cough shout work wait pray "
            "smile/smiles/smiled/smiled/smiling sleep/sleeps/slept/slept/sleeping dance/dances/danced/danced/dancing "
            "travel/travels/traveled/traveled/traveling joke/jokes/joked/joked/joking"
        ),
        deeds=_verbs(
            "defend protect interview thank watch/watches/watched/watched/watching "
            "admire/admires/admired/admired/admiring blame/blames/blamed/blamed/blaming "
            "praise/praises/praised/praised/praising describe/describes/described/described/describing "
            "imitate/imitates/imitated/imitated/imitating"
        ),
        handlings=_verbs(
            "clean wash/washes/washed/washed/washing break/breaks/broke/broken/breaking hide/hides/hid/hidden/hiding "
            "steal/steals/stole/stolen/stealing carry/carries/carried/carried/carrying "
            "drop/drops/dropped/dropped/dropping move/moves/moved/moved/moving"
        ),
        reports=("said", "knew"),
    ),
    "validation": Lexicon(
        people=_nouns("singer poet plumber cyclist surgeon mayor engineer reporter"),
        men=_nouns("brother nephew duke gentleman/gentlemen fisherman/fishermen"),
        women=_nouns("sister niece duchess/duchesses lady/ladies actress/actresses"),
        things=_nouns("cup pot kettle pillow candle hammer drum"),
        acts=_verbs(
            "whisper relax/relaxes/relaxed/relaxed/relaxing swim/swims/swam/swum/swimming cry/cries/cried/cried/crying "
            "hesitate/hesitates/hesitated/hesitated/hesitating gamble/gambles/gambled/gambled/gambling"
        ),
        deeds=_verbs(
            "support question criticize/criticizes/criticized/criticized/criticizing "
            "injure/injures/injured/injured/injuring hurt/hurts/hurt/hurt/hurting"
        ),
        handlings=_verbs(
            "repair lift polish/polishes/polished/polished/polishing forget/forgets/forgot/forgotten/forgetting "
            "burn/burns/burned/burned/burning"
        ),
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
        acts=_verbs(
            "talk jump wander sing/sings/sang/sung/singing argue/argues/argued/argued/arguing "
            "sneeze/sneezes/sneezed/sneezed/sneezing exercise/exercises/exercised/exercised/exercising "
            "apologize/apologizes/apologized/apologized/apologizing"
        ),
        deeds=_verbs(
            "comfort mock photograph punish/punishes/punished/punished/punishing amuse/amuses/amused/amused/amusing "
            "accuse/accuses/accused/accused/accusing encourage/encourages/encouraged/encouraged/encouraging "
            "forgive/forgives/forgave/forgiven/forgiving"
        ),
        handlings=_verbs(
            "collect inspect destroy shake/shakes/shook/shaken/shaking lose/loses/lost/lost/losing "
            "keep/keeps/kept/kept/keeping hold/holds/held/held/holding examine/examines/examined/examined/examining "
            "remove/removes/removed/removed/removing"
        ),
        reports=("believed", "noticed"),
    ),
}
