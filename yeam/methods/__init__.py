"""Merge methods: one file per family of methods, each method one function registered with `merge_method`."""

from yeam.methods.inputs import Inputs, Tile
from yeam.methods.registry import Method, Parameter, PerSource, Whole, merge_method, method_named, methods

__all__ = [
    "Inputs",
    "Method",
    "Parameter",
    "PerSource",
    "Tile",
    "Whole",
    "merge_method",
    "method_named",
    "methods",
]
