"""The generated acceptability task: minimal pairs of English sentences from a seeded grammar."""

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import datasets

from agwm_jax.data.lexicon import LEXICONS, Lexicon, Noun
from agwm_jax.data.tasks import Task
from agwm_jax.errors import AgwmError

T = TypeVar("T")
Pair = tuple[str, str]  # acceptable, unacceptable

ADVERBS = ("often", "usually", "always")
ADJECTIVES = ("tall", "old", "young", "rich", "famous", "friendly", "clever", "shy", "lazy", "polite")
THING_ADJECTIVES = ("old", "new", "heavy", "small", "large", "dirty", "expensive", "beautiful", "red", "cheap")
PREPOSITIONS = ("near", "behind", "beside", "next to", "in front of")
ATTEMPTS = 200  # draws of a sentence that already exists before the grammar counts as exhausted


def _pick(rng: random.Random, options: Sequence[T]) -> T:
    # Only random() is promised to give the same numbers in every version of Python; choice and shuffle are not.
    return options[int(rng.random() * len(options))]


def _two(rng: random.Random, options: Sequence[T]) -> tuple[T, T]:
    first = int(rng.random() * len(options))
    second = int(rng.random() * (len(options) - 1))
    return options[first], options[second + (second >= first)]


def _shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    return [item for _, _, item in sorted((rng.random(), index, item) for index, item in enumerate(items))]


def _form(noun: Noun, plural: bool) -> str:
    return noun.plural if plural else noun.singular


def _sentence(*words: str, end: str = ".") -> str:
    text = " ".join(" ".join(words).split()).replace(" ,", ",")
    return text[0].upper() + text[1:] + end


def _predicate(rng: random.Random, lexicon: Lexicon) -> Callable[[bool], str]:
    """A predicate of a person that shows the number of its subject."""
    act, adjective, adverb, kind = _pick(rng, lexicon.acts), _pick(rng, ADJECTIVES), _pick(rng, ADVERBS), rng.random()
    if kind < 0.25:
        return lambda plural: f"{adverb} {act.base if plural else act.third}"
    if kind < 0.5:
        return lambda plural: f"{'have' if plural else 'has'} {act.participle}"
    if kind < 0.75:
        return lambda plural: f"{'are' if plural else 'is'} {adjective}"
    return lambda plural: f"{'were' if plural else 'was'} {act.progressive}"


def _agreement_preposition(rng: random.Random, lexicon: Lexicon, cell: int) -> Pair:
    """Across a prepositional phrase: "The doctor near the guards is tall." / "The doctor near the guards are tall"."""
    plural, attractor = bool(cell & 1), bool(cell & 2)
    if rng.random() < 0.3:
        subject, other = _two(rng, lexicon.things)
        tense, adjective = _pick(rng, (("is", "are"), ("was", "were"))), _pick(rng, THING_ADJECTIVES)
        predicate = lambda number: f"{tense[number]} {adjective}"  # noqa: E731
    else:
        subject, other = _two(rng, lexicon.people + lexicon.men + lexicon.women)
        predicate = _predicate(rng, lexicon)
    start = ("the", _form(subject, plural), _pick(rng, PREPOSITIONS), "the", _form(other, attractor))
    return _sentence(*start, predicate(plural)), _sentence(*start, predicate(not plural))


def _agreement_relative(rng: random.Random, lexicon: Lexicon, cell: int) -> Pair:
    """Across a relative clause: "The doctor who the guards praise laughs." / "... praise laugh"."""
    plural, attractor = bool(cell & 1), bool(cell & 2)
    subject, other = _two(rng, lexicon.people + lexicon.men + lexicon.women)
    deed, predicate = _pick(rng, lexicon.deeds), _predicate(rng, lexicon)
    if cell & 4:
        clause = f"the {_form(other, attractor)} {deed.base if attractor else deed.third}"
    else:
        clause = f"{deed.base if plural else deed.third} the {_form(other, attractor)}"
    start = ("the", _form(subject, plural), "who", clause)
    return _sentence(*start, predicate(plural)), _sentence(*start, predicate(not plural))


