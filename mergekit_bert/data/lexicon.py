"""The words of the sample corpus: phrases grouped by meaning, and templates. Written for it; no row of a data set."""

from typing import TypeAlias

Concept: TypeAlias = tuple[str, ...]
"""Phrases with the same meaning."""

# sst

ASPECTS: Concept = (
    "the acting",
    "the plot",
    "the script",
    "the dialogue",
    "the soundtrack",
    "the ending",
    "the pacing",
    "the camera work",
    "the humor",
    "the lead actress",
    "the villain",
    "the romance",
    "the opening scene",
    "the animation",
    "the editing",
    "the cast",
    "the story",
    "the direction",
    "the costume design",
)
# Adjectives by strength of opinion, from very bad (-2) to very good (2).
ADJECTIVES: dict[int, Concept] = {
    -2: ("awful", "terrible", "dreadful", "horrible", "atrocious", "unbearable", "appalling", "hideous"),
    -1: ("dull", "weak", "bland", "clumsy", "tedious", "lazy", "stale", "messy", "shallow", "boring"),
    0: ("average", "ordinary", "passable", "unremarkable", "so-so", "neither good nor bad", "mediocre"),
    1: ("good", "pleasant", "decent", "charming", "likable", "engaging", "fresh", "solid", "clever", "fun"),
    2: ("brilliant", "superb", "wonderful", "magnificent", "stunning", "amazing", "fantastic", "glorious"),
}
INTENSIFIERS: Concept = ("truly", "extremely", "incredibly", "exceptionally")
DIMINISHERS: Concept = ("almost", "nearly", "at times", "close to")
NEGATIONS: Concept = ("{} was not {}", "{} was never {}", "{} was hardly {}", "nobody found {} {}")
HEARSAY_KEPT: Concept = ("they called {} {} and were right", "I was told {} was {}, and it was")
HEARSAY_DENIED: Concept = ("they called {} {} and were wrong", "I was told {} was {}, and it was not")
# The main clause, which carries the verdict, is {0}; the conceded one is {1}.
CONTRASTS: Concept = (
    "{1}, but {0}",
    "{1}, yet {0}",
    "although {1}, {0}",
    "while {1}, {0}",
    "{0}, even though {1}",
    "{0}, although {1}",
)
ADDITIONS: Concept = ("{0} and {1}", "{0}, and {1} too")

# para, sts

PEOPLE: tuple[Concept, ...] = (
    ("doctor", "physician"),
    ("lawyer", "attorney"),
    ("teacher", "instructor"),
    ("policeman", "cop"),
    ("kid", "child"),
    ("author", "writer"),
    ("boss", "manager"),
    ("chef", "cook"),
    ("thief", "burglar"),
    ("singer", "vocalist"),
    ("tourist", "traveler"),
    ("old lady", "elderly woman"),
    ("king", "monarch"),
    ("neighbor", "man next door"),
    ("pilot", "aviator"),
    ("priest", "clergyman"),
    ("farmer", "rancher"),
)
THINGS: tuple[Concept, ...] = (
    ("car", "automobile"),
    ("couch", "sofa"),
    ("bike", "bicycle"),
    ("rug", "carpet"),
    ("coat", "jacket"),
    ("gift", "present"),
    ("picture", "image"),
    ("boat", "vessel"),
    ("dish", "plate"),
    ("cup", "mug"),
    ("bag", "sack"),
    ("statue", "sculpture"),
    ("letter", "note"),
    ("ring", "piece of jewelry"),
)
# Past forms that are participles too, so that one form serves active and passive.
DONE_TO_PEOPLE: tuple[Concept, ...] = (
    ("helped", "assisted"),
    ("called", "phoned"),
    ("praised", "complimented"),
    ("mocked", "ridiculed"),
    ("hired", "employed"),
    ("followed", "trailed"),
    ("rescued", "saved"),
    ("scared", "frightened"),
    ("tricked", "fooled"),
    ("questioned", "interviewed"),
    ("hit", "struck"),
    ("warned", "alerted"),
)
DONE_TO_THINGS: tuple[Concept, ...] = (
    ("repaired", "fixed"),
    ("bought", "purchased"),
    ("cleaned", "washed"),
    ("found", "discovered"),
    ("lost", "misplaced"),
    ("damaged", "harmed"),
    ("built", "made"),
    ("moved", "shifted"),
    ("shipped", "mailed"),
    ("burned", "torched"),
    ("polished", "buffed"),
    ("painted", "colored"),
)
PLACES: tuple[Concept, ...] = (
    ("at the shop", "at the store"),
    ("in the woods", "in the forest"),
    ("on the street", "on the road"),
    ("in the flat", "in the apartment"),
    ("at the college", "at the university"),
    ("at sea", "on the ocean"),
    ("at the hospital", "at the clinic"),
    ("by the creek", "by the stream"),
    ("downtown", "in the center"),
    ("in the basement", "in the cellar"),
    ("at work", "at the office"),
    ("in the garden", "in the yard"),
)
MANNERS: tuple[Concept, ...] = (
    ("quickly", "rapidly"),
    ("quietly", "silently"),
    ("at noon", "at midday"),
    ("at night", "after dark"),
    ("by accident", "accidentally"),
    ("on purpose", "deliberately"),
    ("twice", "two times"),
    ("every day", "daily"),
    ("last week", "a week ago"),
    ("angrily", "furiously"),
    ("gladly", "happily"),
)

