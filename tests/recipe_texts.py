"""Recipes of the shapes that people publish."""

from __future__ import annotations

GRADIENT_SLERP = """\
slices:
  - sources:
      - model: lab/orca-13b
        layer_range: [0, 40]
      - model: lab/platypus-13b
        layer_range: [0, 40]
merge_method: slerp
base_model: lab/orca-13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # the rest
dtype: float16
"""

TIES = """\
models:
  - model: lab/orca-13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: lab/platypus-13b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: lab/wizard-math-13b
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: lab/llama-2-13b
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""

FRANKENMERGE = """\
slices:
  - sources:
    - model: lab/orca-13b
      layer_range: [0, 24]
  - sources:
    - model: lab/platypus-13b
      layer_range: [20, 40]
      parameters:
        scale: [{filter: o_proj, value: 0.0}, {value: 1}]
    base_model: lab/llama-2-13b
    parameters: {scale: 2}
merge_method: passthrough
parameters:
dtype: float16
"""

MODULES = """\
merge_method: linear
modules:
  text_decoder:
    slices:
      - sources:
          - {model: lab/vlm-a, layer_range: [0, 4], parameters: {weight: 1}}
          - {model: lab/vlm-b, layer_range: [0, 4]}
        parameters: {weight: 2}
    parameters: {weight: 3}
  vision_tower:
    models:
      - model: lab/vlm-a
      - model: lab/vlm-b
parameters: {weight: 4}
dtype: bf16
out_dtype: torch.float32
"""

HEAD = "merge_method: linear\nmodels:\n  - model: lab/a\n"
