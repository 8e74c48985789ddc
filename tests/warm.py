"""Imported by the process that `forked` forks from: everything that a merge imports, before there are any threads."""

import torch.distributed
import transformers
from transformers.models.llama import modeling_llama

import yeam.api
import yeam.cli.app
import yeam.engine.assemble
import yeam.engine.stages
import yeam.report.licence
import yeam.report.merge_report
from yeam.methods import methods

methods()
__all__ = ["modeling_llama", "torch", "transformers", "yeam"]
