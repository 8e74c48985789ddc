"""What tensors mean: roles, layer stacks, fused layouts, tied weights, from config.json, names and shapes alone."""

from yeam.families.anatomy import Anatomy, Meaning
from yeam.families.depth import ConfigUpdate, config_updates
from yeam.families.examine import describe, tied
from yeam.families.naming import aliases_of
from yeam.families.sites import GROUPS, ROLES
from yeam.families.stacks import Stack, rename_layer
from yeam.families.table import FAMILIES, Family
from yeam.families.traits import Traits
from yeam.families.views import View

__all__ = [
    "FAMILIES",
    "GROUPS",
    "ROLES",
    "Anatomy",
    "ConfigUpdate",
    "Family",
    "Meaning",
    "Stack",
    "Traits",
    "View",
    "aliases_of",
    "config_updates",
    "describe",
    "rename_layer",
    "tied",
]
