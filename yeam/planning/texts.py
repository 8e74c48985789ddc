"""Tokenizer and chat template of the output, as far as models with one vocabulary need it."""

from __future__ import annotations

from yeam.errors import ConfigError
from yeam.planning.members import Member, Members
from yeam.recipe import LoadedRecipe, ModelRef
from yeam.vocabulary.chat import resolve_chat_template
from yeam.vocabulary.files import same_vocabulary


def tokenizer_donor(loaded: LoadedRecipe, members: Members, donor: Member) -> Member:
    """The model whose tokenizer files the output takes: `tokenizer_source`, or the donor.

    With `tokenizer_source` all models must have one vocabulary: a union of equal vocabularies is any of them. Raises ConfigError
    where they differ, naming the two models.
    """
    source = loaded.recipe.tokenizer_source
    if source is None:
        return donor
    chosen = members.of(source) if isinstance(source, ModelRef) else donor
    for other in members:
        if same_vocabulary(chosen.checkpoint.folder, other.checkpoint.folder) is False:
            raise loaded.error(
                ("tokenizer_source",),
                f"the vocabularies of {chosen.ref} and {other.ref} differ, and merging vocabularies is not supported yet",
                "merge models with the same tokenizer",
            )
    return chosen


def chat_template(loaded: LoadedRecipe, members: Members) -> str | None:
    """The text of the recipe's `chat_template:`. Raises ConfigError with its line."""
    try:
        return resolve_chat_template(loaded.recipe.chat_template, [m.checkpoint.folder for m in members])
    except ConfigError as error:
        raise loaded.error(("chat_template",), error.message, error.remedy) from None
