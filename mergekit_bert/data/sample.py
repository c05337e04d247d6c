"""The sample corpus: three small English tasks generated from our own lexicons and templates.

No row comes from a data set. The labels are decided by how the words are put together (negation, contrast,
who did what to whom), so a linear head on a frozen encoder falls short and fine-tuning pays:

* ``sst``: five-class sentiment of one sentence about a film;
* ``para``: whether two sentences or questions say the same thing;
* ``sts``: similarity from 0 to 5 of two sentences, by the parts of the event on which they agree.

Rows are the same on every machine: all draws go through ``random.Random.random``, whose sequence for an
integer seed is documented not to change.
"""

from collections.abc import Callable
from random import Random
from typing import NamedTuple, TypeAlias, TypeVar

from mergekit_bert.data.lexicon import (
    ADDITIONS,
    ADJECTIVES,
    ASPECTS,
    CITIES,
    CONTRASTS,
    DIMINISHERS,
    DONE_TO_PEOPLE,
    DONE_TO_THINGS,
    GOALS,
    HEARSAY_DENIED,
    HEARSAY_KEPT,
    INTENSIFIERS,
    LIMITS,
    MANNERS,
    NEGATIONS,
    OPENERS,
    PEOPLE,
    PLACES,
    RELATIONS,
    THINGS,
    Concept,
)

SAMPLE_TASKS: tuple[str, ...] = ("sst", "para", "sts")
TRAIN_ROWS = 2000
DEV_ROWS = 400

Row: TypeAlias = tuple[tuple[str, ...], str]
T = TypeVar("T")


class Event(NamedTuple):
    """Who did what to whom, where and how; each part may be worded in several ways."""

    agent: Concept
    action: Concept
    patient: Concept
    place: Concept
    manner: Concept


# How much each part of an event counts in ``sts``, in tenths; the weights add up to the top score.
PART_WEIGHTS: tuple[int, ...] = (12, 14, 12, 7, 5)


def _pick(rng: Random, items: tuple[T, ...]) -> T:
    """One item; ``Random.choice`` may change between Python versions, ``random`` does not."""
    return items[int(rng.random() * len(items))]


def _other(rng: Random, items: tuple[T, ...], taken: T) -> T:
    """One item that is not ``taken``."""
    return _pick(rng, tuple(item for item in items if item != taken))


def _chance(rng: Random, probability: float) -> bool:
    return rng.random() < probability


def _sentence(text: str, end: str = ".") -> str:
    return text[0].upper() + text[1:] + end


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def _clause(rng: Random, aspect: str) -> tuple[str, int]:
    """A clause about ``aspect`` and its opinion from -2 to 2, which the adjective alone does not tell."""
    value = _pick(rng, (-2, -1, 1, 2))
    adjective = _pick(rng, ADJECTIVES[value])
    draw = rng.random()
    if draw < 0.35:
        # "Not superb" and "not good" are both merely bad.
        return _pick(rng, NEGATIONS).format(aspect, adjective), -_sign(value)
    if draw < 0.5:
        # "Truly good" is very good; "almost superb" is merely good.
        adverb = _pick(rng, INTENSIFIERS if abs(value) == 1 else DIMINISHERS)
        return f"{aspect} was {adverb} {adjective}", _sign(value) * (3 - abs(value))
    return f"{aspect} was {adjective}", value


def _hearsay(rng: Random, aspect: str) -> tuple[str, int]:
    """An opinion of others that the rest of the sentence keeps or denies."""
    value = _pick(rng, (-2, -1, 1, 2))
    adjective = _pick(rng, ADJECTIVES[value])
    if _chance(rng, 0.5):
        return _pick(rng, HEARSAY_KEPT).format(aspect, adjective), value
    return _pick(rng, HEARSAY_DENIED).format(aspect, adjective), -_sign(value)


def _sst(rng: Random) -> Row:
    aspect = _pick(rng, ASPECTS)
    draw = rng.random()
    if draw < 0.1:
        return (_sentence(f"{aspect} was {_pick(rng, ADJECTIVES[0])}"),), "2"
    if draw < 0.4:
        text, opinion = (_hearsay if draw < 0.2 else _clause)(rng, aspect)
        return (_sentence(text),), str(opinion + 2)
    main, opinion = _clause(rng, aspect)
    minor, aside = _clause(rng, _other(rng, ASPECTS, aspect))
    if opinion * aside > 0:
        text = _pick(rng, ADDITIONS).format(main, minor)
        verdict = _sign(opinion) * max(abs(opinion), abs(aside))
    else:
        # The conceded clause tempers the verdict, and cancels it when it is the stronger one.
        text = _pick(rng, CONTRASTS).format(main, minor)
        verdict = _sign(opinion) if abs(opinion) >= abs(aside) else 0
        # Readers differ on mixed reviews: some of them put one a step nearer the middle, or off it.
        if _chance(rng, 0.2):
            verdict = 0 if verdict else _sign(opinion)
    return (_sentence(text),), str(verdict + 2)


def _draw_event(rng: Random) -> Event:
    agent = _pick(rng, PEOPLE)
    place, manner = _pick(rng, PLACES), _pick(rng, MANNERS)
    if _chance(rng, 0.6):
        return Event(agent, _pick(rng, DONE_TO_PEOPLE), _other(rng, PEOPLE, agent), place, manner)
    return Event(agent, _pick(rng, DONE_TO_THINGS), _pick(rng, THINGS), place, manner)


