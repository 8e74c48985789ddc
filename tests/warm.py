"""Imported by the process that `forked` forks from: everything that a merge imports, before there are any threads."""

import torch.distributed
import transformers

import yeam.api
import yeam.cli.app
import yeam.engine.assemble
import yeam.engine.stages
import yeam.report.licence
import yeam.report.merge_report
from yeam.methods import methods

methods()
__all__ = ["torch", "transformers", "yeam"]
