"""The words that a model trained on a small world knows: `csd3d vocabulary`, and the warning about a prompt in others.

A ground truth (`csd3d.evaluation.ground_truth`) whose name is a model's `knows` may have `vocabulary()`, a
`Vocabulary`. No model is opened for it.
"""

import difflib
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from csd3d import registry
from csd3d.arguments import Parser, show

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
SHOWN, LONGEST = 5, 30  # most unknown words in a warning, and most letters of one
LIKE = 0.6  # least likeness by difflib of a word that is named instead
COLUMNS = 100


@dataclass(frozen=True)
class Vocabulary:
    """What can be said to the models of one world: in prompts, and in instructions to an editing model.

    prompts: phrases by group.  instructions: phrases by family.  Both have capitals where a word is to be filled in.
    examples: an instruction of each family.  things: what pictures may show, named where nothing else is like a word.
    """

    prompt: str  # an example
    prompts: dict[str, list[str]]
    instructions: dict[str, list[str]]
    examples: dict[str, str]
    prompt_words: frozenset[str]
    instruction_words: frozenset[str]
    things: tuple[str, ...] = ()

    def words(self, edits: bool) -> frozenset[str]:
        """The words, in small letters, that an editing model, or one of text to image, knows."""
        return self.instruction_words if edits else self.prompt_words


def words_of(text: str) -> list[str]:
    """The words of a text in small letters, each once, in order; numbers are words too."""
    return list(dict.fromkeys(WORD.findall(text.lower())))


def vocabulary_of(knows: str) -> Vocabulary | None:
    """The vocabulary of the ground truth of that name; None if there is no such, or it has none."""
    if knows not in registry.names("ground_truth"):
        return None
    truth = registry.get("ground_truth", knows).thing()
    return truth.vocabulary() if hasattr(truth, "vocabulary") else None


def unknown_words(prior: Any, texts: Sequence[str]) -> list[str]:
    """One warning, in a list, about the words of prompts or instructions that the model does not know; else none.

    Only models that say which world they were trained on (`Prior.knows`) are known not to know a word.
    """
    vocabulary = vocabulary_of(getattr(prior, "knows", ""))
    if vocabulary is None:
        return []
    known = vocabulary.words(prior.edits)
    unknown = [word for word in words_of(" ".join(texts)) if word not in known]
    if not unknown:
        return []
    named = ", ".join(_with_nearest(word, known) for word in unknown[:SHOWN])
    more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    things = f"; it knows things such as {', '.join(vocabulary.things[:4])}" if vocabulary.things else ""
    what = "instruction" if prior.edits else "prompt"
    return [f"{what}: the model does not know {named}{more}{things}; csd3d vocabulary prints all that it knows"]


def _with_nearest(word: str, known: frozenset[str]) -> str:
    near = difflib.get_close_matches(word[:LONGEST], sorted(known), 2, LIKE)
    shown = f"{word[:LONGEST]}…" if len(word) > LONGEST else word
    return f"'{shown}' (nearest: {', '.join(near)})" if near else f"'{shown}'"


# -------------------------------------------------------------------------------------------------- csd3d vocabulary


def main(argv: Sequence[str]) -> int:
    """The command line `csd3d vocabulary`."""
    parser = Parser(prog="csd3d vocabulary", description="Prints the words that the models which ship know.")
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    args = parser.parse_all(argv)
    names = registry.names("ground_truth")
    found = {name: vocabulary for name in names if (vocabulary := vocabulary_of(name)) is not None}
    if args.json:
        show(json.dumps({name: as_json(vocabulary) for name, vocabulary in found.items()}, indent=1))
    else:
        show("\n\n".join(as_text(name, vocabulary) for name, vocabulary in found.items()))
    return 0


def as_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The vocabulary as plain values."""
    families = vocabulary.instructions.items()
    return {
        "prompt": vocabulary.prompt,
        "prompts": vocabulary.prompts,
        "instructions": {name: {"phrases": said, "example": vocabulary.examples[name]} for name, said in families},
    }


def as_text(name: str, vocabulary: Vocabulary) -> str:
    """The vocabulary as text of at most `COLUMNS` columns."""
    prompts = {group: " | ".join(phrases) for group, phrases in vocabulary.prompts.items()}
    instructions = {
        family: f"{' | '.join(phrases)}   ({vocabulary.examples[family]})"
        for family, phrases in vocabulary.instructions.items()
    }
    head = f'prompts of models that know {name}: any part of a sentence such as\n  "{vocabulary.prompt}"'
    return f"{head}\n{_table(prompts)}\n\ninstructions, with an example\n{_table(instructions)}"


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows)) + 4
    blank = " " * width
    return "\n".join(
        textwrap.fill(text, COLUMNS, initial_indent=f"  {name}".ljust(width), subsequent_indent=blank)
        for name, text in rows.items()
    )
