"""Tokenizer files and chat template of the output, where the models keep their vocabularies."""

from __future__ import annotations

from yeam.errors import ConfigError
from yeam.planning.members import Member, Members
from yeam.recipe import LoadedRecipe
from yeam.vocabulary.chat import resolve_chat_template
from yeam.vocabulary.files import vocabulary_files
from yeam.vocabulary.tokens import vocabularies_differ


def tokenizer_donor(members: Members, donor: Member, notes: list[str]) -> Member:
    """The model whose tokenizer files the output takes where the recipe names none; notes which vocabularies differ.

    It is the model whose config the output has, or the first that has a tokenizer, as all have embeddings of one size.
    """
    if not vocabulary_files(donor.checkpoint.folder):
        for other in members:
            if vocabulary_files(other.checkpoint.folder):
                notes.append(f"{donor.ref.label} has no tokenizer; the output has that of {other.ref.label}")
                donor = other
                break
    for other in members:
        if other is not donor and vocabularies_differ(donor.checkpoint.folder, other.checkpoint.folder):
            notes.append(difference(donor, other))
    return donor


def difference(donor: Member, other: Member) -> str:
    """The note on a model whose tokenizer the output does not have."""
    return f"the tokenizers of {donor.ref.label} and {other.ref.label} differ; the output has the former"


def chat_template(loaded: LoadedRecipe, members: Members) -> str | None:
    """The text of the recipe's `chat_template:`. Raises ConfigError with its line."""
    try:
        return resolve_chat_template(loaded.recipe.chat_template, [m.checkpoint.folder for m in members])
    except ConfigError as error:
        raise loaded.error(("chat_template",), error.message, error.remedy) from None
