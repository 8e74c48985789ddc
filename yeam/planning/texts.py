"""Tokenizer and chat template of the output, as far as models with one vocabulary need it."""

from __future__ import annotations

from yeam.errors import ConfigError
from yeam.planning.members import Member, Members
from yeam.recipe import LoadedRecipe, ModelRef
from yeam.vocabulary.chat import resolve_chat_template
from yeam.vocabulary.files import tokenizer_files, vocabularies_differ


def tokenizer_donor(loaded: LoadedRecipe, members: Members, donor: Member, notes: list[str]) -> Member:
    """The model whose tokenizer files the output takes: `tokenizer_source`, or the donor.

    With `tokenizer_source` all models must have one vocabulary: a union of equal vocabularies is any of them. Raises
    ConfigError where they differ, naming the two models; without the key a difference is added to `notes`.
    """
    source = loaded.recipe.tokenizer_source
    if source == "base" and loaded.recipe.base_model is None:
        raise loaded.error(("tokenizer_source",), "`base` needs a base model", "add `base_model:`, or use `union`")
    chosen = members.of(source) if isinstance(source, ModelRef) else donor
    if source is not None and not tokenizer_files(chosen.checkpoint.folder):
        raise loaded.error(
            ("tokenizer_source",),
            f"{chosen.ref} has no tokenizer files",
            "name the model whose tokenizer the output shall have",
        )
    for other in members:
        if other is chosen or not vocabularies_differ(chosen.checkpoint.folder, other.checkpoint.folder):
            continue
        if source is not None:
            raise loaded.error(
                ("tokenizer_source",),
                f"the vocabularies of {chosen.ref} and {other.ref} differ",
                "merge models with the same tokenizer; merging vocabularies is not supported yet",
            )
        notes.append(f"the tokenizers of {chosen.ref.label} and {other.ref.label} differ; the output has the former")
    return chosen


def chat_template(loaded: LoadedRecipe, members: Members) -> str | None:
    """The text of the recipe's `chat_template:`. Raises ConfigError with its line."""
    try:
        return resolve_chat_template(loaded.recipe.chat_template, [m.checkpoint.folder for m in members])
    except ConfigError as error:
        raise loaded.error(("chat_template",), error.message, error.remedy) from None
