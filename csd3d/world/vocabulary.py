"""What can be said to the models that were trained on the world, see `csd3d.vocabulary`."""

from csd3d.vocabulary import Vocabulary, words_of
from csd3d.world.language import DESIGNS, FAMILIES, NOTHING, ON_PLATE, VIEW_WORDS
from csd3d.world.scene import BACKDROPS, COLOURS, MATERIALS, PATTERNS, TIMES
from csd3d.world.shapes import KINDS

EXAMPLE = "a blue metal duck with red stripes, wearing a yellow hat, grey background, front view"
GRAMMAR = "a an the object with and"  # what joins the words of the groups
FILLED = {"colour": "red", "pattern": "stripes", "kind": "duck", "backdrop": "blue"}  # in examples


def groups() -> dict[str, list[str]]:
    """Everything that a prompt can say, by group; COLOUR stands for one of the colours."""
    return {
        "kinds": list(KINDS),
        "colours": list(COLOURS),
        "materials": list(MATERIALS),
        "patterns": [PATTERNS[0], *(f"with COLOUR {design}" for design in DESIGNS)],
        "sizes": ["small"],
        "hats": ["wearing a hat", "wearing a COLOUR hat"],
        "covers": ["covered with snow", ON_PLATE],
        "backgrounds": [f"{name} background" for name in BACKDROPS],
        "times": list(TIMES),
        "views": ["front view", "side view", *list(VIEW_WORDS.values())[1:], "overhead view"],
        "quality": ["blurry"],
    }


def vocabulary() -> Vocabulary:
    """The vocabulary of the world."""
    prompts = groups()
    fills = {"colour": COLOURS, "pattern": DESIGNS, "kind": KINDS, "backdrop": BACKDROPS}
    capitals = {key: key.upper() for key in fills}
    phrases = {name: family.phrases for name, family in FAMILIES.items()} | {"nothing": NOTHING}
    said = [text.replace("COLOUR", "") for group in prompts.values() for text in group]
    told = [phrase.format(**dict.fromkeys(fills, "")) for family in phrases.values() for phrase in family]
    told += [word for values in fills.values() for word in values]
    return Vocabulary(
        prompt=EXAMPLE,
        prompts=prompts,
        instructions={name: [phrase.format(**capitals) for phrase in family] for name, family in phrases.items()},
        examples={name: family[0].format(**FILLED) for name, family in phrases.items()},
        prompt_words=frozenset(words_of(f"{' '.join(said)} {GRAMMAR}")),
        instruction_words=frozenset(words_of(f"{' '.join(told)} {GRAMMAR}")),
        things=tuple(KINDS),
    )