def _changed(rng: Random, event: Event, part: int) -> Event:
    """``event`` with another meaning in one part."""
    to_person = event.patient in PEOPLE
    actions, patients = (DONE_TO_PEOPLE, PEOPLE) if to_person else (DONE_TO_THINGS, THINGS)
    pools = (PEOPLE, actions, patients, PLACES, MANNERS)
    values = list(event)
    # Nobody does anything to themselves, so both people are left out when one of them changes.
    taken = (event.agent, event.patient) if part in (0, 2) else (values[part],)
    values[part] = _pick(rng, tuple(concept for concept in pools[part] if concept not in taken))
    return Event(*values)


def _swapped(event: Event) -> Event:
    return event._replace(agent=event.patient, patient=event.agent)


def _event_text(rng: Random, event: Event, negated: bool = False, with_manner: bool = True) -> str:
    """One of the many wordings of ``event``: synonyms, active or passive, place first or last."""
    agent, action, patient, place, manner = (_pick(rng, concept) for concept in event)
    never = "never " if negated else ""
    if _chance(rng, 0.4):
        text = f"the {patient} was {never}{action} by the {agent}"
    else:
        text = f"the {agent} {never}{action} the {patient}"
    text = f"{place}, {text}" if _chance(rng, 0.3) else f"{text} {place}"
    return _sentence(f"{text} {manner}" if with_manner else text)


def _para_event(rng: Random, same: bool) -> tuple[str, str]:
    first = second = _draw_event(rng)
    negated = denied = _chance(rng, 0.15)
    if not same:
        if first.patient in PEOPLE and _chance(rng, 0.25):
            second = _swapped(first)
        elif _chance(rng, 0.2):
            denied = not negated
        else:
            second = _changed(rng, first, _pick(rng, (0, 1, 2, 3)))
    one = _event_text(rng, first, negated, with_manner=False)
    return one, _event_text(rng, second, denied, with_manner=False)


def _para_goal(rng: Random, same: bool) -> tuple[str, str]:
    pools = (GOALS, CITIES, LIMITS)
    first = [_pick(rng, pool) for pool in pools]
    second = list(first)
    if not same:
        part = int(rng.random() * 3)
        second[part] = _other(rng, pools[part], first[part])

    def ask(parts: list[Concept]) -> str:
        goal, city, limit = (_pick(rng, concept) for concept in parts)
        return _sentence(f"{_pick(rng, OPENERS)} {goal} in {city} {limit}", "?")

    return ask(first), ask(second)


def _para_relation(rng: Random, same: bool) -> tuple[str, str]:
    wordings, fillers = _pick(rng, RELATIONS)
    a = _pick(rng, fillers)
    b = _other(rng, fillers, a)
    ends = [(a, b), (a, b)]
    if not same:
        third = _pick(rng, tuple(concept for concept in fillers if concept not in (a, b)))
        ends[1] = (b, a) if _chance(rng, 0.5) else (a, third)
    one, two = (_pick(rng, wordings).format(a=_pick(rng, left), b=_pick(rng, right)) for left, right in ends)
    return _sentence(one, "?"), _sentence(two, "?")


def _para(rng: Random) -> Row:
    same = _chance(rng, 0.5)
    write = _pick(rng, (_para_event, _para_event, _para_goal, _para_relation))
    texts = write(rng, same)
    while texts[0] == texts[1]:
        texts = write(rng, same)
    return texts, str(int(same))


def _sts(rng: Random) -> Row:
    first = second = _draw_event(rng)
    if first.patient in PEOPLE and _chance(rng, 0.2):
        second = _swapped(first)
    for part in sorted(range(5), key=lambda _: rng.random())[: int(rng.random() * 6)]:
        second = _changed(rng, second, part)
    agreed = sum(w for w, a, b in zip(PART_WEIGHTS, first, second, strict=True) if a == b)
    tenths = min(50, max(0, agreed + int(rng.random() * 7) - 3))  # raters are no finer than this
    return (_event_text(rng, first), _event_text(rng, second)), f"{tenths / 10:.1f}"


# Each task has its own seed, so that a change to one leaves the rows of the others alone.
_TASKS: dict[str, tuple[int, Callable[[Random], Row]]] = {
    "sst": (101, _sst),
    "para": (102, _para),
    "sts": (103, _sts),
}


def generate(task: str, split: str) -> list[Row]:
    """Rows of the sample corpus for ``task`` and ``split`` ("train" or "dev"): (texts, label as in a file).

    Both splits are cut from one stream of distinct rows, so they share none, not even with its texts swapped.
    """
    if task not in _TASKS:
        raise ValueError(f"unknown sample task {task!r}; choose one of {', '.join(SAMPLE_TASKS)}")
    if split not in ("train", "dev"):
        raise ValueError(f'unknown split {split!r}; choose "train" or "dev"')
    seed, write = _TASKS[task]
    rng = Random(seed)
    rows: dict[tuple[str, ...], Row] = {}
    while len(rows) < TRAIN_ROWS + DEV_ROWS:
        texts, label = write(rng)
        rows.setdefault(tuple(sorted(texts)), (texts, label))
    distinct = list(rows.values())
    return distinct[:TRAIN_ROWS] if split == "train" else distinct[TRAIN_ROWS:]