def _reflexive(rng: random.Random, lexicon: Lexicon, cell: int) -> Pair:
    """Anaphor: "The queen who met the boys blamed herself." / "... themselves": the wrong form fits the other noun."""
    kinds = ("himself", "herself", "themselves")
    right = cell % 3
    wrong = (right + 1 + cell // 3 % 2) % 3

    def antecedent(kind: int) -> str:
        nouns = (lexicon.men, lexicon.women, lexicon.people + lexicon.men + lexicon.women)[kind]
        return "the " + _form(_pick(rng, nouns), kind == 2)

    binder, other = antecedent(right), antecedent(wrong)
    (inner, outer), report = _two(rng, lexicon.deeds), _pick(rng, lexicon.reports)
    start = _pick(
        rng,
        (
            f"{binder} who {inner.past} {other} {outer.past}",
            f"{binder} who {other} {inner.past} {outer.past}",
            f"{other} {report} that {binder} {outer.past}",
            f"{other} {report} that {binder} had {outer.participle}",
        ),
    )
    return _sentence(start, kinds[right]), _sentence(start, kinds[wrong])


def _determiner_noun(rng: random.Random, lexicon: Lexicon, cell: int) -> Pair:
    """Number in a phrase: "The judge broke these lamps." / "The judge broke this lamps" (or "these lamp")."""
    plural = bool(cell & 1)
    if cell & 4:
        determiner = _pick(rng, (("this", "these"), ("that", "those")))
        noun, adjective = _pick(rng, lexicon.things), _pick(rng, ("", _pick(rng, THING_ADJECTIVES)))
        subject, handling = _form(_pick(rng, lexicon.people), rng.random() < 0.5), _pick(rng, lexicon.handlings)
        frame = f"the {subject} {handling.past} {{}}"
    else:
        determiner = ("this", "these")  # "that polite bakers will wait" could be read as a clause
        noun, adjective = _pick(rng, lexicon.people), _pick(rng, ("", _pick(rng, ADJECTIVES)))
        frame = f"{{}} {_pick(rng, ('will', 'should', 'could'))} {_pick(rng, lexicon.acts).base}"

    def phrase(determiner_plural: bool, noun_plural: bool) -> str:
        return f"{determiner[determiner_plural]} {adjective} {_form(noun, noun_plural)}"

    wrong = phrase(not plural, plural) if cell & 2 else phrase(plural, not plural)
    return _sentence(frame.format(phrase(plural, plural))), _sentence(frame.format(wrong))


def _polarity(rng: random.Random, lexicon: Lexicon, cell: int) -> Pair:
    """Scope: "No doctor who the guards met has ever laughed." / "The doctor who no guards met has ever laughed".

    The words are the same, but in the second "ever" (or "any") stands outside the scope of the negation.
    """
    (subject, other), deed = _two(rng, lexicon.people), _pick(rng, lexicon.deeds)
    plural, other_plural = rng.random() < 0.5, rng.random() < 0.5
    first, second = _form(subject, plural), _form(other, other_plural)
    has, other_has = ("have" if plural else "has"), ("have" if other_plural else "has")
    act, other_act = _two(rng, lexicon.acts)
    variant = cell % 4
    if variant == 0:
        end = f"{deed.past}", f"{has} ever {act.participle}"
        return _sentence("no", first, "who the", second, *end), _sentence("the", first, "who no", second, *end)
    if variant == 1:
        end = f"{deed.past}", f"{_pick(rng, lexicon.handlings).past} any {_pick(rng, lexicon.things).plural}"
        return _sentence("no", first, "who the", second, *end), _sentence("the", first, "who no", second, *end)
    if variant == 2:
        start = ("the", first, "who", has)
        return (
            _sentence(*start, act.participle, has, "not ever", other_act.participle),
            _sentence(*start, "not", act.participle, has, "ever", other_act.participle),
        )

    def clauses(negated: str, positive: str) -> str:
        none = f"no {first} {has} {negated} {act.participle}"
        some = f"the {second} {other_has} {positive} {other_act.participle}"
        return _sentence(*((none, ", but", some) if cell & 4 else (some, ", but", none)))

    return clauses("ever", ""), clauses("", "ever")


def _verb_form(rng: random.Random, lexicon: Lexicon, cell: int) -> Pair:
    """After an auxiliary: "The doctor has broken the lamps." / "The doctor has break the lamps"."""
    verb, plural, adverb = _pick(rng, lexicon.handlings), rng.random() < 0.5, _pick(rng, ("", "probably", "certainly"))
    forms = (verb.participle, verb.base, verb.progressive)
    right = cell % 3
    wrong = (right + 1 + cell // 3 % 2) % 3
    auxiliary = (("has", "have"), ("will", "will"), ("is", "are"))[right][plural]
    subject = "the " + _form(_pick(rng, lexicon.people), plural)
    goal = "the " + _form(_pick(rng, lexicon.things), rng.random() < 0.5)

    def clause(form: str) -> str:
        if cell // 6 % 2:
            return _sentence(auxiliary, subject, form, goal, end="?")
        return _sentence(subject, auxiliary, adverb, form, goal)

    return clause(forms[right]), clause(forms[wrong])


def _there_quantifier(rng: random.Random, lexicon: Lexicon, cell: int) -> Pair:
    """The same words: "There was a doctor praising every guard." / "There was every doctor praising a guard"."""
    # Nouns that take "a", so that both sentences have the same words.
    agent, patient = _two(rng, [noun for noun in lexicon.people if noun.singular[0] not in "aeiou"])
    deed, plural = _pick(rng, lexicon.deeds), bool(cell & 1)
    if plural:
        weak, strong = _pick(rng, ("some", "several", "many")), _pick(rng, ("most", "all the"))
    else:
        weak, strong = "a", _pick(rng, ("every", "each"))
    start, first, second = ("there", "were" if plural else "was"), _form(agent, plural), _form(patient, plural)
    return (
        _sentence(*start, weak, first, deed.progressive, strong, second),
        _sentence(*start, strong, first, deed.progressive, weak, second),
    )


def _question_inversion(rng: random.Random, lexicon: Lexicon, cell: int) -> Pair:
    """The same words: "Is the doctor who is laughing tall?" / "Is the doctor who laughing is tall?"."""
    plural, adjective = bool(cell & 1), _pick(rng, ADJECTIVES)
    noun = _form(_pick(rng, lexicon.people + lexicon.men + lexicon.women), plural)
    act, other = _two(rng, lexicon.acts)
    modal = _pick(rng, ("can", "will", "should"))
    auxiliary, first, second = (
        ("are" if plural else "is", act.progressive, adjective),
        (modal, act.base, other.base),
        ("have" if plural else "has", act.participle, other.participle),
    )[cell // 2 % 3]
    start = (auxiliary, "the", noun, "who")
    return (
        _sentence(*start, auxiliary, first, second, end="?"),
        _sentence(*start, first, auxiliary, second, end="?"),
    )


PHENOMENA: dict[str, Callable[[random.Random, Lexicon, int], Pair]] = {
    "agreement_preposition": _agreement_preposition,
    "agreement_relative": _agreement_relative,
    "reflexive": _reflexive,
    "determiner_noun": _determiner_noun,
    "polarity": _polarity,
    "verb_form": _verb_form,
    "there_quantifier": _there_quantifier,
    "question_inversion": _question_inversion,
}


def _split(seed: int, name: str, size: int) -> datasets.Dataset:
    rng = random.Random(f"agwm_jax.agreement/{seed}/{name}")
    phenomena = list(PHENOMENA.items())
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for number in range(size // 2):
        group, make = phenomena[number % len(phenomena)]
        for _ in range(ATTEMPTS):
            pair = make(rng, LEXICONS[name], number // len(phenomena))
            if seen.isdisjoint(pair):
                break
        else:
            raise AgwmError(
                f"{name}_size {size} is more than the grammar of the agreement task can give: it ran out of new "
                f"sentences for {group} after {len(rows)} rows; ask for fewer."
            )
        seen.update(pair)
        rows += [
            {"text": text, "label": label, "group": group, "pair_id": number}
            for text, label in zip(pair, (1, 0), strict=True)
        ]
    return datasets.Dataset.from_list(_shuffled(rng, rows))


def agreement_task(*, seed: int = 0, train_size: int = 1200, validation_size: int = 400, test_size: int = 800) -> Task:
    """The generated acceptability task: label 1 for an acceptable English sentence, 0 for its unacceptable twin.

    Every pair is minimal (one word changed, or the same words in another order) and lies in one split; the splits share
    function words, adjectives and adverbs, but no noun and no verb. Every word is as frequent in acceptable as in
    unacceptable sentences, up to chance, so that a bag of words does not help.

    Args:
      seed: gives the same sentences on every platform and Python version.
      train_size, validation_size, test_size: sentences, even numbers. The size of one split does not change another.

    Returns:
      A classification task with columns text, label, group (the phenomenon) and pair_id (twins share it).

    Raises:
      AgwmError: a size is odd, below 2, or more than the grammar can give.

    Source: the phenomena follow BLiMP (arXiv 1912.00582); grammar and words are our own.
    """
    sizes = {"train": train_size, "validation": validation_size, "test": test_size}
    for name, size in sizes.items():
        if size < 2 or size % 2:
            raise AgwmError(
                f"{name}_size of the agreement task is {size}: sentences come in pairs, give an even number."
            )
    return Task(
        name="agreement",
        kind="classification",
        label_names=("unacceptable", "acceptable"),
        pair=False,
        metrics=("matthews", "accuracy"),
        report_split="test",
        splits={name: _split(seed, name, size) for name, size in sizes.items()},
    )