GOALS: tuple[Concept, ...] = (
    ("find a cheap flat", "rent an inexpensive apartment"),
    ("lose weight", "get slimmer"),
    ("learn to cook", "master cooking"),
    ("earn money online", "make cash on the internet"),
    ("quit smoking", "give up cigarettes"),
    ("get a job", "find work"),
    ("adopt a dog", "take in a puppy"),
    ("sleep better", "improve my sleep"),
    ("sell my car", "find a buyer for my automobile"),
    ("make new friends", "meet people"),
    ("learn guitar", "study the guitar"),
    ("get fit", "get into shape"),
    ("start a business", "found a company"),
    ("fix my laptop", "repair my computer"),
)
OPENERS: Concept = ("how can I", "what is the best way to", "how do I", "what should I do to", "how best to")
CITIES: tuple[Concept, ...] = (
    ("Boston",),
    ("Berlin",),
    ("London",),
    ("Tokyo",),
    ("Paris",),
    ("Madrid",),
    ("Chicago",),
    ("Sydney",),
    ("Rome",),
    ("New York",),
    ("Moscow",),
    ("Cairo",),
)
LIMITS: tuple[Concept, ...] = (
    ("in two weeks", "within a fortnight"),
    ("in two months", "within 2 months"),
    ("in three weeks", "within 3 weeks"),
    ("in three months", "within 90 days"),
    ("in a week", "within 7 days"),
    ("in a year", "within 12 months"),
)
FOODS: tuple[Concept, ...] = (
    ("tea",),
    ("coffee",),
    ("milk",),
    ("rice",),
    ("pasta",),
    ("fish",),
    ("chicken",),
    ("butter",),
    ("honey",),
)
SUBJECTS: tuple[Concept, ...] = (
    ("math", "mathematics"),
    ("physics",),
    ("history",),
    ("biology",),
    ("law",),
    ("medicine",),
    ("finance",),
)
# Wordings of a relation between {a} and {b}, with what can fill them; the order of the two always matters.
RELATIONS: tuple[tuple[Concept, tuple[Concept, ...]], ...] = (
    (
        (
            "how long is the flight from {a} to {b}",
            "how many hours does it take to fly to {b} from {a}",
            "how long does it take to get from {a} to {b} by plane",
        ),
        CITIES,
    ),
    (
        (
            "why did they move from {a} to {b}",
            "what made them leave {a} for {b}",
            "for what reason did they relocate to {b} from {a}",
        ),
        CITIES,
    ),
    (("is {a} healthier than {b}", "is {b} less healthy than {a}", "compared with {b}, is {a} healthier"), FOODS),
    (("can I use {a} instead of {b}", "can {b} be replaced with {a}", "can {a} stand in for {b}"), FOODS),
    (("is {a} harder than {b}", "is {b} easier than {a}", "compared with {b}, is {a} more difficult"), SUBJECTS),
    (("should I study {a} before {b}", "should I study {b} after {a}", "does {a} come before {b}"), SUBJECTS),
)
