"""The 4-D core: rays, frames and length, as pure functions on tensors. No file, no model, no configuration is known here.

`rays.ray_point` resolves several updates into one, `frames.spread_` equalises it, `length` says how far to follow it.
"""
