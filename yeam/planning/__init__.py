"""From a checked recipe to the list of jobs that the engine carries out."""

from yeam.planning.jobs import Input, Job, Model, Plan, Shard, index_json, layout

__all__ = ["Input", "Job", "Model", "Plan", "Shard", "index_json", "layout"]
